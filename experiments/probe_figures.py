"""The figures and tables of the probe map: every target over blocks and steps, and what it is to be held against.

Every figure has the trained and the untrained model, the baselines, and with the scores their selectivity.
"""

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words
from probes.baselines import LATENTS, PLACE, SITUATION, TIMESTEP
from probes.closer import KINDS
from probes.targets import ALL

TRAINED, UNTRAINED, CONTROL = "trained model", "untrained model", "control task"
BASELINES = (LATENTS, SITUATION, PLACE)
"""Those that are drawn one by one, from below in a map; `TIMESTEP` is chance."""
SCALES = {"auc": ("ROC AUC", (0.5, 1.0)), "r2": ("R\u00b2", (0.0, 1.0))}
"""How a score is called, and what chance and a perfect reader get: the ends of its colours."""
DEPTH_STEPS = 2
"""Curves over depth are drawn at the first so many steps."""
GAP = ["selectivity", "selectivity_low", "selectivity_high"]


def draw(context: Context, results: pd.DataFrame) -> None:
    """Maps and curves of every task, and two tables."""
    shown = results.assign(
        scale=results["kind"].eq("number").map({True: "r2", False: "auc"}),
        at=[f"{step} (\u03c3 {sigma:.2f})" for step, sigma in zip(results["step"], results["sigma"], strict=True)],
        title=results["target"] + "\n(" + results["content"] + ")",
    )
    for (task, branch, scale), part in shown.groupby(["task", "branch", "scale"], sort=False):
        name = "-".join([str(task), *[str(branch)] * (branch != "cond"), *[str(scale)] * (scale != "auc")])
        made = described(context, str(task), str(branch), part)
        maps(context, part, name, str(scale), made)
        depth(context, part, name, str(scale), made)
    best_cells(context, shown)
    if "compression" in results:
        closer(context, shown)


def described(context: Context, task: str, branch: str, part: pd.DataFrame) -> str:
    """What was read, and of how much: the beginning of a caption."""
    settings = context.settings
    tasks, steps = len(settings.tasks), part["step"].nunique()
    of = f"{tasks} of {len(ALL)} tasks, " if task in ALL else ""
    thinned = f" Thinned: {of}{steps} steps, {settings.samples} samples." if settings.samples < 100 else ""
    return (
        f"{task}: ridge probes on the tokens of the last latent frame (the middle one for `hidden place`), {branch} branch,"
        f" {settings.samples} held-out samples, {settings.test_share:.0%} of the puzzles for testing.{thinned}"
    )


def maps(context: Context, part: pd.DataFrame, name: str, scale: str, made: str) -> None:
    """Score and selectivity of both models over blocks and steps, the baselines underneath."""
    label, limits = SCALES[scale]
    selective = (0.0, limits[1] - limits[0])
    measures = {"estimate": (f"held-out {label}", limits), "selectivity": (f"selectivity ({label})", selective)}
    panels = {(model, measure): f"{model}, {measure}" for measure in measures for model in (TRAINED, UNTRAINED)}
    tables = []
    for (model, measure), panel in panels.items():
        rows = part[part["reader"].isin([model, *BASELINES])]
        y = rows["block"].astype("string").where(rows["reader"] == model, rows["reader"])
        tables.append(rows.assign(panel=panel, value=rows[measure], y=y))
    blocks = [f"{block}" for block in sorted(part["block"].dropna().unique())]
    baselines = [reader for reader in BASELINES if (part["reader"] == reader).any()]
    titles = {}
    for target, rows in part[part["reader"] == TRAINED].groupby("title", sort=False):
        wide, gap = (((rows[f"{of}high"] - rows[f"{of}low"]) / 2).median() for of in ("", "selectivity_"))
        known = f"N = {rows['clusters'].max()}, \u00b1{wide:.2f}\nselectivity \u00b1{gap:.2f}"
        titles[target] = f"{target}\n" + ("nothing to read" if np.isnan(wide) else known)
    figure = plots.heat_grid(
        pd.concat(tables),
        row="panel",
        column="title",
        x="at",
        y="y",
        value="value",
        x_label="step, and its noise level \u03c3",
        row_labels={panel: f"{model}\nblock" for (model, _), panel in panels.items()},
        value_labels={panel: measures[measure][0] for (_, measure), panel in panels.items()},
        y_order=[*baselines, "", *blocks],
        limits={panel: measures[measure][1] for (_, measure), panel in panels.items()},
        titles=titles,
    )
    about = (
        "Columns: targets with N, the test puzzles, and \u00b1 half the 95 % bootstrap interval over them, of the score and of"
        " its selectivity (medians over the cells; score and control in the same resamples). Under the blocks of either model"
        " the same baselines, which see no activation; the timestep alone is at the dark end. Selectivity: the score less that"
        " of the control task (a random label for every place); 0 or less is dark. White: nothing to read."
    )
    small = part["title"].nunique() < 3
    context.figure(f"map-{name}", figure, f"What can be read, by block and step: {name}", f"{made} {about}", wide=not small)


