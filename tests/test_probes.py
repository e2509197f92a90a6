"""Probes: planted targets are found, random ones are not, and no puzzle is in both halves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_lens.errors import InputError
from probes import fit_and_score, split_groups

GROUPS = np.repeat(np.arange(40), 15)
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(len(GROUPS), 24))


def test_a_planted_linear_target_is_found() -> None:
    found = fit_and_score(FEATURES, FEATURES @ RANDOM.normal(size=24) > 0, GROUPS)
    assert found.estimate > 0.97
    assert found.low > 0.95


def test_a_single_clean_direction_is_found_perfectly() -> None:
    labels = RANDOM.random(len(GROUPS)) < 0.3
    features = FEATURES.copy()
    features[:, 5] = 100 * labels
    assert fit_and_score(features, labels, GROUPS).estimate == 1


def test_a_random_target_is_not_found() -> None:
    found = fit_and_score(FEATURES, RANDOM.random(len(GROUPS)) < 0.5, GROUPS)
    assert found.low < 0.5 < found.high


def test_a_target_that_only_marks_the_puzzle_is_not_found_on_others() -> None:
    # The features name the group; a split by token would score 1 here.
    names = np.eye(40)[GROUPS]
    labels = (RANDOM.random(40) < 0.5)[GROUPS]
    assert fit_and_score(names, labels, GROUPS).estimate == pytest.approx(0.5, abs=0.05)


def test_units_of_the_features_do_not_matter() -> None:
    labels = FEATURES[:, 0] + FEATURES[:, 1] > 0.3
    scaled = FEATURES * np.logspace(-3, 3, 24) + 5
    assert fit_and_score(scaled, labels, GROUPS).estimate == pytest.approx(fit_and_score(FEATURES, labels, GROUPS).estimate)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1), st.integers(0, 5))
def test_no_group_is_split(groups: list[int], seed: int) -> None:
    train, test = split_groups(np.array(groups), seed=seed)
    assert (train ^ test).all()
    assert train.any()
    assert test.any()
    assert not set(np.array(groups)[train]) & set(np.array(groups)[test])


def test_nothing_to_learn_gives_nan_and_wrong_lengths_an_error() -> None:
    assert np.isnan(fit_and_score(FEATURES, np.ones(len(GROUPS), dtype=bool), GROUPS).estimate)
    assert np.isnan(fit_and_score(FEATURES[:15], FEATURES[:15, 0] > 0, GROUPS[:15]).estimate)
    with pytest.raises(InputError, match="one row per token"):
        fit_and_score(FEATURES[:3], np.ones(4, dtype=bool), GROUPS[:3])
    with pytest.raises(InputError, match="at least 2 groups"):
        split_groups(np.zeros(5))
