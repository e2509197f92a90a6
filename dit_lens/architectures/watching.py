"""Watching: which modules of a denoiser's lists one call goes through, what each is given and what it returns.

Only the outermost lists count (`nn.ModuleList`), as what lies in a block is a part of it. Everything is copied, since some
blocks add to their streams in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

QUERIES = ("to_q", "to_qkv", "qkv", "q_proj", "to_query", "wq")
"""Names of the linear map to queries, which attention has that calls no usual function."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module of a list: what it was given, by parameter, and what it returned.

    `bare` says that it returned one thing and no tuple, `wrote` which of the tensors that it was given it wrote into, and
    `attends` whether it called scaled dot-product attention, or has queries.
    """

    path: str
    block: nn.Module
    given: dict[str, Any]
    returned: tuple[Any, ...]
    bare: bool = True
    wrote: tuple[str, ...] = ()
    attends: bool = False

    def taken(self) -> dict[str, Tensor]:
        """The arguments that can be streams: (batch, tokens, channels)."""
        return {name: value for name, value in self.given.items() if is_stream(value)}


class _Counting(TorchFunctionMode):
    """Counts calls of scaled dot-product attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def has_queries(module: nn.Module) -> bool:
    """Whether a module, or one in it, has a linear map to queries, by its name."""
    return any(hasattr(part, name) for part in module.modules() for name in QUERIES)


class _Enough(Exception):
    """Raised in a hook to leave a forward that has shown what was asked."""


def watched(denoiser: nn.Module, arguments: Mapping[str, Any], until: str = "") -> list[Call]:
    """The calls of modules of lists in their order, or those up to the first one of a list that is then left."""
    calls: list[Call] = []
    with torch.no_grad(), _Counting() as counted, _hooked(denoiser, calls, until, counted), suppress(_Enough):
        denoiser(**arguments)
    return calls


@contextmanager
def _hooked(denoiser: nn.Module, calls: list[Call], until: str, counted: _Counting) -> Iterator[None]:
    """Record calls while the block runs; tensors are copied, as what is added in place later would change them."""
    waiting: dict[nn.Module, dict[str, Any]] = {}
    versions: dict[nn.Module, dict[str, tuple[Tensor, int]]] = {}
    before_it: dict[nn.Module, int] = {}
    handles = []

    def before(path: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        waiting[block] = {name: _copy(value) for name, value in given.items()}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and not value.is_inference()}
        versions[block] = {name: (value, value._version) for name, value in tensors.items()}
        before_it[block] = counted.calls
        if path == until:
            calls.append(Call(path, block, waiting.pop(block), ()))
            raise _Enough

    def after(path: str, block: nn.Module, output: Any) -> None:
        returned = output if isinstance(output, tuple) else (output,)
        wrote = tuple(name for name, (tensor, version) in versions.pop(block).items() if tensor._version != version)
        copies = tuple(_copy(value) for value in returned)
        attends = counted.calls > before_it.pop(block) or has_queries(block)
        calls.append(Call(path, block, waiting.pop(block), copies, not isinstance(output, tuple), wrote, attends))

    for path, block in _listed_modules(denoiser):
        handles.append(
            block.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: before(path, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda module, args, output, path=path: after(path, module, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the outermost lists, with the paths of these."""
    inside: list[str] = []
    for path, module in denoiser.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList):
            inside.append(path)
            yield from ((path, block) for block in module)


def lists(denoiser: nn.Module) -> list[str]:
    """The paths of the outermost lists."""
    return list(dict.fromkeys(path for path, _ in _listed_modules(denoiser)))


def is_stream(value: Any) -> bool:
    """Whether something can be a stream: (batch, tokens, channels)."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
