"""Small denoisers are what their records say: seen with plain hooks of torch, and with nothing of dit_lens.architectures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count, pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import transformers as classes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dit_lens import small_denoisers
from dit_lens.errors import InputError
from dit_lens.small_denoisers import DENOISERS, Blocks, SmallDenoiser, denoiser

ROWS = 2
SOURCES = {
    "visual": ("hidden_states", "x", "vision_tokens", "local_latents", "bb_ca"),
    "text": (
        "encoder_hidden_states",
        "encoder_hidden_states_t5",
        "encoder_hidden_states_llama3",
        "encoder_hidden_states_2",
        "cap_feats",
        "text_bth",
        "input_ids",
    ),
    "audio": ("audio_hidden_states", "sound_tokens"),
}
"""Names of the arguments that a stream is made of; those are meant that a call has."""

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
"""Mochi asks for float32 where autocast knows only smaller types."""
every = pytest.mark.parametrize("small", DENOISERS.values(), ids=list(DENOISERS))


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


def copied(value: Any) -> Any:
    """With tensors of its own, in whatever holds them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def moved(value: Any, places: Callable[[Tensor], Tensor] = torch.ones_like) -> Any:
    """A tensor, or several, with something added where `places` is one; indices become others of those that occur."""

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
    with torch.no_grad():
        first = model(**copied(dict(arguments)), return_dict=False)[0]
    return torch.stack([row.flatten() for row in first])


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Each denoiser once."""
    return denoiser(name)


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


def sequence(value: Any, tokens: int) -> Tensor | None:
    """As (rows, tokens, channels), if it is a tensor of that many tokens a row, in whatever axes."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2 or value.shape[0] % ROWS:
        return None
    return value.reshape(ROWS, tokens, -1) if value.shape[:-1].numel() == ROWS * tokens else None


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
        whole = sequence(items[0], total(small, blocks))
        assert whole is not None, f"{blocks.path} returns {items[0].shape}, not {total(small, blocks)} tokens"
        return {stream: whole[:, place] for stream, place in ranges(small, blocks).items()}
    found = {}
    for stream, item in zip(blocks.streams, items, strict=False):
        found[stream] = sequence(item, small.tokens[stream])
        assert item is None or found[stream] is not None, f"{blocks.path} returns {item.shape} for {stream}"
    assert set(found) == set(blocks.streams)
    return found


def differing(one: Tensor | None, other: Tensor | None) -> set[int]:
    """Tokens that differ in any row, of two sequences."""
    assert one is not None
    assert other is not None
    return set((one != other).any(dim=-1).any(dim=0).nonzero().flatten().tolist())


def entered(small: SmallDenoiser, first: Call, second: Call) -> dict[str, set[int]]:
    """For each stream of the first block, the tokens that differ between two calls of it, before it has run."""
    blocks = small.blocks[0]
    found: dict[str, set[int]] = {stream: set() for stream in blocks.streams}
    for one, other in zip(first.leaves(), second.leaves(), strict=True):
        if blocks.joined:
            if (whole := sequence(one, total(small, blocks))) is not None:
                changed = differing(whole, sequence(other, total(small, blocks)))
                for stream, place in ranges(small, blocks).items():
                    found[stream] |= {token - place.start for token in changed if place.start <= token < place.stop}
            continue
        for stream in blocks.streams:
            if (tokens := sequence(one, small.tokens[stream])) is not None:
                found[stream] |= differing(tokens, sequence(other, small.tokens[stream]))
    return found


