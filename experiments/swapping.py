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
from dit_lens.reasoner import Score, board
from dit_lens.run import Run

SEED, OTHER = 0, 1
READINGS = {"resid": "whole stream", "update": "update"}
"""The site that a swap replaces, and what the reading of the paper that it stands for is called."""
SWAP, OBJECT, ANSWERS, EVERY_BRANCH, ALL_STEPS = (
    "swap",
    "object tokens",
    "answer tokens",
    "every branch",
    "every step and branch",
)
OTHER_TOKENS = "as many other tokens"
"""The control of the object tokens alone."""
OTHER_SAMPLE, OTHER_SEED, SHUFFLED = "another sample", "another seed", "shuffled tokens"
CONTROLS = (OTHER_SAMPLE, OTHER_SEED, SHUFFLED)
"""The controls of the claims."""
VARIANTS = (OBJECT, ANSWERS, EVERY_BRANCH, ALL_STEPS, OTHER_TOKENS, *CONTROLS)
OBJECTS = ("target", "x", "o")
"""The masks of what a prompt names and of the marks of a game."""
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
        at = dl.at(block=block, step=None if variant == ALL_STEPS else step, branch=self._branches(variant), site=site)
        swap = Swap(at, given, self.tokens.get(variant), self.order if variant == SHUFFLED else None)
        return self.lens.run(**self.inputs["clean"], seed=SEED, edits=[swap], answers=_known(self.clean, at))

    def given(self, variant: str, step: int, block: int) -> dl.Activations:
        """What the donor of a variant holds at both sites of a block, at a step (or at all)."""
        side, run, seed = ("clean", self.reseeded, OTHER) if variant == OTHER_SEED else ("donor", self.donor, SEED)
        whole = variant == ALL_STEPS
        at = dl.at(block=block, step=None if whole else step, branch=self._branches(variant), site=list(READINGS))
        last = self.clean.steps - 1 if whole else step
        how: Any = {"record": at, "answers": _known(run, at), "until": last, "decode": False}
        found = self.lens.run(**self.inputs[side], seed=seed, **how).activations
        if variant != OTHER_SAMPLE:
            return found
        return dl.Activations([replace(entry, tensor=entry.tensor[self.others]) for entry in found])

    def _branches(self, variant: str) -> list[str]:
        # Of mazes the unconditional branch sees the goal too: left alone, it would contradict the swapped one at every step.
        return list(self.clean.branches) if variant in (EVERY_BRANCH, ALL_STEPS) else ["cond"]

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
    def tokens(self) -> Mapping[str, Tensor]:
        """(rows, height, width): the tokens that are swapped in the variants that swap some only, see `objects` and `differing`.

        The other tokens are drawn at random; they are of the objects only where there are too few that are not.
        """
        size = self.clean.layout.shape[1:]
        object_tokens, answer_tokens = (
            torch.stack([torch.from_numpy(metrics.mask_fractions(squares(pair), size) > 0) for pair in self.pairs])
            for squares in (objects, differing)
        )
        drawn = torch.rand(object_tokens.shape, generator=torch.Generator().manual_seed(0)) + object_tokens
        places = drawn.flatten(1).argsort(dim=1).argsort(dim=1).view_as(drawn)
        others = places < object_tokens.sum(dim=(1, 2), keepdim=True)
        return {OBJECT: object_tokens, ANSWERS: answer_tokens, OTHER_TOKENS: others}

    def share(self, variant: str) -> np.ndarray:
        """The share of the visual tokens that a variant swaps, of each row."""
        some = self.tokens.get(variant)
        return np.ones(len(self.pairs)) if some is None else some.double().mean(dim=(1, 2)).numpy()

    def outcomes(self, video: Any) -> pd.DataFrame:
        """Whose answer each video shows, one row per pair, with what the clean and the donor run themselves show."""
        scores = self._scores(video)
        flipped, kept = (_shown(scores[side]) for side in ("donor", "clean"))
        samples = [pair.clean for pair in self.pairs]
        return pd.DataFrame(
            {
                "task": [sample.task.name for sample in samples],
                "sample": [sample.index for sample in samples],
                "case": [f"{sample.task.name}/{sample.index}" for sample in samples],
                # Symmetric copies of a puzzle are one cluster.
                "puzzle": [f"{sample.task.name}/{sample.group}" for sample in samples],
                "donor_split": [pair.donor.split for pair in self.pairs],
                "seed": SEED,
                "flipped": flipped,
                "flipped_right": np.array([score.right for score in scores["donor"]]),
                "kept": kept,
                "destroyed": ~(flipped | kept),
                **self._own,
            }
        )

    @cached_property
    def _own(self) -> Mapping[str, np.ndarray]:
        """Whether the clean and the donor run show their own answers."""
        runs = {"clean": self.clean, "donor": self.donor}
        return {f"{side}_own": _shown(self._scores(run.video)[side]) for side, run in runs.items()}

    def _scores(self, video: Any) -> dict[str, list[Score]]:
        """What each video did, in the terms of either side of its pair. Tasks that have pairs judge the last frame alone."""
        last = metrics.resized(video[:, -1:], *self.pairs[0].clean.image.size[::-1])
        boards = board.read(last.numpy())
        sides = {side: [getattr(pair, side) for pair in self.pairs] for side in ("clean", "donor")}
        return {
            side: [sample.task.judge(one, sample) for one, sample in zip(boards, samples, strict=True)]
            for side, samples in sides.items()
        }


def objects(pair: Any) -> np.ndarray:
    """The squares of what the prompts of a pair name (of a game all marks), and those in which it differs: booleans of the size
    of the board."""
    named = [side.masks[name] for side in (pair.clean, pair.donor) for name in OBJECTS if name in side.masks]
    return np.any([differing(pair), *named], axis=0)


def differing(pair: Any) -> np.ndarray:
    """The squares in which the first frames of a pair differ, or that answers of one sample paint and those of the other do not:
    booleans of the size of the board."""
    first = pair.clean.boards[0] != pair.donor.boards[0]
    return first | (pair.clean.answer_masks.any(axis=0) ^ pair.donor.answer_masks.any(axis=0))


def _shown(scores: Sequence[Score]) -> np.ndarray:
    """Whether a legal answer was given, whatever the rest of the board."""
    return np.array([score.which is not None for score in scores])


def _known(run: Run, at: dl.Selector) -> dict[tuple[int, str], Tensor]:
    """What of a run stays as it was when one step is edited or looked at: the steps before it, and its other branches."""
    if at.step is None:
        return {}
    others = {(at.step, branch): run.velocity(at.step, branch) for branch in run.branches if branch not in at.branch}
    return run.answers(before=at.step) | others
