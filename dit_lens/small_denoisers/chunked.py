"""Small denoisers that make a video chunk by chunk: AnyFlow, its causal form, and Helios."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, HeliosTransformer3DModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_denoisers.uncompiled import uncompiled
from dit_lens.small_denoisers.wan import SIZES, WAN_MODULES, wan_arguments
from dit_lens.small_pipelines.making import alive

HELIOS_SIZES = {name: value for name, value in SIZES.items() if name != "rope_max_seq_len"}
HELIOS_MODULES = {
    ("attn", "extra"): "attn1",
    ("attn", "visual"): "attn1",
    ("cross_attn", "visual"): "attn2",
    ("mlp", "extra"): "ffn",
    ("mlp", "visual"): "ffn",
}
"""Of a HeliosTransformerBlock: the past attends and has an MLP, and does not read the text."""
CACHED = 20
"""Tokens of one frame."""


def anyflow() -> nn.Module:
    """Blocks as Wan's; a timestep for each frame, and one that it goes to."""
    return alive(AnyFlowTransformer3DModel, **SIZES)


def anyflow_arguments() -> dict[str, Any]:
    """Three latent frames of 8 by 10; frames come before channels."""
    return {
        "hidden_states": torch.randn(2, 3, 4, 8, 10),
        "timestep": torch.full((2, 3), 500.0),
        "r_timestep": torch.full((2, 3), 400.0),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }


def anyflow_far() -> nn.Module:
    """Its attention reads what earlier chunks left, too."""
    with uncompiled():
        transformer = alive(AnyFlowFARTransformer3DModel, **SIZES, chunk_partition=(1, 3))
    return transformer.requires_grad_(False)  # such attention has no gradient on a CPU


def anyflow_far_arguments() -> dict[str, Any]:
    """A chunk of three latent frames of 8 by 10, after one of one frame."""
    return {
        "hidden_states": torch.randn(2, 3, 4, 8, 10),
        "timestep": torch.full((2, 3), 500.0),
        "r_timestep": torch.full((2, 3), 400.0),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "chunk_partition": [1, 3],
        "kv_cache": [
            {"full_cache": torch.randn(2, 2, 2, CACHED, 12), "compressed_cache": torch.zeros(2, 2, 2, 0, 12)} for _ in range(3)
        ],
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def helios() -> nn.Module:
    """The past lies before the video in one sequence, the farther the coarser."""
    return alive(HeliosTransformer3DModel, **HELIOS_SIZES, rope_dim=(4, 4, 4))


def helios_arguments() -> dict[str, Any]:
    """Three latent frames of 8 by 10, after four, two and one of the past (2, 6 and 20 tokens)."""
    return {
        **wan_arguments(),
        "indices_hidden_states": torch.arange(7, 10)[None],
        "indices_latents_history_short": torch.arange(6, 7)[None],
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "indices_latents_history_long": torch.arange(4)[None],
        "latents_history_short": torch.randn(2, 4, 1, 8, 10),
        "latents_history_mid": torch.randn(2, 4, 2, 8, 10),
        "latents_history_long": torch.randn(2, 4, 4, 8, 10),
    }


ALL = (
    SmallDenoiser(
        name="AnyFlowTransformer3DModel",
        make=anyflow,
        arguments=anyflow_arguments,
        blocks=(Blocks("blocks", count=3, streams=("visual",), modules=WAN_MODULES),),
        tokens={"visual": 60},
        layout=(3, 4, 5),
    ),
    SmallDenoiser(
        name="AnyFlowFARTransformer3DModel",
        make=anyflow_far,
        arguments=anyflow_far_arguments,
        blocks=(Blocks("blocks", count=3, streams=("visual",), modules=WAN_MODULES),),
        tokens={"visual": 60},
        layout=(3, 4, 5),
    ),
    SmallDenoiser(
        name="HeliosTransformer3DModel",
        make=helios,
        arguments=helios_arguments,
        blocks=(Blocks("blocks", count=3, streams=("extra", "visual"), modules=HELIOS_MODULES, joined=True),),
        tokens={"extra": 28, "visual": 60},
        layout=(3, 4, 5),
    ),
)
