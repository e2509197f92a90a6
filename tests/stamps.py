"""A pipeline watched from outside: what its denoisers were asked and answered, and what its scheduler received.

Plain hooks and wrapped methods, and nothing of the library's own clock, so that the two can be held against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.small_pipelines import SmallPipeline


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a denoiser: its attribute, the `cache_context` that it lay in, its arguments by name, its output."""

    expert: str
    context: str | None
    arguments: Mapping[str, Any]
    output: Tensor

    @property
    def latents(self) -> Tensor:
        """What it took."""
        return self.arguments["hidden_states"]


@dataclass
class Watched:
    """One run: calls by step, what the scheduler received (prediction, timestep) and made of it, and the result."""

    steps: list[list[Call]] = field(default_factory=lambda: [[]])
    received: list[tuple[Tensor, float]] = field(default_factory=list)
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


@contextmanager
def watching(pipe: Any, experts: tuple[str, ...]) -> Iterator[Watched]:
    """Write down what happens to the pipeline, which is left as it was."""
    seen = Watched()
    handles = []
    contexts: list[str] = []

    def tell(denoiser: Any) -> None:
        opened = denoiser.cache_context

        @contextmanager
        def context(name: str, **known: Any) -> Iterator[None]:
            contexts.append(name)
            with opened(name, **known):
                yield
            contexts.pop()

        denoiser.cache_context = context

    def watch(expert: str, denoiser: nn.Module) -> None:
        if hasattr(denoiser, "cache_context"):
            tell(denoiser)

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            kept = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in bound.items() if name != "self"
            }
            answer = output[0] if isinstance(output, tuple) else output.sample
            seen.steps[-1].append(Call(expert, contexts[-1] if contexts else None, kept, answer.clone()))

        handles.append(denoiser.register_forward_hook(write, with_kwargs=True))

    plain = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain).bind(*args, **kwargs).arguments
        seen.received.append((bound["model_output"].clone(), float(bound["timestep"])))
        seen.steps.append([])
        output = plain(*args, **kwargs)
        seen.made.append(output[0])
        return output

    for expert in experts:
        watch(expert, getattr(pipe, expert))
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


def all_knowing(pipe: Any, small: SmallPipeline, target: Tensor, seen: Watched) -> Callable[..., None]:
    """A hook that lets a denoiser answer what brings every sample to the target, (channels, ...) or (tokens, channels).

    How sample and noise were mixed it has from the scheduler's own tables, and what to say from the record.
    """

    def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        said = output[0] if isinstance(output, tuple) else output.sample
        latents = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments["hidden_states"]
        latents = latents[:, : len(target)]  # an image to start from has channels after these
        step = len(seen.received)
        if small.prediction == "flow":
            level, way = pipe.scheduler.sigmas[step], small.sign
            if pipe.scheduler.config.get("invert_sigmas"):
                level, way = 1 - level, -way
            right = way * (latents - target) / level
        else:
            kept = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[step])]
            noise = (latents - kept.sqrt() * target) / (1 - kept).sqrt()
            right = noise if small.prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * target
        said[:, : len(target)] = right

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
