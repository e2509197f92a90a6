"""Small denoisers after Flux: double blocks, then single ones in which attention and feed-forward share a projection."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
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
JOINED_BLOCKS = Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED, joined=True)
"""Single blocks that are given one sequence."""
IMAGE_ALONE = {("attn", "visual"): "attn", ("mlp", "visual"): "ff"}


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


def packed_arguments() -> dict[str, Any]:
    """Packed latents of an image and what goes with them, of a single timestep between 0 and 1."""
    return common.packed_arguments(CHANNELS)


def flux3() -> nn.Module:
    """Image and text pass blocks of their own first; everywhere, attention and feed-forward read the same."""
    sizes = {**SIZES, "axes_dims_rope": (4, 4, 4, 4)}
    return alive(Flux3Transformer2DModel, **sizes, cond_in_channels=CHANNELS, timestep_channels=16)


def flux3_arguments() -> dict[str, Any]:
    """As Flux 2's, without a scale of the guidance."""
    return {name: value for name, value in flux2_arguments().items() if name != "guidance"}


def chroma() -> nn.Module:
    """One network makes the modulations of all blocks."""
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 2}
    return alive(ChromaTransformer2DModel, **SIZES, **sizes)


def long_cat() -> nn.Module:
    """As Flux, without a pooled text."""
    return alive(LongCatImageTransformer2DModel, **SIZES)


def ovis() -> nn.Module:
    """Gated feed-forwards, in the single blocks too."""
    return alive(OvisImageTransformer2DModel, **SIZES, out_channels=CHANNELS)


def bria() -> nn.Module:
    """As Flux, without a pooled text."""
    return alive(BriaTransformer2DModel, **SIZES)


def bria_fibo() -> nn.Module:
    """Before each block, half of the channels of the text are those of another layer of its encoder."""
    return alive(BriaFiboTransformer2DModel, **SIZES, text_encoder_dim=12)


def bria_fibo_arguments() -> dict[str, Any]:
    """With a layer of the text's encoder for each block."""
    return {**packed_arguments(), "text_encoder_layers": [common.texts(12) for _ in range(5)]}


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
        blocks=(DOUBLE_BLOCKS, JOINED_BLOCKS),  # the latter's `attn` is attention and feed-forward, and returns their sum
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="ChromaTransformer2DModel",
        make=chroma,
        arguments=packed_arguments,
        blocks=(DOUBLE_BLOCKS, JOINED_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
        aside=("distilled_guidance_layer.layers", "distilled_guidance_layer.norms"),
    ),
    SmallDenoiser(
        name="LongCatImageTransformer2DModel",
        make=long_cat,
        arguments=packed_arguments,
        blocks=(DOUBLE_BLOCKS, SINGLE_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="OvisImageTransformer2DModel",
        make=ovis,
        arguments=packed_arguments,
        blocks=(DOUBLE_BLOCKS, SINGLE_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="BriaTransformer2DModel",
        make=bria,
        arguments=packed_arguments,
        blocks=(DOUBLE_BLOCKS, SINGLE_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="BriaFiboTransformer2DModel",
        make=bria_fibo,
        arguments=bria_fibo_arguments,
        blocks=(DOUBLE_BLOCKS, JOINED_BLOCKS),
        tokens=TOKENS,
        layout=IMAGE,
        aside=("caption_projection",),
    ),
    SmallDenoiser(
        name="Flux3Transformer2DModel",
        make=flux3,
        arguments=flux3_arguments,
        blocks=(
            Blocks(
                "mode_blocks.image", count=2, streams=("visual",), modules={("attn", "visual"): "attn", ("mlp", "visual"): "ff"}
            ),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules={**DOUBLE, ("mlp", "text"): "ff"}),
        ),
        tokens=TOKENS,
        layout=IMAGE,
        aside=("txt_mode_blocks",),
    ),
)
