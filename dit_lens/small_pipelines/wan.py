"""Small pipelines of Wan: text to video, image to video with two experts, the 5B form, VACE, and Animate."""

from __future__ import annotations

from typing import Any

from diffusers import (
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

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


FACE = 16
"""Pixels of a face, each way."""


def moving(size: tuple[int, int] = (32, 16)) -> list[Image.Image]:
    """Nine pictures of something that turns: one segment of Animate."""
    return [picture().rotate(10 * number).resize(size) for number in range(9)]


def animate() -> WanAnimatePipeline:
    """A picture is led by videos of a pose and of a face; it lies as a frame before those of the video."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformer = alive(
        WanAnimateTransformer3DModel,
        **sizes(LATENT_CHANNELS + 4 + LATENT_CHANNELS),
        latent_channels=LATENT_CHANNELS,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 4},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=12,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return made(
        WanAnimatePipeline,
        **around(),
        transformer=transformer,
        image_encoder=made(CLIPVisionModel, config=vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    )


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
    SmallPipeline(
        name="wan-animate",
        make=animate,
        inputs={
            **{name: value for name, value in INPUTS.items() if name != "num_frames"},
            "image": picture(),
            "pose_video": moving(),
            "face_video": moving((FACE, FACE)),
            "segment_frame_length": 9,
        },
        guidance="sequential with context",
        branches=("cond", "uncond"),
        prediction="flow",
        schedulers=SCHEDULERS,
        layout=(4, 2, 4),
    ),
)
