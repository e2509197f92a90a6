"""Small denoisers whose one attention reads image and text together, while only the image is a stream: Nucleus and PRX."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import NucleusMoEImageTransformer2DModel, PRXTransformer2DModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive


def with_experts(**settings: Any) -> nn.Module:
    """With weights of the experts, which diffusers leaves as the memory was, drawn."""
    transformer = NucleusMoEImageTransformer2DModel(**settings)
    for name, parameter in transformer.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            nn.init.normal_(parameter, std=0.3)
    return transformer


def nucleus() -> nn.Module:
    """The first block has one MLP; the others have four experts, each of which chooses its tokens, and one for all."""
    return alive(
        with_experts,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4),
        mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )


def nucleus_arguments() -> dict[str, Any]:
    """8 by 6 latents, packed two by two, and seven words."""
    return {
        "hidden_states": torch.randn(2, 12, 16),
        "img_shapes": [(1, 4, 3)],
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([0.5, 0.5]),
    }


def prx() -> nn.Module:
    """The MLP is three layers in the block; the last returns what is gated."""
    return alive(
        PRXTransformer2DModel,
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=3,
        axes_dim=[4, 4],
    )


def prx_arguments() -> dict[str, Any]:
    """8 by 6 latents and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "attention_mask": torch.ones(2, 7, dtype=torch.bool),
    }


ALL = (
    SmallDenoiser(
        name="NucleusMoEImageTransformer2DModel",
        make=nucleus,
        arguments=nucleus_arguments,
        blocks=(
            Blocks(
                "transformer_blocks",
                count=3,
                streams=("visual",),
                modules={("attn", "visual"): "attn", ("mlp", "visual"): "img_mlp"},
            ),
        ),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
    SmallDenoiser(
        name="PRXTransformer2DModel",
        make=prx,
        arguments=prx_arguments,
        blocks=(
            Blocks(
                "blocks",
                count=3,
                streams=("visual",),
                modules={("attn", "visual"): "attention", ("mlp", "visual"): "down_proj"},
            ),
        ),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
)
