"""The tools of the table, run on planted models with what the library offers to everybody.

    model = dl.planted("copy", seed=3)
    measure(model, "resid_last_frame")         # {0: 0.0, 1: 0.0, 2: 1.0, ...}: the effect at every block
    model.expected("resid_last_frame")         # what the table says
    measure(model, my_tool)                    # your own: a function of a `Trial` that returns the same

A `Trial` is what a tool is given: the lens, pairs of samples, and sweeps whose effects are in the table's unit. Your own
tool is a few lines, and `verdict` says what it claims, given what is true:

    def silenced(trial):
        return trial.effects(dl.at(block="all", site="mlp"), lambda cell, runs: dl.Zero(cell))

    verdict(model.truth, measure(model, silenced), "block")

An edited run is compared with the clean one by the answer that it gives, and not by the share of the way from clean to
donor that `dl.sweep` puts in its column `effect`: where clean and donor do not differ, as without a plant, that is a
share of nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dit_lens.attribution import attribute
from dit_lens.edits import Mean, Patch, PatchUpdate, Resample, Skip, Zero
from dit_lens.errors import InputError, listed
from dit_lens.knockout import KnockoutAttention
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.lens import Lens
from dit_lens.pairs import Pair, PairRuns
from dit_lens.plants.model import GUIDANCE, Planted, schedule
from dit_lens.plants.readings import DRAWS
from dit_lens.plants.table import TOOLS, Place
from dit_lens.record import Record
from dit_lens.reducers import frame_mean
from dit_lens.run import Run
from dit_lens.selection import Selector, at
from dit_lens.sweeping import EDIT, EditOf, Outcome, sweep
from probes.linear import fit_and_score

PAIRS = 2
POOL = 4
"""Pairs and pools are even in number, and so balanced: as many answers of +1 as of -1."""
NOISES = DRAWS // (2 * PAIRS)
"""With how many seeds of noise `resample` runs each pair; it draws twice for each."""
PROBED = 128
"""How many samples a probe is trained and scored on, half and half."""
PROBE_NOISES = 16
"""In how many batches these run, each with noise of its own."""

Effects = dict[Place, float]


@dataclass(frozen=True, eq=False)
class Trial:
    """A planted model and what tools are run with.

    Attributes:
        model: the model. lens: on it. pairs: of samples, balanced. seed: of the noise of all pairs.
    """

    model: Planted
    lens: Lens
    pairs: Sequence[Pair]
    seed: int

    @property
    def block(self) -> int:
        """The planted block, or any."""
        return 1 if self.model.truth.block is None else self.model.truth.block

    @cached_property
    def pool(self) -> Run:
        """Clean runs of other samples, with every block's update at every step and in every branch."""
        samples = [pair.clean for pair in self.model.pairs(POOL, seed=self.seed + 1)]
        return self.lens.run(**self.model.inputs(samples), seed=self.seed + 1, decode=False, record=at(site="update"))

    @property
    def outcome(self) -> Outcome:
        """The answer of the final latents, as a share of the clean sample's: 1 in the clean run, -1 in the donor's."""
        return Outcome("answer", self.answered, of="latents")

    def answered(self, latents: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The answer of latents, turned so that the clean answer is positive; linear, so velocities can be given too."""
        turns = torch.tensor([float(pair.clean.answer) for pair in pairs])
        return self.model.answer(latents) * turns.to(latents)

    def effects(self, over: Selector, edit: EditOf, baseline: EditOf | None = None, noises: int = 1) -> Effects:
        """Effects of an edit at every cell of a sweep, the mean over pairs and noises.

        Args:
            over, edit: as for `dl.sweep`; over names one axis (blocks, steps or branches), or blocks and heads.
            baseline: an edit to compare with, in place of the clean run. noises: how many seeds to run each pair with.
        """
        both = {"edited": edit} | ({} if baseline is None else {"baseline": baseline})
        found = self.several(over, both, noises)
        if baseline is None:
            return found["edited"]
        return {place: size - found["baseline"][place] for place, size in found["edited"].items()}

    def several(self, over: Selector, edits: Mapping[str, EditOf], noises: int = 1) -> dict[str, Effects]:
        """`effects` of several edits of the same cells, by their names; they share the clean and the donor runs."""
        first, *others = edits
        controls = {name: edits[name] for name in others}
        seeds = range(self.seed, self.seed + noises)
        found = sweep(
            self.lens, self.pairs, edits[first], over, self.outcome, seeds=seeds, controls=controls, batch=PAIRS, progress=False
        )
        table = found.table.assign(effect=(found.table["clean"] - found.table["value"]) / 2)
        parts = {name: table[table["edit"] == (EDIT if name == first else name)] for name in edits}
        named = [axis for axis in ("block", "head", "step", "branch") if axis in found.axes]
        # An axis with one value tells nothing apart, so it has no part in the name of a place.
        axes = [axis for axis in named if table[axis].nunique() > 1] or named[:1]
        return {name: mean_by_place(part, axes, "effect") for name, part in parts.items()}


def mean_by_place(table: pd.DataFrame, axes: Sequence[str], value: str) -> Effects:
    """The mean of a column at every place of the axes, in order of appearance."""
    means = table.groupby(list(axes), sort=False)[value].mean()
    return {_place(label): float(mean) for label, mean in means.items()}


def _place(label: Any) -> Place:
    """A label of pandas as a place."""
    if isinstance(label, tuple):
        return _place(label[0]) if len(label) == 1 else (int(label[0]), int(label[1]))
    return label if isinstance(label, str) else int(label)


Tool = Callable[[Trial], Effects]
"""A tool: runs on a trial, and gives the effect at every place."""


@dataclass(frozen=True)
class Shared:
    """Tools that edit the same cells, and so can share their runs.

    Attributes:
        over: the cells. edits: by tool. baselines: what a tool is compared with, where that is not the clean run.
    """

    over: Callable[[Trial], Selector]
    edits: Mapping[str, EditOf]
    baselines: Mapping[str, EditOf] = field(default_factory=dict)

    def run(self, trial: Trial, wanted: Collection[str]) -> dict[str, Effects]:
        """The effects of those of the tools that are wanted."""
        mine = {name: edit for name, edit in self.edits.items() if name in wanted}
        against = {f"{name} baseline": edit for name, edit in self.baselines.items() if name in wanted}
        found = trial.several(self.over(trial), {**mine, **against})
        zero = {name: {} if name not in self.baselines else found[f"{name} baseline"] for name in mine}
        return {name: {place: size - zero[name].get(place, 0.0) for place, size in found[name].items()} for name in mine}


def patch(cell: Selector, runs: PairRuns) -> Patch:
    """The donor's activation in place of the clean one."""
    return Patch(cell, runs.donor)


def _frame_patch(frame: int) -> EditOf:
    return lambda cell, runs: Patch(replace(cell, frames=frame), runs.donor)


SHARED = (
    Shared(
        lambda trial: at(block="all"),
        {
            "resid": patch,
            "resid_first_frame": _frame_patch(0),
            "resid_last_frame": _frame_patch(-1),
            "skip": lambda cell, runs: Skip(cell),
        },
    ),
    Shared(
        lambda trial: at(block="all", site="update"),
        {"update": lambda cell, runs: PatchUpdate(cell, runs.donor), "zero": lambda cell, runs: Zero(cell)},
    ),
    Shared(
        lambda trial: at(block="all", site="attn"),
        {"attn": patch, "knockout_first_frame": lambda cell, runs: KnockoutAttention.first_frame(cell)},
        {"knockout_first_frame": lambda cell, runs: KnockoutAttention.first_frame(cell, baseline=True)},
    ),
    Shared(
        lambda trial: at(block="all", site="cross_attn"),
        {"cross_attn": patch, "knockout_text": lambda cell, runs: KnockoutAttention.text(cell)},
        {"knockout_text": lambda cell, runs: KnockoutAttention.text(cell, baseline=True)},
    ),
    Shared(lambda trial: at(block="all", site="mlp"), {"mlp": patch}),
    Shared(lambda trial: at(block="all", site="heads", head="all"), {"heads": patch}),
    Shared(
        lambda trial: at(block=0, step="all", branch="cond"),
        {"latents": lambda cell, runs: ReplaceLatents(cell.step, runs.donor)},
    ),
    Shared(lambda trial: at(block=trial.block, step="all", site="update"), {"update_by_step": patch}),
    Shared(lambda trial: at(block=trial.block, branch="all", site="update"), {"update_by_branch": patch}),
)
"""The tools that are one edit of one cell at a time."""


def ablated(trial: Trial) -> Effects:
    """`mean`: a block's update replaced by its mean over the pool."""
    return trial.effects(at(block="all", site="update"), lambda cell, runs: Mean(cell, trial.pool))


def resampled(trial: Trial) -> Effects:
    """`resample`: `DRAWS` draws from the pool, over pairs, noises and two seeds of the drawing."""
    over, draws = at(block="all", site="update"), range(2)

    def draw(seed: int) -> EditOf:
        return lambda cell, runs: Resample(cell, trial.pool, seed)

    found = trial.several(over, {f"draw {seed}": draw(seed) for seed in draws}, NOISES)
    return {place: float(np.mean([effects[place] for effects in found.values()])) for place in found["draw 0"]}


def attributed(trial: Trial) -> Effects:
    """`attribution`: the change of the final answer that every block's update is said to make, added up over all calls."""
    _, sigmas = schedule(trial.model.pipe, trial.model.steps)
    outcome = Outcome("answer", trial.answered, of="velocity")
    over = at(block="all", step="all", branch="all", site="update")
    found = attribute(trial.lens, trial.pairs, over, outcome, seeds=(trial.seed,), check=2, progress=False).table
    strides = np.diff(sigmas)[found["step"]]
    weights = found["branch"].map({"cond": GUIDANCE, "uncond": 1 - GUIDANCE}).to_numpy()
    # From 1, the clean answer, to -1, the donor's: minus half of the change.
    whole = found.assign(effect=-found["estimate"] * strides * weights / 2)
    sums = whole.groupby(["block", "sample"], sort=False)["effect"].sum().reset_index()
    return mean_by_place(sums, ["block"], "effect")


def probed(trial: Trial) -> Effects:
    """`probe`: how far beyond chance the answer is read from the stream: 2 x (area under the ROC curve) - 1, or 0 below it."""
    model, truth = trial.model, trial.model.truth
    samples = [pair.clean for pair in model.pairs(PROBED, seed=trial.seed + 2)]
    step, branch = truth.step or 0, truth.branches[0]
    record = Record(at(block="all", step=step, branch=branch, frames=truth.frame), frame_mean)
    # Answers alternate, so every batch holds as many of either: noise that comes with one answer can be read in its place.
    # For the same reason no batch is in both halves of the split. Where a balanced batch is torn, what of it is trained on
    # leans to one answer and what it is scored on to the other, and a probe that knows its noise is worse than chance.
    batches = [samples[first : first + PROBED // PROBE_NOISES] for first in range(0, PROBED, PROBED // PROBE_NOISES)]
    runs = [
        trial.lens.run(**model.inputs(batch), seed=trial.seed + number, decode=False, until=step, record=record)
        for number, batch in enumerate(batches)
    ]
    labels = np.array([sample.answer > 0 for sample in samples])
    noises = np.repeat(np.arange(PROBE_NOISES), PROBED // PROBE_NOISES)
    found: Effects = {}
    for block in range(model.blocks):
        features = torch.cat([run.activation(block=block, step=step, branch=branch)[:, 0] for run in runs]).numpy()
        score = fit_and_score(features, labels, noises, seed=trial.seed)
        found[block] = max(0.0, 2 * score.estimate - 1)
    return found


ALONE: Mapping[str, Tool] = {"mean": ablated, "resample": resampled, "attribution": attributed, "probe": probed}
"""The other tools."""


def trial(model: Planted, engine: str = "hooks") -> Trial:
    """What tools are run with on a model; the pairs follow from its seed."""
    return Trial(model, model.lens(engine), model.pairs(PAIRS, seed=model.seed), seed=1000 * (model.seed + 1))


def measure(model: Planted, tool: str | Tool, engine: str = "hooks") -> Effects:
    """The effect that a tool finds at every place of its axis.

    Args:
        model: a planted model. tool: a name of `TOOLS`, or a function of a `Trial`. engine: as for a lens.

    Raises:
        InputError: there is no such tool.
    """
    return tool(trial(model, engine)) if callable(tool) else measure_all(model, [tool], engine)[tool]


def measure_all(model: Planted, tools: Sequence[str] = tuple(TOOLS), engine: str = "hooks") -> dict[str, Effects]:
    """`measure` for several tools of the table, which share what they can."""
    unknown = [tool for tool in tools if tool not in TOOLS]
    if unknown:
        raise InputError(f"there is no tool {unknown[0]!r}; write {listed(TOOLS)}, or a function of a Trial")
    ran = trial(model, engine)
    found: dict[str, Effects] = {name: tool(ran) for name, tool in ALONE.items() if name in tools}
    for shared in SHARED:
        if set(shared.edits) & set(tools):
            found |= shared.run(ran, tools)
    return {tool: found[tool] for tool in tools}


def share_of_nothing(model: Planted) -> float | None:
    """The largest mean effect of `resid` on a model in the unit of `dl.sweep`: the share of the way from clean to donor.

    None where clean and donor do not differ in a bit, as `dl.sweep` then gives no share.
    """
    ran = trial(model)
    found = sweep(ran.lens, ran.pairs, patch, at(block="all"), ran.outcome, seeds=(ran.seed,), progress=False).table
    shares = [abs(mean) for mean in mean_by_place(found, ["block"], "effect").values() if not np.isnan(mean)]
    return max(shares, default=None)
