"""Small denoisers after HunyuanVideo: double blocks and single ones on video, text that is refined first; Mochi and Motif."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
)
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import DOUBLE, FUSED, HEADS, IMAGE, ROTARY, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

STREAMS = ("visual", "text")
REFINER = "context_embedder.token_refiner.refiner_blocks"
SECOND_WORDS = 4
PICTURE = 5
"""Tokens of a second text and of a picture that is shown, where there are such; they stand before the text and go with it."""
PAST = 11
"""Tokens of the past, of Framepack."""
TOKENS = {"visual": 24, "text": WORDS}
MOTIF = {**DOUBLE, ("cross_attn", "visual"): "cross_attn"}
MOCHI = {("attn", "visual"): "attn1", ("attn", "text"): "attn1", ("mlp", "visual"): "ff", ("mlp", "text"): "ff_context"}
SIZES = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIMENSION,
    "rope_axes_dim": ROTARY,
}


def hunyuan_video() -> nn.Module:
    """With the scale of the guidance embedded."""
    return alive(HunyuanVideoTransformer3DModel, **SIZES, pooled_projection_dim=8)


def hunyuan_video_arguments() -> dict[str, Any]:
    """With a mask and a pooled text."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "pooled_projections": torch.randn(2, 8),
        "guidance": common.times(3500.0),
    }


def mochi() -> nn.Module:
    """The text is narrower than the video, and the last block leaves it as it was."""
    return alive(
        MochiTransformer3DModel,
        **HEADS,
        in_channels=4,
        num_layers=3,
        pooled_projection_dim=24,
        text_embed_dim=TEXT_DIMENSION,
        time_embed_dim=8,
        max_sequence_length=WORDS,
    )


def mochi_arguments() -> dict[str, Any]:
    """With a mask."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS, dtype=torch.bool),
    }


def hunyuan_video_15() -> nn.Module:
    """Double blocks alone; before the text stand the tokens of a picture and of a second text."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_single_layers"}
    sizes |= {"num_layers": 3, "patch_size": 1, "text_embed_2_dim": 12, "image_embed_dim": 10}
    return alive(HunyuanVideo15Transformer3DModel, **sizes)


def hunyuan_video_15_arguments() -> dict[str, Any]:
    """With two texts and a picture."""
    return {
        "hidden_states": common.whole(layout=VIDEO, patch=1),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS),
        "encoder_hidden_states_2": common.texts(12, SECOND_WORDS),
        "encoder_attention_mask_2": torch.ones(2, SECOND_WORDS),
        "image_embeds": torch.randn(2, PICTURE, 10),
    }


def framepack() -> nn.Module:
    """Before the frames stand those of the past, in tokens that cover more of it the longer it is gone."""
    sizes = {**SIZES, "pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True}
    return alive(HunyuanVideoFramepackTransformer3DModel, **sizes)


def framepack_arguments() -> dict[str, Any]:
    """With one frame, two frames and four frames of the past, and a picture."""
    return {
        **hunyuan_video_arguments(),
        "image_embeds": torch.randn(2, PICTURE, 10),
        "indices_latents": torch.arange(7, 10),
        "latents_clean": torch.randn(2, 4, 1, 8, 4),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": torch.randn(2, 4, 2, 8, 4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": torch.randn(2, 4, 4, 8, 4),
        "indices_latents_history_4x": torch.arange(4),
    }


def hunyuan_image() -> nn.Module:
    """An image, a token for each latent."""
    sizes = {**SIZES, "patch_size": (1, 1), "rope_axes_dim": (8, 8)}
    return alive(HunyuanImageTransformer2DModel, **sizes)


def hunyuan_image_arguments() -> dict[str, Any]:
    """With a mask."""
    return {
        "hidden_states": common.whole(patch=1),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS),
    }


def motif_video() -> nn.Module:
    """The video attends to the text once more, with the outcome of the joint attention as its query.

    The last single block starts from the video as it was before all blocks, and has what the others made of it, where they
    have the text.
    """
    sizes = {name: value for name, value in SIZES.items() if name != "num_refiner_layers"}
    ways = {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True, "num_decoder_layers": 1}
    return alive(MotifVideoTransformer3DModel, **sizes, **ways)


def motif_video_arguments() -> dict[str, Any]:
    """With a mask."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "timestep": common.times(),
        "encoder_hidden_states": common.texts(),
        "encoder_attention_mask": torch.ones(2, WORDS),
    }


ALL = (
    SmallDenoiser(
        name="HunyuanVideoTransformer3DModel",
        make=hunyuan_video,
        arguments=hunyuan_video_arguments,
        blocks=(
            Blocks("transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED),
        ),
        tokens=TOKENS,
        layout=VIDEO,
        aside=(REFINER,),
    ),
    SmallDenoiser(
        name="MochiTransformer3DModel",
        make=mochi,
        arguments=mochi_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=MOCHI),),
        tokens=TOKENS,
        layout=VIDEO,
    ),
    SmallDenoiser(
        name="HunyuanVideo15Transformer3DModel",
        make=hunyuan_video_15,
        arguments=hunyuan_video_15_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=DOUBLE),),
        tokens={"visual": 24, "text": PICTURE + SECOND_WORDS + WORDS},
        layout=VIDEO,
        aside=(REFINER,),
    ),
    SmallDenoiser(
        name="HunyuanVideoFramepackTransformer3DModel",
        make=framepack,
        arguments=framepack_arguments,
        blocks=(
            Blocks("transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED),
        ),
        tokens={"visual": PAST + 24, "text": PICTURE + WORDS},
        layout=VIDEO,
        aside=(REFINER,),
    ),
    SmallDenoiser(
        name="HunyuanImageTransformer2DModel",
        make=hunyuan_image,
        arguments=hunyuan_image_arguments,
        blocks=(
            Blocks("transformer_blocks", count=2, streams=STREAMS, modules=DOUBLE),
            Blocks("single_transformer_blocks", count=3, streams=STREAMS, modules=FUSED),
        ),
        tokens={"visual": 12, "text": WORDS},
        layout=IMAGE,
        aside=(REFINER,),
    ),
    SmallDenoiser(
        name="MotifVideoTransformer3DModel",
        make=motif_video,
        arguments=motif_video_arguments,
        blocks=(
            Blocks("transformer_blocks", count=2, streams=STREAMS, modules=MOTIF),
            Blocks("single_transformer_blocks", count=2, streams=STREAMS, modules={**FUSED, ("cross_attn", "visual"): ""}),
            Blocks(
                "single_transformer_blocks",
                count=1,
                streams=("visual", "extra"),
                modules={(site, stream): "" for site in ("attn", "mlp") for stream in ("visual", "extra")},
            ),
        ),
        tokens={**TOKENS, "extra": 24},
        layout=VIDEO,
    ),
)
