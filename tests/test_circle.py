"""Circling: the prompt decides which objects are meant, and only closed rings count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_lens.reasoner import board
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.tasks import TASKS, Sample
from dit_lens.reasoner.tasks.circle import Objects, ring

TASK = TASKS["circle"]


def samples() -> list[Sample]:
    return [TASK.sample("test", index) for index in range(20)]


def test_the_targets_are_all_objects_of_the_named_kind() -> None:
    for sample in samples():
        items, (colour, shape) = sample.puzzle.items, sample.puzzle.target
        assert sample.answers == (frozenset(slot for slot in range(9) if items[slot] == (colour, shape)),)
        assert colour in sample.prompt
        assert shape in sample.prompt
        others = [item for item in items if item not in (None, sample.puzzle.target)]
        assert any(item[0] == colour for item in others), "colour alone does not tell"
        assert any(item[1] == shape for item in others), "shape alone does not tell"
        assert len({item is None for item in items}) == 2 or None not in items


def test_another_word_asks_for_other_rings() -> None:
    for sample in samples():
        other = next(item for item in sample.puzzle.items if item not in (None, sample.puzzle.target))
        asked = replace(sample.puzzle, target=other)
        assert not TASK.solve(asked)[0] & sample.answers[0]  # pyright: ignore[reportOperatorIssue]
        assert np.array_equal(TASK.draw(asked, TASK.solve(asked)[0], 5)[0], sample.boards[0]), "the picture is the same"
        assert TASK.canonical(asked) != TASK.canonical(sample.puzzle)


@pytest.mark.parametrize("turn", range(8))
def test_turning_the_slots_makes_no_other_puzzle(turn: int) -> None:
    order = board.symmetries(np.arange(9).reshape(3, 3))[turn].ravel()
    for sample in samples():
        puzzle = sample.puzzle
        turned = Objects(tuple(puzzle.items[slot] for slot in order), puzzle.target)
        assert TASK.canonical(turned) == TASK.canonical(puzzle)
        assert TASK.split(turned) == "test"


def test_rings_touch_no_object_and_no_other_ring() -> None:
    rings = [set(ring(slot)) for slot in range(9)]
    assert {len(each) for each in rings} == {12}
    for first in range(9):
        row, column = (5 * place + 1 for place in divmod(first, 3))
        slot = {(row + y, column + x) for y in range(3) for x in range(3)}
        assert not any(slot & other for other in rings)


def test_a_ring_must_be_closed() -> None:
    sample = TASK.sample("test", 0)
    square = ring(min(sample.answers[0]))  # pyright: ignore[reportArgumentType]

    def score(*gone: tuple[int, int]) -> str:
        boards = sample.boards.copy()
        for place in gone:
            boards[-1][place] = Colour.BLACK
        return TASK.score(board.paint(boards) / 255, sample).reason

    assert score() == ""
    assert score(*square) in ("nothing is circled", "circles the wrong objects")
    assert score(*square[:6]) in ("nothing is circled", "a ring is not closed")
    boards = sample.boards.copy()
    boards[-1][sample.masks["distractor"]] = Colour.WHITE
    changed = TASK.score(board.paint(boards) / 255, sample)
    assert (changed.right, changed.answer, changed.reason) == (False, sample.answers[0], "the objects changed")


def test_every_kind_can_be_asked_for() -> None:
    assert len(TASK.prompts()) == 4 * 5 * 4
