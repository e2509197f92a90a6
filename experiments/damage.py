"""Damage: what an edited run can lose, read from its video in three parts that do not depend on each other.

* *Perception*: does the video still show the board that it was given? Of the squares that must stay, the share that do.
* *Reasoning*: is the answer right, whatever became of the board? The task's scorer judges a video in which all that must stay
  has been put back.
* *Picture*: is it a clean picture, whatever it shows? How near the pixels are to the colours that they are read as.

Exactly, with c(f, s) the palette colour that is nearest to the mean of square s in frame f, and c0(s) that of the given frame:

    stays       s with one colour in all frames of the true videos of all legal answers
    ink         colours, but black, that true videos paint over others; of tic-tac-toe those of both players
    excused     s in stays with c(f, s) in ink and not c0(s); none where they are more than half of stays: that is no answer
    perception  mean over frames after the first and over two kinds of squares, things (c0 not black) and empty ones, of
                |{s in stays, not excused, c(f, s) = c0(s)}| / |{s in stays, not excused}|; 0 for a kind of which all is excused
    reasoning   1 if the scorer finds the video right with c0(s) for every s in stays whose colour is no ink, and any of the
                squares that a legal answer paints other than black has its colour (the scorer forgives one square, which can be
                all of a small object); else 0
    marks       greatest over legal answers of the share of the squares that the answer paints which have its colour, in the
                frame in which it paints most (the last, or the middle one where all comes back)
    picture     mean over frames after the first and squares of max(0, 1 - d(f, s) / r(c)): d is the root mean square distance
                of the pixels of s to palette colour c(f, s) and r(c) half the distance of c to the next colour, both in RGB of
                [0, 1]; 1 is a clean drawing, 0 means that every square could as well be read as another colour
    right       1 if the scorer finds the video right as it is, else 0

An answer that is wrong crosses walls or hits other objects in ink. That is not held against perception: the wall was covered
by a decision, and reasoning has lost by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

import dit_lens as dl
from dit_lens import metrics
from dit_lens.errors import InputError
from dit_lens.reasoner import Sample
from dit_lens.reasoner.board import PALETTE, PIXELS, Colour

PARTS = ("perception", "reasoning", "picture")
MEASURES = (*PARTS, "marks", "right")

COLOURS: Float[np.ndarray, "colours 3"] = PALETTE.astype(np.float64) / 255
_apart = np.linalg.norm(COLOURS[:, None] - COLOURS[None], axis=-1)
REACH: Float[np.ndarray, " colours"] = np.where(_apart > 0, _apart, np.inf).min(axis=1) / 2
"""Half the distance of each palette colour to the nearest other one."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What must stay in a video of a sample, and what its legal answers paint.

    Attributes:
        first: the given frame. stays: squares that no legal answer touches. ink: which palette colours answers paint in.
        told: the frame in which the answers are read. answers: for each legal answer, the board in that frame.
    """

    sample: Sample
    first: UInt8[np.ndarray, "16 16"]
    stays: Bool[np.ndarray, "16 16"]
    ink: Bool[np.ndarray, " colours"]
    told: int
    answers: UInt8[np.ndarray, "answers 16 16"]

    @staticmethod
    def of(sample: Sample) -> Expected:
        """Drawn from the true videos of all legal answers."""
        videos = np.stack([sample.task.draw(sample.puzzle, answer, sample.frames) for answer in sample.answers])
        first = videos[0, 0]
        touched = videos != first
        ink = np.isin(np.arange(len(PALETTE)), videos[touched])
        if sample.task.name == "tictactoe":
            ink[[sample.puzzle.colour(mark) for mark in "XO"]] = True
        ink[Colour.BLACK] = False
        # The last frame of those in which most is painted.
        painted = touched.sum(axis=(0, 2, 3))
        told = len(painted) - 1 - int(painted[::-1].argmax())
        return Expected(sample, first, ~touched.any(axis=(0, 1)), ink, told, videos[:, told])

    def measured(self, boards: UInt8[np.ndarray, "frames 16 16"]) -> dict[str, float]:
        """All but the picture, of a video that is given as palette indices."""
        task, inked = self.sample.task, self.stays & self.ink[boards] & (boards != self.first)
        restored = np.where(self.stays & ~self.ink[boards], self.first, boards)
        painted = self.answers != self.first
        hit, coloured = painted & (boards[self.told] == self.answers), painted & (self.answers != Colour.BLACK)
        shown = (hit & coloured).any(axis=(1, 2)) | ~coloured.any(axis=(1, 2))
        return {
            "perception": self._perception(boards[1:], inked[1:]),
            "reasoning": float(shown.any() and task.judge(restored, self.sample).right),
            "marks": self.marks(boards),
            "right": float(task.judge(boards, self.sample).right),
        }

    def marks(self, boards: UInt8[np.ndarray, "frames 16 16"]) -> float:
        """The greatest share of what a legal answer paints that is painted."""
        painted = self.answers != self.first
        hits = (painted & (boards[self.told] == self.answers)).sum(axis=(1, 2))
        return float((hits / np.maximum(painted.sum(axis=(1, 2)), 1)).max())

    def _perception(self, boards: UInt8[np.ndarray, "frames 16 16"], inked: Bool[np.ndarray, "frames 16 16"]) -> float:
        """Share of what must stay that does, with things and empty squares counting the same."""
        excused = inked & (inked.sum(axis=(1, 2)) <= self.stays.sum() / 2)[:, None, None]
        shares = []
        for kind in (self.stays & (self.first != Colour.BLACK), self.stays & (self.first == Colour.BLACK)):
            if kind.any():
                asked = kind & ~excused
                kept = (asked & (boards == self.first)).sum(axis=(1, 2))
                shares.append(kept / np.maximum(asked.sum(axis=(1, 2)), 1))
        return float(np.mean(shares)) if shares else float("nan")


class Scorer:
    """Reads what videos of these samples have kept.

    Args:
        samples: one for each row of the videos. device: where the pixels are averaged, which is most of the work; the model's own
            is the fastest.
    """

    def __init__(self, samples: Sequence[Sample], device: torch.device | str = "cpu") -> None:
        self.device = device
        known = {id(sample): Expected.of(sample) for sample in samples}
        self.expected = [known[id(sample)] for sample in samples]

    def __call__(self, video: Float[Tensor, "rows frames height width 3"] | None) -> dict[str, Float[np.ndarray, " rows"]]:
        """Every one of `MEASURES` for every row of a video in [0, 1]; arguments and errors as of `read`."""
        return self.measured(*self.read(video))

    def read(
        self, video: Float[Tensor, "rows frames height width 3"] | None
    ) -> tuple[UInt8[np.ndarray, "rows frames 16 16"], Float[np.ndarray, "rows frames 16 16"]]:
        """The squares of a video and how clean they are; one of another size is averaged to the board's.

        Raises:
            InputError: there is no video, or it has other rows or frames than the samples.
        """
        frames = {expected.sample.frames for expected in self.expected}
        if video is None:
            raise InputError("damage is read from a video, and the run was not decoded; write decode=True")
        if len(video) != len(self.expected) or frames != {video.shape[1]}:
            raise InputError(
                f"damage is read from {len(self.expected)} videos of {sorted(frames)} frames, and these are {len(video)} of"
                f" {video.shape[1]}; run the samples with num_frames= of their own"
            )
        return read(metrics.resized(video.to(self.device).float(), *self.expected[0].sample.image.size[::-1]))

    def measured(
        self, boards: UInt8[np.ndarray, "rows frames 16 16"], picture: Float[np.ndarray, "rows frames 16 16"]
    ) -> dict[str, Float[np.ndarray, " rows"]]:
        """Every one of `MEASURES` for every row, of what was read."""
        rows = [expected.measured(board) for expected, board in zip(self.expected, boards, strict=True)]
        found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return {**found, "picture": picture[:, 1:].mean(axis=(1, 2, 3))}

    def marks(self, boards: UInt8[np.ndarray, "rows frames 16 16"]) -> Float[np.ndarray, " rows"]:
        """Only the marks of every row."""
        return np.array([expected.marks(board) for expected, board in zip(self.expected, boards, strict=True)])


def read(
    video: Float[Tensor, "rows frames 64 64 3"],
) -> tuple[UInt8[np.ndarray, "rows frames 16 16"], Float[np.ndarray, "rows frames 16 16"]]:
    """The palette index of every square, and how cleanly it has that colour, from 0 to 1."""
    planes = video.flatten(0, 1).movedim(-1, 1)
    # Squares are few, and compared on the CPU, where products are not rounded to TF32.
    mean, square = (avg_pool2d(values, PIXELS).movedim(1, -1).cpu() for values in (planes, planes.square()))
    palette = torch.from_numpy(COLOURS).to(mean)
    # Of |p - c|^2 over the pixels of a square, the mean: no pixel is looked at twice.
    apart = square.sum(-1, keepdim=True) - 2 * mean @ palette.T + palette.square().sum(-1)
    nearest, index = apart.min(dim=-1)
    clean = 1 - nearest.clamp_min(0).sqrt() / torch.from_numpy(REACH).to(mean)[index]
    shape = video.shape[:2]
    return index.to(torch.uint8).unflatten(0, shape).numpy(), clean.clamp_min(0).double().unflatten(0, shape).numpy()


def outcomes(pairs: Sequence[Any], of: Literal["video", "x0_hat"] = "video") -> list[dl.Outcome]:
    """What the clean samples of pairs keep, for `dl.sweep`: of the final video, or of the decoded x0-hat of the same step."""
    known = {id(pair): pair.clean for pair in pairs}
    last: list[Any] = [None, None]

    def outcome(name: str) -> dl.Outcome:
        def measure(shown: Tensor, rows: Sequence[Any]) -> np.ndarray:
            # One reading gives all measures; a sweep asks for them one after the other.
            if last[0] is not shown:
                last[:] = shown, Scorer([known[id(pair)] for pair in rows])(shown)
            return last[1][name]

        return dl.Outcome(name, measure, of=of, decoded=of == "x0_hat")

    return [outcome(name) for name in MEASURES]
