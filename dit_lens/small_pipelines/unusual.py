"""Small pipelines that break a habit of the others: Chroma, AuraFlow, Z-Image and HunyuanDiT.

Chroma calls for its branches one after another and says nothing of it. Z-Image hands lists to its denoiser, one sample each,
and its scale counts from the prompt's own answer. HunyuanDiT's later blocks read the earlier ones', and its scheduler adds
noise.
"""

from __future__ import annotations

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from dit_lens.plants import parts
from dit_lens.plants.parts import TEXT_DIMENSION
from dit_lens.small_pipelines import schedules, texts, vaes
from dit_lens.small_pipelines.images import HEADS, INPUTS, ROTARY
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import SHARE, UPWARD_SHARE, SmallPipeline
from dit_lens.small_pipelines.vaes import CHANNELS


def chroma() -> ChromaPipeline:
    """Flux's blocks; one network makes the modulations of all of them from the timestep and the number of the block."""
    transformer = alive(
        ChromaTransformer2DModel,
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=TEXT_DIMENSION,
        axes_dims_rope=ROTARY,
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return made(
        ChromaPipeline,
        scheduler=schedules.sized_flow(),
        vae=vaes.images(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
        transformer=transformer,
    )


def aura_flow() -> AuraFlowPipeline:
    """Joint blocks, then single ones on text and image in one sequence."""
    transformer = alive(
        AuraFlowTransformer2DModel,
        **HEADS,
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=TEXT_DIMENSION,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return made(
        AuraFlowPipeline,
        tokenizer=texts.tokenizer(),
        text_encoder=parts.text_encoder(),
        vae=vaes.images(),
        transformer=transformer,
        scheduler=schedules.shifted_flow(),
    )


def z_image() -> ZImagePipeline:
    """Lumina 2's blocks, on lists; text and image are each padded to a multiple of 32 tokens."""
    transformer = alive(
        ZImageTransformer2DModel,
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIMENSION,
        axes_dims=list(ROTARY),
        axes_lens=[64, 32, 32],
    )
    return made(
        ZImagePipeline,
        scheduler=schedules.sized_flow(),
        vae=vaes.images(),
        text_encoder=texts.qwen3(),
        tokenizer=texts.tokenizer(length=64),
        transformer=transformer,
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    """Cross-attention to the text of two encoders; the last of four blocks reads the first; the output holds a variance."""
    transformer = alive(
        HunyuanDiT2DModel,
        **HEADS,
        in_channels=CHANNELS,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_DIMENSION,
        cross_attention_dim_t5=TEXT_DIMENSION,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=False,
    )
    return made(
        HunyuanDiTPipeline,
        vae=vaes.images(levels=4),
        text_encoder=texts.bert(),
        tokenizer=texts.tokenizer(length=77),
        transformer=transformer,
        scheduler=schedules.v_ddpm(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=texts.t5(),
        tokenizer_2=texts.tokenizer(length=256),
    )


PLAIN = {name: value for name, value in INPUTS.items() if name != "max_sequence_length"}

ALL = (
    SmallPipeline(
        name="chroma",
        make=chroma,
        inputs={**INPUTS, "height": 8, "width": 12},
        guidance="sequential",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sized_flow},
        layout=(1, 2, 3),
        told=SHARE,
    ),
    SmallPipeline(
        name="aura-flow",
        make=aura_flow,
        inputs={**INPUTS, "height": 8, "width": 12},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.shifted_flow},
        layout=(1, 2, 3),
        told=SHARE,
    ),
    SmallPipeline(
        name="z-image",
        make=z_image,
        inputs={**INPUTS, "height": 8, "width": 12},
        guidance="batched",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.sized_flow},
        layout=(1, 2, 3),
        told=UPWARD_SHARE,
        sign=-1,
    ),
    SmallPipeline(
        name="hunyuan-dit",
        make=hunyuan_dit,
        inputs={**PLAIN, "height": 32, "width": 48, "use_resolution_binning": False},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="v_prediction",
        schedulers={"DDPMScheduler": schedules.v_ddpm},
        layout=(1, 2, 3),
    ),
)
