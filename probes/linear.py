"""Probes fitted one at a time: logistic regression on standardised features, and what it is to be compared with.

`logistic` has a fixed penalty, `searched` one that is chosen inside the training part. `mass-mean` takes the direction between
the means of the classes, which nothing is fitted to (Marks and Tegmark 2023, arXiv 2310.06824, section 5). `nonlinear` is a
small network, as an upper bound: what it reads and a linear probe does not is there, but not linearly. It sees the leading
principal components, each of variance one: what a stream holds in directions of small variance, which ridge reads with a
small penalty, a network on standardised features does not find in the few passes that it has.

The tokens of one maze share its walls and its route, so a split by token would put near-copies of the test set into
training. The split is by group (all tokens of a maze, and all mazes that are turned or mirrored copies of it), and so is
the bootstrap behind the interval.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, GroupShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dit_lens.errors import InputError
from dit_lens.statistics import Interval, auc_interval, macro_auc_interval

REGULARISATION = 0.01
"""Inverse strength of the L2 penalty (scikit-learn's C) on standardised features."""

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths that `searched` and the online code choose from."""
FOLDS = 4

HIDDEN, COMPONENTS, SEED = 64, 64, 0
"""Hidden units of the nonlinear probe, principal components that it sees, and what seeds it."""

ProbeScore = Interval
"""Held-out area under the ROC curve with its interval over groups; all nan where a class is missing."""


class MassMean(ClassifierMixin, BaseEstimator):
    """A classifier by the direction from the mean of the other rows to that of a class, with a threshold half-way.

    Of two classes there is one direction, towards the second; of more, one for each.
    """

    def fit(self, X: Float[np.ndarray, "rows channels"], y: Shaped[np.ndarray, " rows"]) -> MassMean:
        """Take the means."""
        self.classes_ = np.unique(y)
        asked = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        high, low = (np.stack([X[(y == label) == side].mean(axis=0) for label in asked]) for side in (True, False))
        self.coef_ = high - low
        self.intercept_ = -(self.coef_ * (high + low)).sum(axis=1) / 2
        return self

    def decision_function(self, X: Float[np.ndarray, "rows channels"]) -> Float[np.ndarray, "rows ..."]:
        """How far a row lies on the side of a class: of the second of two, or of each."""
        found = X @ self.coef_.T + self.intercept_
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict(self, X: Float[np.ndarray, "rows channels"]) -> Shaped[np.ndarray, " rows"]:
        """The nearest class."""
        found = self.decision_function(X)
        return self.classes_[(found > 0).astype(int) if found.ndim == 1 else found.argmax(axis=1)]


class Whitened(TransformerMixin, BaseEstimator):
    """The leading principal components, each of variance one: `COMPONENTS` of them, or as many as there are."""

    def fit(self, X: Float[np.ndarray, "rows channels"], y: object = None) -> Whitened:
        """Find them."""
        self.components_ = PCA(min(COMPONENTS, *X.shape), whiten=True, random_state=SEED).fit(X)
        return self

    def transform(self, X: Float[np.ndarray, "rows channels"]) -> Float[np.ndarray, "rows components"]:
        """Rows in terms of them."""
        return self.components_.transform(X)


def _network() -> Any:
    return MLPClassifier((HIDDEN,), alpha=1.0, learning_rate_init=3e-3, max_iter=60, random_state=SEED)


PROBES: dict[str, Callable[[], Any]] = {
    "logistic": lambda: LogisticRegression(C=REGULARISATION, max_iter=1000),
    "mass-mean": MassMean,
    "nonlinear": lambda: make_pipeline(Whitened(), _network()),
}
"""Kinds of probe by name; each comes after a `StandardScaler`."""


def unfitted(probe: str, strength: float | None = None) -> Any:
    """A probe of a kind, with its scaler; a logistic one of another strength. InputError where there is no such kind."""
    if probe not in PROBES:
        raise InputError(f"there is no probe {probe!r}; write one of {', '.join(PROBES)}")
    kind = PROBES[probe]()
    return make_pipeline(StandardScaler(), kind if strength is None else kind.set_params(C=strength))


def check_split(samples: Sequence[Any], parts: Shaped[np.ndarray, " samples"] | Sequence[Any]) -> None:
    """Refuse a split, or groups to split by, that part what belongs together: the same puzzle up to symmetry.

    Args:
        samples: one for each row: rows of a table, tokens, frames; one without a task is a puzzle of its own.
        parts: the part of every row: whether it is for testing, a fold, a group. What the samples themselves give as their
            group is not trusted.

    Raises:
        InputError: one puzzle, turned, mirrored or worded otherwise, is in two parts; it names two samples.
    """
    names: dict[int, bytes] = {}
    first: dict[bytes, tuple[Any, Any]] = {}
    for sample, part in zip(samples, parts, strict=True):
        if id(sample) not in names:
            task = getattr(sample, "task", None)
            names[id(sample)] = task.name.encode() + task.canonical(sample.puzzle) if task else f"{sample.index}".encode()
        other, there = first.setdefault(names[id(sample)], (sample, part))
        if part != there:
            raise InputError(
                f"samples {other.index} and {sample.index} of {sample.task.name} are one puzzle up to symmetry, and are in"
                f" different parts, {there} and {part}: split by `Sample.group`"
            )


def split_groups(
    groups: Shaped[np.ndarray, " tokens"], test_share: float = 0.5, seed: int = 0
) -> tuple[Bool[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Masks of the training and the test tokens; no group is in both. ``test_share`` is a share of the groups."""
    count = len(np.unique(groups))
    if count < 2:
        raise InputError(f"a held-out split needs at least 2 groups, got {count}: probe more samples")
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_share, random_state=seed)
    train, test = next(splitter.split(groups, groups=groups))
    masks = np.zeros((2, len(groups)), dtype=bool)
    masks[0, train], masks[1, test] = True, True
    return masks[0], masks[1]


