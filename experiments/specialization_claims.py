"""What `specialization` puts to the test: claim C10b, the paper's bands of layers, by what is lost without a block.

The paper's evidence are maps of energy; damage is what a band of blocks is *for*. A trend of any size would do (the thresholds
are 0), as the paper gives no sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from dit_lens.claims import Claim, Criterion, difference
from dit_lens.statistics import Interval
from experiments.layer_figures import ABLATED, NOISE

Band = tuple[float, float]
EARLY, MIDDLE, LATE = (0.0, 0.25), (0.25, 0.75), (0.75, 1.0)
"""The paper's bands of 40 layers, 0-9, 10-29 and 30-39, as relative depth."""


def lost(results: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The damage to one measure, sample by sample."""
    kept = results[(results["quantity"] == "change by an edit") & (results["measure"] == measure)]
    return kept.assign(cluster=kept["task"].astype(str) + "/" + kept["sample"].astype(str))


def inside(table: pd.DataFrame, *bands: Band) -> pd.Series:
    """Rows of blocks in any of these bands."""
    found = pd.Series(False, index=table.index)
    for band in bands:
        found |= table["depth"].between(*band, "left")
    return found


def more(measure: str, here: Band, *elsewhere: Band) -> Callable[[pd.DataFrame], Interval]:
    """By how much more leaving out a block costs in one band than in others."""

    def measured(results: pd.DataFrame) -> Interval:
        table = lost(results, measure)
        ablated = table["edit"] == ABLATED
        return difference(table, "value", ablated & inside(table, here), ablated & inside(table, *elsewhere), "cluster")

    return measured


def beyond_noise(results: pd.DataFrame) -> Interval:
    """By how much more reasoning is lost without a middle block than by as large a change in random directions."""
    table = lost(results, "reasoning")
    middle = inside(table, MIDDLE)
    return difference(table, "value", middle & (table["edit"] == ABLATED), middle & (table["edit"] == NOISE), "cluster")


CLAIMS = (
    Claim(
        name="C10b",
        statement="The first quarter of the blocks perceives, the middle half reasons, the last quarter consolidates.",
        source="sections 4.3 and 5.1 of arXiv 2603.16870",
        grade="third party (the bands), near-verbatim (background and foreground)",
        criteria=(
            Criterion("perception lost, early minus other blocks", 0.0, more("perception", EARLY, MIDDLE, LATE)),
            Criterion("reasoning lost, middle minus early blocks", 0.0, more("reasoning", MIDDLE, EARLY)),
            Criterion("reasoning lost, middle minus late blocks", 0.0, more("reasoning", MIDDLE, LATE)),
            Criterion("picture lost, late minus other blocks", 0.0, more("picture", LATE, EARLY, MIDDLE)),
            Criterion("reasoning lost, middle blocks, minus by matched noise", 0.0, beyond_noise),
        ),
        control="noise in random directions, as large for every token as what the block adds",
    ),
)
