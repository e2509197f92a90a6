"""Sweeps: the outcomes of one edit at many cells, over many pairs of samples, as one tidy table.

    table = dl.sweep(lens, pairs, lambda cell, pair: dl.Patch(cell, pair.donor),
                     over=dl.at(block="all", step="all", branch="cond"), outcomes=[flip])
    table.summary("flip"); table.heatmap("flip")

`over` names the cells: its named axes are enumerated, and what it does not name is edited together. Each cell is edited by
itself, in the clean run of every pair, and each outcome measured.

Work that does not change is not done twice. Steps before an edit come from the clean run, and so does a branch that the
edit's first step leaves alone; blocks before the edited one are not run, their streams come from the clean run too. For an
outcome of the same step (`velocity`, `x0_hat`) there is no run at all: the one call of the denoiser is made again. Prompts and
pictures are encoded once (`encoded_once`). None of this changes a bit of the result (`reuse=False` is there to see that).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dit_lens import plots
from dit_lens.bench import SAME_STEP, Bench, Cost, EditOf, Outcome, cost_of, measured_rows
from dit_lens.encoded import encoded_once
from dit_lens.errors import InputError, listed
from dit_lens.grid import Grid
from dit_lens.lens import Lens
from dit_lens.pairs import batches, joined_inputs, run_pairs
from dit_lens.selection import Selector
from dit_lens.statistics import summarise

log = logging.getLogger("dit_lens")

LABELS = ("expert", "sigma", "timestep", "depth")
EDIT = "edit"
"""What the column `edit` says of the edit itself; of a control it has the name."""
LIMIT_BYTES = 16 * 10**9
"""How much a sweep holds on the device at most, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep measured.

    Attributes:
        table: one row for each cell, edit, pair, seed and outcome. The axes of the cell; expert, sigma, timestep and depth where
            the axes fix them; `edit`, which is `edit` or a control's name; `sample`, the number of the pair; `seed`; `outcome`;
            its `value`, and what it is in the `clean` and the `donor` run; `effect` = (value - clean) / (donor - clean), not
            a number where clean and donor do not differ.
        axes: the named axes of `over`. cost: what was done.
    """

    table: pd.DataFrame
    axes: tuple[str, ...]
    cost: Cost | None = None

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def summary(self, outcome: str | None = None, value: str = "effect") -> pd.DataFrame:
        """Mean over pairs and seeds for every cell and edit, with a bootstrap interval over pairs.

        Args:
            outcome: which one, where there are several. value: `effect`, `value`, `clean` or `donor`.

        Raises:
            InputError: there is no such outcome or value.
        """
        table = self._of(outcome)
        if value not in ("effect", "value", "clean", "donor"):
            raise InputError(f"there is no column {value!r}; write effect, value, clean or donor")
        return summarise(table, value, [*self.axes, *labels_of(table, self.axes), "edit"])

    def heatmap(self, outcome: str | None = None, value: str = "effect") -> Figure:
        """Means, and below them how wide their intervals are: blocks upwards, steps (or the longest other axis) to the right.

        There is a panel for the edit, for each control, and for each value of the axes that are left.

        Raises:
            InputError: the sweep did not name blocks and another axis, or there is nothing to show.
        """
        found = self.summary(outcome, value)
        others = [axis for axis in self.axes if axis not in ("block", "expert") and found[axis].nunique() > 1]
        if "block" not in self.axes or not self.axes:
            raise InputError(f"a heat map needs blocks, and this sweep named {listed(self.axes)}; use summary()")
        if found.empty:
            raise InputError(f"there is no {value} to show: clean and donor runs have the same outcome in every pair")
        across = "step" if "step" in self.axes else max(others, key=lambda axis: found[axis].nunique(), default="site")
        # A step has one expert; without steps, blocks of two experts have the same numbers.
        named = self.axes if across != "step" else [axis for axis in self.axes if axis != "expert"]
        rest = [axis for axis in named if axis not in ("block", across) and found[axis].nunique() > 1]
        panels = [", ".join(map(str, names)) for names in zip(found["edit"], *(found[axis] for axis in rest), strict=True)]
        shown = found.assign(panel=panels, across=found[across], width=found["high"] - found["low"])
        if across == "step":
            shown["across"] = [f"{step} | {sigma:.2f}" for step, sigma in zip(found["step"], found["sigma"], strict=True)]
        few, many = found["clusters"].min(), found["clusters"].max()
        clusters = f"{few}" if few == many else f"{few} to {many}"
        # Of an effect, 0 and 1 have a meaning.
        whole = [0.0, 1.0] if value == "effect" else []
        ends = [*found["mean"], *whole]
        widest = float(shown["width"].max())
        name = outcome or self.table["outcome"].iloc[0]
        return plots.heat_maps(
            shown,
            panel="panel",
            x="across",
            y="block",
            value="mean",
            x_label="step | sigma" if across == "step" else across,
            y_label="block",
            value_label=f"{value} of {name}\nmean, N = {clusters} pairs",
            limits=(min(ends), max(ends)),
            spread="width",
            spread_label="width of its 95 %\ninterval over pairs" + (f", at most {widest:.2f}" if widest == widest else ": none"),
        )

    def save(self, path: str | Path) -> None:
        """Write the table as parquet."""
        self.table.to_parquet(path, index=False)

    def _of(self, outcome: str | None) -> pd.DataFrame:
        names = list(dict.fromkeys(self.table["outcome"]))
        if outcome is None and len(names) > 1:
            raise InputError(f"there are {len(names)} outcomes; name one of {listed(names)}")
        if outcome is not None and outcome not in names:
            raise InputError(f"there is no outcome {outcome!r}; write one of {listed(names)}")
        return self.table[self.table["outcome"] == (outcome or names[0])]


def sweep(
    lens: Lens,
    pairs: Sequence[Any],
    edit: EditOf,
    over: Selector,
    outcomes: Outcome | Sequence[Outcome],
    *,
    seeds: Sequence[int] = (0,),
    controls: Mapping[str, EditOf] | None = None,
    batch: int = 16,
    reuse: bool = True,
    limit_bytes: int = LIMIT_BYTES,
    progress: bool = True,
) -> Sweep:
    """Edit every cell by itself, in the runs of every pair, and measure what comes of it.

    Args:
        pairs: each has a `clean` and a `donor` (see `Pair`).
        edit: called with the selector of one cell and the runs of some pairs (see `PairRuns`: `clean`, `donor`, `other`),
            gives the edit, or several. The donors hold the activations of the cells, in full.
        over: which cells. Named axes are enumerated; what is not named is edited together. For outcomes of the same step,
            name `step` and `branch`.
        outcomes: what to measure.
        seeds: every sample runs with each. controls: other edits of the same cells, by name.
        batch: pairs that run together; clean and edited runs have the same batches. reuse: see above.
        limit_bytes: refuse a sweep that would hold more than this on the device.
        progress: whether to say the cost and show a progress bar.

    Raises:
        InputError: no pairs, a cell that does not exist, an outcome that does not fit the cells, an edit that fails, or
            more to hold on the device than the limit.
    """
    measured = [outcomes] if isinstance(outcomes, Outcome) else list(outcomes)
    if controls and EDIT in controls:
        raise InputError(f"a control cannot have the name {EDIT!r}, which is what the table calls the edit itself")
    edits = {EDIT: edit, **(controls or {})}
    if not pairs or not measured or not seeds:
        raise InputError(f"a sweep needs pairs, outcomes and seeds: there are {len(pairs)}, {len(measured)} and {len(seeds)}")
    if len({outcome.name for outcome in measured}) < len(measured):
        raise InputError(f"outcomes with the same name: {listed(outcome.name for outcome in measured)}")
    grid = Grid(over, lens.extent(**joined_inputs([pairs[0].clean])))
    if any(outcome.of in SAME_STEP for outcome in measured):
        grid.check_single()
    return swept(lens, pairs, edits, grid, measured, seeds, batch, reuse, limit_bytes, progress)


def swept(
    lens: Lens,
    pairs: Sequence[Any],
    edits: Mapping[str, EditOf],
    grid: Grid,
    measured: Sequence[Outcome],
    seeds: Sequence[int],
    batch: int,
    reuse: bool,
    limit_bytes: int,
    progress: bool,
) -> Sweep:
    """`sweep` over a grid."""
    cost: Cost | None = None
    rows: list[dict[str, Any]] = []
    parts = batches(len(pairs), batch)
    total = len(parts) * len(grid.points) * len(edits)
    with (
        encoded_once(lens.pipe) if reuse else nullcontext(),
        tqdm(total=total, desc="sweep", unit="edit", disable=not progress) as bar,
    ):
        for places in parts:
            decode = any(outcome.of == "video" for outcome in measured)
            runs = run_pairs(lens, [pairs[i] for i in places], places, seeds, keep_calls=True, decode=decode)
            bench = Bench(lens, grid, runs, measured, reuse)
            if cost is None:
                largest = max(map(len, parts)) * len(seeds)
                cost = cost_of(bench, len(edits), len(pairs) * len(seeds), largest)
                log.info("sweep over %s: %s", grid.over, cost)
                if progress:
                    tqdm.write(f"sweep over {grid.over}: {cost}", file=sys.stderr)
                if cost.held_bytes > limit_bytes:
                    raise InputError(
                        f"a sweep over {grid.over} would hold {cost.held_bytes / 1e9:.3g} GB on the device, and the limit is"
                        f" {limit_bytes / 1e9:.3g} GB: name step= and branch= in over=, write a smaller batch=, or raise"
                        " limit_bytes="
                    )
            for place, points in grid.groups().items():
                for found in measured_rows(bench, place, points, edits):
                    rows += found
                    bar.update()
    table = pd.DataFrame(rows)
    table["effect"] = effect(table["value"] - table["clean"], table)
    return Sweep(table, grid.axes, cost)


def labels_of(table: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The columns of a table that follow from its axes, and are none of them."""
    return [name for name in LABELS if name in table and name not in axes]


def effect(change: pd.Series, table: pd.DataFrame) -> pd.Series:
    """A change as a share of the way from clean to donor; not a number where these do not differ."""
    span = table["donor"] - table["clean"]
    return change / span.where(span != 0)
