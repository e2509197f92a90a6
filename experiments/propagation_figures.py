"""What `propagation` shows: heat maps over injected and later steps, the sensitivity curve, and what distances tell.

Tables are in `propagation_tables`.
"""

from __future__ import annotations

import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import summarise
from experiments.noised import STATES

NULL = "another seed"
SHADED = (
    "Shaded: 95 % bootstrap intervals over samples, N of them in the corner. A curve ends where its points have fewer than"
    f" {plots.FEW:.0%} of the panel's largest N."
)


def draw(context: Context, results: pd.DataFrame, predictions: pd.DataFrame, fewest: int) -> None:
    """All figures. ``fewest``: how many runs of either kind are behind a prediction, at least."""
    maps(context, results)
    curves(context, results)
    told(context, predictions, fewest)


def maps(context: Context, results: pd.DataFrame) -> None:
    """Injected step (upwards) x later step (to the right), with the divergence of another seed in the top row."""
    rows = results[results["kind"].isin(["noise", "other seed"])]
    seeds, noise = rows[rows["kind"] == "other seed"], rows[rows["kind"] == "noise"]
    # The null has a row of its own in the maps of either kind of noise.
    rows = pd.concat([noise, *(seeds.assign(how=how) for how in noise["how"].unique())], ignore_index=True)
    at = [
        NULL if pd.isna(step) else f"{step:02.0f}  {sigma:.2f}" for step, sigma in zip(rows["step"], rows["sigma"], strict=True)
    ]
    later = [f"{step}\n{sigma:.2f}" for step, sigma in zip(rows["later"], rows["later_sigma"], strict=True)]
    rows = rows.assign(at=at, then=later).sort_values("later", kind="stable")
    about = (
        f"CKA dissimilarity from the unedited run, mean over {rows['cluster'].nunique()} samples; below, on a scale of its own,"
        " the width of its 95 % bootstrap interval over samples. Rows: the step that gets noise, and its \u03c3; the top row is"
        " an unedited run with another seed (the null). Columns: the step at which the two are compared, and its \u03c3. Another"
        f" run of the same seed differs by at most {results[results['kind'] == 'again']['dissimilarity'].max():.1g}."
    )
    streams = rows["place"] != STATES
    shown = {"x0-hat": rows[~streams].assign(panel=rows["how"])}
    for how in noise["how"].unique():
        there = rows[streams & (rows["how"] == how)]
        shown[f"streams-{how}"] = there.assign(panel=there["place"] + ", " + how)
    for name, here in shown.items():
        means = summarise(here, "dissimilarity", ["panel", "at", "then"], "cluster")
        means["width"] = (means["high"] - means["low"]).fillna(0)
        order = {then: i for i, then in enumerate(dict.fromkeys(rows["then"]))}
        means = means.sort_values("then", key=lambda names, order=order: names.map(order), kind="stable")
        figure = plots.heat_maps(
            means,
            panel="panel",
            x="then",
            y="at",
            value="mean",
            x_label="step compared, and its \u03c3",
            y_label="step with noise, and its \u03c3",
            value_label="CKA dissimilarity",
            limits=(0.0, max(0.1, float(means["mean"].max()))),
            spread="width",
            spread_label="width of its interval",
            spread_limits=(0.0, float(means["width"].max()) or 1.0),
        )
        title = "in x0-hat" if name == "x0-hat" else f"in the streams after some blocks ({name.removeprefix('streams-')})"
        context.figure(name, figure, f"How far noise spreads, {title}", about)


