"""Probes as one would fit them with scikit-learn alone: one at a time, nothing shared.

What `probes.ridge` and `probes.logistic` do for many questions at once is held against these, in results and in time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes import logistic, ridge
from probes.ridge import Question

Features = Float[np.ndarray, "rows channels"]


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows belong together, and which are test rows."""

    groups: Shaped[np.ndarray, " rows"]
    test: Bool[np.ndarray, " rows"]


def one_by_one(x: Features, question: Question, split: Split, linear: Any, grid: dict[str, list[float]]) -> tuple[float, float]:
    """The held-out score of one probe by scikit-learn alone, and the chosen value of its parameter."""
    train, held = question.asked & ~split.test, question.asked & split.test
    values = np.asarray(question.values, dtype=float)
    if question.kind == "number":
        labels = values[:, None]
    elif question.kind == "binary":
        labels = (values > 0)[:, None].astype(float)
    else:
        labels = (values[:, None] == np.unique(values[train])).astype(float)

    def score(probe: Any, features: np.ndarray, truth: np.ndarray) -> float:
        guess = getattr(probe, "decision_function" if hasattr(probe, "decision_function") else "predict")(features)
        truth, guess = truth.reshape(len(truth), -1), guess.reshape(len(truth), -1)
        if question.kind == "number":
            return float(r2_score(truth, guess))
        there = [i for i in range(truth.shape[1]) if 0 < truth[:, i].sum() < len(truth)]
        return float(np.mean([roc_auc_score(truth[:, i], guess[:, i]) for i in there])) if there else np.nan

    def best(results: dict[str, Any]) -> int:
        # A fold that lacks a class says nothing, and must not decide.
        each = np.array([results[f"split{fold}_test_score"] for fold in range(ridge.FOLDS)])
        return int(np.nanmean(each, axis=0).argmax())

    y = labels[:, 0] if labels.shape[1] == 1 else labels
    folds, way = GroupKFold(ridge.FOLDS), make_pipeline(StandardScaler(), linear)
    search = GridSearchCV(way, grid, scoring=score, cv=folds, refit=best)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of folds that lack a class
        search.fit(x[train].astype(np.float64), y[train], groups=split.groups[train])
    (chosen,) = search.best_params_.values()
    return score(search.best_estimator_, x[held].astype(np.float64), y[held]), float(chosen)


def ridge_alone(x: Features, question: Question, split: Split) -> tuple[float, float]:
    """A ridge probe by scikit-learn: its score and penalty."""
    # Labels of 0 and 1, where ours are -1 and 1: guesses and penalties order and weigh the same.
    return one_by_one(x, question, split, Ridge(), {"ridge__alpha": list(ridge.PENALTIES)})


def logistic_alone(x: Features, question: Question, split: Split, tolerance: float = 1e-4) -> tuple[float, float]:
    """A logistic probe by scikit-learn, to its own tolerance when left out: its score and penalty."""
    strengths = [1 / penalty for penalty in logistic.PENALTIES]
    plain = LogisticRegression(max_iter=10_000, tol=tolerance)
    if question.kind == "binary":
        score, strength = one_by_one(x, question, split, plain, {"logisticregression__C": strengths})
    else:
        grid = {"onevsrestclassifier__estimator__C": strengths}
        score, strength = one_by_one(x, question, split, OneVsRestClassifier(plain), grid)
    return score, 1 / strength
