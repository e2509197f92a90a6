"""Arguments for a first run of any pipeline, chosen from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw

from dit_lens.errors import InputError, listed

STEPS = 3
"""Denoising steps of a check's runs: a first, a last and one between."""
CHOSEN = {
    "prompt": "the red ball rolls to the left of a blue cube",
    "negative_prompt": "a green cube on the right",
    "class_labels": [1],
    "num_inference_steps": STEPS,
}
SHOWN = ("ToVideo", "Edit", "Img2Img", "Kontext")
"""In the names of pipelines that start from an image, also where their signature lets it be left out."""


def first_inputs(pipe: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A prompt, a class and a picture where the pipeline takes them, a few steps, its own sizes; what is given goes first.

    Raises:
        InputError: the pipeline needs more than that.
    """
    given = dict(given or {})
    parameters = inspect.signature(type(pipe).__call__).parameters
    embedded = {name.removesuffix("_embeds") for name in given if name.endswith("prompt_embeds")}
    found = {name: value for name, value in CHOSEN.items() if name in parameters and name not in embedded}
    if "image" in parameters and (_needed(parameters["image"]) or _starts_from_an_image(type(pipe).__name__)):
        found["image"] = picture()
    found |= given
    missing = [name for name, parameter in parameters.items() if name != "self" and _needed(parameter) and name not in found]
    if missing:
        raise InputError(f"a {type(pipe).__name__} needs {listed(missing)}: give it, as in lens.check({missing[0]}=...)")
    return found


def picture(size: int = 256) -> Image.Image:
    """A red disc beside a blue square."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((size // 8, size // 4, size // 2, 5 * size // 8), fill=(200, 30, 30))
    draw.rectangle((5 * size // 8, size // 2, 7 * size // 8, 3 * size // 4), fill=(30, 30, 200))
    return image


def _needed(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _starts_from_an_image(name: str) -> bool:
    return any(word in name for word in SHOWN) and not name.startswith("TextToVideo")
