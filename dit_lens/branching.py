"""Branches: what else could have come of a state half-way through a run.

    run = lens.run(**inputs, seed=0)
    found = branches(lens, run, step=4, count=8, **inputs)       # eight endings of every row, row by row
    final = found.latents[-1].unflatten(0, (run.batch, 8))

Denoising without fresh noise is a map: one state has one ending, and says nothing of what the model holds possible there. A
stochastic sampler draws endings. If x0-hat at a step shows several answers, these may be live alternatives, of which each
ending takes one, or a blur over a choice that the state has made already. There are three ways to go on from the state that
a step took:

| way | from the next step on | what is drawn |
|---|---|---|
| `ancestral` | a stochastic sampler with the model's own joint distribution, at every step | p(x0 given the state) |
| `renoised` | once, x0-hat with fresh noise of the right level, then none | not the model's: x0-hat is no sample |
| `replaced` | once, fresh noise alone, then none | not the model's: nothing of the state, and a wrong noise level |

The ancestral way checks itself: the mean over its endings must be x0-hat at the step (`metrics.bias_and_spread`), up to the
finite steps of the schedule. That holds for one field that is the gradient of a density, so for the conditional branch
alone, and not for a guided combination. (`dit_lens.latent_edits` has the formulas.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from dit_lens import metrics
from dit_lens.blends import Blends
from dit_lens.errors import InputError
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.run import Run

UNGUIDED = {"guidance_scale": 1.0}
"""Pipeline arguments with which only the conditional branch runs."""


def branches(
    lens: Any,
    run: Run,
    step: int,
    count: int,
    way: str = "ancestral",
    noise: int = 0,
    names: Sequence[int] | None = None,
    **inputs: Any,
) -> Run:
    """Endings of every row of a run, from the latents that a step took.

    Args:
        lens: what runs and decodes. run: unedited, with one row for every prompt of `inputs`. step: any but the last. count:
            endings of each row.
        way: as in the module's table. noise: a seed. names: a number for each row, from which its noise follows too; its place
            when left out.
        inputs: as for `Lens.run`; with another guidance scale than the run's, the endings follow that one.

    Returns:
        A run with `count` rows for every row of `run`, row by row. Its trajectory is that of the ending from the step on,
        where it starts with the run's own latents; what stands before the step means nothing.

    Raises:
        InputError: there is no step after this one, or no such way.
    """
    if not 0 <= step < run.steps - 1:
        raise InputError(f"branches leave a run of {run.steps} steps after step 0 to {run.steps - 2}, and not {step}")
    rows = [row for row in range(run.batch) for _ in range(count)]
    start = run.rows(rows)
    # Stored outputs stand in for calls up to the step, so that none of them is made; the latents come from the run itself.
    sides = [branch for branch in lens.forecast(**inputs).branches if branch in start.outputs]
    known = {(early, branch): start.outputs[branch][early] for early in range(step + 1) for branch in sides}
    ways = {
        "ancestral": ReplaceLatents(slice(step + 1, None), noise=noise, how="ancestral"),
        "renoised": ReplaceLatents(step + 1, noise=noise, how="sigma_matched"),
        "replaced": ReplaceLatents(step + 1, noise=noise, how="replace"),
    }
    if way not in ways:
        raise InputError(f"there is no way {way!r}; write {', '.join(ways)}")
    numbers = range(run.batch) if names is None else names
    seeds = [[number * count + ending for ending in range(count)] for number in numbers]
    return lens.run(**inputs, seed=seeds, answers=known, edits=[ReplaceLatents(step, donor=start), ways[way]])


def branch_table(
    lens: Any,
    samples: Sequence[Any],
    run: Run,
    clock: dict[str, Any],
    count: int,
    way: str,
    inputs: dict[str, Any],
    blends: Blends,
    guided: bool = True,
) -> pd.DataFrame:
    """What the endings of a run's rows do, beside what x0-hat holds at the step: one row of a table for each.

    Args:
        samples: of one task, one for every row of the run, which ran with `inputs`. clock: of the step, as `Context.clock`.
        blends: reads the latents; one for all tables of the same samples, so that their answers are encoded once.

    Returns:
        A table with the columns of `endings_table`; ``way`` and ``branch`` say how they were made, and ``changed`` is the
        share of endings with another answer than the run itself.
    """
    branch = "guided" if guided else "cond"
    given = inputs if guided else {**inputs, **UNGUIDED}
    names = [sample.index for sample in samples]
    found = branches(lens, run, clock["step"], count, way, names=names, **given)
    table = endings_table(lens, samples, run.x0_hat(clock["step"], branch), found, run, blends)
    return table.assign(seed=list(run.seeds), **clock, way=way, branch=branch)


def endings_table(lens: Any, samples: Sequence[Any], hats: Tensor, endings: Run, own: Run, blends: Blends) -> pd.DataFrame:
    """x0-hat against endings, by what they hold of each legal answer: one row for every sample.

    Args:
        samples: of one task. hats: an x0-hat of each, in latents. endings: a run with as many rows for each of them. own: the
            run that these leave, one row for each. Both with videos. blends: reads the latents.

    Columns: ``held_0``, ``held_1``, ... how x0-hat is shared among the answers, in latents (`dit_lens.blends`), and ``end_0``,
    ... the mean of the endings' shares; ``held_differ`` and ``differ``, the chance that two draws from the one, or two endings,
    differ, and ``seen_differ``, the same of x0-hat as its decoded video shows it; ``drawn``, the share of endings that show an
    answer; ``changed``, the share of those with another answer than the run itself; ``lost``, the share of all that do not show
    the run's own; ``accepted``, the share that the scorer accepts; ``bias`` and ``spread`` of the endings' latents about x0-hat
    (`metrics.bias_and_spread`).

    A blend of the endings' latents is one whose weights are known: ``blend_true``, the chance that two draws from the endings
    (with replacement) differ, ``blend_held`` and ``blend_seen``, what is read of it in latents and decoded, and
    ``blend_held_alive``, ``blend_seen_alive``, how many answers are alive so. nan where not every ending shows an answer.
    """
    task, size, count = samples[0].task, samples[0].image.size[::-1], endings.batch // len(samples)
    assert endings.video is not None
    assert own.video is not None

    def evidence(video: Tensor, repeats: int = 1) -> list[np.ndarray]:
        rows = [sample for sample in samples for _ in range(repeats)]
        return task.evidence(metrics.resized(video, *size).numpy(), rows)

    final = endings.latents[-1].unflatten(0, (-1, count))
    ends, mixed = evidence(endings.video, count), final.mean(dim=1)
    held, held_mixed = (blends.held(latents, samples) for latents in (hats, mixed))
    seen, seen_mixed = (evidence(lens.decode(latents)) for latents in (hats, mixed))
    pixels = metrics.resized(endings.video, *size).numpy()
    scores = task.scores(pixels, [sample for sample in samples for _ in range(count)])
    rows = []
    for place, (sample, did) in enumerate(zip(samples, evidence(own.video), strict=True)):
        shares = metrics.answer_shares(held[place])
        draws = np.stack([metrics.answer_shares(end) for end in ends[place * count : (place + 1) * count]])
        drawn = ~np.isnan(draws).any(axis=1)
        mean = draws[drawn].mean(axis=0) if drawn.any() else np.full(len(shares), np.nan)
        others = draws[drawn].argmax(axis=1) != did.argmax()
        bias, spread = metrics.bias_and_spread(final[place].numpy(), hats[place].numpy())
        rows.append(
            {
                "task": task.name,
                "sample": sample.index,
                "answers": len(sample.answers),
                **{f"held_{i}": share for i, share in enumerate(shares)},
                **{f"end_{i}": share for i, share in enumerate(mean)},
                "held_differ": float(metrics.draws_differ(shares)),
                "seen_differ": float(metrics.draws_differ(metrics.answer_shares(seen[place]))),
                "differ": metrics.pairs_differ(draws),
                "drawn": float(drawn.mean()),
                "changed": float(others.mean()) if drawn.any() else float("nan"),
                "lost": 1 - float((~others).sum()) / count,
                "accepted": float(np.mean([score.right for score in scores[place * count : (place + 1) * count]])),
                "endings": count,
                "bias": bias,
                "spread": spread,
            }
        )
        if drawn.all():
            rows[-1]["blend_true"] = float(metrics.draws_differ(mean))
            for kind, found in (("held", held_mixed[place]), ("seen", seen_mixed[place])):
                rows[-1][f"blend_{kind}"] = float(metrics.draws_differ(metrics.answer_shares(found)))
                rows[-1][f"blend_{kind}_alive"] = metrics.answers_alive(found)
    return pd.DataFrame(rows)


def with_distances(table: pd.DataFrame) -> pd.DataFrame:
    """The table with distances between x0-hat's shares, in latents, and the endings', and what they are to be held against.

    ``distance`` is the total variation between the two. Endings are few, so that even the right distribution is never met
    exactly: ``floor`` is the expected distance of as many draws *from x0-hat's own shares*. ``apart`` is the squared
    distance, estimated without bias (it may come out below 0), which few endings do not make larger. ``shuffled`` and
    ``apart_shuffled`` are to the endings of the next sample with as many answers, of the same task, step, way, branch and
    seed; nan where there is none.
    """
    found, random = table.reset_index(drop=True), np.random.default_rng(0)
    hats, ends = (_shares(found, kind) for kind in ("held", "end"))
    alike = 1 - found["differ"].to_numpy(dtype=float)
    other = np.full(len(found), -1)
    for _, group in found.groupby(["task", "step", "way", "branch", "seed", "answers"], sort=False):
        places = group.index.to_numpy()
        other[places] = np.roll(places, 1) if len(places) > 1 else -1
    for suffix, which in (("", np.arange(len(found))), ("_shuffled", other)):
        missing = which < 0
        apart = (hats**2).sum(axis=1) - 2 * (hats * ends[which]).sum(axis=1) + alike[which]
        name = "shuffled" if suffix else "distance"
        found[f"apart{suffix}"] = np.where(missing, np.nan, apart)
        found[name] = np.where(missing, np.nan, metrics.total_variation(hats, ends[which]))
    found["floor"] = np.nan
    for place in np.flatnonzero(~np.isnan(hats).any(axis=1)):
        count = int(found["endings"][place])
        draws = random.multinomial(count, hats[place] / hats[place].sum(), size=200) / count
        found.loc[place, "floor"] = float(metrics.total_variation(draws, hats[[place] * 200]).mean())
    return found


def _shares(table: pd.DataFrame, kind: str) -> np.ndarray:
    """The shares of each row, 0 for answers that its sample has not; nan in all where they are not defined."""
    shares = table.filter(regex=rf"^{kind}_\d+$").to_numpy(dtype=float)
    defined = ~np.isnan(shares[:, :1])
    return np.where(defined, np.nan_to_num(shares), np.nan)
