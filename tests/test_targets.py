"""Targets: labels on tokens, against the puzzles they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from dit_lens import reasoner
from dit_lens.reasoner import vbvr
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.tasks.maze import walkable
from probes.targets import ALL, MOVES, TARGETS, Drawn, Target, headlines, main_colour, questions, targets, written

BY_NAME = {target.name: target for target in TARGETS}


def faithful(sample: Any) -> Drawn:
    """What a model draws that does what the true video shows."""
    return Drawn(sample.boards[-1], sample.shown, np.arange(8 * 64, dtype=float).reshape(8, 8, 8))


def samples(name: str, count: int = 12) -> list[Any]:
    return [reasoner.task(name).sample("test", index) for index in range(count)]


@pytest.mark.parametrize("name", ALL)
def test_every_target_has_labels_to_tell_apart_in_its_tasks(name: str) -> None:
    found = samples(name, 24)
    for target in targets(name):
        (question,) = questions([target], found, [faithful(sample) for sample in found])
        assert len(question.values) == 24 * 64
        assert len(np.unique(np.asarray(question.values)[question.asked])) >= 2, target.name
        if target.kind == "binary":
            assert set(np.unique(np.asarray(question.values)[question.asked])) == {0, 1}
    assert {target.content for target in targets(name)} == {"perceptual", "reasoning", "consolidation"}


def test_of_a_folder_only_what_its_videos_show_is_asked(tmp_path: Path) -> None:
    mazes = samples("maze", 6)
    vbvr.write(mazes, tmp_path / "mazes")
    task = reasoner.task(str(tmp_path / "mazes"))
    found = [task.sample("test", number) for number in range(6)]
    asked = targets(task.name)
    assert [target.name for target in asked] == ["colour", "to change", "final colour", "painted"]
    assert set(headlines(task.name)) < {target.name for target in asked}
    drawn = [faithful(sample) for sample in mazes]
    change, painted = (questions([BY_NAME[name]], found, drawn)[0].values for name in ("to change", "painted"))
    (route,) = questions([BY_NAME["route"]], mazes, drawn)
    # What changes is what a faithful model paints; of the rooms that a puzzle knows, those on the route.
    assert np.array_equal(change, painted)
    assert np.array_equal(np.asarray(change)[route.asked], np.asarray(route.values)[route.asked])


def test_the_route_is_walked_by_its_next_moves() -> None:
    for sample in samples("maze"):
        maze, drawn = sample.puzzle, faithful(sample)
        move, route, distance = (BY_NAME[name].labels(sample, drawn) for name in ("next move", "route", "distance"))
        at = np.array(maze.start)
        walked = []
        while tuple(at) != maze.goal:
            token = tuple(at // 2)
            walked.append(token)
            to_go = nx.shortest_path_length(walkable(maze.open), tuple(at.tolist()), maze.goal)
            assert distance[token] == to_go / 2
            at = at + 2 * np.array(MOVES[int(move[token])])
        on = {(int(y), int(x)) for y, x in np.argwhere(route == 1)}
        assert on == {(int(y), int(x)) for y, x in walked[1:]}
        assert np.isnan(route[~maze.room_tokens]).all()


def test_colours_and_choices_are_those_of_the_board() -> None:
    board = np.zeros((16, 16), dtype=np.uint8)
    board[0, 0] = Colour.RED
    board[0:2, 2:4] = [[Colour.BLUE, Colour.BLUE], [Colour.RED, Colour.BLACK]]
    assert main_colour(board)[0, :3].tolist() == [Colour.RED, Colour.BLUE, Colour.BLACK]
    for sample in samples("circle"):
        chosen = BY_NAME["chosen"].labels(sample, faithful(sample))
        assert np.isnan(chosen[main_colour(sample.boards[0]) == Colour.BLACK]).all()
        assert (chosen == 1).any()
        assert (chosen == 0).any()
    for sample in samples("tictactoe"):
        winning = BY_NAME["winning"].labels(sample, faithful(sample))
        painted = BY_NAME["painted"].labels(sample, faithful(sample))
        assert (winning[painted == 1] == 1).all()


def test_what_was_drawn_decides_the_consolidation_and_nothing_else() -> None:
    sample = samples("maze-loops")[0]
    true = faithful(sample)
    nothing = Drawn(sample.boards[0], None, true.latents)
    for target in targets("maze-loops"):
        same = np.array_equal(target.labels(sample, true), target.labels(sample, nothing), equal_nan=True)
        assert same == (target.content != "consolidation" and target.name != "which"), target.name
    assert np.isnan(BY_NAME["which"].labels(sample, nothing)).all()
    other = Drawn(true.board, 1 - sample.shown if len(sample.answers) == 2 else (sample.shown + 1) % len(sample.answers))
    first, second = (BY_NAME["which"].labels(sample, drawn) for drawn in (true, other))
    assert (first != second)[~np.isnan(first)].any()
    assert np.array_equal(written(3).labels(sample, true), np.arange(192, 256, dtype=float).reshape(8, 8))


def test_a_target_of_ones_own_is_one_function() -> None:
    found = samples("maze", 3)
    left = Target(
        "left half", "perceptual", "binary", ("maze",), "column", lambda sample, drawn: np.tile(np.arange(8) < 4, (8, 1)) * 1.0
    )
    (question,) = questions([left], found, [faithful(sample) for sample in found])
    assert np.asarray(question.values).reshape(3, 8, 8)[:, :, :4].all()
    assert question.asked.all()
