"""Control tasks and shuffled labels, on features that remember places, that read samples, and that do neither."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from probes.controls import control_task, read_with_controls, shuffled
from probes.ridge import Question, read_all

SAMPLES, PLACES = 60, 12
SAMPLE = np.repeat(np.arange(SAMPLES), PLACES)
PLACE = np.tile(np.arange(PLACES), SAMPLES)
TEST = SAMPLE < 20


def read(features: np.ndarray, labels: np.ndarray, kind: str = "binary") -> pd.Series:
    question = Question("it", kind, labels)  # pyright: ignore[reportArgumentType]
    return read_with_controls(features, [question], SAMPLE, TEST, SAMPLE, PLACE).iloc[0]


def test_what_only_places_tell_is_no_selectivity() -> None:
    rng = np.random.default_rng(0)
    features = np.eye(PLACES)[PLACE] + 0.1 * rng.normal(size=(len(SAMPLE), PLACES))
    labels = rng.random(PLACES)[PLACE] + 0.3 * rng.random(len(SAMPLE)) > 0.65
    found = read(features, labels)
    assert found["estimate"] > 0.85
    assert found["control"] > 0.85
    assert abs(found["shuffled"] - found["estimate"]) < 0.1
    assert found["selectivity"] < 0.1


def test_what_is_read_of_the_sample_is_selective() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(len(SAMPLE)) < 0.5
    features = np.where(labels, 1.0, -1.0)[:, None] * rng.normal(size=8) + 0.3 * rng.normal(size=(len(SAMPLE), 8))
    found = read(features, labels)
    assert found["estimate"] > 0.95
    assert abs(found["control"] - 0.5) < 0.15
    assert abs(found["shuffled"] - 0.5) < 0.15
    assert found["selectivity"] == pytest.approx(found["estimate"] - found["control"])


@pytest.mark.parametrize("kind", ["binary", "classes", "number"])
def test_the_interval_of_selectivity_is_that_of_both_probes_in_the_same_resamples(kind: str) -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=len(SAMPLE))
    labels = {"binary": truth > 0, "classes": np.digitize(truth, [-0.5, 0.5]), "number": truth}[kind]
    features = truth[:, None] * rng.normal(size=5) + 2 * rng.normal(size=(len(SAMPLE), 5))
    question = Question("it", kind, labels)  # pyright: ignore[reportArgumentType]
    found = read_with_controls(features, [question], SAMPLE, TEST, SAMPLE, PLACE).iloc[0]
    control = control_task(question, PLACE)
    true, random = read_all(features, [question, control], SAMPLE, TEST)
    readings = {"true": true, "control": random}
    answers = {"true": np.asarray(labels, dtype=float), "control": np.asarray(control.values)}

    def score(name: str, rows: np.ndarray) -> float:
        guesses, right = features[rows] @ readings[name].weights.T, answers[name][rows]
        if kind == "number":
            # The offset is that of the means of the training rows.
            middle = answers[name][~TEST].mean() - (features[~TEST].mean(axis=0) @ readings[name].weights.T)
            return float(r2_score(right, guesses[:, 0] + middle))
        classes = [1.0] if kind == "binary" else np.unique(answers[name][~TEST])
        return float(np.mean([roc_auc_score(right == c, guess) for c, guess in zip(classes, guesses.T, strict=True)]))

    held = np.flatnonzero(TEST)
    assert found["selectivity"] == pytest.approx(score("true", held) - score("control", held), abs=1e-6)
    groups = np.unique(SAMPLE[TEST])
    counts = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=1000)
    of = [np.flatnonzero(group == SAMPLE) for group in groups]
    drawn = [np.concatenate([np.tile(rows, n) for rows, n in zip(of, row, strict=True)]) for row in counts[:100]]
    draws = true.resampled.less(random.resampled).draws
    assert draws[:100] == pytest.approx(np.array([score("true", rows) - score("control", rows) for rows in drawn]), abs=1e-6)
    assert (found["selectivity_low"], found["selectivity_high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found["selectivity_low"] < found["selectivity"] < found["selectivity_high"]


def test_where_nothing_is_read_there_is_no_selectivity() -> None:
    features = np.random.default_rng(5).normal(size=(len(SAMPLE), 4))
    found = read(features, (SAMPLE >= 20) & (PLACE < 6))  # the test rows have one label, those of the control have two
    assert np.isnan(found[["estimate", "selectivity", "selectivity_low", "selectivity_high"]].astype(float)).all()


def test_numbers_have_controls_too() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=len(SAMPLE))
    features = values[:, None] * rng.normal(size=6) + 0.1 * rng.normal(size=(len(SAMPLE), 6))
    found = read(features, values, "number")
    assert found["estimate"] > 0.9
    assert found["control"] < 0.1
    assert found["shuffled"] < 0.1


def test_controls_keep_frequencies_and_who_is_asked() -> None:
    rng = np.random.default_rng(3)
    values = np.where(rng.random(len(SAMPLE)) < 0.8, rng.random(len(SAMPLE)) < 0.25, np.nan)
    question = Question("it", "binary", values)
    control, mixed = control_task(question, PLACE), shuffled(question, SAMPLE, PLACE)
    for other in (control, mixed):
        assert np.array_equal(other.asked, question.asked)
    # One label for each place, a quarter of them true, as near as twelve places come to it.
    by_place = pd.Series(control.values).groupby(PLACE).nunique()
    assert (by_place == 1).all()
    assert pd.Series(control.values).groupby(PLACE).first().sum() == 3
    # Shuffling keeps every place's labels, and moves them.
    for place in range(PLACES):
        assert np.nansum(mixed.values[place == PLACE]) == np.nansum(values[place == PLACE])
    assert (mixed.values[question.asked] != values[question.asked]).mean() > 0.2
    other_seed = control_task(question, PLACE, seed=1)
    assert not np.array_equal(other_seed.values, control.values, equal_nan=True)
