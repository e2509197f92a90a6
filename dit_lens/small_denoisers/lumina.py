"""A small denoiser of Lumina 2: text and image are refined apart, then lie in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

ALONE = {("attn", "visual"): "attn", ("mlp", "visual"): "feed_forward"}
"""Of a Lumina2TransformerBlock. What both return is normalised once more before its gate."""
TOGETHER = {**ALONE, ("attn", "text"): "attn", ("mlp", "text"): "feed_forward"}


def lumina2() -> nn.Module:
    """Blocks of one class three times: `context_refiner` on the text, `noise_refiner` on the image, `layers` on both."""
    return alive(
        Lumina2Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )


def lumina2_arguments() -> dict[str, Any]:
    """8 by 6 latents and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
    }


ALL = (
    SmallDenoiser(
        name="Lumina2Transformer2DModel",
        make=lumina2,
        arguments=lumina2_arguments,
        blocks=(
            Blocks("noise_refiner", count=1, streams=("visual",), modules=ALONE),
            Blocks("layers", count=3, streams=("text", "visual"), modules=TOGETHER, joined=True),
        ),
        tokens={"text": 7, "visual": 12},
        layout=(1, 4, 3),
        aside=("context_refiner",),
    ),
)
