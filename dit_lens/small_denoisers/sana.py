"""Small denoisers of the Sana family: linear attention, cross-attention to the text, convolutions in the MLP."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel
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


ALL = (
    SmallDenoiser(
        name="SanaTransformer2DModel",
        make=sana,
        arguments=sana_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
)
