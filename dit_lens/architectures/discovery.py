"""Discovery: what the blocks of a denoiser are, found by calling it a few times and watching.

Names differ between families and mean different things, so as little as possible is taken from them. What is watched:

* which lists of modules are called, and in which order: the stacks of blocks;
* which tokens change when the latents change, and which when the text does, before any block has mixed them: the visual and
  the text tokens, and in which order they lie where they are joined in one sequence;
* which of the tensors that a block returns are, bit by bit, arguments of the next one: the order of its streams;
* which token changes when one place of the latents does: the layout, and the size of a patch.

What cannot be settled so is not guessed: `Undecided` says what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, permutations
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dit_lens.architectures.arguments import Undecided, is_movable, latents_of, other_than, spoken_arguments
from dit_lens.architectures.layout import Patches
from dit_lens.architectures.stack import AUDIO, EXTRA, TEXT, VISUAL, Stack
from dit_lens.architectures.watching import Call, is_stream, watched
from dit_lens.errors import listed

ASIDE = ("motion_encoder", "face_adapter", "vace_blocks", "connector")
"""In the paths of lists whose modules prepare or add to a stream, and are no blocks of it."""
FARTHEST = 8
"""How far apart two places in one patch are looked for."""


@dataclass(frozen=True)
class Found:
    """What `discover` found.

    Attributes:
        latents: the parameter of the denoiser that takes them. stacks: in the order in which they are called, without sites of
            modules (see `anatomy`). aside: lists that are called, and whose modules are no blocks.
        tokens: how many each stream has in this call. patches: none where tokens lie in no order of the latents.
    """

    latents: str
    stacks: tuple[Stack, ...]
    aside: tuple[str, ...]
    tokens: Mapping[str, int]
    patches: Patches | None


def discover(denoiser: nn.Module, arguments: Mapping[str, Any]) -> Found:
    """What the blocks of a denoiser are. It is called once to its end and some twenty times to its first block.

    Args:
        denoiser: a module that hands tokens through lists of blocks. arguments: of one call, by name, as its pipeline gives them;
            the first of its parameters that can be latents is taken to be the latents.

    Raises:
        Undecided: what was seen allows no answer, or several.
    """
    calls = watched(denoiser, arguments)
    if not calls:
        who = type(denoiser).__name__
        raise Undecided(f"a {who} hands tokens through no list of modules; describe it with dl.register(Architecture(...))")
    return _Discovery(denoiser, arguments, calls).found()


class _Discovery:
    """One denoiser, whose lists are gone through in the order in which they are called."""

    def __init__(self, denoiser: nn.Module, arguments: Mapping[str, Any], calls: Sequence[Call]) -> None:
        self.denoiser, self.arguments, self.calls = denoiser, arguments, calls
        self.name = type(denoiser).__name__
        self.lists = list(dict.fromkeys(call.path for call in calls))
        self.stacks: list[Stack] = []
        self.tokens: dict[str, int] = {}
        self.before: list[Piece] = []
        self.beside: list[Piece] = []

    def found(self) -> Found:
        """What `discover` found."""
        for path in self.lists:
            members = [call for call in self.calls if call.path == path]
            if not any(part in path for part in ASIDE) and not adapts(path, members, self.calls):
                self._list(path, members)
        if not self.stacks:
            raise Undecided(f"no list of the {self.name} carries tokens that change with its latents; describe it with a record")
        kept = [stack.path for stack in self.stacks]
        order = [path for path, _ in groupby(call.path for call in self.calls if call.path in kept)]
        if len(order) > len(kept):
            raise Undecided(
                f"the {self.name} goes back and forth between {listed(kept)}; describe it with dl.register(Architecture(...))"
            )
        # What prepares the visual stream mixes its tokens, so places are marked before it where there is such a list.
        marks = [_Marked(self.denoiser, self.arguments, self._first(path)) for path in self.lists]
        patches = (mark.patches(self.tokens[VISUAL]) for mark in marks)
        aside = tuple(path for path in self.lists if path not in kept)
        found = next((one for one in patches if one is not None), None)
        return Found(marks[0].latents, tuple(self.stacks), aside, self.tokens, found)

    def _first(self, path: str) -> Call:
        return next(call for call in self.calls if call.path == path)

    def _list(self, path: str, members: Sequence[Call]) -> None:
        """Go through one list: it is a stack, or what it makes is kept for stacks that take it."""
        carried = _carried(members) if len({type(call.block) for call in members}) == 1 else {}
        if not carried and any(call.attends for call in members):
            raise Undecided(
                f"blocks of {path} of the {self.name} return nothing that the next one takes; describe it with a record"
            )
        held = [self._held(members[0], parameter) for parameter in carried]
        flat = tuple(stream for regions in held for stream, _ in regions)
        pieces = [Piece(tuple(its), members[-1], place) for its, place in zip(held, carried.values(), strict=True)]
        if VISUAL not in flat:
            self.beside += [self._spoken(_whole_text(piece)) for piece in pieces]
            return
        rows = len(self.arguments[latents_of(self.denoiser, self.arguments)])
        if any(len(members[0].given[parameter]) != rows for parameter in carried):
            raise Undecided(
                f"blocks of {path} of the {self.name} have {len(members[0].given[next(iter(carried))])} rows for {rows} samples:"
                " rows and tokens are in another order; describe it with a record"
            )
        _check_streams(f"blocks of {path} of the {self.name}", [piece.streams for piece in pieces])
        if EXTRA in flat and not isinstance(self.arguments[latents_of(self.denoiser, self.arguments)], Tensor):
            raise Undecided(
                f"blocks of {path} of the {self.name} have extra tokens in the sequences of samples that come as a list: how many"
                " there are depends on the lengths of these; describe it with a record"
            )
        _check_fed(self.denoiser, self.arguments, members, carried)
        for regions in held:
            for stream, count in regions:
                self.tokens.setdefault(stream, count)
        stack = _stack(path, flat, carried, members[0], self.tokens)
        variants = ((number, _variant(stack, carried, call)) for number, call in enumerate(members))
        self.stacks.append(replace(stack, variants=tuple((number, other) for number, other in variants if other != stack)))
        self.before = [piece for piece in pieces if piece.tensor is not None]
        self.beside = [piece for piece in self.beside if not set(piece.streams) & set(flat)]

    def _spoken(self, piece: Piece) -> Piece:
        """A piece of learned tokens that have taken in the text by the end of their list, as a text."""
        if piece.streams != (EXTRA,):
            return piece
        number = [call for call in self.calls if call.path == piece.call.path].index(piece.call)
        for name in spoken_arguments(self.denoiser, self.arguments):
            after = watched(self.denoiser, {**self.arguments, name: other_than(self.arguments[name])})
            there = [call for call in after if call.path == piece.call.path]
            if len(there) > number and not same_bits(there[number].returned[piece.place], piece.tensor):
                return replace(piece, regions=((TEXT, piece.regions[0][1]),))
        return piece

    def _held(self, call: Call, parameter: str) -> list[tuple[str, int]]:
        """The streams in what a parameter brings to a list's first block, with their lengths."""
        given, pieces = call.given[parameter], [*self.before, *self.beside]
        for count in range(1, len(pieces) + 1):
            for some in permutations(pieces, count):
                tensors = [piece.tensor for piece in some]
                if _fit(tensors) and same_bits(torch.cat(tensors, dim=1), given):
                    return _runs([part for piece in some for part in piece.regions], self._who(call, parameter))
        marked = _Marked(self.denoiser, self.arguments, call)
        if not self.before:
            return marked.regions(parameter)
        # What was changed since still changes with what it was made of; what does not has met no other stream yet.
        unmoved = torch.zeros(given.shape[1], dtype=torch.bool)
        fed = [_moved(self.denoiser, self.arguments, piece, call).get(parameter, unmoved) for piece in pieces]
        owners = [next((number for number, mask in enumerate(fed) if mask[place]), None) for place in range(given.shape[1])]
        found: list[tuple[str, int]] = []
        for owner, its in groupby(owners):
            count, start = len(list(its)), sum(length for _, length in found)
            if owner is None:
                found += [(stream, 1) for stream in marked.names(parameter)[start : start + count]]
            else:
                found += pieces[owner].regions if len(pieces[owner].regions) > 1 else [(pieces[owner].streams[0], count)]
        if sum(length for _, length in found) != given.shape[1]:
            raise Undecided(
                f"{self._who(call, parameter)} has {given.shape[1]} tokens, which are not those that came before"
                f" it ({listed(f'{count} {stream}' for stream, count in self.tokens.items())}); describe it with a record"
            )
        return _runs(found, self._who(call, parameter))

    def _who(self, call: Call, parameter: str) -> str:
        return f"{parameter} of {call.path} of the {self.name}"


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor that a list's last block returned, with the streams in it and their lengths."""

    regions: tuple[tuple[str, int], ...]
    call: Call
    place: int

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams, one after the other."""
        return tuple(stream for stream, _ in self.regions)

    @property
    def tensor(self) -> Any:
        """The tensor; None where that block returns nothing there."""
        return self.call.returned[self.place]


def _whole_text(piece: Piece) -> Piece:
    """A piece of a text and what it is padded with, as a text."""
    if set(piece.streams) != {TEXT, EXTRA}:
        return piece
    return replace(piece, regions=((TEXT, sum(count for _, count in piece.regions)),))


def adapts(path: str, members: Sequence[Call], calls: Sequence[Call]) -> bool:
    """Whether a list's modules run between the blocks of another list, and what they return is added to what those carry."""
    positions = [place for place, call in enumerate(calls) if call.path == path]
    if positions[-1] - positions[0] + 1 == len(positions):
        return False
    later = [tensor for call in calls[positions[0] :] for tensor in call.taken().values()]
    own = [tensor for call in members[:-1] for tensor in call.returned if is_stream(tensor)]
    others = [call for call in calls[positions[0] : positions[-1]] if call.path != path]
    theirs = [tensor for call in others for tensor in call.returned if is_stream(tensor)]
    own_taken, theirs_taken = (any(same_bits(one, other) for one in some for other in later) for some in (own, theirs))
    return theirs_taken and not own_taken


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _moved(denoiser: nn.Module, arguments: Mapping[str, Any], piece: Piece, call: Call) -> dict[str, Bool[Tensor, " tokens"]]:
    """Which tokens of a later list's first call change when something is added to a piece."""
    after = _with_output_moved(denoiser, arguments, piece.call, piece.place, until=call.path)[-1].taken()
    return {
        name: (tensor != after[name]).any(dim=-1).any(dim=0)
        for name, tensor in call.taken().items()
        if name in after and after[name].shape == tensor.shape
    }


