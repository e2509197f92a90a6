"""What an ensemble over seeds is made of: the runs of a prompt with several seeds, and the ways to merge them at the first step.

Every way changes the first step only, so a merged run is the answers of that step, and the plain pipeline from there on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics, reasoner
from dit_lens.experiment import CLOCK_COLUMNS, Context
from dit_lens.reasoner import Score
from dit_lens.run import Run

HIDDEN, VELOCITY, X0_HAT, LATENTS, RESCALED = "hidden states", "velocity", "x0-hat", "latents", "latents, rescaled"
ON_SCHEDULE = "hidden states, on schedule"
"""The x0-hat that the mean latents and the velocity after hidden states were averaged imply; each row keeps its own noise."""
FIRST, MIDDLE, WIDE, LAST, EVERY = "first quarter", "middle (paper)", "middle half", "last quarter", "all"
WINDOWS = {FIRST: (0, 0.25), MIDDLE: (0.5, 0.75), WIDE: (0.25, 0.75), LAST: (0.75, 1), EVERY: (0, 1)}
"""Blocks by relative depth, [low, high)."""
TO_ALL, TO_ONE = "written to all", "written to one"
NONE, ORACLE, VOTE, LONGER, LONG = "none", "best of K (oracle)", "majority vote of K", "K - 1 more steps", "K times the steps"

RIGHT, LENGTH = "right", "length of the mean"
FROM_ALL, FROM_VELOCITY = "distance from all blocks averaged", "distance from velocities averaged"
"""What is measured: of videos; of what is averaged, over the mean length; of the first step's velocity, over its length."""

Answers = Mapping[str, Float[Tensor, "rows channels frames height width"]]
"""The denoiser's outputs at the first step, by branch."""


@dataclass(frozen=True)
class Merge:
    """A way to merge seeds at the first step.

    Attributes:
        what: is averaged. to: whether the mean takes the place of all, or only of the first seed's. window: of blocks, for
            hidden states. branch: `cond`, or both branches.
    """

    what: str
    to: str = TO_ALL
    window: str = ""
    branch: str = "both"

    @property
    def of_noise(self) -> bool:
        """Whether the initial noise is merged, before the model runs."""
        return self.what in (LATENTS, RESCALED)

    def calls(self, steps: int, branches: int, count: int) -> int:
        """Denoiser calls for one video: its own, and of each of the other seeds those of the first step that are merged."""
        merged = 0 if self.of_noise else 1 if self.branch == "cond" else branches
        return branches * steps + merged * (count - 1)


