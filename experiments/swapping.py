"""What a layer swap is made of: the runs of some pairs, what one of them brings into the other, and whose answer comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics
from dit_lens.errors import InputError
from dit_lens.experiment import Context
from dit_lens.run import Run

SEED, OTHER = 0, 1
READINGS = {"resid": "whole stream", "update": "update"}
"""The site that a swap replaces, and what the reading of the paper that it stands for is called."""
SWAP, OBJECT, BOTH, ALL_STEPS = "swap", "object tokens", "both branches", "every step"
OTHER_SAMPLE, OTHER_SEED, SHUFFLED = "another sample", "another seed", "shuffled tokens"
CONTROLS = (OTHER_SAMPLE, OTHER_SEED, SHUFFLED)
VARIANTS = (OBJECT, BOTH, ALL_STEPS, *CONTROLS)
FINAL, X0_HAT = "final video", "x0-hat of the step"
"""What is read; the x0-hat is that of the `cond` branch."""


@dataclass(frozen=True, eq=False)
class Swap(dl.Patch):
    """A patch of some tokens of each row only, or with the donor's tokens in another order.

    Attributes:
        where: (rows, height, width), the tokens of each row that are replaced, in all latent frames; all when left out.
        order: a permutation of all tokens of the donor.
    """

    where: Tensor | None = None
    order: Tensor | None = None

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        """The donor's activation, its tokens in the order, where it is to be."""
        given = super().apply(activation, moment)
        if self.order is not None:
            given = given.flatten(1, 3)[:, self.order.to(given.device)].view_as(activation)
        if self.where is None:
            return given
        return torch.where(self.where.to(given.device)[:, None, :, :, None], given, activation)


