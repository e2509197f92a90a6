"""What `noise` puts to the test: claims C4 and C5, and how their numbers are read off its results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.statistics import Interval
from experiments.arms import ALL, BUT_LAST, ONE

Measure = Callable[[pd.DataFrame], Interval]

KEPT = 0.44
"""Of the clean success; "below 0.3" of a clean 0.685 leaves less."""
QUARTER = 0.1
"""A quarter of the drop of 0.385 or more that the paper reports; a smaller gap counts as gone."""
RISE = 0.05
"""An eighth of that drop; a peak that rises by less counts as none."""
BAND = (0.75, 0.9)
"""Of sigma; steps 20 to 30 of 50 at shift 5 are 0.88 to 0.77."""
SOURCE = "Fig. 3, section 3.2 of arXiv 2603.16870"


def where(results: pd.DataFrame, **values: object) -> pd.Series:
    """Rows in which every named column has its value; a number within rounding."""
    kept = pd.Series(True, index=results.index)
    for column, value in values.items():
        same = np.isclose(results[column], value) if isinstance(value, float) else results[column] == value
        kept &= same
    return kept


def at_step(results: pd.DataFrame, how: str) -> pd.Series:
    """Noise in all frames at one step, all of it."""
    return where(results, kind="noise", where="step", when=ONE, how=how, share=1.0)


def smallest(results: pd.DataFrame, place: str, when: str, how: str = "replaced") -> pd.Series:
    """The share of one frame: that frame, or as much mixed into all frames."""
    one = results.loc[results["where"] == "frame", "share"].min()
    return where(results, kind="noise", where=place, when=when, how=how, share=float(one))


def gap(when: str, how: str = "replaced") -> Measure:
    """Success with noise in a frame minus success with the same dose in all frames."""
    return lambda r: difference(r, "right", smallest(r, "frame", when, how), smallest(r, "step", when, how), "cluster")


def kept_success(results: pd.DataFrame) -> Interval:
    rows = results[at_step(results, "replaced") & (results["step"] > 0)]
    return mean(rows["right"].astype(float) - KEPT * rows["clean_right"].astype(float), rows["cluster"])


def papers_gap(results: pd.DataFrame) -> Interval:
    step = at_step(results, "replaced") & (results["step"] > 0)
    return difference(results, "right", smallest(results, "frame", ALL), step, "cluster")


def reseeded(results: pd.DataFrame) -> Interval:
    first = at_step(results, "replaced") & (results["step"] == 0)
    return difference(results, "right", results["kind"] == "clean", first, "cluster")


def peak(how: str, column: str, side: str) -> Measure:
    """How much more noise harms in the band of sigma than on one side of it: success lost, or a shift of `column`."""

    def measure(results: pd.DataFrame) -> Interval:
        noise, sigma = at_step(results, how), results["sigma"]
        band, outside = noise & sigma.between(*BAND), noise & (sigma > BAND[1] if side == "earlier" else sigma < BAND[0])
        pair = (outside, band) if column == "right" else (band, outside)
        return difference(results, column, *pair, "cluster")

    return measure


CLAIMS = (
    Claim(
        "C4",
        "Noise in the latents of one step destroys the answer; noise in one frame at all steps does not, also at equal dose.",
        f"{SOURCE}: score 0.685 falls below 0.3 with noise at a step, and much less with noise at a frame",
        "near-verbatim",
        (
            Criterion(f"success with noise at a step, minus {KEPT} of that without", 0, kept_success, above=False),
            Criterion("success with noise in a frame at all steps, minus at one step", QUARTER, papers_gap),
            Criterion("the same with equal dose, at one step", QUARTER, gap(ONE)),
            Criterion("the same with equal dose, at all steps but the last", QUARTER, gap(BUT_LAST)),
            Criterion("the same with equal dose and sigma-matched, at one step", QUARTER, gap(ONE, "sigma-matched")),
            Criterion("success lost with noise at the first step, a reseed", QUARTER, reseeded, above=False),
        ),
        "the same share of the energy destroyed in all frames; sigma-matched noise; noise at the first step, which is a reseed."
        " Only the last video frame is scored: a table parts noise in the latent frame that holds it, in the first and in others."
        " Doses are equal at that of one frame, where one step may lose nothing in either arm: a table has larger ones, by task",
    ),
    Claim(
        "C5",
        "Noise harms most at an interior sigma of 0.75 to 0.9 (steps 20 to 30 of 50), not at the first or the last steps.",
        f"{SOURCE}: the sensitivity per step rises and peaks at steps 20 to 30",
        "near-verbatim",
        tuple(
            Criterion(f"{name}, {how}: at sigma 0.75 to 0.9 minus {side}", RISE, peak(how, column, side))
            for how, column, name in (
                ("replaced", "right", "success lost"),
                ("sigma-matched", "right", "success lost"),
                ("sigma-matched", "rerouted", "another legal answer"),
            )
            for side in ("earlier", "later")
        ),
        "noise at the other steps of the same samples; the bundled model has one expert, so nothing is handed over in the band",
    ),
)
