"""How far noise at one step spreads along the rest of a run (paper 2603.16870, Fig. 3c).

Noise is put into all frames at one step (as in `noise`, and the runs are the same ones), and the run is compared with the
unedited one at every later step: by CKA *dissimilarity*, 1 - linear CKA, of the x0-hats (latent pixels x channels) and of the
streams after some blocks (tokens x channels, cond branch), each sample for itself, then averaged. 0 means that nothing is left
of the disturbance, 1 that nothing is alike. *Sensitivity* to noise at a step is the mean dissimilarity at all compared steps
after it.

A run that went elsewhere is not a damaged one: another seed diverges too, and gives as good an answer. So the control is the
dissimilarity of two unedited runs with different seeds; an unedited run that is made again differs by rounding only. Whether
dissimilarity says anything about the answer is measured as the area under the ROC curve with which it tells runs that show
another legal answer, and runs that have lost theirs, from those that have kept the unedited one, among runs with noise at the
same step; the plain L2 distance, divided by the norm, is its control. Tasks differ in both, how far runs go and how often
answers change, so the area is measured within each task and averaged, over samples that have several legal answers.

Thinned in the full preset: runs are compared at every second step and the last. There is one seed beside the control's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.experiment import CLOCK_COLUMNS, Context, Experiment
from dit_lens.statistics import Interval, Resampled, macro_auc_resampled
from experiments import noised, propagation_figures, propagation_tables
from experiments.noised import STATES
from experiments.propagation_tables import ANOTHER, LOST

AT = ["told", "moment", "how", "place", "step", "sigma"]
PREDICTED = [*AT, "measure", "mean", "low", "high", "clusters", "positives", "counts"]
CARRIED = ["task", "sample", "cluster", "several", "seed", "kind", "right", "legal", "clean_right", "same", "changed", "rerouted"]
FEWEST = 10
"""Runs of either kind that an area under the curve needs in every task."""


@dataclass(frozen=True)
class Settings(noised.Settings):
    """As the shared ones."""


def long(runs: noised.NoisedRuns, table: pd.DataFrame, distances: np.ndarray, first: int = 0) -> Iterator[pd.DataFrame]:
    """One row per run, place and compared step, from the table of the runs and their distances."""
    names = [STATES, *(f"depth {depth:g}" for depth in runs.settings.depths)]
    for later, there in zip(runs.later, distances, strict=True):
        for place, values in zip(names, there, strict=True) if later >= first else ():
            if not np.isnan(values).all():
                yield table.assign(
                    later=later,
                    later_sigma=runs.clock[later]["sigma"],
                    place=place,
                    dissimilarity=values[:, 0],
                    distance=values[:, 1],
                )


def run(context: Context) -> pd.DataFrame:
    runs = noised.NoisedRuns(context)
    rows: list[pd.DataFrame] = []
    for part in runs.unedited():
        for kind, source in (("other seed", "other seed"), ("again", "clean")):
            table = part.table[part.table["kind"] == source][CARRIED].assign(kind=kind, how=kind).reset_index(drop=True)
            rows += long(runs, table, part.arrays[kind])
    for arm, part in runs.at_steps():
        rows += long(runs, part.table[[*CARRIED, "how", *CLOCK_COLUMNS]], part.arrays["distances"], arm.steps[0])
    results = beside_seeds(pd.concat(rows, ignore_index=True))
    told = predictions(results)
    propagation_figures.draw(context, results, told, FEWEST)
    propagation_tables.draw(context, results, told, CLAIMS, early(results), FEWEST)
    return results


def beside_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """``seeds``: the dissimilarity of two seeds of the same sample, at the same step and place."""
    key = ["task", "sample", "later", "place"]
    other = results[results["kind"] == "other seed"].set_index(key)["dissimilarity"].rename("seeds")
    return results.join(other, on=key)


def predictions(results: pd.DataFrame) -> pd.DataFrame:
    """How well dissimilarity and distance tell runs whose answer changed from those that kept it, by injected step.

    Apart for ``told``: another legal answer, and none any more. Right after the noise (the first compared step from there on) and
    at the last step. Undefined where a task has fewer than `FEWEST` runs of either kind; ``counts``: how many each has, and
    ``positives`` those with a changed answer in all.
    """
    noise = results[(results["kind"] == "noise") & results["changed"].notna() & results["several"]]
    kept, legal = noise["changed"] == 0, noise["legal"].astype(bool)
    first = noise.groupby(["how", "step"])["later"].transform("min")
    moments = {"right after": noise["later"] == first, "at the last step": noise["later"] == noise["later"].max()}
    tasks = list(noise["task"].unique())
    rows: list[dict[str, Any]] = []
    for told, which in ((ANOTHER, ~kept & legal), (LOST, ~kept & ~legal)):
        for moment, then in moments.items():
            there = noise.assign(told=which)[then & (kept | which)]
            for (how, place, step, sigma), group in there.groupby(["how", "place", "step", "sigma"], sort=False):
                at = dict(zip(AT, (told, moment, how, place, step, sigma), strict=True))
                for measure in ("dissimilarity", "distance"):
                    rows.append({**at, "measure": measure, **within_tasks(group.dropna(subset=[measure]), measure, tasks)})
    # Where no unedited run shows an answer, there is nothing to tell.
    return pd.DataFrame(rows, columns=PREDICTED)


def within_tasks(runs: pd.DataFrame, measure: str, tasks: list[str]) -> dict[str, Any]:
    """The area under the ROC curve of each task, averaged; nan where one has too few runs of a kind."""
    parts = [runs[runs["task"] == task] for task in tasks]
    sizes = [((~part["told"]).sum(), part["told"].sum()) for part in parts]
    counts = ", ".join(f"{task} {kept} and {told}" for task, (kept, told) in zip(tasks, sizes, strict=True))
    behind = {"clusters": runs["cluster"].nunique(), "positives": int(runs["told"].sum()), "counts": counts}
    if min(min(pair) for pair in sizes) < FEWEST:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, **behind}
    # Samples of different tasks are drawn independently.
    areas = [macro_auc_resampled(part[[measure]], part[["told"]], part["cluster"], seed=seed) for seed, part in enumerate(parts)]
    estimate, draws = float(np.mean([area.estimate for area in areas])), np.mean([area.draws for area in areas], axis=0)
    found = Resampled(estimate, draws, sum(area.clusters for area in areas), len(runs)).interval()
    return {"mean": found.estimate, "low": found.low, "high": found.high, **behind}


def early(results: pd.DataFrame) -> pd.Series:
    """Replaced at a step with sigma above 0.9 that is not the first, which is a reseed; at the end of the run, x0-hat."""
    noise = (results["kind"] == "noise") & (results["how"] == "replaced")
    return noise & (results["step"] > 0) & (results["sigma"] > EARLY) & last(results)


def last(results: pd.DataFrame) -> pd.Series:
    return (results["later"] == results["later"].max()) & (results["place"] == STATES)


def still_apart(results: pd.DataFrame) -> Interval:
    rows = results[early(results)]
    return mean(rows["dissimilarity"] - 0.5 * rows["seeds"], rows["cluster"])


def compared_with(kind: str, column: str, results: pd.DataFrame) -> Interval:
    """A column of the early runs against that of unedited ones; of `right`, how much is lost."""
    this, other = early(results), last(results) & (results["kind"] == kind)
    if column == "right":
        this, other = other, this
    return difference(results, column, this, other, "cluster")


EARLY = 0.9  # above it lie steps 1 to 18 of 50 at shift 5: before the band in which the paper sees the conclusion solidify
QUARTER = 0.1  # a quarter of the drop from 0.685 to below 0.3 that the paper reports of noise at a step

CLAIMS = (
    Claim(
        "C6",
        "What noise at an early step disturbs is never recovered: states stay apart to the end, and the result changes.",
        "Fig. 3c, section 3.2 of arXiv 2603.16870: hardly any recovery, the final reasoning result changes",
        "near-verbatim",
        (
            Criterion("final dissimilarity after early noise, minus half of that of two seeds", 0, still_apart),
            Criterion("success lost with early noise", QUARTER, partial(compared_with, "again", "right")),
            Criterion("answers changed, minus by another seed", QUARTER, partial(compared_with, "other seed", "changed")),
        ),
        "two unedited runs with different seeds: trajectories that differ while answers are right are reseeding, not damage. A"
        " changed answer is another legal one or a lost one: a table parts them, and gives all by task and without samples of one"
        " legal answer",
    ),
)

EXPERIMENT = Experiment(
    name="propagation",
    title="How far noise spreads",
    source="Fig. 3c and section 3.2 of arXiv 2603.16870",
    question="Does a run recover from noise at a step, and does the distance that remains mean another answer?",
    presets={"quick": Settings(), "full": Settings(**noised.FULL)},
    run=run,
    claims=CLAIMS,
    minutes=4,
)
