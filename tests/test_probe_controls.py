"""Control tasks and shuffled labels, on features that remember places, that read samples, and that do neither."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probes.controls import control_task, read_with_controls, shuffled
from probes.ridge import Question

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
