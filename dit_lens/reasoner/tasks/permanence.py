"""Permanence: one object leaves the frame, or a screen hides it, and it must come back to where it was."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import OBJECT_COLOURS, SHAPES, SQUARES, Colour, blank, stamp
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, progress

SIDES = {"left": (0, -1), "right": (0, 1), "top": (-1, 0), "bottom": (1, 0)}
"""Sides of the frame by name, as a step in (rows, columns)."""

SCREEN = 5
"""Width of the screen in squares: the object and one square on both sides."""


@dataclass(frozen=True)
class Thing:
    """An object; `row` and `column` are its top left square."""

    colour: str
    shape: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Things in a frame. The first one goes: out by a side (`hides` False), or behind a screen that comes from that side."""

    things: tuple[Thing, ...]
    side: str
    hides: bool


Return = tuple[str, int, int]
"""The side, and the row and column to which the object came back."""


class PermanenceTask(Task):
    """Working memory: between, nothing in the frame says where the object was."""

    name = "permanence"
    wordings = (
        "The {colour} {shape} {goes} and comes back to its place.",
        "First the {colour} {shape} {goes}, then it is where it was.",
        "The {colour} {shape} {goes}; at the end the scene is as before.",
    )
    leaves = "leaves the frame on the {side} side"
    is_hidden = "is hidden by a screen from the {side}"

    def generate(self, random: np.random.Generator) -> Scene:
        while True:
            hides = bool(random.random() < 0.5)
            side = list(SIDES)[random.integers(4)]
            kinds = [(c, s) for c in OBJECT_COLOURS for s in SHAPES]
            chosen = [kinds[i] for i in random.choice(len(kinds), int(random.integers(2, 5)), replace=False)]
            places = random.integers(1, SQUARES - 3, size=(len(chosen), 2)).tolist()
            things = tuple(Thing(*kind, *place) for kind, place in zip(chosen, places, strict=True))
            scene = Scene(things, side, hides)
            if _clear(scene):
                return scene

    def solve(self, puzzle: Scene) -> tuple[Answer, ...]:
        moved = puzzle.things[0]
        return ((puzzle.side, moved.row, moved.column),)

    def words(self, puzzle: Scene) -> dict[str, str]:
        moved = puzzle.things[0]
        goes = (self.is_hidden if puzzle.hides else self.leaves).format(side=puzzle.side)
        return {"colour": moved.colour, "shape": moved.shape, "goes": goes}

    def vocabulary(self) -> list[dict[str, str]]:
        return [
            {"colour": c, "shape": s, "goes": way.format(side=side)}
            for c in OBJECT_COLOURS
            for s in SHAPES
            for way in (self.leaves, self.is_hidden)
            for side in SIDES
        ]

    def canonical(self, puzzle: Scene) -> bytes:
        # Mirroring the frame mirrors positions and the side; shapes are compared by name.
        return min(
            repr((_mirrored(puzzle.things, rows, columns), _mirrored_side(puzzle.side, rows, columns), puzzle.hides)).encode()
            for rows in (False, True)
            for columns in (False, True)
        )

    def draw(self, puzzle: Scene, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        side, row, column = answer  # pyright: ignore[reportGeneralTypeIssues]
        moved = puzzle.things[0]
        video = np.stack([blank() for _ in range(frames)])
        for picture, time in zip(video, progress(frames), strict=True):
            home = moved if time <= 0.5 else Thing(moved.colour, moved.shape, row, column)
            # Gone for the middle fifth of the time, on its way before and after.
            away = min(1.0, (1 - abs(2 * time - 1)) * 1.25)
            dy, dx = SIDES[side]
            shift = 0 if puzzle.hides else round(away * _distance(home, side))
            for thing in puzzle.things[1:]:
                _put(picture, thing)
            _put(picture, Thing(home.colour, home.shape, home.row + dy * shift, home.column + dx * shift))
            if puzzle.hides:
                _screen(picture, home, side, away)
        return video

    def masks(self, puzzle: Scene) -> dict[str, Bool[np.ndarray, "16 16"]]:
        alone = blank()
        _put(alone, puzzle.things[0])
        target = alone != Colour.BLACK
        first = self.draw(puzzle, self.solve(puzzle)[0], 5)
        others = (first[0] != Colour.BLACK) & ~target
        path = (first != first[0]).any(axis=0) & ~target & ~others
        return {"target": target, "distractor": others, "path": path, "background": ~target & ~others & ~path}

    def wrong(self, puzzle: Scene, random: np.random.Generator) -> Answer:
        """It comes back to another place that is free."""
        while True:
            row, column = random.integers(1, SQUARES - 3, size=2).tolist()
            moved = puzzle.things[0]
            other = Thing(moved.colour, moved.shape, row, column)
            if max(abs(row - moved.row), abs(column - moved.column)) >= 2 and _clear(
                Scene((other, *puzzle.things[1:]), puzzle.side, puzzle.hides)
            ):
                return puzzle.side, row, column

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """Where the object is in the last frame, and by which side it went: right if it was gone in the middle of the clip,
        went by the named side, and is back in its place with everything else as it was."""
        puzzle: Scene = sample.puzzle
        moved = puzzle.things[0]
        ways = self._ways(puzzle, len(boards))
        true, middle = ways[puzzle.side], len(boards) // 2
        side = _side(boards[: middle + 1], ways)
        back = _find(boards[-1], moved)
        if back is None:
            return Score(False, None, None, "the object is not there at the end")
        did: Return = (side or "nowhere", *back)
        if not kept(boards[middle], true[middle], np.ones((SQUARES, SQUARES), dtype=bool)):
            return Score(False, did, None, "the object is not gone in the middle of the clip")
        if side != puzzle.side:
            return Score(False, did, None, f"goes by the {side} side" if side else "goes nowhere")
        if back != (moved.row, moved.column):
            return Score(False, did, None, "comes back to another place")
        if not kept(boards[-1], true[-1], np.ones((SQUARES, SQUARES), dtype=bool)):
            return Score(False, did, None, "another object changed")
        return Score(True, did, 0)

    @lru_cache(maxsize=512)  # noqa: B019 - there is one object of each task
    def _ways(self, puzzle: Scene, frames: int) -> dict[str, UInt8[np.ndarray, "frames 16 16"]]:
        """The video in which the object leaves by each side and comes back."""
        home = puzzle.things[0]
        return {side: self.draw(puzzle, (side, home.row, home.column), frames) for side in SIDES}


def _put(picture: UInt8[np.ndarray, "16 16"], thing: Thing) -> None:
    stamp(picture, SHAPES[thing.shape], thing.row, thing.column, OBJECT_COLOURS[thing.colour])


def _distance(thing: Thing, side: str) -> int:
    """Squares to move until the object is out of the frame."""
    return {"left": thing.column + 3, "right": SQUARES - thing.column, "top": thing.row + 3, "bottom": SQUARES - thing.row}[side]


def _band(thing: Thing, side: str) -> Bool[np.ndarray, "16 16"]:
    """The squares that the object or the screen sweeps between its place and the side."""
    swept = np.zeros((SQUARES, SQUARES), dtype=bool)
    y, x = thing.row, thing.column
    rows, columns = slice(y - 1, y + SCREEN - 1), slice(x - 1, x + SCREEN - 1)
    if side == "left":
        swept[rows, : x + SCREEN - 1] = True
    elif side == "right":
        swept[rows, x - 1 :] = True
    elif side == "top":
        swept[: y + SCREEN - 1, columns] = True
    else:
        swept[y - 1 :, columns] = True
    return swept


def _screen(picture: UInt8[np.ndarray, "16 16"], thing: Thing, side: str, share: float) -> None:
    """Cover a share of the band between the side and the object, from the side on."""
    band = _band(thing, side)
    dy, dx = SIDES[side]
    depth = np.indices(band.shape)[0 if dy else 1]
    depth = depth if dy + dx < 0 else SQUARES - 1 - depth
    length = 1 + depth[band].max()
    picture[band & (depth < round(share * length))] = Colour.GREY


def _clear(scene: Scene) -> bool:
    """Whether no two things touch and nothing else is in the way of what moves."""
    moved, others = scene.things[0], scene.things[1:]
    band = _band(moved, scene.side)
    if any(band[o.row : o.row + 3, o.column : o.column + 3].any() for o in others):
        return False
    pairs = [(a, b) for i, a in enumerate(scene.things) for b in scene.things[:i]]
    return all(max(abs(a.row - b.row), abs(a.column - b.column)) >= 4 for a, b in pairs)


def _find(picture: UInt8[np.ndarray, "16 16"], thing: Thing) -> tuple[int, int] | None:
    """Row and column at which the thing's 3 x 3 picture is seen, but for one square; None if nowhere."""
    windows = np.lib.stride_tricks.sliding_window_view(picture == OBJECT_COLOURS[thing.colour], (3, 3))
    wrong = (windows != SHAPES[thing.shape]).sum(axis=(-1, -2))
    best = np.unravel_index(wrong.argmin(), wrong.shape)
    return (int(best[0]), int(best[1])) if wrong[best] <= 1 else None


def _mirrored(things: tuple[Thing, ...], rows: bool, columns: bool) -> list[Thing]:
    last = SQUARES - 3
    flipped = [
        Thing(t.colour, t.shape, last - t.row if rows else t.row, last - t.column if columns else t.column) for t in things
    ]
    return [flipped[0], *sorted(flipped[1:], key=repr)]


def _mirrored_side(side: str, rows: bool, columns: bool) -> str:
    vertical = {"top": "bottom", "bottom": "top"} if rows else {}
    horizontal = {"left": "right", "right": "left"} if columns else {}
    return {**vertical, **horizontal}.get(side, side)


def _side(boards: UInt8[np.ndarray, "half 16 16"], ways: dict[str, UInt8[np.ndarray, "frames 16 16"]]) -> str | None:
    """The side whose first half of a video is nearest to what is seen; None if nothing happening is nearer still."""
    wrong = {side: int((boards != way[: len(boards)]).sum()) for side, way in ways.items()}
    best = min(wrong, key=lambda side: wrong[side])
    return best if wrong[best] < (boards != ways[best][0]).sum() else None