class Bench:
    """The runs of some pairs, each made when it is first needed; rows are pairs.

    Args:
        pairs: two or more where the donor of another pair is asked for; of several tasks, if they can run together.
    """

    def __init__(self, context: Context, pairs: Sequence[Any]) -> None:
        self.context, self.lens, self.pairs = context, context.lens, list(pairs)
        self.inputs = {side: context.inputs([getattr(pair, side) for pair in pairs]) for side in ("clean", "donor")}

    @cached_property
    def extent(self) -> Any:
        """All that there is to select from."""
        return self.lens.extent(**self.inputs["clean"])

    @cached_property
    def clean(self) -> Run:
        """The clean samples."""
        return self.context.clean([pair.clean for pair in self.pairs], [SEED])

    @cached_property
    def reseeded(self) -> Run:
        """The clean samples with another seed."""
        return self.context.clean([pair.clean for pair in self.pairs], [OTHER])

    @cached_property
    def donor(self) -> Run:
        """The donors; not from the shared runs, which go by the number of a sample: a donor has that of its clean sample."""
        return self.lens.run(**self.inputs["donor"], seed=SEED)

    def blocks(self, depths: Sequence[float]) -> list[int]:
        """The blocks at some depths (block / number of blocks; 1 is the last); all where there are none."""
        count = self.extent.blocks[self.extent.forecast.experts[0]]
        return sorted({min(round(depth * count), count - 1) for depth in depths}) or list(range(count))

    def band(self, block: int) -> str:
        """The place of a block among all, after the bands of the paper: its swapped one is the middle, 20 of 40."""
        count = self.extent.blocks[self.extent.forecast.experts[0]]
        if block == round(count / 2):
            return "middle"
        return "early" if block / count < 0.25 else "late" if block / count >= 0.75 else "between"

    def swapped(self, variant: str, step: int, block: int, site: str, given: dl.Activations) -> Run:
        """The clean samples with one block swapped at a step (or at all), for what a donor `given` holds."""
        branches = self.clean.branches if variant == BOTH else ("cond",)
        at = dl.at(block=block, step=None if variant == ALL_STEPS else step, branch=list(branches), site=site)
        swap = Swap(at, given, self.object_tokens if variant == OBJECT else None, self.order if variant == SHUFFLED else None)
        return self.lens.run(**self.inputs["clean"], seed=SEED, edits=[swap], answers=_known(self.clean, at))

    def given(self, variant: str, step: int, block: int) -> dl.Activations:
        """What the donor of a variant holds at both sites of a block, at a step (or at all)."""
        side, run, seed = ("clean", self.reseeded, OTHER) if variant == OTHER_SEED else ("donor", self.donor, SEED)
        branches = self.clean.branches if variant == BOTH else ("cond",)
        whole = variant == ALL_STEPS
        at = dl.at(block=block, step=None if whole else step, branch=list(branches), site=list(READINGS))
        last = self.clean.steps - 1 if whole else step
        how: Any = {"record": at, "answers": _known(run, at), "until": last, "decode": False}
        found = self.lens.run(**self.inputs[side], seed=seed, **how).activations
        if variant != OTHER_SAMPLE:
            return found
        return dl.Activations([replace(entry, tensor=entry.tensor[self.others]) for entry in found])

    @cached_property
    def others(self) -> list[int]:
        """For each row the next one of its task, or of any where its task has no other.

        Raises:
            InputError: there is one pair only.
        """
        names, count = [pair.clean.task.name for pair in self.pairs], len(self.pairs)
        if count < 2:
            raise InputError(
                f"{OTHER_SAMPLE!r} needs two pairs in a batch, and here is one; write --mapped 2, or a larger --batch"
            )
        turns = [[(row + step) % count for step in range(1, count)] for row in range(count)]
        return [next((i for i in turn if names[i] == name), turn[0]) for turn, name in zip(turns, names, strict=True)]

    @cached_property
    def order(self) -> Tensor:
        """A permutation of the tokens, the same for all rows, blocks and readings."""
        return torch.randperm(self.clean.layout.tokens, generator=torch.Generator().manual_seed(0))

    @cached_property
    def object_tokens(self) -> Tensor:
        """(rows, height, width): the tokens in which a pair differs, see `differing`."""
        size = self.clean.layout.shape[1:]
        return torch.stack([torch.from_numpy(metrics.mask_fractions(differing(pair), size) > 0) for pair in self.pairs])

    def outcomes(self, video: Any) -> pd.DataFrame:
        """Whose answer each video shows, one row per pair, with what the clean and the donor run themselves show."""
        flipped, tidy = self._answered(video, "donor")
        kept, _ = self._answered(video, "clean")
        samples = [pair.clean for pair in self.pairs]
        return pd.DataFrame(
            {
                "task": [sample.task.name for sample in samples],
                "sample": [sample.index for sample in samples],
                "case": [f"{sample.task.name}/{sample.index}" for sample in samples],
                "seed": SEED,
                "flipped": flipped,
                "flipped_right": tidy,
                "kept": kept,
                "destroyed": ~(flipped | kept),
                **self._own,
            }
        )

    @cached_property
    def _own(self) -> Mapping[str, np.ndarray]:
        """Whether the clean and the donor run show their own answers."""
        runs = {"clean": self.clean, "donor": self.donor}
        return {f"{side}_own": self._answered(run.video, side)[0] for side, run in runs.items()}

    def _answered(self, video: Any, side: str) -> tuple[np.ndarray, np.ndarray]:
        """Whether each video shows a legal answer of one side of its pair, and whether all of the board is right too."""
        samples = [getattr(pair, side) for pair in self.pairs]
        board = metrics.resized(video, *samples[0].image.size[::-1]).numpy()
        scores = [sample.task.score(clip, sample) for clip, sample in zip(board, samples, strict=True)]
        return np.array([score.which is not None for score in scores]), np.array([score.right for score in scores])


def differing(pair: Any) -> np.ndarray:
    """The squares in which the first frames of a pair differ, or that answers of one sample paint and those of the other do not:
    booleans of the size of the board."""
    first = pair.clean.boards[0] != pair.donor.boards[0]
    return first | (pair.clean.answer_masks.any(axis=0) ^ pair.donor.answer_masks.any(axis=0))


def _known(run: Run, at: dl.Selector) -> dict[tuple[int, str], Tensor]:
    """What of a run stays as it was when one step is edited or looked at: the steps before it, and its other branches."""
    if at.step is None:
        return {}
    others = {(at.step, branch): run.velocity(at.step, branch) for branch in run.branches if branch not in at.branch}
    return run.answers(before=at.step) | others
