"""What token-energy shows: maps of one sample, and the numbers of all."""

from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.energy import CLEANED, LOOKS, PAPER, RANDOM, SHUFFLED, SPARSE, TRAINED

MEASURES = {"preference": ("preference", 1.0), "localisation": ("localisation (ROC AUC)", 0.5)}
"""What it is called, and what it is where there is none."""
BOTH_OUT = "without both"
"""What a legend calls the cleaned look, beside those without the one and without the other."""
CONTROL_SERIES = (f"{RANDOM}, {PAPER}", f"{RANDOM}, {BOTH_OUT}", f"{SHUFFLED}, {BOTH_OUT}")
CAVEAT = (
    "A few dominant channels and the first frame, which is given, can turn the trend over the blocks round: what does not hold in"
    " every look is a reading of that look alone."
)


def maps(context: Context, energy: np.ndarray, without: np.ndarray, model: str, sample: Any) -> None:
    """The grid of Fig. 6a for one sample, blocks downwards, latent frames to the right: raw, over the block's mean, and so
    without dominant channels and the first frame."""
    later = slice(1 if energy.shape[1] > 1 else 0, None)
    index = pd.MultiIndex.from_product([range(n) for n in energy.shape], names=["block", "frame", "y", "x"])
    table = pd.DataFrame({"raw": energy.ravel(), "without": without.ravel()}, index=index).reset_index()
    kept = table[table["frame"] >= later.start]
    pictures = _pictures(sample, energy.shape[1])
    looks = {
        "raw": (table, table["raw"], "L2 norm", "raw", pictures),
        "relative": (table, _relative(table, "raw"), "L2 norm / mean of its block", "divided by the mean of its block", pictures),
        "cleaned": (
            kept,
            _relative(kept, "without"),
            "L2 norm / mean of its block",
            f"{CLEANED}, divided by the mean of its block",
            pictures[later],
        ),
    }
    for name, (shown, value, label, title, above) in looks.items():
        figure = plots.token_maps(
            shown.assign(value=value),
            row="block",
            column="frame",
            value="value",
            value_label=label,
            pictures=above,
            picture_label="true video",
        )
        context.figure(
            f"maps-{model}-{name}",
            figure,
            f"Energy of every token, {title} ({model} weights)",
            f"{sample.task.name}, held-out sample {sample.index}, first step, {context.settings.branch} branch. Rows: blocks; "
            "columns: latent frames. One colour scale, from the 1st to the 99th percentile. What a map shows may be a few "
            "dominant channels, or the first frame, which is given: compare the looks.",
            wide=False,
        )


def _relative(table: pd.DataFrame, value: str) -> pd.Series:
    """Over the mean of its block; a block whose every channel dominates leaves nothing."""
    return table[value] / table.groupby("block")[value].transform("mean")


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


def numbers(context: Context, results: pd.DataFrame, early: tuple[float, float], middle: tuple[float, float]) -> None:
    """The measures of every block for every region in every look, against the controls, and in tables. ``early`` and ``middle``
    are bands of relative depth."""
    at = [f"step {step}, \u03c3 {sigma:.2f}" for step, sigma in zip(results["step"], results["sigma"], strict=True)]
    # Samples of two tasks are samples of their own.
    named = results.assign(at=at, maze=results["task"] + "/" + results["sample"].astype(str))
    drawn = with_series(named)
    for task, own in drawn.groupby("task", sort=False):
        _curves(context, own, str(task))
    _sparsity(context, drawn[drawn["region"] == "foreground"])
    _bands(context, named, early, middle)
    first = named[named["step"] == named["step"].min()]
    first = first[first["look"].isin([PAPER, CLEANED]) & first["region"].isin(["foreground", "background"])]
    first = first[first["model"] != SHUFFLED]
    rows = []
    summary = summarise(first, "preference", ["task", "region", "model", "look", "block"], cluster="maze")
    for (task, region, model, look), group in summary.groupby(["task", "region", "model", "look"], sort=False):
        low, high = (group.loc[[i]] for i in (group["mean"].idxmin(), group["mean"].idxmax()))
        lowest, highest = (f"{in_words(row)} (block {row['block'].iloc[0]})" for row in (low, high))
        rows.append({"task": task, "region": region, "model": model, "look": look, "lowest": lowest, "highest": highest})
    context.table(
        f"Lowest and highest preference over the blocks, {first['at'].iloc[0]}",
        pd.DataFrame(rows),
        f"{about(context)} N = {results['sample'].nunique()} samples per task; 95 % bootstrap intervals over samples.",
    )


