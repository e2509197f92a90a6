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

MEASURES = {
    "right": "share right",
    "alive": "legal answers alive",
    "entropy": "entropy (bits)",
    "cosine": "cosine of motion maps",
}
SERIES = {
    "cosine_final": "x0-hat (cosine: to its own final video)",
    "cosine_seeds": "to another seed's x0-hat at the same step",
    "cosine_other_seed": "to another seed's final video (control)",
    "cosine_other_sample": "to another sample's final video (control)",
}
TRAINED, SHUFFLED, RANDOM = "trained", "trained, tokens shuffled", "random weights"
PROBE, PLACE, SITUATION = "probe", "place only", "place, distances, openings"
TARGETS = {
    "wall": "wall (perception)",
    "route": "on the route (reasoning)",
    "which": "which legal route (choice)",
    "output": "painted at the end (output)",
    "control": "random label per place (control)",
}


def watch(context: Context, films: list[np.ndarray], labels: list[str]) -> None:
    """Mazes side by side, to be played step by step."""
    context.film(
        "watch",
        np.concatenate(films, axis=3),
        labels,
        "Watch the maze being solved",
        "The whole x0-hat clip at each denoising step, one after the other; drag to choose a step. With two mazes, the left one "
        "has a single legal route and the right one several. The last frame of a clip shows the route.",
    )


def step_film(context: Context, sample: Any, film: np.ndarray, labels: list[str]) -> None:
    """The grid of the paper's figures for one sample."""
    frames = np.linspace(0, film.shape[1] - 1, context.settings.pictured_frames).round().astype(int)
    figure = plots.film(film[:, frames], labels, [f"frame {i}" for i in frames], title=f"\u201c{sample.prompt}\u201d")
    kind = f"{len(sample.answers)} legal answers" if len(sample.answers) > 1 else "one legal answer"
    about = f"Held-out sample {sample.index} ({kind}), seed 0, {context.settings.branches[0]} branch, not selected. Rows: "
    about += "denoising steps from noise to clean; columns: frames of the decoded x0-hat."
    context.figure(f"{sample.task.name}-{sample.index}", figure, f"{sample.task.name}, {kind}", about, wide=False)


def step_numbers(context: Context, results: pd.DataFrame, branch: str) -> None:
    """The four measures against sigma for every task, and their first and last values in a table."""
    settings, own = context.settings, SERIES["cosine_final"]
    measured = [summarise(results, m, ["task", "sigma"]).assign(measure=m, series=own) for m in list(MEASURES)[:3]]
    measured += [summarise(results, c, ["task", "sigma"]).assign(measure="cosine", series=s) for c, s in SERIES.items()]
    about = (
        f"{settings.samples} held-out samples x {settings.seeds} seeds per task, {branch} branch; 95 % intervals: bootstrap over"
        " samples, N of them in the corner (a share of 0 or 1: exact binomial)."
    )
    titles = {
        ("right", "cosine"): "How much of the final video x0-hat shows",
        ("entropy", "alive"): "How undecided x0-hat is, in samples with two or more legal answers",
    }
    for rows, title in titles.items():
        here = [table for table in measured if not table.empty and set(table["measure"]) <= set(rows)]
        if not here:  # no sample with several legal answers
            continue
        figure = plots.curve_grid(
            pd.concat(here, ignore_index=True),
            x="sigma",
            x_label="\u03c3 (noise on the left, clean on the right)",
            row="measure",
            column="task",
            series="series",
            row_labels={row: MEASURES[row] for row in rows},
            controls=list(SERIES.values())[2:],
            noise_axis=True,
            limits={"right": (-0.03, 1.03), "cosine": (0, 1.03)},
        )
        context.figure(f"{rows[0]}-{branch}", figure, f"{title} ({branch})", about)
    first, last = results["step"].min(), results["step"].max()
    shown = {
        ("right", "right"): (first, last),
        ("entropy", "bits"): (first, last),
        ("cosine_final", "cosine to own final"): (first,),
        ("cosine_other_seed", "to another seed's"): (first,),
        ("cosine_seeds", "between seeds"): (first,),
    }
    table = {"task": results["task"].unique()} | {
        f"{title}, step {step}": [
            in_words(summarise(here[here["step"] == step], column, ["step"])) for _, here in results.groupby("task", sort=False)
        ]
        for (column, title), steps in shown.items()
        for step in steps
    }
    context.table(f"First and last step in numbers ({branch})", pd.DataFrame(table), about)


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
