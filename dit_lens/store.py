"""A store: many runs on disk, with what they recorded, to be searched as tables and read one tensor at a time.

    store = dl.Store("mazes")
    store.append(run, model=lens.hash, task="maze", sample=[3, 4, 5])     # a label has one value, or one for each row

    with store.writing(model=lens.hash, task="maze", sample=6) as part:   # activations go to disk while the run is under way
        part.keep(lens.run(**inputs, seed=0, record=part.streamed(dl.at(site="resid"))))

    for found in store.select(block=6, step=0, branch="cond", task="maze"):
        found.tensor, found.rows                                          # memory-mapped; the labels of its rows
    features, rows = store.stack(block=6, step=0)                         # one cell, the rows of all runs one after another

On disk a store is a folder `runs/<number>` for each run: the run itself as `Run.save` writes it, its activations in shards,
and two small tables. `index.parquet` is written last, by renaming, and a run without it does not exist: it is still being
written, or its writer was killed, and then the next writer removes it. What exists is never written again.

Several writers may work at once, in one process or in many: each has a run folder of its own, held by a file lock that the
operating system releases when the writer dies.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dit_lens.activations import Activations, Entry
from dit_lens.errors import InputError, listed
from dit_lens.files import check_writable, write_bytes, write_text
from dit_lens.record import Record, as_records
from dit_lens.reducers import reducer_name
from dit_lens.run import Run
from dit_lens.selection import Cell, Selector
from dit_lens.shards import AXES, COLUMNS, SHARD_BYTES, ShardWriter, read

FORMAT = 1
"""Version of the folder that a store is."""

# What the two tables have beside the labels of the rows, and the run that is added to the second one when it is read.
ROW_COLUMNS = ("run", "row", "seed", "prompt", "model", "scheduler")
INDEX = ("run", *COLUMNS)
RANGES = ("sigma", "timestep", "depth")
"""Continuous axes, where a tuple is a range [low, high)."""


@dataclass(frozen=True)
class Stored(Entry):
    """A tensor from a store. `rows` are the labels of its rows, `run` the number of the run that it is from."""

    run: int = -1
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)


class Store:
    """Runs and their activations in a folder. A folder that is missing or empty becomes a store with the first run.

    Raises:
        InputError: the folder is no store, or one of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._parts: dict[int, tuple[pd.DataFrame, pd.DataFrame]] = {}
        self._whole: tuple[int, pd.DataFrame, pd.DataFrame] = (0, pd.DataFrame(columns=ROW_COLUMNS), pd.DataFrame(columns=INDEX))
        self._check_format()

    def __len__(self) -> int:
        """Number of runs."""
        self._refresh()
        return len(self._parts)

    @property
    def rows(self) -> pd.DataFrame:
        """One row per run and row of its batch: run, row, seed, prompt, model, scheduler, and the labels."""
        return self._tables()[0].copy()

    @property
    def index(self) -> pd.DataFrame:
        """One row per recorded tensor: run, the cell (with sigma, timestep, depth), record, reduce, part, shape, dtype,
        bytes, and the shard and key under which it lies."""
        return self._tables()[1].copy()

    def append(self, run: Run, model: str, **labels: Any) -> int:
        """Write a run with its trajectory and its activations; returns its number.

        Args:
            run: what `Lens.run` returned. model: `Lens.hash` of the lens that ran.
            labels: columns of `rows`; each one value, or a list with one for each row of the batch.

        Raises:
            InputError: a label that is no number, text or boolean, has another kind than before, a name that is taken or
                too few values; or the folder cannot be written to. Nothing is left of the run then.
        """
        with self.writing(model, **labels) as part:
            part.keep(run)
        return part.number

    @contextmanager
    def writing(self, model: str, shard_bytes: int = SHARD_BYTES, **labels: Any) -> Iterator[Part]:
        """Write a run that is still to come: its records stream to disk (see `Part`). Arguments and errors as in `append`.

        When the block ends before `keep` was called, by an exception or not, nothing is left of the run.
        """
        self._check_labels(model, labels)
        number, lock = self._claim()
        folder = self._run_folder(number)
        part = Part(number, folder, ShardWriter(folder, shard_bytes), {"model": model, **labels})
        try:
            yield part
            if not part.kept:
                raise InputError("nothing was kept: call keep(run) before the end of the writing block")
        finally:
            if not (folder / "index.parquet").exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            (folder / ".lock").unlink(missing_ok=True)

    def select(self, model: str | list[str] | None = None, **wanted: Any) -> Iterator[Stored]:
        """The recorded tensors that match, run by run in the order in which they were written; one is read at a time.

        Args:
            model: hash, list of hashes, or "all"; must be named where the matching runs are of different models.
            wanted: any columns of `index` and `rows`. A value, a list, a range or "all"; on sigma, timestep and depth a
                tuple is a range [low, high). Of a tensor only the rows that match are returned.

        Raises:
            InputError: nothing matches, there is no such column, or the models differ; at once. While reading: a damaged
                shard, or rows asked for of a tensor whose reducer left no axis for them.
        """
        rows, index = self._tables()
        if rows.empty:
            raise InputError(f"the store {self.folder} holds no runs; write some with append or writing")
        unknown = [name for name in wanted if name not in index and name not in rows]
        if unknown:
            columns = dict.fromkeys([*rows.columns, *index.columns])
            raise InputError(f"the store has no {listed(unknown)}; write some of {listed(columns)}")
        rows = self._narrowed(rows, {"model": model} | {name: value for name, value in wanted.items() if name in rows})
        if model is None and rows["model"].nunique() > 1:
            names = rows["model"].unique()
            raise InputError(
                f"these runs are of {len(names)} models, whose activations cannot be compared; name model=, one of"
                f" {listed(names)}, or model='all'"
            )
        index = self._narrowed(index[index["run"].isin(rows["run"])], {n: v for n, v in wanted.items() if n in index})
        return self._read(index, rows)

    def stack(
        self,
        block: int | None = None,
        step: int | None = None,
        branch: str = "cond",
        site: str = "resid",
        stream: str = "visual",
        **wanted: Any,
    ) -> tuple[Tensor, pd.DataFrame]:
        """One cell over all runs: a tensor (rows, ...), and a table that says what each of its rows is.

        Args:
            block, step, branch, site, stream: the cell; what is left out must be unambiguous. wanted: as in `select`.

        Raises:
            InputError: as `select`; or more than one tensor of a run matches, shapes or sigmas differ between the runs, or
                the tensors have no rows.
        """
        cell = {"block": block, "step": step, "branch": branch, "site": site, "stream": stream}
        wanted |= {axis: value for axis, value in cell.items() if value is not None}
        found = list(self.select(**wanted))
        for axis in ("expert", "step", "block", "record", "reduce", "sigma"):
            values = {getattr(entry if hasattr(entry, axis) else entry.cell, axis) for entry in found}
            if len(values) > 1:
                raise InputError(f"stack takes one cell, and there are several: name {axis}=, one of {listed(sorted(values))}")
        kinds = {(tuple(entry.tensor.shape[1:]), entry.tensor.dtype) for entry in found}
        if len(kinds) > 1:
            raise InputError(f"activations of different shapes or precisions cannot be stacked: {listed(sorted(kinds, key=str))}")
        if any(not _has_rows(entry.tensor, entry.rows) for entry in found):
            raise InputError(f"the reducer {found[0].reduce!r} left no axis for the rows of the batch; use select")
        # Views of the shards, until they are put together.
        return torch.cat([entry.tensor for entry in found]), pd.concat([entry.rows for entry in found], ignore_index=True)

    def run(self, number: int) -> Run:
        """A run as it was, with its trajectory and its activations (these memory-mapped).

        Raises:
            InputError: there is no such run, or its files are damaged.
        """
        self._refresh()
        if number not in self._parts:
            raise InputError(f"the store {self.folder} has no run {number}; there is {listed(self._parts)}")
        folder = self._run_folder(number)
        return replace(Run.load(folder), activations=Activations(read(folder, self._parts[number][1].itertuples())))

    def _read(self, index: pd.DataFrame, rows: pd.DataFrame) -> Iterator[Stored]:
        by_run = {number: part.reset_index(drop=True) for number, part in rows.groupby("run")}
        for number, places in itertools.groupby(index.itertuples(index=False), attrgetter("run")):
            labels, everything = by_run[number], self._parts[number][0]
            for entry in read(self._run_folder(number), places):
                tensor = entry.tensor
                if len(labels) < len(everything):
                    if not _has_rows(tensor, everything):
                        raise InputError(
                            f"the reducer {entry.reduce!r} left no axis for the rows of the batch, so"
                            f" none can be chosen; select whole runs, or write run={number}"
                        )
                    tensor = tensor[torch.tensor(labels["row"].to_numpy())]
                yield Stored(entry.cell, entry.record, entry.reduce, tensor, entry.part, number, labels)
                # Not kept while the next one is read.
                del entry, tensor

    def _narrowed(self, table: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
        """The rows of a table that match; an InputError that names the first column in which nothing is left."""
        for name, value in wanted.items():
            if value is None or (isinstance(value, str) and value == "all"):
                continue
            kept = table[_matches(table[name], name, value)]
            if kept.empty:
                shown = sorted(table[name].unique(), key=str)
                more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
                raise InputError(f"nothing is stored at {name}={value!r}; there is {listed(shown[:20])}{more}")
            table = kept
        if table.empty:
            raise InputError("nothing was recorded in these runs; give lens.run(record=...)")
        return table

    def _run_folder(self, number: int) -> Path:
        return self.folder / "runs" / f"{number:06d}"

    def _check_format(self) -> bool:
        """Whether the store is there already; an InputError where something else is."""
        about = self.folder / "store.json"
        try:
            if not self.folder.exists() or not [name for name in os.listdir(self.folder) if not name.startswith(".")]:
                return False
            form = json.loads(about.read_text(encoding="utf-8")).get("dit_lens_store")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"{self.folder} is no store: it has no readable store.json; name another folder") from None
        if form != FORMAT:
            raise InputError(f"the store {self.folder} has format {form}, and this version reads {FORMAT}")
        return True

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """`rows` and `index`, put together again only when runs have come: probes select thousands of times."""
        self._refresh()
        if self._whole[0] < len(self._parts):
            rows = [rows for rows, _ in self._parts.values()]
            index = [index for _, index in self._parts.values() if len(index)]
            joined = pd.concat(index, ignore_index=True) if index else self._whole[2]
            self._whole = (len(rows), pd.concat(rows, ignore_index=True), joined)
        return self._whole[1], self._whole[2]

    def _refresh(self) -> None:
        """Read the tables of the runs that came since the last look; those that were there do not change."""
        for path in sorted((self.folder / "runs").glob("*/index.parquet")):
            number = int(path.parent.name)
            if number in self._parts:
                continue
            try:
                rows, index = (_table(path.with_name(name)) for name in ("rows.parquet", "index.parquet"))
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"the tables of the run in {path.parent} are damaged: {error}; remove that folder") from error
            # Parquet has lists, which cannot be compared; a shape is a tuple.
            index["shape"] = [tuple(int(length) for length in shape) for shape in index["shape"]]
            self._parts[number] = (_numbered(rows, number), _numbered(index, number))

    def _claim(self) -> tuple[int, FileLock]:
        """A new run folder and the lock on it. Removes what killed writers left."""
        check_writable(self.folder)
        if not self._check_format():
            write_text(self.folder / "store.json", json.dumps({"dit_lens_store": FORMAT}))
        # Held for a moment only, so that no folder is removed between its making and its locking.
        with FileLock(self.folder / ".lock"):
            (self.folder / "runs").mkdir(exist_ok=True)
            numbers = [-1]
            for folder in (self.folder / "runs").iterdir():
                if (folder / "index.parquet").exists() or not _left_alone(folder):
                    numbers.append(int(folder.name))
            number = max(numbers) + 1
            self._run_folder(number).mkdir()
            lock = _lock(self._run_folder(number))
            lock.acquire(timeout=0)
            return number, lock

    def _check_labels(self, model: str, labels: Mapping[str, Any]) -> None:
        """Names and kinds, before anything is run."""
        if not isinstance(model, str) or not model:
            raise InputError(f"model= takes the hash of the weights, lens.hash, and not {model!r}")
        taken = sorted(set(labels) & {*ROW_COLUMNS, *COLUMNS, *AXES})
        if taken:
            raise InputError(f"{listed(taken)} cannot be a label: a column of the store has that name; write another")
        self._refresh()
        for name, value in labels.items():
            kind = _kind(name, _values(value, 1))
            for number, (rows, _) in self._parts.items():
                if name in rows:
                    before = _kind(name, rows[name].tolist())
                    if before != kind:
                        raise InputError(f"the label {name} is a {before} in run {number}, and {value!r} is a {kind}")
                    break


