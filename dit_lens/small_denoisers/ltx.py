"""Small denoisers of the LTX family, and Sana's refiner made of it: a token a latent, packed; text by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel, SanaWMLTX2RefinerTransformer3DModel
from torch import nn

from dit_lens.small_denoisers.crossed import CROSSED
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

FRAMES, HEIGHT, WIDTH = 2, 4, 3
AUDIO = 5
"""Latent frames of the sound."""
LTX2_MODULES = {
    **CROSSED,
    ("attn", "audio"): "audio_attn1",
    ("cross_attn", "audio"): "audio_attn2",
    ("mlp", "audio"): "audio_ff",
}
"""Of an LTX2VideoTransformerBlock; before their MLPs, picture and sound read each other (`audio_to_video_attn`,
`video_to_audio_attn`), which is neither of the sites."""
LTX2_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 20,
}
"""Width 24 of the picture, 16 of the sound."""


def ltx() -> nn.Module:
    """Three blocks of width 16."""
    return alive(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=12,
    )


def ltx_arguments() -> dict[str, Any]:
    """Two latent frames of 4 by 3 and seven words."""
    return {
        "hidden_states": torch.randn(2, FRAMES * HEIGHT * WIDTH, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.ones(2, 7),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
    }


def ltx2() -> nn.Module:
    """Picture and sound of different widths."""
    return alive(LTX2VideoTransformer3DModel, **LTX2_SIZES)


def ltx2_arguments() -> dict[str, Any]:
    """Two latent frames of 4 by 3, five of sound, and seven words, embedded for each."""
    return {
        "hidden_states": torch.randn(2, FRAMES * HEIGHT * WIDTH, 4),
        "audio_hidden_states": torch.randn(2, AUDIO, 6),
        "encoder_hidden_states": torch.randn(2, 7, 20),
        "audio_encoder_hidden_states": torch.randn(2, 7, 20),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.ones(2, 7),
        "audio_encoder_attention_mask": torch.ones(2, 7),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "audio_num_frames": AUDIO,
    }


def refiner() -> nn.Module:
    """LTX 2's blocks, of which those parts that hear are there and never run."""
    return alive(SanaWMLTX2RefinerTransformer3DModel, **LTX2_SIZES)


def refiner_arguments() -> dict[str, Any]:
    """Two latent frames of 4 by 3 and seven words; positions come from outside."""
    angles = torch.randn(1, FRAMES * HEIGHT * WIDTH, 12).repeat_interleave(2, dim=2)
    return {
        "hidden_states": torch.randn(2, FRAMES * HEIGHT * WIDTH, 4),
        "encoder_hidden_states": torch.randn(2, 7, 20),
        "timestep": torch.tensor([500.0, 500.0]),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.ones(2, 7),
    }


ALL = (
    SmallDenoiser(
        name="LTXVideoTransformer3DModel",
        make=ltx,
        arguments=ltx_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": FRAMES * HEIGHT * WIDTH},
        layout=(FRAMES, HEIGHT, WIDTH),
    ),
    SmallDenoiser(
        name="LTX2VideoTransformer3DModel",
        make=ltx2,
        arguments=ltx2_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual", "audio"), modules=LTX2_MODULES),),
        tokens={"visual": FRAMES * HEIGHT * WIDTH, "audio": AUDIO},
        layout=(FRAMES, HEIGHT, WIDTH),
    ),
    SmallDenoiser(
        name="SanaWMLTX2RefinerTransformer3DModel",
        make=refiner,
        arguments=refiner_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": FRAMES * HEIGHT * WIDTH},
        layout=(FRAMES, HEIGHT, WIDTH),
    ),
)
