"""The layer lens: what the model would answer if its later blocks did nothing.

Every block adds to one residual stream, and the final head reads the stream after the last block. Applied to the stream
after an earlier block, the head says what has been decided there: a velocity, and the clean video that it implies. The
head itself is the denoiser's own; the later blocks of one recorded call are bypassed.

A stream in the middle need not be in the coordinates that the head reads. The tuned form (after the tuned lens for
language models, Belrose et al. 2023, arXiv:2303.08112) first takes it through an affine map, fitted on the streams of
other runs to give the stream after the last block. What it finds in the middle, an affine probe finds: it is an upper
view, the plain form a lower one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.calls import DenoiserCall
from dit_lens.errors import InputError, listed
from dit_lens.lens import Lens
from dit_lens.replay import Replay, Resume
from dit_lens.run import Run
from dit_lens.taps import Bypass

Place = tuple[str, int]
"""(expert, block)."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """From the stream after a block to that after the last one, token by token: stream @ weight + bias."""

    weight: Float[Tensor, "channels channels"] = field(repr=False)
    bias: Float[Tensor, " channels"] = field(repr=False)

    def __call__(self, stream: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens channels"]:
        """The mapped stream, computed in float32 and given in the stream's own precision."""
        weight, bias = (part.to(stream.device, torch.float32) for part in (self.weight, self.bias))
        return (stream.float() @ weight + bias).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class TunedLens:
    """One affine map for each block of each expert that was fitted."""

    maps: Mapping[Place, AffineMap]

    def map_at(self, expert: str, block: int) -> AffineMap:
        """The map of a block; an InputError where none was fitted."""
        if (expert, block) not in self.maps:
            there = listed(f"block {b} of {e}" for e, b in sorted(self.maps))
            raise InputError(f"the tuned lens has no map for block {block} of {expert}; it has {there}")
        return self.maps[expert, block]

    def explained(self, lens: Lens, runs: Run | Iterable[Run]) -> dict[Place, float]:
        """For each map, the share of the variance of the last stream that it explains (R squared, over all channels).

        Give runs that were not fitted; only then does it say whether a map holds in general.
        """
        missed: dict[Place, float] = {}
        total: dict[Place, float] = {}
        sums: dict[Place, _Sums] = {}
        for place, stream, last in _pairs(lens, runs):
            if place in self.maps:
                missed[place] = missed.get(place, 0.0) + float((self.maps[place](stream) - last).double().square().sum())
                sums.setdefault(place, _Sums(last.shape[-1])).add(last, last)
        for place, seen in sums.items():
            total[place] = float(seen.covariance()[0].trace()) * seen.count
        return {place: 1 - missed[place] / total[place] for place in missed}


def fit_tuned_lens(lens: Lens, runs: Run | Iterable[Run], ridge: float = 1e-3) -> TunedLens:
    """Fit the tuned form of the layer lens.

    The map is what a ridge regression adds to the identity: the more ridge, the closer to the plain form (with the mean
    of what later blocks add).

    Args:
        lens: the lens of the runs.
        runs: with `resid` recorded in full, or at the same tokens, at the blocks to fit and at the last one; all steps
            and branches that were recorded count, each token as one observation.
        ridge: in units of the mean variance of a channel; more than zero.

    Raises:
        InputError: nothing was recorded to fit on, or no ridge.
    """
    if ridge <= 0:
        raise InputError(f"ridge={ridge} does not do; write a number above zero")
    sums: dict[Place, _Sums] = {}
    for place, stream, last in _pairs(lens, runs):
        sums.setdefault(place, _Sums(stream.shape[-1])).add(stream, last.double() - stream.double())
    if not sums:
        raise InputError("the runs hold no pair of streams to fit on; record=dl.at() keeps those of all blocks")
    return TunedLens({place: seen.fit(ridge) for place, seen in sums.items()})


def layer_lens(
    lens: Lens,
    call: DenoiserCall,
    block: int,
    tuned: TunedLens | None = None,
    stream: Tensor | None = None,
) -> Replay:
    """What the final head makes of the stream after a block, in one denoiser call.

    Args:
        lens: the lens of the run that made the call. call: one of `Run.calls`.
        block: the block, negative from the end; after the last one it is the denoiser's own output.
        tuned: to take the stream through the block's affine map first.
        stream: the stream after the block, if it was recorded: (batch, frames, height, width, channels) or (batch,
            tokens, channels); no block runs then. For models with one stream.

    Returns:
        The replay, with `velocity` and `x0_hat`.

    Raises:
        InputError: there is no such block, or no map for it.
    """
    count = len(lens.architecture.block_list(lens.architecture.denoisers(lens.pipe)[call.expert]))
    if not -count <= block < count:
        raise InputError(f"block {block} is out of range: {call.expert} has {count} blocks, write 0 to {count - 1}")
    block %= count
    # After the last block nothing is to be translated, whatever a fit made of it.
    translate = tuned.map_at(call.expert, block) if tuned is not None and block < count - 1 else None
    if stream is not None:
        return lens.replay(call, resume=Resume(count, stream if translate is None else translate(stream)))

    def around(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return streams

    def around_first(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return streams if translate is None else {**streams, "visual": translate(streams["visual"])}

    ways = [Bypass(call.expert, b, around_first if b == block + 1 else around) for b in range(block + 1, count)]
    return lens.replay(call, bypasses=ways)


class _Sums:
    """Sums over tokens, from which a regression of `there` on `here` follows; in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._here, self._there = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
        self._square, self._product = (torch.zeros(channels, channels, dtype=torch.float64) for _ in range(2))

    def add(self, here: Tensor, there: Tensor) -> None:
        """Add the tokens of two streams of the same shape."""
        here, there = (stream.detach().cpu().double().flatten(0, -2) for stream in (here, there))
        self.count += len(here)
        self._here += here.sum(0)
        self._there += there.sum(0)
        self._square += here.T @ here
        self._product += here.T @ there

    def covariance(self) -> tuple[Tensor, Tensor]:
        """The covariance of `here`, and of `here` with `there`."""
        here, there = self._here / self.count, self._there / self.count
        return (
            self._square / self.count - torch.outer(here, here),
            self._product / self.count - torch.outer(here, there),
        )

    def fit(self, ridge: float) -> AffineMap:
        """The map from a stream to itself plus what the regression predicts."""
        square, product = self.covariance()
        identity = torch.eye(len(square), dtype=torch.float64)
        added = torch.linalg.solve(square + ridge * square.diagonal().mean() * identity, product)
        bias = (self._there - self._here @ added) / self.count
        return AffineMap((identity + added).float(), bias.float())


def _pairs(lens: Lens, runs: Run | Iterable[Run]) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """(expert, block), its stream and that after the last block, for every call in which both were recorded alike."""
    denoisers = lens.architecture.denoisers(lens.pipe)
    for run in [runs] if isinstance(runs, Run) else runs:
        for end in run.activations.find(site="resid", stream="visual"):
            expert = end.cell.expert
            if end.cell.block != len(lens.architecture.block_list(denoisers[expert])) - 1 or end.reduce != "full":
                continue
            here = {"expert": expert, "step": end.cell.step, "branch": end.cell.branch}
            for entry in run.activations.find(record=end.record, site="resid", stream="visual", **here):
                if entry.cell.block < end.cell.block:
                    yield (expert, entry.cell.block), entry.tensor, end.tensor
