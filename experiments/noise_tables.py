"""The tables of `noise`: its criteria by task, the frames that a score reads, equal doses, and every arm with its dose.

`criteria` is also that of `propagation`: what a claim pools may hide opposite signs, so its numbers stand beside those of parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dit_lens.claims import LEVEL, Claim, difference, number
from dit_lens.experiment import Context
from dit_lens.statistics import Interval, in_words
from experiments.arms import ALL, BUT_LAST, NEITHER, ONE, SEVERAL
from experiments.noise_figures import SCORE, matched, measured, noisy

OF_VERDICTS = f"Intervals are those of verdicts ({100 * LEVEL:g} %), over samples."
OUTCOMES = {"right": "right", "legal": "legal", "same": "same answer", "damage_last": "damage, last frame"}
WHEN = {ONE: 0, SEVERAL: 1, BUT_LAST: 2, ALL: 3}


def draw(context: Context, results: pd.DataFrame, claims: Sequence[Claim]) -> None:
    """All tables, of what the results hold."""
    spared = results[(results["where"] != "frame") | (results["holds"] == NEITHER)]
    about = (
        f"The numbers of the claims, tasks together and each alone. {SCORE} Last column: of noise in frames, only runs in which"
        f" the first and the last latent frame get none. {OF_VERDICTS}"
    )
    parts = {**by_task(results), "noise in neither first nor scored frame": spared}
    context.table("What the criteria pool", criteria(claims, parts), about)
    frames(context, noisy(results))
    equal_doses(context, matched(noisy(results)))
    doses(context, results)


def by_task(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The results, and those of each task."""
    return {"together": results, **{str(task): rows for task, rows in results.groupby("task", sort=False)}}


def criteria(claims: Sequence[Claim], parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The number of every criterion in parts of the results, one column for each."""
    return pd.DataFrame(
        [
            {"criterion": f"{claim.name}: {criterion}", **{name: _words(criterion.measure(part)) for name, part in parts.items()}}
            for claim in claims
            for criterion in claim.criteria
        ]
    )


def frames(context: Context, noise: pd.DataFrame) -> None:
    """Noise in one frame, by what that frame holds."""
    ones = noise[(noise["where"] == "frame") & (noise["count"] == 1)]
    rows = []
    for (how, when, held), group in ones.groupby(["how", "when", "holds"]):
        found = {"order": WHEN[str(when)], "noise": f"{how}, {when}", "in": held}
        found |= {title: in_words(measured(group, ["kind"], [name])) for name, title in OUTCOMES.items()}
        alone = {task: in_words(measured(part, ["kind"], ["right"])) for task, part in group.groupby("task", sort=False)}
        rows.append(found | {f"right, {task}": text for task, text in alone.items()} | {"N": group["cluster"].nunique()})
    table = pd.DataFrame(rows).sort_values(["order", "noise"], kind="stable").drop(columns="order").fillna("-")
    about = (
        f"Noise in one latent frame, by which it is: the first, the scored one, or neither; tasks together, and right by task."
        f" {SCORE} So the rows of neither are success without corrupted frames in the score. 95 % bootstrap intervals over"
        " samples."
    )
    context.table("Noise in the frame that is scored, and in others", table, about)


def equal_doses(context: Context, rows: pd.DataFrame) -> None:
    """Success at equal doses, in whole frames and in all of them, and the difference."""
    found = []
    rows = rows.assign(dose=rows["share"].round(3)).sort_values(["how", "when", "step", "dose"], kind="stable")
    for (at, how, dose), group in rows.groupby(["at", "how", "dose"], sort=False):
        if group["where"].nunique() == 2:
            sides = {name: (part, part["where"] == "frame", part["where"] == "step") for name, part in by_task(group).items()}
            pairs = {name: less(part, "right", *pair) for name, (part, *pair) in sides.items()}
            found.append({"noise": f"{how}, {at}, dose {dose:g}"} | pairs)
    table = pd.DataFrame(found or [{"noise": "no dose is in both"}])
    about = (
        "Share right with noise in whole frames, with as much mixed into all frames, and the first less the second. At one step"
        " the smallest dose may leave both at their ceiling, where there is no difference to see; larger doses are beside it."
        f" {OF_VERDICTS}"
    )
    context.table("Success at equal doses, by task", table, about)


def less(rows: pd.DataFrame, value: str, this: pd.Series, other: pd.Series) -> str:
    """The mean of a column over some rows, over others, and the first less the second with its interval."""
    means = [number(rows.loc[side, value].mean()) for side in (this, other)]
    return f"{means[0]} and {means[1]}: {_words(difference(rows, value, this, other, 'cluster'))}"


def _words(found: Interval) -> str:
    """A number with its interval and N, as the table of verdicts has it; a dash where nothing is defined."""
    if np.isnan(found.estimate):
        return "-"
    return f"{number(found.estimate)} [{number(found.low)}, {number(found.high)}], N = {found.clusters}"


def doses(context: Context, results: pd.DataFrame) -> None:
    """Every kind of arm with its dose and its outcomes."""
    noise = noisy(results).assign(share=lambda table: table["share"].round(3))
    rows = [
        _line("unedited", results[results["kind"] == "clean"]),
        _line("another seed", results[results["kind"] == "other seed"]),
    ]
    columns = ["how", "where", "when", "share"]
    kinds = {tuple(group[columns].iloc[0]): group for _, group in noise.groupby(columns)}
    for (how, place, when, share), group in sorted(kinds.items(), key=lambda item: (*item[0][:2], WHEN[item[0][2]], item[0][3])):
        # Noise at the first step is a reseed and not counted here.
        kept = group[group["step"] != 0] if when == ONE and (group["step"] > 0).any() else group
        where = "all frames" if place == "step" else "some frames"
        energies = {"destroyed": kept["destroyed"], "in all": kept["total"], "put in": kept["added"]}
        rows.append(_line(f"{how}, {where}, {when}, {share:g}", kept) | {name: f"{c.mean():.2f}" for name, c in energies.items()})
    table = pd.DataFrame(rows).fillna("-")
    about = (
        "Tasks together; means over steps after the first and over frames, with 95 % bootstrap intervals over samples. Named:"
        " how, where, when, and the share of the frames or of the energy mixed in. Destroyed: energy of the latents overwritten"
        " at a step, over all of it; in all: summed over the steps that get noise; put in: energy of the noise, over that of the"
        " latents."
    )
    context.table("Doses and what they do", table, about)


def _line(name: str, rows: pd.DataFrame) -> dict[str, str]:
    columns = {"right": "right", "legal": "legal", "same": "same answer", "damage": "damage"}
    found = {"noise": name, "destroyed": "-", "in all": "-", "put in": "-"}
    for column, title in columns.items():
        here = rows.dropna(subset=[column])
        found[title] = in_words(measured(here, ["kind"], [column]))
    return found | {"N": str(rows["cluster"].nunique())}