class Part:
    """A run that is being written. Give `streamed(...)` to `lens.run(record=...)`, and its result to `keep`.

    Attributes:
        number: the run's number in the store. kept: whether `keep` was called.
    """

    def __init__(self, number: int, folder: Path, shards: ShardWriter, labels: Mapping[str, Any]) -> None:
        self.number = number
        self.kept = False
        self._folder = folder
        self._shards = shards
        self._labels = labels
        self._streamed = 0

    def streamed(self, record: Selector | Record | Iterable[Selector | Record]) -> tuple[Record, ...]:
        """The records (what `record=` takes), each with a sink into the store; they stand first in `record=`."""
        records = as_records(record)
        if any(item.sink is not None for item in records):
            raise InputError("a record that has a sink cannot be streamed into the store; leave sink= out")
        first, self._streamed = self._streamed, self._streamed + len(records)
        return tuple(replace(item, sink=self._sink(first + i, item)) for i, item in enumerate(records))

    def keep(self, run: Run) -> None:
        """Write the run, and what it recorded and kept itself; with that it is in the store.

        Raises:
            InputError: a label has not one value for each row, or the folder cannot be written to.
        """
        if self.kept:
            raise InputError(f"run {self.number} is written already; open another writing block for another run")
        rows = {"row": range(run.batch), "seed": run.seeds, "prompt": run.prompts, "scheduler": run.scheduler}
        table = pd.DataFrame({name: _rows(name, value, run.batch) for name, value in {**rows, **self._labels}.items()})
        if any(entry.record < self._streamed for entry in run.activations):
            raise InputError("records that the run keeps must stand after the streamed ones: record=[*part.streamed(...), ...]")
        for entry in run.activations:
            self._shards.add(entry)
        index = self._shards.finish()
        replace(run, activations=Activations()).save(self._folder)
        write_bytes(self._folder / "rows.parquet", _parquet(table))
        write_bytes(self._folder / "index.parquet", _parquet(index))
        self.kept = True

    def _sink(self, number: int, record: Record) -> Callable[[Cell, Tensor], None]:
        # A sink does not learn the layout, by which a run names the part that was selected.
        part = "" if record.selector.whole else str(record.selector)
        return lambda cell, tensor: self._shards.add(Entry(cell, number, reducer_name(record.reduce), tensor, part))