def fit_and_score(
    features: Float[np.ndarray, "tokens channels"],
    labels: Shaped[np.ndarray, " tokens"],
    groups: Shaped[np.ndarray, " tokens"],
    test_share: float = 0.5,
    seed: int = 0,
    probe: str = "logistic",
    test: Bool[np.ndarray, " tokens"] | None = None,
    strength: float | None = None,
) -> ProbeScore:
    """Trains a probe on some groups and scores it on the others; `probe` is one of `PROBES`.

    Labels are booleans, or the numbers of classes: then the score is the mean over classes, each against the rest. `test` are
    the test tokens, whole groups, where these were drawn before; `strength` is another than `REGULARISATION`.

    Returns nan for everything but the counts where there is nothing to learn or to score: fewer than two groups, or all
    training or all test tokens of one class. (A model that never draws a legal route leaves no choice to be read.)
    """
    if not len(features) == len(labels) == len(groups):
        raise InputError(f"features, labels and groups need one row per token, got {len(features)}, {len(labels)}, {len(groups)}")
    if len(np.unique(groups)) < 2:
        return ProbeScore(np.nan, np.nan, np.nan, len(np.unique(groups)), len(groups))
    train, test = split_groups(groups, test_share, seed) if test is None else (~test, test)
    if len(np.unique(labels[train])) < 2:
        return ProbeScore(np.nan, np.nan, np.nan, len(np.unique(groups[test])), int(test.sum()))
    fitted = unfitted(probe, strength)
    with warnings.catch_warnings():
        # The nonlinear probe stops after a fixed number of passes on purpose.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(features[train].astype(np.float64), labels[train])
    scores = _decision(fitted, features[test].astype(np.float64))
    if scores.ndim == 1:
        return auc_interval(scores, labels[test] == fitted.classes_[1], groups[test])
    return macro_auc_interval(scores, labels[test][:, None] == fitted.classes_, groups[test])


def searched(
    features: Float[np.ndarray, "tokens channels"],
    labels: Shaped[np.ndarray, " tokens"],
    groups: Shaped[np.ndarray, " tokens"],
    test: Bool[np.ndarray, " tokens"],
) -> ProbeScore:
    """The held-out score of a logistic probe whose strength, one of `STRENGTHS`, reads best in folds of the training groups.

    Raises:
        InputError: fewer training groups than folds.
    """
    strength = searched_strength(features[~test], labels[~test], groups[~test])
    return fit_and_score(features, labels, groups, test=test, strength=strength)


