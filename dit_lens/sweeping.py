"""Sweeps: the outcomes of one edit at many cells, over many pairs of samples, as one tidy table.

    table = dl.sweep(lens, pairs, lambda cell, pair: dl.Patch(cell, pair.donor),
                     over=dl.at(block="all", step="all", branch="cond"), outcomes=[flip])
    table.summary("flip"); table.heatmap("flip")

`over` names the cells: its named axes are enumerated, and what it does not name is edited together. Each cell is edited by
itself, in the clean run of every pair, and each outcome measured.

Work that does not change is not done twice. Steps before an edit come from the clean run, and so does a branch that the
edit's first step leaves alone; blocks before the edited one are not run, their streams come from the clean run too. For an
outcome of the same step (`velocity`, `x0_hat`) there is no run at all: the one call of the denoiser is made again. None of
this changes a bit of the result (`reuse=False` is there to see that).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from dit_lens import plots
from dit_lens.activations import Activations, Entry
from dit_lens.editor import as_edits
from dit_lens.edits import Edit
from dit_lens.errors import InputError, listed
from dit_lens.grid import Grid, Place, call_places
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.lens import Lens
from dit_lens.pairs import PairRuns, joined_inputs, run_pairs
from dit_lens.replay import Resume
from dit_lens.run import Run
from dit_lens.selection import Cell, Selector
from dit_lens.statistics import summarise
from dit_lens.taps import Tap

log = logging.getLogger("dit_lens")

EditOf = Callable[[Selector, PairRuns], Any]
"""What makes the edit, or the edits, of a cell: (selector of the cell, the runs of some pairs) -> edits."""

LABELS = ("sigma", "timestep", "depth")
SAME_STEP = ("velocity", "x0_hat")
EDIT = "edit"
"""What the column `edit` says of the edit itself; of a control it has the name."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """A number for every row of a run.

    Attributes:
        name: what tables call it.
        measure: (values, pairs) -> one number per row; pairs has the pair of every row.
        of: what is measured. `video`: the final video, (rows, frames, height, width, 3) in [0, 1]. `latents`: the final
            latents. `velocity`: the output of the edited branch at the edited step. `x0_hat`: the clean latents that it
            implies. Latents are (rows, channels, frames, height, width); all of it on the CPU.
        decoded: whether to decode an x0-hat first.
    """

    name: str
    measure: Callable[[Tensor, Sequence[Any]], ArrayLike | Tensor]
    of: Literal["video", "latents", "velocity", "x0_hat"] = "video"
    decoded: bool = False

    def __post_init__(self) -> None:
        if self.of not in ("video", "latents", *SAME_STEP):
            raise InputError(f"outcome {self.name!r} is of {self.of!r}; write one of video, latents, velocity, x0_hat")
        if self.decoded and self.of != "x0_hat":
            raise InputError(f"outcome {self.name!r}: decoded= is for of='x0_hat'; a video is decoded as it is")

    def __call__(self, shown: Tensor, pairs: Sequence[Any]) -> np.ndarray:
        """The outcome of every row; an InputError where it is not one number for each."""
        values = np.asarray(torch.as_tensor(self.measure(shown, pairs)).detach().cpu(), dtype=float)
        if values.shape != (len(pairs),):
            raise InputError(f"outcome {self.name!r} gave shape {values.shape} for {len(pairs)} rows; return one number per row")
        return values


@dataclass(frozen=True)
class Cost:
    """What a sweep does, counted before it starts, for each row of a batch.

    Attributes:
        cells, edits, rows: how many cells, edits of each of them (with controls), and pairs times seeds.
        block_forwards: blocks that run for a row. without_reuse: the same for runs of the whole schedule, or up to the
            edited step where no outcome looks beyond it.
        held_bytes: of activations that lie on the device at a time, at most.
    """

    cells: int
    edits: int
    rows: int
    block_forwards: int
    without_reuse: int
    held_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.cells} cells x {self.edits} edits x {self.rows} rows: {self.block_forwards:,} block forwards a row"
            f" ({self.without_reuse / max(1, self.block_forwards):.1f} times as many without reuse), up to"
            f" {self.held_bytes / 1e6:,.0f} MB held on the device"
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep measured.

    Attributes:
        table: one row for each cell, edit, pair, seed and outcome. The axes of the cell; sigma, timestep and depth where the
            axes fix them; `edit`, which is `edit` or a control's name; `sample`, the number of the pair; `seed`; `outcome`;
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
        labels = [name for name in LABELS if name in table]
        return summarise(table, value, [*self.axes, *labels, "edit"])

    def heatmap(self, outcome: str | None = None, value: str = "effect") -> Figure:
        """Blocks upwards, steps (or the next axis) to the right; a panel for each control and what else there is.

        Raises:
            InputError: the sweep did not name blocks and another axis.
        """
        found = self.summary(outcome, value)
        others = [axis for axis in ("step", *self.axes) if axis in self.axes and axis not in ("block", "expert")]
        if "block" not in self.axes or not others or found.empty:
            raise InputError(
                f"a heat map needs blocks and another axis with numbers in them, and this sweep named {listed(self.axes)}; use"
                " summary()"
            )
        across = others[0]
        rest = [axis for axis in self.axes if axis not in ("block", "expert", across) and found[axis].nunique() > 1]
        panels = [", ".join(map(str, names)) for names in zip(found["edit"], *(found[axis] for axis in rest), strict=True)]
        shown = found.assign(panel=panels, across=found[across])
        if across == "step":
            shown["across"] = [f"{step} | {sigma:.2f}" for step, sigma in zip(found["step"], found["sigma"], strict=True)]
        count = found["clusters"]
        clusters = f"{count.min()}" if count.min() == count.max() else f"{count.min()}-{count.max()}"
        low, high = min(0.0, float(found["mean"].min())), max(1.0, float(found["mean"].max()))
        return plots.heat_maps(
            shown,
            panel="panel",
            x="across",
            y="block",
            value="mean",
            x_label="step | sigma" if across == "step" else across,
            y_label="block",
            value_label=f"{value} (mean, N = {clusters} pairs)",
            limits=(low, high),
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
        progress: whether to say the cost and show a progress bar.

    Raises:
        InputError: no pairs, a cell that does not exist, an outcome that does not fit the cells, or an edit that fails.
    """
    measured = [outcomes] if isinstance(outcomes, Outcome) else list(outcomes)
    edits = {EDIT: edit, **(controls or {})}
    if not pairs or not measured or not seeds:
        raise InputError(f"a sweep needs pairs, outcomes and seeds: there are {len(pairs)}, {len(measured)} and {len(seeds)}")
    if len({outcome.name for outcome in measured}) < len(measured):
        raise InputError(f"outcomes with the same name: {listed(outcome.name for outcome in measured)}")
    grid = Grid(over, lens.extent(**joined_inputs([pairs[0].clean])))
    if any(outcome.of in SAME_STEP for outcome in measured):
        grid.check_single()
    return swept(lens, pairs, edits, grid, measured, seeds, batch, reuse, progress)


