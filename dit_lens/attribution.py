"""Attribution patching: what patching every cell of a denoiser call would do, estimated from one backward pass.

To first order, putting a donor's activation d in place of the clean one c changes an outcome by (d - c) times the outcome's
gradient at c (Nanda 2023, "Attribution Patching"; Syed et al. 2023, arXiv 2310.10348). One call of the clean run made
again forwards and backwards, and one of the donor's, give this for every block, site, head and token at once, where
patching takes a call for each.

It is an estimate, and it fails where the outcome is not linear on the way (a saturated softmax, a feature that two blocks
write). So every result comes with its agreement with real patches of the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from dit_lens.bench import SAME_STEP, Bench, Outcome
from dit_lens.calls import DenoiserCall
from dit_lens.edits import Patch
from dit_lens.errors import InputError, listed
from dit_lens.grid import Grid, Place, Point
from dit_lens.lens import Lens
from dit_lens.pairs import batches, joined_inputs, run_pairs
from dit_lens.selection import Cell, Selector
from dit_lens.statistics import Interval, mean_interval, summarise
from dit_lens.sweeping import EDIT, LIMIT_BYTES, effect, labels_of, swept
from dit_lens.taps import Tap


@dataclass(frozen=True, eq=False)
class Attribution:
    """What attribution patching estimated, and how well that agrees with patching.

    Attributes:
        table: one row for each cell, pair and seed: the axes of the cell, `sample`, `seed`, the `estimate` of what the
            patch changes, in the outcome's own unit, the outcome in the `clean` and the `donor` run, and `effect`, the
            estimate as a share of the way between them; in cells that were patched too, `patched` is the real change.
        axes: the named axes of `over`.
        spearman: rank correlation of estimate and patch over cells, taken within each pair and averaged; interval over pairs.
        sign: share of cells and pairs in which both have the same sign; interval over pairs.
        top: of the tenth of the patched cells whose patch changes most, the share that is in the tenth of the largest
            estimates too, within each pair and averaged; interval over pairs. Chance is a tenth.
        calls: denoiser calls, forwards and backwards, that the estimates took for a row; patching them would take
            `calls_patching`.
    """

    table: pd.DataFrame
    axes: tuple[str, ...]
    spearman: Interval
    sign: Interval
    top: Interval
    calls: int
    calls_patching: int

    def __str__(self) -> str:
        measured = (self.spearman, self.sign, self.top)
        rho, sign, top = (f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]" for found in measured)
        return (
            f"attribution of {self.calls_patching} cells in {self.calls} calls; against real patches of"
            f" {self.table['patched'].notna().sum()} cells and rows: Spearman {rho}, same sign {sign}, largest tenth found {top},"
            f" N = {self.sign.clusters}"
        )

    def summary(self, value: str = "effect") -> pd.DataFrame:
        """Mean over pairs and seeds for every cell, with a bootstrap interval over pairs; value is a column of
        the table: `effect`, `estimate` or `patched`."""
        return summarise(self.table, value, [*self.axes, *labels_of(self.table, self.axes)])

    def agreement(self, by: str) -> pd.DataFrame:
        """How well estimates agree with patches among the cells of each value of an axis, as `spearman`, `sign` and `top`.

        Raises:
            InputError: there is no such axis.
        """
        if by not in self.table or by not in (*self.axes, *labels_of(self.table, self.axes)):
            raise InputError(f"there is no axis {by!r}; write one of {listed(self.axes)}")
        rows = []
        for value, group in self.table.dropna(subset=["patched"]).groupby(by, sort=False):
            found = dict(zip(("spearman", "sign", "top"), _agreement(group), strict=True))
            rows.append(
                {by: value, "cells": len(group), **{k: v.estimate for k, v in found.items()}}
                | {f"{k}_{end}": getattr(v, end) for k, v in found.items() for end in ("low", "high")}
            )
        return pd.DataFrame(rows)


def attribute(
    lens: Lens,
    pairs: Sequence[Any],
    over: Selector,
    outcome: Outcome,
    *,
    seeds: Sequence[int] = (0,),
    batch: int = 16,
    check: int = 32,
    progress: bool = True,
) -> Attribution:
    """Estimate what patching each cell with the donor's activation would change, and check it against real patches.

    Args:
        pairs: each has a `clean` and a `donor` (see `Pair`). over: which cells, as for `sweep`; `step` and `branch` are to be
            named. outcome: of the `velocity` or the `x0_hat` of the step, not decoded; its measure is to be differentiable:
            torch in, torch out.
        seeds, batch, progress: as for `sweep`.
        check: how many cells to patch really, spread evenly over all of them; at least two.

    Raises:
        InputError: an outcome without a gradient, cells of several calls, or fewer than two cells to check.
    """
    if outcome.of not in SAME_STEP or outcome.decoded:
        raise InputError(f"outcome {outcome.name!r}: attribution needs one of='velocity' or of='x0_hat' that is not decoded")
    if not pairs or not seeds:
        raise InputError(f"attribution needs pairs and seeds: there are {len(pairs)} and {len(seeds)}")
    grid = Grid(over, lens.extent(**joined_inputs([pairs[0].clean])))
    if check < 2 or len(grid.points) < 2:
        raise InputError(
            f"check={check} of {len(grid.points)} cells: an estimate comes with its agreement with real patches over cells, so"
            " name blocks in over= and check 2 or more"
        )
    grid.check_single()
    if any(len(point.cells) > 1 for point in grid.points):
        raise InputError(f"{over} patches several blocks together, and one may undo another's: name block= (or depth=) in over=")
    rows: list[dict[str, Any]] = []
    groups = grid.groups()
    parts = batches(len(pairs), batch)
    with tqdm(total=len(parts) * len(groups), desc="attribution", unit="call", disable=not progress) as bar:
        for places in parts:
            runs = run_pairs(lens, [pairs[i] for i in places], places, seeds, keep_calls=True, decode=False)
            bench = Bench(lens, grid, runs, [outcome], reuse=True)
            for (place,), points in groups.items():
                rows += _estimates(bench, place, points)
                bar.update()
    table = pd.DataFrame(rows)
    table["effect"] = effect(table["estimate"], table)
    chosen = np.unique(np.linspace(0, len(grid.points) - 1, min(check, len(grid.points))).round().astype(int))
    edits = {EDIT: lambda cell, runs: Patch(cell, runs.donor)}
    real = swept(lens, pairs, edits, grid.only(chosen.tolist()), [outcome], seeds, batch, True, LIMIT_BYTES, progress).table
    real["patched"] = real["value"] - real["clean"]
    keys = [*grid.axes, "sample", "seed"]
    table = table.merge(real[[*keys, "patched"]], how="left", on=keys)
    spearman, sign, top = _agreement(table.dropna(subset=["patched"]))
    return Attribution(table, grid.axes, spearman, sign, top, 3 * len(groups), len(grid.points))


def _estimates(bench: Bench, place: Place, points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row of the table for every point in a call, and every row of the batch."""
    (outcome,), runs, shape = bench.outcomes, bench.runs, bench.runs.clean.layout.shape
    baselines = bench.baselines(outcome, place)
    cells = list(dict.fromkeys(cell for point in points for cell in point.cells))
    clean, donor = runs.clean.calls[place], runs.donor.calls[place]
    products = _products(bench.lens, clean, donor, cells, lambda shown: outcome.measure(shown, runs.pairs), outcome.of)
    rows: list[dict[str, Any]] = []
    for point in points:
        (cell,) = point.cells
        found = point.selector.take_tokens(products[cell].unflatten(1, shape)).flatten(1).sum(dim=1).cpu()
        numbers = zip(runs.places, runs.clean.seeds, found.tolist(), *baselines, strict=True)
        names = ("sample", "seed", "estimate", "clean", "donor")
        rows += [{**point.labels, **dict(zip(names, one, strict=True))} for one in numbers]
    return rows


