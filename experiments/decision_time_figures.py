"""What decision-time shows: readout, commitment, choice and storage against sigma, beside what the two papers say."""

import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.decision_time_claims import ALMOST, FIXED, MIDDLE
from experiments.timing import agreement, at_noise

ROWS = {
    "readout": "share of runs that show",
    "commitment": "cosine of motion maps",
    "choice": "chance that\ntwo endings differ",
    "storage": "share of endings that\nlose the run's answer",
    "right": "share of endings\nthat are right",
}
CONTROLS = ("another seed's final answer (control)", "to another seed's final video (control)", "to another sample's (control)")
WAYS = {
    "ancestral": "endings by a stochastic sampler",
    "renoised": "after x0-hat was renoised once",
    "replaced": "after the state was replaced by noise once",
}

BEYOND = {
    ("differ", "ancestral"): "two endings differ",
    ("lost", "renoised"): "lost, x0-hat renoised",
    ("lost", "replaced"): "lost, state replaced by noise",
}
"""Columns of the table of what goes beyond half of a seed's change."""


def draw(context: Context, results: pd.DataFrame) -> None:
    """The figure and the table."""
    shown, left = (results[results["about"] == about] for about in ("x0-hat", "endings"))
    agree = agreement(shown)
    series = [
        (agree, "own", "readout", "their own final answer"),
        (agree, "other", "readout", CONTROLS[0]),
        (shown, "cosine_final", "commitment", "x0-hat (cosine: to its own final video)"),
        (shown, "cosine_other_seed", "commitment", CONTROLS[1]),
        (shown, "cosine_other_sample", "commitment", CONTROLS[2]),
    ]
    for way, label in WAYS.items():
        rows = left[left["way"] == way]
        series += [(rows, "differ", "choice", label), (rows, "lost", "storage", label), (rows, "accepted", "right", label)]
    tables = [summarise(rows, value, ["task", "sigma"]).assign(row=row, series=name) for rows, value, row, name in series]
    figure = plots.curve_grid(
        pd.concat([table for table in tables if not table.empty], ignore_index=True),
        x="sigma",
        x_label="\u03c3 (noise on the left, clean on the right)",
        row="row",
        column="task",
        series="series",
        row_labels=ROWS,
        controls=CONTROLS,
        noise_axis=True,
        limits=dict.fromkeys(ROWS, (-0.03, 1.03)),
    )
    for axis in figure.axes:
        axis.axvspan(*MIDDLE, color="#D55E00", alpha=0.08, linewidth=0)
        axis.axvspan(FIXED, ALMOST, color="#0072B2", alpha=0.12, linewidth=0)
    about = (
        f"Held-out samples with two or more legal answers, {context.settings.seeds} seeds for what is shown,"
        f" {context.settings.endings} endings of the first seed's states for the rest; guided. Endings leave the state at \u03c3;"
        " their noise enters at the next step, of lower \u03c3; at \u03c3 = 1 they are new seeds. Endings that show no answer are"
        " left out of the choice, and count as lost. Blue: where arXiv 2603.30043 has it fixed;"
        " orange: where arXiv 2603.16870 has the answer solidify. 95 % bootstrap intervals over samples, N in the corner."
    )
    context.figure(
        "decision", at_noise(figure, left["sigma"].min()), "What is shown, chosen and stored at each noise level", about
    )
    lost(context, left)
    runs = results[results["about"] == "run"].dropna(subset=["decided_sigma"])
    rows = []
    for task, group in runs.groupby("task", sort=False):
        chance = (group["first_own"] == 1).mean()
        quantiles = group["decided_sigma"].quantile([0.75, 0.5, 0.25]).round(3).tolist()
        shares = {
            f"settled at \u03c3 \u2265 {level}": in_words(
                summarise(group.assign(at=group["decided_sigma"] >= level), "at", ["task"], "cluster")
            )
            for level in (ALMOST, FIXED, 0.9, MIDDLE[1], MIDDLE[0])
        }
        early = (group["decided_sigma"] >= 0.9).mean()
        row = {"task": task, "runs": len(group), "samples": group["sample"].nunique(), "median \u03c3 of readout": quantiles[1]}
        row |= {"quarter first": quantiles[0], "quarter last": quantiles[2], **shares}
        rows.append(
            {**row, "at \u03c3 \u2265 0.9 beyond chance": (early - chance) / (1 - chance) if chance < 1 else float("nan")}
        )
    context.table(
        "When the readout settles",
        pd.DataFrame(rows),
        "The first reading after which the answer with most evidence never changes; shares of runs with 95 % bootstrap intervals"
        " over samples. With two answers, half of the runs show their own at \u03c3 = 1 by chance, and count as settled there;"
        " *beyond chance* takes off the share that shows its own at the first reading, and divides by what that leaves.",
    )


def lost(context: Context, left: pd.DataFrame) -> None:
    """Answers lost and endings that differ, beyond half of what a new seed changes, for every way and place."""
    rows = []
    seeds = left[(left["way"] == "ancestral") & (left["step"] == left["step"].min())].groupby("cluster")
    half = {value: left["cluster"].map(seeds[value].mean()) / 2 for value in ("differ", "lost")}
    beyond = left.assign(**{f"beyond_{value}": left[value] - half[value] for value in half})
    for (step, sigma), here in beyond.groupby(["step", "sigma"]):
        row = {"leave at step": step, "\u03c3": sigma}
        for (value, way), name in BEYOND.items():
            row[name] = in_words(summarise(here[here["way"] == way], f"beyond_{value}", ["step"], "cluster"))
        rows.append(row)
    context.table(
        "Beyond half of what a new seed changes",
        pd.DataFrame(rows),
        "Chance that two endings differ, and share of endings that lose the run's answer, each less half of the same of endings"
        " of step 0; all tasks, 95 % bootstrap intervals over samples. Replaced by noise the state keeps nothing: this cannot"
        " fall below 0 but by chance, at any noise level. Renoised, x0-hat is kept.",
    )
