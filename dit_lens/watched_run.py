"""A pipeline call watched from outside: what its denoisers were asked, and what its scheduler received and made.

Plain hooks and one wrapped method, and nothing of the step clock, so that the two can be held against each other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.taps import replaced_attribute, to_host


@dataclass
class WatchedRun:
    """What was seen.

    Attributes:
        first: the arguments of the first call of each expert, by name. experts: which was called last in each step.
        received: what the scheduler was given of the latents in each step, on the CPU. timesteps: that it was given.
        made: what it made of it at last. returned: by the pipeline, where somebody put it here.
    """

    first: dict[str, dict[str, Any]] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    made: Tensor = field(default_factory=lambda: torch.empty(0))
    returned: Any = None
    expert: str = ""


@contextmanager
def watching(pipe: Any, denoisers: Mapping[str, nn.Module]) -> Iterator[WatchedRun]:
    """Watch a pipeline call; one without a scheduler shows the arguments of its denoisers alone."""
    seen = WatchedRun()
    scheduler = getattr(pipe, "scheduler", None)
    with ExitStack() as attached:
        for expert, denoiser in denoisers.items():

            def before(module: nn.Module, args: Any, kwargs: Any, expert: str = expert) -> None:
                seen.expert = expert
                if expert not in seen.first:
                    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
                    seen.first[expert] = {name: _copied(value) for name, value in bound.items() if name != "self"}

            attached.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
        if scheduler is not None:
            plain = scheduler.step

            # Pipelines look at its signature.
            @functools.wraps(plain)
            def step(*args: Any, **kwargs: Any) -> Any:
                given = inspect.signature(plain).bind(*args, **kwargs).arguments
                seen.experts.append(seen.expert)
                seen.received.append(to_host(given["sample"]))
                seen.timesteps.append(float(given["timestep"]))
                made = plain(*args, **kwargs)
                seen.made = to_host(made[0] if isinstance(made, tuple) else made.prev_sample)
                return made

            attached.enter_context(replaced_attribute(scheduler, "step", step))
        yield seen


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
