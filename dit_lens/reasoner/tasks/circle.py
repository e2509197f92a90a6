"""Circling: draw a ring around every object of the named colour and shape, among distractors that share one of the two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import OBJECT_COLOURS, SHAPES, SQUARES, Colour, blank, stamp
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, reveal

Item = tuple[str, str]
"""Colour and shape."""

PITCH = 5
"""Squares from one slot to the next; slots are 3 x 3, numbered in reading order."""

RING = tuple(
    # Clockwise from the top left; the corners stay open, so that it looks round.
    [(0, x) for x in (1, 2, 3)] + [(y, 4) for y in (1, 2, 3)] + [(4, x) for x in (3, 2, 1)] + [(y, 0) for y in (3, 2, 1)]
)
"""Squares of a ring around a slot, relative to the ring's 5 x 5 corner."""


@dataclass(frozen=True)
class Objects:
    """Objects in some of the 3 x 3 slots, and the kind that is to be circled."""

    items: tuple[Item | None, ...]
    target: Item


class CircleTask(Task):
    """Attributes named in the prompt decide (grounding)."""

    name = "circle"
    wordings = (
        "Circle the {colour} {shape} shapes.",
        "Draw a ring around every {colour} {shape}.",
        "Find each {colour} {shape} and circle it.",
        "Put a cyan circle around all objects that are a {colour} {shape}.",
    )

    def generate(self, random: np.random.Generator) -> Objects:
        colours, shapes = list(OBJECT_COLOURS), list(SHAPES)
        target = (colours[random.integers(len(colours))], shapes[random.integers(len(shapes))])
        same_colour = [(target[0], s) for s in shapes if s != target[1]]
        same_shape = [(c, target[1]) for c in colours if c != target[0]]
        others = [(c, s) for c in colours for s in shapes if (c, s) != target]
        wanted: list[Item] = [target] * int(random.integers(1, 4))
        wanted.append(same_colour[random.integers(len(same_colour))])
        wanted.append(same_shape[random.integers(len(same_shape))])
        wanted += [others[random.integers(len(others))] for _ in range(random.integers(0, 4))]
        items: list[Item | None] = [None] * 9
        for slot, item in zip(random.permutation(9), wanted, strict=False):
            items[slot] = item
        return Objects(tuple(items), target)

    def solve(self, puzzle: Objects) -> tuple[Answer, ...]:
        return (frozenset(i for i, item in enumerate(puzzle.items) if item == puzzle.target),)

    def counterparts(self, puzzle: Objects) -> list[Objects]:
        """The same picture with another kind of object to circle: only the prompt differs."""
        others = sorted({item for item in puzzle.items if item is not None} - {puzzle.target})
        return [Objects(puzzle.items, other) for other in others]

    def words(self, puzzle: Objects) -> dict[str, str]:
        return {"colour": puzzle.target[0], "shape": puzzle.target[1]}

    def vocabulary(self) -> list[dict[str, str]]:
        return [{"colour": c, "shape": s} for c in OBJECT_COLOURS for s in SHAPES]

    def canonical(self, puzzle: Objects) -> bytes:
        # Shapes have a handedness, so the symmetry is of the slots, not of the picture.
        slots = np.arange(9).reshape(3, 3)
        turned = [np.rot90(slots, k) for k in range(4)]
        turned += [t.T for t in turned]
        pictures = [repr([puzzle.items[i] for i in t.ravel()]) for t in turned]
        return (min(pictures) + repr(puzzle.target)).encode()

    def _first(self, puzzle: Objects) -> UInt8[np.ndarray, "16 16"]:
        picture = blank()
        for slot, item in enumerate(puzzle.items):
            if item is not None:
                row, column = divmod(slot, 3)
                stamp(picture, SHAPES[item[1]], PITCH * row + 1, PITCH * column + 1, OBJECT_COLOURS[item[0]])
        return picture

    def draw(self, puzzle: Objects, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        slots: frozenset[int] = answer  # pyright: ignore[reportAssignmentType]
        return reveal(self._first(puzzle), [[(*square, Colour.CYAN) for square in ring(slot)] for slot in sorted(slots)], frames)

    def masks(self, puzzle: Objects) -> dict[str, Bool[np.ndarray, "16 16"]]:
        drawn = self._first(puzzle) != Colour.BLACK
        target, rings = np.zeros_like(drawn), np.zeros_like(drawn)
        for slot, item in enumerate(puzzle.items):
            if item == puzzle.target:
                row, column = (PITCH * i for i in divmod(slot, 3))
                target[row + 1 : row + 4, column + 1 : column + 4] = drawn[row + 1 : row + 4, column + 1 : column + 4]
                rings[RINGS[slot]] = True
        return {"target": target, "distractor": drawn & ~target, "answer": rings, "background": ~drawn & ~rings}

    def wrong(self, puzzle: Objects, random: np.random.Generator) -> Answer:
        """Rings around as many objects, at least one of them a distractor."""
        right: frozenset[int] = self.solve(puzzle)[0]  # pyright: ignore[reportAssignmentType]
        others = [i for i, item in enumerate(puzzle.items) if item not in (None, puzzle.target)]
        missed = int(random.choice(sorted(right)))
        return right - {missed} | {int(random.choice(others))}

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """The slots whose ring is closed in the last frame: right if they are all the targets and nothing else is drawn."""
        last, puzzle = boards[-1], sample.puzzle
        drawn = [int((last[RINGS[slot]] == Colour.CYAN).sum()) for slot in range(9)]
        circled = frozenset(slot for slot, count in enumerate(drawn) if count >= len(RING) - 1)
        if not circled:
            return Score(False, None, None, "nothing is circled")
        if any(0 < count < len(RING) - 1 for slot, count in enumerate(drawn) if slot not in circled):
            # Two corners' worth of a neighbouring ring never reaches another slot, so a part of a ring is a part of a ring.
            return Score(False, circled, None, "a ring is not closed")
        if circled != sample.answers[0]:
            return Score(False, circled, None, "circles the wrong objects")
        if not kept(last, self._first(puzzle), ~sample.masks["answer"]):
            return Score(False, circled, 0, "the objects changed")
        return Score(True, circled, 0)


def ring(slot: int) -> list[tuple[int, int]]:
    """The squares of the ring around a slot."""
    row, column = divmod(slot, 3)
    squares = [(PITCH * row + y, PITCH * column + x) for y, x in RING]
    assert max(max(s) for s in squares) < SQUARES
    return squares


RINGS = [tuple(np.array(ring(slot)).T) for slot in range(9)]
"""The rings of all slots, as indices into a board."""
