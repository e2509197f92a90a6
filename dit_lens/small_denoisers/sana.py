"""Small denoisers of the Sana family: linear attention, cross-attention to the text, convolutions in the MLP."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel, SanaVideoTransformer3DModel, SanaWMTransformer3DModel
from torch import nn

from dit_lens.small_denoisers.crossed import CROSSED
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
}
"""Width 16."""
WM_MODULES = {("attn", "visual"): "attn", ("cross_attn", "visual"): "cross_attn", ("mlp", "visual"): "mlp"}
"""Of a SanaVideoMSCamCtrlBlock."""


def sana() -> nn.Module:
    """A token a latent. The MLP takes and returns an image, channels before rows and columns."""
    return alive(SanaTransformer2DModel, **SIZES, sample_size=8, patch_size=1)


def sana_arguments() -> dict[str, Any]:
    """4 by 3 latents and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 4, 3),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500, 500]),
    }


def sana_video() -> nn.Module:
    """The MLP takes and returns (frames, rows, columns, channels), and mixes neighbouring frames too."""
    return alive(SanaVideoTransformer3DModel, **{**SIZES, "attention_head_dim": 12, "cross_attention_dim": 24})


def sana_video_arguments() -> dict[str, Any]:
    """Three latent frames of 8 by 10 and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500, 500]),
    }


def sana_wm() -> nn.Module:
    """Every second block has softmax attention, the others a recurrence in both directions; a token a latent."""
    return alive(
        SanaWMTransformer3DModel,
        in_channels=4,
        num_layers=3,
        hidden_size=24,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=12,
        caption_channels=12,
        mlp_ratio=2.0,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=3,
        mixed_precision="no",
    )


def sana_wm_arguments() -> dict[str, Any]:
    """Three latent frames of 4 by 5, with a timestep and rays of the camera for each, and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 3, 4, 5),
        "timestep": torch.full((2, 1, 3), 500.0),
        "encoder_hidden_states": torch.randn(2, 1, 7, 12),
        "mask": torch.ones(2, 7),
        "chunk_plucker": torch.randn(2, 6, 3, 4, 5),
    }


ALL = (
    SmallDenoiser(
        name="SanaTransformer2DModel",
        make=sana,
        arguments=sana_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
    SmallDenoiser(
        name="SanaVideoTransformer3DModel",
        make=sana_video,
        arguments=sana_video_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 60},
        layout=(3, 4, 5),
    ),
    SmallDenoiser(
        name="SanaWMTransformer3DModel",
        make=sana_wm,
        arguments=sana_wm_arguments,
        blocks=(Blocks("blocks", count=3, streams=("visual",), modules=WM_MODULES),),
        tokens={"visual": 60},
        layout=(3, 4, 5),
    ),
)
