"""Tic-tac-toe: place one mark that completes a line. Boards have one, two or three squares that win."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import SQUARES, Colour, blank, stamp
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, reveal

CELL = 5
"""Squares from one cell to the next: four of the cell and one of the grid line before it."""

GLYPHS: dict[str, Bool[np.ndarray, "4 4"]] = {
    "X": np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=bool),
    "O": np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]], dtype=bool),
}
COLOURS = {"X": (Colour.YELLOW, Colour.RED, Colour.WHITE), "O": (Colour.CYAN, Colour.BLUE, Colour.PURPLE)}
"""Colours that a player's marks can have."""
LINES = tuple([(3 * i, 3 * i + 1, 3 * i + 2) for i in range(3)] + [(i, i + 3, i + 6) for i in range(3)] + [(0, 4, 8), (2, 4, 6)])


@dataclass(frozen=True)
class Position:
    """Nine cells in reading order ("X", "O" or " "), who is to move, and which of its colours each player has."""

    cells: tuple[str, ...]
    player: str
    colours: tuple[int, int] = (0, 0)

    def colour(self, mark: str) -> Colour:
        """The colour of a player's marks on this board."""
        return COLOURS[mark][self.colours["XO".index(mark)]]


def winners(position: Position) -> tuple[int, ...]:
    """The empty cells that complete a line of the player."""
    found = []
    for cell in range(9):
        if position.cells[cell] == " ":
            after = [*position.cells]
            after[cell] = position.player
            if any(all(after[i] == position.player for i in line) for line in LINES):
                found.append(cell)
    return tuple(found)


@cache
def positions() -> dict[int, tuple[Position, ...]]:
    """Every undecided position with a winning move, by the number of winning cells (1, 2 or 3)."""
    found: dict[int, list[Position]] = {1: [], 2: [], 3: []}
    for cells in itertools.product(" XO", repeat=9):
        if abs(cells.count("X") - cells.count("O")) > 1:
            continue
        if any(cells[a] != " " and cells[a] == cells[b] == cells[c] for a, b, c in LINES):
            continue
        for player in "XO":
            position = Position(cells, player)
            if count := len(winners(position)):
                found[min(count, 3)].append(position)
    return {count: tuple(each) for count, each in found.items()}


class TicTacToeTask(Task):
    """One mark wins; where several would, each is legal."""

    name = "tictactoe"
    wordings = (
        "{player} moves and wins the game.",
        "Place an {player} that completes three in a row.",
        "Tic-tac-toe: mark a winning square for {player}.",
        "It is {player}'s turn. Make the winning move.",
    )

    def generate(self, random: np.random.Generator) -> Position:
        of = positions()
        group = of[int(random.choice((1, 1, 2, 2, 3)))]
        x, o = (int(random.integers(len(COLOURS[mark]))) for mark in "XO")
        return replace(group[random.integers(len(group))], colours=(x, o))

    def solve(self, puzzle: Position) -> tuple[Answer, ...]:
        return winners(puzzle)

    def counterparts(self, puzzle: Position) -> list[Position]:
        """The same board with the other player to move, if it can win elsewhere: only the prompt differs."""
        other = replace(puzzle, player="O" if puzzle.player == "X" else "X")
        theirs = set(winners(other))
        return [other] if theirs and not theirs & set(winners(puzzle)) else []

    def words(self, puzzle: Position) -> dict[str, str]:
        return {"player": puzzle.player}

    def vocabulary(self) -> list[dict[str, str]]:
        return [{"player": p} for p in GLYPHS]

    def canonical(self, puzzle: Position) -> bytes:
        # Swapping the players is a symmetry too: the player to move becomes "X". Colours make no other puzzle.
        swap = str.maketrans("XO", "XO" if puzzle.player == "X" else "OX")
        cells = np.array([c.translate(swap) for c in puzzle.cells]).reshape(3, 3)
        turned = [np.rot90(cells, k) for k in range(4)]
        return min("".join(t.ravel()) for t in turned + [t.T for t in turned]).encode()

    def _first(self, puzzle: Position) -> UInt8[np.ndarray, "16 16"]:
        picture = blank()
        picture[CELL : 3 * CELL : CELL, 1 : SQUARES - 1] = Colour.GREY
        picture[1 : SQUARES - 1, CELL : 3 * CELL : CELL] = Colour.GREY
        for cell, mark in enumerate(puzzle.cells):
            if mark != " ":
                stamp(picture, GLYPHS[mark], *corner(cell), puzzle.colour(mark))
        return picture

    def draw(self, puzzle: Position, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        cell: int = answer  # pyright: ignore[reportAssignmentType]
        row, column = corner(cell)
        colour = puzzle.colour(puzzle.player)
        stroke = [(row + y, column + x, int(colour)) for y, x in np.argwhere(GLYPHS[puzzle.player]).tolist()]
        return reveal(self._first(puzzle), [stroke], frames)

    def masks(self, puzzle: Position) -> dict[str, Bool[np.ndarray, "16 16"]]:
        first = self._first(puzzle)
        answer = np.zeros((SQUARES, SQUARES), dtype=bool)
        for cell in winners(puzzle):
            row, column = corner(cell)
            answer[row : row + 4, column : column + 4] = True
        return {
            "x": first == puzzle.colour("X"),
            "o": first == puzzle.colour("O"),
            "grid": first == Colour.GREY,
            "answer": answer,
            "background": (first == Colour.BLACK) & ~answer,
        }

    def wrong(self, puzzle: Position, random: np.random.Generator) -> Answer:
        """A mark on an empty cell that does not win, or over another mark on a board where every empty cell wins."""
        legal = winners(puzzle)
        cells = [i for i, c in enumerate(puzzle.cells) if c == " " and i not in legal]
        cells = cells or [i for i, c in enumerate(puzzle.cells) if c not in (" ", puzzle.player)]
        return int(random.choice(cells))

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """The cells whose picture in the last frame is not the first frame's: right if it is one, with the player's mark, and it
        wins."""
        last, puzzle = boards[-1], sample.puzzle
        first = self._first(puzzle)
        changed = [cell for cell in range(9) if (_cell(last, cell) != _cell(first, cell)).sum() >= 2]
        if not changed:
            return Score(False, None, None, "no mark was made")
        if len(changed) > 1:
            return Score(False, tuple(changed), None, f"{len(changed)} cells changed")
        cell = changed[0]
        mark = np.where(GLYPHS[puzzle.player], puzzle.colour(puzzle.player), Colour.BLACK)
        if (_cell(last, cell) != mark).sum() > 1:
            return Score(False, cell, None, f"the mark is no {puzzle.player}")
        if cell not in sample.answers:
            return Score(False, cell, None, "the mark does not win")
        if not kept(last, self.draw(puzzle, cell, 5)[-1], np.ones_like(first, dtype=bool)):
            return Score(False, cell, None, "the board changed")
        return Score(True, cell, sample.answers.index(cell))


def corner(cell: int) -> tuple[int, int]:
    """Row and column of a cell's top left square."""
    row, column = divmod(cell, 3)
    return CELL * row + 1, CELL * column + 1


def _cell(picture: UInt8[np.ndarray, "16 16"], cell: int) -> UInt8[np.ndarray, "4 4"]:
    row, column = corner(cell)
    return picture[row : row + 4, column : column + 4]
