"""What the ensemble shows: what merging gains by window, by number of seeds, against what costs as much, and what it does."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments import merging
from experiments.merging import Merge

TOGETHER = "all of these"
COMPARED = {
    merging.ORACLE: merging.ORACLE,
    merging.VOTE: merging.VOTE,
    merging.LONG: merging.LONG,
    merging.LONGER: merging.LONGER,
}
COND = f"{merging.HIDDEN}, {merging.MIDDLE}, cond branch only"
WAYS = [
    *(f"{merging.HIDDEN}, {window}" for window in merging.WINDOWS),
    COND,
    f"{merging.ON_SCHEDULE}, {merging.MIDDLE}",
    merging.VELOCITY,
    merging.X0_HAT,
    merging.LATENTS,
    merging.RESCALED,
    *COMPARED,
]
"""From the top down."""
COMPARATOR = "no merging"
GAIN = "Gain: right or not, minus what the same seed of the same sample is without."
INTERVALS = "95 % bootstrap intervals over samples"
SEEDS = "Every sample of a task has seeds of its own."


def way_of(one: Merge) -> str:
    """What a way to merge is called, with where the mean goes."""
    return f"{one.what}{', ' * bool(one.window)}{one.window}, {one.to}"


def named(results: pd.DataFrame, measure: str = merging.RIGHT) -> pd.DataFrame:
    """The rows of one measure, each with its way and its series."""
    here = results[results["measure"] == measure]
    window, branch = here["window"].fillna(""), here["branch"].fillna("both")
    way = here["what"].where(window == "", here["what"] + ", " + window)
    way = way.where(branch == "both", COND)
    return here.assign(way=way, series=here["to"].fillna(COMPARATOR))


def gains(context: Context, results: pd.DataFrame) -> None:
    """The gain of every way, for every setup, beside what costs as much."""
    here = named(results)
    here = here[(here["k"] == context.settings.seeds) & (here["what"] != merging.NONE)]
    each = here.groupby(["setup", "series", "way", "cluster", "case"], sort=False)["gain"].mean().reset_index()
    # As in the claims, the setups of a sample weigh the same.
    merged = each.groupby(["series", "way", "cluster"], sort=False)["gain"].mean().reset_index()
    both = pd.concat([each, merged.assign(setup=TOGETHER)]) if each["setup"].nunique() > 1 else each
    summary = summarise(both, "gain", ["setup", "series", "way"], cluster="cluster")
    every = named(results)
    unmerged = every[(every["k"] == context.settings.seeds) & (every["what"] == merging.NONE)]
    alone = summarise(unmerged, "value", ["setup"], cluster="case")
    figure = intervals(summary, WAYS, f"gain over no merging, K = {context.settings.seeds} seeds")
    without = "; ".join(f"{row.setup}: {row.mean:.3f}" for row in alone.itertuples())
    context.figure(
        "gains",
        figure,
        "What merging seeds at the first step gains",
        f"{GAIN} {SEEDS} {INTERVALS}, N of them at the top, or at the right where ways differ. All of these: the setups of a"
        f" sample weigh the same, as in the claims. On schedule: see the table of the claims' numbers. Right without merging"
        f" (all seeds): {without}. Best of K and vote cost K times as much and are compared with the mean of their seeds; the"
        " oracle is the most that choosing among them can give.",
    )


def by_count(context: Context, results: pd.DataFrame) -> None:
    """The gain against the number of seeds, with few steps."""
    here = named(results)
    here = here[here["set"] == 0]
    here = here[
        here["what"].isin([merging.HIDDEN, merging.VELOCITY, merging.VOTE, merging.ORACLE])
        & here["way"].isin([f"{merging.HIDDEN}, {merging.MIDDLE}", merging.VELOCITY, merging.VOTE, merging.ORACLE])
    ]
    several = here.groupby("setup")["k"].transform("nunique") > 1
    here = here[several & ~((here["what"] == merging.VELOCITY) & (here["to"] == merging.TO_ONE))]
    if here.empty:
        return
    here = here.assign(line=np.where(here["what"] == merging.HIDDEN, "middle window, " + here["series"], here["way"]), row="gain")
    figure = plots.curve_grid(
        summarise(here, "gain", ["setup", "line", "k", "row"], cluster="case"),
        x="k",
        x_label="K, the number of seeds",
        row="row",
        column="setup",
        series="line",
        controls=[merging.VOTE, merging.ORACLE],
        row_labels={"gain": "gain over no merging"},
        lines_at={"gain": 0.0},
    )
    context.figure(
        "seeds",
        figure,
        "More seeds",
        f"{GAIN} {SEEDS} Fewer seeds are the first of more. Shaded: {INTERVALS}, N of them in the corner. Vote and oracle:"
        " K whole runs.",
    )


def lengths(context: Context, results: pd.DataFrame) -> None:
    """How much shorter the mean of the seeds is than they are, by block."""
    here = results[results["measure"] == merging.LENGTH]
    if here.empty:
        return
    here = here.assign(row="length")
    blocks = here[here["what"] == merging.HIDDEN].astype({"block": int})
    levels = summarise(here[here["what"] != merging.HIDDEN], "value", ["setup", "what", "row"], cluster="case")
    figure = plots.curve_grid(
        summarise(blocks, "value", ["setup", "what", "row", "block"], cluster="case"),
        x="block",
        x_label="block",
        row="row",
        column="setup",
        series="what",
        row_labels={"length": "length of the mean\n/ mean length"},
        levels=levels,
        limits={"length": (0, 1.03)},
        lines_at={"length": context.settings.seeds**-0.5},
    )
    context.figure(
        "lengths",
        figure,
        "Averaging shortens what seeds do not share",
        f"Length (L2) of the mean over {context.settings.seeds} seeds, over their mean length, first step, cond branch: 1 where"
        f" seeds agree, {context.settings.seeds**-0.5:.2f} (line) where they are independent. Hidden states: mean over tokens of"
        f" the stream after the block. Dashed: what else is merged. Shaded: {INTERVALS}.",
    )


def numbers(context: Context, results: pd.DataFrame) -> None:
    """Every way in numbers, and what averaging does to the velocity of the first step."""
    here = named(results)
    here = here[here["k"] == context.settings.seeds]
    rows = []
    for (setup, series, way), table in here.groupby(["setup", "series", "way"], sort=False):
        told = {"right": "value", "gain": "gain", "same answer as the seed alone": "same"}
        shares = {title: in_words(summarise(table, column, ["setup"], cluster="case"), 3) for title, column in told.items()}
        several = table.groupby(["case", "set"]).filter(lambda seeds: len(seeds) > 1)
        agreed = several.groupby(["case", "set"])["answer"].agg(agreement)
        rows.append(
            {"setup": setup, "merged": way, "to": series, **shares, "seeds agree": f"{agreed.mean():.2f}" if len(agreed) else "-"}
            | {"denoiser calls": int(table["calls"].iloc[0]), "samples": table["case"].nunique()}
        )
    context.table(
        "What merging does",
        pd.DataFrame(rows),
        f"First step, K = {context.settings.seeds}, {INTERVALS}. {SEEDS} Seeds agree: how often two seeds of a sample's set that"
        " went on show the same answer. Denoiser calls: for one video.",
    )
    usual = results[results["k"] == context.settings.seeds]
    apart = {
        measure: summarise(named(usual, measure), "value", ["setup", "way"], cluster="case")
        for measure in (merging.FROM_ALL, merging.FROM_VELOCITY)
    }
    both = pd.concat([table.assign(measure=measure) for measure, table in apart.items()], ignore_index=True)
    if both.empty:
        return
    told = [f"{row['mean']:.1e} [{row['low']:.1e}, {row['high']:.1e}]" for _, row in both.iterrows()]
    wide = both.assign(told=told).pivot(index=["setup", "way"], columns="measure", values="told").reset_index()
    context.table(
        "The velocity of the first step after merging into all seeds",
        wide,
        "L2 distance of the cond velocity from the one after another way to merge, over the length of that. Written to all,"
        " streams are one from the window's first block on: what begins with all blocks ends as all blocks do, but for rounding.",
    )


def examples(context: Context, name: str, pictures: Mapping[str, np.ndarray]) -> None:
    """What each seed of the first sample shows without merging and with it, in x0-hat of the first step and in the video."""
    order = [
        merging.NONE,
        *(way_of(Merge(merging.HIDDEN, to, merging.MIDDLE)) for to in (merging.TO_ALL, merging.TO_ONE)),
        *(way_of(Merge(merging.VELOCITY, to)) for to in (merging.TO_ALL, merging.TO_ONE)),
    ]
    there = [way for way in order if way in pictures]
    seeds = pictures[merging.NONE].shape[1]
    sheet = np.stack([np.concatenate([pictures[way][0], pictures[way][1]]) for way in there])
    columns = [f"{what}\nseed {seed}" for what in ("x0-hat,", "video,") for seed in range(seeds)]
    figure = plots.film(sheet, [way.replace(", written", ",\nwritten") for way in there], columns)
    context.figure(
        f"pictures-{name}",
        figure,
        f"{name}, {context.settings.few_steps} steps: one sample",
        "Last frames of the first held-out sample (not selected): x0-hat of the first step, and the video, by seed. White: seeds"
        " that the mean was not written to.",
        wide=False,
    )


def agreement(answers: pd.Series) -> float:
    """The share of pairs of a sample's seeds that show the same answer."""
    counts, count = answers.value_counts(), len(answers)
    return float((counts * (counts - 1)).sum() / (count * (count - 1)))


