"""Small denoisers whose image passes blocks of its own before it joins the text: Z-Image and Bria Fibo 2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BriaFibo2Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import IMAGE, ROTARY, TEXT_DIMENSION, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

ALONE = {("attn", "visual"): "attention", ("mlp", "visual"): "feed_forward"}
JOINED = {**ALONE, ("attn", "text"): "attention", ("mlp", "text"): "feed_forward"}
CROSSED = {**JOINED, ("cross_attn", "visual"): "cross_attention", ("cross_attn", "text"): "cross_attention"}
GIST = 6
"""Tokens into which Bria Fibo 2 sums up a text of `WORDS`."""
UNPADDED = (1, 4, 8)
"""Layout of 32 tokens, to whose multiples Z-Image pads image and text."""


def z_image() -> nn.Module:
    """Modulated by the timestep, but for the blocks of the text."""
    return alive(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIMENSION,
        axes_dims=list(ROTARY),
        axes_lens=[128, 16, 16],
    )


def z_image_arguments() -> dict[str, Any]:
    """Lists, with a tensor for each row; a timestep from 0, the noise, to 1."""
    return {
        "x": [torch.randn(4, 1, 8, 16) for _ in range(2)],
        "t": common.times(0.5),
        "cap_feats": [torch.randn(64, TEXT_DIMENSION) for _ in range(2)],
    }


def bria_fibo_2() -> nn.Module:
    """A text is summed up in a few tokens, and read in full by the block in the middle."""
    return alive(
        BriaFibo2Transformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=TEXT_DIMENSION,
        injection_layer_ids=(1,),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=20,
        axes_dims=ROTARY,
        axes_lens=(16, 16, 16),
    )


def bria_fibo_2_arguments() -> dict[str, Any]:
    """A text as two layers of its encoder: one to be summed up, one for the block in the middle."""
    return {
        "hidden_states": common.whole(),
        "timestep": common.times(0.5),
        "encoder_hidden_states": torch.randn(2, 2, WORDS, TEXT_DIMENSION),
    }


ALL = (
    SmallDenoiser(
        name="ZImageTransformer2DModel",
        make=z_image,
        arguments=z_image_arguments,
        blocks=(
            Blocks("noise_refiner", count=2, streams=("visual",), modules=ALONE),
            Blocks("layers", count=3, streams=("visual", "text"), modules=JOINED, joined=True),
        ),
        tokens={"visual": 32, "text": 64},
        layout=UNPADDED,
        aside=("context_refiner",),
    ),
    SmallDenoiser(
        name="BriaFibo2Transformer2DModel",
        make=bria_fibo_2,
        arguments=bria_fibo_2_arguments,
        blocks=(
            Blocks("noise_refiner", count=2, streams=("visual",), modules=ALONE),
            Blocks("layers", count=3, streams=("text", "visual"), modules=CROSSED, joined=True),
        ),
        tokens={"text": GIST, "visual": 12},
        layout=IMAGE,
        aside=("perceiver.layers",),
    ),
)
