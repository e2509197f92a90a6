"""Bouncing: a ball flies diagonally through a box and is thrown back by its walls, leaving a trail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import SQUARES, Colour, blank, symmetries
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, progress

MOVES = 16
"""Squares that the ball moves in a clip, whatever its number of frames."""
SMALLEST = 6
"""Squares per side of the smallest box, without its walls."""

Square = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A box given by its first and last row and column inside the walls; a ball, and its direction in (rows, columns).

    The first frame shows the direction by a tail: the square that the ball comes from.
    """

    top: int
    left: int
    bottom: int
    right: int
    ball: Square
    direction: Square

    def flight(self, reflects: bool = True) -> tuple[Square, ...]:
        """The squares the ball visits, the first included. Without `reflects` it turns back the way it came."""
        (y, x), (dy, dx) = self.ball, self.direction
        visited = [(y, x)]
        for _ in range(MOVES):
            out_y, out_x = not self.top <= y + dy <= self.bottom, not self.left <= x + dx <= self.right
            if reflects:
                dy, dx = (-dy if out_y else dy), (-dx if out_x else dx)
            elif out_y or out_x:
                dy, dx = -dy, -dx
            y, x = y + dy, x + dx
            visited.append((y, x))
        return tuple(visited)


class BounceTask(Task):
    """One legal path."""

    name = "bounce"
    wordings = (
        "Predict where the ball will bounce.",
        "The yellow ball flies on and bounces off the walls.",
        "Show the path of the ball in the box.",
        "The ball keeps moving and is thrown back by the walls.",
    )

    def generate(self, random: np.random.Generator) -> Box:
        height, width = random.integers(SMALLEST, SQUARES - 1, size=2).tolist()
        top, left = int(random.integers(1, SQUARES - height)), int(random.integers(1, SQUARES - width))
        dy, dx = random.choice((-1, 1), size=2).tolist()
        # Not beside the wall it comes from, so that its tail is inside the box.
        y = top + int(random.integers(1, height - 1))
        x = left + int(random.integers(1, width - 1))
        return Box(top, left, top + height - 1, left + width - 1, (y, x), (dy, dx))

    def solve(self, puzzle: Box) -> tuple[Answer, ...]:
        return (puzzle.flight(),)

    def canonical(self, puzzle: Box) -> bytes:
        return min(s.tobytes() for s in symmetries(self._first(puzzle)))

    def _first(self, puzzle: Box) -> UInt8[np.ndarray, "16 16"]:
        picture = blank()
        picture[puzzle.top - 1 : puzzle.bottom + 2, puzzle.left - 1 : puzzle.right + 2] = Colour.GREY
        picture[puzzle.top : puzzle.bottom + 1, puzzle.left : puzzle.right + 1] = Colour.BLACK
        picture[puzzle.ball[0] - puzzle.direction[0], puzzle.ball[1] - puzzle.direction[1]] = Colour.RED
        picture[puzzle.ball] = Colour.YELLOW
        return picture

    def draw(self, puzzle: Box, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        flight: tuple[Square, ...] = answer  # pyright: ignore[reportAssignmentType]
        video = np.repeat(self._first(puzzle)[None], frames, axis=0)
        for picture, time in zip(video, progress(frames), strict=True):
            reached = round(time * (len(flight) - 1))
            for square in flight[:reached]:
                picture[square] = Colour.BLUE
            picture[flight[reached]] = Colour.YELLOW
        return video

    def masks(self, puzzle: Box) -> dict[str, Bool[np.ndarray, "16 16"]]:
        first = self._first(puzzle)
        agent = np.isin(first, (Colour.YELLOW, Colour.RED))
        path = np.zeros_like(agent)
        path[tuple(np.array(puzzle.flight()).T)] = True
        path &= ~agent
        wall = first == Colour.GREY
        return {"agent": agent, "answer": path, "wall": wall, "background": ~agent & ~path & ~wall}

    def wrong(self, puzzle: Box, random: np.random.Generator) -> Answer:
        """The ball turns back the way it came at the first wall; from a corner it flies into the wrong direction."""
        turned = puzzle.flight(reflects=False)
        if turned != puzzle.flight():
            return turned
        dy, dx = puzzle.direction
        return Box(puzzle.top, puzzle.left, puzzle.bottom, puzzle.right, puzzle.ball, (-dy, dx)).flight()

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """Where the ball is in every frame: right if it is where it should be in the last frame and in all but one in ten of the
        others, and the trail and the box are right at the end."""
        true = self.draw(sample.puzzle, sample.answers[0], len(boards))
        track = tuple(_only(picture == Colour.YELLOW) for picture in boards)
        expected = tuple(_only(picture == Colour.YELLOW) for picture in true)
        if track[-1] is None:
            return Score(False, None, None, "there is no ball, or more than one, at the end")
        missed = sum(a != b for a, b in zip(track, expected, strict=True))
        which = 0 if missed <= 0.1 * len(boards) else None
        did = sample.answers[0] if which == 0 else track
        if track[-1] != expected[-1]:
            return Score(False, did, None, "ends in another place")
        if which is None:
            return Score(False, did, None, f"off the path in {missed} of {len(boards)} frames")
        if not kept(boards[-1], true[-1], np.ones((SQUARES, SQUARES), dtype=bool)):
            return Score(False, did, 0, "the trail or the box is wrong")
        return Score(True, did, 0)


def _only(mask: Bool[np.ndarray, "16 16"]) -> Square | None:
    """The one square of a mask; None if it has none or several."""
    squares = np.argwhere(mask)
    return (int(squares[0, 0]), int(squares[0, 1])) if len(squares) == 1 else None
