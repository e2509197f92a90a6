"""Unmixing: weights that were mixed in come out again, as those of an independent solver, and open ones by the stated rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from dit_lens.reasoner import unmixing
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.unmixing import COLOURS, unambiguous, unmix

colours = st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True)


@settings(deadline=None, max_examples=60)
@given(colours, st.integers(0, 10**6))
def test_the_weights_that_were_mixed_come_out(chosen: list[int], seed: int) -> None:
    corners = COLOURS[chosen]
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(chosen)), size=5)
    found, left = unmix(weights @ corners, corners)
    assert left == pytest.approx(np.zeros(5), abs=1e-6)
    assert found @ corners == pytest.approx(weights @ corners, abs=1e-6)
    if unambiguous(corners):
        assert found == pytest.approx(weights, abs=1e-5)
    else:
        assert (found[:, 0] >= weights[:, 0] - 1e-5).all(), "the first corner gets all that it can"


@settings(deadline=None, max_examples=60)
@given(colours, st.integers(0, 10**6))
def test_it_is_as_near_as_least_squares_with_weights_that_sum_to_one(chosen: list[int], seed: int) -> None:
    corners, points = COLOURS[chosen], np.random.default_rng(seed).uniform(-0.3, 1.3, size=(4, 3))
    found, left = unmix(points, corners)
    assert found.sum(axis=1) == pytest.approx(np.ones(4))
    assert np.linalg.norm(points - found @ corners, axis=1) == pytest.approx(left, abs=1e-5)
    heavy = 1e4  # a heavy row of ones holds the sum of the weights at 1
    for point, distance in zip(points, left, strict=True):
        solved, _ = nnls(np.vstack([corners.T, heavy * np.ones(len(chosen))]), np.append(point, heavy))
        assert distance == pytest.approx(np.linalg.norm(point - solved @ corners), abs=1e-3)


def test_black_grey_and_white_lie_on_a_line() -> None:
    assert not unambiguous(COLOURS[[Colour.GREY, Colour.BLACK, Colour.WHITE]])
    assert not unambiguous(COLOURS[[0, 3, 4, 5, 8]])
    assert unambiguous(COLOURS[[Colour.GREY, Colour.BLACK, Colour.RED]])
    assert unambiguous(COLOURS[[Colour.BLACK]])


def line(marked: bool) -> unmixing.Plan:
    """A grey square that one answer paints black and the other white, beside one that both paint blue."""
    start = np.array([[Colour.GREY, Colour.BLACK]], dtype=np.uint8)
    finals = np.array([[[Colour.BLACK, Colour.BLUE]], [[Colour.WHITE, Colour.BLUE]]], dtype=np.uint8)
    return unmixing.plan(start[:, : 1 + marked], finals[:, :, : 1 + marked])


def test_what_all_answers_repaint_says_how_much_of_the_first_frame_is_left() -> None:
    plan = line(marked=True)
    for weights in ([0.5, 0.3, 0.2], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.2, 0.0, 0.8]):
        blend = np.tensordot(weights, COLOURS[np.stack([plan.start, *plan.finals])], axes=1)
        assert unmixing.shares(blend[None], [plan])[0] == pytest.approx(weights[1:], abs=1e-6)


def test_where_nothing_says_it_the_first_frame_gets_all_that_it_can() -> None:
    plan = line(marked=False)
    grey, dark = COLOURS[Colour.GREY], COLOURS[Colour.GREY] / 2
    assert unmixing.shares(grey[None, None, None], [plan])[0] == pytest.approx([0, 0], abs=1e-6)
    assert unmixing.shares(dark[None, None, None], [plan])[0] == pytest.approx([0.5, 0], abs=1e-6)


def test_a_batch_is_read_as_its_rows() -> None:
    plans = [line(True), line(False), line(True)]
    frames = np.random.default_rng(0).uniform(size=(3, 1, 2, 3))
    rows = [unmixing.shares(frames[i : i + 1, :, : plan.start.shape[1]], [plan])[0] for i, plan in enumerate(plans)]
    both = unmixing.shares(frames[[0, 2]], [plans[0], plans[2]])
    assert np.allclose(both[0], rows[0])
    assert np.allclose(both[1], rows[2])
