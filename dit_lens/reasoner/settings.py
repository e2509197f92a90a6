"""The settings that every figure of the bundled model depends on, in one place."""

from __future__ import annotations

from typing import Any

CALL: dict[str, Any] = {
    "negative_prompt": "",
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "max_sequence_length": 64,
}
"""The pipeline's keyword arguments at the bundled model's default settings (`max_sequence_length` is what it was trained with:
Wan pads the text with zeros and attends to them unmasked)."""

SHIFT = 3.0
"""The sigma shift of the scheduler, in training and in sampling."""
