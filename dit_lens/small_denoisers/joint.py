"""Small denoisers with blocks of two streams: Stable Diffusion 3, AuraFlow, Qwen-Image and JoyImage."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import DOUBLE, HEADS, IMAGE, ROTARY, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

STREAMS = ("text", "visual")
REGISTERS = 8
"""Of AuraFlow: they stand before the text and go with it."""
SINGLE = {("attn", "visual"): "attn", ("attn", "text"): "attn", ("mlp", "visual"): "ff", ("mlp", "text"): "ff"}
QWEN = {("attn", "visual"): "attn", ("attn", "text"): "attn", ("mlp", "visual"): "img_mlp", ("mlp", "text"): "txt_mlp"}


def aura_flow() -> nn.Module:
    """What attention says reaches the stream through the feed-forward alone."""
    return alive(
        AuraFlowTransformer2DModel,
        **HEADS,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        joint_attention_dim=TEXT_DIMENSION,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )


def aura_flow_arguments() -> dict[str, Any]:
    """A timestep between 0 and 1."""
    return {"hidden_states": common.whole(), "encoder_hidden_states": common.texts(), "timestep": common.times(0.5)}


def stable_diffusion_3() -> nn.Module:
    """The first block has a second attention, of the image alone; the last returns no text."""
    return alive(
        SD3Transformer2DModel,
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=TEXT_DIMENSION,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def stable_diffusion_3_arguments() -> dict[str, Any]:
    """With a pooled text."""
    return {
        "hidden_states": common.whole(),
        "encoder_hidden_states": common.texts(),
        "pooled_projections": torch.randn(2, 8),
        "timestep": common.times(),
    }


def qwen_image() -> nn.Module:
    """Packed latents."""
    return alive(
        QwenImageTransformer2DModel,
        **HEADS,
        in_channels=8,
        out_channels=2,
        num_layers=3,
        joint_attention_dim=TEXT_DIMENSION,
        axes_dims_rope=ROTARY,
    )


def qwen_image_arguments() -> dict[str, Any]:
    """The layout of each row is told."""
    return {
        "hidden_states": common.packed(8),
        "encoder_hidden_states": common.texts(),
        "encoder_hidden_states_mask": torch.ones(2, WORDS, dtype=torch.long),
        "timestep": common.times(0.5),
        "img_shapes": [[IMAGE], [IMAGE]],
    }


JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": TEXT_DIMENSION,
    "mlp_width_ratio": 2.0,
    "num_layers": 3,
    "rope_dim_list": list(ROTARY),
}


def joy_image() -> nn.Module:
    """Pictures one after the other, as the frames of a video."""
    return alive(JoyImageEditTransformer3DModel, **JOY)


def joy_image_arguments() -> dict[str, Any]:
    """Three frames."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
    }


def joy_image_plus() -> nn.Module:
    """Pictures may differ in size, so they come cut into patches."""
    return alive(JoyImageEditPlusTransformer3DModel, **JOY)


def joy_image_plus_arguments() -> dict[str, Any]:
    """Patches of three frames, (2, tokens, channels, 1, 2, 2), whose layout is told for each row."""
    return {
        "hidden_states": torch.randn(2, 24, 4, 1, 2, 2),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_hidden_states_mask": torch.ones(2, WORDS),
        "shape_list": [[VIDEO], [VIDEO]],
    }


ALL = (
    SmallDenoiser(
        name="AuraFlowTransformer2DModel",
        make=aura_flow,
        arguments=aura_flow_arguments,
        blocks=(
            Blocks("joint_transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=SINGLE, joined=True),
        ),
        tokens={"text": REGISTERS + WORDS, "visual": 12},
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="SD3Transformer2DModel",
        make=stable_diffusion_3,
        arguments=stable_diffusion_3_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=DOUBLE),),
        tokens={"text": WORDS, "visual": 12},
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="QwenImageTransformer2DModel",
        make=qwen_image,
        arguments=qwen_image_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=QWEN),),
        tokens={"text": WORDS, "visual": 12},
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="JoyImageEditTransformer3DModel",
        make=joy_image,
        arguments=joy_image_arguments,
        blocks=(Blocks("double_blocks", count=3, streams=("visual", "text"), modules=QWEN),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
    ),
    SmallDenoiser(
        name="JoyImageEditPlusTransformer3DModel",
        make=joy_image_plus,
        arguments=joy_image_plus_arguments,
        blocks=(Blocks("double_blocks", count=3, streams=("visual", "text"), modules=QWEN),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
    ),
)
