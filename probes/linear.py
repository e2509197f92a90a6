"""Linear probes: logistic regression on standardised features, trained on some puzzles and scored on others.

The tokens of one maze share its walls and its route, so a split by token would put near-copies of the test set into
training. The split is by group (all tokens of a maze, and all mazes that are turned or mirrored copies of it), and so is
the bootstrap behind the interval.

The control task (Hewitt and Liang 2019) gives every *kind* of token, here its place in a maze of its size, a fixed random
label. A probe that scores well there has memorised places. *Selectivity* is the score on the target minus the score on the
control task.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dit_lens.errors import InputError
from dit_lens.statistics import Interval, auc_interval

REGULARISATION = 0.01
"""Inverse strength of the L2 penalty (scikit-learn's C) on standardised features."""

ProbeScore = Interval
"""Held-out area under the ROC curve with its interval over groups; all nan where a class is missing."""


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
    labels: Bool[np.ndarray, " tokens"],
    groups: Shaped[np.ndarray, " tokens"],
    test_share: float = 0.5,
    seed: int = 0,
) -> ProbeScore:
    """Trains a probe on some groups and scores it on the others.

    Returns nan for everything but the counts where there is nothing to learn or to score: fewer than two groups, or all
    training or all test tokens of one class. (A model that never draws a legal route leaves no choice to be read.)
    """
    if not len(features) == len(labels) == len(groups):
        raise InputError(f"features, labels and groups need one row per token, got {len(features)}, {len(labels)}, {len(groups)}")
    if len(np.unique(groups)) < 2:
        return ProbeScore(np.nan, np.nan, np.nan, len(np.unique(groups)), len(groups))
    train, test = split_groups(groups, test_share, seed)
    if labels[train].all() or not labels[train].any():
        return ProbeScore(np.nan, np.nan, np.nan, len(np.unique(groups[test])), int(test.sum()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=1000))
    probe.fit(features[train].astype(np.float64), labels[train])
    scores = probe.decision_function(features[test].astype(np.float64))
    return auc_interval(scores, labels[test], groups[test])


def control_labels(kinds: Sequence[tuple[int, ...]], seed: int = 0) -> Bool[np.ndarray, " tokens"]:
    """A random label for every kind of token, the same wherever that kind occurs; half of the kinds are true."""
    distinct = sorted(set(kinds))
    chosen = np.random.default_rng(seed).permutation(len(distinct)) < len(distinct) / 2
    table = dict(zip(distinct, chosen, strict=True))
    return np.array([table[kind] for kind in kinds], dtype=bool)
