"""Classes among diffusers' transformers of which there is no small denoiser, with the reason."""

from __future__ import annotations

NO_DIT: dict[str, str] = {
    "T5FilmDecoder": "an autoregressive transformer over spectrogram frames, without latents",
}
"""By class name: no diffusion transformer, and why."""
