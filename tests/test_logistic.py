"""Logistic probes side by side, against scikit-learn fitted one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_ridge import cell

import dit_lens as dl
from probes import newton
from probes.controls import read_with_controls
from probes.logistic import PENALTIES, read_all, read_stack
from probes.newton import areas
from probes.ridge import FOLDS, Question


def pipeline(penalty: float) -> Any:
    """The same probe by scikit-learn, exact to the last digits."""
    return make_pipeline(
        StandardScaler(),
        OneVsRestClassifier(LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-11, max_iter=1000)),
    )


def columns(question: Question, rows: np.ndarray, train: np.ndarray) -> np.ndarray:
    values = np.asarray(question.values, dtype=float)
    if question.kind == "binary":
        return (values[rows] > 0).astype(int)[:, None]
    return (values[rows][:, None] == np.unique(values[train])).astype(int)


def area(guesses: np.ndarray, truth: np.ndarray) -> float:
    """Mean over columns in which both classes occur."""
    found = [roc_auc_score(t, g) for t, g in zip(truth.T, guesses.T, strict=True) if 0 < t.sum() < len(t)]
    return float(np.mean(found)) if found else np.nan


def fitted(x: np.ndarray, truth: np.ndarray, penalty: float) -> tuple[Any, np.ndarray]:
    """The probe and its weights of the features as they came; a column of one class has weights of 0."""
    found, weights = [], np.zeros((truth.shape[1], x.shape[1]))
    for place, column in enumerate(truth.T):
        if 0 < column.sum() < len(column):
            probe = pipeline(penalty).fit(x, column)
            weights[place] = probe[-1].estimators_[0].coef_[0] / probe[0].scale_
            found.append(probe.decision_function)
        else:
            found.append(lambda rows: np.zeros(len(rows)))
    return lambda rows: np.stack([one(rows) for one in found], axis=1), weights


def by_scikit_learn(x: np.ndarray, question: Question, groups: np.ndarray, test: np.ndarray) -> dict[float, float]:
    """Mean area over folds of every penalty."""
    train = question.asked & ~test
    inside = np.flatnonzero(train)
    found = {}
    for penalty in PENALTIES:
        scores = []
        for fit, check in GroupKFold(FOLDS).split(inside, groups=groups[inside]):
            probe, _ = fitted(x[inside[fit]], columns(question, inside[fit], train), penalty)
            scores.append(area(probe(x[inside[check]]), columns(question, inside[check], train)))
        found[penalty] = float(np.nanmean(scores))
    return found


def agree(x: np.ndarray, question: Question, groups: np.ndarray, test: np.ndarray, reading: Any) -> None:
    """The penalty is as good as the best one, and weights and score there are scikit-learn's."""
    x = x.astype(np.float64)
    train, held = question.asked & ~test, question.asked & test
    searched = by_scikit_learn(x, question, groups, test)
    assert searched[reading.penalty] == pytest.approx(max(searched.values()), abs=1e-6)
    probe, weights = fitted(x[train], columns(question, train, train), reading.penalty)
    assert np.abs(reading.weights - weights).max() <= 1e-4 * np.abs(weights).max()
    assert reading.score.estimate == pytest.approx(area(probe(x[held]), columns(question, held, train)), abs=1e-3)
    assert reading.score.low <= reading.score.estimate <= reading.score.high


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 40))
def test_it_agrees_with_scikit_learn_one_by_one(seed: int, rare: int) -> None:
    """With rows that are not asked, features that are constant or twins, and a class that some folds lack."""
    x, questions, groups, test = cell(seed, rows=160)
    rng = np.random.default_rng(seed)
    classes = np.digitize(x[:, 0] / x[:, 0].std() + rng.normal(size=len(x)), [-0.5, 0.5])
    classes[rng.permutation(len(x))[:rare]] = 7
    asked = [*questions[:2], Question("rare", "classes", classes)]
    for question, reading in zip(asked, read_all(x, asked, groups, test, device="cpu"), strict=True):
        agree(x, question, groups, test, reading)


