"""Intervals: against scipy and scikit-learn, and by what must hold of any bootstrap over clusters."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import r2_score, roc_auc_score

from dit_lens.errors import InputError
from dit_lens.statistics import Resampled, auc_interval, in_words, macro_auc_resampled, mean_interval, r2_resampled, summarise

values_by_cluster = st.lists(
    st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=2, max_size=8
)  # one list per cluster


def flat(groups: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(g) for g in groups]), np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def test_agrees_with_scipy_where_every_value_is_its_own_cluster() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    ours = mean_interval(values, np.arange(60), resamples=20000)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_agrees_with_scipy_on_clusters() -> None:
    random = np.random.default_rng(3)
    sizes = random.integers(1, 5, size=30)
    clusters = np.repeat(np.arange(30), sizes)
    values = random.normal(size=30)[clusters] + random.normal(scale=0.1, size=len(clusters))
    sums = np.bincount(clusters, values)
    ours = mean_interval(values, clusters, resamples=20000)
    theirs = bootstrap(
        (sums, sizes), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True, n_resamples=20000, method="percentile", rng=4
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_repeating_measurements_of_a_cluster_adds_no_certainty() -> None:
    values = np.random.default_rng(5).normal(size=20)
    once = mean_interval(values, np.arange(20))
    many = mean_interval(np.repeat(values, 10), np.repeat(np.arange(20), 10))
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    assert (many.clusters, many.measurements) == (20, 200)


@given(values_by_cluster)
@settings(max_examples=50, deadline=None)
def test_interval_lies_in_the_range_of_cluster_means(groups: list[list[float]]) -> None:
    found = mean_interval(*flat(groups), resamples=100)
    means = [np.mean(g) for g in groups]
    if np.isfinite(found.low):
        assert min(means) - 1e-6 <= found.low <= found.high <= max(means) + 1e-6


@given(values_by_cluster, st.floats(0.1, 10), st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
def test_interval_follows_a_change_of_units(groups: list[list[float]], scale: float, shift: float) -> None:
    values, clusters = flat(groups)
    one, other = (mean_interval(v, clusters, resamples=50) for v in (values + 1000, scale * (values + 1000) + shift))
    assert (other.low, other.high) == pytest.approx((scale * one.low + shift, scale * one.high + shift), rel=1e-6)


def test_a_share_of_one_has_the_exact_binomial_interval_over_clusters() -> None:
    found = mean_interval(np.ones(30, dtype=bool), np.repeat(np.arange(10), 3))
    assert found.estimate == 1
    assert found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 10))
    assert mean_interval([False] * 5, np.arange(5)).high == pytest.approx(1 - 0.025 ** (1 / 5))
    assert mean_interval(np.zeros(5), np.arange(5)).high == 0  # no share: five measurements of nothing


def test_one_cluster_or_none_has_no_interval() -> None:
    one = mean_interval([1.0, 2.0], ["a", "a"])
    assert one.estimate == 1.5
    assert np.isnan([one.low, one.high]).all()
    assert mean_interval([], []).clusters == 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="one cluster label per value"):
        mean_interval([1.0, 2.0], [0])
    with pytest.raises(InputError, match="nan"):
        mean_interval([1.0, np.nan], [0, 1])


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_auc_is_that_of_scikit_learn(seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.random(40) < 0.5
    labels[:2] = (True, False)
    scores = random.integers(levels, size=40) + labels * random.random()  # many ties
    found = auc_interval(scores, labels, random.integers(8, size=40), resamples=20)
    assert found.estimate == pytest.approx(roc_auc_score(labels, scores))


def test_auc_interval_is_that_of_resampled_clusters() -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(25), 6)
    labels = random.random(150) < 0.4
    scores = labels + random.normal(size=150) + random.normal(size=25)[clusters]
    found = auc_interval(scores, labels, clusters, resamples=3000)
    areas = []
    for _ in range(1500):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in random.integers(25, size=25)])
        areas.append(roc_auc_score(labels[rows], scores[rows]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.015)


def test_a_difference_is_that_of_the_same_resampled_clusters() -> None:
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(20), 8)
    truth, labels = random.normal(size=160), random.integers(3, size=160)[:, None] == np.arange(3)
    hard = random.normal(size=20)[clusters]  # what makes both guesses bad in a cluster
    guesses = [truth + 0.5 * hard, truth + 0.5 * hard + 0.3 * random.normal(size=160)]
    scores = [labels + 0.4 * (hard[:, None] + random.normal(size=(160, 3))) for _ in range(2)]
    kinds: list[tuple[list[Resampled], Any]] = [
        (
            [r2_resampled(guess, truth, clusters, 200) for guess in guesses],
            lambda i, rows: r2_score(truth[rows], guesses[i][rows]),
        ),
        (
            [macro_auc_resampled(score, labels, clusters, 200) for score in scores],
            lambda i, rows: np.mean([roc_auc_score(labels[rows, c], scores[i][rows, c]) for c in range(3)]),
        ),
    ]
    # The clusters that are drawn: the same for every score of as many clusters.
    counts = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=200)
    drawn = [np.concatenate([np.tile(np.flatnonzero(clusters == c), n) for c, n in enumerate(row)]) for row in counts]
    for (one, other), score in kinds:
        expected = [score(0, rows) - score(1, rows) for rows in drawn]
        found = one.less(other)
        assert found.draws == pytest.approx(np.array(expected), abs=1e-9)
        every = np.arange(160)
        interval = found.interval()
        assert interval.estimate == pytest.approx(score(0, every) - score(1, every))
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))
    (one, other), _ = kinds[0]
    paired, alone = one.less(other).interval(), one.interval()
    assert paired.high - paired.low < alone.high - alone.low


def test_differences_of_other_rows_and_of_nothing() -> None:
    one = r2_resampled([0.0, 1.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0, 0, 1, 1])
    undefined = r2_resampled([0.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1])
    nothing = one.less(undefined).interval()
    assert np.isnan([nothing.estimate, nothing.low, nothing.high]).all()
    assert (nothing.clusters, nothing.measurements) == (2, 4)
    with pytest.raises(InputError, match="4 of 2 clusters and 3 of 3: score the same rows"):
        one.less(r2_resampled([0.0, 1.0, 2.0], [0.0, 1.0, 3.0], [0, 1, 2]))
    with pytest.raises(InputError, match="have 1000 and 10 resamples"):
        one.less(r2_resampled([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 2.0], [0, 0, 1, 1], resamples=10))


def test_auc_of_perfect_and_of_missing_classes() -> None:
    perfect = auc_interval([0, 1, 2, 3], [False, False, True, True], [0, 1, 0, 1])
    assert (perfect.estimate, perfect.low, perfect.high) == (1, 1, 1)
    assert np.isnan(auc_interval([0, 1], [True, True], [0, 1]).estimate)


def test_summarise_makes_one_row_per_group_and_leaves_out_what_is_undefined() -> None:
    table = pd.DataFrame(
        {
            "task": ["a", "a", "a", "b", "b"],
            "sample": [0, 0, 1, 0, 1],
            "value": [1.0, 3.0, 5.0, np.nan, np.nan],
        }
    )
    found = summarise(table, "value", ["task"])
    assert found["task"].tolist() == ["a"]
    assert found[["mean", "clusters", "measurements"]].to_numpy().tolist() == [[3.0, 2, 3]]
    nothing = summarise(table[table["task"] == "b"], "value", ["task", "sample"])
    assert nothing.empty
    assert pd.concat([nothing, summarise(table, "value", ["task", "sample"])]).dtypes.to_dict() == (
        summarise(table, "value", ["task", "sample"]).dtypes.to_dict()
    )
    with pytest.raises(InputError, match="no column"):
        summarise(table, "missing", ["task"])


def test_in_words() -> None:
    row = pd.DataFrame({"mean": [0.912], "low": [0.851], "high": [0.96]})
    assert in_words(row) == "0.91 [0.85, 0.96]"
    assert in_words(row.assign(low=np.nan)) == "0.91"
    assert in_words(row.iloc[:0]) == "-"
