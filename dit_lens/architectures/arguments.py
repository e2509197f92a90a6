"""The arguments of a denoiser: which of them are the latents, and which a text; and others in their place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.errors import InputError

WORDS = ("encoder_hidden_states", "text", "txt", "prompt", "caption", "cap_", "context", "input_ids", "words")
"""In the names of arguments that are a text, where several arguments move tokens."""


class Undecided(InputError):
    """The blocks of a denoiser cannot be told by watching it; a record must say what they are."""


def latents_of(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str:
    """The first parameter of a denoiser that can take latents."""
    names = inspect.signature(type(denoiser).forward).parameters
    found = next((name for name in names if is_movable(arguments.get(name))), "")
    if not found:
        raise Undecided(f"a {type(denoiser).__name__} takes no latents, as (batch, channels, ...); describe it with a record")
    return found


def spoken_arguments(denoiser: nn.Module, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that are a text: those that are called so, or all but the latents where none is."""
    latents = latents_of(denoiser, arguments)
    others = [name for name, value in arguments.items() if name != latents and is_movable(value, name)]
    return [name for name in others if any(word in name for word in WORDS)] or others


def is_movable(value: Any, name: str = "") -> bool:
    """Whether an argument holds latents or embeddings: numbers in at least two axes, beside the batch or in a list.

    Or tokens of a text as whole numbers, under the name that says so.
    """
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(one, Tensor) and one.is_floating_point() and one.ndim > 1 for one in value)
    if isinstance(value, Tensor) and "input_ids" in name:
        return value.ndim == 2
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3


def other_than(value: Any) -> Any:
    """Another value of the same shape, different everywhere; of whole numbers, the same ones elsewhere."""
    if isinstance(value, (list, tuple)):
        return type(value)(other_than(one) for one in value)
    if not value.is_floating_point():
        return value.roll(1, dims=-1)
    noise: Tensor = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value + 1 + noise
