"""Taps: where an engine stops during a run, and what it shows there.

Two engines run a pipeline, `tracing` (nnsight) and `hooks` (plain torch). Both do one thing only: run a callable and,
each time a tapped site is computed, hand its tensor to the tap's visitor, which may return another tensor to take its
place. What step or branch it is, the visitor asks the step clock; engines count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Tap:
    """One site of one block to visit, every time the block runs.

    Taps of the same place are visited in the order in which they are given; each sees what the ones before it left.

    Attributes:
        expert: the denoiser that holds the block.
        block: its number in execution order.
        site: the name of the site, one of the architecture's.
        visit: called with the site's tensor, (batch, tokens, channels) or (batch, tokens, heads, channels); returns one
            of the same shape to take its place, or None to leave it.
        stream: the token stream.
    """

    expert: str
    block: int
    site: str
    visit: Callable[[Tensor], Tensor | None]
    stream: str = "visual"


@runtime_checkable
class Engine(Protocol):
    """What both engines offer."""

    def call(self, function: Callable[[], Result], taps: Sequence[Tap]) -> Result:
        """Run `function`, which calls the pipeline, with the taps in place; nothing of them stays afterwards."""
        ...


def to_host(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU; every copy off the device goes through here, after all reducing is done."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any):
    """Give one instance an attribute for the length of a `with` block, then leave it exactly as it was."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    # Through __dict__, as nn.Module and ConfigMixin both have a __setattr__ of their own.
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before