def _check_streams(who: str, held: Sequence[tuple[str, ...]]) -> None:
    """Refuse streams that could not be told apart in a call of other lengths."""
    joined = next((streams for streams in held if len(streams) > 1), ())
    if joined and len(held) > 1:
        raise Undecided(f"{who} have a joined sequence of {listed(joined)} and {len(held) - 1} more; write a record")
    if len(set(joined) - {VISUAL, EXTRA}) > 1:
        raise Undecided(f"{who} have {listed(joined)} in one sequence, whose lengths cannot be told apart; write a record")


def _check_fed(denoiser: nn.Module, arguments: Mapping[str, Any], members: Sequence[Call], carried: Mapping[str, int]) -> None:
    """Refuse a list in which some block does not go on from what the one before it returned.

    What is bit by bit the same is that. Elsewhere something may have been added in between: then what the block takes changes
    with what the one before returns.
    """
    path = members[0].path
    loose = [
        (number, parameter, place)
        for number, (call, after) in enumerate(pairwise(members))
        for parameter, place in carried.items()
        if call.returned[place] is not None
        and not (
            after.given[parameter].shape == call.returned[place].shape
            and torch.equal(after.given[parameter], call.returned[place])
        )
    ]
    # In a long list of which every block gets something added, the first and the last ones tell.
    for number, parameter, place in loose if len(loose) <= 8 else [*loose[:2], *loose[-4:]]:
        changed = _with_output_moved(denoiser, arguments, members[number], place)
        again = [call for call in changed if call.path == path][number + 1].given[parameter]
        given = members[number + 1].given[parameter]
        if again.shape != given.shape or torch.equal(again, given):
            raise Undecided(
                f"block {number + 1} of {path} of the {type(denoiser).__name__} does not go on from {parameter} of the one before"
                " it; describe it with a record"
            )


