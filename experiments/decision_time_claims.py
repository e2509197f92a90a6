"""The two papers' conflict, and what would settle it, as claims.

Thresholds are the papers' own noise levels and shares where they give any, written down before the first full run: `FIXED` and
`ALMOST` of ChEaP, `MIDDLE` of CoS. Where a schedule has no step at a level, the nearest that was measured stands for it. What
a new seed changes is the measure for what noise changes: half of it is the border.
"""

import pandas as pd

from dit_lens.claims import Claim, Criterion, mean
from dit_lens.statistics import Interval
from experiments.timing import nearest

FIXED, ALMOST = 0.94, 0.97
"""Steps 10 and 5 of 40 at shift 5."""
MIDDLE = (0.77, 0.88)
"""Steps 30 and 20 of 50 at shift 5."""
CLUSTER = "cluster"


def average(rows: pd.DataFrame, values: pd.Series) -> Interval:
    return mean(values, rows[CLUSTER])


def settled_by(results: pd.DataFrame, sigma: float) -> Interval:
    """Share of runs whose readout is at this noise level or above."""
    rows = results[results["about"] == "run"].dropna(subset=["decided_sigma"])
    return average(rows, rows["decided_sigma"] >= sigma)


def commitment(results: pd.DataFrame, beyond: bool) -> Interval:
    """ChEaP's cosine at their step 5; or how far it is past the middle between another seed's and 1."""
    rows = results[results["about"] == "x0-hat"]
    rows = rows[nearest(rows, ALMOST)]
    return average(rows, rows["cosine_final"] - (1 + rows["cosine_other_seed"]) / 2 if beyond else rows["cosine_final"])


def beside_a_seed(results: pd.DataFrame, way: str, value: str, sigma: float) -> Interval:
    """A value of endings that leave at a noise level, less half of what it is for those that leave at step 0."""
    rows = results[(results["about"] == "endings") & (results["way"] == way)]
    # A new seed is a new seed whatever the way; the ancestral one is the model's own.
    seeds = results[(results["about"] == "endings") & (results["way"] == "ancestral")]
    seeds = seeds[seeds["step"] == seeds["step"].min()].groupby(CLUSTER)[value].mean()
    rows = rows[nearest(rows, sigma)]
    return average(rows, rows[value] - rows[CLUSTER].map(seeds) / 2)


EARLY_CHOICE = Criterion(
    "chance that two endings from sigma .94 differ, beyond half of that of seeds",
    0.0,
    lambda results: beside_a_seed(results, "ancestral", "differ", FIXED),
    above=False,
)

# A state that is replaced by noise keeps nothing of the run: whatever is left open, at least half as many answers change as with
# a new seed, at any noise level. So what `replaced` loses can settle nothing; it is in the figure and in a table.
VACUOUS = "was measured with the state replaced by noise, which at any sigma loses at least half of what a seed changes"

CLAIMS = (
    Claim(
        "T1a",
        "The answer is fixed in the first steps: almost at sigma .97, and by .94.",
        "arXiv 2603.30043, commitment",
        "third party",
        (
            Criterion("share of runs whose readout is at sigma .9 or above", 0.5, lambda results: settled_by(results, 0.9)),
            Criterion("cosine to the final video at sigma .97", 0.93, lambda results: commitment(results, beyond=False)),
            Criterion(
                "the same past the middle between another seed's and 1", 0.0, lambda results: commitment(results, beyond=True)
            ),
            EARLY_CHOICE,
        ),
        "the final video of another seed; endings of step 0, which are new seeds",
        changed="four endings of each state in place of two; thresholds as before",
    ),
    Claim(
        "T1b",
        "The conclusion solidifies in the middle steps, between sigma .88 and .77.",
        "arXiv 2603.16870, abstract and section 3.2, Fig. 3c",
        "quoted",
        (
            Criterion(
                "share of runs whose readout is above sigma .88", 0.5, lambda results: settled_by(results, MIDDLE[1]), above=False
            ),
            Criterion(
                "share of runs whose readout is at sigma .77 or above", 0.5, lambda results: settled_by(results, MIDDLE[0])
            ),
            Criterion(
                "chance that two endings from sigma .88 differ, beyond half of that of seeds",
                0.0,
                lambda results: beside_a_seed(results, "ancestral", "differ", MIDDLE[1]),
            ),
            Criterion(
                "the same from below sigma .77",
                0.0,
                lambda results: beside_a_seed(results, "ancestral", "differ", MIDDLE[0] - 0.04),
                above=False,
            ),
        ),
        "endings of step 0, which are new seeds",
        changed=f"before and after .88 and .77 it {VACUOUS}; now with endings of the state; thresholds as before",
    ),
    Claim(
        "T1c",
        "Both hold: the first steps choose, and the middle ones still store the choice in the noisy state alone.",
        "ours, of the two papers",
        "inferred",
        (
            EARLY_CHOICE,
            Criterion(
                "share of answers lost when x0-hat is renoised at sigma .88, beyond half of what a seed changes",
                0.0,
                lambda results: beside_a_seed(results, "renoised", "lost", MIDDLE[1]),
            ),
        ),
        "endings of step 0, which are new seeds; x0-hat is kept, and the noise of its state is not",
        changed=f"storage {VACUOUS}; now renoised about x0-hat; threshold as before",
    ),
)
