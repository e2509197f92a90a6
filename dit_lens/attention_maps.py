"""Reducers that turn queries and keys into maps of attention.

They run at the site `qk`, where the queries and keys of one call of self-attention stand side by side, and recompute its
weights a few queries at a time. `head=` selects heads as at any site with rows per head.

    dl.Record(dl.at(site="qk", block=6), dl.frame_map)                       # (batch, heads, frames, frames)
    dl.Record(dl.at(site="qk", block=6), dl.token_map(queries=goal_mask))    # (batch, heads, frames, height, width)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.attention import frame_weights, token_weights
from dit_lens.errors import InputError
from dit_lens.reducers import Reducer
from dit_lens.selection import Cell, Selector


@dataclass(frozen=True)
class AttentionMap(Reducer):
    """A reducer of queries and keys: it needs all of them, since weights are shares of the whole."""

    def check(self, selector: Selector) -> None:
        if selector.frames is not None or selector.tokens is not None:
            raise InputError(f"{selector}: {self.name} needs all tokens, so leave frames= and tokens= out")

    def _halves(self, activation: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
        """The queries and the keys, (batch, tokens, heads, channels)."""
        if cell.site != "qk":
            raise InputError(f"{self.name} is computed from queries and keys, and not at the site {cell.site!r}: write site='qk'")
        if activation.ndim != 6:
            raise InputError(f"{self.name} needs all tokens, so leave tokens= out")
        query, key = activation.flatten(1, 3).chunk(2, dim=-1)
        return query, key


class FrameMap(AttentionMap):
    """What share of their attention the tokens of a query frame give to a key frame: (batch, heads, frames, frames)."""

    def __call__(self, activation: Float[Tensor, "batch ... channels"], cell: Cell) -> Float[Tensor, "batch heads frames frames"]:
        return frame_weights(*self._halves(activation, cell), frames=activation.shape[1])


@dataclass(frozen=True, eq=False)
class TokenMap(AttentionMap):
    """The mean weight that some query tokens give to each token: (batch, heads, frames, height, width)."""

    queries: Tensor

    def __call__(
        self, activation: Float[Tensor, "batch ... channels"], cell: Cell
    ) -> Float[Tensor, "batch heads frames height width"]:
        query, key = self._halves(activation, cell)
        layout = activation.shape[1:4]
        if self.queries.shape not in (layout, layout[1:]):
            raise InputError(
                f"{self.name}: the mask of queries has shape {tuple(self.queries.shape)}, the layout (frames, height, width)"
                f" is {tuple(layout)}; write a mask of shape {tuple(layout[1:])} or {tuple(layout)}"
            )
        chosen = self.queries.expand(layout).flatten().nonzero()[:, 0]
        return token_weights(query, key, chosen).unflatten(-1, layout)


frame_map = FrameMap("frame_map")
"""What share of their attention the tokens of one latent frame give to those of another.

float32, (batch, heads, query frame, key frame): the mean over the tokens of the query frame of the sum over those of the key
frame, so that each row sums to 1.
"""


def token_map(queries: Any) -> TokenMap:
    """A reducer to the mean weight that some query tokens give to each token of the video.

    Args:
        queries: booleans of shape (height, width) or (frames, height, width), in tokens and latent frames.

    Returns:
        A reducer to (batch, heads, frames, height, width) in float32, which sums to 1.

    Raises:
        InputError: no mask of booleans, or an empty one.
    """
    mask = torch.as_tensor(queries).cpu()
    if mask.dtype != torch.bool or mask.ndim not in (2, 3) or not mask.any():
        raise InputError(
            f"token_map: queries= is a mask of booleans on the layout with at least one token, and this one holds"
            f" {mask.dtype} of shape {tuple(mask.shape)}, {int(mask.count_nonzero())} of them not zero"
        )
    return TokenMap("token_map", mask)
