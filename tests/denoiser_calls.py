"""Watching small denoisers with plain hooks of torch, and calling their blocks and modules again, alone and changed.

Nothing here knows dit_lens.architectures: what that finds is tested against what is held to be true here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dit_lens.small_denoisers import DENOISERS, Blocks, SmallDenoiser, denoiser


@dataclass(frozen=True)
class Call:
    """One call of a block: its list, its place there, what it was given (as it was then) and what it returned."""

    path: str
    index: int
    block: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    returned: Any

    def leaves(self) -> list[Any]:
        """All that it was given, one after the other."""
        return tree_leaves((self.arguments, self.named))

    def again(self) -> Any:
        """The block, called alone."""
        with torch.no_grad():
            return self.block(*copied(self.arguments), **copied(self.named))


@dataclass(frozen=True)
class Part:
    """A stated module in one call of its block: the streams it works for, what it was given and returned, in which turn."""

    blocks: Blocks
    call: Call
    site: str
    path: str
    streams: tuple[str, ...]
    module: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    returned: Any
    turn: int

    def again(self, places: Callable[[Tensor], Tensor]) -> list[Any]:
        """All that the module returns, called alone with something added at places of what it was given."""
        with torch.no_grad():
            values, named = moved(copied(self.given), places)
            return tree_leaves(self.module(*values, **named))


@dataclass(frozen=True)
class Held:
    """Where a stream is among several tensors: in which of them, how many tokens that has, and which of these are its own."""

    index: int
    tokens: int
    place: slice
    alone: bool


def copied(value: Any) -> Any:
    """With tensors of its own, in whatever holds them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def moved(value: Any, places: Callable[[Tensor], Tensor] = torch.ones_like) -> Any:
    """A tensor, or several, with something added where `places` is one; without places, indices become others of them."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
            return leaf + noise.to(leaf.dtype) * places(leaf)
        indices = places is torch.ones_like and leaf.dtype in (torch.int32, torch.int64)
        return (leaf + 1) % (leaf.max() + 1) if indices else leaf

    return tree_map(move, value)


def result(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """What a denoiser answers, as (rows, numbers)."""
    asked = {"return_dict": False} if "return_dict" in inspect.signature(type(model).forward).parameters else {}
    with torch.no_grad():
        answer = model(**copied(dict(arguments)), **asked)
    return torch.stack([row.flatten() for row in (answer if isinstance(answer, Tensor) else answer[0])])


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Each denoiser once."""
    return denoiser(name)


def main(small: SmallDenoiser) -> str:
    """The stream that is denoised: pictures, or, where there are none, sound."""
    return "visual" if "visual" in small.tokens else "audio"


@cache
def rows(name: str) -> int:
    """Of the call of a denoiser."""
    return len(result(*built(name)))


def watched(small: SmallDenoiser, **changes: Any) -> list[Call]:
    """Every call of a module of the stated lists, in order."""
    model, arguments = built(small.name)
    seen, given, handles = [], [], []
    for path in dict.fromkeys(blocks.path for blocks in small.blocks):
        for index, block in enumerate(model.get_submodule(path).children()):

            def before(_: nn.Module, values: Any, named: Any) -> None:
                given.append((copied(values), copied(named)))

            def after(module: nn.Module, _: Any, output: Any, path: str = path, index: int = index) -> None:
                values, named = given.pop()
                seen.append(Call(path, index, module, values, named, copied(output)))

            handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        result(model, {**arguments, **changes})
    finally:
        for handle in handles:
            handle.remove()
    return seen


def stated(small: SmallDenoiser) -> list[tuple[Blocks, int]]:
    """Every block that should run, in order; where a list is named again, it goes on where it stopped."""
    begun: dict[str, int] = {}
    found = []
    for blocks in small.blocks:
        start = begun.get(blocks.path, 0)
        found += [(blocks, index) for index in range(start, start + blocks.count)]
        begun[blocks.path] = start + blocks.count
    return found


@cache
def calls(name: str) -> list[tuple[Blocks, Call]]:
    """The calls of the stated blocks, each with what is stated of it."""
    return [(blocks, call) for (blocks, _), call in zip(stated(DENOISERS[name]), watched(DENOISERS[name]), strict=True)]