def _products(
    lens: Lens,
    clean: DenoiserCall,
    donor: DenoiserCall,
    cells: Sequence[Cell],
    measure: Callable[[Tensor], Any],
    of: str,
) -> Mapping[Cell, Tensor]:
    """(donor - clean) * gradient of the summed outcome, at every cell, in the shape of the activation."""
    theirs: dict[Cell, Tensor] = {}
    ours: dict[Cell, Tensor] = {}
    leaves: dict[Cell, Tensor] = {}

    def reading(cell: Cell, found: dict[Cell, Tensor]) -> Tap:
        def visit(tensor: Tensor) -> None:
            found[cell] = tensor.detach()

        return Tap(cell.expert, cell.block, cell.site, visit, cell.stream)

    def growing(cell: Cell) -> Tap:
        def visit(tensor: Tensor) -> Tensor:
            # Zeros that are added to the activation: their gradient is the activation's.
            leaves[cell] = torch.zeros_like(tensor, requires_grad=True)
            return tensor + leaves[cell]

        return Tap(cell.expert, cell.block, cell.site, visit, cell.stream)

    def grown(cell: Cell) -> Cell:
        """Where the gradient is: a change of the update is the same change of the stream that it is added to."""
        return replace(cell, site="resid") if cell.site == "update" else cell

    lens.replay(donor, taps=[reading(cell, theirs) for cell in cells])
    grown_cells = list(dict.fromkeys(grown(cell) for cell in cells))
    taps = [*(reading(cell, ours) for cell in cells), *(growing(cell) for cell in grown_cells)]
    again = lens.replay(clean, taps=taps, gradients=True)
    with torch.enable_grad():
        # On the CPU, as for a sweep.
        shown = replace(again, velocity=again.velocity.cpu())
        values = measure(shown.velocity if of == "velocity" else shown.x0_hat)
        if not isinstance(values, Tensor) or not values.requires_grad:
            raise InputError("attribution needs an outcome with a gradient: a measure of torch operations that returns a tensor")
        gradients = dict(zip(leaves, torch.autograd.grad(values.sum(), list(leaves.values())), strict=True))
    return {cell: (theirs[cell].float() - ours[cell].float()) * gradients[grown(cell)].float() for cell in cells}


def _agreement(table: pd.DataFrame) -> tuple[Interval, Interval, Interval]:
    """Spearman's rank correlation within each pair and seed, the share of equal signs, and that of the largest that are found;
    intervals over pairs."""
    ranks, samples, found, pairs = [], [], [], []
    for _, group in table.groupby(["sample", "seed"]):
        # Where all cells do the same, as in a model that reads nothing, there is nothing to rank.
        if group["estimate"].nunique() > 1 and group["patched"].nunique() > 1:
            ranks.append(spearmanr(group["estimate"], group["patched"])[0])
            samples.append(group["sample"].iloc[0])
        largest = max(1, round(len(group) / 10))
        tops = [set(group[name].abs().nlargest(largest).index) for name in ("patched", "estimate")]
        found.append(len(tops[0] & tops[1]) / largest)
        pairs.append(group["sample"].iloc[0])
    same = np.sign(table["estimate"].to_numpy()) == np.sign(table["patched"].to_numpy())
    return (
        mean_interval(ranks, samples),
        mean_interval(same, table["sample"]),
        mean_interval(found, pairs),
    )
