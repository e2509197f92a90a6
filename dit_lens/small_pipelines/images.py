"""Small pipelines of image models in which text and image attend together: Flux, Stable Diffusion 3, Qwen-Image, Lumina 2."""

from __future__ import annotations

from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from dit_lens.plants.parts import TEXT_DIMENSION, TEXT_LENGTH
from dit_lens.small_pipelines import schedules, texts, vaes
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import SHARE, UPWARD_SHARE, SmallPipeline
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
ROTARY = (4, 6, 6)


def flux() -> FluxPipeline:
    """Double blocks, then single ones; the scale of the guidance is embedded."""
    transformer = alive(
        FluxTransformer2DModel,
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=TEXT_DIMENSION,
        pooled_projection_dim=texts.CLIP_DIMENSION,
        guidance_embeds=True,
        axes_dims_rope=ROTARY,
    )
    return made(
        FluxPipeline,
        scheduler=schedules.sized_flow(),
        vae=vaes.images(),
        text_encoder=texts.clip(),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.t5(),
        tokenizer_2=texts.tokenizer(),
        transformer=transformer,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Three text encoders; the first block has a second attention, of the image alone."""
    transformer = alive(
        SD3Transformer2DModel,
        **HEADS,
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        joint_attention_dim=TEXT_DIMENSION,
        caption_projection_dim=32,
        pooled_projection_dim=2 * texts.CLIP_DIMENSION,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return made(
        StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=schedules.shifted_flow(),
        vae=vaes.images(),
        text_encoder=texts.projected_clip(),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.projected_clip(),
        tokenizer_2=texts.tokenizer(),
        text_encoder_3=texts.t5(),
        tokenizer_3=texts.tokenizer(),
    )


def qwen_image() -> QwenImagePipeline:
    """Double blocks only; the prompts are not padded, so that the branches differ in length."""
    transformer = alive(
        QwenImageTransformer2DModel,
        **HEADS,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        joint_attention_dim=TEXT_DIMENSION,
        axes_dims_rope=ROTARY,
    )
    return made(
        QwenImagePipeline,
        scheduler=schedules.ltx_flow(),
        vae=vaes.qwen(),
        text_encoder=texts.qwen(),
        tokenizer=texts.tokenizer(),
        transformer=transformer,
    )


def lumina2() -> Lumina2Pipeline:
    """Text and image are refined apart, then lie in one sequence; the timestep runs from 0, the noise, to 1."""
    transformer = alive(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROTARY,
        axes_lens=(64, 8, 8),
        cap_feat_dim=TEXT_DIMENSION,
    )
    return made(
        Lumina2Pipeline,
        transformer=transformer,
        scheduler=schedules.lumina_flow(),
        vae=vaes.images(levels=4),
        text_encoder=texts.gemma2(),
        tokenizer=texts.tokenizer(length=64),
    )


ALL = (
    SmallPipeline(
        name="flux",
        make=flux,
        inputs={**INPUTS, "height": 8, "width": 12, "negative_prompt": None},
        guidance="embedded with context",
        branches=("cond",),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sized_flow},
        layout=(1, 2, 3),
        told=SHARE,
    ),
    SmallPipeline(
        name="flux-true-cfg",
        make=flux,
        inputs={**INPUTS, "height": 8, "width": 12, "true_cfg_scale": 3.0},
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sized_flow},
        layout=(1, 2, 3),
        told=SHARE,
    ),
    SmallPipeline(
        name="stable-diffusion-3",
        make=stable_diffusion_3,
        inputs={**INPUTS, "height": 8, "width": 12},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.shifted_flow},
        layout=(1, 2, 3),
    ),
    SmallPipeline(
        name="stable-diffusion-3-skip-layers",
        make=stable_diffusion_3,
        inputs={**INPUTS, "height": 8, "width": 12, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.shifted_flow},
        layout=(1, 2, 3),
        irregular=dict.fromkeys((1, 2), (("uncond", "cond"), ("skip-layers",))),
    ),
    SmallPipeline(
        name="qwen-image",
        make=qwen_image,
        inputs={**INPUTS, "height": 16, "width": 24, "guidance_scale": None, "true_cfg_scale": 3.0},
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.ltx_flow},
        layout=(1, 2, 3),
        told=SHARE,
    ),
    SmallPipeline(
        name="lumina-2",
        make=lumina2,
        inputs={**INPUTS, "height": 32, "width": 48, "max_sequence_length": 64},
        guidance="sequential",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.lumina_flow},
        layout=(1, 2, 3),
        told=UPWARD_SHARE,
        sign=-1,
    ),
    SmallPipeline(
        name="lumina-2-truncated",
        make=lumina2,
        inputs={**INPUTS, "height": 32, "width": 48, "max_sequence_length": 64, "cfg_trunc_ratio": 0.5},
        guidance="sequential",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.lumina_flow},
        layout=(1, 2, 3),
        told=UPWARD_SHARE,
        sign=-1,
        irregular=dict.fromkeys((1, 2), (("cond",),)),
    ),
)
