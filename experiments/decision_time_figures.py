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
        " their noise enters at the next step; at \u03c3 = 1 they are new seeds. Blue: where arXiv 2603.30043 has it fixed;"
        " orange: where arXiv 2603.16870 has the answer solidify. 95 % bootstrap intervals over samples, N in the corner."
    )
    context.figure(
        "decision", at_noise(figure, left["sigma"].min()), "What is shown, chosen and stored at each noise level", about
    )
    runs = results[results["about"] == "run"].dropna(subset=["decided_sigma"])
    rows = []
    for task, group in runs.groupby("task", sort=False):
        quantiles = group["decided_sigma"].quantile([0.75, 0.5, 0.25]).round(3).tolist()
        shares = {
            f"settled at \u03c3 \u2265 {level}": in_words(
                summarise(group.assign(at=group["decided_sigma"] >= level), "at", ["task"], "cluster")
            )
            for level in (ALMOST, FIXED, 0.9, MIDDLE[1], MIDDLE[0])
        }
        row = {"task": task, "runs": len(group), "samples": group["sample"].nunique(), "median \u03c3 of readout": quantiles[1]}
        rows.append({**row, "quarter first": quantiles[0], "quarter last": quantiles[2], **shares})
    context.table(
        "When the readout settles",
        pd.DataFrame(rows),
        "The first reading after which the answer with most evidence never changes; shares of runs with 95 % bootstrap intervals"
        " over samples. With two answers, half of the runs show their own at \u03c3 = 1 by chance.",
    )
