"""Where sweeps work: outcomes, the bench on which the edits of one batch of pairs are tried, and what all of it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dit_lens.activations import Activations, Entry
from dit_lens.editor import as_edits
from dit_lens.edits import Edit
from dit_lens.errors import InputError, listed
from dit_lens.grid import Grid, Place, Point, call_places
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.lens import Lens
from dit_lens.pairs import PairRuns, joined_inputs
from dit_lens.replay import Replay, Resume
from dit_lens.run import Run
from dit_lens.selection import Cell, Selector
from dit_lens.taps import Tap

EditOf = Callable[[Selector, PairRuns], Any]
"""What makes the edit, or the edits, of a cell: (selector of the cell, the runs of some pairs) -> edits."""

SAME_STEP = ("velocity", "x0_hat")


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
        cells, edits, rows: how many places of the grid, edits of each of them (with controls), and pairs times seeds.
        block_forwards: blocks that run for a row. without_reuse: the same for whole runs, or runs up to the edited step
            where no outcome looks beyond it; the donors' activations taken from their runs.
        held_bytes: of activations, and of arguments of denoiser calls, that lie on the device at a time, at most; with
            controls that use `PairRuns.other`, the activations of donors lie there twice.
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
class Bench:
    """Where the edits of one batch of pairs are tried.

    Raises:
        InputError: the pairs follow another schedule than the grid is labelled with.
    """

    lens: Lens
    grid: Grid
    runs: PairRuns
    outcomes: Sequence[Outcome]
    reuse: bool
    known: dict[Any, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Outcomes of the clean and the donor runs, by outcome and call."""

    def __post_init__(self) -> None:
        foreseen, clean = self.grid.extent.forecast, self.runs.clean
        if clean.timesteps != foreseen.timesteps or set(clean.branches) != set(foreseen.branches):
            raise InputError(
                f"pairs {self.runs.places[0]} to {self.runs.places[-1]} ran {clean.steps} steps with the branches"
                f" {listed(clean.branches)}, and the first pair has {len(foreseen.timesteps)} with {listed(foreseen.branches)};"
                " all pairs are to have the same schedule and guidance"
            )

    def baselines(self, outcome: Outcome, place: Place) -> tuple[np.ndarray, np.ndarray]:
        """The outcome of the clean and of the donor runs."""
        key = (outcome.name, place if outcome.of in SAME_STEP else None)
        if key not in self.known:
            clean, donor = (
                outcome(self.shown(outcome, run, place), self.runs.pairs) for run in (self.runs.clean, self.runs.donor)
            )
            self.known[key] = (clean, donor)
        return self.known[key]

    def shown(self, outcome: Outcome, run: Run | Replay, place: Place) -> Tensor:
        """What an outcome measures of a run, or of the call at `place` made again."""
        if outcome.of in SAME_STEP:
            of_run = isinstance(run, Run)
            if outcome.of == "velocity":
                return run.velocity(*place) if of_run else run.velocity
            x0_hat = run.x0_hat(*place) if of_run else run.x0_hat
            return self.lens.decode(x0_hat) if outcome.decoded else x0_hat
        assert isinstance(run, Run)
        if outcome.of == "latents":
            return run.latents[-1]
        if run.video is None:  # it was to be decoded, as an outcome asks for it
            raise InputError(
                f"outcome {outcome.name!r} is of the video, and a {type(self.lens.pipe).__name__} shows none; write of='latents',"
                " 'x0_hat' or 'velocity'"
            )
        return run.video

    def observed(self, run: Run, cells: Sequence[Cell]) -> Activations:
        """Activations of a run at these cells, on the model's device: its calls are made again, once each."""
        found: dict[Cell, Entry] = {}
        for place in call_places(cells):
            call = run.calls[place]
            here = [cell for cell in cells if (cell.step, cell.branch) == place]
            shape = run.layout.shape

            def tap(cell: Cell, shape: tuple[int, int, int] = shape) -> Tap:
                def visit(tensor: Tensor) -> None:
                    order = shape if cell.stream == "visual" else (1, 1, tensor.shape[1])
                    found[cell] = Entry(cell, 0, "full", tensor.detach().unflatten(1, order))

                return Tap(cell.expert, cell.block, cell.site, visit, cell.stream)

            self.lens.replay(call, taps=[tap(cell) for cell in here])
        return Activations([found[cell] for cell in cells])

    def tried(
        self, place: Place, edits: Sequence[Edit | ReplaceLatents], streams: Mapping[tuple[Place, int], Any]
    ) -> dict[str, np.ndarray]:
        """Every outcome of the clean runs under these edits; an outcome of the same step is that of the call at `place`."""
        touched = [cell for edit in edits if isinstance(edit, Edit) for cell in edit.at.cells(self.grid.extent)]
        rewritten = [step for edit in edits if isinstance(edit, ReplaceLatents) for step in edit.steps(self.grid.extent)]
        answers = self.answers(touched, rewritten, streams) if self.reuse else {}
        late = any(outcome.of not in SAME_STEP for outcome in self.outcomes)
        if self.reuse and not late and not rewritten and call_places(touched) == (place,):
            resume = answers.get(place)
            again = self.lens.replay(
                self.runs.clean.calls[place], edits=edits, resume=resume if isinstance(resume, Resume) else None
            )
            # On the CPU, where the x0-hat of a run is computed too: elsewhere it could round differently.
            edited: Run | Replay = replace(again, velocity=again.velocity.cpu())
        else:
            inputs = joined_inputs([pair.clean for pair in dict(zip(self.runs.places, self.runs.pairs, strict=True)).values()])
            seeds = self.runs.clean.seeds[: self.runs.places.count(self.runs.places[0])]
            decode = any(outcome.of == "video" for outcome in self.outcomes)
            # Of answers for later steps than the last that runs, none is asked for.
            how: Any = {"edits": edits, "answers": answers, "decode": decode, "until": None if late else place[0]}
            edited = self.lens.run(**inputs, seed=list(seeds), **how)
        return {outcome.name: outcome(self.shown(outcome, edited, place), self.runs.pairs) for outcome in self.outcomes}

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


