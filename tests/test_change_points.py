"""Change points: planted bands are found exactly, noise has none, and the search is held against one over all cuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_lens.errors import InputError
from probes.change_points import agreement, agreement_of_bands, bands, bands_of_draws, count_changes, drawn_bands

PLANTED = np.repeat([0.2, 0.9, 0.5], [4, 7, 3])
PAPERS = drawn_bands(np.arange(14) / 14)


def samples_of(curve: np.ndarray, noise: float, count: int = 40, seed: int = 0) -> np.ndarray:
    """Curves of samples around a true one, with noise that a sample's blocks share and noise of each block."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(count, *[1] * curve.ndim))
    return curve + noise * (shared + random.normal(size=(count, *curve.shape)))


def by_all_cuts(curve: np.ndarray, changes: int) -> float:
    """The least squared error over every way to cut a curve."""
    cuts = itertools.combinations(range(1, len(curve)), changes)
    return min(sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in np.split(curve, cut)) for cut in cuts)


def test_planted_bands_are_found_exactly() -> None:
    found = bands(samples_of(PLANTED, 0.2))
    assert found.starts == (4, 11)
    assert found.boundaries == (4 / 14, 11 / 14)
    assert found.low == found.high == found.boundaries
    assert found.levels[:, 0] == pytest.approx([0.2, 0.9, 0.5], abs=0.15)
    assert found.labels.tolist() == [0] * 4 + [1] * 7 + [2] * 3
    assert found.samples == 40


@pytest.mark.parametrize("starts", [(), (5,), (3, 9), (2, 7, 11)])
def test_the_number_of_planted_changes_is_found(starts: tuple[int, ...]) -> None:
    levels = [0.0, 1.0, 0.2, 1.4][: len(starts) + 1]
    curve = np.repeat(levels, np.diff([0, *starts, 14]))
    found = bands(samples_of(curve, 0.2, seed=3), resamples=100)
    assert found.starts == starts


def test_several_series_change_together() -> None:
    # What one series alone shows weakly, three show clearly; a boundary of one series is one of all.
    curve = np.stack([PLANTED, 1 - PLANTED, np.repeat([0.0, 1.0], [4, 10])], axis=1)
    assert bands(samples_of(curve, 0.5)).starts == (4, 11)


def test_noise_without_order_has_a_change_in_one_of_twenty_cases() -> None:
    random = np.random.default_rng(0)
    found = [count_changes(random.normal(size=14), shuffles=99, seed=case) > 0 for case in range(300)]
    assert np.mean(found) < 0.09  # 5 % and three standard errors of 300 cases
    assert count_changes(np.ones(14)) == 0


def test_intervals_are_wide_where_a_boundary_is_unclear() -> None:
    sharp, ramp = samples_of(PLANTED, 1.0), samples_of(np.linspace(0, 1, 14), 1.0)
    narrow, wide = (bands(curves, 2) for curves in (sharp, ramp))
    assert wide.high[0] - wide.low[0] > narrow.high[0] - narrow.low[0]
    # The paper's bands on 14 blocks start at blocks 4 and 11.
    assert narrow.contains(0.25, 0)
    assert narrow.contains(0.75, 1)
    assert not narrow.contains(0.5, 0)


def test_intervals_cover_the_planted_boundary() -> None:
    covered = []
    for seed in range(40):
        found = bands(samples_of(PLANTED, 1.2, seed=seed), 2, resamples=200)
        covered.append(found.contains(4 / 14, 0) and found.contains(11 / 14, 1))
    assert np.mean(covered) > 0.85


def test_one_sample_has_bands_and_no_intervals() -> None:
    found = bands(PLANTED[None], 2)
    assert found.starts == (4, 11)
    assert np.isnan([*found.low, *found.high]).all()
    drawn = bands_of_draws(PLANTED, samples_of(PLANTED, 0.01), 2, samples=7)
    assert drawn.low == drawn.high == found.boundaries
    assert drawn.samples == 7


def test_agreement_with_the_paper() -> None:
    assert PAPERS.tolist() == [0] * 4 + [1] * 7 + [2] * 3
    assert drawn_bands(np.arange(40) / 40).tolist() == [0] * 10 + [1] * 20 + [2] * 10
    same = agreement_of_bands(PLANTED, PAPERS)
    assert same.share == 1
    assert same.p < 0.05 < same.shuffled < 1
    other = agreement_of_bands(np.repeat([0.0, 1.0, 0.0], [8, 4, 2]), PAPERS)
    assert other.share < 0.75
    assert other.p > 0.05
    noise = [agreement_of_bands(np.random.default_rng(seed).normal(size=14), PAPERS, shuffles=99).p for seed in range(100)]
    assert np.mean(np.array(noise) <= 0.05) < 0.12


def test_agreement_of_labels() -> None:
    reference = drawn_bands(np.arange(4) / 4)
    found = agreement(reference, reference, np.array([[0, 1, 1, 2], [2, 2, 2, 2], [0, 0, 0, 0]]))
    assert (found.share, found.shuffled) == (1, 0.5)
    assert found.p == pytest.approx(2 / 4)


CURVES = st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=4, max_size=9).map(np.array)


@given(CURVES, st.integers(0, 3))
def test_the_search_is_exact(curve: np.ndarray, changes: int) -> None:
    found = bands_of_draws(curve, curve[None], changes)
    error = sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in np.split(curve, found.starts))
    assert error == pytest.approx(by_all_cuts(curve, changes), abs=1e-8)
    assert list(found.starts) == sorted(set(found.starts))
    assert all(0 < start < len(curve) for start in found.starts)


@given(CURVES, st.floats(0.1, 10), st.floats(-100, 100), st.integers(1, 2))
def test_scale_level_and_direction_do_not_matter(curve: np.ndarray, scale: float, level: float, changes: int) -> None:
    # In whole numbers apart, so that no two cuts are level but for rounding.
    steps = np.cumsum(np.round(curve), axis=0) + np.arange(len(curve))[:, None] ** 2
    errors = sorted(
        sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in np.split(steps, cut))
        for cut in itertools.combinations(range(1, len(steps)), changes)
    )
    if len(errors) > 1 and errors[1] - errors[0] < 1e-6 * max(1, errors[0]):
        return
    here, moved, turned = (
        bands_of_draws(values, values[None], changes).starts for values in (steps, scale * steps + level, steps[::-1])
    )
    assert here == moved
    assert tuple(len(steps) - start for start in turned[::-1]) == here


def test_bad_curves_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 14 are not"):
        bands(np.where(np.arange(14) == 3, np.nan, 0.0)[None])
    with pytest.raises(InputError, match="need at least 3 blocks"):
        bands(np.zeros((5, 2)), 2)
    with pytest.raises(InputError, match="has shape"):
        bands(np.zeros(14), 2)
