"""Kinds of probes, and code lengths: on features that tell a label linearly, only nonlinearly, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dit_lens as dl
from probes.linear import MassMean, code_length, fit_and_score

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
