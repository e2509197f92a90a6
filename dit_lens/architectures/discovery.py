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

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, permutations
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dit_lens.architectures.layout import Patches
from dit_lens.architectures.stack import AUDIO, EXTRA, TEXT, VISUAL, Stack
from dit_lens.architectures.watching import Call, is_stream, watched
from dit_lens.errors import InputError, listed

ASIDE = ("refiner", "motion_encoder", "face_adapter", "vace_blocks", "connector")
"""In the paths of lists whose modules prepare or add to a stream, and are no blocks of it."""
FARTHEST = 8
"""How far apart two places in one patch are looked for."""


class Undecided(InputError):
    """The blocks of a denoiser cannot be told by watching it; a record must say what they are."""


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
    name = type(denoiser).__name__
    calls = watched(denoiser, arguments)
    lists = list(dict.fromkeys(call.path for call in calls))
    aside = tuple(path for path in lists if any(part in path for part in ASIDE))
    groups = {path: [call for call in calls if call.path == path] for path in lists if path not in aside}
    if not groups:
        raise Undecided(f"a {name} hands tokens through no list of modules; describe it with dl.register(Architecture(...))")
    order = [path for path, _ in groupby(call.path for call in calls if call.path in groups)]
    if len(order) > len(groups):
        raise Undecided(
            f"the {name} goes back and forth between {listed(groups)}; describe it with dl.register(Architecture(...))"
        )
    marked = _Marked(denoiser, arguments, next(iter(groups.values()))[0])
    stacks: list[Stack] = []
    tokens: dict[str, int] = {}
    before: list[tuple[tuple[str, ...], Tensor]] = []
    for path, members in groups.items():
        carried = _carried(members)
        if not carried:
            raise Undecided(f"blocks of {path} of the {name} return nothing that the next one takes; describe it with a record")
        if not before and members[0] is not marked.first:
            marked = _Marked(denoiser, arguments, members[0])
        held = [_of_call(members[0], parameter, before, tokens) or marked.streams(parameter) for parameter in carried]
        if not any(VISUAL in streams for streams in held):
            aside = (*aside, path)
            continue
        for parameter, streams in zip(carried, held, strict=True):
            if len(streams) == 1:
                tokens.setdefault(streams[0], members[0].given[parameter].shape[1])
            elif not before:
                tokens.update(marked.regions(parameter))
        if len(held) > 1 and any(len(streams) > 1 for streams in held):
            raise Undecided(f"blocks of {path} of the {name} have a joined sequence and {len(held) - 1} more; write a record")
        flat = tuple(stream for streams in held for stream in streams)
        places = tuple(carried.values())
        stack = _stack(path, flat, carried, members[0], tokens)
        variants = ((number, _variant(stack, carried, call)) for number, call in enumerate(members))
        stacks.append(replace(stack, variants=tuple((number, other) for number, other in variants if other != stack)))
        before = [(streams, members[-1].returned[place]) for streams, place in zip(held, places, strict=True)]
    if not stacks:
        raise Undecided(f"no list of the {name} carries tokens that change with its latents; describe it with a record")
    # What prepares the visual stream mixes its tokens, so places are marked before it where there is such a list.
    starts = [next(call for call in calls if call.path == path) for path in lists]
    found = (_Marked(denoiser, arguments, start).patches(tokens[VISUAL]) for start in starts)
    patches = next((patches for patches in found if patches is not None), None)
    return Found(marked.latents, tuple(stacks), aside, tokens, patches)


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