def curves(context: Context, results: pd.DataFrame) -> None:
    """Sensitivity over sigma, beside what becomes of the answer."""
    noise, seeds = results[results["kind"] == "noise"], results[results["kind"] == "other seed"]
    after = noise[noise["later"] > noise["step"]]
    ends = noise[noise["later"] == noise["later"].max()]
    run = ["how", "task", "sample", "cluster", "place", "step", "sigma"]
    means = after.groupby(run)[["dissimilarity", "seeds"]].mean().reset_index()
    places = list(noise["place"].unique())
    nulls = {f"{place}, {NULL}": place for place in places}
    found = []
    for measure, table in (("mean", means), ("end", ends)):
        by = ["how", "place", "sigma"]
        found.append(summarise(table, "dissimilarity", by, "cluster").assign(measure=measure))
        # Over the steps that the curve itself is over, of the same samples.
        null = summarise(table, "seeds", by, "cluster")
        found.append(null.assign(measure=measure, place=null["place"] + f", {NULL}"))
    once = ends[ends["place"] == STATES].assign(
        lost=lambda table: table["clean_right"].astype(float) - table["right"].astype(float)
    )
    for name in ("lost", "changed", "rerouted"):
        found.append(summarise(once, name, ["how", "sigma"], "cluster").assign(measure=name, place="outcome"))
    final = seeds[(seeds["later"] == seeds["later"].max()) & (seeds["place"] == STATES)]
    level = [summarise(final, name, ["kind"], "cluster").assign(measure=name, series=NULL) for name in ("changed", "rerouted")]
    # Of samples that show no answer there is none.
    there, columns = [each for each in level if len(each)], pd.DataFrame({"how": noise["how"].unique()})
    figure = plots.curve_grid(
        pd.concat([each for each in found if len(each)], ignore_index=True).rename(columns={"place": "series"}),
        x="sigma",
        x_label="\u03c3 of the step that gets noise (the first step on the left)",
        row="measure",
        column="how",
        series="series",
        row_labels={
            "mean": "sensitivity: mean\ndissimilarity after it",
            "end": "dissimilarity\nat the last step",
            "lost": "success lost",
            "changed": "answer no longer\nthe unedited one",
            "rerouted": "another answer,\nwhere both are right",
        },
        dashed=nulls,
        levels=pd.concat(there, ignore_index=True).merge(columns, how="cross") if there else None,
        noise_axis=True,
    )
    about = (
        "Sensitivity: the mean of the dissimilarity over the compared steps after the one that gets noise. Dashed: the same mean,"
        " over the same steps, of an unedited run with another seed. Tasks together; the tables have them apart."
    )
    context.figure("sensitivity", figure, "Sensitivity to noise at a step, and what becomes of the answer", f"{about} {SHADED}")


def told(context: Context, predictions: pd.DataFrame, fewest: int) -> None:
    """The area under the ROC curve of CKA and of L2, by injected step."""
    names = {"dissimilarity": "CKA dissimilarity", "distance": "L2 distance (control)"}
    defined = predictions.dropna(subset=["mean"])
    if defined.empty:
        return
    series = defined["place"] + ", " + defined["measure"].map(names)
    row = defined["told"] + ",\n" + defined["moment"]
    shown = defined[defined["place"].isin([STATES, defined["place"].iloc[-1]])].assign(series=series, row=row)
    rows = list(shown["row"].unique())
    figure = plots.curve_grid(
        shown,
        x="sigma",
        x_label="\u03c3 of the step that gets noise (the first step on the left)",
        row="row",
        column="how",
        series="series",
        controls=[name for name in shown["series"].unique() if "control" in name],
        row_labels={row: f"ROC AUC:\n{row}" for row in rows},
        limits=dict.fromkeys(rows, (0.0, 1.03)),
        lines_at=dict.fromkeys(rows, 0.5),
        noise_axis=True,
    )
    about = (
        "Area under the ROC curve with which the distance from the unedited run tells runs that show another legal answer, or"
        " that have lost theirs, from runs that have kept it, among runs with noise at the same step and samples with several"
        " legal answers; within each task, then the mean over tasks. 0.5 is chance. A point needs"
        f" {fewest} runs of either kind in every task; the table has the counts. Right after: at the first compared step from the"
        " noise on. At the last step there is little left to tell: the answer is read from the video that x0-hat is there."
    )
    context.figure("prediction", figure, "Whether the distance tells a changed answer", f"{about} {SHADED}")
