"""What several small denoisers share: sizes, arguments, and truths about blocks that were written after the same model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE = (1, 4, 3)
"""Layout of an image: rows and columns of tokens differ."""
VIDEO = (3, 4, 2)
"""Layout of a video: frames, rows and columns differ."""
WORDS = 7
"""Text tokens."""
TEXT_DIMENSION = 16
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
"""Width 32."""
ROTARY = (4, 6, 6)
"""Channels of a head that turn with frame, row and column."""

DOUBLE = {("attn", "visual"): "attn", ("attn", "text"): "attn", ("mlp", "visual"): "ff", ("mlp", "text"): "ff_context"}
"""Joint attention, then a feed-forward for each stream."""
FUSED = {(site, stream): "" for site in ("attn", "mlp") for stream in ("visual", "text")}
"""Attention and feed-forward share one projection to the stream, so that no module returns either."""


def texts(width: int = TEXT_DIMENSION, words: int = WORDS) -> Tensor:
    """Encoded texts of two rows."""
    return torch.randn(2, words, width)


def packed(channels: int, layout: tuple[int, int, int] = IMAGE) -> Tensor:
    """Latents of two rows with a token for each patch."""
    return torch.randn(2, torch.Size(layout).numel(), channels)


def whole(channels: int = 4, layout: tuple[int, int, int] = IMAGE, patch: int = 2) -> Tensor:
    """Latents of two rows, of which `patch` by `patch` make a token: (2, channels, height, width), or with frames."""
    frames, height, width = layout
    size = (height * patch, width * patch)
    return torch.randn(2, channels, *(size if frames == 1 else (frames, *size)))


def times(value: float = 500.0) -> Tensor:
    """The timestep of two rows."""
    return torch.tensor([value, value])


def places(layout: tuple[int, int, int] = IMAGE, axes: int = 3) -> Tensor:
    """Where each token lies, for rotary embeddings: (tokens, axes) of frame, row, column (and zeros)."""
    grid = torch.cartesian_prod(*(torch.arange(float(count)) for count in layout))
    return torch.nn.functional.pad(grid, (0, axes - 3))


def packed_arguments(channels: int) -> dict[str, Any]:
    """An image as Flux and its kin take it: packed latents, with the places of all tokens; a timestep between 0 and 1."""
    return {
        "hidden_states": packed(channels),
        "encoder_hidden_states": texts(),
        "timestep": times(0.5),
        "img_ids": places(),
        "txt_ids": torch.zeros(WORDS, 3),
    }
