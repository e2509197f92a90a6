"""Latents as video, as the pipeline itself decodes them at its end, and video as latents."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.errors import InputError
from dit_lens.taps import to_host

DECODED_LATENTS = 2**18
"""How many latent positions (rows x frames x height x width) an accelerator decodes at a time."""
ENCODED_PIXELS = 2**23
"""How many pixels (rows x frames x height x width) an accelerator encodes at a time."""


def decode(
    pipe: Any, latents: Float[Tensor, ...], rows: int | None = None
) -> Float[Tensor, "*batch video_frames video_height video_width 3"]:
    """Latents of (..., channels, frames, height, width) as video in [0, 1]; as `Lens.decode`.

    Raises:
        InputError: the pipeline has no VAE, or its latents are scaled otherwise than by a mean and a deviation of each channel.
    """
    mean, std = _scale(pipe, latents.ndim)
    vae, leading = pipe.vae, latents.shape[:-4]
    if rows is None:
        rows = 8 if mean.device.type == "cpu" else max(1, DECODED_LATENTS // latents[..., 0, :, :, :].shape[-3:].numel())
    videos = []
    with torch.no_grad():
        for chunk in latents.flatten(0, -5).split(rows) if leading else [latents[None]]:
            # Divided by the inverse, as the pipeline does it: another order rounds differently.
            scaled = chunk.to(mean.device, vae.dtype) / (1.0 / std) + mean
            decoded = vae.decode(scaled, return_dict=False)[0]
            frames = pipe.video_processor.postprocess_video(decoded, output_type="pt")
            videos.append(to_host(frames.movedim(2, -1)))
    return torch.cat(videos).unflatten(0, leading) if leading else torch.cat(videos)[0]


def encode(
    pipe: Any, video: Float[Tensor, "batch frames height width 3"]
) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
    """Videos in [0, 1] as latents, scaled as the denoiser sees them: the most likely ones, on the CPU; as `Lens.encode`.

    Raises:
        InputError: as of `decode`.
    """
    mean, std = _scale(pipe)
    rows = 8 if mean.device.type == "cpu" else max(1, ENCODED_PIXELS // video[0, ..., 0].numel())
    found = []
    with torch.no_grad():
        for chunk in video.split(rows):
            pixels = 2 * chunk.movedim(-1, 1).to(mean.device, pipe.vae.dtype) - 1
            found.append(to_host((pipe.vae.encode(pixels).latent_dist.mode() - mean) / std))
    return torch.cat(found)


def _scale(pipe: Any, dimensions: int = 5) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of a pipeline's latents, where these are all that scales them."""
    vae: Any = getattr(pipe, "vae", None)
    if vae is None:
        raise InputError(
            f"a {type(pipe).__name__} has no vae to decode with; look at the latents themselves, as of run.x0_hat(...)"
        )
    statistics = [getattr(vae, "config", {}).get(name) for name in ("latents_mean", "latents_std")]
    known = all(statistics) and getattr(vae, "config", {}).get("scaling_factor") in (None, 1) and hasattr(pipe, "video_processor")
    if not known or dimensions < 4:
        raise InputError(
            f"latents of a {type(pipe).__name__} cannot be decoded alone, only those of videos that the VAE scales by its"
            " latents_mean and latents_std and by nothing else; what the pipeline decodes at its end is in Run.video"
        )
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(pipe._execution_device, vae.dtype) for values in statistics)
    return mean, std
