"""Mazes: a green agent walks to a red goal and leaves a blue trail.

`maze` has one legal route (a spanning tree of rooms). `maze-loops` has two or three shortest ones, of which the model may take
any. Rooms sit at odd coordinates, so that each token of 2 x 2 squares inside the maze holds exactly one room (its lower right
square) with that room's upper edge, left edge and corner pillar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import SQUARES, TOKEN, Colour, blank, symmetries
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, progress

Square = tuple[int, int]
SIZES = (3, 4, 5, 6, 7)
"""Rooms per side."""


@dataclass(frozen=True, eq=False)
class Maze:
    """A maze of `rooms` x `rooms` rooms; `open` are the squares one can walk on, start and goal included."""

    rooms: int
    open: Bool[np.ndarray, "16 16"]
    start: Square
    goal: Square

    @property
    def origin(self) -> int:
        """Row and column of the outer wall: even, so that rooms are at odd coordinates."""
        return TOKEN * ((SQUARES - (2 * self.rooms + 1)) // (2 * TOKEN))

    @cached_property
    def extent(self) -> Bool[np.ndarray, "16 16"]:
        """The squares of the maze, its outer wall included."""
        inside = np.zeros((SQUARES, SQUARES), dtype=bool)
        inside[self.origin : self.origin + 2 * self.rooms + 1, self.origin : self.origin + 2 * self.rooms + 1] = True
        return inside

    @cached_property
    def routes(self) -> tuple[tuple[Square, ...], ...]:
        """Every shortest route, from start to goal, square by square, in lexical order."""
        return tuple(sorted(tuple(path) for path in nx.all_shortest_paths(walkable(self.open), self.start, self.goal)))

    @cached_property
    def room_tokens(self) -> Bool[np.ndarray, "8 8"]:
        """The tokens that hold a room (as their lower right square)."""
        rooms = np.zeros((SQUARES // TOKEN, SQUARES // TOKEN), dtype=bool)
        first = self.origin // TOKEN
        rooms[first : first + self.rooms, first : first + self.rooms] = True
        return rooms

    @cached_property
    def route_tokens(self) -> Bool[np.ndarray, "routes 8 8"]:
        """For each legal route, the tokens whose room lies on it."""
        on = np.zeros((len(self.routes), SQUARES // TOKEN, SQUARES // TOKEN), dtype=bool)
        for mask, route in zip(on, self.routes, strict=True):
            for y, x in route:
                if y % TOKEN and x % TOKEN:
                    mask[y // TOKEN, x // TOKEN] = True
        return on


def walkable(squares: Bool[np.ndarray, "16 16"]) -> nx.Graph:
    """The graph of open squares, neighbours joined."""
    nodes = {(y, x) for y, x in np.argwhere(squares).tolist()}
    graph = nx.Graph()
    graph.add_nodes_from(sorted(nodes))
    graph.add_edges_from((s, n) for s in nodes for n in ((s[0] + 1, s[1]), (s[0], s[1] + 1)) if n in nodes)
    return graph


class MazeTask(Task):
    """One legal route."""

    name = "maze"
    wordings = (
        "Move the green agent through the maze to the red goal.",
        "Show the green agent walking from its start to the red square.",
        "Solve the maze: the green square goes to the red square without crossing a wall.",
        "The green agent finds its way to the red goal, leaving a blue trail.",
    )
    sizes = SIZES
    extra_openings = 0
    routes = (1, 1)

    def generate(self, random: np.random.Generator) -> Maze:
        while True:
            rooms = int(random.choice(self.sizes))
            maze = self._carve(rooms, random)
            if self.routes == (1, 1) or self.routes[0] <= len(maze.routes) <= self.routes[1]:
                return maze

    def _carve(self, rooms: int, random: np.random.Generator) -> Maze:
        """A random spanning tree of the rooms, grown from a random cell of its frontier or from the newest one.

        Mazes grown only from the newest cell are long corridors, from a random one short stubs; the mix is drawn per maze.
        """
        grid = nx.grid_2d_graph(rooms, rooms)
        newest = random.random()
        first = (int(random.integers(rooms)), int(random.integers(rooms)))
        seen, frontier, edges = {first}, [first], []
        while frontier:
            at = len(frontier) - 1 if random.random() < newest else int(random.integers(len(frontier)))
            room = frontier[at]
            choices = [n for n in grid[room] if n not in seen]
            if not choices:
                frontier.pop(at)
                continue
            neighbour = choices[random.integers(len(choices))]
            seen.add(neighbour)
            frontier.append(neighbour)
            edges.append((room, neighbour))
        if self.extra_openings:
            closed = [e for e in grid.edges if e not in set(edges) and e[::-1] not in set(edges)]
            count = min(len(closed), 1 + int(random.integers(self.extra_openings * rooms)))
            edges += [closed[i] for i in random.choice(len(closed), count, replace=False)]
        start, goal = self._ends(rooms, random)
        return _maze(rooms, edges, start, goal)

    def _ends(self, rooms: int, random: np.random.Generator) -> tuple[Square, Square]:
        """Two different rooms, more than one move apart."""
        while True:
            ends = random.integers(rooms, size=(2, 2))
            if np.abs(ends[0] - ends[1]).sum() >= 2:
                (a, b), (c, d) = ends.tolist()
                return (a, b), (c, d)

    def solve(self, puzzle: Maze) -> tuple[Answer, ...]:
        return puzzle.routes

    def counterparts(self, puzzle: Maze) -> list[Maze]:
        """The same maze with the goal in another room: only the goal differs."""
        rooms = [(y, x) for y, x in np.argwhere(puzzle.open).tolist() if y % 2 and x % 2]
        taken = {puzzle.start, puzzle.goal}
        near = [(puzzle.start[0] + dy, puzzle.start[1] + dx) for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2))]
        moved = [replace(puzzle, goal=room) for room in rooms if room not in taken and room not in near]
        low, high = self.routes
        return [maze for maze in moved if low <= len(maze.routes) <= high]

    def canonical(self, puzzle: Maze) -> bytes:
        # Without what surrounds it: most mazes are not centred on the board.
        inside = slice(puzzle.origin, puzzle.origin + 2 * puzzle.rooms + 1)
        return min(s.tobytes() for s in symmetries(self._first(puzzle)[inside, inside]))

    def _first(self, puzzle: Maze) -> UInt8[np.ndarray, "16 16"]:
        picture = blank()
        picture[puzzle.extent] = Colour.GREY
        picture[puzzle.open] = Colour.WHITE
        picture[puzzle.goal] = Colour.RED
        picture[puzzle.start] = Colour.GREEN
        return picture

    def draw(self, puzzle: Maze, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        route: tuple[Square, ...] = answer  # pyright: ignore[reportAssignmentType]
        video = np.repeat(self._first(puzzle)[None], frames, axis=0)
        for frame, time in enumerate(progress(frames)):
            reached = round(time * (len(route) - 1))
            for square in route[:reached]:
                video[frame][square] = Colour.BLUE
            video[frame][route[reached]] = Colour.GREEN
        return video

    def masks(self, puzzle: Maze) -> dict[str, Bool[np.ndarray, "16 16"]]:
        def of(*squares: Square) -> Bool[np.ndarray, "16 16"]:
            mask = np.zeros((SQUARES, SQUARES), dtype=bool)
            mask[tuple(np.array(squares).T)] = True
            return mask

        agent, goal = of(puzzle.start), of(puzzle.goal)
        route = of(*{square for r in puzzle.routes for square in r}) & ~agent & ~goal
        return {
            "agent": agent,
            "goal": goal,
            "route": route,
            "wall": puzzle.extent & ~puzzle.open,
            "open": puzzle.open & ~route & ~agent & ~goal,
            "background": ~puzzle.extent,
        }

    def wrong(self, puzzle: Maze, random: np.random.Generator) -> Answer:
        """A beeline to the goal through the walls, or a walk along open squares to another room."""
        if random.random() < 0.5:
            graph = walkable(puzzle.open)
            rooms = [s for s in graph if s[0] % 2 and s[1] % 2 and s not in (puzzle.start, puzzle.goal)]
            other = rooms[random.integers(len(rooms))]
            return tuple(nx.shortest_path(graph, puzzle.start, other))
        through = walkable(puzzle.extent)
        route = tuple(nx.shortest_path(through, puzzle.start, puzzle.goal))
        if route in puzzle.routes:  # the straight walk happens to be legal: stop one room short of the goal
            return route[:-2]
        return route

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """The trail in the last frame, walked from the start: legal if it is one of the shortest routes and the agent is at
        its end, on the goal, with the rest of the maze as it was."""
        maze: Maze = sample.puzzle
        last = boards[-1]
        painted = {(int(y), int(x)) for y, x in np.argwhere(last == Colour.BLUE)}
        agents = [(int(y), int(x)) for y, x in np.argwhere(last == Colour.GREEN)]
        if not painted:
            return Score(False, None, None, "no trail")
        if len(agents) != 1:
            return Score(False, None, None, f"{len(agents)} agents in the last frame")
        route = _walk(painted | set(agents), maze.start, agents[0])
        if route is None:
            return Score(False, None, None, "the trail is not one walk from the start to the agent")
        which = maze.routes.index(route) if route in maze.routes else None
        if not all(maze.open[s] for s in route):
            return Score(False, route, None, "crosses a wall")
        if route[-1] != maze.goal:
            return Score(False, route, None, "does not arrive")
        if which is None:
            return Score(False, route, None, "arrives by a longer route")
        elsewhere = np.ones((SQUARES, SQUARES), dtype=bool)
        elsewhere[tuple(np.array(route).T)] = False
        if not kept(last, self._first(maze), elsewhere):
            return Score(False, route, which, "the maze itself changed")
        return Score(True, route, which)


class MazeLoopsTask(MazeTask):
    """Two or three shortest routes, each of them legal."""

    name = "maze-loops"
    wordings = (
        "Move the green agent to the red goal along a shortest path.",
        "Several ways are equally short: the green agent takes one of them to the red square.",
        "Show the green agent walking a shortest route to the red goal.",
        "The green square reaches the red square in as few moves as possible.",
    )
    extra_openings = 2
    routes = (2, 3)


def _maze(rooms: int, edges: list[tuple[Square, Square]], start: Square, goal: Square) -> Maze:
    """The maze in squares, from openings between rooms."""
    origin = TOKEN * ((SQUARES - (2 * rooms + 1)) // (2 * TOKEN))

    def square(room: Square) -> Square:
        return origin + 1 + 2 * room[0], origin + 1 + 2 * room[1]

    squares = np.zeros((SQUARES, SQUARES), dtype=bool)
    for a, b in edges:
        (y, x), (v, u) = square(a), square(b)
        squares[min(y, v) : max(y, v) + 1, min(x, u) : max(x, u) + 1] = True
    return Maze(rooms, squares, square(start), square(goal))


def _walk(squares: set[Square], start: Square, end: Square) -> tuple[Square, ...] | None:
    """The squares as one walk from start to end that visits each once and touches itself nowhere else; None if they are not."""
    if start not in squares or end not in squares:
        return None
    route, left = [start], squares - {start}
    while left:
        y, x = route[-1]
        following = [n for n in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if n in left]
        if len(following) != 1:
            return None
        route.append(following[0])
        left = left - {following[0]}
    return tuple(route) if route[-1] == end else None
