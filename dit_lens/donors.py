"""Donors and pools: the runs that an edit takes activations from.

A donor holds an activation for a cell when its run recorded that cell in full (`dl.full`, the default), or just the
heads and tokens that the edit selects. A pool is several donors; every row of every one of them counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dit_lens.activations import Activations, Entry
from dit_lens.errors import InputError, listed
from dit_lens.run import Run
from dit_lens.schedule import Forecast
from dit_lens.selection import Cell, Selector


class Pool:
    """Runs, or the activations of runs, to take activations from.

    Raises:
        InputError: the source is neither, or there is none.
    """

    def __init__(self, source: object) -> None:
        given = [source] if isinstance(source, Run | Activations) or not isinstance(source, Iterable) else list(source)
        members = [member for member in given if isinstance(member, Run | Activations)]
        wrong = [type(member).__name__ for member in given if not isinstance(member, Run | Activations)]
        if wrong or not members:
            raise InputError(
                f"activations come from a Run that recorded them, or from its .activations, and not from a"
                f" {listed(wrong) if wrong else 'list of nothing'}; write donor = lens.run(..., record=dl.at(...))"
            )
        self._members = members
        self._entries = [_by_cell(member.activations if isinstance(member, Run) else member) for member in members]

    def check(self, owner: str, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """Raise an InputError where a donor lacks one of the cells or followed another schedule."""
        for member, entries in zip(self._members, self._entries, strict=True):
            if isinstance(member, Run):
                _check_schedule(owner, member, forecast, scheduler)
            missing = [cell for cell in cells if cell not in entries]
            if missing:
                activations = member.activations if isinstance(member, Run) else member
                reduced = sorted({entry.reduce for entry in activations if entry.cell == missing[0]})
                raise InputError(
                    f"{owner}: the donor lacks {len(missing)} of {len(cells)} cells, the first at {coordinates(missing[0])}"
                    + (f", which it reduced with {listed(reduced)}" if reduced else "")
                    + f"; it holds {activations.summary()}; run it with a record= of these cells, in full"
                )
            for cell in cells:
                held = entries[cell][0].cell
                if not math.isclose(held.sigma, cell.sigma, rel_tol=1e-4, abs_tol=1e-6) or held.timestep != cell.timestep:
                    raise InputError(
                        f"{owner}: the donor is at sigma {held.sigma:.4g} (timestep {held.timestep:g}) at step {cell.step}, and"
                        f" this run at {cell.sigma:.4g} ({cell.timestep:g}); run the donor with the same steps and scheduler"
                    )

    def check_text(self, owner: str, text_tokens: int | None) -> None:
        """Raise an InputError where a donor read another number of text tokens."""
        for member in self._members:
            if isinstance(member, Run) and None not in (member.text_tokens, text_tokens) and member.text_tokens != text_tokens:
                raise InputError(
                    f"{owner}: the donor read {member.text_tokens} text tokens, and this run {text_tokens}; run the donor with"
                    " prompts of the same length (max_sequence_length=)"
                )

    def count(self, owner: str, cell: Cell, at: Selector, shape: Sequence[int], part: str) -> int:
        """How many rows `rows` gives, without reading them; arguments and errors are the same."""
        return sum(len(self._held(owner, entries[cell], at, shape, part).tensor) for entries in self._entries)

    def rows(self, owner: str, cell: Cell, at: Selector, shape: Sequence[int], part: str) -> Tensor:
        """What all donors hold of a selection, one row after the other, on the CPU.

        Args:
            owner: the edit, for messages. cell, at: what to take.
            shape: the site's own shape without the batch: (frames, height, width, channels), or with heads before the
                channels. part: the name of the selection in that shape (`Selector.part`).

        Raises:
            InputError: a donor holds the cell in another shape, or other tokens or heads of it.
        """
        held = [self._held(owner, entries[cell], at, shape, part) for entries in self._entries]
        rows = [at.take_tokens(entry.tensor) if entry.part == "" else entry.tensor for entry in held]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _held(self, owner: str, entries: list[Entry], at: Selector, shape: Sequence[int], part: str) -> Entry:
        """The entry that holds a selection: in full, or just that."""
        wanted = at.take_tokens(torch.empty((1, *shape), device="meta")).shape[1:]
        for entry in entries:
            if (entry.part, entry.tensor.shape[1:]) in (("", tuple(shape)), (part, wanted)):
                return entry
        held = listed(
            f"{tuple(entry.tensor.shape[1:])}{' of other tokens or heads' if entry.part not in ('', part) else ''}"
            for entry in entries
        )
        raise InputError(
            f"{owner}: at {coordinates(entries[0].cell)} the donor's rows have shape {held}, and {tuple(shape)} is needed"
            + ("" if wanted == tuple(shape) else f" (or just the selection, {tuple(wanted)})")
            + "; run the donor with frames, height and width as here, and record the cell in full"
        )


def coordinates(cell: Cell) -> str:
    """A cell in a message."""
    return f"block {cell.block}, step {cell.step}, branch {cell.branch}, site {cell.site} of {cell.expert}"


def _by_cell(activations: Activations) -> dict[Cell, list[Entry]]:
    """The activations that were not reduced."""
    entries: dict[Cell, list[Entry]] = {}
    for entry in activations:
        if entry.reduce == "full":
            entries.setdefault(entry.cell, []).append(entry)
    return entries


def _check_schedule(owner: str, run: Run, forecast: Forecast, scheduler: str) -> None:
    """A donor's steps are this run's, or its first ones where the donor stopped early."""
    if run.scheduler != scheduler:
        raise InputError(f"{owner}: the donor ran with a {run.scheduler}, and this run has a {scheduler}; use the same one")
    if run.timesteps != forecast.timesteps[: run.steps]:
        raise InputError(
            f"{owner}: the donor has another schedule: its {run.steps} sigmas begin with {_some(run.sigmas.tolist())}, and"
            f" the {len(forecast.sigmas)} of this run with {_some(forecast.sigmas)}; run it with the same number of steps"
        )


def _some(sigmas: Sequence[float]) -> str:
    return listed(f"{sigma:.4g}" for sigma in sigmas[:3])