def test_a_stack_is_its_cells_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, questions, groups, test = cell(0)
    stack = np.stack([x, x[:, ::-1] ** 2, np.random.default_rng(0).normal(size=x.shape)])
    together = read_stack(stack, questions[:3], groups, test, device="cpu")
    # In portions of one problem, and of one cell, the same comes out.
    monkeypatch.setitem(newton.HELD_BYTES, "cpu", 1)
    monkeypatch.setattr("probes.logistic.HELD_ROWS", 1)
    portions = read_stack(stack, questions[:3], groups, test, device="cpu")
    for features, whole, part in zip(stack, together, portions, strict=True):
        alone = read_all(features, questions[:3], groups, test, device="cpu")
        for readings in zip(alone, whole, part, strict=True):
            assert len({reading.penalty for reading in readings}) == 1
            for other in readings[1:]:
                assert np.allclose(other.weights, readings[0].weights, rtol=1e-6, atol=1e-9)
                assert other.score.estimate == pytest.approx(readings[0].score.estimate, abs=1e-9)


def test_what_can_be_separated_has_a_finite_fit() -> None:
    x, _, groups, test = cell(2)
    question = Question("sign", "binary", x[:, 0] > np.median(x[:, 0]))
    for penalty in (1e-4, 1e-1):
        (reading,) = read_all(x, [question], groups, test, penalties=[penalty], device="cpu")
        _, weights = fitted(x[~test].astype(np.float64), columns(question, ~test, ~test), penalty)
        assert reading.score.estimate > 0.98
        assert np.isfinite(reading.weights).all()
        assert np.abs(reading.weights - weights).max() <= 1e-4 * np.abs(weights).max()


def test_more_features_than_rows_have_a_fit() -> None:
    rng = np.random.default_rng(3)
    x, groups = rng.normal(size=(60, 150)), np.arange(60)
    question = Question("it", "binary", x[:, 0] + 0.1 * rng.normal(size=60) > 0)
    test = groups < 20
    (reading,) = read_all(x, [question], groups, test, device="cpu")
    agree(x, question, groups, test, reading)


def test_a_fit_that_comes_to_no_end_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x, questions, groups, test = cell(0)
    # A few steps are enough for an offset, where the penalty is so strong that weights are nothing; not for weights.
    monkeypatch.setattr(newton, "STEPS", 4)
    (given_up,) = read_all(x, questions[:1], groups, test, penalties=[0.1], device="cpu")
    assert np.isnan([given_up.score.estimate, given_up.penalty]).all()
    (found,) = read_all(x, questions[:1], groups, test, penalties=[0.1, 1e9], device="cpu")
    assert found.penalty == 1e9
    assert np.isfinite(found.score.estimate)


def test_what_cannot_be_fitted_is_said() -> None:
    x, questions, groups, test = cell(0)
    with pytest.raises(dl.InputError, match="number is a number, and logistic probes tell classes apart"):
        read_all(x, questions, groups, test)
    with pytest.raises(dl.InputError, match="a penalty is positive, and there is 0"):
        read_all(x, questions[:1], groups, test, penalties=[0, 1])
    broken = np.stack([x, np.where(x == x.max(), np.nan, x)])
    with pytest.raises(dl.InputError, match="the features of cell 1 of 2 hold nan or infinity"):
        read_stack(broken, questions[:1], groups, test)
    with pytest.raises(dl.InputError, match="are in training and in testing"):
        read_all(x, questions[:1], groups, np.arange(len(x)) < 100)
    with pytest.raises(dl.InputError, match="need a row each, and there are 3, 240"):
        read_all(x, [Question("short", "binary", np.arange(3.0))], groups, test)
    same, nobody = Question("same", "binary", np.ones(len(x))), Question("nobody", "binary", np.full(len(x), np.nan))
    for reading in read_all(x, [same, nobody], groups, test):
        assert np.isnan([reading.score.estimate, reading.penalty]).all()


def test_controls_are_read_by_the_same_probes() -> None:
    x, questions, groups, test = cell(4)
    places = np.arange(len(x)) % 8
    table = read_with_controls(x, questions[:3], groups, test, groups, places, read=read_all, device="cpu")
    ridge = read_with_controls(x, questions[:3], groups, test, groups, places)
    assert list(table.columns) == list(ridge.columns)
    assert (table["estimate"] - ridge["estimate"]).abs().max() < 0.05
    assert (table["selectivity"] == table["estimate"] - table["control"]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_areas_are_those_of_scikit_learn(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(levels, size=(3, 30)).astype(float), rng.random((3, 30)) < 0.4
    truth[2] = False
    found = areas(torch.tensor(scores), torch.tensor(truth))
    for place in range(2):
        if 0 < truth[place].sum() < 30:
            assert float(found[place]) == pytest.approx(roc_auc_score(truth[place], scores[place]), abs=1e-12)
    assert found[2].isnan()
