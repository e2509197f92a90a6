"""What a run recorded: one labelled tensor per cell and record, to pick from, to stack, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from dit_lens.errors import InputError, listed
from dit_lens.selection import Cell


@dataclass(frozen=True)
class Entry:
    """One recorded tensor.

    Attributes:
        cell: where it lives. record: the place of its record in `record=`. reduce: the name of its reducer.
        tensor: the values, on the CPU.
        part: which heads and tokens of the site it was reduced from, as `Selector.part` names them; empty for all.
    """

    cell: Cell
    record: int
    reduce: str
    tensor: Tensor = field(repr=False, compare=False)
    part: str = ""


class Activations:
    """What a run recorded and kept, in the order in which the run reached it."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def cells(self) -> list[Cell]:
        """The cells with a kept activation, each once."""
        return list(dict.fromkeys(entry.cell for entry in self.entries))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.tensor.nbytes for entry in self.entries)

    def to_pandas(self) -> pd.DataFrame:
        """The labels, one row per tensor: expert, step, sigma, timestep, branch, block, depth, site, stream, ..."""
        axes = ("expert", "step", "sigma", "timestep", "branch", "block", "depth", "site", "stream")
        rows = [
            {axis: getattr(entry.cell, axis) for axis in axes}
            | {"record": entry.record, "reduce": entry.reduce, "shape": tuple(entry.tensor.shape)}
            for entry in self.entries
        ]
        return pd.DataFrame(rows, columns=[*axes, "record", "reduce", "shape"])

    def find(self, record: int | None = None, **axes: Any) -> list[Entry]:
        """The entries at the given coordinates; an axis that is None or not given is all of it."""
        wanted = {axis: value for axis, value in axes.items() if value is not None}
        return [
            entry
            for entry in self.entries
            if all(getattr(entry.cell, axis) == value for axis, value in wanted.items()) and record in (None, entry.record)
        ]

    def one(self, record: int | None = None, **axes: Any) -> Tensor:
        """The tensor at the given coordinates.

        Raises:
            InputError: there is none, or more than one; the message says what there is.
        """
        return _single(self.find(record=record, **axes), self, **axes)

    def stack(
        self,
        block: int | list[int] | Literal["all"] = "all",
        step: int | list[int] | Literal["all"] = "all",
        branch: str = "cond",
        site: str = "resid",
        record: int | None = None,
    ) -> Tensor:
        """The activations of several blocks and steps in one tensor with leading axes (block, step).

        Args:
            block, step: indices, or "all" that were recorded; in the order given. A single index keeps its axis.

        Raises:
            InputError: an activation is missing, or their shapes differ.
        """
        found = self.find(record=record, branch=branch, site=site)
        blocks = _chosen(block, [entry.cell.block for entry in found])
        steps = _chosen(step, [entry.cell.step for entry in found])
        if not blocks or not steps:
            raise InputError(f"nothing was recorded at branch={branch!r}, site={site!r}; there is {self.summary()}")
        places: dict[tuple[int, int], list[Entry]] = {}
        for entry in found:
            places.setdefault((entry.cell.block, entry.cell.step), []).append(entry)
        here = {"branch": branch, "site": site}
        rows = [[_single(places.get((b, s), []), self, block=b, step=s, **here) for s in steps] for b in blocks]
        shapes = {tuple(tensor.shape) for row in rows for tensor in row}
        if len(shapes) > 1:
            raise InputError(f"activations of different shapes cannot be stacked: {listed(sorted(shapes))}")
        return torch.stack([torch.stack(row) for row in rows])

    def summary(self) -> str:
        """What there is, in a few words."""
        cells = self.cells
        values = {
            axis: list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in ("block", "step", "branch", "site")
        }
        return "; ".join(f"{axis} {listed(found)}" for axis, found in values.items()) if cells else "nothing"


def _single(found: list[Entry], among: Activations, **axes: Any) -> Tensor:
    """The tensor of the only entry found at the coordinates; an InputError where there is not exactly one."""
    if len(found) == 1:
        return found[0].tensor
    where = ", ".join(f"{axis}={value!r}" for axis, value in axes.items() if value is not None)
    if not found:
        raise InputError(f"nothing was recorded at {where}; there is {among.summary()}")
    differing = [axis for axis in (*axes, "expert", "stream") if len({getattr(e.cell, axis) for e in found}) > 1]
    axis = differing[0] if differing else "record"
    values = dict.fromkeys(getattr(entry.cell, axis) if differing else entry.record for entry in found)
    raise InputError(f"{len(found)} activations were recorded at {where}; name {axis}=, one of {listed(values)}")


def _chosen(value: int | list[int] | Literal["all"], recorded: list[int]) -> list[int]:
    if isinstance(value, str):
        return sorted(set(recorded))
    return [value] if isinstance(value, int) else list(value)
