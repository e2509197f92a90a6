"""Claims: statements that a test can refute, written down before it is run, and what became of them.

A `Claim` says what somebody stated and where, and which numbers it stands or falls with. Each `Criterion` is one number, measured
from an experiment's results with an interval clustered by sample, and a threshold that it must lie beyond. It *holds* where
the whole interval lies beyond the threshold, *fails* where all of it lies on the other side, and is *open* in between. A claim is

* *supported* when all its criteria hold,
* *refuted* when one fails,
* *inconclusive* otherwise,
* *not tested* where the results have fewer than `MINIMUM` samples behind a criterion (a quick preset),
* *not testable* where this model cannot test it; the claim says why.

Many criteria are tested, and each may hold or fail by chance. All intervals of verdicts are therefore wider than 95 %, by
Bonferroni's rule: with at most `FAMILY` criteria in all experiments together, each has a level of 1 - 0.05 / `FAMILY`, so that
the chance of any wrong interval among them is at most 5 %. A changed threshold is named in `Claim.changed` and in every table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dit_lens.statistics import Interval, mean_interval, unvaried

FAMILY = 80
"""How many criteria there may be in all experiments together; a test counts them."""
LEVEL = 1 - 0.05 / FAMILY
RESAMPLES = 20_000
"""Of the bootstrap behind a verdict: about 6 of them lie beyond either end of its interval."""
MINIMUM = 100
"""Samples behind every criterion of a verdict."""

Outcome = Literal["holds", "fails", "open"]
MARKS: dict[Outcome, str] = {"holds": "\u2713", "fails": "\u2717", "open": "?"}
"""How tables mark what became of a criterion."""
Word = Literal["supported", "refuted", "inconclusive", "not tested", "not testable"]
COMMITTED = "verdicts.json"
"""In the folder of an experiment's code: the verdicts of its committed full run."""


@dataclass(frozen=True)
class Criterion:
    """One number that a claim stands or falls with.

    Attributes:
        name: what is measured, in words. threshold: what it must lie beyond. above: whether above it, or below.
        measure: results of the experiment -> the number with its interval at `LEVEL`; see `mean` and `difference`.
    """

    name: str
    threshold: float
    measure: Callable[[pd.DataFrame], Interval]
    above: bool = True

    def __str__(self) -> str:
        return f"{self.name} {'>' if self.above else '<'} {self.threshold:g}"


@dataclass(frozen=True)
class Claim:
    """What somebody stated, and what it stands or falls with.

    Attributes:
        name: short, as `C4`. statement: in our words. source: paper and section. grade: how well the source is known ("quoted",
            "near-verbatim", "authors", "third party").
        criteria: all must hold. control: what they are compared with, in words.
        untestable: why this model cannot test it; there are no criteria then.
        changed: which threshold was changed after a full run, from what, and why; empty as a rule.
    """

    name: str
    statement: str
    source: str
    grade: str
    criteria: tuple[Criterion, ...] = ()
    control: str = ""
    untestable: str = ""
    changed: str = ""


@dataclass(frozen=True)
class Found:
    """One criterion and what was measured of it."""

    criterion: str
    estimate: float
    low: float
    high: float
    threshold: float
    clusters: int
    measurements: int
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """A claim and what became of it."""

    claim: str
    statement: str
    source: str
    grade: str
    verdict: Word
    reason: str
    found: tuple[Found, ...]
    control: str = ""
    changed: str = ""
    level: float = LEVEL


def judged(claim: Claim, results: pd.DataFrame) -> Verdict:
    """What becomes of a claim with these results."""
    found = () if claim.untestable else tuple(_found(criterion, results) for criterion in claim.criteria)
    word, reason = _verdict(claim, found)
    return Verdict(claim.name, claim.statement, claim.source, claim.grade, word, reason, found, claim.control, claim.changed)


def _found(criterion: Criterion, results: pd.DataFrame) -> Found:
    measured = criterion.measure(results)
    beyond, short = measured.low > criterion.threshold, measured.high < criterion.threshold
    if not criterion.above:
        beyond, short = short, beyond
    outcome: Outcome = "holds" if beyond else "fails" if short else "open"
    return Found(str(criterion), threshold=criterion.threshold, outcome=outcome, **asdict(measured))


def _verdict(claim: Claim, found: Sequence[Found]) -> tuple[Word, str]:
    if claim.untestable:
        return "not testable", claim.untestable
    few = min(one.clusters for one in found)
    if few < MINIMUM:
        return "not tested", f"a verdict rests on {MINIMUM} samples or more, and here are {few}"
    failed = [one.criterion for one in found if one.outcome == "fails"]
    if failed:
        return "refuted", f"not so: {'; '.join(failed)}"
    undecided = [one.criterion for one in found if one.outcome == "open"]
    if undecided:
        return "inconclusive", f"undecided: {'; '.join(undecided)}"
    return "supported", "every criterion holds"


def mean(values: pd.Series, clusters: pd.Series) -> Interval:
    """The mean over measurements at the level of verdicts; undefined (nan) measurements are left out.

    Where all are equal, the interval is that of `statistics.unvaried`.
    """
    kept = ~values.isna()
    return unvaried(mean_interval(values[kept].to_numpy(), clusters[kept].to_numpy(), LEVEL, RESAMPLES), LEVEL)


def difference(results: pd.DataFrame, value: str, this: pd.Series, other: pd.Series, cluster: str = "sample") -> Interval:
    """Mean of `value` over the rows `this` minus that over the rows `other`, paired by cluster, at the level of verdicts.

    Args:
        this, other: masks of rows. cluster: the column that names the samples; of several tasks, one that names both.

    Clusters that lack either side are left out; every cluster has the same weight. Where all differences are equal, the
    interval is that of `statistics.unvaried`.
    """
    means = [results[mask].dropna(subset=[value]).groupby(cluster)[value].mean() for mask in (this, other)]
    paired = (means[0].astype(float) - means[1].astype(float)).dropna()
    return unvaried(mean_interval(paired.to_numpy(), np.asarray(paired.index), LEVEL, RESAMPLES), LEVEL)


def committed(folder: Path) -> dict[str, dict[str, Any]]:
    """The verdicts of the committed full runs of a folder's experiments, by the name of the claim; empty where none are."""
    path = folder / COMMITTED
    return {one["claim"]: one for one in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def as_table(verdicts: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Verdicts (as written in `claims.json`) as a table to be read: one row per claim, in ``numbers`` one line per criterion."""
    rows = []
    for one in verdicts:
        # What rests on few samples neither holds nor fails.
        told = one["verdict"] != "not tested"
        numbers = "\n".join((f"{MARKS[each['outcome']]} " if told else "") + _in_words(each) for each in one["found"])
        before = one.get("committed")
        rows.append(
            {
                "claim": one["claim"],
                "statement": one["statement"],
                "verdict": one["verdict"] if one["verdict"] != "not tested" else "quick: not tested",
                "committed full run": before["verdict"] if before else "-",
                "numbers": numbers or one["reason"],
                "control": one["control"],
                "source": f"{one['source']} ({one['grade']})" + (f"; changed: {one['changed']}" if one["changed"] else ""),
            }
        )
    return pd.DataFrame(rows)


def _in_words(found: dict[str, Any]) -> str:
    estimate, low, high = (number(found[name]) for name in ("estimate", "low", "high"))
    return f"{found['criterion']}: {estimate} [{low}, {high}], N = {found['clusters']}"


def number(value: float | None) -> str:
    """Three significant digits; a dash for nothing."""
    return "-" if value is None or np.isnan(value) else f"{value:.3g}"