def intervals(summary: pd.DataFrame, ways: Sequence[str], label: str) -> Figure:
    """Points with intervals: a panel for each setup, ways downwards, a colour for each series (where the mean goes)."""
    setups = list(dict.fromkeys(summary["setup"]))
    there = [way for way in ways if way in set(summary["way"])]
    looks: dict[str, Any] = {
        merging.TO_ALL: (plots.COLOURS[0], -0.14),
        merging.TO_ONE: (plots.COLOURS[1], 0.14),
        COMPARATOR: ("#555555", 0.0),
    }
    with mpl.rc_context(plots.LOOK):
        figure = Figure(figsize=(2.6 + 1.75 * len(setups), 1.2 + 0.24 * len(there)), layout="constrained")
        axes = figure.subplots(1, len(setups), sharey=True, squeeze=False)[0]
        for axis, setup in zip(axes, setups, strict=True):
            here = summary[summary["setup"] == setup]
            for series, (colour, shift) in looks.items():
                points = here[here["series"] == series]
                places = [there.index(way) + shift for way in points["way"]]
                ends = [(points["mean"] - points["low"]).clip(0), (points["high"] - points["mean"]).clip(0)]
                axis.errorbar(
                    points["mean"], places, xerr=ends, fmt="o", color=colour, markersize=3.2, linewidth=1.1, label=series
                )
            axis.axvline(0, color="#888888", linewidth=0.7, zorder=0)
            counts = here.groupby("way")["clusters"].max()
            one = counts.nunique() == 1
            axis.set_title(f"{setup}\nN = {counts.iloc[0]}" if one else f"{setup}\nN at the right", fontsize=8.5)
            for way, count in () if one else counts.items():
                axis.annotate(
                    str(count),
                    (1, there.index(way)),
                    (3, 0),
                    ("axes fraction", "data"),
                    "offset points",
                    fontsize=6.5,
                    va="center",
                )
        axes[0].set_yticks(range(len(there)), there, fontsize=7.5)
        axes[0].invert_yaxis()
        figure.supxlabel(label, fontsize=9)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