def swept(
    lens: Lens,
    pairs: Sequence[Any],
    edits: Mapping[str, EditOf],
    grid: Grid,
    measured: Sequence[Outcome],
    seeds: Sequence[int],
    batch: int,
    reuse: bool,
    progress: bool,
) -> Sweep:
    """`sweep` over a grid."""
    cost: Cost | None = None
    rows: list[dict[str, Any]] = []
    parts = np.array_split(np.arange(len(pairs)), -(-len(pairs) // batch))
    with tqdm(total=len(parts) * len(grid.cells) * len(edits), desc="sweep", unit="edit", disable=not progress) as bar:
        for part in parts:
            places = [int(place) for place in part]
            decode = any(outcome.of == "video" for outcome in measured)
            runs = run_pairs(lens, [pairs[i] for i in places], places, seeds, keep_calls=True, decode=decode)
            if cost is None:
                cost = _cost(lens, grid, measured, len(edits), len(pairs) * len(seeds), runs)
                log.info("sweep over %s: %s", grid.over, cost)
                if progress:
                    tqdm.write(f"sweep over {grid.over}: {cost}", file=sys.stderr)
            for found in _measured(Bench(lens, grid, runs, measured, reuse), edits):
                rows += found
                bar.update()
    table = pd.DataFrame(rows)
    table["effect"] = effect(table["value"] - table["clean"], table)
    return Sweep(table, grid.axes, cost)


def effect(change: pd.Series, table: pd.DataFrame) -> pd.Series:
    """A change as a share of the way from clean to donor; not a number where these do not differ."""
    span = table["donor"] - table["clean"]
    return change / span.where(span != 0)


@dataclass(frozen=True, eq=False)
class Bench:
    """Where the edits of one batch of pairs are tried."""

    lens: Lens
    grid: Grid
    runs: PairRuns
    outcomes: Sequence[Outcome]
    reuse: bool
    known: dict[Any, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Outcomes of the clean and the donor runs, by outcome and call."""

    def baselines(self, outcome: Outcome, place: Place) -> tuple[np.ndarray, np.ndarray]:
        """The outcome of the clean and of the donor runs."""
        key = (outcome.name, place if outcome.of in SAME_STEP else None)
        if key not in self.known:
            clean, donor = (
                outcome(self.shown(outcome, run, place), self.runs.pairs) for run in (self.runs.clean, self.runs.donor)
            )
            self.known[key] = (clean, donor)
        return self.known[key]

    def shown(self, outcome: Outcome, run: Run, place: Place) -> Tensor:
        """What an outcome measures of a run."""
        if outcome.of == "video":
            assert run.video is not None  # it was decoded, as an outcome asks for it
            return run.video
        if outcome.of == "latents":
            return run.latents[-1]
        if outcome.of == "velocity":
            return run.velocity(*place)
        return self.decoded(outcome, run.x0_hat(*place))

    def decoded(self, outcome: Outcome, x0_hat: Tensor) -> Tensor:
        """An x0-hat as the outcome wants it."""
        return self.lens.decode(x0_hat) if outcome.decoded else x0_hat

    def observed(self, run: Run, cells: Sequence[Cell]) -> Activations:
        """Activations of a run at these cells, on the model's device: its calls are made again, once each."""
        found: dict[Cell, Entry] = {}
        for place in call_places(cells):
            call = run.calls[place]
            here = [cell for cell in cells if (cell.step, cell.branch) == place]
            shape = run.layout.shape

            def tap(cell: Cell, shape: tuple[int, int, int] = shape) -> Tap:
                def visit(tensor: Tensor) -> None:
                    held = tensor.detach()
                    found[cell] = Entry(cell, 0, "full", held.unflatten(1, shape) if cell.stream == "visual" else held)

                return Tap(cell.expert, cell.block, cell.site, visit, cell.stream)

            self.lens.replay(call, taps=[tap(cell) for cell in here])
        return Activations([found[cell] for cell in cells])

    def tried(self, edits: Sequence[Edit | ReplaceLatents], streams: Mapping[tuple[Place, int], Any]) -> dict[str, np.ndarray]:
        """Every outcome of the clean runs under these edits."""
        touched = [cell for edit in edits if isinstance(edit, Edit) for cell in edit.at.cells(self.grid.extent)]
        rewritten = [step for edit in edits if isinstance(edit, ReplaceLatents) for step in edit.steps(self.grid.extent)]
        answers = self.answers(touched, rewritten, streams) if self.reuse else {}
        values: dict[str, np.ndarray] = {}
        late = [outcome for outcome in self.outcomes if outcome.of not in SAME_STEP]
        if late:
            clean = self.runs.clean
            inputs = joined_inputs([pair.clean for pair in dict(zip(self.runs.places, self.runs.pairs, strict=True)).values()])
            seeds = clean.seeds[: self.runs.places.count(self.runs.places[0])]
            decode = any(outcome.of == "video" for outcome in late)
            edited = self.lens.run(**inputs, seed=list(seeds), edits=edits, answers=answers, decode=decode)
            for outcome in late:
                values[outcome.name] = outcome(self.shown(outcome, edited, (0, "")), self.runs.pairs)
        early = [outcome for outcome in self.outcomes if outcome.of in SAME_STEP]
        if early:
            (place,) = call_places(touched)
            resume = answers.get(place)
            again = self.lens.replay(
                self.runs.clean.calls[place], edits=edits, resume=resume if isinstance(resume, Resume) else None
            )
            for outcome in early:
                of = again.velocity.cpu() if outcome.of == "velocity" else self.decoded(outcome, again.x0_hat).cpu()
                values[outcome.name] = outcome(of, self.runs.pairs)
        return values

    def answers(
        self, touched: Sequence[Cell], rewritten: Sequence[int], streams: Mapping[tuple[Place, int], Any]
    ) -> dict[Place, Tensor | Resume]:
        """What of the clean runs is the same under edits of these cells, and of the latents of these steps."""
        clean = self.runs.clean
        first = min([cell.step for cell in touched] + list(rewritten))
        answers: dict[Place, Tensor | Resume] = dict(clean.answers(before=first)) if first else {}
        if first in rewritten:
            return answers
        for branch in clean.branches:
            blocks = [cell.block for cell in touched if (cell.step, cell.branch) == (first, branch)]
            if not blocks:
                answers[first, branch] = clean.velocity(first, branch)
            elif ((first, branch), min(blocks) - 1) in streams:
                answers[first, branch] = Resume(min(blocks), streams[(first, branch), min(blocks) - 1])
        return answers


def _measured(bench: Bench, edits: Mapping[str, EditOf]) -> Iterator[list[dict[str, Any]]]:
    """The rows of every cell and edit, for one batch of pairs."""
    for places, indices in bench.grid.groups().items():
        cells = list(dict.fromkeys(cell for index in indices for cell in bench.grid.cells[index][2]))
        runs = bench.runs.with_donor_activations(bench.observed(bench.runs.donor, cells))
        streams = _streams(bench, cells) if bench.reuse else {}
        for index in indices:
            selector, axes, _ = bench.grid.cells[index]
            for name, make in edits.items():
                values = bench.tried(as_edits(make(selector, runs)), streams)
                yield [row for outcome in bench.outcomes for row in _rows(bench, outcome, places[0], axes, name, values)]


def _rows(
    bench: Bench, outcome: Outcome, place: Place, axes: Mapping[str, Any], name: str, values: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """One row of the table for every row of the batch."""
    clean, donor = bench.baselines(outcome, place)
    seeds = bench.runs.clean.seeds
    for row, sample in enumerate(bench.runs.places):
        numbers = {"value": values[outcome.name][row], "clean": clean[row], "donor": donor[row]}
        yield {**axes, "edit": name, "sample": sample, "seed": seeds[row], "outcome": outcome.name, **numbers}


def _streams(bench: Bench, cells: Sequence[Cell]) -> dict[tuple[Place, int], Any]:
    """What the blocks before the edited ones hand on in the clean run, at the first step that is edited."""
    first = min(cell.step for cell in cells)
    wanted = [
        replace(cell, block=cell.block - 1, site="resid", stream=stream)
        for cell in cells
        if cell.step == first and cell.block > 0
        for stream in bench.lens.architecture.streams
    ]
    entries = bench.observed(bench.runs.clean, list(dict.fromkeys(wanted))) if wanted else ()
    found: dict[tuple[Place, int], Any] = {}
    for entry in entries:
        found.setdefault(((entry.cell.step, entry.cell.branch), entry.cell.block), {})[entry.cell.stream] = entry.tensor
    return found


def _cost(lens: Lens, grid: Grid, outcomes: Sequence[Outcome], edits: int, rows: int, runs: PairRuns) -> Cost:
    """What a sweep will do, taking every edit to act at its own cell."""
    extent = grid.extent
    blocks = [extent.blocks[expert] for expert in extent.forecast.experts]
    branches = len(extent.forecast.branches)
    whole = branches * sum(blocks)
    early, late = (any((outcome.of in SAME_STEP) == same for outcome in outcomes) for same in (True, False))
    done, naive, most = 2 * whole, 2 * whole, 0
    for _, _, cells in grid.cells:
        first = min(cell.step for cell in cells)
        here = [min(c.block for c in cells if (c.step, c.branch) == place) for place in call_places(cells) if place[0] == first]
        at_first = sum(blocks[first] - block for block in here)
        done += edits * (early * at_first + late * (at_first + branches * sum(blocks[first + 1 :])))
        naive += edits * (whole if late else branches * sum(blocks[: first + 1]))
    for places, indices in grid.groups().items():
        done += 2 * sum(blocks[step] for step, _ in places)
        inside = {cell for index in indices for cell in grid.cells[index][2]}
        streams = {(cell.step, cell.branch, cell.block) for cell in inside if cell.step == min(step for step, _ in places)}
        most = max(most, len(inside) + len(streams))
    width = lens.architecture.width(next(iter(lens.architecture.denoisers(lens.pipe).values())))
    held = most * runs.clean.batch * runs.clean.layout.tokens * width * lens.pipe.dtype.itemsize
    return Cost(len(grid.cells), edits, rows, done, naive, held)
