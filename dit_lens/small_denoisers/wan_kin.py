"""Small denoisers made of Wan's blocks, or of close kin: VACE, Animate, SkyReels, ChronoEdit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_denoisers.uncompiled import uncompiled
from dit_lens.small_denoisers.wan import SIZES, WAN_MODULES, wan_arguments
from dit_lens.small_pipelines.making import alive

ANIMATE2_MODULES = {("attn", "visual"): "self_attn", ("cross_attn", "visual"): "cross_attn", ("mlp", "visual"): "ffn"}
FRAMES, ROWS, COLUMNS = 3, 4, 5
"""Of tokens."""


def vace() -> nn.Module:
    """All of `vace_blocks` run first; what they return is added to the stream after blocks 0 and 2."""
    return alive(WanVACETransformer3DModel, **SIZES, vace_layers=[0, 2], vace_in_channels=6)


def vace_arguments() -> dict[str, Any]:
    """A control video beside the latents."""
    return {**wan_arguments(), "control_hidden_states": torch.randn(2, 6, 3, 8, 10)}


def animate() -> nn.Module:
    """`face_adapter` adds to the stream after blocks 0 and 2; `attn2` reads image tokens together with the text."""
    sizes = {**SIZES, "num_layers": 4, "in_channels": 12, "latent_channels": 4}
    return alive(
        WanAnimateTransformer3DModel,
        **sizes,
        image_dim=10,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 4},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=12,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def animate_arguments() -> dict[str, Any]:
    """A frame of reference before two of video; latents, mask and condition in twelve channels; five frames of a face."""
    return {
        **wan_arguments(),
        "hidden_states": torch.randn(2, 12, 3, 8, 10),
        "encoder_hidden_states_image": torch.randn(2, 5, 10),
        "pose_hidden_states": torch.randn(2, 4, 2, 8, 10),
        "face_pixel_values": torch.randn(2, 3, 5, 16, 16),
    }


def animate2() -> nn.Module:
    """Its attention reads what a pass over a reference video left, too, as far as a mask of blocks says; no image tokens."""
    with uncompiled():
        transformer = alive(
            WanAnimate2Transformer3DModel,
            text_len=7,
            in_dim=10,
            dim=24,
            ffn_dim=32,
            freq_dim=16,
            text_dim=16,
            out_dim=4,
            num_heads=2,
            num_layers=3,
            use_img_emb=False,
        )
        reference, area = FRAMES - 1, ROWS * COLUMNS
        transformer.block_masks[reference, area] = transformer.create_mask(reference, area, torch.device("cpu"))
    return transformer.requires_grad_(False)  # such attention has no gradient on a CPU


def animate2_arguments() -> dict[str, Any]:
    """Lists, one sample each, and the keys and values of a reference of two frames in every block."""
    cache = WanAnimate2KVCache(3)
    for layer in cache.layer_caches:
        layer.store(torch.randn(2, 40, 2, 12), torch.randn(2, 40, 2, 12))
    return {
        "hidden_states": [torch.randn(4, FRAMES, 8, 10) for _ in range(2)],
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": [torch.randn(7, 16) for _ in range(2)],
        "condition_latents": [torch.randn(6, FRAMES, 8, 10) for _ in range(2)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": FRAMES * ROWS * COLUMNS,
        "reference_grid_sizes": torch.tensor([[FRAMES - 1, ROWS, COLUMNS]] * 2),
        "origin_len": 5,
        "origin_area": [64, 80],
    }


def skyreels() -> nn.Module:
    """Blocks as Wan's."""
    return alive(SkyReelsV2Transformer3DModel, **SIZES)


def chronoedit() -> nn.Module:
    """Blocks as Wan's; positions in time that skip."""
    return alive(ChronoEditTransformer3DModel, **SIZES)


def kin(
    name: str,
    make: Callable[[], nn.Module],
    arguments: Callable[[], dict[str, Any]] = wan_arguments,
    count: int = 3,
    modules: Mapping[tuple[str, str], str] = WAN_MODULES,
    aside: tuple[str, ...] = (),
) -> SmallDenoiser:
    """A denoiser with blocks as Wan's, on latents as in `wan_arguments`."""
    return SmallDenoiser(
        name=name,
        make=make,
        arguments=arguments,
        blocks=(Blocks("blocks", count=count, streams=("visual",), modules=modules),),
        tokens={"visual": FRAMES * ROWS * COLUMNS},
        layout=(FRAMES, ROWS, COLUMNS),
        aside=aside,
    )


ALL = (
    kin("WanVACETransformer3DModel", vace, vace_arguments, aside=("vace_blocks",)),
    kin(
        "WanAnimateTransformer3DModel",
        animate,
        animate_arguments,
        count=4,
        aside=("motion_encoder.res_blocks", "motion_encoder.motion_network", "face_adapter"),
    ),
    kin("WanAnimate2Transformer3DModel", animate2, animate2_arguments, modules=ANIMATE2_MODULES),
    kin("SkyReelsV2Transformer3DModel", skyreels),
    kin("ChronoEditTransformer3DModel", chronoedit),
)
