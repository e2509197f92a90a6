"""Patterns: every rule of period two or three that fits the row gives a legal continuation, and no other does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_lens.reasoner import board
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.tasks import TASKS
from dit_lens.reasoner.tasks.pattern import continuations, sequences

TASK: Any = TASKS["pattern"]


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=7))
def test_continuations_are_what_some_rule_gives(symbols: list[str]) -> None:
    units = [symbols[:period] for period in (2, 3)]
    repeated = [(unit * 5)[: len(symbols) + 1] for unit in units]
    assert continuations(tuple(symbols)) == tuple(sorted({each[-1] for each in repeated if each[:-1] == symbols}))


def test_known_rows() -> None:
    assert continuations(("a", "b", "a")) == ("a", "b")
    assert continuations(("a", "b", "a", "b")) == ("a",)
    assert continuations(("a", "b", "c", "a")) == ("b",)
    assert continuations(("a", "b", "c")) == ("a",)
    assert continuations(("a", "b", "b", "b")) == ()


@pytest.mark.parametrize("kind", ["size", "colour"])
def test_every_row_has_the_number_of_continuations_it_is_filed_under(kind: str) -> None:
    for count, rows in sequences(kind).items():
        assert rows
        assert {len(continuations(row)) for row in rows} == {count}
    assert not set(sequences(kind)[1]) & set(sequences(kind)[2])


def test_part_of_the_samples_have_two_answers() -> None:
    several = np.mean([len(TASK.sample("test", index).answers) == 2 for index in range(100)])
    assert 0.2 < several < 0.6


def test_the_height_of_the_row_makes_no_other_puzzle() -> None:
    puzzle = TASK.sample("test", 0).puzzle
    assert TASK.canonical(replace(puzzle, top=0)) == TASK.canonical(replace(puzzle, top=5))
    assert TASK.canonical(replace(puzzle, symbols=puzzle.symbols[1:])) != TASK.canonical(puzzle)


def test_the_row_must_stay() -> None:
    sample = TASK.sample("test", 1)
    boards = sample.boards.copy()
    boards[-1][sample.masks["sequence"]] = Colour.WHITE
    changed = TASK.score(board.paint(boards) / 255, sample)
    assert (changed.right, changed.answer, changed.reason) == (False, sample.answers[sample.shown], "the sequence changed")
    boards = sample.boards.copy()
    boards[-1][sample.masks["answer"]] = Colour.GREY
    nothing = TASK.score(board.paint(boards) / 255, sample)
    assert (nothing.right, nothing.answer, nothing.which) == (False, None, None)


def test_an_object_of_the_row_that_is_lost_is_seen() -> None:
    for sample in (TASK.sample("test", index) for index in range(10)):
        boards = sample.boards.copy()
        boards[-1][sample.puzzle.top : sample.puzzle.top + 3, :3] = Colour.BLACK
        assert TASK.score(board.paint(boards) / 255, sample).reason == "the sequence changed"


def test_the_alphabet_has_every_answer_and_more() -> None:
    for sample in (TASK.sample("test", index) for index in range(10)):
        alphabet = TASK.alphabet(sample.puzzle)
        assert {*sample.answers, TASK.wrong(sample.puzzle, np.random.default_rng(0))} <= set(alphabet)
        assert len({sample.ends([symbol]).tobytes() for symbol in alphabet}) == len(alphabet)
