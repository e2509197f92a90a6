"""Calls of a denoiser: one call as a pipeline made it, kept so that it can be made again.

All that a denoiser depends on is in its arguments, so a call that was kept can be made again without the pipeline: no
text is encoded, no other step runs. Here is what a call is made of, and in which form a denoiser returns its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_lens.errors import InputError

LATENTS = "hidden_states"
"""The parameter of a denoiser's `forward` that takes the latents, in nearly all of diffusers."""


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
        shared: the branches whose rows the call holds, one after the other: `branch` alone, or those of batched guidance.
        parameter: the one of the denoiser's `forward` that takes the latents, its first.
        seeds, prompts: the seed of each row of a branch, and the number of its prompt (see `Moment`).
        held: latent frames that are no latents of the scheduler's, as of an image to start from (see `Run`).
    """

    expert: str
    step: int
    branch: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    latents: Float[Tensor, "batch ..."] = field(repr=False)
    weights: tuple[float, float] | None = field(repr=False)
    levels: tuple[tuple[float, ...], tuple[float, ...]] = field(repr=False)
    versions: tuple[int, ...] = field(repr=False)
    shared: tuple[str, ...] = ()
    parameter: str = LATENTS
    seeds: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    held: tuple[int, ...] = ()

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
        """What the denoiser took: (batch, channels, *space), with the rows of all branches that share the call, and the
        channels of an image to start from."""
        return self.kwargs[self.parameter] if self.parameter in self.kwargs else self.args[0]

    def taking(self, latents: Tensor) -> DenoiserCall:
        """The same call with other latents for the denoiser to take."""
        if self.parameter in self.kwargs:
            return replace(self, kwargs={**self.kwargs, self.parameter: latents})
        return replace(self, args=(latents, *self.args[1:]))


def detached(value: Any) -> Any:
    """A tensor without its graph, sharing storage and version; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How often each tensor among the arguments was written to; tensors of inference mode do not count."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def sample_of(output: Any) -> Tensor:
    """The tensor in what a denoiser returned, (batch, channels, *space); lists of samples as one tensor."""
    found = output if isinstance(output, Tensor) else output[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def in_form_of(sample: Tensor, output: Tensor) -> Tensor:
    """A denoiser's output in the form of the latents that the scheduler takes.

    Without the second half of its channels, where it predicts a variance beside the mean, and without axes of length one.

    Raises:
        InputError: it has another form.
    """
    rows = len(output)
    if output.shape[1:] == sample.shape[1:]:
        return output
    if output.numel() // rows == sample.numel() // len(sample):
        return output.reshape(rows, *sample.shape[1:])
    if output.shape[1] == 2 * sample.shape[1] and output.shape[2:] == sample.shape[2:]:
        return output.chunk(2, dim=1)[0]
    raise InputError(
        f"the denoiser returns {tuple(output.shape)}, and the scheduler's latents are {tuple(sample.shape)}: how one follows from"
        " the other is not known"
    )


def with_variance(denoiser: nn.Module, output: Tensor) -> Tensor:
    """An output in the form of latents as the denoiser returns it: with zeros for a variance that it predicts beside the mean.

    No scheduler that is known here takes one, and pipelines drop it.
    """
    doubled = output.ndim > 3 and vars(denoiser).get("out_channels") == 2 * output.shape[1]
    return torch.cat([output, torch.zeros_like(output)], dim=1) if doubled else output


def held_frames(sample: Tensor, taken: Tensor) -> tuple[int, ...]:
    """The latent frames in which a denoiser takes something else than the scheduler's latents, which it takes in the others.

    None where it takes all of them, or none as they are: scaled, with further channels, or in another form.
    """
    if sample.ndim != 5 or sample.shape != taken.shape:
        return ()
    same = (sample.to(taken) == taken).transpose(1, 2).flatten(2).all(dim=2).all(dim=0).tolist()
    return tuple(frame for frame, one in enumerate(same) if not one) if any(same) else ()


def returned(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sample: Tensor) -> Any:
    """A tensor in the form in which the denoiser returns its output for these arguments."""
    bound = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    if not kwargs.get("return_dict", bound.get("return_dict", True)):
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
