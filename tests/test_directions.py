"""Directions and erasers: planted ones are found, controls are not them, and what is erased is gone with the least change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dit_lens as dl
from dit_lens.activations import Entry

CELL = dl.Cell("transformer", 3, "cond", 6, sigma=0.8, timestep=800.0, depth=0.5)


def planted(rows: int = 4000, channels: int = 12, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated Gaussian features of very different sizes, with class means apart: features, labels, means (apart by class)."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(channels, channels)) * np.logspace(-1, 1, channels)
    means = random.normal(size=(classes, channels)) @ mixing * 0.7
    labels = random.integers(classes, size=rows)
    return random.normal(size=(rows, channels)) @ mixing + means[labels] + 5, labels, means


def covariance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Correlations of features with labels, so that units do not matter."""
    targets = (labels[:, None] == np.unique(labels)).astype(float)
    features, targets = features - features.mean(axis=0), targets - targets.mean(axis=0)
    return features.T @ targets / (np.linalg.norm(features, axis=0)[:, None] + 1e-300) / np.linalg.norm(targets, axis=0)


def test_the_difference_of_means_leads_from_one_mean_to_the_other() -> None:
    features, labels, _ = planted()
    found = dl.difference_of_means(features, labels == 1, CELL)
    step = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
    assert np.allclose(found.scale * found.vector.numpy(), step, rtol=1e-5, atol=1e-6)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert found.vector.dtype == torch.float32
    assert found.cell == CELL
    along = dl.project(torch.from_numpy(features), found)
    assert float(along[labels == 1].mean() - along[labels == 0].mean()) == pytest.approx(found.scale, rel=1e-5)


def test_a_planted_step_is_found_per_cell_and_in_the_shape_of_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(2, 8, generator=generator)
    masks, entries = [], []
    for run in range(3):
        for block in range(2):
            mask = torch.rand(4, 1, 3, 3, generator=generator) < 0.5
            noise = torch.randn(4, 1, 3, 3, 2, 8, generator=generator) * 1e-3
            cell = dl.Cell("transformer", 0, "cond", block, "heads")
            entries.append(Entry(cell, run, "full", noise + (1 + block) * mask[..., None, None] * step))
            masks.append(mask)
    lookup = {id(entry): mask for entry, mask in zip(entries, masks, strict=True)}
    found = dl.differences_of_means(iter(entries), lambda entry: lookup[id(entry)])
    assert [cell.block for cell in found] == [0, 1]
    for cell, direction in found.items():
        assert direction.vector.shape == (2, 8)
        assert direction.cell == cell
        assert torch.allclose(direction.scale * direction.vector, (1 + cell.block) * step, atol=1e-3)
        assert dl.project(entries[cell.block].tensor, direction).shape == (4, 1, 3, 3)


def test_half_precision_sums_lose_nothing() -> None:
    features = torch.full((30000, 2), 100.0, dtype=torch.float16)
    features[::2, 1] = 101
    found = dl.difference_of_means(features, np.arange(30000) % 2 == 0)
    assert found.scale == pytest.approx(1, abs=1e-9)
    assert found.vector.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(4, 3), [True] * 4, "rows of both labels; there is only True"),
        (torch.randn(4, 3), [True, False], r"booleans of shape \(4,\)"),
        (torch.randn(4, 3), [0, 1, 0, 1], "booleans of shape"),
        (torch.ones(4, 3), [True, False] * 2, "there is no direction"),
        (torch.full((2, 3), torch.nan), [True, False], "not finite"),
    ],
)
def test_means_that_cannot_be_compared(features: Any, labels: Any, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        dl.difference_of_means(features, labels)
    with pytest.raises(dl.InputError, match="no activations"):
        dl.differences_of_means([], lambda _: [])


@pytest.mark.parametrize("scaler", [None, StandardScaler(), StandardScaler(with_std=False)])
@pytest.mark.parametrize("model", [LogisticRegression(C=0.01), RidgeClassifier(), Ridge()])
def test_one_step_along_a_probes_direction_raises_its_decision_by_one(scaler: Any, model: Any) -> None:
    features, labels, _ = planted(600)
    probe = (model if scaler is None else make_pipeline(scaler, model)).fit(features, labels)
    found = dl.from_probe(probe, cell=CELL)
    decide = getattr(probe, "decision_function", None) or probe.predict
    moved = features + found.scale * found.vector.numpy()
    assert np.allclose(decide(moved) - decide(features), 1, atol=1e-4)
    # Nothing at right angles to it moves the decision.
    across = np.random.default_rng(0).normal(size=features.shape[1])
    across -= (across @ found.vector.numpy()) * found.vector.numpy()
    assert np.allclose(decide(features + across) - decide(features), 0, atol=1e-4)


def test_of_several_classes_one_is_named() -> None:
    features, labels, _ = planted(600, classes=3)
    names = np.array(["red", "green", "blue"])[labels]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, names)
    found = dl.from_probe(probe, answer="green", heads=3)
    assert found.vector.shape == (3, 4)
    place = list(probe.classes_).index("green")
    step = found.scale * found.vector.flatten().numpy()
    assert np.allclose((probe.decision_function(features + step) - probe.decision_function(features))[:, place], 1, atol=1e-4)
    two = LogisticRegression(max_iter=10000).fit(features, labels == 1)
    assert torch.equal(dl.from_probe(two, answer=False).vector, -dl.from_probe(two, answer=True).vector)
    wrong: list[tuple[dict[str, Any], str]] = [({}, "3 outputs; name answer=, one of"), ({"answer": "pink"}, "no class 'pink'")]
    for arguments, message in wrong:
        with pytest.raises(dl.InputError, match=message):
            dl.from_probe(probe, **arguments)
    with pytest.raises(dl.InputError, match="12 features are no 5 heads"):
        dl.from_probe(two, heads=5)


