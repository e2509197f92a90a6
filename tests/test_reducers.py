"""Reducers against their definitions in plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_lens.errors import InputError
from dit_lens.reducers import frame_mean, full, norm, reducer_name, region_mean
from dit_lens.selection import Cell

CELL = Cell("transformer", 0, "cond", 0)
ACTIVATION = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def test_full_keeps_everything_as_it_is() -> None:
    assert full(ACTIVATION, CELL) is ACTIVATION


def test_norm_is_the_length_of_each_token() -> None:
    expected = (ACTIVATION**2).sum(-1).sqrt()
    assert torch.allclose(norm(ACTIVATION, CELL), expected)
    assert torch.allclose(norm(ACTIVATION.flatten(1, 3), CELL), expected.flatten(1))
    assert norm(ACTIVATION.bfloat16(), CELL).dtype == torch.float32


def test_frame_mean_averages_each_latent_frame() -> None:
    assert torch.allclose(frame_mean(ACTIVATION, CELL), ACTIVATION.flatten(2, 3).mean(2), atol=1e-6)


def test_region_mean_averages_what_the_mask_covers() -> None:
    board = np.zeros((4, 5), dtype=bool)
    board[1, 2] = board[3, 0] = True
    expected = (ACTIVATION[:, :, 1, 2] + ACTIVATION[:, :, 3, 0]) / 2
    assert torch.allclose(region_mean(board)(ACTIVATION, CELL), expected, atol=1e-6)
    volume = np.stack([board, np.roll(board, 1, axis=1), board])
    moved = (ACTIVATION[:, 1, 1, 3] + ACTIVATION[:, 1, 3, 1]) / 2
    assert torch.allclose(region_mean(volume)(ACTIVATION, CELL)[:, 1], moved, atol=1e-6)
    rows = np.stack([board, np.roll(board, 1, axis=1)])[:, None]
    of_rows = region_mean(rows)(ACTIVATION, CELL)
    assert torch.allclose(of_rows[0], expected[0], atol=1e-6)
    assert torch.allclose(of_rows[1, 1], moved[1], atol=1e-6)
    weights = board * 0.25
    assert torch.allclose(region_mean(weights)(ACTIVATION, CELL), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 5)), "empty in some frame"),
        (-np.ones((4, 5)), "negative weights"),
        (np.ones(5), "2, 3 or 4 axes"),
    ],
)
def test_a_mask_that_covers_nothing_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        region_mean(mask)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match=r"mask of shape \(4, 4\) does not fit .* = \(2, 3, 4, 5\)"):
        region_mean(np.ones((4, 4)))(ACTIVATION, CELL)
    for reduce in (frame_mean, region_mean(np.ones((4, 5)))):
        with pytest.raises(InputError, match="needs whole frames"):
            reduce(ACTIVATION.flatten(1, 3), CELL)


def test_names() -> None:
    def own(activation: torch.Tensor, cell: Cell) -> torch.Tensor:
        return activation

    names = [reducer_name(reduce) for reduce in (full, norm, frame_mean, region_mean(np.ones((1, 1))), own)]
    assert names == ["full", "norm", "frame_mean", "region_mean", "own"]
