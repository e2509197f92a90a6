"""What `specialization` puts to the test: claim C10b, the paper's bands of layers, by what is lost without a block.

The paper's evidence are maps of energy; damage is what a band of blocks is *for*. A trend of any size would do (the thresholds
are 0), as the paper gives no sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.statistics import Interval
from experiments.layer_figures import ABLATED, NOISE

Band = tuple[float, float]
EARLY, MIDDLE, LATE = (0.0, 0.25), (0.25, 0.75), (0.75, 1.0)
"""The paper's bands of 40 layers, 0-9, 10-29 and 30-39, as relative depth."""


def lost(results: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The damage to one measure at every block of every sample, mean over steps: a column for each edit."""
    kept = results[(results["quantity"] == "change by an edit") & (results["measure"] == measure)]
    cluster = kept["task"].astype(str) + "/" + kept["sample"].astype(str)
    return kept.assign(cluster=cluster).pivot_table("value", ["cluster", "depth"], "edit").reset_index()


def inside(table: pd.DataFrame, *bands: Band) -> pd.Series:
    """Rows of blocks in any of these bands."""
    found = pd.Series(False, index=table.index)
    for band in bands:
        found |= table["depth"].between(*band, "left")
    return found


def more(measure: str, here: Band, *elsewhere: Band, net: bool = False, first: bool = True) -> Callable[[pd.DataFrame], Interval]:
    """By how much more leaving out a block costs in one band than in others.

    Args:
        net: less what as large a change in random directions costs at the same block. first: whether the first block counts.
    """

    def measured(results: pd.DataFrame) -> Interval:
        table = lost(results, measure)
        table = table[first | (table["depth"] > 0)]
        table = table.assign(value=table[ABLATED] - net * table[NOISE])
        return difference(table, "value", inside(table, here), inside(table, *elsewhere), "cluster")

    return measured


def beyond_noise(results: pd.DataFrame) -> Interval:
    """By how much more reasoning is lost without a middle block than by as large a change in random directions."""
    table = lost(results, "reasoning")
    table = table[inside(table, MIDDLE)]
    gaps = (table[ABLATED] - table[NOISE]).groupby(table["cluster"]).mean()
    return mean(gaps, gaps.index.to_series())


COMPARED: dict[str, tuple[str, Band, *tuple[Band, ...]]] = {
    "perception lost, early minus other blocks": ("perception", EARLY, MIDDLE, LATE),
    "reasoning lost, middle minus early blocks": ("reasoning", MIDDLE, EARLY),
    "reasoning lost, middle minus late blocks": ("reasoning", MIDDLE, LATE),
    "picture lost, late minus other blocks": ("picture", LATE, EARLY, MIDDLE),
}
BESIDE = (
    "The claim's comparisons of bands, with its intervals: as judged, less what as large a change in random directions loses at"
    " the same block, and without the first block, on whose output all others stand. Only the first column is judged."
)


def beside(results: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of bands as the claim makes them, and net of noise and without the first block, in words."""
    ways = {
        "as judged": {},
        "less matched noise": {"net": True},
        "without the first block": {"first": False},
        "both": {"net": True, "first": False},
    }
    rows = []
    for name, (measure, *bands) in COMPARED.items():
        found = {way: more(measure, *bands, **how)(results) for way, how in ways.items()}
        told = {way: f"{one.estimate:.4f} [{one.low:.4f}, {one.high:.4f}]" for way, one in found.items()}
        rows.append({"damage": name, **told, "N": found["as judged"].clusters})
    return pd.DataFrame(rows)


CLAIMS = (
    Claim(
        name="C10b",
        statement="The first quarter of the blocks perceives, the middle half reasons, the last quarter consolidates.",
        source="sections 4.3 and 5.1 of arXiv 2603.16870",
        grade="third party (the bands), near-verbatim (background and foreground)",
        criteria=(
            *(Criterion(name, 0.0, more(*compared)) for name, compared in COMPARED.items()),
            Criterion("reasoning lost, middle blocks, minus by matched noise", 0.0, beyond_noise),
        ),
        control="noise in random directions, as large for every token as what the block adds",
        changed="the last of four places is at 0.8 of the schedule (it was the last step, where no edit can change the picture)",
    ),
)