def test_only_linear_fitted_probes_have_a_direction() -> None:
    features, labels, _ = planted(100)
    for probe, message in (
        (LogisticRegression(), "LogisticRegression without coef_"),
        (make_pipeline(PCA(3), Ridge()).fit(features, labels), "not from PCA"),
    ):
        with pytest.raises(dl.InputError, match=message):
            dl.from_probe(probe)


def test_random_directions_match_in_length_and_are_no_more_alike_than_chance() -> None:
    direction = dl.Direction(torch.nn.functional.normalize(torch.randn(400), dim=0), 7.5, CELL, "given")
    controls = dl.random_directions(direction, 50, seed=3)
    assert all(control.scale == 7.5 for control in controls)
    assert all(float(control.vector.norm()) == pytest.approx(1, abs=1e-6) for control in controls)
    cosines = torch.stack([dl.cosine(control, direction) for control in controls])
    # The cosine with a fixed direction has mean 0 and standard deviation 1 / sqrt(400).
    assert abs(float(cosines.mean())) < 4 * 0.05 / 50**0.5
    assert float(cosines.std()) == pytest.approx(0.05, rel=0.4)
    again = dl.random_directions(direction, 2, seed=3)
    assert torch.equal(again[1].vector, controls[1].vector)
    assert not torch.equal(dl.random_directions(direction, 1, seed=4)[0].vector, controls[0].vector)


