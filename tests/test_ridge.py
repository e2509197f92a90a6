"""Ridge probes by shared factorisations, against scikit-learn fitted one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dit_lens as dl
from dit_lens.statistics import auc_interval, macro_auc_interval, r2_interval
from probes.ridge import FOLDS, PENALTIES, Question, read_all

CHANNELS = 12


def cell(seed: int, rows: int = 240, groups: int = 24) -> tuple[np.ndarray, list[Question], np.ndarray, np.ndarray]:
    """Features with an offset and unequal scales, four questions about them, groups and test rows."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, CHANNELS)) * rng.uniform(0.1, 10, CHANNELS) + rng.normal(size=CHANNELS) * 5
    features[:, 3] = 7.0  # says nothing
    features[:, 5] = features[:, 4] + 1e-3 * rng.normal(size=rows)
    score = (features[:, :3] / features[:, :3].std(0)) @ rng.normal(size=3) + rng.normal(size=rows)
    some = np.where(rng.random(rows) < 0.7, score > score.mean(), np.nan)
    questions = [
        Question("binary", "binary", score > np.median(score)),
        Question("some", "binary", some),
        Question("classes", "classes", np.digitize(score, np.quantile(score, [0.3, 0.7]))),
        Question("number", "number", score * 3 + 1),
    ]
    group = rng.integers(groups, size=rows)
    return features.astype(np.float32), questions, group, np.isin(group, np.arange(groups // 3))


def by_scikit_learn(x: np.ndarray, question: Question, groups: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """The held-out score and the chosen penalty, fitted without any sharing."""
    asked = question.asked
    train, held, values = asked & ~test, asked & test, np.asarray(question.values, dtype=float)
    classes = np.unique(values[train])

    def labels(rows: np.ndarray) -> np.ndarray:
        if question.kind == "classes":
            return np.where(values[rows][:, None] == classes, 1.0, -1.0)
        return values[rows][:, None] if question.kind == "number" else np.where(values[rows] > 0, 1.0, -1.0)[:, None]

    def score(guess: np.ndarray, truth: np.ndarray) -> float:
        if question.kind == "number":
            return float(r2_score(truth, guess))
        return float(np.mean([roc_auc_score(t > 0, g) for g, t in zip(guess.T, truth.T, strict=True)]))

    def fitted(rows: np.ndarray, penalty: float) -> Any:
        return make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(x[rows].astype(np.float64), labels(rows))

    inside = np.flatnonzero(train)
    searched = []
    for penalty in PENALTIES:
        folds = []
        for fit, check in GroupKFold(FOLDS).split(inside, groups=groups[inside]):
            guess = fitted(inside[fit], penalty).predict(x[inside[check]].astype(np.float64))
            folds.append(score(guess.reshape(len(check), -1), labels(inside[check])))
        searched.append(np.mean(folds))
    best = PENALTIES[int(np.argmax(searched))]
    guess = fitted(train, best).predict(x[held].astype(np.float64)).reshape(held.sum(), -1)
    return score(guess, labels(held)), best


@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_scikit_learn_one_by_one(seed: int) -> None:
    features, questions, groups, test = cell(seed)
    for question, reading in zip(questions, read_all(features, questions, groups, test), strict=True):
        score, penalty = by_scikit_learn(features, question, groups, test)
        assert reading.penalty == penalty
        assert reading.score.estimate == pytest.approx(score, abs=1e-6)
        assert reading.score.low <= score <= reading.score.high


def test_weights_are_of_the_features_as_they_came() -> None:
    features, questions, groups, test = cell(0)
    (reading,) = read_all(features, questions[:1], groups, test)
    guesses = features[test].astype(np.float64) @ reading.weights[0]
    assert roc_auc_score(np.asarray(questions[0].values)[test], guesses) == pytest.approx(reading.score.estimate, abs=1e-9)


def test_what_depends_on_groups_alone_is_not_read() -> None:
    """A label per group that features give away within groups only: leaking it would score near 1."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 8)
    features = rng.normal(size=(60, CHANNELS))[groups] + 0.01 * rng.normal(size=(480, CHANNELS))
    labels = (rng.random(60) < 0.5)[groups]
    (reading,) = read_all(features, [Question("group", "binary", labels)], groups, np.isin(groups, np.arange(20)))
    assert abs(reading.score.estimate - 0.5) < 0.25
    with pytest.raises(dl.InputError, match="1 groups are in training and in testing, the first is 3: split by group"):
        read_all(features, [Question("group", "binary", labels)], groups, np.arange(480) < 28)


def test_nothing_to_learn_is_not_a_number() -> None:
    features, _, groups, test = cell(1)
    same = Question("same", "binary", np.ones(len(groups), dtype=bool))
    nobody = Question("nobody", "number", np.full(len(groups), np.nan))
    for reading in read_all(features, [same, nobody], groups, test):
        assert np.isnan([reading.score.estimate, reading.score.low, reading.penalty]).all()
    with pytest.raises(dl.InputError, match="need a row each, and there are 3, 240"):
        read_all(features, [Question("short", "number", np.arange(3.0))], groups, test)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_intervals_surround_what_scikit_learn_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, clusters = rng.normal(size=80), rng.integers(12, size=80)
    guesses = truth + rng.normal(size=80)
    found = r2_interval(guesses, truth, clusters)
    assert found.estimate == pytest.approx(r2_score(truth, guesses), abs=1e-9)
    assert found.low <= found.high
    labels = np.eye(3, dtype=bool)[rng.integers(3, size=80)]
    scores = rng.normal(size=(80, 3)) + labels
    found = macro_auc_interval(scores, labels, clusters)
    areas = [roc_auc_score(labels[:, i], scores[:, i]) for i in range(3)]
    assert found.estimate == pytest.approx(np.mean(areas), abs=1e-9)
    assert found.low <= found.estimate <= found.high
    assert macro_auc_interval(scores[:, :1], labels[:, :1], clusters) == auc_interval(scores[:, 0], labels[:, 0], clusters)


def test_r2_of_what_does_not_vary_is_not_a_number() -> None:
    assert np.isnan(r2_interval([1.0, 2.0], [3.0, 3.0], [0, 1]).estimate)
