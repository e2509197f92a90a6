"""Baselines: what is known of a token of a maze without a model, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dit_lens import reasoner
from dit_lens.reasoner.tasks.maze import SIZES, walkable
from probes.baselines import latents, place, situation, timestep

MAZES = [reasoner.task("maze").sample("test", index) for index in range(6)]


def test_a_place_is_one_of_64() -> None:
    found = place(MAZES[:2])
    assert found.shape == (128, 64)
    assert (found[:64] == np.eye(64)).all()
    assert (found[64:] == found[:64]).all()


@pytest.mark.parametrize("sample", MAZES, ids=lambda sample: str(sample.index))
def test_the_situation_of_a_room(sample: object) -> None:
    maze = sample.puzzle  # pyright: ignore[reportAttributeAccessIssue]
    found = situation([sample])[:, 64:].reshape(8, 8, -1)
    size, sides, distances = found[..., : len(SIZES)], found[..., len(SIZES) : -3], found[..., -3:]
    assert not found[~maze.room_tokens].any()
    assert (size[maze.room_tokens].argmax(-1) == SIZES.index(maze.rooms)).all()
    graph = walkable(maze.open)
    for y, x in np.argwhere(maze.room_tokens).tolist():
        square = (2 * y + 1, 2 * x + 1)
        assert sides[y, x].argmax() == graph.degree[square]
        for value, (one, other) in zip(
            distances[y, x], ((square, maze.start), (square, maze.goal), (maze.start, maze.goal)), strict=True
        ):
            assert value == (abs(one[0] - other[0]) + abs(one[1] - other[1])) / 2


def test_the_latents_of_a_token_are_those_under_it() -> None:
    taken = np.arange(2 * 3 * 5 * 16 * 16).reshape(2, 3, 5, 16, 16)
    found = latents(taken.astype(float), None).reshape(2, 8, 8, 12)
    assert set(found[1, 2, 5]) == set(taken[1, :, 2, 4:6, 10:12].ravel())
    last = latents(taken.astype(float), -1).reshape(2, 8, 8, 12)
    assert set(last[0, 7, 0]) == set(taken[0, :, 4, 14:, :2].ravel())


def test_a_timestep_is_the_same_for_all() -> None:
    assert (timestep(MAZES[:2], 940.0) == 940).all()
    assert timestep(MAZES[:2], 940.0).shape == (128, 1)
