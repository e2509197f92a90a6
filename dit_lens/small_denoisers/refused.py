"""Classes among diffusers' transformers of which there is no small denoiser, with the reason."""

from __future__ import annotations

NO_DIT: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "a language model that writes the codes of one frame of sound, without latents or timestep",
}
"""By class name: no diffusion transformer, and why."""
