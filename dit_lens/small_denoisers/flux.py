"""Small denoisers after Flux: double blocks, then single ones in which attention and feed-forward share a projection."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import DOUBLE, FUSED, HEADS, IMAGE, ROTARY, TEXT_DIMENSION, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

CHANNELS = 8
STREAMS = ("text", "visual")
SIZES = {
    **HEADS,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT_DIMENSION,
    "axes_dims_rope": ROTARY,
}
TOKENS = {"text": WORDS, "visual": 12}
DOUBLE_BLOCKS = Blocks("transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE)
SINGLE_BLOCKS = Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED)
"""Single blocks join the two streams and part them again, each by itself."""


def flux() -> nn.Module:
    """With the scale of the guidance embedded."""
    return alive(FluxTransformer2DModel, **SIZES, pooled_projection_dim=8, guidance_embeds=True)


def flux_arguments() -> dict[str, Any]:
    """Packed latents of an image."""
    return {
        **common.packed_arguments(CHANNELS),
        "pooled_projections": torch.randn(2, 8),
        "guidance": common.times(3.5),
    }


def flux2() -> nn.Module:
    """One modulation for all blocks of a list; four axes of places."""
    sizes = {**SIZES, "axes_dims_rope": (4, 4, 4, 4)}
    return alive(Flux2Transformer2DModel, **sizes, timestep_guidance_channels=16)


def flux2_arguments() -> dict[str, Any]:
    """As Flux's, without a pooled text."""
    return {
        **common.packed_arguments(CHANNELS),
        "img_ids": common.places(axes=4),
        "txt_ids": torch.zeros(WORDS, 4),
        "guidance": common.times(3.5),
    }


ALL = (
    SmallDenoiser(
        name="FluxTransformer2DModel",
        make=flux,
        arguments=flux_arguments,
        blocks=(DOUBLE_BLOCKS, SINGLE_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="Flux2Transformer2DModel",
        make=flux2,
        arguments=flux2_arguments,
        blocks=(
            DOUBLE_BLOCKS,
            # Its `attn` is attention and feed-forward in parallel, and returns their sum.
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED, joined=True),
        ),
        tokens=TOKENS,
        layout=IMAGE,
    ),
)
