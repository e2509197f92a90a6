"""Ridge probes for many targets and many cells at once.

A map of what can be read where takes thousands of probes: every block, step and target has its own, and each searches its
L2 penalty. Fitted one by one they take hours; but the probes of a cell share their features, and everything that depends on
features alone can be shared too. For each fold of the search one eigendecomposition of the covariance serves every
target and every penalty (the solution for penalty a is V (E + a)^-1 V' X'y, with X'X = V E V'), and the folds' covariances are
sums of the same parts.

A probe is a pipeline of a `StandardScaler` and a `Ridge`, for labels as numbers: a binary target is -1 and 1, of several
classes each has a column. It is scored by the area under the ROC curve (of several classes, the mean over them, each against
the rest) or, for a number, by R2. Penalties are chosen inside the training part, with folds of whole groups. Fitted cell by
cell with scikit-learn, the same comes out; that is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Shaped
from scipy.stats import rankdata
from sklearn.model_selection import GroupKFold

from dit_lens.errors import InputError, listed
from dit_lens.statistics import NO_DRAWS, Interval, Resampled, macro_auc_resampled, r2_resampled

PENALTIES = tuple(10.0**power for power in range(-1, 6))
"""Of the sum of squared weights on standardised features (scikit-learn's alpha)."""
FOLDS = 4

Kind = Literal["binary", "classes", "number"]


@dataclass(frozen=True, eq=False)
class Question:
    """What a probe is asked of every row.

    Attributes:
        name: what tables call it. kind: `binary`, `classes` or `number`.
        values: one per row: booleans, class numbers or numbers. Rows with nan are not asked.
        interval: whether its score has an interval; bootstrapped, these take longer than all else.
    """

    name: str
    kind: Kind
    values: Shaped[np.ndarray, " rows"]
    interval: bool = True

    @property
    def asked(self) -> Bool[np.ndarray, " rows"]:
        """Which rows it is asked of."""
        return ~np.isnan(np.asarray(self.values, dtype=float))

    def columns(self, rows: Bool[np.ndarray, " rows"]) -> Float[np.ndarray, "chosen columns"]:
        """The labels of some rows as numbers: a column, or one for each class that occurs among them."""
        values = np.asarray(self.values, dtype=float)[rows]
        if self.kind == "number":
            return values[:, None]
        if self.kind == "binary":
            return np.where(values > 0, 1.0, -1.0)[:, None]
        return np.where(values[:, None] == np.unique(values), 1.0, -1.0)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a probe read.

    Attributes:
        name: of the question. score: held-out area under the ROC curve or R2 with its interval over groups; all nan where
            the training or the test part leaves nothing to learn or to score.
        penalty: the chosen one. weights: of the features as they came, (columns, channels).
        draws: the score in every resample of the groups, by which `score` has its interval.
    """

    name: str
    score: Interval
    penalty: float
    weights: Float[np.ndarray, "columns channels"]
    draws: Float[np.ndarray, " resamples"]

    @staticmethod
    def of(name: str, found: Resampled, penalty: float, weights: Float[np.ndarray, "columns channels"]) -> Reading:
        """A reading of what was found in the test rows."""
        return Reading(name, found.interval(), penalty, weights, found.draws)

    @property
    def resampled(self) -> Resampled:
        """The score with its draws, to be compared with another of the same rows."""
        return Resampled(self.score.estimate, self.draws, self.score.clusters, self.score.measurements)


def read_all(
    features: Float[np.ndarray, "rows channels"],
    questions: Sequence[Question],
    groups: Shaped[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
) -> list[Reading]:
    """Train a probe for every question on the rows that are no test rows, and score it on those that are.

    Args:
        features: of one cell. groups: rows of one group are never on both sides of a split, of the search too.
        test: the test rows.

    Raises:
        InputError: a group is on both sides of the test split, fewer training groups than folds, or lengths that differ.
    """
    check_rows(len(features), questions, groups, test)
    count = len(np.unique(groups[~test]))
    if count < folds:
        raise InputError(
            f"the search for a penalty takes {folds} folds of whole groups, and {count} groups are for training:"
            " observe more samples, or write fewer folds"
        )
    features = np.asarray(features, dtype=np.float64)
    found: dict[str, Reading] = {}
    for same in of_same_rows(questions):
        asked = same[0].asked
        found |= {reading.name: reading for reading in _read_together(features, same, groups, asked, test, penalties, folds)}
    return [found[question.name] for question in questions]


def check_rows(
    rows: int, questions: Sequence[Question], groups: Shaped[np.ndarray, " rows"], test: Bool[np.ndarray, " rows"]
) -> None:
    """Raise an InputError where lengths differ, or a group is on both sides of the test split."""
    lengths = {rows, len(groups), len(test), *(len(question.values) for question in questions)}
    if len(lengths) > 1:
        raise InputError(f"features, groups, test and the questions need a row each, and there are {listed(sorted(lengths))}")
    both = np.intersect1d(groups[test], groups[~test])
    if len(both):
        raise InputError(f"{len(both)} groups are in training and in testing, the first is {both[0]}: split by group")


def of_same_rows(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions by the rows that they are asked of: those of the same rows share all that depends on features."""
    shared: dict[bytes, list[Question]] = {}
    for question in questions:
        shared.setdefault(question.asked.tobytes(), []).append(question)
    return list(shared.values())


def _read_together(
    features: Float[np.ndarray, "rows channels"],
    questions: Sequence[Question],
    groups: Shaped[np.ndarray, " rows"],
    asked: Bool[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    penalties: Sequence[float],
    folds: int,
) -> list[Reading]:
    train, held = asked & ~test, asked & test
    nothing = Resampled(np.nan, NO_DRAWS, len(np.unique(groups[held])), int(held.sum()))
    empty = np.zeros((0, features.shape[1]))
    learnable = [question for question in questions if varies(question, train) and varies(question, held)]
    if len(np.unique(groups[train])) < folds or not learnable:
        return [Reading.of(question.name, nothing, np.nan, empty) for question in questions]
    labels = [question.columns(train) for question in learnable]
    spans = np.cumsum([0, *(part.shape[1] for part in labels)])
    x, y = features[train], np.concatenate(labels, axis=1)
    fold_of = np.zeros(len(x), dtype=int)
    for number, (_, inside) in enumerate(GroupKFold(folds).split(x, groups=groups[train])):
        fold_of[inside] = number
    scores = np.zeros((folds, len(penalties), len(learnable)))
    parts = [_Sums.of(x[fold_of == fold], y[fold_of == fold]) for fold in range(folds)]
    total = sum(parts[1:], start=parts[0])
    for fold in range(folds):
        weights, offsets = (total - parts[fold]).solved(penalties)
        inside = fold_of == fold
        guesses = np.tensordot(x[inside], weights, axes=(1, 2)) + offsets
        for number, question in enumerate(learnable):
            span = slice(spans[number], spans[number + 1])
            scores[fold, :, number] = _scores(question.kind, guesses[..., span], y[inside, span])
    # A class may be missing in a fold, which then says nothing; a tie goes to the smaller penalty, as in scikit-learn.
    mean = np.nanmean(np.where(np.isnan(scores).all(axis=0), 0, scores), axis=0)
    chosen = mean.argmax(axis=0)
    weights, offsets = total.solved(penalties)
    found: dict[str, Reading] = {}
    for number, question in enumerate(learnable):
        span = slice(spans[number], spans[number + 1])
        best = chosen[number]
        guesses = features[held] @ weights[best, span].T + offsets[best, span]
        score = resampled(question, guesses, train, held, groups[held])
        found[question.name] = Reading.of(question.name, score, penalties[best], weights[best, span])
    return [found.get(question.name, Reading.of(question.name, nothing, np.nan, empty)) for question in questions]


@dataclass(frozen=True, eq=False)
class _Sums:
    """What least squares needs to know of some rows; sums of disjoint rows add up."""

    rows: int
    x: Float[np.ndarray, " channels"]
    y: Float[np.ndarray, " columns"]
    xx: Float[np.ndarray, "channels channels"]
    xy: Float[np.ndarray, "channels columns"]

    @staticmethod
    def of(x: Float[np.ndarray, "rows channels"], y: Float[np.ndarray, "rows columns"]) -> _Sums:
        return _Sums(len(x), x.sum(axis=0), y.sum(axis=0), x.T @ x, x.T @ y)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.rows + other.rows, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(self.rows - other.rows, self.x - other.x, self.y - other.y, self.xx - other.xx, self.xy - other.xy)

    def solved(
        self, penalties: Sequence[float]
    ) -> tuple[Float[np.ndarray, "penalties columns channels"], Float[np.ndarray, "penalties columns"]]:
        """Weights of the features as they came, and offsets, for every penalty."""
        mean_x, mean_y = self.x / self.rows, self.y / self.rows
        covariance = self.xx / self.rows - np.outer(mean_x, mean_x)
        scale = np.sqrt(np.diagonal(covariance).clip(0))
        # A feature that does not vary says nothing; StandardScaler leaves its scale at 1.
        scale = np.where(scale > 1e-12 * np.abs(mean_x) + 1e-300, scale, 1.0)
        standard = covariance / np.outer(scale, scale) * self.rows
        target = (self.xy - np.outer(mean_x, self.y)) / scale[:, None]
        values, vectors = scipy.linalg.eigh(standard)
        turned = vectors.T @ target
        weights = np.stack([(vectors @ (turned / (values.clip(0) + penalty)[:, None])).T / scale for penalty in penalties])
        return weights, mean_y - weights @ mean_x


def varies(question: Question, rows: Bool[np.ndarray, " rows"]) -> bool:
    """Whether there is something to tell apart among these rows."""
    return len(np.unique(np.asarray(question.values, dtype=float)[rows])) > 1


def _scores(
    kind: Kind, guesses: Float[np.ndarray, "rows penalties columns"], truth: Float[np.ndarray, "rows columns"]
) -> Float[np.ndarray, " penalties"]:
    """The area under the ROC curve, of several classes the mean over those that occur; or R2. Nan where nothing varies.

    The areas come from ranks, of all penalties and classes at once (sklearn.metrics.roc_auc_score is the oracle in the tests).
    """
    if kind == "number":
        spread = ((truth - truth.mean(axis=0)) ** 2).sum()
        return 1 - ((truth[:, None] - guesses) ** 2).sum(axis=(0, 2)) / (spread or np.nan)
    positive = truth > 0
    count = positive.sum(axis=0)
    there = (count > 0) & (count < len(truth))
    if not there.any():
        return np.full(guesses.shape[1], np.nan)
    count, positive = count[there], positive[:, there]
    ranks: Float[np.ndarray, "rows penalties columns"] = rankdata(guesses[..., there], axis=0)
    won = np.einsum("rpc,rc->pc", ranks, positive.astype(float)) - count * (count + 1) / 2
    return (won / (count * (len(truth) - count))).mean(axis=1)


def resampled(
    question: Question,
    guesses: Float[np.ndarray, "rows columns"],
    train: Bool[np.ndarray, " all_rows"],
    held: Bool[np.ndarray, " all_rows"],
    groups: Shaped[np.ndarray, " rows"],
) -> Resampled:
    """The score on the test rows, and in resamples of the groups if the question is to have an interval."""
    values = np.asarray(question.values, dtype=float)
    if not question.interval:
        groups = np.zeros(len(groups))
    if question.kind == "number":
        return r2_resampled(guesses[:, 0], values[held], groups)
    truth = (values[held] > 0)[:, None] if question.kind == "binary" else values[held][:, None] == np.unique(values[train])
    return macro_auc_resampled(guesses, truth, groups)
