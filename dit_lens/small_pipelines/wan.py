"""Small pipelines of Wan: text to video, image to video with two experts, the 5B form, and VACE."""

from __future__ import annotations

from typing import Any

from diffusers import (
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image

from dit_lens.plants import parts
from dit_lens.plants.parts import LATENT_CHANNELS, TEXT_DIMENSION, TEXT_LENGTH
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import SmallPipeline
from dit_lens.small_pipelines.schedules import flow_unipc, shifted_flow
from dit_lens.small_pipelines.texts import PROMPTS

BOUNDARY = 0.8
"""Where the second expert takes over, as a share of the timesteps: within three steps with either scheduler."""
INPUTS = {
    **PROMPTS,
    "height": 16,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_LENGTH,
    "output_type": "latent",
}
SCHEDULERS = {"UniPCMultistepScheduler": flow_unipc, "FlowMatchEulerDiscreteScheduler": shifted_flow}


def picture() -> Image.Image:
    """A red picture with a white corner, as large as a frame."""
    image = Image.new("RGB", (32, 16), (200, 30, 30))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    return image


def sizes(in_channels: int) -> dict[str, Any]:
    """Two blocks of width 16."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": in_channels,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIMENSION,
        "freq_dim": 8,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }


def denoiser(in_channels: int = LATENT_CHANNELS) -> WanTransformer3DModel:
    """One expert."""
    return alive(WanTransformer3DModel, **sizes(in_channels))


def around() -> dict[str, Any]:
    """What stands around a denoiser of Wan's."""
    return {
        "tokenizer": parts.tokenizer(),
        "text_encoder": parts.text_encoder(),
        "vae": parts.vae(),
        "scheduler": flow_unipc(),
    }


def text_to_video() -> WanPipeline:
    """One expert, text only."""
    return made(WanPipeline, **around(), transformer=denoiser())


def text_two_experts() -> WanPipeline:
    """Two experts, text only."""
    return made(WanPipeline, **around(), transformer=denoiser(), transformer_2=denoiser(), boundary_ratio=BOUNDARY)


def image_to_video() -> WanImageToVideoPipeline:
    """Two experts; the image and its mask come as channels of every call."""
    taken = LATENT_CHANNELS + 4 + LATENT_CHANNELS
    experts = {"transformer": denoiser(taken), "transformer_2": denoiser(taken)}
    return made(WanImageToVideoPipeline, **around(), **experts, boundary_ratio=BOUNDARY)


def expanded() -> WanPipeline:
    """The 5B form from text: every token has a timestep of its own, all alike."""
    return made(WanPipeline, **around(), transformer=denoiser(), expand_timesteps=True)


def expanded_image() -> WanImageToVideoPipeline:
    """The 5B form from an image: it takes the place of the first latent frame, at timestep 0."""
    return made(WanImageToVideoPipeline, **around(), transformer=denoiser(), expand_timesteps=True)


def vace() -> WanVACEPipeline:
    """The control branch: inactive and reactive video, and a mask of 4 x 4 pixels a latent."""
    control = {"vace_layers": [0], "vace_in_channels": 2 * LATENT_CHANNELS + 16}
    transformer = alive(WanVACETransformer3DModel, **sizes(LATENT_CHANNELS), **control)
    return made(WanVACEPipeline, **around(), transformer=transformer)


ALL = (
    SmallPipeline(
        name="wan",
        make=text_to_video,
        inputs=INPUTS,
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
    ),
    SmallPipeline(
        name="wan-two-experts",
        make=text_two_experts,
        inputs=INPUTS,
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
        experts=("transformer", "transformer_2"),
    ),
    SmallPipeline(
        name="wan-image-two-experts",
        make=image_to_video,
        inputs={**INPUTS, "image": picture()},
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
        experts=("transformer", "transformer_2"),
    ),
    SmallPipeline(
        name="wan-5b",
        make=expanded,
        inputs=INPUTS,
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
    ),
    SmallPipeline(
        name="wan-5b-image",
        make=expanded_image,
        inputs={**INPUTS, "image": picture()},
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
    ),
    SmallPipeline(
        name="wan-vace",
        make=vace,
        inputs=INPUTS,
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(3, 2, 4),
    ),
)
