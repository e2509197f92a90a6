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
from dit_lens.clean import CleanRuns
from dit_lens.experiment import CLEAN, CLOCK_COLUMNS, Context
from dit_lens.reasoner import Score
from dit_lens.run import Run

HIDDEN, VELOCITY, X0_HAT, LATENTS, RESCALED = "hidden states", "velocity", "x0-hat", "latents", "latents, rescaled"
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


class Bench:
    """Some samples of one task, each with the same K seeds; rows are sample by sample, seed by seed.

    Args:
        steps: inference steps; those of the samples where left out.
    """

    def __init__(self, context: Context, samples: Sequence[Any], seeds: Sequence[int], steps: int | None = None) -> None:
        self.context, self.lens, self.samples, self.seeds = context, context.lens, list(samples), list(seeds)
        self.arguments = context.arguments if steps is None else {**context.arguments, "num_inference_steps": steps}
        self.inputs = {**reasoner.inputs(samples), **self.arguments}

    @cached_property
    def clean(self) -> Run:
        """Each seed by itself, from the runs that all experiments share."""
        shared = CleanRuns(self.lens, self.context.folder.parent / CLEAN, self.arguments)
        return shared.runs(self.samples, self.seeds)

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
        if merge.what == X0_HAT:
            return self.clean.weights[0] is not None
        return merge.what != HIDDEN or bool(self.blocks(merge.window))

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
        grouped = rows.unflatten(0, (len(self.samples), len(self.seeds)))
        mean = grouped.mean(dim=1, keepdim=True)
        if to == TO_ALL:
            return mean.expand_as(grouped).flatten(0, 1)
        return torch.cat([mean, grouped[:, 1:]], dim=1).flatten(0, 1)

    def merged_latents(self, rescaled: bool) -> Tensor:
        """The mean of the initial noise of each sample's seeds, in all rows. Its variance is 1 / K, less noise than the model is
        told; rescaled by the root of K it is noise of variance 1 again, which is nothing but another seed."""
        mean = self.mixed(self.clean.latents[0], TO_ALL)
        return mean * len(self.seeds) ** 0.5 if rescaled else mean

    def finished(self, merge: Merge, answers: Answers, count: int) -> Run:
        """The first `count` seeds of each sample from the merged first step on; those that got the mean, whose streams are one
        where latents were merged."""
        count = 1 if merge.to == TO_ONE or merge.what in (LATENTS, RESCALED) else min(count, len(self.seeds))
        rows = [len(self.seeds) * sample + seed for sample in range(len(self.samples)) for seed in range(count)]
        how: Any = {"answers": {(0, branch): answer[rows] for branch, answer in answers.items()}}
        if merge.what in (LATENTS, RESCALED):
            own = self.clean.rows(rows)
            noise = self.merged_latents(merge.what == RESCALED)[rows]
            donor = replace(own, latents=torch.cat([noise[None], own.latents[1:]]))
            how = {"edits": [dl.ReplaceLatents(step=0, donor=donor)]}
        return self.lens.run(**self.inputs, seed=self.seeds[:count], **how)

    def longer(self, steps: int) -> Run:
        """The first seed of each sample with another number of inference steps."""
        return self.lens.run(**{**self.inputs, "num_inference_steps": steps}, seed=self.seeds[0])

    @property
    def steps(self) -> int:
        """Inference steps, as the pipeline is told."""
        return self.inputs.get("num_inference_steps", self.clean.steps)

    @cached_property
    def alone(self) -> list[list[Score]]:
        """What each seed of each sample does by itself."""
        scores, count = self.scores(self.clean), len(self.seeds)
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
        for place, (sample, alone) in enumerate(zip(self.samples, self.alone, strict=True)):
            for seed in range(count):
                score, own = scores[count * place + seed], alone[seed]
                told = {"value": float(score.right), "alone": float(own.right), "same": float(score.answer == own.answer)}
                found.append({**self.name(sample, self.seeds[seed]), "answer": repr(score.answer), **told})
        return pd.DataFrame(found)

    def chosen(self, choose: Callable[[Sequence[Score]], Score]) -> pd.DataFrame:
        """A row for each sample: what is chosen of its seeds' own videos, beside their mean."""
        found = []
        for sample, alone in zip(self.samples, self.alone, strict=True):
            score, mean = choose(alone), sum(own.right for own in alone) / len(alone)
            found.append(
                {**self.name(sample, self.seeds[0]), "answer": repr(score.answer), "value": float(score.right), "alone": mean}
            )
        return pd.DataFrame(found)

    def apart(self, one: Answers, other: Answers) -> pd.DataFrame:
        """A row for each sample: L2 distance of its `cond` velocities in two merged first steps, over the length of the other."""
        lengths = [torch.linalg.vector_norm(rows.flatten(1), dim=1) for rows in (one["cond"] - other["cond"], other["cond"])]
        ratio = (lengths[0] / lengths[1]).unflatten(0, (len(self.samples), len(self.seeds))).mean(1)
        return self.each(ratio)

    def shrinkage(self) -> pd.DataFrame:
        """How long the mean of the seeds is, over the mean of their lengths: a row for each sample and block (mean over tokens,
        `cond` branch), and for velocity, x0-hat and latents as a whole."""
        count = len(self.seeds)

        def kept(rows: Tensor, cell: Any = None) -> Tensor:
            grouped = rows.flatten(1, -2).unflatten(0, (-1, count)).float()
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
        named = [self.name(sample, self.seeds[0]) for sample in self.samples]
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

    def name(self, sample: Any, seed: int) -> dict[str, Any]:
        """The columns that name a sample, a seed and the first step."""
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
    """The video of the answer that most seeds give; among equals that of the earlier seed."""
    answers = [score.answer for score in alone]
    return max(alone, key=lambda score: answers.count(score.answer))


def best(alone: Sequence[Score]) -> Score:
    """A video that is right, if any is: what an oracle would choose."""
    return next((score for score in alone if score.right), alone[0])
