"""A pipeline watched from outside: what its denoisers were asked and answered, and what its scheduler received.

Plain hooks and wrapped methods, and nothing of the library's own clock, so that the two can be held against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.small_pipelines import SmallPipeline


def copied(value: Any) -> Any:
    """A tensor, or a list of them, as it was when it was seen; anything else itself."""
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by name."""
    arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in arguments.items() if name != "self"}


def latents_of(arguments: Mapping[str, Any]) -> Tensor:
    """The latents among a denoiser's arguments, (batch, ...); Z-Image takes a list of samples."""
    return torch.stack(arguments["x"]) if "x" in arguments else arguments["hidden_states"]


def said(output: Any) -> Tensor | list[Tensor]:
    """The tensor in what a denoiser returned; Z-Image returns a list of samples."""
    return output[0] if isinstance(output, tuple) else output.sample


def stacked(samples: Tensor | list[Tensor]) -> Tensor:
    """One tensor, (batch, ...)."""
    return torch.stack(samples) if isinstance(samples, list) else samples


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a denoiser: its attribute, the `cache_context` that it lay in, its arguments by name, its output."""

    expert: str
    context: str | None
    arguments: Mapping[str, Any]
    output: Tensor

    @property
    def latents(self) -> Tensor:
        """What it took, (batch, ...)."""
        return latents_of(self.arguments)

    @property
    def timestep(self) -> Tensor:
        """The timestep as it was told."""
        return self.arguments["t" if "t" in self.arguments else "timestep"]

    def taking(self, latents: Tensor) -> dict[str, Any]:
        """Its arguments with other latents."""
        if "x" in self.arguments:
            return {**self.arguments, "x": list(latents)}
        return {**self.arguments, "hidden_states": latents}


@dataclass
class Watched:
    """One run: calls by step, what the scheduler received (prediction, timestep; sample) and made of it, and the result."""

    steps: list[list[Call]] = field(default_factory=lambda: [[]])
    received: list[tuple[Tensor, float]] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    result: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def calls(self) -> list[Call]:
        """All calls."""
        return [call for step in self.steps for call in step]

    def answers(self, small: SmallPipeline, step: int = 0) -> dict[str, Tensor]:
        """The denoiser's output by branch, where each lies according to the record."""
        return {
            branch: part
            for call, branches in zip(self.steps[step], small.calls(step), strict=True)
            for branch, part in zip(branches, call.output.chunk(len(branches)), strict=True)
        }


def naming(denoiser: Any, contexts: list[str]) -> None:
    """Keep the names of the `cache_context`s that are open."""
    opened = denoiser.cache_context

    @contextmanager
    def context(name: str, **known: Any) -> Iterator[None]:
        contexts.append(name)
        with opened(name, **known):
            yield
        contexts.pop()

    denoiser.cache_context = context


@contextmanager
def watching(pipe: Any, experts: tuple[str, ...]) -> Iterator[Watched]:
    """Write down what happens to the pipeline, which is left as it was."""
    seen = Watched()
    handles = []
    contexts: list[str] = []

    def writing(expert: str) -> Callable[..., None]:
        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kept = {name: copied(value) for name, value in bound(module, args, kwargs).items()}
            seen.steps[-1].append(Call(expert, contexts[-1] if contexts else None, kept, stacked(copied(said(output)))))

        return write

    plain = pipe.scheduler.step

    @wraps(plain)  # pipelines look at its signature: where it takes no generator, they hand it none
    def step(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(plain).bind(*args, **kwargs).arguments
        seen.received.append((arguments["model_output"].clone(), float(arguments["timestep"])))
        seen.samples.append(arguments["sample"].clone())
        seen.steps.append([])
        output = plain(*args, **kwargs)
        seen.made.append(output[0])
        return output

    for expert in experts:
        denoiser = getattr(pipe, expert)
        if hasattr(denoiser, "cache_context"):
            naming(denoiser, contexts)
        handles.append(denoiser.register_forward_hook(writing(expert), with_kwargs=True))
    pipe.scheduler.step = step
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for expert in experts:
            vars(getattr(pipe, expert)).pop("cache_context", None)
        del pipe.scheduler.step
        seen.steps.pop()


def edm_velocity(scheduler: Any, step: int, scaled: Tensor, aim: Tensor) -> Tensor:
    """What a denoiser has to say in the parametrization of Karras et al. 2022 (table 1), with the sign that diffusers gives it.

    It takes the sample divided by the norm of data and noise, and its answer is scaled before it is added to the sample.
    """
    level, data = scheduler.sigmas[step], scheduler.config["sigma_data"]
    norm = (level**2 + data**2).sqrt()
    return ((scaled * norm) * data**2 / norm**2 - aim) * norm / (level * data)


def all_knowing(pipe: Any, small: SmallPipeline, target: Tensor, seen: Watched) -> Callable[..., None]:
    """A hook that lets a denoiser answer what brings every sample to the target, shaped like what the scheduler steps.

    How sample and noise were mixed it has from the scheduler's own tables, and what to say from the record.
    """

    def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        latents = latents_of(bound(module, args, kwargs))[:, : len(target)]  # an image to start from has channels after these
        aim = target.view_as(latents[0])
        step = len(seen.received)
        if "sigma_data" in pipe.scheduler.config:
            right = edm_velocity(pipe.scheduler, step, latents, aim)
        elif small.prediction == "flow":
            level, way = pipe.scheduler.sigmas[step], small.sign
            if pipe.scheduler.config.get("invert_sigmas"):
                level, way = 1 - level, -way
            right = way * (latents - aim) / level.clamp(min=1e-6)  # Z-Image ends with a step at zero, which moves nothing
        else:
            kept = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[step])]
            noise = (latents - kept.sqrt() * aim) / (1 - kept).sqrt()
            right = noise if small.prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * aim
        for told, sample in zip(said(output), right, strict=True):
            told[: len(target)] = sample

    return answer


def watched(small: SmallPipeline, pipe: Any, target: Tensor | None = None, **changes: Any) -> Watched:
    """A run from seed 0 with the inputs of the record, some of them changed; with a target, the denoiser knows it."""
    with watching(pipe, small.experts) as seen:
        handles = []
        if target is not None:
            hook = all_knowing(pipe, small, target, seen)
            handles = [getattr(pipe, name).register_forward_hook(hook, with_kwargs=True, prepend=True) for name in small.experts]
        generator = torch.Generator().manual_seed(0)
        result = pipe(**{**small.inputs, **changes}, generator=generator, return_dict=False)[0]
        for handle in handles:
            handle.remove()
    seen.result = torch.as_tensor(result)
    return seen
