"""Unmixing: how much of each of a few known things there is in a blend of them.

A blend is taken for a convex mixture of corners: weights that are not negative and sum to 1. The weights are those of the
mixture nearest to it (Euclidean), found exactly: every face of the corners' hull is tried, which is a handful for the few
colours that a square of a board can have (and what `scipy.optimize.nnls` finds for one blend at a time).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from dit_lens.reasoner.board import PALETTE

COLOURS = PALETTE.astype(np.float64) / 255
"""Of the palette, in [0, 1]."""

FLAT = 0.05
"""Corners whose edges have singular values in a ratio below this lie so nearly in a lower dimension that noise decides."""
TIE = 1e-6
"""Mixtures whose distances to the blend differ by less are equally near."""

Corners = tuple[tuple[float, ...], ...]


def unmix(
    points: Float[np.ndarray, "points dims"], corners: Float[np.ndarray, "corners dims"]
) -> tuple[Float[np.ndarray, "points corners"], Float[np.ndarray, " points"]]:
    """Weights of the corners in each point, and how far the nearest mixture is from it.

    Where the corners leave the weights open (three colours on one line, say), the mixture with the most of the *first*
    corner is taken, and the mean of those that have equally much of it.
    """
    whole = np.asarray(corners, dtype=np.float64)
    faces = _faces(tuple(map(tuple, whole.tolist())))
    tried = np.zeros((len(faces), len(points), len(whole)))
    for weights, (members, base, inverse) in zip(tried, faces, strict=True):
        along = (points - base) @ inverse
        weights[:, members[0]] = 1 - along.sum(axis=1)
        weights[:, members[1:]] = along
    left = np.linalg.norm(points - tried @ whole, axis=-1)
    left = np.where((tried >= -1e-9).all(axis=-1), left, np.inf)
    near = left <= left.min(axis=0) + TIE
    most = np.where(near, tried[..., 0], -1).max(axis=0)
    chosen = near & (tried[..., 0] >= most - TIE)
    found = (tried * chosen[..., None]).sum(axis=0) / chosen.sum(axis=0)[:, None]
    return found.clip(0, 1), left.min(axis=0)


def unambiguous(corners: Float[np.ndarray, "corners dims"]) -> bool:
    """Whether every mixture of the corners has one set of weights: none of them lies on a line, plane, ... of the others."""
    edges = np.asarray(corners, dtype=np.float64)[1:] - corners[0]
    if len(edges) > edges.shape[1]:
        return False
    if not len(edges):
        return True
    spread = np.linalg.svd(edges, compute_uv=False)
    return bool(spread[-1] > FLAT * spread[0])


@lru_cache(maxsize=4096)
def _faces(corners: Corners) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Every face with weights of its own: its corners, the first of them, and what turns a point into weights of the rest.

    By Caratheodory's theorem these are enough, whatever the corners: a mixture of more has the same point.
    """
    points = np.array(corners)
    found = []
    for size in range(1, min(len(points), points.shape[1] + 1) + 1):
        for chosen in itertools.combinations(range(len(points)), size):
            members = list(chosen)
            edges = points[members[1:]] - points[members[0]]
            if not len(edges) or np.linalg.matrix_rank(edges, tol=1e-9) == len(edges):
                inverse = np.linalg.pinv(edges) if len(edges) else np.zeros((points.shape[1], 0))
                found.append((members, points[members[0]], inverse))
    return found


@dataclass(frozen=True)
class Plan:
    """How the last frame of one sample is read: which squares have which colours to be mixed of.

    Attributes:
        finals: the board of each answer, as palette indices. own: the squares that speak for it.
        groups: squares (rows, columns) by their colours, the first frame's first, then those of the answers.
        everywhere: squares that every answer repaints, and that are no part of `unclear`.
        unclear: the colours of those groups that have no weights of their own.
    """

    start: UInt8[np.ndarray, "rows columns"]
    finals: UInt8[np.ndarray, "answers rows columns"]
    own: Bool[np.ndarray, "answers rows columns"]
    groups: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]
    everywhere: Bool[np.ndarray, "rows columns"]
    unclear: frozenset[tuple[int, ...]]


def plan(start: UInt8[np.ndarray, "rows columns"], finals: UInt8[np.ndarray, "answers rows columns"]) -> Plan:
    """The plan for a first frame and the last frames of the answers.

    An answer is read on the squares that it paints in a colour no other gives them, without those whose colours are unclear;
    where none is left, on the unclear ones too; and one all of whose squares belong to others (a crossing of routes) on
    everything that it paints.
    """
    return _plan(start.tobytes(), finals.tobytes(), start.shape)


