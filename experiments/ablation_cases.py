"""Cases of an ablation: what is done in place of an activation, at which site, for which part of the denoising steps.

    Case.parse("mean attn early", sites)     the mean over other samples for the self-attention's output, in the first third

* skip: the block is left out, which is a zero update. zero: zeros instead of what a part returns.
* mean, resample: the mean over a pool of other samples, or one of them. Both are nearer than zeros to what later blocks expect.
* noise: every token is moved in a random direction, exactly as far as zeroing moves it: a control for the size of a change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dit_lens as dl
from dit_lens.activations import Activations, Entry
from dit_lens.errors import InputError, listed

KINDS = ("skip", "zero", "mean", "resample", "noise")
POOLED = ("mean", "resample")
BANDS = ("all", "early", "middle", "late")
THINNED = (
    *(f"{kind} update {band}" for band in BANDS if band != "all" for kind in ("skip", "noise")),
    *(f"{kind} update all" for kind in ("mean", "resample")),
    *(f"{kind} {site} all" for site in ("attn", "cross_attn", "mlp") for kind in ("zero", "noise")),
)
"""Cases that the full preset tries at every third block."""
KEPT = 8
"""How many samples of a pool are drawn from where an activation is resampled."""


@dataclass(frozen=True)
class Case:
    """What is done, where in a block, and when."""

    kind: str
    site: str
    band: str

    def __str__(self) -> str:
        return f"{self.kind} {self.site} {self.band}"

    @staticmethod
    def parse(text: str, sites: Sequence[str]) -> Case:
        """A case in the words "kind site band"; `sites` are those that the model has.

        Raises:
            InputError: a word that is not known, or a part of a block that is to be skipped.
        """
        words = text.split()
        for known, word in zip((KINDS, sites, BANDS), words, strict=False):
            if word not in known:
                raise InputError(f"case {text!r}: there is no {word!r}; write one of {listed(known)}")
        if len(words) != 3:
            raise InputError(f"case {text!r} has {len(words)} words; write kind, site and band, as 'zero attn early'")
        if words[0] == "skip" and words[1] != "update":
            raise InputError(f"case {text!r}: a block is skipped whole; write 'skip update {words[2]}', or 'zero {words[1]} ...'")
        return Case(*words)

    def edit(self, block: int, steps: list[int], pool: Mapping[str, Activations]) -> dl.Edit:
        """The edit of one block; `pool` is what `pooled` returns, for the kinds that take from one."""
        at = dl.at(block=block, step=steps, site=self.site)
        match self.kind:
            case "skip":
                return dl.Skip(dl.at(block=block, step=steps))
            case "zero":
                return dl.Zero(at)
            case "noise":
                return dl.AddNoise(at, dose=1.0)
            case "mean":
                return dl.Mean(at, pool["mean"])
            case _:
                return dl.Resample(at, pool["resample"])


def band_steps(steps: int) -> dict[str, list[int]]:
    """The steps of each band: thirds of their number."""
    thirds = np.array_split(np.arange(steps), len(BANDS) - 1)
    return {"all": list(range(steps)), **{band: part.tolist() for band, part in zip(BANDS[1:], thirds, strict=True)}}


Call = tuple[Mapping[str, Any], list[list[int]]]
"""Pipeline arguments and the seeds of their samples."""


def pooled(lens: dl.Lens, at: dl.Selector, calls: Iterable[Call]) -> dict[str, Activations]:
    """What runs of other samples hold at these cells: their `mean`, one row, and `KEPT` of their rows to `resample` from.

    Args:
        lens, at: which cells of which model. calls: what to run, one after the other; nothing else of them is kept.
    """
    sums: dict[dl.Cell, Tensor] = {}
    rows: dict[dl.Cell, Tensor] = {}
    count = 0

    def keep(cell: dl.Cell, found: Tensor) -> None:
        sums[cell] = sums.get(cell, torch.zeros(())) + found.sum(dim=0, keepdim=True, dtype=torch.float32)
        rows.setdefault(cell, found[:KEPT].clone())

    for inputs, seeds in calls:
        lens.run(**inputs, seed=seeds, record=dl.Record(at, sink=keep), decode=False)
        count += len(seeds)
    return {
        "mean": Activations([Entry(cell, 0, "full", total / count) for cell, total in sums.items()]),
        "resample": Activations([Entry(cell, 0, "full", found) for cell, found in rows.items()]),
    }
