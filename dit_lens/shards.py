"""Shards: recorded tensors in safetensors files, with a table that says which tensor is where.

A `ShardWriter` takes tensors one by one and writes a shard whenever enough have come together, so that what a run records
is never in memory at once. A shard has its name only when it is complete. `read` goes the other way: shard by shard, by
memory map, one tensor at a time; what is not touched is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_lens.activations import Entry
from dit_lens.errors import InputError
from dit_lens.selection import Cell

SHARD_BYTES = 2**28
"""A shard is written when this many bytes have come together (256 MiB)."""

AXES = tuple(field.name for field in fields(Cell))
COLUMNS = (*AXES, "record", "reduce", "part", "shape", "dtype", "bytes", "shard", "key")
"""What the table says of a tensor: its cell, which record took it and how, what it is, and where it lies."""


class ShardWriter:
    """Writes tensors into `activations-<n>.safetensors` in a folder.

    Args:
        folder: where; it must be there. shard_bytes: when to begin another shard. A tensor is never divided, so a shard can
            be larger by less than one tensor; as much is held in memory.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, entry: Entry) -> None:
        """Take a tensor. It must not be changed afterwards."""
        tensor = entry.tensor
        key = str(len(self._rows))
        self._rows.append(
            {axis: getattr(entry.cell, axis) for axis in AXES}
            | {"record": entry.record, "reduce": entry.reduce, "part": entry.part, "shape": tuple(tensor.shape)}
            | {"dtype": str(tensor.dtype).removeprefix("torch."), "bytes": tensor.nbytes}
            | {"shard": self._shard, "key": key}
        )
        # safetensors takes no two tensors of one storage, and a view would keep all of its storage in memory.
        self._held[key] = tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        self._bytes += tensor.nbytes
        if self._bytes >= self._shard_bytes:
            self._write()

    def finish(self) -> pd.DataFrame:
        """Write what is still held, and return the table of all tensors, in the order in which they came."""
        if self._held:
            self._write()
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    @property
    def _shard(self) -> str:
        return f"activations-{self._shards}.safetensors"

    def _write(self) -> None:
        target = self._folder / self._shard
        partial = target.with_name(f".{target.name}.partial")
        try:
            save_file(self._held, partial)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise InputError(f"cannot write the shard {target}: {error}") from error
        self._held, self._bytes, self._shards = {}, 0, self._shards + 1


def read(folder: Path, rows: Iterable[Any]) -> Iterator[Entry]:
    """The tensors that rows of the table name (from `itertuples`), in their order; memory-mapped, and yours to change.

    Raises:
        InputError: a shard is missing or damaged, or does not hold what the table says; it is named.
    """
    shard: Any = None
    opened = None
    for row in rows:
        path = folder / row.shard
        try:
            if path != opened:
                shard, opened = safe_open(path, framework="pt"), path
            tensor = shard.get_tensor(row.key)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the shard {path} is damaged or missing: {error}; record its run again") from error
        if tuple(tensor.shape) != row.shape or str(tensor.dtype) != f"torch.{row.dtype}":
            raise InputError(f"the shard {path} does not hold what its index says of {row.key}; record its run again")
        yield Entry(Cell(**{axis: getattr(row, axis) for axis in AXES}), row.record, row.reduce, tensor, row.part)
        # Not kept while the next one is read.
        del tensor