def depth(context: Context, part: pd.DataFrame, name: str, scale: str, made: str) -> None:
    """Scores over the blocks at the first steps, with intervals, the control task and the baselines."""
    label, (chance, _) = SCALES[scale]
    part = part.assign(mean=part["estimate"], series=part["reader"])
    part = part[part["at"].isin(list(dict.fromkeys(part["at"]))[:DEPTH_STEPS])]
    probed = part[part["reader"].isin([TRAINED, UNTRAINED])]
    control = part[part["reader"] == TRAINED]
    control = control.assign(series=CONTROL, mean=control["control"], low=np.nan, high=np.nan)
    rows = {at: f"step {at}\nheld-out {label}" for at in dict.fromkeys(part["at"])}
    figure = plots.curve_grid(
        pd.concat([probed, control]),
        x="block",
        x_label="block",
        row="at",
        column="title",
        series="series",
        levels=part[part["reader"].isin(BASELINES)].assign(low=np.nan, high=np.nan),
        row_labels=rows,
        lines_at=dict.fromkeys(rows, chance),
    )
    about = (
        "Shaded: 95 % bootstrap intervals over the test puzzles, N of them in the corner. Green: the control task (a random"
        " label for every place) of the trained model; the gap to it is the selectivity. Dashed: baselines without"
        " activations. Thin line: chance, which is what the timestep alone gives."
    )
    small = part["title"].nunique() < 3
    context.figure(f"depth-{name}", figure, f"Over depth, at the first steps: {name}", f"{made} {about}", wide=not small)


def best_cells(context: Context, results: pd.DataFrame) -> None:
    """Each target at the cell where it is read best, beside its controls and baselines there."""
    rows = []
    for (task, target), part in results.groupby(["task", "target"], sort=False):
        probed = part[part["reader"] == TRAINED].dropna(subset=["estimate"])
        if probed.empty:
            rows.append({"task": task, "target": target, "content": part["content"].iloc[0]})
            continue
        best = probed.nlargest(1, "estimate")
        cell = best.iloc[0]
        there = part[(part["step"] == cell["step"]) & (part["branch"] == cell["branch"])]
        same = there[(there["reader"] == UNTRAINED) & (there["block"] == cell["block"])]
        known = there[there["reader"].isin([*BASELINES, TIMESTEP])].set_index("reader")["estimate"]
        rows.append(
            {
                "task": task,
                "target": target,
                "content": cell["content"],
                "measure": SCALES[cell["scale"]][0],
                "best cell": f"block {cell['block']}, step {cell['at']}",
                "score": in_words(best.rename(columns={"estimate": "mean"})),
                "N": cell["clusters"],
                "selectivity": in_words(best[GAP].rename(columns=dict(zip(GAP, ("mean", "low", "high"), strict=True)))),
                "control": cell["control"],
                "shuffled": cell["shuffled"],
                UNTRAINED: same["estimate"].mean(),
                **{reader: known.get(reader) for reader in (PLACE, SITUATION, LATENTS, TIMESTEP)},
            }
        )
    about = (
        f"{context.settings.samples} held-out samples a task; 95 % bootstrap intervals over N test puzzles. The best of all"
        " cells is an optimistic choice. The untrained model and the baselines are read at the same cell or step; the timestep"
        " tells nothing within a step."
    )
    context.table("Where each target is read best", pd.DataFrame(rows).round(3), about)


def closer(context: Context, results: pd.DataFrame) -> None:
    """Other kinds of probes and code lengths, at the block where the nonlinear probe reads best."""
    rows = []
    seen = results[results["reader"].isin([TRAINED, UNTRAINED])].dropna(subset=["nonlinear"])
    for (task, target, at, reader), part in seen.groupby(["task", "target", "at", "reader"], sort=False):
        best = part.nlargest(1, "nonlinear").iloc[0]
        kinds = {name: f"{best[name]:.2f} ({best[f'{name} selectivity']:.2f})" for name in KINDS}
        rows.append(
            {"task": task, "target": target, "step": at, "model": reader, "block": best["block"], **kinds}
            | {"bits": best["bits"], "compression": best["compression"], "N": int(best["closer_clusters"])}
        )
    about = (
        "Held-out ROC AUC of three kinds of probes and, in brackets, their selectivity (the score less that of the same kind of"
        " probe in the control task), at the block where the nonlinear one reads best, in the first"
        f" {context.settings.closer_samples} samples, N test puzzles. Bits: online code length per label; compression: that of"
        " a code that knows only how often each label is, over it (1: the stream does not help)."
    )
    context.table("Headline targets, looked at more closely", pd.DataFrame(rows).round(3), about)
