"""A pipeline watched from outside: what its denoisers were asked and answered, and what its scheduler received.

Plain hooks and wrapped methods, and nothing of the library's own clock, so that the two can be held against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
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
    """One run: calls by step, what the scheduler received at each step (prediction, timestep), and the result."""

    steps: list[list[Call]] = field(default_factory=lambda: [[]])
    received: list[tuple[Tensor, float]] = field(default_factory=list)
    result: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def calls(self) -> list[Call]:
        """All calls."""
        return [call for step in self.steps for call in step]

    def answers(self, small: SmallPipeline, step: int = 0) -> dict[str, Tensor]:
        """The denoiser's output by branch, where each lies according to the record."""
        outputs = [call.output for call in self.steps[step]]
        parts = outputs[0].chunk(len(small.branches)) if small.batched else outputs
        return dict(zip(small.branches, parts, strict=True))


@contextmanager
def watching(pipe: Any, experts: tuple[str, ...]) -> Iterator[Watched]:
    """Write down what happens to the pipeline, which is left as it was."""
    seen = Watched()
    handles = []
    contexts: list[str] = []

    def watch(expert: str, denoiser: nn.Module) -> None:
        opened = denoiser.cache_context

        @contextmanager
        def context(name: str, **known: Any) -> Iterator[None]:
            contexts.append(name)
            with opened(name, **known):
                yield
            contexts.pop()

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in bound.items() if name != "self"}
            answer = output[0] if isinstance(output, tuple) else output.sample
            seen.steps[-1].append(Call(expert, contexts[-1] if contexts else None, kept, answer.clone()))

        denoiser.cache_context = context  # pyright: ignore[reportAttributeAccessIssue]
        handles.append(denoiser.register_forward_hook(write, with_kwargs=True))

    plain = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain).bind(*args, **kwargs).arguments
        seen.received.append((bound["model_output"].clone(), float(bound["timestep"])))
        seen.steps.append([])
        return plain(*args, **kwargs)

    for expert in experts:
        watch(expert, getattr(pipe, expert))
    pipe.scheduler.step = step
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for expert in experts:
            del getattr(pipe, expert).cache_context
        del pipe.scheduler.step
        seen.steps.pop()


def watched(small: SmallPipeline, pipe: Any, **changes: Any) -> Watched:
    """A run from seed 0 with the inputs of the record, some of them changed."""
    with watching(pipe, small.experts) as seen:
        generator = torch.Generator().manual_seed(0)
        result = pipe(**{**small.inputs, **changes}, generator=generator, return_dict=False)[0]
    seen.result = torch.as_tensor(result)
    return seen
