"""Intervals for measurements that come in clusters.

Eight seeds of one maze are not eight mazes: they share walls, start and goal, so their results rise and fall together.
Whoever resamples the runs one by one pretends to know more than was measured. Everything here therefore resamples
*clusters* (the samples of a task, the mazes of a probe) with replacement and keeps all measurements of a cluster together.
Drawing n clusters out of n with replacement is the same as giving each cluster a multinomial count, so one bootstrap is one
matrix of counts, and a mean or an area under the ROC curve is a ratio of two forms in it.

The intervals are percentile intervals. With fewer than about ten clusters they come out too narrow; the number of clusters
therefore stands beside every interval.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from dit_lens.errors import InputError

LEVEL = 0.95
RESAMPLES = 1000
STRETCH = 16
"""Scores that are counted one by one where pairs are compared; any number gives the same result."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval (nan where one cluster or none leaves nothing to resample), the number of
    clusters and the number of single measurements behind it."""

    estimate: float
    low: float
    high: float
    clusters: int
    measurements: int


@dataclass(frozen=True, eq=False)
class Resampled:
    """A score and what it is in every resample of the clusters.

    Attributes:
        estimate: the score. draws: in every resample, nan where it is undefined; empty with one cluster or none.
        clusters, measurements: as of an `Interval`.
    """

    estimate: float
    draws: Float[np.ndarray, " resamples"]
    clusters: int
    measurements: int

    def interval(self, level: float = LEVEL) -> Interval:
        """The score with its percentile interval."""
        there = self.draws[~np.isnan(self.draws)]
        low, high = _ends(there, level) if len(there) and not np.isnan(self.estimate) else (np.nan, np.nan)
        return Interval(self.estimate, low, high, self.clusters, self.measurements)

    def less(self, other: "Resampled") -> "Resampled":
        """This score less another of the same measurements, both in the same resamples: what they share cancels.

        Both must be of the same clusters, resampled as often and with the same seed; nan where either is undefined.

        Raises:
            InputError: they differ in the number of clusters, of measurements or of resamples.
        """
        if (self.clusters, self.measurements) != (other.clusters, other.measurements):
            raise InputError(
                f"scores are compared over the same rows, and these have {self.measurements} of {self.clusters} clusters and"
                f" {other.measurements} of {other.clusters}: score the same rows"
            )
        if np.isnan(self.estimate) or np.isnan(other.estimate):
            return Resampled(np.nan, NO_DRAWS, self.clusters, self.measurements)
        if len(self.draws) != len(other.draws):
            raise InputError(f"scores have {len(self.draws)} and {len(other.draws)} resamples: write one resamples= for both")
        return Resampled(self.estimate - other.estimate, self.draws - other.draws, self.clusters, self.measurements)


NO_DRAWS = np.zeros(0)


def mean_interval(
    values: ArrayLike, clusters: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over all measurements, with an interval over clusters.

    ``values`` and ``clusters`` have one entry per measurement; clusters are any labels. Booleans are shares: where all of
    them agree, resampling finds no spread although a share of exactly 0 or 1 is never certain, and the interval is the
    exact binomial one, with one trial per cluster.
    """
    share, labels = np.asarray(values).dtype == bool, np.asarray(clusters)
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or values.shape != labels.shape:
        raise InputError(f"mean_interval needs one cluster label per value, got shapes {values.shape} and {labels.shape}")
    if np.isnan(values).any():
        raise InputError("mean_interval got nan among its values: drop the measurements that are undefined first")
    names, member = np.unique(labels, return_inverse=True)
    if len(names) == 0:
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    estimate = float(values.mean())
    if len(names) == 1:
        return Interval(estimate, np.nan, np.nan, 1, len(values))
    if share and estimate in (0, 1):
        exact = binomtest(int(estimate) * len(names), len(names)).proportion_ci(level, method="exact")
        return Interval(estimate, float(exact.low), float(exact.high), len(names), len(values))
    sums, sizes = np.bincount(member, values), np.bincount(member)
    counts = _resampled_counts(len(names), resamples, seed)
    low, high = _ends((counts @ sums) / (counts @ sizes), level)
    return Interval(estimate, low, high, len(names), len(values))


