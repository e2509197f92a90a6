"""Mazes: every shortest route is known, and what is wrong with a walk is said."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens.reasoner import board
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.tasks import TASKS, Sample, Score
from dit_lens.reasoner.tasks.maze import Maze, Square

seeds = st.integers(0, 2**32 - 1)


def walks(maze: Maze, at: Square, seen: tuple[Square, ...] = ()) -> Iterator[tuple[Square, ...]]:
    """Every walk along open squares to the goal that visits no square twice."""
    seen = (*seen, at)
    if at == maze.goal:
        yield seen
        return
    for y, x in ((at[0] - 1, at[1]), (at[0] + 1, at[1]), (at[0], at[1] - 1), (at[0], at[1] + 1)):
        if maze.open[y, x] and (y, x) not in seen:
            yield from walks(maze, (y, x), seen)


def small(name: str, seed: int) -> Maze:
    """A maze of at most four rooms a side."""
    random = np.random.default_rng(seed)
    while True:
        maze = TASKS[name].generate(random)
        if maze.rooms <= 4:
            return maze


@pytest.mark.parametrize("name", ["maze", "maze-loops"])
@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_routes_are_all_the_shortest_walks(name: str, seed: int) -> None:
    maze = small(name, seed)
    every = sorted(walks(maze, maze.start))
    shortest = min(len(walk) for walk in every)
    assert TASKS[name].solve(maze) == tuple(walk for walk in every if len(walk) == shortest)
    if name == "maze":
        assert len(every) == 1, "one way only"
    else:
        assert 2 <= len(maze.routes) <= 3


@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_rooms_sit_in_tokens_of_their_own(seed: int) -> None:
    maze = TASKS["maze"].generate(np.random.default_rng(seed))
    rooms = maze.open[1::2, 1::2]
    assert np.array_equal(rooms, maze.room_tokens)
    assert rooms.sum() == maze.rooms**2
    assert maze.open.sum() == 2 * maze.rooms**2 - 1, "a spanning tree has one opening less than rooms"
    for route, tokens in zip(maze.routes, maze.route_tokens, strict=True):
        assert tokens.sum() == (len(route) + 1) / 2
        assert tokens[maze.start[0] // 2, maze.start[1] // 2]
        assert tokens[maze.goal[0] // 2, maze.goal[1] // 2]


def moved(maze: Maze, turn: int) -> Maze:
    """The maze turned by quarters, and mirrored too from the fourth turn on, drawn where the generator draws mazes."""
    inside = slice(maze.origin, maze.origin + 2 * maze.rooms + 1)

    def of(squares: np.ndarray) -> np.ndarray:
        result = np.zeros_like(squares)
        result[inside, inside] = board.symmetries(squares[inside, inside])[turn]
        return result

    def place(square: Square) -> Square:
        mask = np.zeros((16, 16), dtype=bool)
        mask[square] = True
        row, column = np.argwhere(of(mask))[0].tolist()
        return row, column

    return Maze(maze.rooms, of(maze.open), place(maze.start), place(maze.goal))


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("name", ["maze", "maze-loops"])
def test_a_turned_maze_is_the_same_maze(name: str, turn: int) -> None:
    task = TASKS[name]
    for index in range(4):
        maze = task.sample("test", index).puzzle
        assert task.canonical(moved(maze, turn)) == task.canonical(maze)
        other = Maze(maze.rooms, maze.open, maze.goal, maze.start)
        assert task.canonical(other) != task.canonical(maze), "the way back is another maze"


def judged(sample: Sample, last: np.ndarray) -> Score:
    """The score of a video that ends in a board."""
    boards = sample.boards.copy()
    boards[-1] = last
    return sample.task.score(board.paint(boards) / 255, sample)


def painted(sample: Sample, route: list[Square]) -> np.ndarray:
    """The last frame after a walk."""
    return sample.task.draw(sample.puzzle, tuple(route), 5)[-1]


def test_what_is_wrong_is_said() -> None:
    sample = TASKS["maze"].sample("test", 0)
    maze, route, last = sample.puzzle, list(sample.answers[0]), sample.boards[-1]  # pyright: ignore[reportArgumentType]
    assert judged(sample, last).right
    assert judged(sample, sample.boards[0]).reason == "no trail"
    two = last.copy()
    two[0, 0] = Colour.GREEN
    assert judged(sample, two).reason == "2 agents in the last frame"
    none = last.copy()
    none[route[-1]] = Colour.RED
    assert judged(sample, none).reason == "0 agents in the last frame"
    gap = last.copy()
    gap[route[1]] = Colour.WHITE
    assert judged(sample, gap).reason == "the trail is not one walk from the start to the agent"
    short = judged(sample, painted(sample, route[:-2]))
    assert (short.right, short.answer, short.reason) == (False, tuple(route[:-2]), "does not arrive")
    rebuilt = last.copy()
    rebuilt[sample.masks["wall"]] = Colour.WHITE
    changed = judged(sample, rebuilt)
    assert (changed.right, changed.answer, changed.which) == (False, tuple(route), 0)
    assert changed.reason == "the maze itself changed"
    wall = next(square for square in map(tuple, np.argwhere(sample.masks["wall"])) if abs(square[0] - maze.start[0]) == 1)
    assert not maze.open[wall]


def test_a_longer_way_arrives_and_is_not_right() -> None:
    for index in range(20):
        sample = TASKS["maze-loops"].sample("test", index)
        if sample.puzzle.rooms > 4:
            continue
        longer = [walk for walk in walks(sample.puzzle, sample.puzzle.start) if walk not in sample.answers]
        for walk in longer[:3]:
            score = judged(sample, painted(sample, list(walk)))
            if score.answer is not None:  # a walk that touches itself cannot be told from its squares
                assert (score.right, score.answer, score.reason) == (False, walk, "arrives by a longer route")
                return
    pytest.fail("no maze with a longer way was found")


def test_a_beeline_crosses_a_wall() -> None:
    random, reasons = np.random.default_rng(0), set()
    for index in range(20):
        sample = TASKS["maze"].sample("test", index)
        wrong = sample.task.wrong(sample.puzzle, random)
        reasons.add(judged(sample, sample.task.draw(sample.puzzle, wrong, 5)[-1]).reason)
    assert reasons == {"crosses a wall", "does not arrive"}