def _of_call(
    call: Call, parameter: str, before: Sequence[tuple[tuple[str, ...], Tensor]], tokens: Mapping[str, int]
) -> tuple[str, ...]:
    """What a parameter of a later stack's first call holds: what the stack before returned, or some of it in one sequence."""
    if not before:
        return ()
    given = call.given[parameter]
    for count in range(1, len(before) + 1):
        for some in permutations(before, count):
            together = torch.cat([tensor for _, tensor in some], dim=1) if _fit([tensor for _, tensor in some]) else None
            if together is not None and together.shape == given.shape and torch.equal(together, given):
                return tuple(stream for streams, _ in some for stream in streams)
    lengths = [stream for stream, length in tokens.items() if length == given.shape[1]]
    if len(lengths) == 1:
        return (lengths[0],)
    raise Undecided(
        f"{parameter} of {call.path} has {given.shape[1]} tokens, which are not those that came before it"
        f" ({listed(f'{length} {stream}' for stream, length in tokens.items())}); describe it with a record"
    )


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
        names = inspect.signature(type(denoiser).forward).parameters
        self.latents = next((name for name in names if is_movable(self.arguments.get(name))), "")
        if not self.latents:
            raise Undecided(f"a {type(denoiser).__name__} takes no latents, as (batch, channels, ...); describe it with a record")
        self.moved: dict[str, dict[str, Tensor]] = {}
        for name, value in self.arguments.items():
            if is_movable(value):
                stream = VISUAL if name == self.latents else AUDIO if "audio" in name else TEXT
                for parameter, changed in self.changes({name: _other(value)}).items():
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

    def regions(self, parameter: str) -> list[tuple[str, int]]:
        """The streams of one sequence in their order, with their lengths."""
        moved = {stream: changed[parameter] for stream, changed in self.moved.items() if parameter in changed}
        visual = moved.get(VISUAL)
        if visual is None or not visual.any():
            others = [stream for stream in (TEXT, AUDIO) if stream in moved and moved[stream].any()]
            return [(others[0] if len(others) == 1 else EXTRA, self.first.given[parameter].shape[1])]
        places = visual.nonzero().flatten()
        start, end = int(places[0]), int(places[-1]) + 1
        if len(places) < end - start:
            raise Undecided(
                f"the visual tokens of {parameter} of {self.first.path} do not lie together; describe it with a record"
            )
        found = [(VISUAL, end - start)]
        for place, (low, high) in enumerate(((0, start), (end, len(visual)))):
            if high > low:
                spoken = any(moved[stream][low:high].any() for stream in moved if stream == TEXT)
                found.insert(0 if place == 0 else len(found), (TEXT if spoken else EXTRA, high - low))
        return found

    def streams(self, parameter: str) -> tuple[str, ...]:
        """The names of `regions`."""
        return tuple(stream for stream, _ in self.regions(parameter))

    def patches(self, count: int) -> Patches | None:
        """How so many visual tokens cover the latents: a place is marked, and the token that changes is looked for."""
        latents = self.arguments[self.latents]
        for parameter in self.first.taken() if isinstance(latents, Tensor) else ():
            try:
                regions = self.regions(parameter)
            except Undecided:
                continue
            start = 0
            for stream, length in regions:
                if (stream, length) == (VISUAL, count):
                    tried = {3: ("tc", "cf"), 4: ("chw",), 5: ("cfhw", "fchw")}.get(latents.ndim, ())
                    found = (self._patches(latents, axes, parameter, start, count) for axes in tried)
                    return next((patches for patches in found if patches is not None), None)
                start += length
        return None

    def _patches(self, latents: Tensor, axes: str, holder: str, start: int, count: int) -> Patches | None:
        """The patches, if the latents have these axes."""
        kept = [place for place, axis in enumerate(axes) if axis != "c"]
        lengths = [latents.shape[1 + place] for place in kept]

        def token(position: Sequence[int]) -> int | None:
            """Which visual token changes with the latents at a position."""
            where: list[Any] = [slice(None)] * latents.ndim
            for place, index in zip(kept, position, strict=True):
                where[1 + place] = index
            marked = latents.clone()
            marked[tuple(where)] += 1.5
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


def is_movable(value: Any) -> bool:
    """Whether an argument holds latents or embeddings: numbers in at least two axes, beside the batch or in a list."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(one, Tensor) and one.is_floating_point() for one in value)
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3


def _other(value: Any) -> Any:
    """Another value of the same shape, different everywhere."""
    if isinstance(value, (list, tuple)):
        return type(value)(_other(one) for one in value)
    noise: Tensor = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value + 1 + noise
