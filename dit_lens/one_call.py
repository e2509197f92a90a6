"""One call of a denoiser, made again and again: plain, or with an engine's taps and the like in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.architectures import Architecture, Block
from dit_lens.calls import sample_of
from dit_lens.sites import Site
from dit_lens.taps import Attention, Bypass, Engine, Tap, to_host

Place = tuple[int, str, str]
"""(block, site, stream)."""


Digest = tuple[tuple[int, ...], tuple[int, ...]]
"""What `digest` makes of a tensor."""


class OneCall:
    """A denoiser with what is said of it, the arguments of a call by name, and the engines to read it with.

    Attributes:
        blocks: all of them. places: every (block, site, stream). plain: the output that nothing was done to. made: how many
            calls were made.
    """

    def __init__(
        self, denoiser: nn.Module, architecture: Architecture, given: dict[str, Any], engines: Mapping[str, Engine]
    ) -> None:
        self.denoiser, self.architecture, self.given, self.engines = denoiser, architecture, given, engines
        self.expert = architecture.experts[0]
        self.blocks: list[Block] = architecture.blocks(denoiser)
        self.places: list[Place] = [(i, *place) for i, block in enumerate(self.blocks) for place in block.stack.offered]
        self.made = 0
        with torch.no_grad():
            self.plain = to_host(self._answer(given))

    @property
    def stream_places(self) -> list[tuple[int, str]]:
        """Every (block, stream)."""
        return [(i, stream) for i, block in enumerate(self.blocks) for stream in block.stack.streams]

    def site(self, place: Place) -> Site:
        """The record of a place."""
        block, site, stream = place
        return self.blocks[block].stack.site(site, stream)

    def kinds(self) -> list[int]:
        """The first block of each kind: of a list, with these sites and streams."""
        kinds = [(block.stack.path, block.stack.sites, block.stack.streams) for block in self.blocks]
        return [number for number, kind in enumerate(kinds) if kinds.index(kind) == number]

    @property
    def sample(self) -> list[int]:
        """Those, and the last block; others are built as these are, and large models have large activations."""
        return sorted({*self.kinds(), len(self.blocks) - 1})

    def sampled(self, *sites: str) -> list[Place]:
        """The places of the sample, at these sites where they are named."""
        blocks = set(self.sample)
        return [place for place in self.places if place[0] in blocks and (not sites or place[1] in sites)]

    def _answer(self, given: Mapping[str, Any]) -> Tensor:
        self.made += 1
        return sample_of(self.denoiser(**given))

    def call(
        self,
        engine: str,
        taps: Sequence[Tap] = (),
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The output, with taps and the like in place; for other arguments where they are given."""
        with torch.no_grad():
            answer = self.engines[engine].call(lambda: self._answer(given or self.given), taps, bypasses, attentions)
            return to_host(answer)

    def seen(self, engine: str, places: Sequence[Place]) -> tuple[dict[Place, Tensor], Tensor]:
        """What passes at some places, and the output."""
        found: dict[Place, Tensor] = {}
        taps = [
            Tap(self.expert, place[0], place[1], lambda tensor, place=place: found.__setitem__(place, to_host(tensor)), place[2])
            for place in places
        ]
        output = self.call(engine, taps)
        return found, output

    def digests(self, engine: str, places: Sequence[Place]) -> dict[Place, Digest]:
        """What tells the tensors at some places from others, without keeping them."""
        found: dict[Place, Digest] = {}
        taps = [
            Tap(self.expert, place[0], place[1], lambda tensor, place=place: found.__setitem__(place, digest(tensor)), place[2])
            for place in places
        ]
        self.call(engine, taps)
        return found

    def taken(
        self, blocks: Iterable[int], given: Mapping[str, Any] | None = None, taps: Sequence[Tap] = ()
    ) -> dict[int, dict[str, Tensor]]:
        """The streams that some blocks take, each as it stood before the block ran."""
        taken: dict[int, dict[str, Tensor]] = {block: {} for block in blocks}
        bypasses = [Bypass(self.expert, block, partial(_keep, its)) for block, its in taken.items()]
        self.call("hooks", taps, bypasses, given=given)
        return taken

    def digests_taken(self) -> list[dict[str, Digest]]:
        """What tells the streams that every block takes from others."""
        taken: list[dict[str, Digest]] = [{} for _ in self.blocks]
        bypasses = [Bypass(self.expert, block, partial(_keep_digests, its)) for block, its in enumerate(taken)]
        self.call("hooks", bypasses=bypasses)
        return taken


def _keep(kept: dict[str, Tensor], streams: Mapping[str, Tensor]) -> None:
    kept |= {name: to_host(tensor) for name, tensor in streams.items()}


def _keep_digests(kept: dict[str, Digest], streams: Mapping[str, Tensor]) -> None:
    kept |= {name: digest(tensor) for name, tensor in streams.items()}


def digest(tensor: Tensor) -> Digest:
    """Shape, and a sum over the bits of all values, each with a factor of its own; other bits have the same by bad luck alone."""
    bits = tensor.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
    factors = torch.arange(1, bits[0].numel() + 1, device=bits.device) * 2654435761 + 1
    rows = (bits.flatten(1).long() * factors).sum(1)
    return tuple(tensor.shape), tuple(rows.tolist())


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of a difference in units of what is expected."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