def unvaried(found: Interval, level: float = LEVEL) -> Interval:
    """The interval of a share, or of a difference of shares, with room where no cluster differs from another.

    Resampling finds no spread there, although the next cluster may differ. The interval then reaches on both sides as far as the
    exact binomial one of an event that never occurred, with one trial per cluster. One that has a width is left as it is.
    """
    if found.clusters < 2 or not np.isclose(found.low, found.high, rtol=1e-9, atol=0):
        return found
    room = unseen(found.clusters, level)
    return replace(found, low=found.low - room, high=found.high + room)


def unseen(clusters: int, level: float = LEVEL) -> float:
    """How large a share can be of which so many clusters show none: the end of its exact binomial interval."""
    return 1 - ((1 - level) / 2) ** (1 / clusters)


def auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Area under the ROC curve of ``scores`` for the boolean ``labels``, with an interval over clusters.

    The area is the share of (positive, negative) pairs that the scores put in the right order, ties counting half. Those
    pairs are counted once, by the clusters that they come from; a resample then only weighs the counts.
    (``sklearn.metrics.roc_auc_score`` gives the same number and is the oracle in the tests; one call of it per resample and
    cell of a heat map would take minutes.) All nan where one of the two classes is missing.
    """
    return macro_auc_interval(np.asarray(scores)[:, None], np.asarray(labels)[:, None], clusters, level, resamples, seed)


def macro_auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over classes, each against the rest, of the area under the ROC curve, as `auc_interval`.

    ``scores`` and the boolean ``labels`` have a column for each class. A class of which every or no row is has no area, and is
    left out of the mean.
    """
    return macro_auc_resampled(scores, labels, clusters, resamples, seed).interval(level)


