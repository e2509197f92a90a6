"""What the step lens shows: films of x0-hat, curves against sigma, endings beside x0-hat, and their small tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import metrics, plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.timing import agreement, at_noise

MEASURES = {"right": "share right", "cosine": "cosine of motion maps"}
WEIGHTS = {
    "own": "weight of the run's\nfinal answer",
    "entropy": "entropy (bits)",
    "alive": "legal answers of a\nquarter or more",
}
HAT, SEEN, ENDS = "x0-hat in latents", "x0-hat decoded", "endings of its state"
READ = {
    HAT: {"own": "held_own", "entropy": "held_entropy", "alive": "held_alive"},
    SEEN: {"own": "own_share", "entropy": "entropy", "alive": "alive"},
}
"""Columns of what is read of the legal answers, in latents and of the decoded video."""
SERIES = {
    "cosine_final": "x0-hat (cosine: to its own final video)",
    "cosine_seeds": "to another seed's x0-hat at the same step",
    "cosine_other_seed": "to another seed's final video (control)",
    "cosine_other_sample": "to another sample's final video (control)",
}
AXIS = "\u03c3 (noise on the left, clean on the right)"
WAYS = {
    ("ancestral", "guided"): "",
    ("ancestral", "cond"): ", cond branch",
    ("renoised", "guided"): " renoised once (not the model's distribution)",
    ("other seeds", "guided"): "",
}
"""Of the endings: what they are called behind `HAT` and `ENDS`. At sigma 1 they are the final videos of other seeds."""


def draw(context: Context, results: pd.DataFrame, films: Mapping[str, tuple[Sequence[Any], np.ndarray]]) -> None:
    """Everything. ``films`` are the pictured samples of each task and their x0-hats, by task and call."""
    read = results[results["about"] == "x0-hat"].astype({"right": bool})  # beside other rows a column of objects
    settings, first = context.settings, read[read["branch"] == context.settings.branches[0]]
    clock = first[["step", "sigma"]].drop_duplicates().sort_values("step")
    labels = [f"step {step:.0f}  \u03c3 {sigma:.2f}" for step, sigma in clock.itertuples(index=False)]
    mazes = [films[f"{name}-0"][1][0] for name in ("maze", "maze-loops") if f"{name}-0" in films]
    if mazes:
        watch(context, mazes, labels)
    weights(context, first)
    if (results["about"] == "endings").any():
        left = results[results["about"] == "endings"]
        endings(context, left)
        known_blends(context, left)
    if (first["task"] == "pattern").any():
        superposition(context, first[first["task"] == "pattern"])
    settling(context, first)
    for branch in settings.branches:
        step_numbers(context, read[read["branch"] == branch], branch)
    for samples, pictures in films.values():
        for sample, film in zip(samples, pictures, strict=True):
            step_film(context, sample, film, labels)


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


def weights(context: Context, read: pd.DataFrame) -> None:
    """How undecided x0-hat is between legal answers, in latents and decoded, and how large the final one is."""
    several = read[read["answers"] > 1]
    if several.empty:
        return
    measured = [
        summarise(several, column, ["task", "sigma"]).assign(measure=measure, series=name)
        for name, columns in READ.items()
        for measure, column in columns.items()
    ]
    figure = plots.curve_grid(
        pd.concat(measured, ignore_index=True),
        x="sigma",
        x_label=AXIS,
        row="measure",
        column="task",
        series="series",
        row_labels=WEIGHTS,
        noise_axis=True,
        limits={"own": (-0.03, 1.03)},
    )
    about = (
        f"Held-out samples with two or more legal answers, {context.settings.seeds} seeds, {context.settings.branches[0]} branch."
        " In latents: the last latent frame as a mixture of the first frame and of the true videos of the answers. Decoded: the"
        " same of the colours of the decoded last frame, where the decoder hides the weaker answers. 95 % bootstrap intervals"
        " over samples, N in the corner."
    )
    context.figure("weights", figure, "Which answers x0-hat holds, and which its picture shows", about)


def step_numbers(context: Context, results: pd.DataFrame, branch: str) -> None:
    """How right x0-hat is and how near the final video, against sigma for every task; and first and last values in a table."""
    settings, own = context.settings, SERIES["cosine_final"]
    measured = [summarise(results, "right", ["task", "sigma"]).assign(measure="right", series=own)]
    measured += [summarise(results, c, ["task", "sigma"]).assign(measure="cosine", series=s) for c, s in SERIES.items()]
    about = (
        f"Held-out samples x {settings.seeds} seeds per task, {branch} branch; 95 % intervals: bootstrap over samples, N of them"
        " in the corner (a share of 0 or 1: exact binomial)."
    )
    figure = plots.curve_grid(
        pd.concat([table for table in measured if not table.empty], ignore_index=True),
        x="sigma",
        x_label=AXIS,
        row="measure",
        column="task",
        series="series",
        row_labels=MEASURES,
        controls=list(SERIES.values())[2:],
        noise_axis=True,
        limits={"right": (-0.03, 1.03), "cosine": (0, 1.03)},
    )
    if results["sigma"].nunique() < len(settings.places):
        at_noise(figure, results["sigma"].min())
    context.figure(f"right-{branch}", figure, f"How much of the final video x0-hat shows ({branch})", about)
    first, last = results["step"].min(), results["step"].max()
    shown = {
        ("correlation_seeds", "correlation of two seeds' x0-hats"): (first,),
        ("correlation_samples", "of two samples'"): (first,),
        ("right", "right"): (first, last),
        ("held_entropy", "bits in latents"): (first, last),
        ("entropy", "bits decoded"): (first, last),
        ("cosine_final", "cosine to own final"): (first,),
        ("cosine_other_seed", "to another seed's"): (first,),
        ("cosine_seeds", "between seeds"): (first,),
    }
    table = {"task": results["task"].unique()} | {
        f"{title}, step {step:.0f}": [
            in_words(summarise(here[here["step"] == step], column, ["step"])) for _, here in results.groupby("task", sort=False)
        ]
        for (column, title), steps in shown.items()
        for step in steps
    }
    context.table(f"Steps {first:.0f} and {last:.0f} in numbers ({branch})", pd.DataFrame(table), about)


def settling(context: Context, read: pd.DataFrame) -> None:
    """When early and late frames come, and when the answer is that of the end."""
    thirds = {"new_first": "first third of the clip", "new_last": "last third of the clip"}
    tables = [summarise(read, name, ["task", "sigma"]).assign(row="come", series=label) for name, label in thirds.items()]
    agree = agreement(read)
    shows = {"own": "shows the run's own final answer", "other": "shows another seed's final answer (control)"}
    tables += [summarise(agree, name, ["task", "sigma"]).assign(row="shows", series=label) for name, label in shows.items()]
    figure = plots.curve_grid(
        pd.concat([table for table in tables if not table.empty], ignore_index=True),
        x="sigma",
        x_label=AXIS,
        row="row",
        column="task",
        series="series",
        row_labels={"come": "share of what is\nnew that has come", "shows": "share of runs,\n\u2265 2 legal answers"},
        controls=[shows["other"]],
        noise_axis=True,
        limits={"come": (-0.03, 1.03), "shows": (-0.03, 1.03)},
    )
    about = (
        "Above: of the squares that change from frame to frame in the final video, in its first and last third, how many are"
        " there already; a chain of frames would have the last third come later. Below: whether the answer with most evidence"
        f" is that of the final video. {context.settings.branches[0]} branch; 95 % bootstrap intervals over samples, N in the"
        " corner."
    )
    context.figure("settling", figure, "When the clip and the choice settle", about)


def endings(context: Context, left: pd.DataFrame) -> None:
    """How undecided x0-hat and endings of the same state are, how far they are apart, and the calibration."""
    tables, calibration = [], []
    for (way, branch), suffix in WAYS.items():
        rows = left[(left["way"] == way) & (left["branch"] == branch)]
        shown = {("differ", ENDS + suffix): "differ", ("distance", ENDS + suffix): "distance"}
        if way != "renoised":
            shown[("differ", HAT + suffix)] = "held_differ"
        if (way, branch) == ("ancestral", "guided"):
            shown[("differ", SEEN)] = "seen_differ"
        if (way, branch) in (("ancestral", "guided"), ("other seeds", "guided")):
            shown[("distance", "another sample's endings (control)")] = "shuffled"
            shown[("distance", "as few draws from x0-hat (control)")] = "floor"
        tables += [summarise(rows, v, ["task", "sigma"], "sample").assign(row=r, series=s) for (r, s), v in shown.items()]
        for (step, sigma), at in rows.groupby(["step", "sigma"]):
            found = {name: summarise(at, name, ["step"], "cluster") for name in ("bias", "spread")}
            ratio = found["bias"]["mean"].iloc[0] / found["spread"]["mean"].iloc[0]
            words = {name: in_words(table, 4) for name, table in found.items()}
            calibration.append({"endings": f"{way}, {branch}", "step": step, "\u03c3": sigma, **words, "ratio": ratio})
    summary = pd.concat([table for table in tables if not table.empty], ignore_index=True)
    figure = plots.curve_grid(
        summary,
        x="sigma",
        x_label=AXIS,
        row="row",
        column="task",
        series="series",
        row_labels={"differ": "chance that two\ndraws differ", "distance": "distance to what\nx0-hat holds"},
        controls=[name for name in summary["series"].unique() if name.endswith(")")],
        noise_axis=True,
        limits={"differ": (-0.03, 1.03), "distance": (-0.03, 1.03)},
    )
    about = (
        f"{context.settings.endings} endings of each state by a stochastic sampler, of samples with two or more legal answers,"
        f" seed 0; at \u03c3 = 1 the final videos of {context.settings.finals} seeds. Above: 1 less the sum of squared shares of"
        " the answers in x0-hat, and the same of endings, estimated without bias from pairs of them. Below: total variation"
        " distance, in latents. Live alternatives: both agree; a blur over a choice that is made: endings agree with each other."
        " 95 % bootstrap intervals over samples, N in the corner."
    )
    context.figure("endings", at_noise(figure, left["sigma"].min()), "What x0-hat holds, and what becomes of the state", about)
    table = pd.DataFrame(calibration)
    context.table(
        "Calibration: is x0-hat the mean of the endings?",
        table,
        "Mean squares per latent element: of the distance between x0-hat and the mean of the endings (without the part that few"
        " endings make), and of the endings about their mean. A stochastic sampler with the model's own distribution has a bias"
        " of 0 for the conditional branch alone; guided x0-hats are no means, and renoising is no such sampler. Where nothing is"
        " left open the spread is next to 0, and the ratio of the two says nothing.",
    )


def known_blends(context: Context, left: pd.DataFrame) -> None:
    """What is read of blends of endings' latents, whose weights are known: the control of both readings."""
    columns = ["blend_true", *[f"blend_{kind}{what}" for kind in ("held", "seen") for what in ("", "_alive")]]
    mixed = left.reindex(columns=[*left, *[name for name in columns if name not in left]])
    # Where all endings are one answer there is nothing to be told apart.
    mixed = mixed[(mixed["way"] != "renoised") & (mixed["blend_true"] > metrics.DECIDABLE)]
    rows = []
    for task, here in mixed.groupby("task", sort=False):
        row: dict[str, Any] = {"task": task, "blends": len(here), "samples": here["sample"].nunique()}
        for kind, name in (("held", HAT), ("seen", SEEN)):
            named = here.assign(two=here[f"blend_{kind}_alive"] >= 2)
            row[f"two answers of a quarter or more, {name}"] = in_words(summarise(named, "two", ["task"], "cluster"))
        for column, name in (("blend_true", "true"), ("blend_held", HAT), ("blend_seen", SEEN)):
            row[f"chance that two draws differ, {name}"] = in_words(summarise(here, column, ["task"], "cluster"))
        rows.append(row)
    if rows:
        context.table(
            "Blends of known weights: what either reading finds",
            pd.DataFrame(rows),
            "The mean of the latents of a state's endings (or of other seeds' final videos) that show two answers or more: its"
            " weights are the answers' shares among them. Two are there in all of these blends, each of a quarter or more where"
            f" there are {context.settings.endings} endings. 95 % bootstrap intervals over samples.",
        )


