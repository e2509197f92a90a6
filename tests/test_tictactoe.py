"""Tic-tac-toe: the winning squares are found by trying, and who plays which mark makes no other puzzle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_lens.reasoner import board
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.tasks import TASKS
from dit_lens.reasoner.tasks.tictactoe import Position, positions, winners

TASK = TASKS["tictactoe"]


def won(cells: np.ndarray, player: str) -> bool:
    """Whether a row, a column or a diagonal of a 3 x 3 board is the player's."""
    own = cells == player
    return bool(own.all(0).any() or own.all(1).any() or own.diagonal().all() or own[:, ::-1].diagonal().all())


def test_winners_are_the_squares_that_win() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        position = TASK.generate(random)
        before = np.array(position.cells).reshape(3, 3)
        assert not won(before, "X")
        assert not won(before, "O")
        found = []
        for cell in range(9):
            after = before.copy()
            after.flat[cell] = position.player
            if before.flat[cell] == " " and won(after, position.player):
                found.append(cell)
        assert winners(position) == tuple(found) == TASK.solve(position)
        assert found


def test_every_position_has_its_number_of_answers() -> None:
    for count, group in positions().items():
        assert {min(len(winners(position)), 3) for position in group[:100]} == {count}
    numbers = {len(TASK.sample("test", index).answers) for index in range(60)}
    assert {1, 2} <= numbers


@pytest.mark.parametrize("turn", range(8))
def test_turned_boards_and_swapped_players_are_the_same_puzzle(turn: int) -> None:
    for index in range(30):
        position: Position = TASK.sample("test", index).puzzle
        turned = board.symmetries(np.array(position.cells).reshape(3, 3))[turn].ravel().tolist()
        same = Position(tuple(turned), position.player)
        swapped = Position(tuple(" OX"[" XO".index(cell)] for cell in turned), "O" if position.player == "X" else "X")
        assert TASK.canonical(same) == TASK.canonical(swapped) == TASK.canonical(position)
        assert TASK.split(swapped) == "test"
        assert len(winners(swapped)) == len(winners(position))


def test_the_mark_is_the_players_and_the_only_change() -> None:
    sample = TASK.sample("test", 0)
    legal = sample.answers[0]
    other = replace(sample.puzzle, player="O" if sample.puzzle.player == "X" else "X")
    foreign = TASK.score(board.paint(TASK.draw(other, legal, 17)) / 255, sample)
    assert (foreign.right, foreign.reason) == (False, f"the mark is no {sample.puzzle.player}")
    boards = TASK.draw(sample.puzzle, legal, 17)
    boards[-1][sample.masks["grid"]] = Colour.BLACK
    assert TASK.score(board.paint(boards) / 255, sample).reason == "the board changed"
    empty = [cell for cell in range(9) if sample.puzzle.cells[cell] == " " and cell != legal]
    twice = np.where(TASK.draw(sample.puzzle, empty[0], 5)[-1] != sample.boards[0], TASK.draw(sample.puzzle, empty[0], 5)[-1], 0)
    boards = TASK.draw(sample.puzzle, legal, 17)
    boards[-1] = np.where(twice > 0, twice, boards[-1])
    score = TASK.score(board.paint(boards) / 255, sample)
    assert (score.right, score.which, score.reason) == (False, None, "2 cells changed")