def searched_strength(
    features: Float[np.ndarray, "tokens channels"], labels: Shaped[np.ndarray, " tokens"], groups: Shaped[np.ndarray, " tokens"]
) -> float:
    """The strength that reads best in folds of the groups of these training tokens; errors as of `searched`."""
    count = len(np.unique(groups))
    if count < FOLDS:
        raise InputError(f"the search takes {FOLDS} folds of whole groups, and {count} are for training: add samples")
    scores = np.full((FOLDS, len(STRENGTHS)), np.nan)
    for fold, (_, inside) in enumerate(GroupKFold(FOLDS).split(features, groups=groups)):
        held = np.isin(np.arange(len(features)), inside)
        scores[fold] = [fit_and_score(features, labels, groups, test=held, strength=each).estimate for each in STRENGTHS]
    # A class may be missing in a fold, which then says nothing of any strength.
    there = scores[~np.isnan(scores).any(axis=1)]
    return STRENGTHS[there.mean(axis=0).argmax()] if len(there) else REGULARISATION


@dataclass(frozen=True)
class CodeLength:
    """What it takes to send labels to someone who has the features (Voita and Titov 2020, arXiv 2003.12298, section 2.2).

    Attributes:
        bits: of the online code, per label. uniform: of a code that knows how often each class is, and nothing else, per label.
        compression: uniform / bits; 1 where the features do not help. labels: how many.
    """

    bits: float
    uniform: float
    compression: float
    labels: int


PORTIONS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
"""Where the labels are cut for the online code, as shares of the groups."""

UNFORESEEN = 1e-3
"""How much of its code the online code keeps for what the probe holds to be impossible."""


def code_length(
    features: Float[np.ndarray, "tokens channels"],
    labels: Shaped[np.ndarray, " tokens"],
    groups: Shaped[np.ndarray, " tokens"],
    seed: int = 0,
) -> CodeLength:
    """The online (prequential) code length of labels (booleans, or numbers of classes), given features.

    Group after group in random order, each portion of labels is sent with the probabilities of a logistic probe trained
    on all before it; the first portion, and any before two classes were seen, with those of the classes. A probe that needs
    few examples to be right, and not only one that ends up right, makes a short code. The strength of its penalty is the one
    that would have made the shortest code so far, which the receiver knows too.

    Raises:
        InputError: lengths that differ, or labels of one class only.
    """
    if not len(features) == len(labels) == len(groups):
        raise InputError(f"features, labels and groups need one row per token, got {len(features)}, {len(labels)}, {len(groups)}")
    classes, label = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise InputError("a code length needs labels of two classes, and these are all the same")
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    shares = np.bincount(label) / len(label)
    entropy = float(-(shares * np.log2(shares)).sum())
    ends = np.unique(np.ceil(np.array(PORTIONS) * len(names)).astype(int))
    sent, bits = np.zeros(len(label), dtype=bool), 0.0
    so_far = np.zeros(len(STRENGTHS))
    for begin, end in itertools.pairwise([0, *ends.tolist()]):
        portion = np.isin(groups, names[begin:end])
        chances = np.tile(shares, (len(STRENGTHS), portion.sum(), 1))
        known = np.unique(label[sent])
        if len(known) > 1:
            for place, strength in enumerate(STRENGTHS):
                fitted = unfitted("logistic", strength)
                fitted.fit(features[sent].astype(np.float64), label[sent])
                # What was not seen yet must have a code too: one label in a thousand is sent as if nothing were known.
                chances[place] *= UNFORESEEN
                chances[place][:, known] += (1 - UNFORESEEN) * fitted.predict_proba(features[portion].astype(np.float64))
        each = -np.log2(chances[:, np.arange(portion.sum()), label[portion]]).sum(axis=1)
        bits += float(each[so_far.argmin()])
        so_far += each
        sent |= portion
    return CodeLength(bits / len(label), entropy, entropy * len(label) / bits, len(label))


def _decision(fitted: Any, features: Float[np.ndarray, "rows channels"]) -> Float[np.ndarray, "rows ..."]:
    """A score that rises with the second of two classes, or one for each of more."""
    if hasattr(fitted, "decision_function"):
        return fitted.decision_function(features)
    chances = fitted.predict_proba(features)
    return chances[:, 1] if chances.shape[1] == 2 else chances
