"""Recording: what to take of which activation, and the table of what was taken.

A `Record` joins a selection with a reducer, and with a sink when the result should be streamed away instead of kept.
During a run a `Recorder` visits the selected blocks, asks the step clock where the run is, reduces on the device and
copies the result to the CPU. After the run the `Activations` hold one tensor per cell and record.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from dit_lens.architectures import Architecture
from dit_lens.errors import InputError, listed
from dit_lens.reducers import Reducer, full, reducer_name
from dit_lens.schedule import StepClock
from dit_lens.selection import Cell, Extent, Selector
from dit_lens.taps import Streams, Tap, to_host

log = logging.getLogger("dit_lens")


@dataclass(frozen=True)
class Record:
    """What to record.

    Attributes:
        selector: which cells, and which tokens of them.
        reduce: (activation, cell) -> tensor, run on the device; see `dit_lens.reducers` for shapes.
        sink: called with (cell, tensor on the CPU) for every activation, which is then not kept.
    """

    selector: Selector
    reduce: Callable[[Tensor, Cell], Tensor] = full
    sink: Callable[[Cell, Tensor], None] | None = None


def as_records(record: object) -> tuple[Record, ...]:
    """The `record=` argument of a run as a tuple of records; an InputError for anything else."""
    records = []
    for item in record if isinstance(record, Iterable) else [record]:
        if not isinstance(item, Selector | Record):
            raise InputError(f"record= takes dl.at(...) or dl.Record(...), or a list of them, and not {item!r}")
        records.append(item if isinstance(item, Record) else Record(item))
    return tuple(records)


@dataclass(frozen=True)
class Entry:
    """One recorded tensor. `record` is the place of its record in `record=`, `reduce` the name of its reducer."""

    cell: Cell
    record: int
    reduce: str
    tensor: Tensor = field(repr=False, compare=False)


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


class Recorder:
    """Visits the selected blocks of one run and takes what the records ask for.

    Args:
        records: what to record. extent: what there is, for resolving selections before the run.
        architecture: tells the width of the streams. limit_bytes: how much may be kept on the CPU.

    Raises:
        InputError: a selection is out of range or empty.
    """

    def __init__(self, records: tuple[Record, ...], extent: Extent, architecture: Architecture, limit_bytes: int) -> None:
        self._records = records
        self._architecture = architecture
        self._limit = limit_bytes
        self._steps = len(extent.forecast.timesteps)
        self._wanted = [{cell: cell for cell in record.selector.cells(extent)} for record in records]
        self._taken = [0] * len(records)
        self._bytes = [0] * len(records)
        self._entries: list[Entry] = []
        self._clock: StepClock | None = None

    @property
    def taps(self) -> list[Tap]:
        """One tap for each block that some record wants."""
        sites: dict[tuple[str, int], set[str]] = {}
        for cell in (cell for wanted in self._wanted for cell in wanted):
            sites.setdefault((cell.expert, cell.block), set()).add(cell.site)
        return [
            Tap(expert, block, "update" in wanted, self._visitor(expert, block))
            for (expert, block), wanted in sorted(sites.items())
        ]

    def begin(self, clock: StepClock) -> None:
        """At the first denoiser call: check token selections, and say what will be kept, before any block runs."""
        assert clock.layout is not None
        self._clock = clock
        denoiser = self._architecture.denoisers(clock.pipe)[clock.expert]
        shape = (clock.batch, *clock.layout.shape, self._architecture.width(denoiser))
        for index, record in enumerate(self._records):
            record.selector.check_tokens(clock.layout)
            if record.sink is None and isinstance(record.reduce, Reducer):
                # The library's own reducers run on tensors without storage, which tells the size of what they keep.
                for cell in self._wanted[index]:
                    dtype = torch.float32 if cell.site == "update" else clock.dtype
                    stand_in = record.selector.take_tokens(torch.empty(shape, dtype=dtype, device="meta"))
                    self._bytes[index] += record.reduce(stand_in, cell).nbytes
                self._check_limit(index)
        kept = sum(len(wanted) for wanted, record in zip(self._wanted, self._records, strict=True) if not record.sink)
        log.info("recording %d activations, %d of them kept: %s", sum(map(len, self._wanted)), kept, _size(self._bytes))

    def finish(self) -> Activations:
        """After the run: the kept activations, or an InputError for a record that never met a cell of its selection."""
        for record, wanted, taken in zip(self._records, self._wanted, self._taken, strict=True):
            if not taken:
                raise InputError(f"{record.selector} matched nothing: the run ended before it came to any of its cells")
            if taken < len(wanted) and not self._stopped_early():
                raise RuntimeError(
                    f"{record.selector} was to match {len(wanted)} cells and matched {taken}: blocks were skipped, or"
                    " the pipeline does not switch experts where its configuration says"
                )
        return Activations(self._entries)

    def _stopped_early(self) -> bool:
        """Whether the pipeline was interrupted before its last step."""
        return self._clock is None or self._clock.step < self._steps

    def _visitor(self, expert: str, block: int) -> Callable[[Streams | None, Streams], None]:
        def visit(before: Streams | None, after: Streams) -> None:
            clock = self._clock
            assert clock is not None
            for index, wanted in enumerate(self._wanted):
                for stream, value in after.items():
                    for site in ("resid", "update"):
                        cell = wanted.get(Cell(expert, clock.step, clock.branch, block, site, stream))
                        if cell is None:
                            continue
                        if site == "update":
                            assert before is not None
                            self._take(index, cell, value.float() - before[stream].float())
                        else:
                            self._take(index, cell, value)

        return visit

    def _take(self, index: int, cell: Cell, tokens: Tensor) -> None:
        """Reduce one activation of (batch, tokens, channels), and keep it or pass it on."""
        clock, record = self._clock, self._records[index]
        assert clock is not None
        assert clock.layout is not None
        if cell.timestep != clock.timestep:
            raise RuntimeError(
                f"step {cell.step} was foreseen at timestep {cell.timestep} and ran at {clock.timestep}: the pipeline"
                " does not follow its scheduler's own timesteps, so activations cannot be labelled"
            )
        visual = record.selector.take_tokens(tokens.detach().unflatten(1, clock.layout.shape))
        kept = to_host(record.reduce(visual, cell))
        self._taken[index] += 1
        if record.sink is not None:
            record.sink(cell, kept)
            return
        if not isinstance(record.reduce, Reducer) and not self._bytes[index]:
            # A reducer of the user's own runs on real activations only, so its first result tells the size of the rest.
            self._bytes[index] = kept.nbytes * len(self._wanted[index])
            self._check_limit(index)
        self._entries.append(Entry(cell, index, reducer_name(record.reduce), kept))

    def _check_limit(self, index: int) -> None:
        """Refuse when all records together would keep too much."""
        if sum(self._bytes) > self._limit:
            raise InputError(
                f"{self._records[index].selector} would keep {_size(self._bytes)}, and the limit is"
                f" {_size([self._limit])}: select less, reduce (dl.norm, dl.frame_mean), stream with"
                " dl.Record(..., sink=...), or raise limit_bytes="
            )


def _size(nbytes: Iterable[int]) -> str:
    """Bytes in words: 3.2 MB."""
    total = float(sum(nbytes))
    power = min(int(math.log(total, 1000)), 4) if total >= 1 else 0
    return f"{total / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
