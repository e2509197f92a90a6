"""Classes among diffusers' transformers of which there is no small denoiser, with the reason."""

from __future__ import annotations

NO_DIT: dict[str, str] = {
    "DreamLiteTransformer2DModel": "a layer of a UNet, which is not told the timestep",
    "MiniMaxMusic3RVQDepthDecoder": "a language model that writes the codes of one frame of sound, without latents or timestep",
    "TransformerTemporalModel": "a layer of UNets for videos, which mixes the frames of one place and is not told the timestep",
}
"""By class name: no diffusion transformer, and why."""
