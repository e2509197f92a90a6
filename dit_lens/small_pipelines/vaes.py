"""Tiny VAEs of the pipelines' own classes: the true compression of each, or less where the pipeline allows it."""

from __future__ import annotations

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
)

from dit_lens.small_pipelines.making import made

CHANNELS = 4
"""Channels of a latent, where nothing fixes them."""


def images(levels: int = 2) -> AutoencoderKL:
    """The VAE of most image models: 2 ** (levels - 1) pixels to a latent."""
    return made(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def deep() -> AutoencoderDC:
    """Sana's: 32 x 32 pixels to a latent."""
    layers = {"layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 6, "block_out_channels": (8,) * 6}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in layers.items()}
    return made(AutoencoderDC, latent_channels=CHANNELS, attention_head_dim=2, **sides)


def qwen() -> AutoencoderKLQwenImage:
    """Qwen-Image's: 4 x 4 pixels to a latent."""
    return made(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )


def hunyuan() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's: 8 x 8 pixels and 4 frames to a latent."""
    return made(
        AutoencoderKLHunyuanVideo,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )


def cogvideox() -> AutoencoderKLCogVideoX:
    """CogVideoX's: 8 x 8 pixels and 4 frames to a latent."""
    return made(
        AutoencoderKLCogVideoX, latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def ltx() -> AutoencoderKLLTXVideo:
    """LTX's: 32 x 32 pixels and 8 frames to a latent."""
    return made(
        AutoencoderKLLTXVideo,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def mochi() -> AutoencoderKLMochi:
    """Mochi's: 8 x 8 pixels and 6 frames to a latent, of 12 channels."""
    return made(
        AutoencoderKLMochi,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
