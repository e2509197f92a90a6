"""Bouncing: the flight is that of light between mirrors, and the ball is followed in every frame."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens.reasoner import board
from dit_lens.reasoner.tasks import TASKS
from dit_lens.reasoner.tasks.bounce import MOVES, Box

TASK = TASKS["bounce"]
seeds = st.integers(0, 2**32 - 1)


def folded(start: int, direction: int, low: int, high: int) -> list[int]:
    """One coordinate of the flight, unfolded into a straight line and folded back."""
    period = 2 * (high - low)
    line = (start - low + direction * np.arange(MOVES + 1)) % period
    return (low + np.minimum(line, period - line)).tolist()


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_the_flight_is_a_folded_straight_line(seed: int) -> None:
    box = TASK.generate(np.random.default_rng(seed))
    rows = folded(box.ball[0], box.direction[0], box.top, box.bottom)
    columns = folded(box.ball[1], box.direction[1], box.left, box.right)
    assert box.flight() == tuple(zip(rows, columns, strict=True))
    tail = (box.ball[0] - box.direction[0], box.ball[1] - box.direction[1])
    assert box.top <= tail[0] <= box.bottom
    assert box.left <= tail[1] <= box.right


def test_a_known_flight() -> None:
    box = Box(top=1, left=1, bottom=6, right=6, ball=(4, 2), direction=(1, 1))
    assert box.flight()[:7] == ((4, 2), (5, 3), (6, 4), (5, 5), (4, 6), (3, 5), (2, 4))
    assert box.flight(reflects=False)[:5] == ((4, 2), (5, 3), (6, 4), (5, 3), (4, 2))


@pytest.mark.parametrize("turn", range(8))
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_a_turned_box_is_the_same_puzzle(turn: int, seed: int) -> None:
    box = TASK.generate(np.random.default_rng(seed))

    def mark(*square: int) -> np.ndarray:
        mask = np.zeros((16, 16), dtype=bool)
        mask[square] = True
        return np.argwhere(board.symmetries(mask)[turn])[0]

    corners = np.stack([mark(box.top, box.left), mark(box.bottom, box.right)])
    (top, left), (bottom, right) = corners.min(0).tolist(), corners.max(0).tolist()
    ball, tail = mark(*box.ball), mark(box.ball[0] - box.direction[0], box.ball[1] - box.direction[1])
    turned = Box(top, left, bottom, right, tuple(ball.tolist()), tuple((ball - tail).tolist()))
    assert TASK.canonical(turned) == TASK.canonical(box)


def test_a_ball_that_jumps_to_the_end_is_off_its_path() -> None:
    sample = TASK.sample("test", 0)
    boards = sample.boards.copy()
    boards[1:-1] = boards[0]
    score = TASK.score(board.paint(boards) / 255, sample)
    assert not score.right
    assert score.which is None
    assert score.reason.startswith("off the path in")
    boards = sample.boards.copy()
    boards[3] = boards[4]
    assert TASK.score(board.paint(boards) / 255, sample).right, "one frame may slip"
    boards[-1][boards[-1] == board.Colour.BLUE] = board.Colour.BLACK
    assert TASK.score(board.paint(boards) / 255, sample).reason == "the trail or the box is wrong"
