"""What the layer swap stands or falls with: claims C11 and C11b, written from the paper before the first full run."""

from collections.abc import Callable, Sequence

import pandas as pd

from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.statistics import Interval
from experiments.swapping import CONTROLS, FINAL, READINGS, SWAP


def chosen(results: pd.DataFrame, reading: str, bands: Sequence[str], variants: Sequence[str] = (SWAP,)) -> pd.Series:
    """The rows of the final video after a swap at the first step."""
    first = (results["step"] == 0) & (results["readout"] == FINAL) & (results["reading"] == reading)
    return first & results["band"].isin(bands) & results["variant"].isin(variants)


def claim(name: str, reading: str, statement: str) -> Claim:
    """The claim in one reading. "Completely flips" is at least more than half; a step or a plateau over depth, which any patch of
    a residual stream gives, is no peak: the middle is to stand out from the early and from the late blocks by half of that."""

    def share(*variants: str) -> Callable[[pd.DataFrame], Interval]:
        def measured(results: pd.DataFrame) -> Interval:
            rows = results[chosen(results, reading, ["middle"], variants)]
            return mean(rows["flipped"].astype(bool), rows["puzzle"])

        return measured

    def above(band: str) -> Callable[[pd.DataFrame], Interval]:
        def measured(results: pd.DataFrame) -> Interval:
            this, other = (chosen(results, reading, [where]) for where in ("middle", band))
            return difference(results, "flipped", this, other, cluster="puzzle")

        return measured

    return Claim(
        name=name,
        statement=statement,
        source="section 5.2 and Fig. 6b of arXiv 2603.16870",
        grade="near-verbatim; that other layers have no significant effect: third party",
        criteria=(
            Criterion("flip rate at the middle block", 0.5, share(SWAP)),
            Criterion("flip rate, middle block minus blocks before relative depth 0.25", 0.25, above("early")),
            Criterion("flip rate, middle block minus blocks from relative depth 0.75", 0.25, above("late")),
            # "Controls near 0": a tenth leaves room for wrong answers of the model itself.
            Criterion("flip rate at the middle block, mean of the three controls", 0.1, share(*CONTROLS), above=False),
        ),
        control="the donor of another pair, the clean sample with another seed, the pair's donor with shuffled tokens",
        changed="clustered by puzzle up to symmetry, not by pair, as copies of a puzzle are no new samples; controls have"
        " one pair of each puzzle, and more puzzles than before, so that they rest on 100",
    )


CLAIMS = (
    claim(
        "C11",
        READINGS["resid"],
        "Replacing the whole visual stream after the middle block at the first step flips the answer, and replacing that of"
        " early or late blocks does not.",
    ),
    claim(
        "C11b",
        READINGS["update"],
        "Replacing only what the middle block adds to the stream at the first step flips the answer, and replacing what early or"
        " late blocks add does not.",
    ),
)
