"""Anatomy: which modules of a block are its attention and its MLPs, found by running the block and watching inside.

* Attention is where scaled dot-product attention is called: the innermost module around that call. It is *cross* attention where
  keys come from an argument that is no stream of the block.
* An MLP is what has two linear maps or more, is no attention, and returns tokens.
* Which stream a module's output belongs to is asked of the block: something is added to that output, and the stream that comes
  out changed is the one. What changes several streams, or none, is not offered: it is named as missed.

Names are not asked, but for attention that never calls the usual function (linear attention): there a module with queries, keys
and values of its own is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_lens.architectures.discovery import Stack
from dit_lens.architectures.watching import Call, is_stream
from dit_lens.sites import BLOCK_SITES, Site, attention_sites

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUERIES = ("to_q", "to_qkv", "qkv", "q_proj")


@dataclass(frozen=True)
class Anatomy:
    """What a block of a stack offers, and what was seen in it that no site stands for."""

    sites: tuple[Site, ...]
    missed: tuple[str, ...]


@dataclass(eq=False)
class _Inside:
    """What happened in one call of a block: the modules in the order in which they returned, and where attention was called."""

    returned: list[tuple[str, Any, Any]] = field(default_factory=list)
    attended: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def output(self, name: str) -> Any:
        """What a module returned the last time."""
        return [output for there, _, output in self.returned if there == name][-1]

    def given(self, name: str) -> Any:
        """What a module was given the last time: args and kwargs."""
        return [given for there, given, _ in self.returned if there == name][-1]


class _Attention(TorchFunctionMode):
    """Notes in which module scaled dot-product attention is called."""

    def __init__(self, inside: _Inside) -> None:
        super().__init__()
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.inside.attended.append(self.inside.path[-1] if self.inside.path else "")
        return func(*args, **(kwargs or {}))


def anatomy(stack: Stack, call: Call, tokens: Mapping[str, int]) -> Anatomy:
    """The sites of a stack's blocks.

    Args:
        call: of one of them, as `watching.watched` records it. tokens: how many each stream has.
    """
    block, inside = call.block, _Inside()
    clean = _run(stack, call, tokens, inside)
    names = list(dict.fromkeys(name for name, _, _ in inside.returned))
    attentions = list(dict.fromkeys(name for name in inside.attended if name))
    attentions += [
        name
        for name in names
        if any(hasattr(block.get_submodule(name), part) for part in QUERIES)
        and not any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in attentions)
    ]
    found: list[tuple[int, Site]] = []
    missed: list[str] = []
    for name in names:
        module = block.get_submodule(name)
        if name in attentions:
            kind = "cross_attn" if _crosses(inside, name, clean) else "attn"
        elif _is_mlp(module, name, attentions, inside):
            kind = "mlp"
        else:
            continue
        order, offered = names.index(name), 0
        for item, tensor in enumerate(_tensors(inside.output(name))):
            if not is_stream(tensor):
                continue
            moved = _moved(stack, call, tokens, name, item, clean)
            if len(moved) == 1 or (stack.joined and set(moved) == set(stack.streams)):
                stream = None if stack.joined or len(stack.streams) == 1 else moved[0]
                found.append((order, Site(kind, name, item=item, stream=stream)))
                offered += 1
        if not offered:
            missed.append(name)
        elif kind == "attn" and offered == 1 and len(stack.streams) == 1:
            projection = _projection(block, name, inside)
            if projection and name in inside.attended:
                found += [(order - 1, site) for site in attention_sites(name, projection.removeprefix(f"{name}."))]
    missed += _fused(block, attentions, inside)
    kinds = {(site.name, site.stream) for _, site in found}
    # Two modules of one kind for one stream could not be told apart by their names.
    doubled = [kind for kind in kinds if sum((site.name, site.stream) == kind and not site.per_head for _, site in found) > 1]
    missed += [site.module for _, site in found if (site.name, site.stream) in doubled]
    kept = [(order, site) for order, site in found if (site.name, site.stream) not in doubled]
    return Anatomy((*(site for _, site in sorted(kept, key=lambda pair: pair[0])), *BLOCK_SITES), tuple(missed))


def _fused(block: nn.Module, attentions: list[str], inside: _Inside) -> list[str]:
    """Linear maps outside of attention that take in what attention returned with more beside it: the MLP's hidden units."""
    sizes = [sum(value.numel() for value in _tensors(inside.output(name)) if is_stream(value)) for name in attentions]
    found = []
    for name, (args, _), _ in inside.returned:
        apart = not any(name.startswith(f"{other}.") for other in attentions)
        if apart and _is_map(block.get_submodule(name), nn.Linear) and args and is_stream(args[0]):
            beside = args[0].numel() not in sizes and any(_begins(args[0], inside.output(other)) for other in attentions)
            found += [name] if beside else []
    return found


