"""Calls of a denoiser: one call as a pipeline made it, kept so that it can be made again.

All that a denoiser depends on is in its arguments, so a call that was kept can be made again without the pipeline: no
text is encoded, no other step runs. Here is what a call is made of, and in which form a denoiser returns its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dit_lens.errors import InputError

LATENTS = "hidden_states"
"""The parameter of a denoiser's `forward` that takes the latents, in all of diffusers."""
TEXT = "encoder_hidden_states"
"""The one that takes the text, in nearly all."""


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of a denoiser, with its arguments on the model's device.

    Attributes:
        expert, step, branch: which call it was.
        args, kwargs: its arguments. Tensors are the pipeline's own, detached and not copied: the two branches of a step
            share their latents, and all steps the text.
        latents: what the scheduler received at this step, on the CPU (the denoiser may take more, or another dtype).
        weights: (a, b) of x0-hat = a * latents + b * output, or None where there is no x0-hat.
        levels: the timesteps and the sigmas of all steps of the run that made the call.
        versions: how often each tensor among the arguments had been written to when the call was made.
        seeds, prompts: the seed of each row, and the number of its prompt (see `Moment`).
    """

    expert: str
    step: int
    branch: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    latents: Float[Tensor, "batch channels frames height width"] = field(repr=False)
    weights: tuple[float, float] | None = field(repr=False)
    levels: tuple[tuple[float, ...], tuple[float, ...]] = field(repr=False)
    versions: tuple[int, ...] = field(repr=False)
    seeds: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()

    @property
    def timestep(self) -> float:
        """The timestep of its step."""
        return self.levels[0][self.step]

    @property
    def sigma(self) -> float:
        """The noise level of its step."""
        return self.levels[1][self.step]

    def check_unchanged(self) -> None:
        """Raise an InputError when something wrote into a tensor of the call after it was made.

        No pipeline known does: Wan makes its latents anew at each step, as the scheduler returns a new tensor and the
        image is concatenated to it. Torch counts the writes to a tensor, which is cheaper to look at than a copy.
        """
        if versions(self.args, self.kwargs) != self.versions:
            raise InputError(
                f"something wrote into the tensors of the call at step {self.step}, {self.branch}, after it was made, so"
                " that it cannot be made again; run with keep_calls=True once more and leave them as they are"
            )

    @property
    def taken(self) -> Tensor:
        """What the denoiser took: (batch, channels, frames, height, width), with the channels of an image to start from."""
        return self.kwargs[LATENTS] if LATENTS in self.kwargs else self.args[0]

    def taking(self, latents: Tensor) -> DenoiserCall:
        """The same call with other latents for the denoiser to take."""
        if LATENTS in self.kwargs:
            return replace(self, kwargs={**self.kwargs, LATENTS: latents})
        return replace(self, args=(latents, *self.args[1:]))


def taken_latents(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The latents that a call hands to the denoiser, (batch, channels, frames, height, width)."""
    if LATENTS in kwargs:
        return kwargs[LATENTS]
    return inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments[LATENTS]


def text_length(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many text tokens a call hands to the denoiser, padding included; None where it hands none."""
    bound = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    text = bound.get(TEXT)
    return text.shape[1] if isinstance(text, Tensor) else None


def detached(value: Any) -> Any:
    """A tensor without its graph, sharing storage and version; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How often each tensor among the arguments was written to; tensors of inference mode do not count."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def sample_of(output: Any) -> Tensor:
    """The tensor in what a denoiser returned."""
    return output[0] if isinstance(output, tuple) else output.sample


def returned(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sample: Tensor) -> Any:
    """A tensor in the form in which the denoiser returns its output for these arguments."""
    bound = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    if not kwargs.get("return_dict", bound.get("return_dict", True)):
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
