"""Taps, bypasses and attentions: where an engine stops during a run, and what it shows there.

Two engines run a pipeline, `tracing` (nnsight) and `hooks` (plain torch). Both run a callable and stop at three kinds of
places. Each time a tapped site is computed, its tensor goes to the tap's visitor, which may return another tensor to take
its place. Each time a block is about to run, a bypass may hand on streams in its place. Each time an attention module
calls scaled dot-product attention, an attention may answer the call. What step or branch it is, each of them asks the
step clock; engines count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Bypass:
    """A way around one block, asked for each time that the block is about to run.

    A block that is bypassed does not run: nothing inside it is visited, while taps on `resid` and `update` see what is
    handed on, and what they replace goes on from there.

    Attributes:
        expert, block: as for a tap.
        instead: called with the streams that the block takes, by name; returns the streams to hand on in its place, by
            name, each of the shape that the block takes it in (one that is left out is handed on as it came), or None to
            let the block run.
    """

    expert: str
    block: int
    instead: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Attention:
    """An answer to the call of scaled dot-product attention in one module, asked for at every call.

    Attributes:
        expert, block: as for a tap.
        site: `attn` or `cross_attn`, the site whose module makes the call.
        attend: called with the queries, keys and values of the call, (batch, tokens, heads, channels), as all taps left
            them; returns the call's output, (batch, query tokens, heads, channels), or None to leave the call alone.
    """

    expert: str
    block: int
    site: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor | None]


@runtime_checkable
class Engine(Protocol):
    """What both engines offer."""

    def call(
        self,
        function: Callable[[], Result],
        taps: Sequence[Tap],
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Result:
        """Run `function`, which calls the pipeline, with all of them in place; nothing of them stays afterwards.

        Whoever gives a module of a denoiser another `forward` for a while does so inside `function`: an engine may keep
        the one that it finds.

        Raises:
            InputError: a site, block or answer that does not fit; two bypasses, or two attentions, that both answer.
        """
        ...


def to_host(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU; every copy off the device goes through here, after all reducing is done."""
    if tensor.is_cuda:
        # Pinned memory is four times as fast, and is kept for the next copy instead of being mapped in anew.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host
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
