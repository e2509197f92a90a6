"""What a task is: puzzles that can be drawn, solved in every legal way, and read back from any video.

A task generates puzzles without limit. Each puzzle belongs to the train or to the test split by a hash of its content *up to
symmetry*, so that a turned or mirrored copy of a training puzzle is never held out. A puzzle knows every legal answer; a sample
is a puzzle with a prompt and one answer, drawn at random, that its true video shows. Scoring reads a video of any origin and
returns what the video did (the route walked, the square marked) besides whether it is right.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from dit_lens.errors import InputError
from dit_lens.reasoner import board, unmixing
from dit_lens.reasoner.settings import CALL

Split = Literal["train", "test"]
Answer = Hashable
"""What a video does, in a task's own terms; equal answers mean the same thing was done."""

HELD_OUT_SHARE = 1 / 8
"""Share of puzzle classes (puzzles up to symmetry) that are held out for testing."""

DECOY_ATTEMPTS = 20
"""How many wrong answers are tried for one that can be told from every legal one."""

SEARCHED = 40
"""Samples that are looked at for each one of a kind."""


@dataclass(frozen=True)
class Score:
    """What a video did.

    `right` is whether it did something legal and left the rest of the board alone; `answer` is what it did in the task's terms,
    None where nothing could be read; `which` is the index of `answer` among the sample's legal answers; `reason` says in words
    why it is wrong ("" when right).
    """

    right: bool
    answer: Answer | None
    which: int | None
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """A puzzle with its prompt, all its legal answers, and the one that its true video shows."""

    task: Task
    split: Split
    index: int
    puzzle: Any
    prompt: str
    shown: int
    """Index into `answers` of the answer in the true video."""
    frames: int = CALL["num_frames"]
    answers: tuple[Answer, ...] = field(repr=False, default=())

    @cached_property
    def group(self) -> str:
        """A name of the puzzle up to symmetry: samples of one group are never on both sides of a split."""
        return hashlib.sha256(self.task.canonical(self.puzzle)).hexdigest()[:16]

    @cached_property
    def boards(self) -> UInt8[np.ndarray, "frames 16 16"]:
        """The true video as palette indices."""
        return self.task.draw(self.puzzle, self.answers[self.shown], self.frames)

    def video(self) -> Float[np.ndarray, "frames 64 64 3"]:
        """The true video in pixels, in [0, 1]."""
        return board.paint(self.boards).astype(np.float32) / 255

    @property
    def image(self) -> Image.Image:
        """The first frame: what the model is given."""
        return Image.fromarray(board.paint(self.boards[0]))

    @property
    def inputs(self) -> dict[str, Any]:
        """The pipeline's keyword arguments for this sample at the bundled model's default settings."""
        return {**CALL, "image": self.image, "prompt": self.prompt, "num_frames": self.frames}

    @cached_property
    def masks(self) -> dict[str, Bool[np.ndarray, "16 16"]]:
        """What is where: one mask of squares per part of the picture."""
        return self.task.masks(self.puzzle)

    @cached_property
    def answer_masks(self) -> Bool[np.ndarray, "answers 16 16"]:
        """The squares that each legal answer paints in the last frame."""
        return self.finals != self.boards[0]

    @cached_property
    def finals(self) -> UInt8[np.ndarray, "answers 16 16"]:
        """The last frame of each legal answer, as palette indices."""
        return self.ends(self.answers)

    def ends(self, answers: Sequence[Answer]) -> UInt8[np.ndarray, "answers 16 16"]:
        """The last frame of each of these answers, legal or not, as palette indices."""
        return np.stack([self.task.draw(self.puzzle, answer, 5)[-1] for answer in answers])

    @cached_property
    def untouched(self) -> Bool[np.ndarray, "16 16"]:
        """The squares that stay as they are in the true video of every legal answer."""
        drawn = np.stack([self.task.draw(self.puzzle, a, self.frames) for a in self.answers])
        return ~(drawn != self.boards[0]).any(axis=(0, 1))


