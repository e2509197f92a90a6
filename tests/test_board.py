"""The board: what is painted is read back, and masks of squares become masks of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens.reasoner import board
from dit_lens.reasoner.board import OBJECT_COLOURS, PALETTE, SHAPES, Colour

seeds = st.integers(0, 2**32 - 1)


def random_boards(seed: int, count: int = 3) -> np.ndarray:
    """Boards of every colour anywhere."""
    return np.random.default_rng(seed).integers(len(Colour), size=(count, 16, 16)).astype(np.uint8)


@given(seed=seeds, noise=st.floats(0, 0.2), shade=st.floats(-0.05, 0.05))
@settings(max_examples=20, deadline=None)
def test_reading_inverts_painting_under_noise(seed: int, noise: float, shade: float) -> None:
    boards = random_boards(seed)
    video = board.paint(boards) / 255
    damaged = video + shade + noise * np.random.default_rng(seed).standard_normal(video.shape)
    assert np.array_equal(board.read(damaged), boards)
    assert board.read(video[0]).shape == (16, 16), "one frame is as good as many"


def test_a_square_is_four_pixels_of_its_colour() -> None:
    boards = random_boards(0, 1)[0]
    picture = board.paint(boards)
    assert picture.shape == (64, 64, 3)
    for row, column in ((0, 0), (15, 3), (7, 15)):
        patch = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 3)
        assert (patch == PALETTE[boards[row, column]]).all()
    assert np.allclose(board.square_colours(picture / 255), PALETTE[boards] / 255)


def test_colours_are_far_apart() -> None:
    colours = PALETTE.astype(float) / 255
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 0.5


def test_tokens_hold_two_squares_by_two() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[2, 4] = mask[3, 5] = mask[15, 15] = True
    pooled = board.tokens(mask)
    expected = np.zeros((8, 8))
    expected[1, 2], expected[7, 7] = 0.5, 0.25
    assert np.array_equal(pooled, expected)
    assert board.tokens(np.ones((2, 16, 16), dtype=bool)).tolist() == np.ones((2, 8, 8)).tolist()


def test_there_are_eight_symmetries() -> None:
    array = np.arange(9).reshape(3, 3)
    turned = {each.tobytes() for each in board.symmetries(array)}
    assert len(turned) == 8
    assert array[::-1].copy().tobytes() in turned
    for each in board.symmetries(array):
        assert {again.tobytes() for again in board.symmetries(each)} == turned, "the symmetries form a group"
    assert {each.shape for each in board.symmetries(np.zeros((3, 3, 2)))} == {(3, 3, 2)}


def test_a_glyph_is_clipped_at_the_border() -> None:
    picture = board.blank(Colour.GREY)
    board.stamp(picture, SHAPES["square"], -1, 14, Colour.RED)
    assert np.argwhere(picture == Colour.RED).tolist() == [[0, 14], [0, 15], [1, 14], [1, 15]]
    assert (picture == Colour.GREY).sum() == 252
    board.stamp(picture, SHAPES["square"], 20, 20, Colour.BLUE)
    assert not (picture == Colour.BLUE).any()


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_cannot_be_taken_for_one_another(name: str) -> None:
    others = [SHAPES[other] for other in SHAPES if other != name]
    assert min((SHAPES[name] != other).sum() for other in others) >= 3
    assert Colour.BLACK not in OBJECT_COLOURS.values()
