"""Small denoisers of the Wan family: text by cross-attention, one stream."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

WAN_MODULES = {("attn", "visual"): "attn1", ("cross_attn", "visual"): "attn2", ("mlp", "visual"): "ffn"}
"""Of a WanTransformerBlock."""
SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def wan() -> nn.Module:
    """Three blocks of width 24."""
    return alive(WanTransformer3DModel, **SIZES)


def wan_arguments() -> dict[str, Any]:
    """Three latent frames of 8 by 10."""
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }


ALL = (
    SmallDenoiser(
        name="WanTransformer3DModel",
        make=wan,
        arguments=wan_arguments,
        blocks=(Blocks("blocks", count=3, streams=("visual",), modules=WAN_MODULES),),
        tokens={"visual": 60},
        layout=(3, 4, 5),
    ),
)
