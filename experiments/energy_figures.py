"""What token-energy shows: maps of one sample, and the numbers of all."""

from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.energy import RANDOM, SHUFFLED, TRAINED

MEASURES = {"preference": ("preference", 1.0), "localisation": ("localisation (ROC AUC)", 0.5)}
"""What it is called, and what it is where there is none."""


def maps(context: Context, energy: np.ndarray, model: str, sample: Any) -> None:
    """The grid of Fig. 6a for one sample, blocks downwards, latent frames to the right: raw, and over the block's mean."""
    index = pd.MultiIndex.from_product([range(n) for n in energy.shape], names=["block", "frame", "y", "x"])
    table = pd.DataFrame({"raw": energy.ravel()}, index=index).reset_index()
    table["relative"] = table["raw"] / table.groupby("block")["raw"].transform("mean")
    looks = {"raw": ("L2 norm", "raw"), "relative": ("L2 norm / mean of its block", "divided by the mean of its block")}
    for value, (label, title) in looks.items():
        figure = plots.token_maps(
            table,
            row="block",
            column="frame",
            value=value,
            value_label=label,
            pictures=_pictures(sample, energy.shape[1]),
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


def component_maps(context: Context, found: np.ndarray, model: str, sample: Any) -> None:
    """The first three principal components of every block's tokens as red, green and blue."""
    # Each component of a block fills the range from its 1st to its 99th percentile.
    low, high = np.quantile(found, [0.01, 0.99], axis=(2, 3, 4), keepdims=True)
    scaled = ((found - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    tiles = (np.moveaxis(scaled, 1, -1) * 255).astype(np.uint8)  # (blocks, frames, height, width, 3)
    pictures = _pictures(sample, found.shape[2])
    side = pictures.shape[1] // tiles.shape[2] if tiles.shape[2] < pictures.shape[1] else 1
    tiles = tiles.repeat(side, axis=2).repeat(side, axis=3)
    nearest = [np.arange(size) * old // size for size, old in zip(tiles.shape[2:4], pictures.shape[1:3], strict=True)]
    sheet = np.concatenate([pictures[:, nearest[0]][:, :, nearest[1]][None], tiles])
    names = ["true video", *(f"block {block}" for block in range(len(tiles)))]
    figure = plots.film(sheet, names, [f"frame {frame}" for frame in range(tiles.shape[1])], title="")
    context.figure(
        f"components-{model}",
        figure,
        f"Principal components of every block's tokens ({model} weights)",
        f"{sample.task.name}, held-out sample {sample.index}, first step, {context.settings.branch} branch. Red, green and blue: "
        "the first three components over all tokens of the block, each from its 1st to its 99th percentile; signs are free.",
        wide=False,
    )


def numbers(context: Context, results: pd.DataFrame, *looks: str) -> None:
    """Both measures of every block for every region against the controls, and their extremes over the blocks in a table."""
    at = [f"step {step}, \u03c3 {sigma:.2f}" for step, sigma in zip(results["step"], results["sigma"], strict=True)]
    # Samples of two tasks are samples of their own.
    named = results.assign(at=at, maze=results["task"] + "/" + results["sample"].astype(str))
    first = named[named["step"] == named["step"].min()]
    for task, own in named.groupby("task", sort=False):
        for look in looks:
            _curves(context, own[own["look"] == look], str(task), look)
    rows = []
    summary = summarise(first, "preference", ["task", "look", "region", "model", "block"], cluster="maze")
    for (task, look, region, model), group in summary.groupby(["task", "look", "region", "model"], sort=False):
        low, high = (group.loc[[i]] for i in (group["mean"].idxmin(), group["mean"].idxmax()))
        lowest, highest = (f"{in_words(row)} (block {row['block'].iloc[0]})" for row in (low, high))
        rows.append({"task": task, "look": look, "region": region, "model": model, "lowest": lowest, "highest": highest})
    shown = pd.DataFrame(rows)
    shown = shown[(shown["look"] == looks[-1]) & shown["region"].isin(["foreground", "background"])]
    context.table(
        f"Lowest and highest preference over the blocks, {first['at'].iloc[0]}, {looks[-1]}",
        shown.drop(columns="look"),
        f"{about(context)} N = {results['sample'].nunique()} samples per task; 95 % bootstrap intervals over samples.",
    )


def _curves(context: Context, results: pd.DataFrame, task: str, look: str) -> None:
    measured = [
        summarise(results, measure, ["model", "at", "region", "block"], cluster="maze").assign(measure=measure)
        for measure in MEASURES
    ]
    summary = pd.concat(measured, ignore_index=True)
    summary = summary[~((summary["measure"] == "localisation") & (summary["model"] == SHUFFLED))]
    summary["row"] = [f"{MEASURES[measure][0]}\n{at}" for measure, at in zip(summary["measure"], summary["at"], strict=True)]
    labels = {row: row for row in summary["row"].unique()}
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="block",
        row="row",
        column="region",
        series="model",
        controls=[SHUFFLED, RANDOM],
        row_labels=labels,
        lines_at={row: next(line for name, line in MEASURES.values() if row.startswith(name)) for row in labels},
    )
    dominant = results[results["model"] == TRAINED]["dominant"].max()
    short = "paper" if look.startswith("as in") else "cleaned"
    context.figure(
        f"preference-{task}-{short}",
        figure,
        f"Which regions the blocks prefer: {task}, {look}",
        f"{about(context)} At most {dominant} of a block's channels dominate in the trained model. Shaded: 95 % bootstrap "
        "intervals over samples, N of them in the corner.",
    )


def about(context: Context) -> str:
    """How the numbers are to be read."""
    return (
        "Preference: share of the token energy inside a region over the region's share of the area, 1 where there is none; a "
        "token counts by the fraction of it inside. Localisation: area under the ROC curve of a token's energy for lying in the "
        f"region. {context.settings.branch} branch. Foreground: everything that is neither background nor wall, grid or open "
        "square, the place of the answer included."
    )


def _pictures(sample: Any, frames: int) -> np.ndarray:
    video = sample.video()
    return (video[np.linspace(0, len(video) - 1, frames).round().astype(int)] * 255).astype(np.uint8)