def _with_output_moved(denoiser: nn.Module, arguments: Mapping[str, Any], call: Call, place: int, until: str = "") -> list[Call]:
    """The calls, as `watched` gives them, when something is added to one of the tensors that a block returns."""

    def added(module: nn.Module, args: Any, output: Any) -> Any:
        tensors = list(output) if isinstance(output, tuple) else [output]
        tensors[place] = tensors[place] + 1.5
        return tuple(tensors) if isinstance(output, tuple) else tensors[0]

    handle = call.block.register_forward_hook(added)
    try:
        return watched(denoiser, arguments, until)
    finally:
        handle.remove()


def _stack(path: str, streams: tuple[str, ...], carried: Mapping[str, int], call: Call, tokens: Mapping[str, int]) -> Stack:
    """The record of a list whose first block's call this is."""
    places = tuple(carried.values())
    usual = (call.bare and places == (0,)) or (not call.bare and len(call.returned) == len(places) > 1)
    joined = len(carried) < len(streams)
    visual = 0 if joined else streams.index(VISUAL)
    return Stack(
        path,
        streams,
        tuple(carried),
        places=() if places == tuple(range(len(places))) else places,
        returned=0 if usual else len(call.returned),
        extra=tokens.get(EXTRA, 0) if joined and len(streams) > 2 else 0,
        in_place=any(name in call.wrote for name in carried),
        width=call.returned[places[visual]].shape[-1],
    )


