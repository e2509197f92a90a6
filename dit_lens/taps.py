"""Taps: where an engine stops during a run, and what it shows there.

Two engines run a pipeline, `tracing` (nnsight) and `hooks` (plain torch). Both do one thing only: run a callable and,
each time a tapped block runs, hand its streams to the tap's visitor. A visitor sees the streams before and after the
block and may return new streams, which then take the place of the block's own. What step or branch it is, the visitor
asks the step clock; engines count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Streams = Mapping[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tap:
    """One block to visit, every time it runs.

    Attributes:
        expert: the denoiser that holds the block.
        block: its number in execution order.
        needs_before: whether the visitor wants the streams that the block took.
        visit: called with (streams before or None, streams after), each name -> (batch, tokens, channels) tensor; it
            returns the streams to replace by name, or None to leave the block as it is.
    """

    expert: str
    block: int
    needs_before: bool
    visit: Callable[[Streams | None, Streams], Streams | None]


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
