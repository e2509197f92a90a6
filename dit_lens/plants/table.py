"""What each tool must report on each kind of planted model, written down before any tool was run on one.

`TOOLS` says how each tool is run, `TABLE[kind][tool]` what must come out, and why. An *effect* is how far an edit takes
the final answer from the clean one towards the donor's: 0 leaves it, 1 gives the donor's, and 1/2 is halfway, where there
is no answer any more, which is what an ablation does at best. For attribution it is the effect predicted; for a probe it
is 1 where the answer can be read and 0 where it cannot.

| verdict | what the tool does there |
|---|---|
| names | has an effect at the planted place and at no other |
| boundary | has an effect at every place on one side of the plant |
| everywhere | has an effect at every place, so it says that there is an answer and not where it is made |
| misled | has an effect at a place that plays no part in the answer |
| blind | has no effect anywhere, though there is a plant |
| silent | has no effect anywhere, and there is no plant |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dit_lens.errors import InputError

Verdict = Literal["names", "boundary", "everywhere", "misled", "blind", "silent"]
Place = int | str | tuple[int, int]
"""A block, a step, a branch, or a (block, head)."""


@dataclass(frozen=True)
class Truth:
    """What was planted where.

    Attributes:
        kind: what was planted. block: the block that makes the answer. component: the module of it, a site's name.
        head: of the self-attention, where the component is `attn`. step: where the answer is fixed at one step only.
        branches: the guidance branches in which it works. reads: what pairs differ in, the `text` or the first `image`.
        frame: the latent frame that shows the answer. second: the other block of a redundant pair, later than `block`.
        distractor: a block that writes a large update without effect.
    """

    kind: str
    block: int | None = None
    component: Literal["attn", "cross_attn", "mlp"] | None = None
    head: int | None = None
    step: int | None = None
    branches: tuple[str, ...] = ("cond", "uncond")
    reads: Literal["text", "image"] = "image"
    frame: int = -1
    second: int | None = None
    distractor: int | None = None


@dataclass(frozen=True)
class Tool:
    """How a tool is run: on every step and branch and on all tokens, unless it says otherwise.

    Attributes:
        axis: what it is run over, one place at a time. how: the edit or the measurement.
    """

    axis: Literal["block", "head", "step", "branch"]
    how: str


@dataclass(frozen=True)
class Entry:
    """What a tool must report on a kind of planted model.

    Attributes:
        verdict: in a word. where: the rule for the places that have an effect (see `expected`). size: the effect there,
            the mean over samples. reason: why it must be so.
    """

    verdict: Verdict
    where: str
    size: float
    reason: str

    def expected(self, truth: Truth, blocks: int, heads: int, sigmas: Sequence[float], guidance: float) -> dict[Place, float]:
        """The effect at every place of the tool's axis.

        Args:
            truth: of the model. blocks, heads: how many it has. sigmas: of the steps, then 0. guidance: the scale.
        """
        first = -1 if truth.block is None else truth.block
        second = first if truth.second is None else truth.second
        noise = first if truth.distractor is None else truth.distractor
        steps = range(len(sigmas) - 1)
        branches: dict[Place, float] = {"cond": guidance, "uncond": 1 - guidance}
        shares: dict[str, Mapping[Place, float]] = {
            "no block": {b: 0 for b in range(blocks)},
            "every block": {b: 1 for b in range(blocks)},
            "the block": {b: b == first for b in range(blocks)},
            "both blocks": {b: b in (first, second) for b in range(blocks)},
            "from the block on": {b: b >= first for b in range(blocks)},
            "before the block": {b: b < first for b in range(blocks)},
            "from the second block on, half of it from the first on": {
                b: ((b >= first) + (b >= second)) / 2 for b in range(blocks)
            },
            "from the block or the distractor on": {b: b >= min(first, noise) for b in range(blocks)},
            "no head": {(b, h): 0 for b in range(blocks) for h in range(heads)},
            "the head": {(b, h): (b, h) == (first, truth.head) for b in range(blocks) for h in range(heads)},
            "no step": {s: 0 for s in steps},
            "the step": {s: s == truth.step for s in steps},
            "after the step": {s: s > (len(sigmas) if truth.step is None else truth.step) for s in steps},
            "the way gone before the step": {s: sigmas[0] - sigmas[s] for s in steps},
            "the way gone in the step": {s: sigmas[s] - sigmas[s + 1] for s in steps},
            "no branch": {b: 0 for b in branches},
            "the branch": {b: b in truth.branches for b in branches},
            "each branch by its weight": branches,
        }
        if self.where not in shares:
            raise InputError(f"there is no rule {self.where!r} for where a tool has an effect")
        return {place: float(share) * self.size for place, share in shares[self.where].items()}


TOOLS: Mapping[str, Tool] = {
    "resid": Tool("block", "patch the stream after a block with the donor's"),
    "resid_first_frame": Tool("block", "the same on the tokens of the first latent frame only"),
    "resid_last_frame": Tool("block", "the same on the tokens of the last latent frame only"),
    "update": Tool("block", "patch what a block adds to the stream with the donor's"),
    "attn": Tool("block", "patch the output of the self-attention"),
    "cross_attn": Tool("block", "patch the output of the cross-attention"),
    "mlp": Tool("block", "patch the output of the MLP"),
    "heads": Tool("head", "patch one head of the self-attention"),
    "zero": Tool("block", "set a block's update to zero"),
    "mean": Tool("block", "set a block's update to its mean over a balanced pool of clean runs"),
    "resample": Tool("block", "set a block's update to that of another run of a balanced pool, drawn at random"),
    "skip": Tool("block", "skip a block"),
    "knockout_text": Tool("block", "no visual token attends to the text in a block"),
    "knockout_first_frame": Tool("block", "no token of a later frame attends to the first latent frame in a block"),
    "attribution": Tool("block", "gradient of the same-step velocity's answer x (donor's update - clean update), over all steps"),
    "probe": Tool("block", "a linear probe for the answer on the stream after a block, answer frame, planted step and branch"),
    "latents": Tool("step", "replace the latents that a step takes by the donor's"),
    "update_by_step": Tool("step", "patch the planted block's update at one step (no plant: any block's)"),
    "update_by_branch": Tool("branch", "patch the planted block's update in one branch (no plant: any block's)"),
}

_ELSEWHERE = "this part of a block has no share in the mechanism"
_CUT_ELSEWHERE = "the mechanism does not go through this attention"
_ADDED = "the answer is in what this block adds, and nothing after it changes it"
_GONE = "without the block's update there is no answer"
_BALANCED = "over a balanced pool the answers cancel, so the mean update carries none"
_DRAWN = "half of the pool has the other answer, so on average half of the effect"
_TRAVELLED = (
    "every step moves the latents by its stride, so the donor's latents bring the way gone until then, and no step decides"
)
_STRIDES = "every step moves the latents by its stride, so each step has its share"
_ONE_BRANCH = "the other branch has nothing to bring, whatever is patched there"
_BOTH_BRANCHES = "both branches carry the answer, and guidance weighs them with w and 1 - w"
_PRESENT = "the donor's image is in the stream from the patch embedding on: every block's stream brings it"

_AROUND: Mapping[str, Entry] = {
    "attn": Entry("blind", "no block", 0, _ELSEWHERE),
    "cross_attn": Entry("blind", "no block", 0, _ELSEWHERE),
    "mlp": Entry("blind", "no block", 0, _ELSEWHERE),
    "heads": Entry("blind", "no head", 0, _ELSEWHERE),
    "knockout_text": Entry("blind", "no block", 0, _CUT_ELSEWHERE),
    "knockout_first_frame": Entry("blind", "no block", 0, _CUT_ELSEWHERE),
}
_IN_ONE_BLOCK: Mapping[str, Entry] = {
    **_AROUND,
    "update": Entry("names", "the block", 1, _ADDED),
    "zero": Entry("names", "the block", 0.5, _GONE),
    "mean": Entry("names", "the block", 0.5, _BALANCED),
    "resample": Entry("names", "the block", 0.5, _DRAWN),
    "skip": Entry("names", "the block", 0.5, _GONE),
    "attribution": Entry(
        "names", "the block", 1, "from the update on, the answer is linear, so the gradient predicts it exactly"
    ),
    "latents": Entry("everywhere", "the way gone before the step", 1, _TRAVELLED),
    "update_by_step": Entry("everywhere", "the way gone in the step", 1, _STRIDES),
    "update_by_branch": Entry("everywhere", "each branch by its weight", 1, _BOTH_BRANCHES),
}
_TEXT: Mapping[str, Entry] = {
    **_IN_ONE_BLOCK,
    "resid": Entry("boundary", "from the block on", 1, "before the block, the word is in the text stream only"),
    "resid_first_frame": Entry("blind", "no block", 0, "the answer is shown by the last frame, and nothing moves it there"),
    "resid_last_frame": Entry("boundary", "from the block on", 1, "every visual token hears the word for itself, in this block"),
    "cross_attn": Entry("names", "the block", 1, "the cross-attention of this block brings the word in"),
    "knockout_text": Entry("names", "the block", 0.5, "only this block reads the word"),
    "probe": Entry("boundary", "from the block on", 1, "the word is in the visual stream from this block on"),
    "update_by_branch": Entry("names", "the branch", 1, _ONE_BRANCH),
}
_COPY: Mapping[str, Entry] = {
    **_IN_ONE_BLOCK,
    "resid": Entry("everywhere", "every block", 1, _PRESENT),
    "resid_first_frame": Entry("boundary", "before the block", 1, "the block reads the first frame; later nobody does"),
    "resid_last_frame": Entry("boundary", "from the block on", 1, "the answer reaches the last frame in this block"),
    "attn": Entry("names", "the block", 1, "the self-attention of this block moves the answer"),
    "heads": Entry("names", "the head", 1, "one head moves the answer"),
    "knockout_first_frame": Entry("names", "the block", 0.5, "the last frame sees the first through this block only"),
    "probe": Entry("boundary", "from the block on", 1, "the last frame carries the answer from this block on"),
}
_MLP: Mapping[str, Entry] = {
    **_IN_ONE_BLOCK,
    "resid": Entry("everywhere", "every block", 1, _PRESENT),
    "resid_first_frame": Entry("everywhere", "every block", 1, _PRESENT),
    "resid_last_frame": Entry("blind", "no block", 0, "features, MLP and answer are all in the first frame"),
    "mlp": Entry("names", "the block", 1, "the MLP of this block makes the answer, token by token"),
    "probe": Entry(
        "boundary", "from the block on", 1, "a product of two features is not linear in them; after the MLP it is there"
    ),
}
_HALF = "the two updates then contradict each other, which leaves no answer rather than the donor's"
_SPARE = "the other block is enough"

TABLE: Mapping[str, Mapping[str, Entry]] = {
    "text": _TEXT,
    "copy": _COPY,
    "mlp": _MLP,
    "step": {
        **_COPY,
        "latents": Entry("boundary", "after the step", 1, "after this step the answer is in the latents and nowhere else"),
        "update_by_step": Entry("names", "the step", 1, "the gate is open at this step only"),
    },
    "redundant": {
        **_TEXT,
        "resid": Entry(
            "boundary",
            "from the second block on, half of it from the first on",
            1,
            "before the second, the clean word comes in again",
        ),
        "resid_last_frame": Entry(
            "boundary",
            "from the second block on, half of it from the first on",
            1,
            "before the second, the clean word comes in again",
        ),
        "update": Entry("names", "both blocks", 0.5, _HALF),
        "cross_attn": Entry("names", "both blocks", 0.5, _HALF),
        "zero": Entry("blind", "no block", 0, _SPARE),
        "mean": Entry("blind", "no block", 0, _SPARE),
        "resample": Entry("names", "both blocks", 0.25, "half of the pool contradicts the other block, which leaves no answer"),
        "skip": Entry("blind", "no block", 0, _SPARE),
        "knockout_text": Entry("blind", "no block", 0, _SPARE),
        "attribution": Entry("blind", "no block", 0, "the last norm is saturated, so its gradient is nearly zero"),
        "probe": Entry("boundary", "from the block on", 1, "the word is in the visual stream from the first of the two on"),
        "update_by_step": Entry("everywhere", "the way gone in the step", 0.5, f"{_STRIDES}; {_HALF}"),
        "update_by_branch": Entry("names", "the branch", 0.5, f"{_ONE_BRANCH}; {_HALF}"),
    },
    "distractor": {
        **_TEXT,
        "probe": Entry(
            "misled", "from the block or the distractor on", 1, "the distractor writes the word too; reading it is not using it"
        ),
    },
    "branch": {
        **_MLP,
        "knockout_text": Entry("names", "the block", 0.5, "the prompt opens the gate through the cross-attention of this block"),
        "probe": Entry("everywhere", "every block", 1, "the image's feature is in the stream from the start, used or not"),
        "update_by_branch": Entry("names", "the branch", 1, _ONE_BRANCH),
    },
    "none": {
        name: Entry("silent", f"no {tool.axis}", 0, "nothing in the model depends on what the pair differs in")
        for name, tool in TOOLS.items()
    },
}
"""Kind of plant, tool, and what the tool must report. A distractor that comes after the plant misleads no probe."""
