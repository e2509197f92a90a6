"""Conformance of streams: whether they and their tokens are what a record calls them, by changing what the denoiser is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dit_lens.architectures.arguments import is_movable, other_than, spoken_arguments
from dit_lens.architectures.layout import AXES, Layout
from dit_lens.architectures.stack import AUDIO, EXTRA, TEXT, VISUAL
from dit_lens.architectures.watching import watched
from dit_lens.check_report import Finding
from dit_lens.errors import listed
from dit_lens.one_call import OneCall
from dit_lens.taps import Tap

MARK = 1.5
"""What is added to the latents at a place, and to a stream."""
LOOSE = 4
"""How many blocks are looked at that take something else than the one before returned."""


class Streams:
    """The checks of the streams of one denoiser."""

    def __init__(self, once: OneCall) -> None:
        self.once = once
        self.latents = once.architecture.latents

    def made_of(self) -> Finding:
        """Before blocks have mixed them, the latents reach the visual stream alone, text the text, and sound the audio.

        The visual stream has as many tokens as the layout, and all of them change with the latents.
        """
        once = self.once
        firsts: dict[str, int] = {}
        for block, stream in once.stream_places:
            firsts.setdefault(stream, block)
        if VISUAL not in firsts:
            return False, f"there are {listed(firsts)}, and no visual stream"
        tokens = once.architecture.layout(once.denoiser, once.given).tokens
        before = once.taken(firsts.values())
        reached: dict[str, dict[str, Tensor]] = {}
        for source, names in self._sources().items():
            after = once.taken(firsts.values(), {**once.given, **{name: other_than(once.given[name]) for name in names}})
            reached[source] = {stream: _changed(before[i][stream], after[i][stream]) for stream, i in firsts.items()}
        wrong = [
            f"{source} reaches {stream}"
            for source, streams in reached.items()
            for stream, mask in streams.items()
            if source in firsts and stream not in (source, EXTRA) and bool(mask.any())
        ]
        unreached = [source for source in reached if source in firsts and not reached[source][source].any()]
        wrong += [f"{source} does not reach {source}" for source in unreached]
        visual = reached[VISUAL][VISUAL]
        if len(visual) != tokens or not bool(visual.all()):
            wrong.append(f"{int(visual.sum())} of {len(visual)} visual tokens change with the latents, which have {tokens}")
        return not wrong, listed(wrong) if wrong else f"{listed(f'{stream} from block {i} on' for stream, i in firsts.items())}"

    def _sources(self) -> dict[str, list[str]]:
        """The arguments of the call that each stream is made of."""
        given = self.once.given
        spoken = spoken_arguments(self.once.denoiser, given)
        others = [name for name, value in given.items() if name != self.latents and is_movable(value, name)]
        heard = [name for name in others if "audio" in name]
        found = {VISUAL: [self.latents], TEXT: [name for name in others if name in spoken and name not in heard], AUDIO: heard}
        return {stream: names for stream, names in found.items() if names}

    def layout(self) -> Finding:
        """Noise in one patch of the latents reaches one visual token, with the number that the layout gives it."""
        once, patches = self.once, self.once.architecture.patches
        layout = once.architecture.layout(once.denoiser, once.given)
        config: Any = getattr(once.denoiser, "config", None)
        axes, size = ("cfhw", tuple(config.patch_size)) if patches is None else (patches.axes, patches.size)
        kept = [axis for axis in axes if axis != "c"]
        shape = once.given[self.latents][0].shape
        counts = [shape[axes.index(axis)] // width for axis, width in zip(kept, size, strict=True)]
        path, start, length = self._visible()
        said = " x ".join(map(str, layout.shape))
        if length != layout.tokens or prod(counts) != length:
            return False, f"the latents have {length} tokens, and the layout {said}"
        clean = self._entering(path, {})
        for place in _places(counts):
            where: list[Any] = [slice(None)] * len(shape)
            for axis, index, width in zip(kept, place, size, strict=True):
                where[axes.index(axis)] = index * width + width - 1
            token = start + _token(dict(zip(kept, place, strict=True)), layout)
            marked = self._entering(path, {self.latents: _marked(once.given[self.latents], tuple(where))})
            if [token] not in [_changed(clean[name], marked[name]).nonzero().flatten().tolist() for name in clean]:
                return False, f"{said} tokens, wrong at {listed(map(str, place))}"
        return True, f"{said} tokens"

    def _visible(self) -> tuple[str, int, int]:
        """The first list whose modules take tokens that change with the latents; where these begin, and how many there are."""
        once = self.once
        moved = {self.latents: other_than(once.given[self.latents])}
        for path in dict.fromkeys(call.path for call in watched(once.denoiser, once.given)):
            before, after = self._entering(path, {}), self._entering(path, moved)
            for name, tensor in before.items():
                places = _changed(tensor, after[name]).nonzero().flatten().tolist() if name in after else []
                if len(places) > 1 and places[-1] - places[0] + 1 == len(places):
                    return path, places[0], len(places)
        return "", 0, 0

    def _entering(self, path: str, changes: Mapping[str, Any]) -> dict[str, Tensor]:
        """The sequences that the first module of a list takes."""
        return watched(self.once.denoiser, {**self.once.given, **changes}, until=path)[-1].taken() if path else {}

    def handed_on(self) -> Finding:
        """A block takes the streams that one before it returned, bit by bit or changed, and each by its own name."""
        once = self.once
        taken = once.digests_taken()
        given = once.digests("hooks", [(i, "resid", stream) for i, stream in once.stream_places])
        # A stream may pass by the blocks of another list.
        holders = {stream: [i for i, name in once.stream_places if name == stream] for _, stream in once.stream_places}
        pairs = [(one, other, stream) for stream, its in holders.items() for one, other in pairwise(its)]
        loose = [(one, other, stream) for one, other, stream in pairs if taken[other][stream] != given[one, "resid", stream]]
        if not pairs:
            return None, "one block"
        wrong = [pair for pair in _some(loose) if not self._follows(*pair)]
        if wrong:
            one, other, stream = wrong[0]
            return False, f"{stream} of block {other} is not what follows from that of block {one}"
        more = f", and {len(loose)} with something added in between" if loose else ""
        return True, f"{len(pairs) - len(loose)} of {len(pairs)} streams bit by bit{more}"

    def _follows(self, one: int, other: int, stream: str) -> bool:
        """Whether a stream changes, where a later block takes it, with what one before returned: every visual token, and some
        of others; and no other stream does, if there is no block between them."""
        tap = Tap(self.once.expert, one, "resid", lambda tensor: tensor + MARK, stream)
        before, after = (self.once.taken([other], taps=taps)[other] for taps in ([], [tap]))
        changed = {name: _changed(tensor, after[name]) for name, tensor in before.items()}
        apart = other > one + 1 or not any(bool(changed[name].any()) for name in changed if name not in (stream, EXTRA))
        # Some tokens of a text may be others for each block (HiDream).
        return apart and bool(changed[stream].all() if stream == VISUAL else changed[stream].any())


def _some(loose: Sequence[Any]) -> Sequence[Any]:
    """The first and the last of many."""
    return loose if len(loose) <= LOOSE else [*loose[: LOOSE // 2], *loose[-LOOSE // 2 :]]


def _changed(one: Tensor, other: Tensor) -> Bool[Tensor, " tokens"]:
    """The tokens that differ; none that can be told where their number does."""
    if one.shape != other.shape:
        return torch.zeros(one.shape[1], dtype=torch.bool)
    return (one != other).any(dim=-1).any(dim=0)


def _places(counts: Sequence[int]) -> Iterator[list[int]]:
    """Patches by their place along each axis: the first, the last, and others that tell the axes apart."""
    yield [0] * len(counts)
    yield [count - 1 for count in counts]
    for axis in range(len(counts)):
        yield [count - 1 if other == axis else 0 for other, count in enumerate(counts)]
    yield [count // 2 for count in counts]


def _token(place: Mapping[str, int], layout: Layout) -> int:
    """The number of the token at a place, by the names of the axes."""
    if "t" in place:
        return place["t"]
    frame, row, column = (place.get(axis, 0) for axis in AXES)
    return (frame * layout.height + row) * layout.width + column


def _marked(latents: Any, where: tuple[Any, ...]) -> Any:
    """Latents with something added at a place of every sample."""
    marked = [one.clone() for one in latents]
    for one in marked:
        one[where] += MARK
    return torch.stack(marked) if isinstance(latents, Tensor) else type(latents)(marked)
