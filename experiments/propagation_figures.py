"""What `propagation` shows: heat maps over injected and later steps, the sensitivity curve, and what distances tell."""

from __future__ import annotations

import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.noised import STATES

NULL = "another seed"
SHADED = "Shaded: 95 % bootstrap intervals over samples, N of them in the corner."


def draw(context: Context, results: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """All figures and tables."""
    maps(context, results)
    curves(context, results)
    told(context, predictions)
    numbers(context, results)


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
        f"CKA dissimilarity from the unedited run, mean over {rows['cluster'].nunique()} samples; below, the width of its 95 %"
        " bootstrap interval over samples. Rows: the step that gets noise, and its \u03c3; the top row is an unedited run with"
        " another seed (the null). Columns: the step at which the two are compared, and its \u03c3. Another run of the same seed"
        f" differs by at most {results[results['kind'] == 'again']['dissimilarity'].max():.1g}."
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
        )
        title = "in x0-hat" if name == "x0-hat" else f"in the streams after some blocks ({name.removeprefix('streams-')})"
        context.figure(name, figure, f"How far noise spreads, {title}", about)


def curves(context: Context, results: pd.DataFrame) -> None:
    """Sensitivity over sigma, beside what becomes of the answer."""
    noise, seeds = results[results["kind"] == "noise"], results[results["kind"] == "other seed"]
    run = ["kind", "how", "task", "sample", "cluster", "place"]
    after = noise[noise["later"] > noise["step"]]
    means = after.groupby([*run, "step", "sigma"])["dissimilarity"].mean().reset_index()
    ends = noise[noise["later"] == noise["later"].max()]
    by = ["how", "place", "sigma"]
    found = [summarise(means, "dissimilarity", by, "cluster").assign(measure="mean")]
    found += [summarise(ends, "dissimilarity", by, "cluster").assign(measure="end")]
    once = ends[ends["place"] == STATES].assign(
        lost=lambda table: table["clean_right"].astype(float) - table["right"].astype(float)
    )
    for name in ("lost", "changed", "rerouted"):
        found.append(summarise(once, name, ["how", "sigma"], "cluster").assign(measure=name, place="outcome"))
    null_means = seeds.groupby(run)["dissimilarity"].mean().reset_index()
    final = seeds[(seeds["later"] == seeds["later"].max()) & (seeds["place"] == STATES)]
    level = [summarise(final, name, ["kind"], "cluster").assign(measure=name, series=NULL) for name in ("changed", "rerouted")]
    for place in (STATES, noise["place"].iloc[-1]):
        last = seeds[(seeds["later"] == seeds["later"].max()) & (seeds["place"] == place)]
        for measure, table in (("mean", null_means[null_means["place"] == place]), ("end", last)):
            found_there = summarise(table, "dissimilarity", ["kind"], "cluster")
            level.append(found_there.assign(measure=measure, series=f"{NULL}, {place}"))
    levels = pd.concat([each for each in level if len(each)], ignore_index=True)
    columns = pd.DataFrame({"how": noise["how"].unique()})
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
        levels=levels.merge(columns, how="cross"),
        noise_axis=True,
    )
    about = "Sensitivity: the mean of the dissimilarity over the compared steps after the one that gets noise. Tasks together."
    context.figure("sensitivity", figure, "Sensitivity to noise at a step, and what becomes of the answer", f"{about} {SHADED}")


def told(context: Context, predictions: pd.DataFrame) -> None:
    """The area under the ROC curve of CKA and of L2, by injected step."""
    names = {"dissimilarity": "CKA dissimilarity", "distance": "L2 distance (control)"}
    defined = predictions.dropna(subset=["mean"])
    about = (
        "Area under the ROC curve with which the distance from the unedited run tells runs that no longer show its answer, among"
        " runs with noise at the same step; 0.5 is chance. Undefined where all answers or none are the unedited ones. Right"
        " after: at the first compared step from the noise on."
    )
    if defined.empty:
        return context.table("What distances tell of the answer", pd.DataFrame({"areas": ["none is defined"]}), about)
    series = defined["place"] + ", " + defined["measure"].map(names)
    shown = defined[defined["place"].isin([STATES, defined["place"].iloc[-1]])].assign(series=series)
    figure = plots.curve_grid(
        shown,
        x="sigma",
        x_label="\u03c3 of the step that gets noise (the first step on the left)",
        row="moment",
        column="how",
        series="series",
        controls=[name for name in shown["series"].unique() if "control" in name],
        row_labels={moment: f"ROC AUC,\n{moment}" for moment in shown["moment"].unique()},
        limits=dict.fromkeys(shown["moment"].unique(), (0.0, 1.03)),
        lines_at=dict.fromkeys(shown["moment"].unique(), 0.5),
        noise_axis=True,
    )
    return context.figure("prediction", figure, "Whether the distance tells a changed answer", f"{about} {SHADED}")


def numbers(context: Context, results: pd.DataFrame) -> None:
    """Final dissimilarity and outcomes, by kind of noise and step."""
    ends = results[(results["later"] == results["later"].max()) & (results["place"] == STATES)]
    ends = ends.assign(name=[_name(*row) for row in ends[["kind", "how", "step", "sigma"]].itertuples(index=False)])
    columns = {"dissimilarity": "CKA dissimilarity", "distance": "L2 distance", "right": "right", "same": "same answer"}
    table = {"run": list(ends["name"].unique())}
    for column, title in columns.items():
        kept = ends.dropna(subset=[column]).astype({column: float if column in ("dissimilarity", "distance") else bool})
        found = summarise(kept, column, ["name"], "cluster").set_index("name")
        table[title] = [in_words(found.loc[[name]], 3) if name in found.index else "-" for name in table["run"]]
    about = "x0-hat at the last step against that of the unedited run; 95 % bootstrap intervals over samples. Tasks together."
    context.table("At the end of the run", pd.DataFrame(table), about)


def _name(kind: str, how: str, step: float, sigma: float) -> str:
    return f"{how}, step {step:.0f} (\u03c3 {sigma:.2f})" if kind == "noise" else {"again": "the same seed again"}.get(kind, NULL)