def sequence(small: SmallDenoiser, value: Any, tokens: int) -> Tensor | None:
    """As (rows, tokens, channels), if it is a tensor of that many tokens a row.

    Tokens may come first, in several axes, or as a picture behind the channels.
    """
    number = rows(small.name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if value.ndim == 3 and value.shape[:2] == (tokens, number):
        return value.transpose(0, 1)
    if value.ndim == 4 and value.shape[0] == number and value.shape[2:].numel() == tokens:
        return value.flatten(2).mT
    fits = value.shape[:-1].numel() == number * tokens and value.shape[0] % number == 0
    return value.reshape(number, tokens, -1) if fits else None


def at(small: SmallDenoiser, value: Tensor, tokens: int, place: slice) -> Tensor:
    """One at some of the tokens of a tensor, zero elsewhere."""
    where = torch.zeros(value.shape)
    view = sequence(small, where, tokens)
    assert view is not None
    view[:, place] = 1
    return where


def ranges(small: SmallDenoiser, blocks: Blocks) -> dict[str, slice]:
    """Where the streams of a joined sequence lie."""
    ends = [0, *accumulate(small.tokens[stream] for stream in blocks.streams)]
    return {stream: slice(*pair) for stream, pair in zip(blocks.streams, pairwise(ends), strict=True)}


def total(small: SmallDenoiser, blocks: Blocks) -> int:
    """Tokens of all streams."""
    return sum(small.tokens[stream] for stream in blocks.streams)


def streams(small: SmallDenoiser, blocks: Blocks, returned: Any) -> dict[str, Tensor | None]:
    """The streams of a return value by their stated places; none where a block drops one."""
    items = returned if isinstance(returned, tuple | list) else (returned,)
    if blocks.joined:
        whole = sequence(small, items[0], total(small, blocks))
        assert whole is not None, f"{blocks.path} returns {items[0].shape}, not {total(small, blocks)} tokens"
        return {stream: whole[:, place] for stream, place in ranges(small, blocks).items()}
    found = {}
    for stream, item in zip(blocks.streams, items, strict=False):
        found[stream] = sequence(small, item, small.tokens[stream])
        assert item is None or found[stream] is not None, f"{blocks.path} returns {item.shape} for {stream}"
    assert set(found) == set(blocks.streams)
    return found


def differing(one: Tensor | None, other: Tensor | None, tolerance: float = 0.0) -> set[int]:
    """Tokens that differ in any row, of two sequences."""
    assert one is not None
    assert other is not None
    return set(((one - other).abs() > tolerance).any(dim=-1).any(dim=0).nonzero().flatten().tolist())


def entered(small: SmallDenoiser, first: Call, second: Call) -> dict[str, set[int]]:
    """For each stream of the first block, the tokens that differ between two calls of it, before it has run."""
    blocks = small.blocks[0]
    found: dict[str, set[int]] = {stream: set() for stream in blocks.streams}
    for one, other in zip(first.leaves(), second.leaves(), strict=True):
        if blocks.joined:
            if (whole := sequence(small, one, total(small, blocks))) is not None:
                changed = differing(whole, sequence(small, other, total(small, blocks)))
                for stream, place in ranges(small, blocks).items():
                    found[stream] |= {token - place.start for token in changed if place.start <= token < place.stop}
            continue
        for stream in blocks.streams:
            if (tokens := sequence(small, one, small.tokens[stream])) is not None:
                found[stream] |= differing(tokens, sequence(small, other, small.tokens[stream]))
    return found


def held(small: SmallDenoiser, blocks: Blocks, stream: str, values: Sequence[Any]) -> Held | None:
    """Which of several tensors holds a stream: one of its own, or, where none is, one for all streams."""
    for tokens, alone in ((small.tokens[stream], True), (total(small, blocks), False)):
        for index, value in enumerate(values):
            if sequence(small, value, tokens) is not None:
                joined = blocks.joined and not alone
                return Held(index, tokens, ranges(small, blocks)[stream] if joined else slice(None), alone or joined)
    return None


def parts(small: SmallDenoiser) -> Iterator[Part]:
    """Every stated module in every call of its block, if the block has it and writes one of its streams."""
    for blocks, call in calls(small.name):
        before = [leaf for leaf in call.leaves() if isinstance(leaf, Tensor)]
        after = streams(small, blocks, call.returned)
        written = {name for name, value in after.items() if value is not None and not kept(value, before)}
        assert main(small) in written
        for site, path in dict.fromkeys((site, path) for (site, _), path in blocks.modules.items() if path):
            works_for = [stream for (name, stream), other in blocks.modules.items() if (name, other) == (site, path)]
            mine = tuple(stream for stream in works_for if stream in written)
            if mine and getattr(call.block, path, call) is not None:
                yield from turns(small, blocks, call, site, path, mine)


def turns(small: SmallDenoiser, blocks: Blocks, call: Call, site: str, path: str, works_for: tuple[str, ...]) -> Iterator[Part]:
    """A stated module in one call of its block: once, or, where it is called for one stream after the other, once for each."""
    module = call.block.get_submodule(path)
    seen = []

    def note(_: nn.Module, values: Any, named: Any, output: Any) -> None:
        seen.append((copied((values, named)), copied(output)))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        call.again()
    finally:
        handle.remove()
    if len(seen) == 1:
        yield Part(blocks, call, site, path, works_for, module, *seen[0], turn=0)
        return
    assert len(seen) == len(works_for), f"{path} returned {len(seen)} times in one call of {blocks.path}"
    for turn, (given, returned) in enumerate(seen):
        mine = tuple(stream for stream in works_for if sequence(small, returned, small.tokens[stream]) is not None)
        yield Part(blocks, call, site, path, mine, module, given, returned, turn)


def kept(value: Tensor, before: list[Tensor]) -> bool:
    """Whether it is, bit by bit, one of those."""
    return any(torch.equal(value, one) for one in before if one.shape == value.shape)


def adding(small: SmallDenoiser, where: Held, turn: int) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that adds to a stream where a module returns it, in one of its turns."""
    turns = count()

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        chosen = tree_leaves(output)[where.index]

        def there(leaf: Tensor) -> Tensor:
            return at(small, leaf, where.tokens, where.place) if leaf is chosen else torch.zeros_like(leaf)

        return moved(output, there) if next(turns) == turn else output

    return add


def places_told(small: SmallDenoiser, arguments: Mapping[str, Any]) -> Tensor | None:
    """Where the tokens of packed latents lie, as a call says it: (tokens, 3) of frame, row and column from the first on."""
    shapes: Any = arguments.get("img_shapes") or arguments.get("shape_list")
    if "num_frames" in arguments:
        shapes = [[tuple(arguments[name] for name in ("num_frames", "height", "width"))]]
    if shapes:
        shape = shapes[0] if isinstance(shapes[0], tuple) else shapes[0][0]
        return torch.cartesian_prod(*(torch.arange(float(number)) for number in shape))
    found = arguments.get("img_ids", arguments.get("position_ids"))
    if found is None or found.shape[-1] < 3:
        return None
    whole = (found[0] if found.ndim == 3 else found)[-torch.Size(small.layout).numel() :, :3].float()
    return whole - whole[0]


def patch(row: Tensor, layout: tuple[int, int, int], place: tuple[int, int, int], start: int = 0) -> Tensor:
    """One at the latents of one token, zero elsewhere; of one row of latents, in whatever axes.

    A row may be packed, a token for each place, or hold `start` tokens of something else first.
    """
    where = torch.zeros_like(row)
    tokens = torch.Size(layout).numel()
    token = (place[0] * layout[1] + place[1]) * layout[2] + place[2]
    if row.ndim not in (3, 4) and row.shape[0] in (tokens, start + tokens):
        where[token + row.shape[0] - tokens] = 1
        return where
    if row.ndim == 5:
        return patch(row[0], layout, place)[None]
    grid = list(zip(layout, place, strict=True))[:1] if row.ndim == 2 else list(zip(layout, place, strict=True))[1 - row.ndim :]
    for channel in range(row.ndim):
        axes = [axis for axis in range(row.ndim) if axis != channel]
        if all(row.shape[axis] % number == 0 for axis, (number, _) in zip(axes, grid, strict=True)):
            region: list[slice] = [slice(None)] * row.ndim
            for axis, (number, index) in zip(axes, grid, strict=True):
                size = row.shape[axis] // number
                region[axis] = slice(index * size, (index + 1) * size)
            where[tuple(region)] = 1
            return where
    raise AssertionError(f"latents of {tuple(row.shape)} cannot be cut into {layout}")
