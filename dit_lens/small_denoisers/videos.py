"""Small denoisers of videos that read the text by cross-attention: Allegro, Latte and Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AllegroTransformer3DModel, CosmosTransformer3DModel, LatteTransformer3DModel
from torch import nn

from dit_lens.small_denoisers.crossed import CROSSED
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

FRAMES, ROWS, COLUMNS = 3, 4, 5
"""Of tokens."""


def video_arguments() -> dict[str, Any]:
    """Three latent frames of 8 by 10, and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500, 500]),
    }


def allegro() -> nn.Module:
    """PixArt's blocks on all tokens of a video."""
    return alive(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=16,
        sample_height=8,
        sample_width=10,
        sample_frames=3,
        caption_channels=12,
    )


LATTE_BLOCKS = (
    Blocks("transformer_blocks", count=1, streams=("visual",), modules=CROSSED),
    Blocks(
        "temporal_transformer_blocks",
        count=1,
        streams=("visual",),
        modules={("attn", "visual"): "attn1", ("mlp", "visual"): "ff"},
    ),
)
"""One turn of two."""


def latte() -> nn.Module:
    """A spatial block and a temporal one by turns.

    `transformer_blocks` runs on (samples and frames, rows and columns) and reads the text; `temporal_transformer_blocks`, on
    (samples, rows and columns; frames), does not.
    """
    return alive(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
        video_length=3,
    )


def cosmos() -> nn.Module:
    """A learned position is added before every block; without a mask of padding, which would want torchvision."""
    return alive(
        CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        mlp_ratio=2,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    )


def cosmos_arguments() -> dict[str, Any]:
    """As for the others; the timestep is a real number."""
    return {**video_arguments(), "timestep": torch.tensor([0.5, 0.5])}


ALL = (
    SmallDenoiser(
        name="AllegroTransformer3DModel",
        make=allegro,
        arguments=video_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": FRAMES * ROWS * COLUMNS},
        layout=(FRAMES, ROWS, COLUMNS),
    ),
    SmallDenoiser(
        name="LatteTransformer3DModel",
        make=latte,
        arguments=video_arguments,
        blocks=LATTE_BLOCKS * 2,
        tokens={"visual": FRAMES * ROWS * COLUMNS},
        layout=(FRAMES, ROWS, COLUMNS),
    ),
    SmallDenoiser(
        name="CosmosTransformer3DModel",
        make=cosmos,
        arguments=cosmos_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": FRAMES * ROWS * COLUMNS},
        layout=(FRAMES, ROWS, COLUMNS),
    ),
)
