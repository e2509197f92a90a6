"""Levers: directions and erasers found with a label, and controls of the same length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planted_targets import FEATURE, HERE

import dit_lens as dl
from dit_lens.plants import planted_feature
from probes.levers import Tokens, along, levers, levers_at, projection, tokens_of
from probes.ridge import Question, read_all

GROUPS, PLACES, WIDTH = 40, 6, 12
ROWS = GROUPS * PLACES


def data(seed: int = 0, shift: float = 3.0) -> tuple[np.ndarray, Tokens]:
    """Noise of many scales with a label along one direction; one channel is always 0, another always 5."""
    rng = np.random.default_rng(seed)
    labels, way = rng.random(ROWS) < 0.5, rng.normal(size=WIDTH)
    features = rng.normal(size=(ROWS, WIDTH)) * np.geomspace(0.1, 3, WIDTH) + shift * labels[:, None] * way
    features[:, 3], features[:, 4] = 0, 5
    groups = np.repeat(np.arange(GROUPS), PLACES)
    return features, Tokens(Question("it", "binary", labels), groups, groups, np.tile(np.arange(PLACES), GROUPS))


def area(features: np.ndarray, tokens: Tokens, way: dl.Direction | None = None) -> float:
    """How well the label is read, along one direction or by a probe of its own."""
    seen = features if way is None else (features @ way.vector.double().numpy())[:, None]
    (reading,) = read_all(seen, [tokens.question], tokens.groups, tokens.groups < 10)
    return reading.score.estimate


def test_levers_read_the_label_and_controls_do_not() -> None:
    features, tokens = data()
    found = levers(features, tokens, draws=3)
    assert list(found) == ["mass-mean", "ridge", "leace", "shuffled", "random 0", "random 1", "random 2"]
    assert [lever.is_control for lever in found.values()] == [False] * 3 + [True] * 4
    assert found["leace"].direction is None
    ridge, mean = found["ridge"], found["mass-mean"]
    assert ridge.direction is not None
    assert mean.direction is not None
    assert area(features, tokens, ridge.direction) > 0.95
    assert ridge.score is not None
    assert ridge.score.estimate > 0.95
    # One step is the way from one class to the other, of the controls the way between the classes of `mass-mean`.
    labels = tokens.question.values
    between = features[labels].mean(0) - features[~labels].mean(0)
    assert mean.direction.scale == pytest.approx(np.linalg.norm(between))
    assert ridge.direction.scale == pytest.approx(between @ ridge.direction.vector.double().numpy(), rel=1e-5)
    for control in list(found.values())[3:]:
        assert control.direction is not None
        assert control.direction.scale == mean.direction.scale
        assert abs(float(dl.cosine(control.direction, mean.direction))) < 0.9


def test_erasers_take_what_they_say() -> None:
    features, tokens = data()
    found = levers(features, tokens)
    rows = torch.from_numpy(features)
    fitted = {name: area(lever.eraser(rows).numpy(), tokens) for name, lever in found.items()}
    assert fitted["leace"] < 0.6
    assert fitted["mass-mean"] < 0.6
    assert min(fitted["shuffled"], fitted["random 0"]) > 0.9
    ridge = found["ridge"]
    assert ridge.direction is not None
    left = ridge.eraser(rows) @ ridge.direction.vector.double()
    assert left.std() < 1e-6 * rows.std(), "all rows are alike along it"
    assert torch.allclose(ridge.eraser(ridge.eraser(rows)), ridge.eraser(rows))


def test_what_is_always_the_same_stays_so_to_the_last_bit() -> None:
    """Rounding that follows the label in a channel without spread would be read without a fault."""
    features, tokens = data()
    for lever in levers(features, tokens).values():
        if lever.name.startswith("random"):
            continue
        left = lever.eraser(torch.from_numpy(features).float())
        assert (left[:, 3] == 0).all(), lever.name
        assert len(left[:, 4].unique()) == 1, lever.name


def test_a_direction_comes_from_weights_and_a_projection_from_a_direction() -> None:
    features, tokens = data()
    labels = tokens.question.values
    way = along(np.eye(WIDTH)[7] * 4, features, labels)
    assert way.vector.tolist() == np.eye(WIDTH)[7].tolist()
    assert way.scale == pytest.approx(features[labels, 7].mean() - features[~labels, 7].mean())
    flat = projection(way, features.mean(0))(torch.from_numpy(features)).numpy()
    assert np.allclose(flat[:, 7], features[:, 7].mean())
    assert np.array_equal(np.delete(flat, 7, 1), np.delete(features, 7, 1))


def test_labels_are_those_of_the_selected_tokens() -> None:
    samples = planted_feature("absent", seed=1).samples(3)
    layout = dl.Layout(2, 4, 4)
    whole = tokens_of(dl.at(), layout, samples, FEATURE)
    assert len(whole.question.values) == 3 * 32
    assert np.array_equal(whole.question.values[:16], samples[0].feature.ravel())
    assert np.array_equal(whole.question.values[16:32], samples[0].feature.ravel()), "they hold in every frame"
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = mask[3, 0] = True
    some = tokens_of(dl.at(frames=1, tokens=mask), layout, samples, FEATURE)
    assert some.places.tolist() == [16 + 6, 16 + 12] * 3
    assert some.samples.tolist() == [0, 0, 1, 1, 2, 2]
    assert some.question.values.tolist() == [float(s.feature[place]) for s in samples for place in ((1, 2), (3, 0))]
    nan = replace(FEATURE, labels=lambda sample, drawn: np.where(mask, sample.feature, np.nan))
    assert tokens_of(dl.at(frames=0), layout, samples, nan).question.asked.sum() == 6


def test_levers_of_a_planted_feature_lie_along_it_wherever_they_were_found() -> None:
    model = planted_feature("written", seed=2, block=1)
    lens, samples = model.lens("hooks"), model.samples(24)
    found = [levers_at(lens, samples, dl.at(block=block, **HERE, frames=0), FEATURE, draws=1) for block in (1, 3)]
    ways = [lever.direction for part in found for lever in (part["ridge"], part["mass-mean"])]
    for way in ways:
        assert way is not None
        assert ways[0] is not None
        assert float(dl.cosine(way, ways[0])) > 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "number"}, "of a binary target, and it is of kind number"),
        ({"values": np.ones(ROWS, dtype=bool)}, "rows of both labels"),
    ],
)
def test_labels_that_give_no_direction_are_errors(changes: dict[str, Any], message: str) -> None:
    features, tokens = data()
    with pytest.raises(dl.InputError, match=message):
        levers(features, replace(tokens, question=replace(tokens.question, **changes)))


def test_cells_and_targets_that_do_not_fit_are_errors() -> None:
    model = planted_feature("written", seed=2)
    lens, samples = model.lens("hooks"), model.samples(4)
    with pytest.raises(dl.InputError, match="selects 5 cells, and a lever is found at one: name block="):
        levers_at(lens, samples, dl.at(**HERE), FEATURE)
    drawn = replace(FEATURE, labels=lambda sample, drawn: drawn.board)
    with pytest.raises(dl.InputError, match=r"asks what the model drew .* give drawn="):
        levers_at(lens, samples, dl.at(block=2, **HERE, frames=0), drawn)
    wide = replace(FEATURE, labels=lambda sample, drawn: np.ones((8, 8)))
    with pytest.raises(dl.InputError, match=r"labels of feature have shape \(8, 8\) and do not fit the layout \(2, 4, 4\)"):
        levers_at(lens, samples, dl.at(block=2, **HERE, frames=0), wide)
