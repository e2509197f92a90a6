"""Recording: what to take of which activation.

A `Record` joins a selection with a reducer, and with a sink when the result should be streamed away instead of kept.
During a run a `Recorder` visits the selected blocks, asks the step clock where the run is, reduces on the device and
copies the result to the CPU. What it took is in the run's `Activations`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_lens.activations import Activations, Entry
from dit_lens.architectures import Layout
from dit_lens.errors import InputError
from dit_lens.reducers import Reducer, full, reducer_name
from dit_lens.schedule import Clock
from dit_lens.selection import Cell, Extent, Selector
from dit_lens.taps import Tap, to_host

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


class Recorder:
    """Visits the selected blocks of one run and takes what the records ask for.

    Args:
        records: what to record. extent: what there is, for resolving selections before the run.
        width: of a visual token, to say how much will be kept. limit_bytes: how much may be kept on the CPU.

    Raises:
        InputError: a selection is out of range or empty.
    """

    def __init__(self, records: tuple[Record, ...], extent: Extent, width: int, limit_bytes: int) -> None:
        for record in records:
            if isinstance(record.reduce, Reducer):
                record.reduce.check(record.selector)
        self._records = records
        self._extent = extent
        self._width = width
        self._limit = limit_bytes
        self._steps = len(extent.forecast.timesteps)
        self._wanted = [{cell: cell for cell in record.selector.cells(extent)} for record in records]
        self._taken = [0] * len(records)
        self._bytes = [0] * len(records)
        self._parts: dict[tuple[int, tuple[int, ...]], str] = {}
        self._entries: list[Entry] = []
        self._clock: Clock | None = None

    @property
    def cells(self) -> list[Cell]:
        """Every cell that some record is to take."""
        return [cell for wanted in self._wanted for cell in wanted]

    @property
    def selections(self) -> list[tuple[Selector, list[Cell]]]:
        """Each record's selector, and the cells that it selects."""
        return [(record.selector, list(wanted)) for record, wanted in zip(self._records, self._wanted, strict=True)]

    @property
    def taps(self) -> list[Tap]:
        """One tap for each site of each block that some record wants."""
        places = dict.fromkeys((c.expert, c.block, c.site, c.stream) for wanted in self._wanted for c in wanted)
        order = {site.name: place for place, site in enumerate(self._extent.sites)}
        return [
            Tap(expert, block, site, partial(self._visit, (expert, block, site, stream)), stream)
            for expert, block, site, stream in sorted(places, key=lambda p: (p[0], p[1], order[p[2]], p[3]))
        ]

    def begin(self, clock: Clock) -> None:
        """At the first denoiser call: check token selections, and say what will be kept, before any block runs."""
        assert clock.layout is not None
        self._clock = clock
        for index, record in enumerate(self._records):
            if any(cell.stream == "visual" for cell in self._wanted[index]):
                record.selector.check_tokens(clock.layout)
            if record.sink is None and isinstance(record.reduce, Reducer):
                # The library's own reducers run on tensors without storage, which tells the size of what they keep.
                for cell in self._wanted[index]:
                    site, heads = self._extent.site(cell), self._extent.heads
                    tokens = clock.layout.shape if cell.stream == "visual" else (1, 1, clock.text_tokens or clock.layout.tokens)
                    shape = (clock.batch, *tokens, self._width * site.side_by_side)
                    stand_in = torch.empty(shape, dtype=torch.float32 if site.in_float32 else clock.dtype, device="meta")
                    stand_in = stand_in.unflatten(-1, (heads, -1)) if site.per_head else stand_in
                    self._bytes[index] += record.reduce(record.selector.take_tokens(stand_in), cell).nbytes
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

    def _visit(self, place: tuple[str, int, str, str], tensor: Tensor) -> None:
        """What passes at a place, (expert, block, site, stream)."""
        clock = self._clock
        assert clock is not None
        here = Cell(place[0], clock.step, clock.branch, *place[1:])
        for index, wanted in enumerate(self._wanted):
            cell = wanted.get(here)
            if cell is not None:
                self._take(index, cell, tensor)

    def _take(self, index: int, cell: Cell, tokens: Tensor) -> None:
        """Reduce one activation of (batch, tokens, channels) or (batch, tokens, heads, channels), and keep it or pass it on."""
        clock, record = self._clock, self._records[index]
        assert clock is not None
        assert clock.layout is not None
        check_label(cell, clock.timestep)
        layout = clock.layout if cell.stream == "visual" else Layout.line(tokens.shape[1])
        visual = tokens.detach().unflatten(1, layout.shape)
        record.selector.check_tokens(layout)
        kept = to_host(record.reduce(record.selector.take_tokens(visual), cell))
        self._taken[index] += 1
        if record.sink is not None:
            record.sink(cell, kept)
            return
        if not isinstance(record.reduce, Reducer) and not self._bytes[index]:
            # A reducer of the user's own runs on real activations only, so its first result tells the size of the rest.
            self._bytes[index] = kept.nbytes * len(self._wanted[index])
            self._check_limit(index)
        whole = tuple(visual.shape[1:-1])
        if (index, whole) not in self._parts:
            self._parts[index, whole] = record.selector.part(whole)
        self._entries.append(Entry(cell, index, reducer_name(record.reduce), kept, self._parts[index, whole]))

    def _check_limit(self, index: int) -> None:
        """Refuse when all records together would keep too much."""
        if sum(self._bytes) > self._limit:
            raise InputError(
                f"{self._records[index].selector} would keep {_size(self._bytes)}, and the limit is"
                f" {_size([self._limit])}: select less, reduce (dl.norm, dl.frame_mean), stream with"
                " dl.Record(..., sink=...), or raise limit_bytes="
            )


def check_label(cell: Cell, timestep: float) -> None:
    """Refuse a call of the denoiser at another timestep than the forecast labelled its cells with."""
    if cell.timestep != timestep:
        raise RuntimeError(
            f"step {cell.step} was foreseen at timestep {cell.timestep} and ran at {timestep}: the pipeline"
            " does not follow its scheduler's own timesteps, so activations cannot be labelled"
        )


def _size(nbytes: Iterable[int]) -> str:
    """Bytes in words: 3.2 MB."""
    total = float(sum(nbytes))
    power = min(int(math.log(total, 1000)), 4) if total >= 1 else 0
    return f"{total / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