def measured_rows(
    bench: Bench, calls: tuple[Place, ...], points: Sequence[Point], edits: Mapping[str, EditOf]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every point and edit, for one batch of pairs and the points in the same calls.

    What is held on the device for these points is let go when they are done.
    """
    cells = list(dict.fromkeys(cell for point in points for cell in point.cells))
    runs = bench.runs.with_donor_activations(bench.observed(bench.runs.donor, cells))
    streams = _streams(bench, points) if bench.reuse else {}
    for point in points:
        for name, make in edits.items():
            values = bench.tried(calls[0], as_edits(make(point.selector, runs)), streams)
            yield [row for outcome in bench.outcomes for row in _rows(bench, outcome, calls[0], point.labels, name, values)]


def _rows(
    bench: Bench, outcome: Outcome, place: Place, labels: Mapping[str, Any], name: str, values: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """One row of the table for every row of the batch."""
    clean, donor = bench.baselines(outcome, place)
    seeds = bench.runs.clean.seeds
    for row, sample in enumerate(bench.runs.places):
        numbers = {"value": values[outcome.name][row], "clean": clean[row], "donor": donor[row]}
        yield {**labels, "edit": name, "sample": sample, "seed": seeds[row], "outcome": outcome.name, **numbers}


def _streams(bench: Bench, points: Sequence[Point]) -> dict[tuple[Place, int], Any]:
    """What the blocks before the edited ones hand on in the clean run, at the first step that is edited."""
    cells = [
        Cell(bench.runs.clean.experts[place[0]], *place, block - 1, "resid", stream)
        for place, block in _resumed(points)
        for stream in bench.grid.extent.stack(bench.runs.clean.experts[place[0]], block - 1).streams
    ]
    found: dict[tuple[Place, int], Any] = {}
    for entry in bench.observed(bench.runs.clean, cells):
        found.setdefault(((entry.cell.step, entry.cell.branch), entry.cell.block), {})[entry.cell.stream] = entry.tensor
    return found


def _resumed(points: Sequence[Point]) -> list[tuple[Place, int]]:
    """The calls that can start at a later block than the first, with that block, each once."""
    return list(dict.fromkeys(start for point in points for start in point.starts.items() if start[1] > 0))


def cost_of(bench: Bench, edits: int, rows: int, batch: int) -> Cost:
    """What a sweep does, taking every edit to act at its own place; `batch` is the number of rows of the largest batch."""
    lens, grid, runs = bench.lens, bench.grid, bench.runs
    extent, architecture = grid.extent, lens.architecture
    blocks = [extent.blocks[expert] for expert in extent.forecast.experts]
    denoiser = next(iter(architecture.denoisers(lens.pipe).values()))
    dtype = getattr(lens.pipe, "dtype", next(denoiser.parameters()).dtype)
    branches = len(extent.forecast.branches)
    whole = branches * sum(blocks)
    late = any(outcome.of not in SAME_STEP for outcome in bench.outcomes)
    shortest = naive = 2 * whole
    for point in grid.points:
        first = min(step for step, _ in point.calls)
        at_first = sum(blocks[first] - block for block in point.starts.values())
        shortest += edits * (at_first + late * branches * sum(blocks[first + 1 :]))
        naive += edits * (whole if late else branches * sum(blocks[: first + 1]))
    observed = most = 0
    for calls, points in grid.groups().items():
        resumed = _resumed(points) if bench.reuse else []
        observed += sum(blocks[step] for step, _ in calls)
        shortest += sum(blocks[step] for step, _ in dict.fromkeys(place for place, _ in resumed))
        cells = {cell for point in points for cell in point.cells}
        sites = [extent.site(cell) for cell in cells]
        held = sum(site.side_by_side * (4 if site.in_float32 else dtype.itemsize) for site in sites)
        most = max(most, held + len(resumed) * len(architecture.streams) * dtype.itemsize)
    width = architecture.width(denoiser)
    activations = most * batch * runs.clean.layout.tokens * width
    every = [call for run in (runs.clean, runs.donor) for call in run.calls.values()]
    taken = {
        one.data_ptr(): one.nbytes for call in every for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor)
    }
    held_bytes = activations + sum(taken.values()) * batch // runs.clean.batch
    return Cost(len(grid.points), edits, rows, observed + (shortest if bench.reuse else naive), naive, held_bytes)
