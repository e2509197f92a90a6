"""Stacks: blocks that are called one after the other, and how their streams come in and go out.

A *stream* is a sequence of tokens that blocks read and write. Where streams are *joined*, a block takes and returns one sequence
with the tokens of one stream after those of another; how many each has follows from the length of the whole and the number of
visual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.errors import InputError, listed
from dit_lens.sites import BLOCK_SITES, Site

VISUAL, TEXT, AUDIO, EXTRA = "visual", "text", "audio", "extra"
"""Streams; extra tokens are those that neither latents nor text nor sound change, as registers."""


@dataclass(frozen=True)
class Stack:
    """Blocks of one list.

    Attributes:
        path: of their list, in the denoiser.
        streams: what a block returns, in this order; where they are joined, along the sequence.
        parameters: of the block's `forward` that bring them in, one for each stream, or one for all that are joined.
        places: where the block returns what `parameters` bring, among all that it returns; in their order when left out.
        returned: how many values a block returns in a tuple; 0 where that follows from the streams: one tensor, or a tuple.
        nothing: places where it returns None.
        variants: by number in the list, the records of blocks that are others, as of a last one that returns no text.
        extra: how many tokens the stream `extra` has, where it is joined with two others.
        sites: the tensors of a block that can be read, in the order in which it computes them.
        in_place: whether a block writes into the streams that it is given.
        width: channels of a visual token, and heads: of its attention; 0 where the denoiser's configuration says it.
        missed: modules of a block that no site stands for, and should.
    """

    path: str
    streams: tuple[str, ...] = (VISUAL,)
    parameters: tuple[str, ...] = ("hidden_states",)
    places: tuple[int, ...] = ()
    returned: int = 0
    nothing: tuple[int, ...] = ()
    variants: tuple[tuple[int, Stack], ...] = ()
    extra: int = 0
    sites: tuple[Site, ...] = BLOCK_SITES
    in_place: bool = False
    width: int = 0
    heads: int = 0
    missed: tuple[str, ...] = field(default=(), compare=False)

    @property
    def joined(self) -> bool:
        """Whether its streams are one sequence."""
        return len(self.parameters) < len(self.streams)

    @property
    def offered(self) -> tuple[tuple[str, str], ...]:
        """Every (site, stream), in the order in which a block computes them."""
        return tuple((site.name, name) for site in self.sites for name in self.streams if site.stream in (None, name))

    def site(self, name: str, stream: str = VISUAL) -> Site:
        """The record of a site.

        Raises:
            InputError: blocks of this stack have no such site in this stream.
        """
        for site in self.sites:
            if site.name == name and stream in self.streams and site.stream in (None, stream):
                return site
        raise InputError(
            f"the blocks in {self.path!r} have no site {name!r} in the stream {stream!r}; there is"
            f" {listed(dict.fromkeys(site.name for site in self.sites))} in {listed(self.streams)}"
        )

    def arguments(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a block call by the names of its parameters.

        Some denoisers call their blocks by position and some by keyword, so the arguments are bound to the signature
        of the class's own `forward` (the instance's may be wrapped).
        """
        return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments

    def streams_in(self, arguments: Mapping[str, Any], visual_tokens: int) -> dict[str, Tensor]:
        """The streams that a block call takes, by name; views of a sequence where they are joined."""
        return self._apart([arguments[parameter] for parameter in self.parameters], visual_tokens)

    def streams_out(self, output: Any, visual_tokens: int) -> dict[str, Tensor]:
        """The streams that a block call returned, by name; views of a sequence where they are joined."""
        returned = output if isinstance(output, tuple) else (output,)
        return self._apart([returned[place] for place in self._places], visual_tokens)

    def replaced(self, output: Any, streams: Mapping[str, Tensor], visual_tokens: int) -> Any:
        """A block's return value with some of its streams replaced, in the structure in which it came."""
        given = self._together({**self.streams_out(output, visual_tokens), **streams})
        if not isinstance(output, tuple):
            return given[0]
        returned = list(output)
        for place, tensor in zip(self._places, given, strict=True):
            returned[place] = tensor
        return tuple(returned)

    def handed_on(self, streams: Mapping[str, Tensor]) -> Any:
        """What a block call returns whose streams are these.

        Raises:
            InputError: blocks return more than their streams, so that nothing but they themselves can say what.
        """
        given = self._together(streams)
        if self.returned > len(given) + len(self.nothing):
            raise InputError(
                f"blocks of {self.path} return {self.returned} values, and {len(given)} of them are streams: they cannot be left"
                " out; write dl.Zero(dl.at(..., site='update')) instead"
            )
        if len(given) == 1 and not self.returned:
            return given[0]
        found = dict(zip(self._places, given, strict=True))
        return tuple(found.get(place) for place in range(self.returned or len(given)))

    @property
    def _places(self) -> tuple[int, ...]:
        return self.places or tuple(range(len(self.parameters)))

    def _together(self, streams: Mapping[str, Tensor]) -> list[Tensor]:
        """Tensors as a block returns them, by the streams in them."""
        parts = [streams[name] for name in self.streams]
        return [torch.cat(parts, dim=1)] if self.joined else parts

    def apart(self, sequence: Tensor, order: Sequence[str], visual_tokens: int) -> dict[str, Tensor]:
        """The streams that lie one after the other in a sequence, by name; views of it.

        Raises:
            InputError: it is too short for what is known of the streams.
        """
        known = {VISUAL: visual_tokens, **({EXTRA: self.extra} if self.extra else {})}
        rest = sequence.shape[1] - sum(known.values())
        sizes = [known.get(stream, rest) for stream in order]
        if rest < 0 or sum(sizes) != sequence.shape[1]:
            raise InputError(
                f"blocks of {self.path} have {sequence.shape[1]} tokens, of which {visual_tokens} are to be visual: the layout of"
                f" the latents and the streams {listed(order)} do not agree; describe them with dl.register(Architecture(...))"
            )
        return dict(zip(order, sequence.split(sizes, dim=1), strict=True))

    def _apart(self, tensors: Sequence[Tensor], visual_tokens: int) -> dict[str, Tensor]:
        """Tensors by the names of their streams."""
        if self.joined:
            return self.apart(tensors[0], self.streams, visual_tokens)
        return dict(zip(self.streams, tensors, strict=True))


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a denoiser: its module, where that is, and the stack that it belongs to."""

    path: str
    module: nn.Module
    stack: Stack