def _variant(stack: Stack, carried: Mapping[str, int], call: Call) -> Stack:
    """The record of a block of which this is a call: another one if it returns nothing in the place of a stream."""
    nothing = tuple(place for place, value in enumerate(call.returned) if value is None)
    kept = {parameter: place for parameter, place in carried.items() if place not in nothing}
    if len(kept) == len(carried) or stack.joined:
        return stack
    streams = tuple(stream for stream, parameter in zip(stack.streams, stack.parameters, strict=True) if parameter in kept)
    return replace(
        stack, streams=streams, parameters=tuple(kept), places=tuple(kept.values()), returned=len(call.returned), nothing=nothing
    )


def _runs(parts: Sequence[tuple[str, int]], who: str) -> list[tuple[str, int]]:
    """Streams with their lengths, from parts of them in their order; an error where a stream lies in several places."""
    runs = [(stream, sum(count for _, count in its)) for stream, its in groupby(parts, key=lambda part: part[0])]
    streams = [stream for stream, _ in runs]
    scattered = [stream for stream in streams if streams.count(stream) > 1]
    if scattered:
        raise Undecided(f"the {scattered[0]} tokens of {who} do not lie together; describe it with a record")
    return runs


def _fit(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be one sequence."""
    return len({(tensor.shape[0], *tensor.shape[2:]) for tensor in tensors}) == 1


def _carried(members: Sequence[Call]) -> dict[str, int]:
    """Which parameters bring the streams of a list's blocks, and the places where they are returned, in the order of these."""
    bits: dict[int, str] = {}
    for call, after in pairwise(members):
        for place, tensor in enumerate(call.returned):
            for parameter, given in after.taken().items():
                if is_stream(tensor) and tensor.shape == given.shape and torch.equal(tensor, given):
                    bits.setdefault(place, parameter)
    # Where something is added between the blocks, or there is one block, shapes can tell.
    call = members[0]
    for place, tensor in enumerate(call.returned):
        left = {name: given for name, given in call.taken().items() if name not in bits.values()}
        alike = [name for name, given in left.items() if is_stream(tensor) and tensor.shape == given.shape]
        if place not in bits and len(alike) == 1:
            bits[place] = alike[0]
    return {bits[place]: place for place in sorted(bits)}


class _Marked:
    """The first block's arguments, and how they change with what the denoiser is given."""

    def __init__(self, denoiser: nn.Module, arguments: Mapping[str, Any], first: Call) -> None:
        self.denoiser, self.arguments, self.first = denoiser, dict(arguments), first
        self.latents = latents_of(denoiser, arguments)
        self.moved: dict[str, dict[str, Tensor]] = {}
        others = {name: value for name, value in self.arguments.items() if name != self.latents and is_movable(value, name)}
        spoken = spoken_arguments(denoiser, arguments)
        for name, value in ((self.latents, self.arguments[self.latents]), *others.items()):
            stream = VISUAL if name == self.latents else AUDIO if "audio" in name else TEXT if name in spoken else EXTRA
            for parameter, changed in self.changes({name: other_than(value)}).items():
                known = self.moved.setdefault(stream, {})
                known[parameter] = known[parameter] | changed if parameter in known else changed

    def changes(self, new: Mapping[str, Any]) -> dict[str, Bool[Tensor, " tokens"]]:
        """Which tokens of the first block's arguments are other ones, when the denoiser is given something else."""
        after = watched(self.denoiser, {**self.arguments, **new}, until=self.first.path)[-1].taken()
        pairs = {name: (tensor, after.get(name)) for name, tensor in self.first.taken().items()}
        # A sequence of another length has other tokens, but none that can be told apart.
        return {
            name: (tensor != there).any(dim=-1).any(dim=0)
            for name, (tensor, there) in pairs.items()
            if there is not None and there.shape == tensor.shape
        }

    def names(self, parameter: str) -> list[str]:
        """The stream of every token."""
        count = self.first.given[parameter].shape[1]
        unmoved = torch.zeros(count, dtype=torch.bool)
        moved = {stream: self.moved.get(stream, {}).get(parameter, unmoved) for stream in (VISUAL, AUDIO, TEXT)}
        return [next((stream for stream in moved if moved[stream][place]), EXTRA) for place in range(count)]

    def regions(self, parameter: str) -> list[tuple[str, int]]:
        """The streams of one sequence in their order, with their lengths."""
        names = self.names(parameter)
        if VISUAL not in names:
            spoken = set(names) - {EXTRA}
            return [(spoken.pop() if len(spoken) == 1 else EXTRA, len(names))]
        who = f"{parameter} of {self.first.path} of the {type(self.denoiser).__name__}"
        return _runs([(name, 1) for name in names], who)

    def patches(self, count: int) -> Patches | None:
        """How so many visual tokens cover the latents: a place is marked, and the token that changes is looked for."""
        latents = self.arguments[self.latents]
        shape = (len(latents), *latents[0].shape)
        for parameter in self.first.taken():
            try:
                regions = self.regions(parameter)
            except Undecided:
                continue
            start = 0
            for stream, length in regions:
                if (stream, length) == (VISUAL, count):
                    tried = {3: ("tc", "cf"), 4: ("chw",), 5: ("cfhw", "fchw", "fhwc"), 6: ("tcccc",)}.get(len(shape), ())
                    found = (self._patches(shape, axes, parameter, start, count) for axes in tried)
                    return next((patches for patches in found if patches is not None), None)
                start += length
        return None

    def _patches(self, shape: Sequence[int], axes: str, holder: str, start: int, count: int) -> Patches | None:
        """The patches, if the latents have these axes."""
        kept = [place for place, axis in enumerate(axes) if axis != "c"]
        lengths = [shape[1 + place] for place in kept]
        latents = self.arguments[self.latents]

        def token(position: Sequence[int]) -> int | None:
            """Which visual token changes with the latents at a position."""
            where: list[Any] = [slice(None)] * (len(shape) - 1)
            for place, index in zip(kept, position, strict=True):
                where[place] = index
            marked = latents.clone() if isinstance(latents, Tensor) else [one.clone() for one in latents]
            for one in marked:
                one[tuple(where)] += 1.5
            changed = self.changes({self.latents: marked}).get(holder)
            places = [] if changed is None else changed.nonzero().flatten().tolist()
            return places[0] - start if len(places) == 1 else None

        if token([0] * len(kept)) != 0:
            return None
        sizes = []
        for axis, length in enumerate(lengths):
            steps = ([index if other == axis else 0 for other in range(len(kept))] for index in range(1, min(length, FARTHEST)))
            sizes.append(next((position[axis] for position in steps if token(position) != 0), length))
        counts = [length // size for length, size in zip(lengths, sizes, strict=True)]
        if count != torch.tensor(counts).prod():
            return None
        # The far corner, and a place that is at none: the order of the axes is as it is read.
        for position in ([length - 1 for length in lengths], [length // 2 for length in lengths]):
            expected = 0
            for index, size, along in zip(position, sizes, counts, strict=True):
                expected = expected * along + index // size
            if token(position) != expected:
                return None
        return Patches(axes, tuple(sizes))