def superposition(context: Context, read: pd.DataFrame) -> None:
    """The pattern task: whether two symbols are there at once, and whether one would explain what is seen."""
    kinds = np.where(read["answers"] > 1, "two legal symbols", "one legal symbol, and a decoy (control)")
    both = read["held_alive"].where(read["answers"] > 1, read["held_fooled"])
    named = read.assign(kind=kinds, two=(both >= 2).astype(float).mask(both.isna()))
    series = {
        ("two", "two"): "both symbols of a quarter or more",
        ("left", "one_symbol"): "unexplained by the best single symbol",
        ("left", "two_symbols"): "unexplained by the two symbols",
    }
    tables = [summarise(named, value, ["kind", "sigma"]).assign(row=row, series=label) for (row, value), label in series.items()]
    if all(table.empty for table in tables):
        return
    figure = plots.curve_grid(
        pd.concat([table for table in tables if not table.empty], ignore_index=True),
        x="sigma",
        x_label=AXIS,
        row="row",
        column="kind",
        series="series",
        row_labels={"two": "share of runs", "left": "share of the change"},
        noise_axis=True,
        limits={"two": (-0.03, 1.03)},
    )
    about = (
        "The pattern task: the last latent frame of x0-hat, taken for a mixture of the first frame and one symbol (whichever of"
        " the alphabet fits best), or of the first frame and two given ones. Unexplained: of the squared change from the first"
        " frame, as far as the alphabet can make it. 95 % bootstrap intervals over samples, N in the corner."
    )
    context.figure("superposition", figure, "Two symbols in one place", about)
