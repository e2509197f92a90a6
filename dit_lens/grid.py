"""Grids: the places of a sweep, enumerated along the axes that a selector names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_lens.errors import InputError
from dit_lens.selection import Cell, Extent, Selector

Place = tuple[int, str]
"""A step and a branch: one call of the denoiser."""

AXES = ("expert", "step", "branch", "block", "site", "stream", "head", "frames")


@dataclass(frozen=True, eq=False)
class Point:
    """One place of a grid, which is edited by itself.

    Attributes:
        selector: what is edited there. labels: its value on every named axis, and what follows from these: expert, sigma,
            timestep, depth. cells: what the selector selects.
    """

    selector: Selector
    labels: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @property
    def calls(self) -> tuple[Place, ...]:
        """The calls of the denoiser that hold its cells."""
        return call_places(self.cells)

    @property
    def starts(self) -> dict[Place, int]:
        """The first edited block of each edited call of the first edited step."""
        first = min(cell.step for cell in self.cells)
        blocks: dict[Place, int] = {}
        for cell in self.cells:
            if cell.step == first:
                blocks[first, cell.branch] = min(cell.block, blocks.get((first, cell.branch), cell.block))
        return blocks


class Grid:
    """The places of a sweep: one for every combination of values on the named axes of a selector.

    Attributes:
        axes: the named axes. points: the places, in the order in which a run reaches them.
    """

    def __init__(self, over: Selector, extent: Extent) -> None:
        self.over = over
        self.extent = extent
        every = over.cells(extent)
        named = {axis for axis in AXES if getattr(over, axis) is not None}
        # Ranges of depth or sigma name blocks and steps.
        named |= {axis for axis, level in (("block", over.depth), ("step", over.sigma)) if level is not None}
        self.axes = tuple(axis for axis in AXES if axis in named)
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in every:
            groups.setdefault(tuple(getattr(cell, axis) for axis in self.axes if hasattr(cell, axis)), []).append(cell)
        heads = None if over.head is None else sorted(over.numbers("head", over.head, extent.heads))
        parts = {"head": heads or [None], "frames": self._frames(over)}
        inside = [dict(zip(parts, values, strict=True)) for values in itertools.product(*parts.values())]
        self.points: list[Point] = []
        for key, cells in groups.items():
            fixed = dict(zip((axis for axis in self.axes if axis in Cell.__dataclass_fields__), key, strict=True))
            for part in inside:
                chosen = {**fixed, **{name: value for name, value in part.items() if value is not None}}
                selector = replace(over, depth=None, sigma=None, **chosen)
                self.points.append(Point(selector, {**chosen, **self._labels(fixed, cells)}, tuple(cells)))

    def _labels(self, fixed: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
        """What follows from the axes: expert, sigma and timestep of a step, and the depth of a block."""
        labels = {name: getattr(cells[0], name) for name in ("expert", "sigma", "timestep")} if "step" in fixed else {}
        if "block" in fixed:
            # The same block of two experts has two depths where one of them is longer.
            labels["depth"] = cells[0].depth if len({cell.depth for cell in cells}) == 1 else math.nan
        return labels

    def _frames(self, over: Selector) -> list[Any]:
        """The layout is not known before a run, so frames are listed as they are written."""
        if over.frames is None:
            return [None]
        if isinstance(over.frames, int | np.integer | list | range | set | np.ndarray):
            given = over.frames if isinstance(over.frames, list | range | set) else np.atleast_1d(over.frames)
            return [int(frame) for frame in dict.fromkeys(given)]
        raise InputError(f"{over}: a sweep over frames needs them as a list, as frames=[0, 1, 2]")

    def only(self, indices: Sequence[int]) -> Grid:
        """The grid with some of its points."""
        grid = Grid(self.over, self.extent)
        grid.points = [self.points[index] for index in indices]
        return grid

    def check_single(self) -> None:
        """Refuse points in several calls: which of their velocities would it be?"""
        for point in self.points:
            if len(point.calls) > 1:
                raise InputError(
                    f"{point.selector} is in {len(point.calls)} calls of the denoiser, and an outcome of the velocity or of"
                    " x0-hat belongs to one: name step= and branch= in over="
                )

    def groups(self) -> dict[tuple[Place, ...], list[Point]]:
        """The points by the calls that they touch, in the order of these."""
        found: dict[tuple[Place, ...], list[Point]] = {}
        for point in self.points:
            found.setdefault(point.calls, []).append(point)
        return found


def call_places(cells: Iterable[Cell]) -> tuple[Place, ...]:
    """The calls of the denoiser that hold these cells."""
    return tuple(dict.fromkeys((cell.step, cell.branch) for cell in cells))