class Task(ABC):
    """One kind of puzzle. Subclasses say how it is made, drawn, solved and read."""

    name: ClassVar[str]
    wordings: ClassVar[tuple[str, ...]]
    """Prompts with {placeholders} that `words` fills."""
    held: int | None = None
    """How many samples there are, None where there is no last one."""

    @abstractmethod
    def generate(self, random: np.random.Generator) -> Any:
        """A new puzzle."""

    @abstractmethod
    def solve(self, puzzle: Any) -> tuple[Answer, ...]:
        """Every legal answer, in a fixed order."""

    @abstractmethod
    def draw(self, puzzle: Any, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        """The video in which an answer, legal or not, is carried out; it always ends in the last frame."""

    @abstractmethod
    def masks(self, puzzle: Any) -> dict[str, Bool[np.ndarray, "16 16"]]:
        """What is where in the first frame, and where the answers go."""

    @abstractmethod
    def wrong(self, puzzle: Any, random: np.random.Generator) -> Answer:
        """An answer that looks like a legal one and is not."""

    @abstractmethod
    def canonical(self, puzzle: Any) -> bytes:
        """The puzzle's content up to symmetry: what decides its split."""

    @abstractmethod
    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """Read one video, given as palette indices, and say what it did."""

    def counterparts(self, puzzle: Any) -> list[Any]:
        """Puzzles that differ from this one in a single thing, by which no answer is legal in both; none in some tasks."""
        return []

    def words(self, puzzle: Any) -> dict[str, str]:
        """What fills the placeholders of the wordings."""
        return {}

    def prompts(self) -> list[str]:
        """Every prompt this task can produce; the tokenizer and the text encoder are trained on them."""
        return [w.format(**words) for w in self.wordings for words in self.vocabulary()]

    def vocabulary(self) -> list[dict[str, str]]:
        """Every combination of words that `words` can return."""
        return [{}]

    def split(self, puzzle: Any) -> Split:
        """Where a puzzle belongs, by a hash of its content up to symmetry."""
        digest = hashlib.sha256(self.name.encode() + b"\0" + self.canonical(puzzle)).digest()
        return "test" if int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64 else "train"

    def sample(self, split: Split = "test", index: int = 0, frames: int = CALL["num_frames"]) -> Sample:
        """The sample with a number, the same on every machine.

        Args:
            split: "train" or "test" (held out).
            index: any whole number from 0; there is no last one.
            frames: length of the clip, 4 k + 1 with k from 1.

        Raises:
            InputError: an unknown split, a negative index, or a length that the VAE cannot hold.
        """
        if split not in ("train", "test"):
            raise InputError(f"unknown split {split!r}; there are 'train' and 'test'")
        if index < 0:
            raise InputError(f"sample index {index} is negative; write an index from 0")
        if frames % 4 != 1 or frames < 5:
            raise InputError(f"a clip cannot have {frames} frames; write 5, 9, 13 or 17")
        random = np.random.default_rng(
            [int.from_bytes(hashlib.sha256(f"{self.name}/{split}".encode()).digest()[:4], "big"), index]
        )
        while True:
            puzzle = self.generate(random)
            if self.split(puzzle) == split:
                break
        answers = self.solve(puzzle)
        shown = int(random.integers(len(answers)))
        prompt = self.wordings[random.integers(len(self.wordings))].format(**self.words(puzzle))
        return Sample(self, split, index, puzzle, prompt, shown, frames, answers)

    def first(self, count: int, several: bool, split: Split = "test") -> list[Sample]:
        """The first samples with several legal answers, or with one; none where there is none among the first 40.

        Raises:
            InputError: there are some, and too few among the first 40 for each that is asked for, or among all that there are.
        """
        kind: list[Sample] = []
        searched = SEARCHED * max(1, count)
        for index in range(searched if self.held is None else min(searched, self.held)):
            if len(kind) == count or (index == SEARCHED and not kind):
                return kind
            sample = self.sample(split, index)
            kind += [sample] if (len(sample.answers) > 1) == several else []
        if len(kind) == count or not kind:
            return kind
        which = "several answers" if several else "one answer"
        raise InputError(f"{self.name} has {len(kind)} samples with {which} where {count} are asked for; ask for fewer")

    def pair(self, sample: Sample) -> tuple[Sample, Sample] | None:
        """A sample and a counterpart of the same wording, or None where there is none; always the same one.

        It is of the same split where one is (a counterpart of a held-out position of tic-tac-toe rarely is held out too).
        """
        every = self.counterparts(sample.puzzle)
        there = [puzzle for puzzle in every if self.split(puzzle) == sample.split] or every
        if not there:
            return None
        puzzle = there[np.random.default_rng(sample.index).integers(len(there))]
        said = self.words(sample.puzzle)
        wording = next(wording for wording in self.wordings if wording.format(**said) == sample.prompt)
        answers = self.solve(puzzle)
        shown = sample.shown % len(answers)
        prompt = wording.format(**self.words(puzzle))
        return sample, Sample(self, self.split(puzzle), sample.index, puzzle, prompt, shown, sample.frames, answers)

    def score(self, video: Float[np.ndarray, "frames 64 64 3"], sample: Sample) -> Score:
        """What one video in [0, 1] did, and whether it is right."""
        return self.scores(np.asarray(video)[None], [sample])[0]

    def scores(self, videos: Float[np.ndarray, "batch frames 64 64 3"], samples: Sequence[Sample]) -> list[Score]:
        """What each video of a batch did; `samples` has one sample per video."""
        boards = board.read(np.asarray(videos))
        return [self.judge(b, s) for b, s in zip(boards, samples, strict=True)]

    def evidence(
        self,
        videos: Float[np.ndarray, "batch frames 64 64 3"],
        samples: Sequence[Sample],
        answers: Sequence[Sequence[Answer]] | None = None,
    ) -> list[Float[np.ndarray, " answers"]]:
        """How near the last frame has come to each legal answer, from 0 (no nearer than the first frame) to 1 (all the way).

        For each answer, only the squares count whose final colour no other answer shares. There the square's colour is taken
        for a mixture of the colours that it can have, the first frame's and those of the answers, and the answer's share is
        the weight of its own; so an even blend of two answers counts one half for each, as does an even blend of an answer
        and the first frame. `dit_lens.reasoner.unmixing.shares` says how, and what is done with colours that leave it open.

        Args:
            answers: what to look for in each video, legal or not, in place of the sample's legal answers.
        """
        last = board.square_colours(np.asarray(videos)[:, -1])
        wanted = [s.finals for s in samples] if answers is None else [s.ends(a) for s, a in zip(samples, answers, strict=True)]
        return unmixing.shares(last, [unmixing.plan(s.boards[0], each) for s, each in zip(samples, wanted, strict=True)])

    def decoy(self, sample: Sample) -> Answer | None:
        """A wrong answer that paints something which no legal one paints so, always the same one; None where none is found.

        What a video shows of it is a measure of how much a reading finds where nothing is to be found.
        """
        for attempt in range(DECOY_ATTEMPTS):
            wrong = self.wrong(sample.puzzle, np.random.default_rng([sample.index, attempt]))
            end = sample.ends([wrong])[0]
            if ((end != sample.boards[0]) & (end != sample.finals).all(axis=0)).any():
                return wrong
        return None


def progress(frames: int) -> Float[np.ndarray, " frames"]:
    """Time from 0 in the first frame to 1 in the last."""
    return np.linspace(0, 1, frames)


def reveal(
    start: UInt8[np.ndarray, "16 16"], strokes: Sequence[Sequence[tuple[int, int, int]]], frames: int
) -> UInt8[np.ndarray, "frames 16 16"]:
    """A video in which strokes are drawn at the same time, square by square, from the second frame to the last.

    Each stroke is a sequence of (row, column, colour).
    """
    video = np.repeat(start[None], frames, axis=0)
    for frame, time in itertools.islice(enumerate(progress(frames)), 1, None):
        for stroke in strokes:
            for row, column, colour in stroke[: int(np.ceil(time * len(stroke) - 1e-9))]:
                video[frame, row, column] = colour
    return video


def kept(boards: UInt8[np.ndarray, "16 16"], expected: UInt8[np.ndarray, "16 16"], where: Bool[np.ndarray, "16 16"]) -> bool:
    """Whether a board shows what it should on a mask, but for a decoder's slips.

    Of what should be empty (black) 2 % of the squares may be off, of what should be there 1 %: none of a few small objects, two
    squares of a large maze.
    """
    wrong, there = (boards != expected) & where, (expected != board.Colour.BLACK) & where
    return bool((wrong & there).sum() <= 0.01 * there.sum() and (wrong & ~there).sum() <= 0.02 * (where & ~there).sum())