class Bench:
    """Some samples of one task, each with K seeds of its own; rows are sample by sample, seed by seed.

    Args:
        seeds: those of each sample, of all equally many. steps: inference steps; those of the samples where left out.
    """

    def __init__(
        self, context: Context, samples: Sequence[Any], seeds: Sequence[Sequence[int]], steps: int | None = None
    ) -> None:
        self.lens, self.samples = context.lens, list(samples)
        self.seeds, self.count = [list(own) for own in seeds], len(seeds[0])
        self.arguments = context.arguments if steps is None else {**context.arguments, "num_inference_steps": steps}
        self.inputs = {**reasoner.inputs(samples), **self.arguments}

    @cached_property
    def clean(self) -> Run:
        """Each seed by itself. No other experiment has these seeds, so the runs are made here."""
        return self.lens.run(**self.inputs, seed=self.seeds)

    @property
    def branches(self) -> tuple[str, ...]:
        """The guidance branches that run."""
        return self.clean.branches

    def blocks(self, window: str) -> list[int]:
        """The blocks of a window; a model of few blocks may have none in it."""
        extent = self.lens.extent(**self.inputs)
        count, (low, high) = extent.blocks[extent.forecast.experts[0]], WINDOWS[window]
        return [block for block in range(count) if low <= block / count < high]

    def possible(self, merge: Merge) -> bool:
        """Whether this model has what is to be merged."""
        if merge.what in (X0_HAT, ON_SCHEDULE) and self.clean.weights[0] is None:
            return False
        return not merge.window or bool(self.blocks(merge.window))

    def first_step(self, merge: Merge) -> Answers:
        """The answers of the first step, merged; of latents, see `merged_latents`."""
        own = {branch: self.clean.velocity(0, branch) for branch in self.branches}
        if merge.what == HIDDEN:
            return {**own, **self._averaged(merge)}
        if merge.what == VELOCITY:
            return {branch: self.mixed(velocity, merge.to) for branch, velocity in own.items()}
        # x0-hat = a x + b v; each row goes on from its own x, with the v that implies the mean x0-hat.
        a, b = self.clean.weights[0] or (0.0, 0.0)
        # All frames have one noise level here.
        assert not isinstance(a, tuple)
        assert not isinstance(b, tuple)
        latents = self.clean.latents[0]
        if merge.what == ON_SCHEDULE:
            mean = self.mixed(latents, merge.to)
            return {branch: v + a * (mean - latents) / b for branch, v in {**own, **self._averaged(merge)}.items()}
        return {branch: (self.mixed(a * latents + b * v, merge.to) - a * latents) / b for branch, v in own.items()}

    def _averaged(self, merge: Merge) -> Answers:
        edited = list(self.branches) if merge.branch == "both" else [merge.branch]
        at = dl.at(block=self.blocks(merge.window), step=0, branch=edited)
        known = {(0, branch): self.clean.velocity(0, branch) for branch in self.branches if branch not in edited}
        average = dl.Average(at, to="all" if merge.to == TO_ALL else 0)
        how: Any = {"seed": self.seeds, "edits": [average], "answers": known, "until": 0, "decode": False}
        run = self.lens.run(**self.inputs, **how)
        return {branch: run.velocity(0, branch) for branch in edited}

    def mixed(self, rows: Float[Tensor, "rows ..."], to: str) -> Float[Tensor, "rows ..."]:
        """The mean over the seeds of each sample, in the rows that get it."""
        grouped = rows.unflatten(0, (len(self.samples), self.count))
        mean = grouped.mean(dim=1, keepdim=True)
        if to == TO_ALL:
            return mean.expand_as(grouped).flatten(0, 1)
        return torch.cat([mean, grouped[:, 1:]], dim=1).flatten(0, 1)

    def merged_latents(self, rescaled: bool) -> Tensor:
        """The mean of the initial noise of each sample's seeds, in all rows. Its variance is 1 / K, less noise than the model is
        told; rescaled by the root of K it is noise of variance 1 again, which is nothing but another seed."""
        mean = self.mixed(self.clean.latents[0], TO_ALL)
        return mean * self.count**0.5 if rescaled else mean

    def finished(self, merge: Merge, answers: Answers, count: int) -> Run:
        """The first `count` seeds of each sample from the merged first step on; those that got the mean, whose streams are one
        where latents were merged."""
        count = 1 if merge.to == TO_ONE or merge.of_noise else min(count, self.count)
        rows = [self.count * sample + seed for sample in range(len(self.samples)) for seed in range(count)]
        how: Any = {"answers": {(0, branch): answer[rows] for branch, answer in answers.items()}}
        if merge.of_noise:
            own = self.clean.rows(rows)
            noise = self.merged_latents(merge.what == RESCALED)[rows]
            donor = replace(own, latents=torch.cat([noise[None], own.latents[1:]]))
            how = {"edits": [dl.ReplaceLatents(step=0, donor=donor)]}
        return self.lens.run(**self.inputs, seed=[own[:count] for own in self.seeds], **how)

    def longer(self, steps: int) -> Run:
        """The first seed of each sample with another number of inference steps."""
        return self.lens.run(**{**self.inputs, "num_inference_steps": steps}, seed=[own[:1] for own in self.seeds])

    @property
    def steps(self) -> int:
        """Inference steps, as the pipeline is told."""
        return self.inputs.get("num_inference_steps", self.clean.steps)

    @cached_property
    def alone(self) -> list[list[Score]]:
        """What each seed of each sample does by itself."""
        scores, count = self.scores(self.clean), self.count
        return [scores[count * place : count * (place + 1)] for place in range(len(self.samples))]

    def scores(self, run: Run) -> list[Score]:
        """What each row of a run does; of every sample there are equally many."""
        video: Any = run.video
        rows = [sample for sample in self.samples for _ in range(run.batch // len(self.samples))]
        return self.samples[0].task.scores(metrics.resized(video, *rows[0].image.size[::-1]).numpy(), rows)

    def rows(self, run: Run) -> pd.DataFrame:
        """A row for each video: whether it is right, and whether its seed alone is and shows the same answer."""
        count, scores = run.batch // len(self.samples), self.scores(run)
        found = []
        for place, (alone, seeds) in enumerate(zip(self.alone, self.seeds, strict=True)):
            for which in range(count):
                score, own = scores[count * place + which], alone[which]
                told = {"value": float(score.right), "alone": float(own.right), "same": float(score.answer == own.answer)}
                found.append({**self.name(place, seeds[which]), "answer": repr(score.answer), **told})
        return pd.DataFrame(found)

    def chosen(self, choose: Callable[[Sequence[Score]], Score]) -> pd.DataFrame:
        """A row for each sample: what is chosen of its seeds' own videos, beside their mean."""
        found = []
        for place, alone in enumerate(self.alone):
            score, mean = choose(alone), sum(own.right for own in alone) / len(alone)
            told = {"answer": repr(score.answer), "value": float(score.right), "alone": mean}
            found.append({**self.name(place, self.seeds[place][0]), **told})
        return pd.DataFrame(found)

    def apart(self, one: Answers, other: Answers) -> pd.DataFrame:
        """A row for each sample: L2 distance of its `cond` velocities in two merged first steps, over the length of the other."""
        lengths = [torch.linalg.vector_norm(rows.flatten(1), dim=1) for rows in (one["cond"] - other["cond"], other["cond"])]
        ratio = (lengths[0] / lengths[1]).unflatten(0, (len(self.samples), self.count)).mean(1)
        return self.each(ratio)

    def shrinkage(self) -> pd.DataFrame:
        """How long the mean of the seeds is, over the mean of their lengths: a row for each sample and block (mean over tokens,
        `cond` branch), and for velocity, x0-hat and latents as a whole."""

        def kept(rows: Tensor, cell: Any = None) -> Tensor:
            grouped = rows.flatten(1, -2).unflatten(0, (-1, self.count)).float()
            lengths = [torch.linalg.vector_norm(each, dim=-1) for each in (grouped.mean(1), grouped)]
            return (lengths[0] / lengths[1].mean(1)).mean(-1)

        record = dl.Record(dl.at(step=0, branch="cond"), reduce=kept)
        run = self.lens.run(**self.inputs, seed=self.seeds, record=record, until=0, decode=False)
        tables = [
            self.each(one.tensor).assign(what=HIDDEN, block=one.cell.block, depth=one.cell.depth) for one in run.activations
        ]
        whole = {VELOCITY: run.velocity(0, "cond"), LATENTS: run.latents[0]}
        whole |= {X0_HAT: run.x0_hat(0, "cond")} if run.weights[0] is not None else {}
        tables += [self.each(kept(rows.flatten(1)[:, None])).assign(what=what) for what, rows in whole.items()]
        return pd.concat(tables, ignore_index=True)

    def each(self, values: Tensor) -> pd.DataFrame:
        """A row for each sample with a value."""
        named = [self.name(place, own[0]) for place, own in enumerate(self.seeds)]
        return pd.DataFrame(named).assign(value=values.tolist())

    def pictures(self, run: Run, width: int) -> np.ndarray:
        """Last frames of the first sample, of the first x0-hat and of the video, by seed: uint8 (2, width, H, W, 3); white where
        fewer seeds went on."""
        count: int = run.batch // len(self.samples)
        video: Any = run.video
        shown = [self.lens.decode(run.x0_hat(0)[:count]), video[:count]]
        sheet = np.full((2, width, *shown[0].shape[2:]), 255, dtype=np.uint8)
        for line, clips in zip(sheet, shown, strict=True):
            line[:count] = (clips[:, -1] * 255).round().byte().numpy()
        return sheet

    def name(self, place: int, seed: int) -> dict[str, Any]:
        """The columns that name a sample by its place, a seed and the first step."""
        sample = self.samples[place]
        setup = f"{sample.task.name}, {self.clean.steps} steps"
        named = {"task": sample.task.name, "sample": sample.index, "seed": seed, "steps": self.clean.steps, "setup": setup}
        # A sample that runs in two setups is one sample where both are taken together.
        whose = {"case": f"{setup}/{sample.index}", "cluster": f"{sample.task.name}/{sample.index}"}
        return {**named, **whose, **self._clock}

    @cached_property
    def _clock(self) -> dict[str, Any]:
        """The first step."""
        cell = dl.at(block=0, step=0, branch="cond").cells(self.lens.extent(**self.inputs))[0]
        return {column: getattr(cell, column) for column in CLOCK_COLUMNS}


def voted(alone: Sequence[Score]) -> Score:
    """The video of the answer that most seeds give, among equals that of the earlier seed. Seeds whose videos show no answer have
    no vote, unless none shows any."""
    voting = [score for score in alone if score.answer is not None] or list(alone)
    answers = [score.answer for score in voting]
    return max(voting, key=lambda score: answers.count(score.answer))


def best(alone: Sequence[Score]) -> Score:
    """A video that is right, if any is: what an oracle would choose."""
    return next((score for score in alone if score.right), alone[0])
