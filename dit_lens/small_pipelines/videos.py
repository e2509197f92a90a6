"""Small pipelines of video models other than Wan: HunyuanVideo, CogVideoX, LTX and Mochi."""

from __future__ import annotations

from diffusers import (
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)

from dit_lens.plants.parts import TEXT_DIMENSION, TEXT_LENGTH
from dit_lens.small_pipelines import schedules, texts, vaes
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import SmallPipeline
from dit_lens.small_pipelines.vaes import CHANNELS

INPUTS = {
    **texts.PROMPTS,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_LENGTH,
    "output_type": "latent",
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
"""Width 32: rotary embeddings want 16 channels a head."""


def hunyuan() -> HunyuanVideoPipeline:
    """Double blocks, single blocks and refined text tokens; the scale of the guidance is embedded."""
    transformer = alive(
        HunyuanVideoTransformer3DModel,
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIMENSION,
        pooled_projection_dim=texts.CLIP_DIMENSION,
        rope_axes_dim=(4, 6, 6),
    )
    return made(
        HunyuanVideoPipeline,
        text_encoder=texts.llama(),
        tokenizer=texts.tokenizer(leading=2),
        transformer=transformer,
        vae=vaes.hunyuan(),
        scheduler=schedules.sharp_flow(),
        text_encoder_2=texts.clip(),
        tokenizer_2=texts.tokenizer(),
    )


def cogvideox() -> CogVideoXPipeline:
    """Text and video in one sequence, with rotary embeddings on the video."""
    transformer = alive(
        CogVideoXTransformer3DModel,
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIMENSION,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=True,
    )
    return made(
        CogVideoXPipeline,
        tokenizer=texts.tokenizer(),
        text_encoder=texts.t5(),
        vae=vaes.cogvideox(),
        transformer=transformer,
        scheduler=schedules.cog_ddim(),
    )


def ltx() -> LTXPipeline:
    """A token a latent; text by cross-attention, with a mask."""
    transformer = alive(
        LTXVideoTransformer3DModel,
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=TEXT_DIMENSION,
    )
    return made(
        LTXPipeline,
        scheduler=schedules.ltx_flow(),
        vae=vaes.ltx(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
        transformer=transformer,
    )


def mochi() -> MochiPipeline:
    """Text and video attend together at different widths; sigmas grow from noise to data."""
    transformer = alive(
        MochiTransformer3DModel,
        **HEADS,
        in_channels=12,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_DIMENSION,
        time_embed_dim=8,
        max_sequence_length=TEXT_LENGTH,
    )
    return made(
        MochiPipeline,
        scheduler=schedules.upward_flow(),
        vae=vaes.mochi(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
        transformer=transformer,
    )


SMALL_FRAMES = {"height": 32, "width": 48}
"""Four by six latents of 8 x 8 pixels, two by three tokens."""

ALL = (
    SmallPipeline(
        name="hunyuan-video",
        make=hunyuan,
        inputs={**INPUTS, **SMALL_FRAMES, "num_frames": 9, "negative_prompt": None},
        guidance="embedded with context",
        branches=("cond",),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sharp_flow},
        layout=(3, 2, 3),
    ),
    SmallPipeline(
        name="hunyuan-video-true-cfg",
        make=hunyuan,
        inputs={**INPUTS, **SMALL_FRAMES, "num_frames": 9, "true_cfg_scale": 3.0},
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sharp_flow},
        layout=(3, 2, 3),
    ),
    SmallPipeline(
        name="cogvideox",
        make=cogvideox,
        inputs={**INPUTS, **SMALL_FRAMES, "num_frames": 9},
        guidance="batched with context",
        branches=("uncond", "cond"),
        prediction="v_prediction",
        schedulers={"CogVideoXDDIMScheduler": schedules.cog_ddim, "CogVideoXDPMScheduler": schedules.cog_dpm},
        layout=(3, 2, 3),
    ),
    SmallPipeline(
        name="ltx",
        make=ltx,
        inputs={**INPUTS, "height": 64, "width": 96, "num_frames": 17},
        guidance="batched with context",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.ltx_flow},
        layout=(3, 2, 3),
    ),
    SmallPipeline(
        name="mochi",
        make=mochi,
        inputs={**INPUTS, **SMALL_FRAMES, "num_frames": 13},
        guidance="batched with context",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.upward_flow},
        layout=(3, 2, 3),
    ),
)
