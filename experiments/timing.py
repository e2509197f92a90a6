"""What is worked out from tables of readings: when each run decides, and which rows belong to which noise level.

All of it is arithmetic on results that are stored already, so that it may change without making them again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_lens import metrics
from dit_lens.experiment import Context

EARLY = 0.88
"""Noise level above which steps are early: that of step 20 of 50 in the setting of paper 2603.16870, from which on its
sensitivity curve says that pruning is done."""
COME = 0.9
"""Share of what is new in a part of the clip, from which on it has come."""
RUN = ["task", "sample", "seed"]


def clock_at(context: Context, inputs: Any, places: Sequence[float]) -> list[dict[str, Any]]:
    """Step, sigma, timestep and expert at some of the places of the settings."""
    last = len(context.lens.forecast(**inputs).timesteps) - 1
    return [clock for clock in context.clock(inputs) if clock["step"] in {round(place * last) for place in places}]


def decisions(readings: pd.DataFrame) -> pd.DataFrame:
    """When each run decides: one row per task, sample and seed, from the readings of one branch at several steps.

    Columns: ``decided`` and ``decided_sigma``, the place (0 the first step, 1 the last) and sigma of the first reading after
    which the answer that is shown most never changes (nan for samples with one answer); ``first_own``, whether the first
    reading shows the run's last answer, and ``first_other``, the last answer of the next seed: by chance, or because answers
    are not equally likely; ``came_first`` and ``came_last``, the places from which on what is new in the first and in the
    last third of the clip has come, and ``lag``, how much later the last third is.
    """
    ordered = readings.sort_values("step", kind="stable")
    steps, sigmas = (np.array(list(dict.fromkeys(ordered[name]))) for name in ("step", "sigma"))
    places = steps / max(1, steps[-1])
    rows = []
    for key, run in ordered.groupby(RUN, sort=False):
        shown, answers = run["shown"].to_numpy(), int(run["answers"].iloc[0])
        at = int(metrics.settled(shown == shown[-1]))
        several = answers > 1 and shown[-1] >= 0
        came = {
            f"came_{part}": places[min(int(metrics.settled(run[f"new_{part}"].to_numpy() >= COME)), len(places) - 1)]
            if run[f"new_{part}"].notna().all()
            else np.nan
            for part in ("first", "last")
        }
        rows.append(
            {
                **dict(zip(RUN, key, strict=True)),
                "answers": answers,
                "decided": places[at] if several else np.nan,
                "decided_sigma": sigmas[at] if several else np.nan,
                **came,
                "lag": came["came_last"] - came["came_first"],
            }
        )
    first = agreement(ordered)
    first = first.loc[first["step"] == steps[0], [*RUN, "own", "other"]]
    return pd.DataFrame(rows).merge(first.rename(columns={"own": "first_own", "other": "first_other"}), on=RUN, how="left")


def agreement(readings: pd.DataFrame) -> pd.DataFrame:
    """The readings of samples with several answers, with ``own``, whether the run's last answer is shown, and ``other``, whether
    that of the next seed is (nan where there is one seed, and in runs whose last reading shows none)."""
    several = readings[readings["answers"] > 1]
    last = several[several["step"] == several["step"].max()].set_index(RUN)["shown"]
    rolled = last.groupby(level=RUN[:2], sort=False).transform(lambda shown: np.roll(shown, -1))
    alone = last.groupby(level=RUN[:2], sort=False).transform("size") < 2
    keys = pd.MultiIndex.from_frame(several[RUN])
    found = several.assign(
        own=(several["shown"].to_numpy() == last.reindex(keys).to_numpy()).astype(float),
        other=(several["shown"].to_numpy() == rolled.reindex(keys).to_numpy()).astype(float),
    )
    unread = (last < 0).reindex(keys).to_numpy()
    return found.assign(own=found["own"].mask(unread), other=found["other"].mask(unread | alone.reindex(keys).to_numpy()))


def at_noise(figure: Figure, lowest: float) -> Figure:
    """A figure against sigma, from noise to a little below the lowest level that is of interest."""
    figure.axes[0].set_xlim(1.01, lowest - 0.02)
    return figure


def clustered(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``cluster`` that names the sample whatever the task."""
    return table.assign(cluster=table["task"] + "/" + table["sample"].astype(str))


def nearest(table: pd.DataFrame, sigma: float) -> pd.Series:
    """Which rows were read at the noise level that is nearest to this one."""
    levels = table["sigma"].dropna().unique()
    return table["sigma"] == levels[np.abs(levels - sigma).argmin()] if len(levels) else table["sigma"].notna()


def early(table: pd.DataFrame) -> pd.Series:
    """Which rows are of early steps: above `EARLY`, and below sigma 1, where a blend of all answers is forced."""
    return (table["sigma"] >= EARLY) & (table["sigma"] < 1 - 1e-6)


def any_of(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Whether a value is true in any row of each group; nan values are left out."""
    kept = table.dropna(subset=[value])
    return kept.groupby(list(by), sort=False)[value].max().reset_index()
