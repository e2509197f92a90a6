"""Small denoisers after HunyuanVideo: text that is refined first, double blocks and single ones; and Mochi."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, MochiTransformer3DModel
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import DOUBLE, FUSED, HEADS, ROTARY, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

STREAMS = ("visual", "text")
REFINER = "context_embedder.token_refiner.refiner_blocks"
TOKENS = {"visual": 24, "text": WORDS}
MOCHI = {("attn", "visual"): "attn1", ("attn", "text"): "attn1", ("mlp", "visual"): "ff", ("mlp", "text"): "ff_context"}
SIZES = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIMENSION,
    "rope_axes_dim": ROTARY,
}


def hunyuan_video() -> nn.Module:
    """With the scale of the guidance embedded."""
    return alive(HunyuanVideoTransformer3DModel, **SIZES, pooled_projection_dim=8)


def hunyuan_video_arguments() -> dict[str, Any]:
    """With a mask and a pooled text."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "pooled_projections": torch.randn(2, 8),
        "guidance": common.times(3500.0),
    }


def mochi() -> nn.Module:
    """The text is narrower than the video, and the last block leaves it as it was."""
    return alive(
        MochiTransformer3DModel,
        **HEADS,
        in_channels=4,
        num_layers=3,
        pooled_projection_dim=24,
        text_embed_dim=TEXT_DIMENSION,
        time_embed_dim=8,
        max_sequence_length=WORDS,
    )


def mochi_arguments() -> dict[str, Any]:
    """With a mask."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS, dtype=torch.bool),
    }


ALL = (
    SmallDenoiser(
        name="HunyuanVideoTransformer3DModel",
        make=hunyuan_video,
        arguments=hunyuan_video_arguments,
        blocks=(
            Blocks("transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED),
        ),
        tokens=TOKENS,
        layout=VIDEO,
        aside=(REFINER,),
    ),
    SmallDenoiser(
        name="MochiTransformer3DModel",
        make=mochi,
        arguments=mochi_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=MOCHI),),
        tokens=TOKENS,
        layout=VIDEO,
    ),
)
