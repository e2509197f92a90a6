"""Grids: the cells of a sweep, enumerated along the axes that a selector names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dit_lens.errors import InputError
from dit_lens.selection import Cell, Extent, Selector

Place = tuple[int, str]
"""A step and a branch: one call of the denoiser."""

AXES = ("expert", "step", "branch", "block", "site", "stream", "head", "frames")


class Grid:
    """The cells of a sweep: a selector for each, with its axes and the calls that it touches."""

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
        self.cells: list[tuple[Selector, dict[str, Any], list[Cell]]] = []
        for key, cells in groups.items():
            fixed = dict(zip((axis for axis in self.axes if axis in Cell.__dataclass_fields__), key, strict=True))
            for part in inside:
                chosen = {**fixed, **{name: value for name, value in part.items() if value is not None}}
                selector = replace(over, depth=None, sigma=None, **chosen)
                self.cells.append((selector, {**chosen, **self._labels(fixed, cells)}, cells))

    def _labels(self, fixed: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, float]:
        """Sigma, timestep and depth, where the axes fix them."""
        labels = {name: getattr(cells[0], name) for name in ("sigma", "timestep")} if "step" in fixed else {}
        return labels | ({"depth": cells[0].depth} if "block" in fixed else {})

    def _frames(self, over: Selector) -> list[Any]:
        """The layout is not known before a run, so frames are listed as they are written."""
        if over.frames is None:
            return [None]
        if isinstance(over.frames, int | list | range | tuple | np.ndarray):
            return [int(frame) for frame in np.atleast_1d(np.asarray(over.frames))]
        raise InputError(f"{over}: a sweep over frames needs them as a list, as frames=[0, 1, 2]")

    def only(self, indices: Sequence[int]) -> Grid:
        """The grid with some of its cells."""
        grid = Grid(self.over, self.extent)
        grid.cells = [self.cells[index] for index in indices]
        return grid

    def check_single(self) -> None:
        """Refuse cells of several calls: which of their velocities would it be?"""
        for selector, _, cells in self.cells:
            if len(call_places(cells)) > 1:
                raise InputError(
                    f"{selector} is in {len(call_places(cells))} calls of the denoiser, and an outcome of the velocity or of"
                    " x0-hat belongs to one: name step= and branch= in over="
                )

    def groups(self) -> dict[tuple[Place, ...], list[int]]:
        """The cells by the calls that they touch, in the order of these."""
        found: dict[tuple[Place, ...], list[int]] = {}
        for index, (_, _, cells) in enumerate(self.cells):
            found.setdefault(call_places(cells), []).append(index)
        return found


def call_places(cells: Sequence[Cell]) -> tuple[Place, ...]:
    """The calls of the denoiser that hold these cells."""
    return tuple(dict.fromkeys((cell.step, cell.branch) for cell in cells))