def _begins(given: Tensor, output: Any) -> bool:
    """Whether the first columns of what a map is given are what attention returned, its streams one after the other."""
    parts = [value for value in _tensors(output) if is_stream(value)]
    whole = [torch.cat(some, dim=1) for some in (parts, parts[::-1])]
    return any(given.shape[:2] == one.shape[:2] and torch.equal(given[..., : one.shape[2]], one) for one in whole)


def _crosses(inside: _Inside, name: str, clean: Mapping[str, Tensor]) -> bool:
    """Whether an attention reads from something else than it writes to: it is given two sequences and returns one."""
    args, kwargs = inside.given(name)
    given = [value for value in (*args, *kwargs.values()) if is_stream(value)]
    returned = [value for value in _tensors(inside.output(name)) if is_stream(value)]
    others = [value for value in given[1:] if value is not given[0]]
    return len(returned) == 1 and any(value.shape[1] != given[0].shape[1] or value.shape == given[0].shape for value in others)


def _is_mlp(module: nn.Module, name: str, attentions: list[str], inside: _Inside) -> bool:
    """Two linear maps or more in a module that has no attention in it and is in none, nor in another such module."""
    if any(name.startswith(f"{other}.") or other.startswith(f"{name}.") or name == other for other in attentions):
        return False
    if sum(_is_map(part, LINEAR) for _, part in _parts(module)) < 2 or not is_stream(inside.output(name)):
        return False
    parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
    returned = {there: output for there, _, output in inside.returned}
    return not any(parent in returned and _is_mlp_alone(parent, attentions, returned) for parent in parents)


def _is_mlp_alone(parent: str, attentions: list[str], returned: Mapping[str, Any]) -> bool:
    """Whether a parent is itself such a module."""
    return is_stream(returned[parent]) and not any(other.startswith(f"{parent}.") for other in attentions)


def _projection(block: nn.Module, name: str, inside: _Inside) -> str:
    """The last linear map in an attention: that of its heads' outputs."""
    maps = [
        there
        for there, _, _ in inside.returned
        if there.startswith(f"{name}.") and _is_map(block.get_submodule(there), nn.Linear)
    ]
    return maps[-1] if maps else ""


def _moved(stack: Stack, call: Call, tokens: Mapping[str, int], name: str, item: int, clean: Mapping[str, Tensor]) -> list[str]:
    """The streams that change when something is added to one of the tensors that a module returns."""

    def added(module: nn.Module, args: Any, output: Any) -> Any:
        tensors = _tensors(output)
        changed = tuple(tensor + 1.5 if place == item else tensor for place, tensor in enumerate(tensors))
        return changed if isinstance(output, tuple) else changed[0]

    handle = call.block.get_submodule(name).register_forward_hook(added)
    try:
        after = _run(stack, call, tokens, _Inside())
    finally:
        handle.remove()
    return [stream for stream, tensor in clean.items() if not torch.equal(tensor, after[stream])]


def _run(stack: Stack, call: Call, tokens: Mapping[str, int], inside: _Inside) -> dict[str, Tensor]:
    """The streams that a block returns, when it is called again as it was."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.given.items() if name != "self"}
    with torch.no_grad(), _hooked(call.block, inside), _Attention(inside):
        output = call.block(**given)
    returned = [_tensors(output)[place] for place in stack.places]
    if not stack.joined:
        return dict(zip(stack.streams, returned, strict=True))
    return dict(zip(stack.streams, returned[0].split([tokens[stream] for stream in stack.streams], dim=1), strict=True))


@contextmanager
def _hooked(block: nn.Module, inside: _Inside) -> Iterator[None]:
    handles = []
    for name, module in _parts(block):
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.path.append(name)))

            def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                inside.path.pop()
                inside.returned.append((name, (args, kwargs), output))

            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block by name, each layer that an adapter (LoRA) was put into as one."""
    adapted: list[str] = []
    for name, part in module.named_modules():
        if name.startswith(tuple(adapted)):
            continue
        if isinstance(getattr(part, "base_layer", None), nn.Module):
            adapted.append(f"{name}." if name else "")
        yield name, part


def _is_map(module: nn.Module, kinds: Any) -> bool:
    """Whether a module is a linear map, an adapter in it or not."""
    return isinstance(getattr(module, "base_layer", module), kinds)