def macro_auc_resampled(
    scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """The same area in every resample; the clusters drawn depend on their number and the seed alone."""
    scores, truth = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    there = [place for place in range(truth.shape[1]) if 0 < truth[:, place].sum() < len(truth)]
    if not there:
        return Resampled(np.nan, NO_DRAWS, len(names), len(scores))
    won = [_pairs_won(scores[:, place], truth[:, place], member, len(names)) for place in there]
    possible = truth[:, there].sum(axis=0) * (~truth[:, there]).sum(axis=0)
    estimate = float(np.mean([pairs.sum() for pairs in won] / possible))
    if len(names) == 1:
        return Resampled(estimate, NO_DRAWS, 1, len(scores))
    counts = _resampled_counts(len(names), resamples, seed)
    areas = []
    for place, pairs in zip(there, won, strict=True):
        positives = np.bincount(member[truth[:, place]], minlength=len(names))
        negatives = np.bincount(member[~truth[:, place]], minlength=len(names))
        possible = (counts @ positives) * (counts @ negatives)
        areas.append(np.where(possible > 0, ((counts @ pairs) * counts).sum(axis=1) / np.maximum(possible, 1), np.nan))
    drawn = np.array(areas)
    defined = ~np.isnan(drawn).all(axis=0)
    means = np.full(len(counts), np.nan)
    means[defined] = np.nanmean(drawn[:, defined], axis=0)
    return Resampled(estimate, means, len(names), len(scores))


def r2_interval(
    guesses: ArrayLike, truth: ArrayLike, clusters: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """R2 of ``guesses``, the share of the variance of ``truth`` that they explain, with an interval over clusters.

    (``sklearn.metrics.r2_score`` is the oracle in the tests.) All nan where the truth does not vary.
    """
    return r2_resampled(guesses, truth, clusters, resamples, seed).interval(level)


def r2_resampled(
    guesses: ArrayLike, truth: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """The same R2 in every resample; the clusters drawn depend on their number and the seed alone."""
    guesses, truth = np.asarray(guesses, dtype=float), np.asarray(truth, dtype=float)
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    # Centred first: the sums of squares are then of the size of the spread.
    centred = truth - truth.mean()
    sums = np.stack(
        [np.bincount(member, weights) for weights in (np.ones_like(truth), centred, centred**2, (truth - guesses) ** 2)]
    )

    def score(rows: Float[np.ndarray, "*draws sums"]) -> Float[np.ndarray, "*draws"]:
        spread = rows[..., 2] - rows[..., 1] ** 2 / rows[..., 0]
        return np.where(
            spread > 1e-12 * max(float(sums[2].sum()), 1e-300), 1 - rows[..., 3] / np.where(spread > 0, spread, 1), np.nan
        )

    estimate = float(score(sums.sum(axis=1)))
    draws = score(_resampled_counts(len(names), resamples, seed) @ sums.T) if len(names) > 1 else NO_DRAWS
    return Resampled(estimate, NO_DRAWS if np.isnan(estimate) else draws, len(names), len(truth))


def _pairs_won(
    scores: Float[np.ndarray, " rows"], truth: Bool[np.ndarray, " rows"], member: Int[np.ndarray, " rows"], count: int
) -> Float[np.ndarray, "clusters clusters"]:
    """How many (positive, negative) pairs the scores put in the right order, ties half, by the clusters of the two."""
    positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
    order = negative[np.argsort(scores[negative], kind="stable")]
    ordered, owner, own = scores[order], member[order], member[positive]
    # Negatives in score order, cut into short stretches: whole ones are counted by one product, the rest of the last singly.
    stretches = len(negative) // STRETCH + 1
    in_stretch = _counted(np.arange(len(negative)) // STRETCH, owner, (stretches, count))
    before = in_stretch.cumsum(axis=0) - in_stretch
    # The last stretch is seldom full.
    padded = np.append(owner, np.zeros(STRETCH, dtype=int))
    won = np.zeros((count, count))
    for side in ("left", "right"):
        whole, rest = np.divmod(np.searchsorted(ordered, scores[positive], side), STRETCH)
        won += _counted(own, whole, (count, stretches)) @ before
        single = np.arange(STRETCH) < rest[:, None]
        others = padded[whole[:, None] * STRETCH + np.arange(STRETCH)]
        won += _counted(np.broadcast_to(own[:, None], single.shape)[single], others[single], (count, count))
    return won / 2


def _counted(
    rows: Int[np.ndarray, " pairs"], columns: Int[np.ndarray, " pairs"], shape: tuple[int, int]
) -> Float[np.ndarray, "rows columns"]:
    """How often each pair of a row and a column occurs."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape).astype(float)


def summarise(table: pd.DataFrame, value: str, by: Sequence[str], cluster: str = "sample", level: float = LEVEL) -> pd.DataFrame:
    """Mean of the column ``value`` in every group of ``by``, with an interval over ``cluster``.

    One row per group, in order of appearance: the columns of ``by``, then ``mean``, ``low``, ``high``, ``clusters`` and
    ``measurements``. Rows where the value is nan (undefined) are left out; a group of only such rows vanishes.
    """
    missing = [name for name in (value, cluster, *by) if name not in table]
    if missing:
        raise InputError(f"summarise: the table has no column {missing}; it has {list(table.columns)}")
    rows = []
    kept = table.dropna(subset=[value])
    for key, group in kept.groupby(list(by), sort=False, observed=True, dropna=False):
        found = asdict(mean_interval(group[value], group[cluster], level=level))
        rows.append({**dict(zip(by, key, strict=True)), "mean": found.pop("estimate"), **found})
    found = pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "clusters", "measurements"])
    if rows:
        return found
    # An empty table has the types of a full one, so that what it is concatenated with keeps its own.
    ends, counts = dict.fromkeys(("mean", "low", "high"), float), dict.fromkeys(("clusters", "measurements"), int)
    return found.astype({**{name: table[name].dtype for name in by}, **ends, **counts})


def in_words(summary: pd.DataFrame, digits: int = 2) -> str:
    """The first row of a `summarise` table as text, "0.91 [0.85, 0.96]"; a dash where the table is empty."""
    if summary.empty:
        return "-"
    row = summary.iloc[0]
    if np.isnan(row["low"]):
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


@lru_cache(maxsize=8)
def _resampled_counts(clusters: int, resamples: int, seed: int) -> Float[np.ndarray, "resamples clusters"]:
    """How often each cluster is drawn in each resample; kept, as thousands of probes draw the same."""
    drawn = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(float)
    drawn.flags.writeable = False
    return drawn


def _ends(resampled: Float[np.ndarray, " resamples"], level: float) -> tuple[float, float]:
    """The percentile interval of what was resampled."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