def with_series(results: pd.DataFrame) -> pd.DataFrame:
    """The rows that are drawn, with the name of their curve: every look of the trained model, two of the untrained one, and the
    shuffled tokens in the look of the claim."""
    trained = results[results["model"] == TRAINED]
    untrained = results[(results["model"] == RANDOM) & results["look"].isin([PAPER, CLEANED])]
    shuffled = results[(results["model"] == SHUFFLED) & (results["look"] == CLEANED)]
    shown = pd.concat([trained, untrained, shuffled])
    return shown.assign(series=shown["model"] + ", " + shown["look"].replace(CLEANED, BOTH_OUT))


def _curves(context: Context, results: pd.DataFrame, task: str) -> None:
    first = results["step"] == results["step"].min()
    # Localisation says much the same at every step; shuffled tokens have none.
    of = {"preference": results, "localisation": results[first & (results["model"] != SHUFFLED)]}
    measured = [
        summarise(table, measure, ["series", "at", "region", "block"], cluster="maze").assign(measure=measure)
        for measure, table in of.items()
    ]
    summary = pd.concat(measured, ignore_index=True)
    summary["row"] = [f"{MEASURES[measure][0]}\n{at}" for measure, at in zip(summary["measure"], summary["at"], strict=True)]
    labels = {row: row for row in summary["row"].unique()}
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="block",
        row="row",
        column="region",
        series="series",
        controls=CONTROL_SERIES,
        row_labels=labels,
        lines_at={row: next(line for name, line in MEASURES.values() if row.startswith(name)) for row in labels},
    )
    counts = " or ".join(map(str, sorted(results.loc[results["model"] == TRAINED, "dominant"].unique())))
    context.figure(
        f"preference-{task}",
        figure,
        f"Which regions the blocks prefer: {task}",
        f"{about(context)} {CAVEAT} Channels that dominate a block of the trained model, the same for all samples: {counts}. "
        "Shaded: 95 % bootstrap intervals over samples, N of them in the corner.",
    )


def _sparsity(context: Context, results: pd.DataFrame) -> None:
    summary = summarise(results[results["model"] != SHUFFLED], "sparsity", ["task", "series", "at", "block"], cluster="maze")
    labels = {at: f"share of energy\n{at}" for at in summary["at"].unique()}
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="block",
        row="at",
        column="task",
        series="series",
        controls=CONTROL_SERIES,
        row_labels=labels,
        lines_at=dict.fromkeys(labels, SPARSE),
    )
    context.figure(
        "sparsity",
        figure,
        "How sparse the energy of the tokens is",
        f"Share of the token energy that the {SPARSE:.0%} of the tokens with most of it hold; the line is what an even spread "
        f"gives. {context.settings.branch} branch. Shaded: 95 % bootstrap intervals over samples, N of them in the corner.",
    )


def _bands(context: Context, results: pd.DataFrame, early: tuple[float, float], middle: tuple[float, float]) -> None:
    """The claim's numbers in every look, all tasks and steps together."""
    bands = {"early": results["depth"].between(*early, "left"), "middle": results["depth"].between(*middle, "left")}
    rows = []
    for region in ("foreground", "background"):
        for model in (TRAINED, RANDOM, SHUFFLED):
            for look in LOOKS:
                own = (results["region"] == region) & (results["model"] == model) & (results["look"] == look)
                means = {band: results[own & there].groupby("maze")["preference"].mean() for band, there in bands.items()}
                means["middle minus early"] = (means["middle"] - means["early"]).dropna()
                told = {
                    name: in_words(summarise(each.reset_index(), "preference", ["all"], cluster="maze"), 3)
                    for name, each in ((name, each.to_frame().assign(all=0)) for name, each in means.items())
                }
                rows.append({"region": region, "model": model, "look": look, **told})
    context.table(
        "Preference by band of blocks, in every look",
        pd.DataFrame(rows),
        f"{CAVEAT} Early: relative depth {early[0]:g} to {early[1]:g}; middle: {middle[0]:g} to {middle[1]:g}. All tasks and "
        f"steps together, N = {results['maze'].nunique()} samples; 95 % bootstrap intervals over samples.",
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
