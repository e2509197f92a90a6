"""What to keep of an activation. A reducer runs on the device, before anything is copied.

A reducer is a function (activation, cell) -> tensor. The activation has shape (batch, frames, height, width,
channels), or (batch, tokens, channels) when the selector has a token mask; frames are latent frames, height and width
count tokens. At the sites with rows per head (`heads`, `q`, `k`, `v`, `qk`) an axis of heads comes before the channels, and
the reducers here keep it. Sums run in float32 whatever the model's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.errors import InputError
from dit_lens.selection import Cell, Selector


@dataclass(frozen=True)
class Reducer:
    """A reducer that comes with the library: what it keeps can be known before a run."""

    name: str

    def check(self, selector: Selector) -> None:
        """Raise an InputError before a run when what is selected cannot be reduced so."""

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Tensor:
        """What to keep of the activation."""
        raise NotImplementedError


class Full(Reducer):
    """Everything, in the model's precision."""

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Tensor:
        return activation


class Norm(Reducer):
    """L2 norm over the channels: (batch, frames, height, width), or (batch, tokens); with heads, one each."""

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Float[Tensor, "batch ..."]:
        return torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float32)


class FrameMean(Reducer):
    """Mean over the tokens of each latent frame: (batch, frames, channels), or (batch, frames, heads, channels)."""

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Float[Tensor, "batch frames ..."]:
        _whole(activation, "frame_mean")
        return activation.mean(dim=(2, 3), dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class RegionMean(Reducer):
    """Weighted mean over the tokens of each latent frame that lie in a region; as `FrameMean`."""

    weights: Tensor

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Float[Tensor, "batch frames ..."]:
        _whole(activation, "region_mean")
        weights = self.weights.to(activation.device)
        while weights.ndim < 4:
            weights = weights[None]
        try:
            weights = weights.expand(activation.shape[:4])
        except RuntimeError:
            raise InputError(
                f"region_mean: a mask of shape {tuple(self.weights.shape)} does not fit activations of (batch, frames,"
                f" height, width) = {tuple(activation.shape[:4])}; write (height, width), (frames, height, width) or"
                " (batch, frames, height, width)"
            ) from None
        totals = torch.einsum("bfhw...,bfhw->bf...", activation.float(), weights)
        return totals / weights.sum(dim=(2, 3)).unflatten(1, (-1, *[1] * (totals.ndim - 2)))


full = Full("full")
norm = Norm("norm")
frame_mean = FrameMean("frame_mean")


def region_mean(mask: Any) -> RegionMean:
    """A reducer that averages over a region of the board, per latent frame.

    Args:
        mask: booleans, or non-negative weights (what share of a token lies in the region), of shape (height, width),
            (frames, height, width) or (batch, frames, height, width), in tokens; axes of length 1 are repeated.

    Returns:
        A reducer to (batch, frames, channels) in float32.

    Raises:
        InputError: a weight is negative, or a frame has no weight at all.
    """
    weights = torch.as_tensor(mask).to(torch.float32)
    if weights.ndim not in (2, 3, 4):
        raise InputError(f"region_mean: a mask has 2, 3 or 4 axes (height and width last), and this one {weights.ndim}")
    if (weights < 0).any() or (weights.sum(dim=(-2, -1)) == 0).any():
        raise InputError("region_mean: the mask is empty in some frame, or has negative weights")
    return RegionMean("region_mean", weights)


def reducer_name(reduce: Any) -> str:
    """What tables call a reducer."""
    return reduce.name if isinstance(reduce, Reducer) else getattr(reduce, "__name__", type(reduce).__name__)


def _whole(activation: Tensor, name: str) -> None:
    if activation.ndim < 5:
        raise InputError(f"{name} needs whole frames, and tokens= leaves single ones; use region_mean(mask)")
