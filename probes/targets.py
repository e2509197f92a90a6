"""What probes ask: labels of every task on the tokens of its board, from what is seen to what is finally drawn.

A target is one function from a sample, and from what the model then drew, to labels on the token layout; yours is too:

    edge = Target("edge", "perceptual", "binary", ("maze",), "any square at the border", lambda sample, drawn: my_labels)

*Perceptual* targets are in the first frame, *reasoning* ones follow from it, *consolidation* is what the model itself finally
wrote, right or wrong. A token covers 2 x 2 squares of a board; how its label comes from theirs is the target's rule. Tokens
that are not asked hold nan: whoever knows the place of a wall should not score for that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from dit_lens.errors import InputError
from dit_lens.reasoner.board import SHAPES, SQUARES, TOKEN, Colour, tokens
from dit_lens.reasoner.tasks.maze import walkable
from dit_lens.reasoner.tasks.pattern import COLOURS, SIZES
from dit_lens.reasoner.tasks.tictactoe import corner
from probes.ridge import Kind, Question

Labels = Float[np.ndarray, "height width"]
"""A label for each token, nan where it is not asked."""
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Up, down, left, right: the classes of `next move`."""
MAZES = ("maze", "maze-loops")
ALL = (*MAZES, "circle", "tictactoe", "permanence", "pattern", "bounce")
FOLDER = "samples of a folder"
"""Stands for a task of which only the true videos are known."""
HEADLINES = {
    "maze": ("wall", "route", "painted"),
    "maze-loops": ("wall", "which", "painted"),
    "circle": ("shape", "chosen", "painted"),
    "tictactoe": ("colour", "winning", "which", "painted"),
    "permanence": ("shape", "hidden place", "final colour"),
    "pattern": ("colour", "next", "painted"),
    "bounce": ("wall", "flight", "painted"),
    FOLDER: ("colour", "to change", "painted"),
}
"""Targets that stand for what is perceived, concluded and written in a task."""
STAYS = tuple(task for task in ALL if task != "permanence")
"""Tasks in which what is drawn stays; in the other one all is as before at the end."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the model's own video showed.

    Attributes:
        board: the last frame as palette indices. which: the legal answer that it drew, or None.
        latents: the final latents of the last latent frame, averaged over each token.
    """

    board: UInt8[np.ndarray, "16 16"]
    which: int | None
    latents: Float[np.ndarray, "channels height width"] | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """One question about the tokens of a board.

    Attributes:
        name: what tables call it. content: what kind of content it stands for. kind: of label.
        tasks: the tasks that it can be asked of. rule: how a token's label follows from its squares, in words.
        labels: (sample, what was drawn) -> labels on the layout; nan where a token is not asked.
        frame: the latent frame whose tokens are read, negative from the end; None for the middle one.
    """

    name: str
    content: Literal["perceptual", "reasoning", "consolidation"]
    kind: Kind
    tasks: tuple[str, ...]
    rule: str
    labels: Callable[[Any, Drawn], Labels]
    frame: int | None = -1


