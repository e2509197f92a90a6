"""Readable and decided: where an answer can be read for the first time, beside where patching still changes it.

    decided(read_map(store, samples), dl.sweep(lens, pairs, patch_update, dl.at(block="all", step="all", site="update"), flip))

A probe may read an answer long before it is settled (what is read is not used, or can still be turned) or only after (it is
written in a form that the probe does not know). So two places are named by rules that are fixed here. Cells come in the order in
which a run reaches them: all blocks of a step, then the next step.

*Readable*: the first cell at which the lower end of the probe's interval is above its control task and above the upper
ends of all baselines of the same step (those of a block count at that block only). The map has no single samples any more, so
there is no bootstrap of that cell; *maybe readable* is the first cell at which the upper end is above them, and the truth lies
between these two as far as the ends of the intervals can be trusted, each by itself. Of hundreds of cells at chance some are
above by luck; `lasting` asks the same of the blocks that follow.

*Decided*: an edit has an effect at a cell where the mean over pairs, less 1.96 standard errors, is above `LEAST` and above the
mean of every control plus 1.96 standard errors. The `first` and the `last` such step, and the `peak`, the cell with the largest
mean among them, are found again in bootstrap samples of the pairs, and their intervals are percentiles of what came out. After
the last one nothing that was edited changes the answer: by then it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

import dit_lens as dl
from dit_lens.errors import InputError, listed
from dit_lens.statistics import LEVEL
from dit_lens.sweeping import EDIT
from probes.controls import CONTROL
from probes.maps import PROBE

LEAST = 0.05
"""The smallest effect that counts, as a share of the way from clean to donor: where pairs are alike, rounding is an effect."""
ERRORS = 1.96
"""Standard errors on either side of a mean: 95 % of a normal distribution."""
RESAMPLES = 500
MAPS = ["target", "content", "kind", "expert", "branch", "site", "stream"]
CELL = ["step", "block"]


def decided(
    table: pd.DataFrame,
    sweep: dl.Sweep,
    outcome: str | None = None,
    *,
    lasting: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Both places for every target of a map.

    Args:
        table: as `read_map` returns it. sweep: of an edit over blocks and steps; its controls are those of the edit.
        outcome: which one, where the sweep has several. lasting: as for `readable`. resamples, seed: of the bootstrap.

    Returns:
        A row for each target (and branch and site of the map): the columns of `readable` and of `edited`.

    Raises:
        InputError: tables that lack columns, or a sweep with other axes.
    """
    return readable(table, lasting).merge(edited(sweep, outcome, resamples=resamples, seed=seed), how="cross")


def readable(table: pd.DataFrame, lasting: int = 1) -> pd.DataFrame:
    """Where each target of a map can be read for the first time.

    Args:
        table: as `read_map` returns it. lasting: at how many recorded blocks of the step in turn, or up to the last of them.

    Returns:
        A row for each target (and branch and site): `readable_step`, `readable_block`, `readable_sigma`, `readable_score`, and
        `maybe_step` and `maybe_block`; none where it is read nowhere. `baselines` are the readers that it was held against.
    """
    lacking = [name for name in ("reader", "target", *CELL, "estimate", "low", "high", CONTROL) if name not in table]
    if lacking:
        raise InputError(f"the map lacks {listed(lacking)}; give what read_map returns")
    probes, baselines = table[table["reader"] == PROBE], table[table["reader"] != PROBE]
    named = [name for name in MAPS if name in table]
    rows = []
    for key, part in probes.groupby(named, sort=False, dropna=False):
        labels = dict(zip(named, key, strict=True))
        part = part.sort_values(CELL)
        shared = [name for name in ("target", "expert", "branch") if name in baselines]
        same = baselines[(baselines[shared] == pd.Series({name: labels[name] for name in shared})).all(axis=1)]
        level = np.array([_level(same, row) for row in part.to_dict("records")])
        sure, maybe = (_place(part, part[end] > level, lasting) for end in ("low", "high"))
        found = {f"readable_{name}": sure[name] for name in (*CELL, "sigma")} | {"readable_score": sure["estimate"]}
        found |= {f"maybe_{name}": maybe[name] for name in CELL}
        rows.append({**labels, **found, "baselines": ", ".join(same["reader"].unique())})
    integers = {f"{kind}_{axis}": "Int64" for kind in ("readable", "maybe") for axis in CELL}
    return pd.DataFrame(rows).astype(integers)