def test_projection_and_cosine() -> None:
    direction = dl.Direction(torch.tensor([[0.6, 0.0], [0.0, 0.8]]), 2.0)
    activation = torch.tensor([[[3.0, 9.0], [9.0, 4.0]], [[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.allclose(dl.project(activation, direction), torch.tensor([5.0, 0.0, 0.0]))
    assert torch.allclose(dl.cosine(activation, direction), torch.tensor([5 / 187**0.5, 0.0, 0.0]))
    assert float(dl.cosine(direction, direction)) == pytest.approx(1)
    assert dl.project(activation.bfloat16(), direction).dtype == torch.float32
    with pytest.raises(dl.InputError, match=r"shape \(2, 2\) does not fit activations of shape \(3, 4\)"):
        dl.project(torch.zeros(3, 4), direction)


def test_directions_and_erasers_come_back_from_disk(tmp_path: Path) -> None:
    features, labels, _ = planted(300)
    for cell in (None, CELL):
        direction = dl.difference_of_means(features, labels == 1, cell)
        direction.save(tmp_path / "deep" / "direction.safetensors")
        loaded = dl.Direction.load(tmp_path / "deep" / "direction.safetensors")
        assert torch.equal(loaded.vector, direction.vector)
        assert (loaded.scale, loaded.cell, loaded.source) == (direction.scale, direction.cell, direction.source)
    assert loaded.cell is not None
    assert loaded.cell.sigma == 0.8
    eraser = dl.Eraser.fit(features.reshape(-1, 3, 4), labels)
    eraser.save(tmp_path / "eraser.safetensors")
    again = dl.Eraser.load(tmp_path / "eraser.safetensors")
    assert again.shape == (3, 4)
    points = torch.randn(5, 2, 3, 4)
    assert torch.equal(again(points), eraser(points))
    with pytest.raises(dl.InputError, match="holds no direction"):
        dl.Direction.load(tmp_path / "eraser.safetensors")
    with pytest.raises(dl.InputError, match="cannot be read"):
        dl.Direction.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    with pytest.raises(dl.InputError, match="cannot be read"):
        dl.Eraser.load(tmp_path / "rubbish")


@pytest.mark.parametrize("classes", [2, 4])
def test_after_erasure_nothing_linear_is_left(classes: int) -> None:
    features, labels, _ = planted(8000, classes=classes)
    train, test = slice(0, 4000), slice(4000, None)

    def held_out(values: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(values[train], labels[train])
        scores = probe.predict_proba(values[test])
        return float(roc_auc_score(labels[test], scores[:, 1] if classes == 2 else scores, multi_class="ovr"))

    eraser = dl.Eraser.fit(features[train], labels[train])
    erased = eraser(torch.from_numpy(features)).numpy()
    assert eraser.rank == classes - 1
    assert held_out(features) > 0.8
    assert held_out(erased) == pytest.approx(0.5, abs=0.04)  # 3 standard errors of an AUC over 4000 rows are 0.03
    assert np.abs(covariance(features[train], labels[train])).max() > 0.1
    assert np.abs(covariance(erased[train], labels[train])).max() < 1e-12
    # The best linear prediction is the same for every row: the share of the class.
    inputs = np.c_[erased[train], np.ones(4000)]
    predicted = inputs @ np.linalg.lstsq(inputs, labels[train] == 1, rcond=1e-9)[0]
    assert np.allclose(predicted, np.mean(labels[train] == 1), atol=1e-6)
    # What the label says nothing of stays, and erasing again changes nothing.
    assert np.allclose(eraser(torch.from_numpy(erased)).numpy(), erased, atol=1e-9)
    assert np.allclose(erased[train].mean(axis=0), features[train].mean(axis=0))


def test_erasure_moves_less_than_any_other_map_that_erases() -> None:
    features, labels, _ = planted(3000)
    points = torch.from_numpy(features)
    moved = float((dl.Eraser.fit(features, labels)(points) - points).square().sum())
    centred = features - features.mean(axis=0)
    step = centred[labels == 1].mean(axis=0) - centred[labels == 0].mean(axis=0)
    # x - step (read @ x) erases for every read with read @ step = 1; with read along step it is the naive projection.
    random = np.random.default_rng(0)
    whitened = np.linalg.solve(centred.T @ centred, step)
    changes = []
    for read in (step, *(whitened + 0.1 * random.normal(size=(20, len(step))) * np.abs(whitened))):
        read = read / (read @ step)
        other = centred - np.outer(centred @ read, step)
        assert np.abs(covariance(other, labels)).max() < 1e-10
        changes.append(float(np.square(other - centred).sum()))
    assert moved < min(changes)
    assert moved < 0.8 * changes[0]
    assert moved == pytest.approx(np.square(np.outer(centred @ whitened / (whitened @ step), step)).sum(), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(2, 4),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 10**6),
)
def test_erasure_of_features_of_any_rank(rows: int, rank: int, channels: int, classes: int, dtype: type, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.r_[0, 1, random.integers(classes, size=rows - 2)]
    sizes = np.logspace(-2, 2, channels)
    features = (random.normal(size=(rows, rank)) @ random.normal(size=(rank, channels)) * sizes + 3).astype(dtype)
    eraser = dl.Eraser.fit(features, labels)
    erased = eraser(torch.from_numpy(features).double()).numpy()
    assert np.isfinite(erased).all()
    targets = (labels[:, None] == np.unique(labels)).astype(float)
    left = (erased - erased.mean(axis=0)).T @ (targets - targets.mean(axis=0)) / rows
    assert np.abs(left).max() < 1e-6 * np.abs(features).max()
    assert eraser.rank <= min(rank, channels, len(np.unique(labels)) - 1)
    # A direction in which the features never varied, but for rounding, is left alone.
    _, spread, basis = np.linalg.svd(features.astype(float) - features.astype(float).mean(axis=0))
    silent = basis[np.sum(spread > 1e-7 * np.finfo(dtype).eps ** 0.5 * spread[0]) :]
    points = eraser.mean + torch.from_numpy(random.normal(size=(1, len(silent))) @ silent)
    assert torch.allclose(eraser(points), points, atol=1e-5)


def test_several_numbers_are_erased_at_once_and_in_the_models_precision() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(2000, 2, 5))
    targets = np.c_[features[:, 0, 0] + features[:, 1, 2], features[:, 0, 3] * 1e-6]
    eraser = dl.Eraser.fit(torch.from_numpy(features).float(), targets)
    assert eraser.rank == 2
    erased = eraser(torch.from_numpy(features)).flatten(1).numpy()
    assert np.abs(np.corrcoef(erased.T, targets.T)[:10, 10:]).max() < 1e-6
    grid = torch.randn(3, 2, 2, 2, 2, 5, dtype=torch.bfloat16)
    assert eraser(grid).dtype == torch.bfloat16
    assert eraser(grid).shape == grid.shape
    assert eraser(torch.randn(2, 5)).shape == (2, 5)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(4, 3), [1, 1, 1, 1], "one class"),
        (torch.randn(4, 3), [1, 0], "4 rows, 2 labels"),
        (torch.randn(1, 3), [1], "at least 2 rows"),
        (torch.full((4, 3), torch.inf), [0, 1, 0, 1], "not finite"),
        (torch.randn(2, 3), np.zeros((2, 1, 1)), r"and these \(2, 1, 1\)"),
    ],
)
def test_what_cannot_be_erased(features: Any, labels: Any, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        dl.Eraser.fit(features, labels)
    with pytest.raises(dl.InputError, match=r"rows \(3,\) does not fit activations of shape \(2, 4\)"):
        dl.Eraser.fit(torch.eye(3), [0, 1, 0])(torch.zeros(2, 4))


def test_an_eraser_puts_nothing_into_channels_that_never_vary() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 5))
    features[:, 3] = 0.25
    labels = features[:, 0] + features[:, 1] > 0
    erased = dl.Eraser.fit(features, labels)(torch.from_numpy(features))
    assert (erased[:, 3] == 0.25).all()
