"""The page of the docs that says which tool to trust for what, written from what was measured and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scipy.stats import binomtest

from dit_lens.plants.build import KINDS
from dit_lens.plants.measured import Measured
from dit_lens.plants.readings import ALARM, ALARM_RATE, DRAWS, PROBE_ALARM, SCALE_ERROR, alarm, allowed
from dit_lens.plants.table import TABLE, TOOLS
from dit_lens.plants.tools import PAIRS, PROBED

PLANTS = {
    "text": "The cross-attention of one block brings the answer from the prompt to the visual tokens.",
    "copy": "One head of the self-attention of one block copies it from the first latent frame to all others.",
    "mlp": "The MLP of one block computes it, as the product of two features of the first image.",
    "step": "As copy, at one step only; from then on the noisy latents keep it.",
    "redundant": "As text, in two blocks, either of which is enough.",
    "distractor": "As text; another block writes a larger update that follows the answer and that nobody reads.",
    "branch": "The MLP of one block passes the first image on, if the prompt of its guidance branch opens a gate.",
}

VERDICTS = {
    "names": "has an effect at the planted place and at no other",
    "boundary": "has an effect at every place on one side of the plant",
    "everywhere": "has an effect at every place: there is an answer, and it does not say where it is made",
    "misled": "has an effect at a place that plays no part in the answer",
    "blind": "has no effect anywhere, though there is a plant",
    "silent": "has no effect anywhere, and there is no plant",
}

GUIDE = """To find where an answer is *made*, patch what a block adds (`update`), and in the block that this names the outputs
of its parts (`attn`, `cross_attn`, `mlp`) and its `heads`: they name the place in every kind whose mechanism goes through
them, and say that there are two where there are two. Patching the whole stream (`resid`) gives a boundary at best, and with
an answer that comes from the image an effect at every block; cut to the frame that shows the answer it tells where the answer
*arrives*, and cut to the first frame until where it is still needed there. Ablations (`zero`, `mean`, `skip`, the knockouts)
tell what is *needed*, not what is enough: they see nothing of an answer that is made twice, their effect is half of a patch's
because they leave no answer rather than the donor's, and a knockout sees only what goes through that attention. `resample`
still sees redundancy, as a wrong answer contradicts the other block, but its effect is a mean over draws and needs many of
them. `attribution` agrees with `update` where the answer is linear in it, and is blind where a norm or a softmax is
saturated: look at the agreement with real patches that comes with every result. A `probe` tells what is *present*: it reads
an answer that nobody uses as well as one that is. `latents` tells when the answer is fixed: a sharp rise is a step that
decides, a rise with the noise level is none. Effects by branch are weighed by the guidance, so they leave the range from 0
to 1. Before believing any share of the way from clean to donor, look at whether clean and donor differ at all (last
section)."""


CHANGED = """The table, the thresholds and what a size may be off by were fixed before the first run of these tools. One thing was
changed after it: the sampling of the `probe`. Samples that shared their noise stood in both halves of its split, and it was
below chance where nothing is to be read and weak where something is; now no noise is in both halves, and there are twice as
many samples."""


def page(found: Sequence[Measured]) -> str:
    """The whole page, as Markdown.

    Args:
        found: what was measured, on models of every kind and on models without a plant.
    """
    planted = [model for model in found if model.truth.kind != "none"]
    plain = [model for model in found if model.truth.kind == "none"]
    kinds = [kind for kind in KINDS if any(model.truth.kind == kind for model in planted)]
    parts = [
        "# Which tool to trust for what",
        "<!-- Written by `python -m dit_lens.plants`. Change dit_lens/plants and run it again, not this page. -->",
        f"Every tool was run on {len(planted)} planted models (`dl.planted`), whose mechanism was set by hand and is known, and"
        f" on {len(plain)} models without a plant. What each must report was written down before any was run"
        " (`dit_lens/plants/table.py`); here it stands beside what was measured. All numbers are in `tools.json`.",
        "## Reading guide",
        " ".join(GUIDE.split("\n")),
        *_glance(planted, kinds),
        *_misses(found),
        *(part for kind in kinds for part in _kind(kind, [model for model in planted if model.truth.kind == kind])),
        *_alarms(planted, plain),
        *_shares(plain),
    ]
    return "\n\n".join(parts) + "\n"


def _glance(planted: Sequence[Measured], kinds: Sequence[str]) -> list[str]:
    """Every tool and kind in one table."""

    def cell(tool: str, kind: str) -> str:
        models = [model for model in planted if model.truth.kind == kind]
        held = sum(not model.misses(tool) for model in models)
        word = TABLE[kind][tool].verdict
        return word if held == len(models) else f"{word} ({held} of {len(models)})"

    rows = [[f"`{tool}`", how.how, *(cell(tool, kind) for kind in kinds)] for tool, how in TOOLS.items()]
    return [
        "## At a glance",
        "What a tool must report, in a word; where not every model of a kind bears it out, how many do.",
        _table(["word", "the tool"], [[f"*{word}*", meaning] for word, meaning in VERDICTS.items()]),
        _table(["tool", "what it does", *kinds], rows),
    ]


def _misses(found: Sequence[Measured]) -> list[str]:
    """Every entry that does not hold, one by one."""
    count = sum(len(model.found) for model in found)
    missed = [
        f"* {model.name}, `{tool}`: at {place}, found {model.effects(tool)[place]:.2f} in place of"
        f" {model.expected(tool)[place]:.2f}"
        for model in found
        for tool in model.found
        for place in model.misses(tool)
    ]
    entries = sum(bool(model.misses(tool)) for model in found for tool in model.found)
    rule = (
        "An *effect* is how far an edit takes the final answer from the clean one (0) towards the donor's (1); halfway, there is"
        f" no answer any more. It is the mean over {PAIRS} pairs of samples with opposite answers. It may be off by {ALARM}, and"
        f" by {SCALE_ERROR:.0%} of what it is to be. `resample` draws {DRAWS} times and may be off by three standard errors"
        f" besides. Of the `probe`, an effect is 2 x (area under the ROC curve) - 1 on the held-out half of {PROBED} samples"
        f" (no noise is in both halves):"
        f" within {SCALE_ERROR} of 1 where the answer can be read, and below {PROBE_ALARM} where it cannot."
    )
    said = f"Of {count} entries (tools x models), {count - entries} hold" + (", and these do not:" if missed else ".")
    return ["## Does the table hold?", rule, " ".join(CHANGED.split("\n")), said, *(["\n".join(missed)] if missed else [])]


def _kind(kind: str, models: Sequence[Measured]) -> list[str]:
    """What must come out on one kind, and what did."""
    rows = []
    for tool in TOOLS:
        entry = TABLE[kind][tool]
        held = sum(not model.misses(tool) for model in models)
        must = f"{entry.verdict}: {entry.where}" + (f", {entry.size:g}" if entry.size else "")
        rows.append([f"`{tool}`", must, entry.reason, _worst(tool, models), f"{held} of {len(models)}"])
    about = PLANTS[kind]
    if kind == "distractor":
        early = sum((model.truth.distractor or 0) < (model.truth.block or 0) for model in models)
        about += f" It comes before the plant in {early} of {len(models)} models, and misleads a probe in these only."
    return [
        f"## {kind}",
        about,
        _table(["tool", "must report", "because", "largest deviation (allowed)", "models as written"], rows),
    ]


def _worst(tool: str, models: Iterable[Measured]) -> str:
    """The deviation that comes nearest to what is allowed, or goes furthest beyond it."""
    worst = (0.0, 0.0, allowed(tool, 0.0))
    for model in models:
        effects = model.effects(tool)
        for place, size in model.expected(tool).items():
            error, most = abs(effects[place] - size), allowed(tool, size)
            worst = max(worst, (error / most, error, most))
    return f"{worst[1]:.3f} ({worst[2]:.2f})"


def alarmed(model: Measured, tool: str) -> bool:
    """Whether a tool finds something at a place where there is nothing to find."""
    effects, expected = model.effects(tool), model.expected(tool)
    return any(abs(effects[place]) > alarm(tool) for place, size in expected.items() if size == 0)


def _alarms(planted: Sequence[Measured], plain: Sequence[Measured]) -> list[str]:
    """How often a tool finds something where there is nothing."""
    rows = []
    for tool in TOOLS:
        count = sum(alarmed(model, tool) for model in plain)
        exact = binomtest(count, len(plain)).proportion_ci(method="exact")
        largest = max(abs(size) for model in plain for size in model.found[tool])
        idle = [model for model in planted if 0 in model.expected(tool).values()]
        beside = f"{sum(alarmed(model, tool) for model in idle)} of {len(idle)}"
        rate = f"{count / len(plain):.0%} [{exact.low:.0%}, {exact.high:.1%}]"
        rows.append([f"`{tool}`", f"{alarm(tool):g}", f"{count} of {len(plain)}", rate, f"{largest:.4f}", beside])
    unseen = binomtest(0, len(plain)).proportion_ci(method="exact").high
    stated = (
        "A *false alarm* is a model without a plant on which a tool finds an effect larger than its threshold, at any place."
        f" Every tool states a rate of at most {ALARM_RATE:.0%}. Intervals are exact (Clopper-Pearson, 95%): with"
        f" {len(plain)} models none can show that a rate is below {unseen:.1%}, only that it is"
        " not refuted. These models are quiet: their answer channel barely feels the rest, so they test for leaks in a tool more"
        " than for its behaviour in noise. The last column is about planted models: on how many of those with places that play no"
        " part a tool finds something at one of these."
    )
    head = ["tool", "threshold", "false alarms", "rate [interval]", "largest effect", "alarms beside a plant"]
    return ["## False alarms", stated, _table(head, rows)]


def _shares(plain: Sequence[Measured]) -> list[str]:
    """The trap of a share of nothing."""
    shares = [model.share for model in plain if model.share is not None]
    large = sum(share > 0.5 for share in shares)
    return [
        "## A share of nothing",
        "The column `effect` of `dl.sweep` is the share of the way from clean to donor, and on a model in which clean and donor"
        f" give the same answer that is a share of leakage and rounding. On {large} of the {len(plain)} models without a plant,"
        " `resid` in that unit has an effect of more than half at some block, although no answer is there to be moved; on"
        f" {len(plain) - len(shares)} clean and donor are the same bits, and the column holds no number. So the effects above are"
        " in units of the answer itself. In your own sweeps, read the columns `clean` and `donor` first.",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
