"""Small pipelines of image models that read text by cross-attention, or a class: PixArt, Sana, Lumina, DiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)

from dit_lens.plants.parts import TEXT_DIMENSION, TEXT_LENGTH
from dit_lens.small_pipelines import schedules, texts, vaes
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import UPWARD_SHARE, SmallPipeline
from dit_lens.small_pipelines.vaes import CHANNELS

INPUTS = {
    **texts.PROMPTS,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_LENGTH,
    "clean_caption": False,
    "output_type": "latent",
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
"""Width 16."""
EXACT = {"use_resolution_binning": False}
"""The height and width asked for, and not the nearest that the large model was trained on."""


def pixart(kind: Any) -> Any:
    """The text crosses into every block; the output holds a variance too."""
    transformer = alive(
        PixArtTransformer2DModel,
        **HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=TEXT_DIMENSION,
        use_additional_conditions=False,
    )
    return made(
        kind,
        tokenizer=texts.tokenizer(),
        text_encoder=texts.t5(),
        vae=vaes.images(levels=3),
        transformer=transformer,
        scheduler=schedules.epsilon_dpm(),
    )


def pixart_alpha() -> PixArtAlphaPipeline:
    """PixArt-Alpha."""
    return pixart(PixArtAlphaPipeline)


def pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-Sigma."""
    return pixart(PixArtSigmaPipeline)


def sana() -> SanaPipeline:
    """Linear attention on the image, ordinary cross-attention to the text; a token a latent."""
    transformer = alive(
        SanaTransformer2DModel,
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_DIMENSION,
        sample_size=8,
    )
    return made(
        SanaPipeline,
        tokenizer=texts.tokenizer(length=1000),
        text_encoder=texts.gemma2(),
        vae=vaes.deep(),
        transformer=transformer,
        scheduler=schedules.flow_dpm(),
    )


def lumina() -> LuminaPipeline:
    """Attention to the image and, through a gate, to the text; the output holds a variance too."""
    transformer = alive(
        LuminaNextDiT2DModel,
        sample_size=8,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT_DIMENSION,
    )
    torch.nn.init.normal_(transformer.pad_token)  # used by nothing, and diffusers leaves it as the memory was
    return made(
        LuminaPipeline,
        transformer=transformer,
        scheduler=schedules.lumina_flow(),
        vae=vaes.images(levels=4),
        text_encoder=texts.gemma(),
        tokenizer=texts.tokenizer(),
    )


def dit() -> DiTPipeline:
    """A class in place of a text; square, and the output holds a variance too."""
    transformer = alive(
        DiTTransformer2DModel, **HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=2, sample_size=4
    )
    return made(DiTPipeline, transformer=transformer, vae=vaes.images(), scheduler=schedules.epsilon_ddim())


ALL = (
    SmallPipeline(
        name="pixart-alpha",
        make=pixart_alpha,
        inputs={**INPUTS, **EXACT, "height": 16, "width": 24},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="epsilon",
        schedulers={"DPMSolverMultistepScheduler": schedules.epsilon_dpm, "LCMScheduler": schedules.epsilon_lcm},
        layout=(1, 2, 3),
    ),
    SmallPipeline(
        name="pixart-sigma",
        make=pixart_sigma,
        inputs={**INPUTS, **EXACT, "height": 16, "width": 24},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="epsilon",
        schedulers={"DPMSolverMultistepScheduler": schedules.epsilon_dpm},
        layout=(1, 2, 3),
    ),
    SmallPipeline(
        name="sana",
        make=sana,
        inputs={**INPUTS, **EXACT, "height": 64, "width": 96},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="flow",
        schedulers={"DPMSolverMultistepScheduler": schedules.flow_dpm, "FlowMatchEulerDiscreteScheduler": schedules.shifted_flow},
        layout=(1, 2, 3),
    ),
    SmallPipeline(
        name="lumina",
        make=lumina,
        inputs={**INPUTS, "height": 32, "width": 48},
        guidance="batched",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers={"FlowMatchEulerDiscreteScheduler": schedules.lumina_flow},
        layout=(1, 2, 3),
        told=UPWARD_SHARE,
        sign=-1,
    ),
    SmallPipeline(
        name="dit",
        make=dit,
        inputs={"class_labels": [7], "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"},
        guidance="batched",
        branches=("cond", "uncond"),
        prediction="epsilon",
        schedulers={"DDIMScheduler": schedules.epsilon_ddim, "DPMSolverMultistepScheduler": schedules.epsilon_dpm},
        layout=(1, 2, 2),
    ),
)