def _matches(column: pd.Series, name: str, value: Any) -> np.ndarray:
    """Which entries of a column a value, list, range or slice names."""
    if name in RANGES:
        levels = column.to_numpy(dtype=float)
        if isinstance(value, tuple) and len(value) == 2:
            return (levels >= value[0]) & (levels < value[1])
        # Stored in double precision, named in the few digits that a table shows.
        return np.logical_or.reduce(np.isclose(levels[:, None], np.atleast_1d(value), rtol=1e-4, atol=0), axis=1)
    if isinstance(value, slice):
        value = range(int(column.max()) + 1)[value]
    many = isinstance(value, list | set | range | np.ndarray | pd.Series)
    return column.isin(list(value) if many else [value]).to_numpy()


def _has_rows(tensor: Tensor, rows: pd.DataFrame) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == len(rows)


def _values(value: Any, batch: int) -> list[Any]:
    """The values of a label as a list: those given, or the one repeated."""
    if isinstance(value, np.ndarray | Tensor | pd.Series):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple | range) else [value] * batch


def _rows(name: str, value: Any, batch: int) -> list[Any]:
    """A value for each row of the batch."""
    values = _values(value, batch)
    if len(values) != batch:
        raise InputError(f"the label {name} has {len(values)} values, and the run {batch} rows; write one value, or {batch}")
    return values


def _kind(name: str, values: list[Any]) -> str:
    """Boolean, number or text."""
    kinds = {
        "boolean" if isinstance(v, bool | np.bool_) else "number" if isinstance(v, int | float | np.number) else "text"
        for v in values
        if isinstance(v, bool | np.bool_ | int | float | np.number | str)
    }
    if len(kinds) != 1 or not all(isinstance(v, bool | np.bool_ | int | float | np.number | str) for v in values):
        raise InputError(f"the label {name} takes numbers, texts or booleans, of one kind, and not {values!r}")
    return kinds.pop()


def _numbered(table: pd.DataFrame, number: int) -> pd.DataFrame:
    table.insert(0, "run", number)
    return table


def _table(path: Path) -> pd.DataFrame:
    """A small table; through pandas' own reader it takes several times as long."""
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False).to_pandas(use_threads=False)


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def _lock(folder: Path) -> FileLock:
    # A sink may be called from another thread than the one that began.
    return FileLock(folder / ".lock", thread_local=False)


def _left_alone(folder: Path) -> bool:
    """Removes an unfinished run unless its writer is alive; whether it is gone."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return not folder.exists()