def questions(targets: Sequence[Target], samples: Sequence[Any], drawn: Sequence[Drawn]) -> list[Question]:
    """The targets as questions about the tokens of all samples: sample by sample, row by row.

    Raises:
        InputError: a target gives labels of another shape than that of the tokens, or infinite ones; it names the sample.
    """
    found = []
    for target in targets:
        parts = [np.asarray(target.labels(*pair), dtype=float) for pair in zip(samples, drawn, strict=True)]
        for sample, labels in zip(samples, parts, strict=True):
            about = f"the target {target.name!r} gives sample {sample.index} of {sample.task.name}"
            if labels.shape != (SQUARES // TOKEN,) * 2:
                raise InputError(f"{about} labels of shape {labels.shape}, and the tokens are 8 x 8: write one label for each")
            if np.isinf(labels).any():
                raise InputError(f"{about} infinite labels: write nan where a token is not asked")
        found.append(Question(target.name, target.kind, np.concatenate([labels.ravel() for labels in parts])))
    return found


def targets(task: str) -> list[Target]:
    """The targets of a task; of one that is not bundled, those of a folder."""
    return [target for target in TARGETS if (task if task in ALL else FOLDER) in target.tasks]


def headlines(task: str) -> tuple[str, ...]:
    """The headlines of a task; of one that is not bundled, those of a folder."""
    return HEADLINES[task if task in ALL else FOLDER]


def where(asked: Bool[np.ndarray, "height width"], labels: np.ndarray) -> Labels:
    """Labels where they are asked, nan elsewhere."""
    return np.where(asked, labels, np.nan).astype(float)


def squares_of(grid: np.ndarray) -> np.ndarray:
    """The squares of every token: (16, 16) to (8, 8, 4)."""
    return rearrange(grid, "(y py) (x px) -> y x (py px)", py=TOKEN, px=TOKEN)


def main_colour(board: UInt8[np.ndarray, "16 16"]) -> Int[np.ndarray, "8 8"]:
    """The colour that most squares of a token have, black only where all are black; of equally many the later in the palette."""
    squares = squares_of(board)
    counts = np.stack([(squares == colour).sum(-1) for colour in Colour], axis=-1)
    counts[..., Colour.BLACK] = np.where(counts[..., Colour.BLACK] == TOKEN**2, TOKEN**2, 0)
    return len(Colour) - 1 - counts[..., ::-1].argmax(-1)


def _anywhere() -> Bool[np.ndarray, "8 8"]:
    return np.ones((SQUARES // TOKEN, SQUARES // TOKEN), dtype=bool)


def _wall(sample: Any, drawn: Drawn) -> Labels:
    wall = tokens(sample.masks["wall"])
    if sample.task.name in MAZES:
        return where(sample.puzzle.room_tokens, wall >= 0.75)
    return where(_anywhere(), wall >= 0.5)


def _colour(sample: Any, drawn: Drawn) -> Labels:
    return where(_anywhere(), main_colour(sample.boards[0]))


def _objects(sample: Any) -> list[tuple[str, int, int]]:
    """Name of the shape, and the row and column of the top left square, of every object in the first frame."""
    if sample.task.name == "permanence":
        return [(thing.shape, thing.row, thing.column) for thing in sample.puzzle.things]
    return [(i[1], 5 * (slot // 3) + 1, 5 * (slot % 3) + 1) for slot, i in enumerate(sample.puzzle.items) if i is not None]


def _shape(sample: Any, drawn: Drawn) -> Labels:
    labels = np.full((SQUARES // TOKEN, SQUARES // TOKEN), np.nan)
    for shape, row, column in _objects(sample):
        box = np.zeros((SQUARES, SQUARES), dtype=bool)
        box[max(row, 0) : row + 3, max(column, 0) : column + 3] = True
        labels[tokens(box) > 0] = list(SHAPES).index(shape)
    return labels


def _rooms(sample: Any) -> Bool[np.ndarray, "8 8"]:
    """The rooms that are neither start nor goal, which lie on every route."""
    ends = np.zeros((SQUARES, SQUARES), dtype=bool)
    ends[sample.puzzle.start] = ends[sample.puzzle.goal] = True
    return sample.puzzle.room_tokens & (tokens(ends) == 0)


def _route(sample: Any, drawn: Drawn) -> Labels:
    return where(_rooms(sample), sample.puzzle.route_tokens.any(axis=0))


def _next_move(sample: Any, drawn: Drawn) -> Labels:
    labels = np.full((SQUARES // TOKEN, SQUARES // TOKEN), np.nan)
    for (y, x), (next_y, next_x) in itertools.pairwise(sample.answers[0]):
        if y % TOKEN and x % TOKEN:
            labels[y // TOKEN, x // TOKEN] = MOVES.index((next_y - y, next_x - x))
    return labels


def _distance(sample: Any, drawn: Drawn) -> Labels:
    labels = np.full((SQUARES // TOKEN, SQUARES // TOKEN), np.nan)
    lengths = nx.single_source_shortest_path_length(walkable(sample.puzzle.open), sample.puzzle.goal)
    for (y, x), length in lengths.items():
        if y % TOKEN and x % TOKEN:
            labels[y // TOKEN, x // TOKEN] = length / 2
    return labels


def _which(sample: Any, drawn: Drawn) -> Labels:
    painted = np.stack([tokens(mask) > 0 for mask in sample.answer_masks])
    contested = np.not_equal(painted.any(axis=0), painted.all(axis=0))
    if drawn.which is None:
        return np.full(contested.shape, np.nan)
    return where(contested, painted[drawn.which])


def _chosen(sample: Any, drawn: Drawn) -> Labels:
    target, other = (tokens(sample.masks[name]) > 0 for name in ("target", "distractor"))
    return where(np.not_equal(target, other), target)


def _winning(sample: Any, drawn: Drawn) -> Labels:
    empty = np.zeros((SQUARES, SQUARES), dtype=bool)
    for cell, mark in enumerate(sample.puzzle.cells):
        if mark == " ":
            row, column = corner(cell)
            empty[row : row + 4, column : column + 4] = True
    return where(tokens(empty) > 0, tokens(sample.masks["answer"]) > 0)


def _hidden_place(sample: Any, drawn: Drawn) -> Labels:
    return where(_anywhere(), tokens(sample.masks["target"]) > 0)


def _next(sample: Any, drawn: Drawn) -> Labels:
    names = [*SIZES, *COLOURS]
    (label,) = (names.index(a) for a in sample.answers) if len(sample.answers) == 1 else (np.nan,)
    return where(tokens(sample.masks["answer"]) > 0, np.full((SQUARES // TOKEN, SQUARES // TOKEN), label))


def _flight(sample: Any, drawn: Drawn) -> Labels:
    inside = (tokens(sample.masks["wall"]) < 1) & (tokens(sample.masks["agent"]) == 0)
    box = np.zeros((SQUARES, SQUARES), dtype=bool)
    box[sample.puzzle.top : sample.puzzle.bottom + 1, sample.puzzle.left : sample.puzzle.right + 1] = True
    return where(inside & (tokens(box) > 0), tokens(sample.masks["answer"]) > 0)


def _landing(sample: Any, drawn: Drawn) -> Labels:
    end = np.zeros((SQUARES, SQUARES), dtype=bool)
    end[sample.answers[0][-1]] = True
    return np.where(np.isnan(_flight(sample, drawn)), np.nan, tokens(end) > 0)


def _to_change(sample: Any, drawn: Drawn) -> Labels:
    return where(_anywhere(), tokens(sample.masks["answer"]) > 0)


def _final_colour(sample: Any, drawn: Drawn) -> Labels:
    return where(_anywhere(), main_colour(drawn.board))


def _painted(sample: Any, drawn: Drawn) -> Labels:
    return where(_anywhere(), tokens(drawn.board != sample.boards[0]) > 0)


def written(channel: int) -> Target:
    """The final latent of a token, one channel of it."""

    def labels(sample: Any, drawn: Drawn) -> Labels:
        assert drawn.latents is not None, "written() needs the latents in Drawn"
        return drawn.latents[channel].astype(float)

    return Target(f"latent {channel}", "consolidation", "number", ALL, "mean of the token's latents", labels)


TARGETS = (
    Target("wall", "perceptual", "binary", (*MAZES, "bounce"), "three of four squares (mazes, rooms only) or two", _wall),
    Target("colour", "perceptual", "classes", (*ALL, FOLDER), "most squares, black only where all are", _colour),
    Target("shape", "perceptual", "classes", ("circle", "permanence"), "any square of the object's 3 x 3", _shape),
    Target("route", "reasoning", "binary", MAZES, "the token's room is on a legal route", _route),
    Target("next move", "reasoning", "classes", ("maze",), "from the token's room on the route", _next_move),
    Target("distance", "reasoning", "number", MAZES, "rooms from the token's room to the goal, along corridors", _distance),
    Target("which", "reasoning", "binary", ("maze-loops", "tictactoe"), "in the drawn answer, of tokens in some", _which),
    Target("chosen", "reasoning", "binary", ("circle",), "of the kind to circle, of tokens on objects", _chosen),
    Target("winning", "reasoning", "binary", ("tictactoe",), "any square of a winning cell, of empty cells", _winning),
    Target("hidden place", "reasoning", "binary", ("permanence",), "any square where the hidden object is", _hidden_place, None),
    Target("next", "reasoning", "classes", ("pattern",), "the symbol to come, at the place that is asked for", _next),
    Target("flight", "reasoning", "binary", ("bounce",), "any square of the path, inside the box", _flight),
    Target("landing", "reasoning", "binary", ("bounce",), "holds the ball at the end, inside the box", _landing),
    Target("to change", "reasoning", "binary", (FOLDER,), "any square that the true video changes", _to_change),
    Target("final colour", "consolidation", "classes", (*ALL, FOLDER), "as colour, in the model's own last frame", _final_colour),
    Target("painted", "consolidation", "binary", (*STAYS, FOLDER), "any square that the model's own video changed", _painted),
)
