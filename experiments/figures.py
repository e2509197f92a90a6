"""What the experiments show: their tables summarised, drawn and handed to the report, with captions that say how.

An experiment file is a protocol: what is run, what is measured. Here stand the figures and the small tables that are made of
its results, so that the protocol can be read without them.
"""

from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise

TRAINED, SHUFFLED, RANDOM = "trained", "trained, tokens shuffled", "random weights"
PROBE, PLACE, SITUATION = "probe", "place only", "place, distances, openings"
TARGETS = {
    "wall": "wall (perception)",
    "route": "on the route (reasoning)",
    "which": "which legal route (choice)",
    "output": "painted at the end (output)",
    "control": "random label per place (control)",
}


def energy_maps(context: Context, energy: np.ndarray, model: str, sample: Any) -> None:
    """The grid of Fig. 6a for one sample, blocks downwards, latent frames to the right: raw, and over the block's mean."""
    index = pd.MultiIndex.from_product([range(n) for n in energy.shape], names=["block", "frame", "y", "x"])
    table = pd.DataFrame({"raw": energy.ravel()}, index=index).reset_index()
    table["relative"] = table["raw"] / table.groupby("block")["raw"].transform("mean")
    frames = np.linspace(0, sample.frames - 1, energy.shape[1]).round().astype(int)
    pictures = (sample.video()[frames] * 255).astype(np.uint8)
    looks = {"raw": ("L2 norm", "raw"), "relative": ("L2 norm / mean of its block", "divided by the mean of its block")}
    for value, (label, title) in looks.items():
        figure = plots.token_maps(
            table,
            row="block",
            column="frame",
            value=value,
            value_label=label,
            pictures=pictures,
            picture_label="true video",
        )
        context.figure(
            f"maps-{model}-{value}",
            figure,
            f"Energy of every token, {title} ({model} weights)",
            f"{sample.task.name}, held-out sample {sample.index}, first step, {context.settings.branch} branch. Rows: blocks; "
            "columns: latent frames. One colour scale, from the 1st to the 99th percentile.",
            wide=False,
        )


def energy_numbers(context: Context, results: pd.DataFrame) -> None:
    """Preference of every block for every region against the controls, and its extremes over the blocks in a table."""
    at = [f"step {step}, \u03c3 {sigma:.2f}" for step, sigma in zip(results["step"], results["sigma"], strict=True)]
    # Mazes of both tasks are samples of their own.
    named = results.assign(at=at, maze=results["task"] + results["sample"].astype(str))
    summary = summarise(named, "preference", ["model", "at", "region", "block"], cluster="maze")
    places = summary["at"].unique()
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="block",
        row="at",
        column="region",
        series="model",
        controls=[SHUFFLED, RANDOM],
        row_labels={place: f"{place}\npreference" for place in places},
        lines_at=dict.fromkeys(places, 1.0),
    )
    about = (
        f"Share of the token energy inside a region over the region's share of the area, over all latent frames "
        f"({context.settings.branch} branch); 1 is no preference. A token counts by the fraction of it inside the region. Agent: "
        "where it starts; route: the union of the legal ones without its ends; open: the other open squares."
    )
    context.figure(
        "preference", figure, "Which regions the blocks prefer", f"{about} Shaded: 95 % bootstrap intervals over mazes."
    )
    rows = []
    for (region, model), group in summary[summary["at"] == places[0]].groupby(["region", "model"], sort=False):
        low, high = (group.loc[[i]] for i in (group["mean"].idxmin(), group["mean"].idxmax()))
        lowest, highest = (f"{in_words(row)} (block {row['block'].iloc[0]})" for row in (low, high))
        rows.append({"region": region, "model": model, "lowest": lowest, "highest": highest, "mazes": group["clusters"].max()})
    regions = list(dict.fromkeys(summary["region"]))
    table = pd.DataFrame(rows).sort_values("region", key=lambda names: names.map(regions.index), kind="stable")
    context.table(f"Lowest and highest preference over the blocks, {places[0]}", table, about)


def probe_scores(context: Context, scores: pd.DataFrame) -> None:
    """Heat maps over blocks and steps, curves over depth at the first step, and their numbers beside the baselines."""
    settings = context.settings
    scores = scores.assign(name=scores["target"].map(TARGETS), row="auc")
    scores = scores.sort_values("name", key=lambda names: names.map(list(TARGETS.values()).index), kind="stable")
    probed, baselines = scores[scores["reader"] == PROBE], scores[scores["reader"] != PROBE]
    probed = probed.assign(at=[f"{step}\n{sigma:.2f}" for step, sigma in zip(probed["step"], probed["sigma"], strict=True)])
    first = probed[probed["step"] == probed["step"].min()]
    made = (
        f"Linear probes on the tokens of the last latent frame, {settings.branch} branch, {settings.mazes} held-out mazes of"
        f" each kind, {settings.test_share:.0%} of them for testing; never split by token."
    )
    place = baselines[baselines["reader"] == PLACE].set_index("name")["mean"]
    heat = plots.heat_maps(
        probed,
        panel="name",
        x="at",
        y="block",
        value="mean",
        x_label="step, and its \u03c3",
        y_label="block",
        value_label="held-out ROC AUC",
        limits=(0.5, 1.0),
        titles={name: f"{name}\nplace only: {auc:.2f}" for name, auc in place.items()},
    )
    context.figure("map", heat, "What can be read, by block and step", f"{made} {in_sentences(first)}")
    depth = plots.curve_grid(
        first,
        x="block",
        x_label="block",
        row="row",
        column="name",
        series="reader",
        levels=baselines,
        row_labels={"auc": "held-out ROC AUC"},
        limits={"auc": (0.3, 1.03)},
        lines_at={"auc": 0.5},
    )
    about = (
        "Shaded: 95 % bootstrap intervals over the test mazes, N of them in the corner. Dashed: baselines without activations."
    )
    context.figure("depth", depth, f"Over depth, at \u03c3 = {first['sigma'].iloc[0]:.2f}", f"{made} {about}")
    ends = first[first["block"].isin([0, first["block"].max() // 2, first["block"].max()])]
    table = pd.concat([ends.assign(reader=[f"probe, block {block}" for block in ends["block"]]), baselines])
    table = table.assign(auc=[in_words(table.iloc[[i]]) for i in range(len(table))])
    wide = table.pivot(index="name", columns="reader", values="auc").loc[list(dict.fromkeys(first["name"]))]
    wide = wide[list(dict.fromkeys(table["reader"]))]
    last = first[first["block"] == first["block"].max()].set_index("name")["selectivity"]
    wide["selectivity, last block"] = [f"{last[name]:.2f}" for name in wide.index]
    about = f"{made} AUC with 95 % interval; selectivity is the AUC minus that of the control task."
    context.table("In numbers, first step", wide.reset_index(names="target"), about)


def in_sentences(first: pd.DataFrame) -> str:
    """What the curves at the first step show, read off the table."""
    said = []
    for name, curve in first.dropna(subset="mean").groupby("name", sort=False):
        start, top = curve.iloc[0], curve.iloc[curve["mean"].argmax()]
        said.append(f"{name}: {start['mean']:.2f} after block 0, highest after block {top['block']} ({top['mean']:.2f})")
    return f"At \u03c3 = {first['sigma'].iloc[0]:.2f}, " + "; ".join(said) + "."
