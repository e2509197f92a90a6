"""Kinds of probes, and code lengths: on features that tell a label linearly, only nonlinearly, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dit_lens as dl
from probes.linear import MassMean, code_length, fit_and_score, searched

ROWS, GROUPS = 600, 60


def data(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of six channels, labels and groups."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(ROWS, 6))
    labels = {
        "linear": features[:, 0] + features[:, 1] > 0,
        "product": features[:, 0] * features[:, 1] > 0,
        "nothing": rng.random(ROWS) < 0.5,
    }[kind]
    return features.astype(np.float32), labels, np.repeat(np.arange(GROUPS), ROWS // GROUPS)


def test_each_kind_reads_what_it_can_and_no_more() -> None:
    score = {
        (probe, kind): fit_and_score(*data(kind), probe=probe).estimate
        for probe in ("logistic", "mass-mean", "nonlinear")
        for kind in ("linear", "product", "nothing")
    }
    for probe in ("logistic", "mass-mean", "nonlinear"):
        assert score[probe, "linear"] > 0.95
        assert abs(score[probe, "nothing"] - 0.5) < 0.1
    assert abs(score["logistic", "product"] - 0.5) < 0.15
    assert abs(score["mass-mean", "product"] - 0.5) < 0.15
    assert score["nonlinear", "product"] > 0.85
    with pytest.raises(dl.InputError, match="there is no probe 'forest'; write one of logistic, mass-mean, nonlinear"):
        fit_and_score(*data("linear"), probe="forest")


def test_the_mass_mean_probe_is_the_difference_of_the_means() -> None:
    features, labels, _ = data("linear")
    probe = make_pipeline(StandardScaler(), MassMean()).fit(features, labels)
    assert (probe.predict(features) == labels).mean() > 0.9
    direction = dl.from_probe(MassMean().fit(features, labels))
    difference = dl.difference_of_means(features, labels)
    assert float(dl.cosine(direction, difference)) == pytest.approx(1, abs=1e-5)


def test_small_variance_is_read_with_a_small_penalty_and_by_the_network() -> None:
    """What a stream holds in a hundredth of its variance: a fixed strong penalty misses what is there linearly."""
    rng = np.random.default_rng(0)
    labels, groups = rng.random(ROWS) < 0.5, np.repeat(np.arange(GROUPS), ROWS // GROUPS)
    common = rng.normal(size=(ROWS, 1))
    features = common @ np.ones((1, 6)) + 0.01 * rng.normal(size=(ROWS, 6))
    features[:, 0] += 0.1 * labels
    test = groups < GROUPS // 2
    assert fit_and_score(features, labels, groups, test=test).estimate < 0.7
    assert searched(features, labels, groups, test).estimate > 0.85
    assert fit_and_score(features, labels, groups, test=test, probe="nonlinear").estimate > 0.95


def test_the_strength_is_found_in_the_training_part_only() -> None:
    features, labels, groups = data("linear")
    test = groups % 2 == 0
    found = searched(features, labels, groups, test)
    assert found.estimate >= fit_and_score(features, labels, groups, test=test).estimate - 0.01
    # What is in the test part has no say: of other labels there, the same probe is scored.
    other = np.where(test, ~labels, labels)
    assert searched(features, other, groups, test).estimate == pytest.approx(1 - found.estimate, abs=1e-9)
    with pytest.raises(dl.InputError, match="takes 4 folds of whole groups, and 3 are for training: add samples"):
        searched(features, labels, groups, groups > 2)


@pytest.mark.parametrize("probe", ["logistic", "mass-mean", "nonlinear"])
def test_several_classes_are_read_each_against_the_rest(probe: str) -> None:
    features, _, groups = data("linear")
    classes = features[:, :3].argmax(axis=1) + 4
    assert fit_and_score(features, classes, groups, probe=probe).estimate > 0.95
    shuffled = np.random.default_rng(0).permutation(classes)
    assert abs(fit_and_score(features, shuffled, groups, probe=probe).estimate - 0.5) < 0.1


def test_code_lengths_of_several_classes() -> None:
    features, _, groups = data("linear")
    classes = features[:, :3].argmax(axis=1) + 4
    found = code_length(features, classes, groups)
    shares = np.bincount(classes)[4:] / ROWS
    assert found.uniform == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found.compression > 1.5
    useless = code_length(features, np.random.default_rng(0).permutation(classes), groups)
    assert 0.8 < useless.compression < 1.05
    # A class that comes last is dear, not impossible.
    rare = np.where(groups == code_order(groups)[-1], 9, classes)
    assert np.isfinite(code_length(features, rare, groups).bits)


def code_order(groups: np.ndarray) -> np.ndarray:
    """The order in which `code_length` sends groups."""
    return np.random.default_rng(0).permutation(np.unique(groups))


def test_code_lengths_are_short_where_features_tell() -> None:
    linear, product, nothing = (code_length(*data(kind)) for kind in ("linear", "product", "nothing"))
    assert linear.compression > 1.8
    for useless in (product, nothing):
        assert 0.8 < useless.compression < 1.05
        # An honest code of labels that features do not tell cannot be shorter than their entropy by much.
        assert useless.bits > 0.95 * useless.uniform
    assert linear.uniform == pytest.approx(1, abs=0.01)
    assert linear.labels == ROWS


def test_a_label_that_is_learned_early_has_a_shorter_code() -> None:
    features, labels, groups = data("linear")
    clear = np.concatenate([features, np.where(labels, 3.0, -3.0)[:, None]], axis=1)
    assert code_length(clear, labels, groups).bits < 0.7 * code_length(features, labels, groups).bits


def test_code_lengths_of_one_class_are_refused() -> None:
    features, labels, groups = data("linear")
    with pytest.raises(dl.InputError, match="labels of two classes"):
        code_length(features, labels | True, groups)
    with pytest.raises(dl.InputError, match="one row per token, got 600, 3, 600"):
        code_length(features, labels[:3], groups)
