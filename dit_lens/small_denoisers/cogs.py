"""Small denoisers after CogVideoX and CogView: two streams, and one feed-forward for both; EasyAnimate has two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    ConsisIDTransformer3DModel,
    EasyAnimateTransformer3DModel,
    GlmImageTransformer2DModel,
)
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import HEADS, IMAGE, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

STREAMS = ("visual", "text")
COG = {("attn", "visual"): "attn1", ("attn", "text"): "attn1", ("mlp", "visual"): "ff", ("mlp", "text"): "ff"}
"""One feed-forward for both streams: on text and video in one sequence; in CogView4 and GLM, on the image, then on the text."""
EASY = {("attn", "visual"): "attn1", ("attn", "text"): "attn1", ("mlp", "visual"): "ff", ("mlp", "text"): "txt_ff"}
SIZES = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_DIMENSION,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": WORDS,
}


def cogvideox() -> nn.Module:
    """Positions are added to the tokens."""
    return alive(CogVideoXTransformer3DModel, **SIZES)


def cogvideox_arguments() -> dict[str, Any]:
    """Latents with frames before channels."""
    return {
        "hidden_states": common.whole(layout=VIDEO).transpose(1, 2).contiguous(),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
    }


def consis_id() -> nn.Module:
    """Between the blocks, the video attends to a face."""
    sizes = {**SIZES, "num_attention_heads": 3, "num_layers": 4}
    face = {
        "cross_attn_interval": 2,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 12,
        "LFE_vit_dim": 16,
        "LFE_depth": 2,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 4,
        "LFE_output_dim": 32,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 2,
    }
    return alive(ConsisIDTransformer3DModel, **sizes, **face, is_train_face=True)


def consis_id_arguments() -> dict[str, Any]:
    """With what two encoders saw of a face."""
    return {
        **cogvideox_arguments(),
        "id_cond": torch.randn(2, 12),
        "id_vit_hidden": [torch.randn(2, 5, 16) for _ in range(2)],
    }


def easy_animate() -> nn.Module:
    """A feed-forward for each stream."""
    sizes = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 3, "mmdit_layers": 3, "time_embed_dim": 8}
    return alive(EasyAnimateTransformer3DModel, **HEADS, **sizes, text_embed_dim=TEXT_DIMENSION)


def easy_animate_arguments() -> dict[str, Any]:
    """Latents with channels before frames."""
    return {
        "hidden_states": common.whole(layout=VIDEO),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
    }


VIEW = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "time_embed_dim": 8, "text_embed_dim": TEXT_DIMENSION}


def cogview3() -> nn.Module:
    """Told of the sizes of the picture."""
    return alive(CogView3PlusTransformer2DModel, **HEADS, **VIEW, condition_dim=4, pos_embed_max_size=8, sample_size=8)


def cogview4() -> nn.Module:
    """As CogView3, with rotary embeddings."""
    return alive(CogView4Transformer2DModel, **HEADS, **VIEW, condition_dim=4, rope_axes_dim=(8, 8), sample_size=8)


def cogview_arguments() -> dict[str, Any]:
    """With the sizes of the picture."""
    return {
        "hidden_states": common.whole(),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
        "original_size": torch.tensor([[64.0, 48.0]]).repeat(2, 1),
        "target_size": torch.tensor([[64.0, 48.0]]).repeat(2, 1),
        "crop_coords": torch.zeros(2, 2),
    }


def glm_image() -> nn.Module:
    """To each token of the image, one of a coarser image is added, which a language model wrote."""
    return alive(GlmImageTransformer2DModel, **HEADS, **VIEW, condition_dim=4, prior_vq_quantizer_codebook_size=8)


def glm_image_arguments() -> dict[str, Any]:
    """With the tokens of the coarser image."""
    arguments = cogview_arguments()
    del arguments["original_size"]
    return {
        **arguments,
        "prior_token_id": torch.randint(8, (2, 12)),
        "prior_token_drop": torch.zeros(2, 12, dtype=torch.bool),
    }


def image_denoiser(name: str, make: Callable[[], nn.Module], arguments: Callable[[], dict[str, Any]]) -> SmallDenoiser:
    """One of the CogView family."""
    return SmallDenoiser(
        name=name,
        make=make,
        arguments=arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=COG),),
        tokens={"visual": 12, "text": WORDS},
        layout=IMAGE,
    )


ALL = (
    SmallDenoiser(
        name="CogVideoXTransformer3DModel",
        make=cogvideox,
        arguments=cogvideox_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=COG),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
    ),
    SmallDenoiser(
        name="ConsisIDTransformer3DModel",
        make=consis_id,
        arguments=consis_id_arguments,
        blocks=(Blocks("transformer_blocks", count=4, streams=STREAMS, modules=COG),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
        aside=("local_facial_extractor.layers", "perceiver_cross_attention"),
    ),
    SmallDenoiser(
        name="EasyAnimateTransformer3DModel",
        make=easy_animate,
        arguments=easy_animate_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=EASY),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
    ),
    image_denoiser("CogView3PlusTransformer2DModel", cogview3, cogview_arguments),
    image_denoiser("CogView4Transformer2DModel", cogview4, cogview_arguments),
    image_denoiser("GlmImageTransformer2DModel", glm_image, glm_image_arguments),
)
