"""Inside a block: one call of it, run again, with what every module in it was given and returned, and every call of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_lens.architectures.watching import Call

Added = Callable[[int, Tensor], Tensor]
"""(number of the call of attention, what it returned) -> what it is to return."""


@dataclass(frozen=True, eq=False)
class Returned:
    """A module that returned: its path, its args and kwargs, and its output."""

    name: str
    given: tuple[Any, Any]
    output: Any


@dataclass(frozen=True, eq=False)
class Attended:
    """A call of scaled dot-product attention.

    Attributes:
        name: of the innermost module around it; empty in the block itself. position: how many modules had returned before.
        shapes: of queries, keys and values, (batch, heads, tokens, channels). output: (batch, heads, tokens, channels).
        plain: whether every query sees every key, with the usual scale.
    """

    name: str
    position: int
    shapes: tuple[tuple[int, ...], ...]
    output: Tensor
    plain: bool


@dataclass(eq=False)
class Inside:
    """What happened in one call of a block, in its order."""

    returned: list[Returned] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def output(self, name: str) -> Any:
        """What a module returned the last time."""
        return [event.output for event in self.returned if event.name == name][-1]

    def outputs(self, name: str) -> list[Any]:
        """What a module returned every time."""
        return [event.output for event in self.returned if event.name == name]

    def given(self, name: str) -> Any:
        """What a module was given the last time: args and kwargs."""
        return [event.given for event in self.returned if event.name == name][-1]


class _Attention(TorchFunctionMode):
    """Notes every call of scaled dot-product attention, and lets `added` change what it returns."""

    def __init__(self, inside: Inside, added: Added | None) -> None:
        super().__init__()
        self.inside, self.added = inside, added

    @no_type_check  # it is asked for every operation of a run
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            shapes = tuple(tuple(given[name].shape) for name in ("query", "key", "value"))
            name = self.inside.path[-1] if self.inside.path else ""
            if self.added is not None:
                output = self.added(len(self.inside.attended), output)
            more = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)), **given}
            usual = more.get("scale") in (None, shapes[0][-1] ** -0.5)
            plain = usual and more.get("attn_mask") is None and not more.get("is_causal") and not more.get("dropout_p")
            self.inside.attended.append(Attended(name, len(self.inside.returned), shapes, output, plain))
        return output


def run_inside(call: Call, added: Added | None = None) -> tuple[Inside, Any]:
    """Call a block again as it was called: what happened inside, and what it returned."""
    inside = Inside()
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.given.items() if name != "self"}
    with torch.no_grad(), _hooked(call.block, inside), _Attention(inside, added):
        return inside, call.block(**given)


@contextmanager
def _hooked(block: nn.Module, inside: Inside) -> Iterator[None]:
    handles = []
    for name, module in parts(block):
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.path.append(name)))
            handles.append(module.register_forward_hook(partial(_left, inside, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _left(inside: Inside, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    inside.path.pop()
    inside.returned.append(Returned(name, (args, kwargs), output))


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module by name, itself first; each layer that an adapter (LoRA) was put into as one."""
    adapted: list[str] = []
    for name, part in module.named_modules():
        if name.startswith(tuple(adapted)):
            continue
        if isinstance(getattr(part, "base_layer", None), nn.Module):
            adapted.append(f"{name}." if name else "")
        yield name, part


def is_map(module: nn.Module, kinds: Any = nn.Linear) -> bool:
    """Whether a module is a linear map, or of other kinds; an adapter in it or not."""
    return isinstance(getattr(module, "base_layer", module), kinds)


def returned_tensors(output: Any) -> tuple[Any, ...]:
    """What a module returned, as a tuple."""
    return output if isinstance(output, tuple) else (output,)