def edited(sweep: dl.Sweep, outcome: str | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Where an edit changes the outcome.

    Returns:
        One row: `first_step`, `last_step`, `peak_step`, `peak_block`, each with `_low` and `_high`; `peak_effect`; `outcome`;
        `pairs`; and `nowhere`, the share of bootstrap samples in which the edit has an effect at no cell.
    """
    names = list(dict.fromkeys(sweep.table["outcome"]))
    if (outcome is None and len(names) > 1) or (outcome is not None and outcome not in names):
        raise InputError(f"name outcome=, one of {listed(names)}")
    table = sweep.table[sweep.table["outcome"] == (outcome or names[0])]
    others = [axis for axis in sweep.axes if axis not in CELL and table[axis].nunique() > 1]
    if not set(CELL) <= set(sweep.axes) or others:
        raise InputError(f"the sweep has the axes {listed(sweep.axes)}; sweep over block= and step=, with one value of any other")
    # One number for each pair: its seeds are no pairs of their own.
    each = table.groupby(["edit", *CELL, "sample"])["effect"].mean().unstack("sample")
    each = each.loc[:, each.notna().all()]
    if each.shape[1] < 2:
        raise InputError(f"an interval needs 2 pairs whose clean and donor outcomes differ, and there are {each.shape[1]}")
    cells = each.loc[EDIT].index
    controls = [name for name in each.index.get_level_values("edit").unique() if name != EDIT]
    values = np.stack([each.loc[name].reindex(cells).to_numpy() for name in (EDIT, *controls)])
    steps, blocks = (cells.get_level_values(axis).to_numpy() for axis in CELL)
    generator = np.random.default_rng(seed)
    drawn = [_edited(values[..., generator.integers(each.shape[1], size=each.shape[1])], steps, blocks) for _ in range(resamples)]
    found, defined = _edited(values, steps, blocks), [one for one in drawn if one]
    row: dict[str, Any] = {
        "outcome": outcome or names[0],
        "pairs": each.shape[1],
        "nowhere": 1 - len(defined) / max(1, resamples),
    }
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    for name in ("first_step", "last_step", "peak_step", "peak_block"):
        # Places are whole numbers, and so are the ends of their intervals.
        low, high = (
            np.quantile([one[name] for one in defined], tails, method="inverted_cdf") if found and defined else (pd.NA, pd.NA)
        )
        row |= {name: found[name] if found else pd.NA, f"{name}_low": low, f"{name}_high": high}
    row["peak_effect"] = found["peak_effect"] if found else np.nan
    places = [name for name in row if "_step" in name or "_block" in name]
    return pd.DataFrame([row]).astype(dict.fromkeys(places, "Int64"))


def _edited(
    values: Float[np.ndarray, "edits cells pairs"], steps: Int[np.ndarray, " cells"], blocks: Int[np.ndarray, " cells"]
) -> dict[str, Any]:
    """Where the first of the edits has an effect; nothing where it has none."""
    means, errors = values.mean(axis=-1), values.std(axis=-1, ddof=1) / np.sqrt(values.shape[-1])
    level = np.maximum(LEAST, (means[1:] + ERRORS * errors[1:]).max(axis=0, initial=LEAST))
    works: Bool[np.ndarray, " cells"] = means[0] - ERRORS * errors[0] > level
    if not works.any():
        return {}
    peak = int(np.where(works, means[0], -np.inf).argmax())
    found = {"first_step": steps[works].min(), "last_step": steps[works].max()}
    return {**found, "peak_step": steps[peak], "peak_block": blocks[peak], "peak_effect": means[0, peak]}


def _level(baselines: pd.DataFrame, row: Mapping[Any, Any]) -> float:
    """What a probe's score at a cell is to be above."""
    here = baselines[baselines["step"].isna() | (baselines["step"] == row["step"])]
    if "block" in here:
        here = here[here["block"].isna() | (here["block"] == row["block"])]
    # Where the control task has an interval, its upper end counts, as those of the baselines do.
    beside: Sequence[float] = [*here["high"].fillna(here["estimate"]), row.get(f"{CONTROL}_high", row[CONTROL])]
    return float(np.nanmax([*beside, -np.inf]))


def _place(part: pd.DataFrame, above: pd.Series, lasting: int) -> dict[str, Any]:
    """The first row that is above, and those after it in the same step."""
    there = above.copy()
    for after in range(1, lasting):
        there &= above.groupby(part["step"]).shift(-after, fill_value=True)
    names = [*CELL, "sigma", "estimate"]
    if not there.any():
        return {name: pd.NA if name in CELL else np.nan for name in names}
    first = part.iloc[int(there.to_numpy().argmax())]
    return {name: first[name] if name in part else np.nan for name in names}
