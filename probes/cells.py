"""One cell of a map: its activations from the store, all questions from them. This is what workers do.

A `CellReader` holds what all cells of a map share. It goes to worker processes, so it holds the questions (arrays), not the
targets and samples that they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from threadpoolctl import threadpool_limits

import dit_lens as dl
from dit_lens.errors import InputError, listed
from probes.baselines import SIDE
from probes.closer import Closer
from probes.controls import control_task, read_with_controls
from probes.ridge import Question

CELL = ["expert", "step", "branch", "block", "site", "stream"]
LEVELS = ["sigma", "timestep", "depth"]
MIDDLE = "middle"
"""What a store calls the latent frame that targets call None."""

Frame = int | None
"""A latent frame as targets name it: a number, negative from the end, or None for the middle one."""


@dataclass(frozen=True, eq=False)
class CellReader:
    """Reads cells, and features of any other origin, for the same questions.

    Attributes:
        store: with the activations. rows: labels by which the store knows the runs (task, model). samples: their numbers, in
            the order of the questions' rows.
        questions: about all tokens, sample by sample. frames, contents: of each question the latent frame, and the content.
        kept: the frames that the store kept of these samples, all of what was recorded when None.
        groups, test: of each sample. seed: of the controls. closer: what to look at more closely.
    """

    store: dl.Store
    rows: Mapping[str, Any]
    samples: Sequence[int]
    questions: Sequence[Question]
    frames: Sequence[Frame]
    contents: Sequence[str]
    kept: Sequence[Frame] | None
    groups: Shaped[np.ndarray, " samples"]
    test: Bool[np.ndarray, " samples"]
    seed: int
    closer: Closer | None

    def cell(self, axes: Mapping[str, Any]) -> pd.DataFrame:
        """A row for each question, read at the cell that these axes name; they and their levels are columns."""
        stack, labels = self.store.stack(
            **{axis: axes[axis] for axis in CELL if axis != "expert"}, **self.rows, sample=list(self.samples)
        )
        numbers = labels["sample"].tolist()
        uneven = sorted({number for number in self.samples if numbers.count(number) != 1})
        if uneven:
            raise InputError(
                f"block {axes['block']} at step {axes['step']} is stored {numbers.count(uneven[0])} times of sample {uneven[0]}:"
                " observe all samples once, with one record"
            )
        stream = stack.float().numpy()[[numbers.index(number) for number in self.samples]]
        if stream.ndim != 5 or stream.shape[2:4] != (SIDE, SIDE):
            raise InputError(f"a map of targets needs whole frames of 8 x 8 tokens, and the store holds {stream.shape[1:]}")
        return self.read({frame: tokens_of(stream, frame, self.kept) for frame in set(self.frames)}, axes)

    def read(self, features: Mapping[Frame, Float[np.ndarray, "tokens channels"]], labels: Mapping[str, Any]) -> pd.DataFrame:
        """A row for each question, read from the features of its latent frame; the labels become columns."""
        # One thread for linear algebra, so that sums have one order on every machine and processes do not crowd each other.
        with threadpool_limits(1):
            tables = [self._frame(features[frame], frame, labels) for frame in dict.fromkeys(self.frames)]
        return pd.concat(tables, ignore_index=True).assign(**labels)

    def _frame(self, features: np.ndarray, frame: Frame, labels: Mapping[str, Any]) -> pd.DataFrame:
        here = [place for place, other in enumerate(self.frames) if other == frame]
        asked = [self.questions[place] for place in here]
        number, place = np.repeat(np.arange(len(self.samples)), SIDE**2), np.tile(np.arange(SIDE**2), len(self.samples))
        groups, test = self.groups[number], self.test[number]
        table = read_with_controls(features, asked, groups, test, number, place, self.seed)
        table["content"] = [self.contents[place] for place in here]
        if self.closer is not None and labels.get("block") is not None and labels["step"] in self.closer.steps:
            chosen = [q.name in self.closer.targets and q.kind != "number" for q in asked]
            seen = [
                self.closer.look(features, question, control_task(question, place, self.seed), groups, test, number, self.seed)
                if closely
                else {}
                for question, closely in zip(asked, chosen, strict=True)
            ]
            table = pd.concat([table, pd.DataFrame(seen, index=table.index)], axis=1)
        return table


def tokens_of(
    stream: Float[np.ndarray, "rows frames height width channels"], frame: Frame, kept: Sequence[Frame] | None = None
) -> Float[np.ndarray, "tokens channels"]:
    """The tokens of one latent frame: row by row of the batch, row by row of the picture.

    `kept` says which frames these are; otherwise they are all, or if it is one, the one that is asked for.
    """
    if kept is not None and frame not in kept:
        raise InputError(
            f"a target reads the latent frame {named(frame)}, and the store kept {listed(map(named, kept))}: write frames= for"
            " `observe`, or leave it out"
        )
    count = stream.shape[1]
    own = 0 if count == 1 else count // 2 if frame is None else frame
    place = own if kept is None else list(kept).index(frame)
    return rearrange(stream[:, place], "rows y x c -> (rows y x) c")


def named(frame: Frame) -> str:
    """What a store calls a latent frame."""
    return MIDDLE if frame is None else str(frame)
