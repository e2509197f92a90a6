"""The tables of `propagation`: its claim by task and by what a changed answer is, what distances tell, and the end of the run."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dit_lens.claims import Claim
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.noise_tables import OF_VERDICTS, by_task, criteria, less
from experiments.noised import STATES
from experiments.propagation_figures import NULL

ANOTHER, LOST = "another legal answer", "answer lost"
SEVERAL = "samples with several answers"


def draw(
    context: Context, results: pd.DataFrame, predictions: pd.DataFrame, claims: Sequence[Claim], early: pd.Series, fewest: int
) -> None:
    """All tables. ``early``: the runs with early noise, at their end; ``fewest``: as in the figures."""
    parts = {**by_task(results), SEVERAL: results[results["several"]]}
    about = (
        f"The numbers of the claim, tasks together and each alone, and without samples that have one legal answer. {OF_VERDICTS}"
    )
    context.table("What the criteria pool", criteria(claims, parts), about)
    changes(context, results, early)
    told(context, predictions, fewest)
    numbers(context, results)


def changes(context: Context, results: pd.DataFrame, early: pd.Series) -> None:
    """Answers that changed with early noise, as other legal ones and as lost ones, less those that change with a seed."""
    ends = (results["later"] == results["later"].max()) & (results["place"] == STATES)
    other = ends & (results["kind"] == "other seed")
    moved, legal = results["changed"].astype(float), results["legal"].astype(float)
    kinds = {"answer changed": moved, ANOTHER: moved * legal, LOST: moved * (1 - legal)}
    rows = []
    for name, values in kinds.items():
        chosen = results.assign(value=values, noisy=early, seed=other)[early | other].dropna(subset=["value"])
        parts = {**by_task(chosen), SEVERAL: chosen[chosen["several"]]}
        rows.append({"what": name} | {title: less(part, "value", part["noisy"], part["seed"]) for title, part in parts.items()})
    about = (
        "Share of runs with noise at an early step, share of those with another seed, and the first less the second. Of unedited"
        f" runs that show an answer; changed is either of the two below it. {OF_VERDICTS}"
    )
    context.table("What a changed answer is", pd.DataFrame(rows), about)


def told(context: Context, predictions: pd.DataFrame, fewest: int) -> None:
    """What x0-hat tells right after the noise, and the runs behind it."""
    first = predictions[(predictions["moment"] == "right after") & (predictions["place"] == STATES)]
    first = first[first["positives"] > 0].sort_values(["told", "how", "step"], kind="stable")
    rows = []
    for (kind, how, step, sigma, counts), group in first.groupby(["told", "how", "step", "sigma", "counts"], sort=False):
        measured = group.set_index("measure")
        areas = {name: in_words(measured.loc[[name]].dropna(subset=["mean"])) for name in ("dissimilarity", "distance")}
        line = {"told": kind, "noise": f"{how}, step {step:.0f} (\u03c3 {sigma:.2f})", "kept, and told from these": counts}
        rows.append({**line, "CKA": areas["dissimilarity"], "L2": areas["distance"]})
    table = pd.DataFrame(rows or [{"told": "no unedited run of several legal answers shows one"}])
    about = (
        "Area under the ROC curve in x0-hat, at the first compared step from the noise on, with 95 % bootstrap intervals over"
        f" samples; a dash where a task has fewer than {fewest} runs of either kind. Samples with several legal answers. Steps at"
        " which no such run is there to be told are left out."
    )
    context.table("What distances tell of the answer", table, about)


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
