"""Anatomy: which modules of a block are its attention and its MLPs, found by running the block and watching inside.

* Attention is where scaled dot-product attention is called: the innermost module around that call that has weights. It is *cross*
  attention where what it returns for a token does not depend on the other tokens that it returns something for.
* An MLP is what takes tokens through two linear maps or more, is no attention, and returns tokens: the innermost module that
  does; or the last of such maps, where they lie in the block itself.
* Which stream a module's output belongs to is asked of the block: something is added to that output, or to some of its tokens,
  and the stream that comes out changed is the one. Where a module handles several streams in one sequence, each has its part.
* Where one projection takes in what attention returned with more beside it, `attn` and `mlp` are its two blocks of columns.

The second module of a kind for one stream is `attn_2` or `mlp_2`. What cannot be told so is not offered: it is named as missed.
Names are not asked, but for attention that never calls the usual function (linear attention): there a module with queries is one,
or one that looks like an MLP and tells every token of every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise, permutations
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.architectures.inside import is_map, parts, returned_tensors, run_inside
from dit_lens.architectures.stack import Stack
from dit_lens.architectures.watching import QUERIES, Call, is_stream
from dit_lens.sites import BLOCK_SITES, Site, attention_sites

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADDED = 1.5
"""What is added to an output to see where it goes."""


@dataclass(frozen=True)
class Anatomy:
    """What a block of a stack offers, what was seen in it that no site stands for, and how many heads its sites have."""

    sites: tuple[Site, ...]
    missed: tuple[str, ...]
    heads: int = 0


def anatomy(stack: Stack, call: Call, tokens: Mapping[str, int]) -> Anatomy:
    """The sites of a stack's blocks.

    Args:
        call: of one of them, as `watching.watched` records it. tokens: how many each stream has.
    """
    return _Dissection(stack, call, tokens).anatomy()


class _Dissection:
    """One block, run again and again with something added inside."""

    def __init__(self, stack: Stack, call: Call, tokens: Mapping[str, int]) -> None:
        self.stack, self.call, self.block = stack, call, call.block
        self.tokens = dict(tokens)
        self.inside, clean = run_inside(call)
        self.clean = self._streams(clean)
        self.rows = len(next(iter(self.clean.values())))
        self.names = list(dict.fromkeys(event.name for event in self.inside.returned))
        self.alive = self._depending()
        self.attentions = list(dict.fromkeys(filter(None, (self._owner(one.name) for one in self.inside.attended))))
        self.attentions += [name for name in self.names if self._queries(name) and not self._related(name, self.attentions)]
        mixing = [name for name in self.names if self._is_mlp(name) and self._mixes(name)]
        self.attentions += [name for name in mixing if not self._related(name, self.attentions)]
        self.found: list[tuple[int, Site]] = []
        self.missed: list[str] = (
            ["(in the block itself)"] if any(not self._owner(one.name) for one in self.inside.attended) else []
        )
        self.heads = 0

    def anatomy(self) -> Anatomy:
        """All of it."""
        fused = self._fused()
        for name in self.names:
            kind = self._kind(name)
            if kind is None or (kind == "attn" and name in fused):
                continue
            sites = list(self._outputs(kind, name))
            self.found += [(self.names.index(name), site) for site in sites]
            if not sites:
                self.missed.append(name)
        if not any(site.name == "mlp" for _, site in self.found) and not self.missed:
            for name in self._loose():
                self.found += [(self.names.index(name), site) for site in self._outputs("mlp", name)]
        for name in self.attentions:
            if self._kind(name) == "attn":
                self.found += [(self.names.index(name) - 1, site) for site in self._attention_sites(name)]
        sites = _numbered([site for _, site in sorted(self.found, key=lambda pair: pair[0])])
        per_head = any(site.per_head for site in sites)
        return Anatomy((*sites, *BLOCK_SITES), tuple(dict.fromkeys(self.missed)), self.heads if per_head else 0)

    def _streams(self, output: Any) -> dict[str, Tensor]:
        """The streams that the block returned."""
        return self.stack.streams_out(output, self.tokens.get("visual", 0))

    def _owner(self, name: str) -> str:
        """The innermost module around a call of attention that has weights: what has none is handed queries, keys and values."""
        while name and next(self.block.get_submodule(name).parameters(), None) is None:
            name = name.rpartition(".")[0]
        return name

    def _queries(self, name: str) -> bool:
        return any(hasattr(self.block.get_submodule(name), part) for part in QUERIES)

    def _mixes(self, name: str) -> bool:
        """Whether a module tells every token of the first."""
        heard = self._heard(name)
        return heard is not None and len(heard) > 1 and bool(heard.all())

    def _related(self, name: str, others: Sequence[str]) -> bool:
        """Whether a module is one of others, in one of them, or around one."""
        return any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in others)

    def _kind(self, name: str) -> str | None:
        if name in self.attentions:
            return "cross_attn" if self._crosses(name) else "attn"
        return "mlp" if self._is_mlp(name) else None

    def _depending(self) -> set[str]:
        """The modules whose outputs depend on the streams that the block takes."""
        given = {
            name: value + ADDED if name in self.stack.parameters else value
            for name, value in self.call.given.items()
            if name != "self"
        }
        after, _ = run_inside(replace(self.call, given=given))
        pairs = zip(self.inside.returned, after.returned, strict=False)
        return {one.name for one, other in pairs if one.name == other.name and _differ(one.output, other.output)}

    def _crosses(self, name: str) -> bool:
        """Whether what an attention returns for a token does not depend on the other tokens that it returns something for."""
        returned = [value for value in returned_tensors(self.inside.output(name)) if self._form(value)]
        if len(returned) != 1:
            return False
        heard = self._heard(name)
        return heard is not None and not bool(heard[1:].any())

    def _heard(self, name: str) -> Tensor | None:
        """Which tokens of a module's output change when the first of those that it is given does; None where that is not seen."""
        before = next(value for value in returned_tensors(self.inside.output(name)) if self._form(value))
        site = Site("attn", form=self._form(before))
        before = site.as_tokens(before, self.rows)

        def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = [value for value in (*args, *kwargs.values()) if self._form(value)]
            mine = next((one for one in given if site.as_tokens(one, self.rows).shape[1] == before.shape[1]), None)
            if mine is None:
                return None
            tokens = site.as_tokens(mine, self.rows).clone()
            tokens[:, :1] += ADDED
            changed = site.as_passing(tokens, mine)

            # Self-attention may be given its tokens twice, once to take the keys from.
            def new(value: Any) -> Any:
                return changed if value is mine else value

            return tuple(map(new, args)), {key: new(value) for key, value in kwargs.items()}

        handle = self.block.get_submodule(name).register_forward_pre_hook(moved, with_kwargs=True)
        try:
            outputs = returned_tensors(run_inside(self.call)[0].output(name))
        finally:
            handle.remove()
        after = site.as_tokens(next(value for value in outputs if self._form(value)), self.rows)
        return None if torch.equal(before, after) else (before != after).any(dim=-1).any(dim=0)

    def _is_mlp(self, name: str) -> bool:
        """Whether a module takes tokens through two linear maps or more, and no module in it does all of that."""
        if self._related(name, self.attentions) or not self._maps_tokens(name):
            return False
        inner = [other for other in self.names if other.startswith(f"{name}.") and self._maps_tokens(other)]
        if any(self._maps_of(other) == self._maps_of(name) and self._differ(other, name) for other in inner):
            return False
        parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
        around = [parent for parent in parents if parent in self.names and self._maps_tokens(parent)]
        around = [parent for parent in around if not self._related(parent, self.attentions)]
        return all(self._maps_of(parent) == self._maps_of(name) and self._differ(parent, name) for parent in around)

    def _differ(self, one: str, other: str) -> bool:
        return _differ(self.inside.output(one), self.inside.output(other))

    def _maps_of(self, name: str) -> set[str]:
        """The linear maps in a module that tokens of the streams go through."""
        inside = ((f"{name}.{part}" if part else name, module) for part, module in parts(self.block.get_submodule(name)))
        return {part for part, module in inside if is_map(module, LINEAR) and part in self.alive}

    def _maps_tokens(self, name: str) -> bool:
        return len(self._maps_of(name)) > 1 and self._form(self.inside.output(name)) is not None

    def _loose(self) -> list[str]:
        """Linear maps in the block itself, behind its first attention, that tokens go through: the last of them."""
        attended = [self.names.index(name) for name in self.attentions]
        owned = [name for name in self.names if name in self.attentions or self._maps_tokens(name)]
        maps = [
            name
            for name in self.names[min(attended, default=0) :]
            if is_map(self.block.get_submodule(name)) and name in self.alive and not self._related(name, owned)
        ]
        return maps[-1:] if len(maps) > 1 else []

    def _form(self, value: Any) -> Any:
        """The form of a module's output, if it can be tokens (see `Site.form`)."""
        if is_stream(value):
            return "tokens"
        if not isinstance(value, Tensor) or value.ndim not in (4, 5) or not value.is_floating_point():
            return None
        lengths = [tensor.shape[1] for tensor in self.clean.values()]
        if value.ndim == 5:
            return "grid" if value.shape[1:4].numel() in lengths else None
        if value.shape[1] in (*lengths, sum(lengths)):
            return "heads"
        # A picture for each sample, or one for each of its frames.
        frames = len(value) // self.rows
        return "picture" if frames * value.shape[2] * value.shape[3] in lengths else None

    def _outputs(self, kind: str, name: str) -> Iterator[Site]:
        """The sites that a module's output has, one for every stream that is in it."""
        outputs = self.inside.outputs(name)
        every = [(call, *pair) for call, output in enumerate(outputs) for pair in enumerate(returned_tensors(output))]
        for call, item, value in every:
            form = self._form(value)
            if form is not None:
                site = Site(kind, name, item=item, form=form, call=call, calls=len(outputs))
                yield from self._placed(
                    site, site.as_tokens(value, self.rows), lambda rows, site=site: self._moved_by_output(site, rows)
                )

    def _placed(self, site: Site, tensor: Tensor, moved: Callable[[slice], set[str]]) -> Iterator[Site]:
        """A site of the streams that a tensor holds; `moved` says which streams change when something is added to some tokens."""
        everywhere, length = moved(slice(None)), tensor.shape[1]
        alike = [stream for stream in self.clean if self.clean[stream].shape[1] == length]
        if len(self.clean) == 1 and everywhere and len(alike) == 1:
            yield site
        elif len(everywhere) == 1 or (everywhere and len(alike) == 1 and alike[0] in everywhere):
            stream = next(iter(everywhere)) if len(everywhere) == 1 else alike[0]
            if self.clean[stream].shape[1] == length:
                yield replace(site, stream=stream)
        else:
            order = self._order(length, moved) if everywhere else ()
            yield from (
                replace(site, stream=stream if len(self.clean) > 1 else None, within=order)
                for stream in order
                if stream in self.clean
            )

    def _order(self, length: int, moved: Callable[[slice], set[str]]) -> tuple[str, ...]:
        """How streams lie in so many tokens, those too that the block does not return; none where that cannot be told."""
        for number in range(2, len(self.tokens) + 1):
            for order in permutations(self.tokens, number):
                ends = list(accumulate(self.tokens[stream] for stream in order))
                ranges = [slice(start, end) for start, end in pairwise([0, *ends])]
                if ends[-1] == length and all(
                    moved(part) == {stream} & self.clean.keys() for part, stream in zip(ranges, order, strict=True)
                ):
                    return order
        return ()

    def _moved_by_output(self, site: Site, rows: slice) -> set[str]:
        """The streams that change when something is added to some tokens of a module's output."""

        calls = count()

        def added(module: nn.Module, args: Any, output: Any) -> Any:
            if next(calls) != site.call:
                return output
            tensors = list(returned_tensors(output))
            changed = site.as_tokens(tensors[site.item], self.rows).clone()
            changed[:, rows] += ADDED
            tensors[site.item] = changed = site.as_passing(changed, tensors[site.item])
            return tuple(tensors) if isinstance(output, tuple) else changed

        handle = self.block.get_submodule(site.module).register_forward_hook(added)
        try:
            return self._changed(run_inside(self.call)[1])
        finally:
            handle.remove()

    def _changed(self, output: Any) -> set[str]:
        """The streams that are others than in the clean run."""
        after = self._streams(output)
        return {stream for stream, tensor in self.clean.items() if not torch.equal(tensor, after[stream])}

    def _fused(self) -> set[str]:
        """Projections of attention with more beside it: their sites are found; the attentions that have one are returned."""
        having: set[str] = set()
        for name in self.attentions:
            for event in self.inside.returned:
                args, _ = event.given
                if not is_map(self.block.get_submodule(event.name)) or not args or not is_stream(args[0]):
                    continue
                width = self._leading(name, args[0])
                for kind, columns in (("attn", (0, width)), ("mlp", (width, args[0].shape[2]))) if width else ():
                    whole = Site(kind, event.name, columns=columns)
                    sites = list(self._placed(whole, event.output, lambda rows, site=whole: self._moved_by_output(site, rows)))
                    self.found += [(self.names.index(event.name), site) for site in sites]
                    self.missed += [] if sites else [event.name]
                    having.add(name)
        return having

    def _leading(self, name: str, given: Tensor) -> int:
        """How many columns of what a map is given are what an attention found; 0 where they are all, or none."""
        results = [one.output.transpose(1, 2).flatten(2) for one in self.inside.attended if one.name == name]
        returned = [value for value in returned_tensors(self.inside.output(name)) if is_stream(value)]
        if _fit(returned):
            results += [torch.cat(some, dim=1) for some in (returned, returned[::-1])]
        beside = [one.shape[2] for one in results if one.shape[:2] == given.shape[:2] and one.shape[2] < given.shape[2]]
        widths = [
            one.shape[2]
            for one in results
            if one.shape[:2] == given.shape[:2] and one.shape[2] in beside and torch.equal(given[..., : one.shape[2]], one)
        ]
        return next(iter(widths), 0)

    def _attention_sites(self, name: str) -> Iterator[Site]:
        """q, k and v of an attention, and the heads that its projections take in, where they are those of streams."""
        calls = [(place, one) for place, one in enumerate(self.inside.attended) if one.name == name]
        if len(calls) != 1 or any(shape[:3] != calls[0][1].shapes[0][:3] for shape in calls[0][1].shapes):
            return
        place, attended = calls[0]
        whole = Site("q", name, "attention", per_head=True)
        placed = list(self._placed(whole, attended.output.transpose(1, 2), lambda rows: self._moved_by_call(place, rows)))
        self.heads = attended.shapes[0][1]
        for like in placed:
            yield from (
                replace(site, stream=like.stream, within=like.within)
                for site in attention_sites(name, "")
                if site.port == "attention" and (attended.plain or site.measures != "pair")
            )
        after = [event for event in self.inside.returned[attended.position :] if event.name.startswith(f"{name}.")]
        maps = [event for event in after if is_map(self.block.get_submodule(event.name))]
        seen: set[str | None] = set()
        for event in maps:
            args, _ = event.given
            channels = attended.shapes[0][1] * attended.shapes[0][3]
            if not args or not is_stream(args[0]) or args[0].shape[2] != channels or not is_stream(event.output):
                continue
            plain = Site("heads", event.name)
            for site in self._placed(plain, event.output, lambda rows, site=plain: self._moved_by_output(site, rows)):
                if site.stream not in seen:
                    seen.add(site.stream)
                    yield replace(site, port="input", per_head=True)

    def _moved_by_call(self, place: int, rows: slice) -> set[str]:
        """The streams that change when something is added to some queries' results of a call of attention."""

        def added(number: int, output: Tensor) -> Tensor:
            if number != place:
                return output
            changed = output.clone()
            changed[:, :, rows] += ADDED
            return changed

        return self._changed(run_inside(self.call, added)[1])


def _differ(one: Any, other: Any) -> bool:
    """Whether two outputs of a module differ in a tensor."""
    pairs = zip(returned_tensors(one), returned_tensors(other), strict=False)
    return any(isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b) for a, b in pairs)


def _numbered(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with names of their own: the second of a name in a stream is `attn_2`, and what is inside it `q_2`."""
    seen: dict[tuple[str, str | None], int] = {}
    named = []
    for site in sites:
        count = seen[site.name, site.stream] = seen.get((site.name, site.stream), 0) + 1
        named.append(site if count == 1 else replace(site, name=f"{site.name}_{count}"))
    return tuple(named)


def _fit(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be one sequence."""
    return len({(tensor.shape[0], *tensor.shape[2:]) for tensor in tensors}) == 1