@lru_cache(maxsize=4096)
def _plan(first: bytes, last: bytes, shape: tuple[int, int]) -> Plan:
    start = np.frombuffer(first, dtype=np.uint8).reshape(shape)
    finals = np.frombuffer(last, dtype=np.uint8).reshape(-1, *shape)
    painted = finals != start
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for y, x in np.argwhere(painted.any(axis=0)).tolist():
        before = int(start[y, x])
        groups.setdefault((before, *sorted({*finals[:, y, x].tolist()} - {before})), []).append((y, x))
    unclear = frozenset(key for key in groups if not unambiguous(COLOURS[list(key)]))
    clear = np.ones(shape, dtype=bool)
    for key in unclear:
        clear[tuple(np.array(groups[key]).T)] = False
    alone = painted & ((finals[:, None] == finals[None]).sum(axis=1) == 1)
    own = painted
    for wanted in (alone, alone & clear):
        own = np.where(wanted.any(axis=(1, 2), keepdims=True), wanted, own)
    places = {key: np.array(found).T for key, found in groups.items()}
    return Plan(start, finals, own, {key: (ys, xs) for key, (ys, xs) in places.items()}, painted.all(axis=0) & clear, unclear)


def shares(frames: Float[np.ndarray, "frames rows columns 3"], plans: Sequence[Plan]) -> list[Float[np.ndarray, " answers"]]:
    """How far each frame has come to each answer of its plan, from 0 to 1.

    The colour of every square is unmixed into its colour in the first frame and those that the answers give it. An answer's
    share is the weight of its colour, averaged over its own squares. What the mixture leaves unexplained counts against it,
    in units of the way from the first colour to the answer's. Where the colours of a square leave the weights open, the
    first colour's is taken from the squares that every answer repaints, or where there are none, as large as possible.
    """
    weights = np.zeros((len(frames), len(COLOURS), *frames.shape[1:3]))
    unexplained = np.zeros(frames.shape[:3])
    for key, (which, ys, xs) in _gathered(plans, lambda plan: set(plan.groups) - plan.unclear).items():
        found, left = unmix(frames[which, ys, xs], COLOURS[list(key)])
        weights[which[:, None], list(key), ys[:, None], xs[:, None]] = found
        unexplained[which, ys, xs] = left
    for key, (which, ys, xs) in _gathered(plans, lambda plan: plan.unclear).items():
        found, left = _with_known_start(frames[which, ys, xs], key, _started(weights, plans)[which])
        weights[which[:, None], list(key), ys[:, None], xs[:, None]] = found
        unexplained[which, ys, xs] = left
    return [_read(*row) for row in zip(weights, unexplained, plans, strict=True)]


def _read(
    weights: Float[np.ndarray, "colours rows columns"], unexplained: Float[np.ndarray, "rows columns"], plan: Plan
) -> Float[np.ndarray, " answers"]:
    found = np.zeros(len(plan.finals))
    for i, (final, own) in enumerate(zip(plan.finals, plan.own, strict=True)):
        ys, xs = np.nonzero(own)
        if len(ys):
            way = np.linalg.norm(COLOURS[final[ys, xs]] - COLOURS[plan.start[ys, xs]], axis=-1)
            found[i] = (weights[final[ys, xs], ys, xs] * (1 - unexplained[ys, xs] / way).clip(0)).mean()
    return found


def _gathered(plans: Sequence[Plan], keys: Callable[[Plan], Iterable[tuple[int, ...]]]) -> dict[tuple[int, ...], Any]:
    """Squares of all frames by their colours: frame, row and column of each."""
    found: dict[tuple[int, ...], list[Any]] = {}
    for number, plan in enumerate(plans):
        for key in keys(plan):
            ys, xs = plan.groups[key]
            found.setdefault(key, []).append((np.full(len(ys), number), ys, xs))
    return {key: tuple(map(np.concatenate, zip(*each, strict=True))) for key, each in found.items()}


def _started(weights: Float[np.ndarray, "frames colours rows columns"], plans: Sequence[Plan]) -> Float[np.ndarray, " frames"]:
    """The first frame's share on the squares that every answer repaints; nan where there are none."""
    found = np.full(len(plans), np.nan)
    for number, plan in enumerate(plans):
        ys, xs = np.nonzero(plan.everywhere)
        if len(ys):
            found[number] = weights[number, plan.start[ys, xs], ys, xs].mean()
    return found


def _with_known_start(
    points: Float[np.ndarray, "points 3"], key: tuple[int, ...], started: Float[np.ndarray, " points"]
) -> tuple[Float[np.ndarray, "points corners"], Float[np.ndarray, " points"]]:
    """Weights and distances as of `unmix`, with the first colour's weight given (nan: unknown)."""
    corners = COLOURS[list(key)]
    found, left = unmix(points, corners)
    known = np.flatnonzero(~np.isnan(started))
    rest = 1 - started[known]
    moved = known[rest > 1e-6]
    found[known] = np.eye(len(key))[0]
    if len(moved):
        rest = (1 - started[moved])[:, None]
        others, far = unmix((points[moved] - (1 - rest) * corners[0]) / rest, corners[1:])
        found[moved] = np.concatenate([1 - rest, rest * others], axis=1)
        left[moved] = far * rest[:, 0]
    return found, left