@every
def test_it_runs_and_its_rows_differ(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    assert type(model).__name__ == small.name
    assert sum(parameter.numel() for parameter in model.parameters()) < 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    answer = result(model, arguments)
    assert torch.isfinite(answer).all()
    assert len(answer) == ROWS
    assert not torch.equal(answer[0], answer[1])
    torch.testing.assert_close(answer, result(*denoiser(small.name)), rtol=0, atol=0)


@every
def test_blocks_run_in_the_stated_order_and_are_all_there(small: SmallDenoiser) -> None:
    assert [(call.path, call.index) for call in watched(small)] == [(blocks.path, index) for blocks, index in stated(small)]


@every
def test_the_answer_depends_on_every_block(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    plain = result(model, arguments)
    for blocks, index in stated(small):
        block = model.get_submodule(f"{blocks.path}.{index}")
        handle = block.register_forward_hook(lambda _, __, output: moved(output))
        try:
            assert not torch.equal(result(model, arguments), plain), f"{blocks.path}.{index}"
        finally:
            handle.remove()


@every
def test_streams_are_returned_at_their_places(small: SmallDenoiser) -> None:
    assert set(small.tokens) == {stream for blocks in small.blocks for stream in blocks.streams}
    first = [small.tokens[stream] for stream in small.blocks[0].streams]
    assert len(set(first)) == len(first), "streams of as many tokens cannot be told apart"
    for blocks, call in calls(small.name):
        assert streams(small, blocks, call.returned)


@every
def test_streams_are_made_of_what_they_are_named_for(small: SmallDenoiser) -> None:
    _, arguments = built(small.name)
    plain = watched(small)[0]
    for stream in small.blocks[0].streams:
        sources = [name for name in SOURCES.get(stream, ()) if arguments.get(name) is not None]
        assert sources or stream == "extra", f"no argument is known to make {stream}"
        for source in sources:
            changed = entered(small, plain, watched(small, **{source: moved(arguments[source])})[0])
            assert changed[stream], f"{source} does not reach {stream}"
            assert not any(changed[other] for other in changed if other != stream), f"{source} reaches more than {stream}"


def patch(row: Tensor, layout: tuple[int, int, int], place: tuple[int, int, int]) -> Tensor:
    """One at the latents of one token, zero elsewhere; of one row of latents, in whatever axes."""
    where = torch.zeros_like(row)
    tokens = torch.Size(layout).numel()
    if row.ndim not in (3, 4) and row.shape[0] == tokens:
        token = (place[0] * layout[1] + place[1]) * layout[2] + place[2]
        where[token] = 1
        return where
    grid = [(number, index) for number, index in zip(layout, place, strict=True)][-(row.ndim - 1) :]
    if row.ndim == 2:
        grid = [(layout[0], place[0])]
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


@every
def test_a_mark_in_the_latents_reaches_the_token_of_the_layout(small: SmallDenoiser) -> None:
    before = small.tokens["visual"] - torch.Size(small.layout).numel()
    assert before >= 0, "tokens of the layout are the last of the stream, as frames that were there before are its first"
    assert small.blocks[0].streams.count("visual") == 1
    _, arguments = built(small.name)
    source = next(name for name in SOURCES["visual"] if name in arguments)
    latents = arguments[source]
    plain = watched(small)[0]
    frames, height, width = small.layout
    for place in ((0, 0, 0), (frames // 2, height // 2, width - 1), (frames - 1, height - 1, 0)):

        def mark(leaf: Tensor, place: tuple[int, int, int] = place) -> Tensor:
            if isinstance(latents, Tensor):
                return torch.stack([patch(row, small.layout, place) for row in leaf])
            return patch(leaf, small.layout, place)

        changed = entered(small, plain, watched(small, **{source: moved(latents, mark)})[0])
        assert changed["visual"] == {before + (place[0] * height + place[1]) * width + place[2]}, place


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


def parts(small: SmallDenoiser) -> Iterator[Part]:
    """Every stated module in every call of its block, if the block writes one of its streams."""
    for blocks, call in calls(small.name):
        before = [leaf for leaf in call.leaves() if isinstance(leaf, Tensor)]
        after = streams(small, blocks, call.returned)
        written = {name for name, value in after.items() if value is not None and not kept(value, before)}
        assert "visual" in written
        for site, path in dict.fromkeys((site, path) for (site, _), path in blocks.modules.items() if path):
            works_for = [stream for (name, stream), other in blocks.modules.items() if (name, other) == (site, path)]
            for_streams = tuple(stream for stream in works_for if stream in written)
            if not for_streams:
                continue
            if getattr(call.block, path, call) is None:
                continue  # only some of the blocks have it
            module, seen = call.block.get_submodule(path), []

            def note(_: nn.Module, values: Any, named: Any, output: Any, seen: list[Any] = seen) -> None:
                seen.append((copied((values, named)), copied(output)))

            handle = module.register_forward_hook(note, with_kwargs=True)
            try:
                call.again()
            finally:
                handle.remove()
            if len(seen) == 1:
                yield Part(blocks, call, site, path, for_streams, module, *seen[0], turn=0)
                continue
            assert len(seen) == len(for_streams), f"{path} returned {len(seen)} times in one call of {blocks.path}"
            for turn, (given, returned) in enumerate(seen):
                mine = [stream for stream in for_streams if sequence(returned, small.tokens[stream]) is not None]
                yield Part(blocks, call, site, path, tuple(mine), module, given, returned, turn)


def kept(value: Tensor, before: list[Tensor]) -> bool:
    """Whether it is, bit by bit, one of those."""
    return any(torch.equal(value, one) for one in before if one.shape == value.shape)


def item_of(small: SmallDenoiser, part: Part, stream: str, values: list[Any]) -> tuple[int, slice] | None:
    """Which of several tensors holds a stream, and where in it: one of its own, or, where none is, a joined one."""
    whole = total(small, part.blocks)
    for index, value in enumerate(values):
        if sequence(value, small.tokens[stream]) is not None:
            return index, slice(None)
    for index, value in enumerate(values):
        if sequence(value, whole) is not None:
            return index, ranges(small, part.blocks)[stream] if part.blocks.joined else slice(None)
    return None


@every
def test_every_stated_module_works_in_some_block(small: SmallDenoiser) -> None:
    found = {(part.blocks.path, part.site, stream, part.path) for part in parts(small) for stream in part.streams}
    stated_modules = {
        (blocks.path, site, stream, path) for blocks in small.blocks for (site, stream), path in blocks.modules.items() if path
    }
    assert found == stated_modules
    for blocks in small.blocks:
        assert {("attn", "visual"), ("mlp", "visual")} <= set(blocks.modules)
        assert {stream for _, stream in blocks.modules} == set(blocks.streams)


def adding(index: int, place: slice, turn: int) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that adds to the tokens at a place of one of the tensors that a module returns, in one of its turns."""
    turns = count()

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        def there(leaf: Tensor) -> Tensor:
            where = torch.zeros_like(leaf)
            if leaf is tree_leaves(output)[index]:
                where.view(ROWS, -1, leaf.shape[-1])[:, place] = 1
            return where

        return moved(output, there) if next(turns) == turn else output

    return add


@every
def test_what_is_added_to_a_stated_module_changes_its_stream(small: SmallDenoiser) -> None:
    for part in parts(small):
        plain = streams(small, part.blocks, part.call.again())
        items = tree_leaves(part.returned)
        for stream in part.streams:
            found = item_of(small, part, stream, items)
            assert found is not None, f"{part.path} returns nothing for {stream}"
            index, place = found
            tokens = small.tokens[stream] if sequence(items[index], small.tokens[stream]) is not None else None

            handle = part.module.register_forward_hook(adding(index, place, part.turn))
            try:
                edited = streams(small, part.blocks, part.call.again())
            finally:
                handle.remove()
            changed = {name for name, value in edited.items() if value is not None and differing(value, plain[name])}
            alone = tokens is not None or part.blocks.joined
            assert changed == ({stream} if alone else set(part.streams)), f"{part.blocks.path} {part.path}"


@every
def test_attention_mixes_tokens_and_a_feed_forward_does_not(small: SmallDenoiser) -> None:
    for part in parts(small):
        given, returned = tree_leaves(part.given), tree_leaves(part.returned)
        for stream in part.streams:
            place = item_of(small, part, stream, given)
            assert place is not None, f"{part.path} is given nothing of {stream}"
            shape = given[place[0]].shape[:-1]
            first = place[1].start or 0

            def start(leaf: Tensor, shape: torch.Size = shape, first: int = first) -> Tensor:
                where = torch.zeros_like(leaf)
                if leaf.shape[:-1] == shape:
                    where.view(ROWS, -1, leaf.shape[-1])[:, first] = 1
                return where

            with torch.no_grad():
                values, named = moved(copied(part.given), start)
                other = tree_leaves(part.module(*values, **named))
            index, where = item_of(small, part, stream, returned)  # pyright: ignore[reportGeneralTypeIssues]
            one, two = (all_of[index].reshape(ROWS, -1, all_of[index].shape[-1])[:, where] for all_of in (returned, other))
            assert (one.shape[1] - 1 in differing(one, two)) == (part.site == "attn"), f"{part.blocks.path} {part.path}"


@every
def test_cross_attention_reads_something_else(small: SmallDenoiser) -> None:
    for part in parts(small):
        if part.site == "cross_attn":

            def elsewhere(leaf: Tensor, counts: tuple[int, int] = (small.tokens["visual"], total(small, part.blocks))) -> Tensor:
                return torch.full_like(leaf, float(all(sequence(leaf, tokens) is None for tokens in counts)))

            with torch.no_grad():
                values, named = moved(copied(part.given), elsewhere)
                other = tree_leaves(part.module(*values, **named))[0]
            assert not torch.equal(tree_leaves(part.returned)[0], other)


@every
def test_lists_aside_run_and_no_list_with_attention_is_forgotten(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {path for path in lists if not any(path.startswith(f"{other}.") for other in lists)}
    ran: set[str] = set()
    handles = [
        child.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path in outer | set(small.aside)
        for child in model.get_submodule(path).modules()
    ]
    try:
        result(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    blocks = {part.path for part in small.blocks}
    assert set(small.aside) <= ran - blocks
    inner = {path: [name for name, _ in model.get_submodule(path).named_modules()] for path in ran & outer}
    attends = {path for path, names in inner.items() if any("attn" in name or "attention" in name for name in names)}
    assert attends <= blocks | set(small.aside)


def test_nothing_is_drawn_from_the_generators_of_torch() -> None:
    before = torch.get_rng_state()
    denoiser("FluxTransformer2DModel", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="no small denoiser is called 'Flux'"):
        denoiser("Flux")


def test_every_class_of_diffusers_is_there_or_refused_with_a_reason() -> None:
    found = set()
    for module in pkgutil.iter_modules(classes.__path__):
        members = vars(importlib.import_module(f"{classes.__name__}.{module.name}"))
        found |= {
            name
            for name, value in members.items()
            if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and value.__module__.endswith(module.name)
        }
    refused = [table for table in vars(small_denoisers).values() if isinstance(table, dict) and table is not DENOISERS]
    stated_classes = [name for table in (DENOISERS, *refused) for name in table]
    assert sorted(stated_classes) == sorted(found)
    assert all(reason for table in refused for reason in table.values())
