"""Permanence: in the middle of the clip nothing shows where the object was, and it must come back there."""

from __future__ import annotations

import numpy as np
import pytest

from dit_lens.reasoner import board
from dit_lens.reasoner.board import OBJECT_COLOURS, Colour
from dit_lens.reasoner.tasks import TASKS, Sample
from dit_lens.reasoner.tasks.permanence import SIDES, Scene, Thing

TASK = TASKS["permanence"]


def samples() -> list[Sample]:
    return [TASK.sample("test", index) for index in range(20)]


def test_the_object_is_gone_in_the_middle_and_back_at_the_end() -> None:
    kinds = set()
    for sample in samples():
        middle, target = sample.boards[8], sample.masks["target"]
        thing = sample.puzzle.things[0]
        assert np.array_equal(sample.boards[-1], sample.boards[0])
        gone = middle[target & (sample.boards[0] == OBJECT_COLOURS[thing.colour])]
        assert set(gone.tolist()) == {Colour.GREY if sample.puzzle.hides else Colour.BLACK}
        assert (sample.boards[:, sample.masks["distractor"]] == sample.boards[0, sample.masks["distractor"]]).all()
        assert sample.puzzle.side in sample.prompt
        assert thing.colour in sample.prompt
        kinds.add(sample.puzzle.hides)
    assert kinds == {False, True}


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_mirrored_scene_is_the_same_puzzle(rows: bool, columns: bool) -> None:
    flips = {"top": "bottom", "bottom": "top"} if rows else {}
    flips |= {"left": "right", "right": "left"} if columns else {}
    for sample in samples():
        scene = sample.puzzle
        things = [
            Thing(t.colour, t.shape, 13 - t.row if rows else t.row, 13 - t.column if columns else t.column) for t in scene.things
        ]
        mirrored = Scene((things[0], *things[:0:-1]), str(flips.get(scene.side, scene.side)), scene.hides)
        assert TASK.canonical(mirrored) == TASK.canonical(scene)
        assert TASK.split(mirrored) == "test"
        assert TASK.canonical(Scene(scene.things, scene.side, not scene.hides)) != TASK.canonical(scene)


def test_what_is_wrong_is_said() -> None:
    for sample in samples()[:8]:
        scene, (side, row, column) = sample.puzzle, sample.answers[0]  # pyright: ignore[reportGeneralTypeIssues]

        def score(boards: np.ndarray, sample: Sample = sample) -> tuple[bool, str]:
            found = TASK.score(board.paint(boards) / 255, sample)
            return found.right, found.reason

        lost = sample.boards.copy()
        lost[-1] = lost[8]
        assert score(lost) == (False, "the object is not there at the end")
        still = np.repeat(sample.boards[:1], 17, axis=0)
        assert score(still)[1] in ("the object is not gone in the middle of the clip", "goes nowhere")
        repainted = sample.boards.copy()
        repainted[-1][sample.masks["background"]] = Colour.WHITE
        assert score(repainted) == (False, "another object changed")
        for other in set(SIDES) - {side}:
            boards = TASK.draw(scene, (other, row, column), 17)
            assert not score(boards)[0], "the prompt names the side"


def test_another_object_that_is_lost_is_seen() -> None:
    for sample in samples():
        boards = sample.boards.copy()
        boards[-1][sample.masks["distractor"]] = Colour.BLACK
        assert TASK.score(board.paint(boards) / 255, sample).reason == "another object changed"
