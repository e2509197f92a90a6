"""Small denoisers of sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableAudioDiTModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

EXTRA_CROSSED = {
    (site, stream): path
    for site, path in (("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ff"))
    for stream in ("extra", "visual")
}
"""Of blocks as the images', with a token before those of the latents."""


def stable_audio() -> nn.Module:
    """A token a latent, after one that holds timestep and duration."""
    return alive(
        StableAudioDiTModel,
        sample_size=6,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=12,
        global_states_input_dim=10,
        time_proj_dim=8,
    )


def stable_audio_arguments() -> dict[str, Any]:
    """Six latents and seven words."""
    angles = torch.outer(torch.arange(7.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
    return {
        "hidden_states": torch.randn(2, 4, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "global_hidden_states": torch.randn(2, 1, 10),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


ALL = (
    SmallDenoiser(
        name="StableAudioDiTModel",
        make=stable_audio,
        arguments=stable_audio_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("extra", "visual"), modules=EXTRA_CROSSED, joined=True),),
        tokens={"extra": 1, "visual": 6},
        layout=(6, 1, 1),
    ),
)
