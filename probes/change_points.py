"""Where a curve over blocks changes: bands found from the data, and how they agree with bands that somebody drew.

    found = bands(curves)                       # (samples, blocks), or (samples, blocks, series)
    found.boundaries, found.low, found.high     # as relative depth, with intervals over samples
    agreement_of_bands(curves.mean(axis=0), drawn_bands(np.arange(14) / 14))

A curve is taken to be constant within bands. For a given number of changes the best boundaries are found exactly, by dynamic
programming over all of them (least squares; several series change together, unscaled). A boundary at relative depth b / n lies
before block b of n.

*How many changes* is decided by a shuffle test, from none upwards: do up to `most` changes explain more of what k changes leave
over than they explain of the same residuals in random order? If not, at the level of 5 %, there are k. By this, a curve of
noise without any order has a change in one of twenty cases, whatever the noise; the Bayesian information criterion, with a
level and a place as the two parameters of a change, finds one in 45 % of such curves of 14 blocks.

Two boundaries in a smooth ramp are found too: that a curve can be cut does not say that it has steps. What the bands say is
therefore held against curves whose blocks were shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dit_lens.errors import InputError

PAPER = (0.25, 0.75)
"""Boundaries of the bands that the paper draws (perception, reasoning, consolidation), in relative depth."""
MOST, LEVEL = 3, 0.05

Curve = Float[np.ndarray, "blocks ..."]
"""A value for every block, or one for every block and series."""
Curves = Float[np.ndarray, "samples blocks ..."]


@dataclass(frozen=True, eq=False)
class Bands:
    """Bands of a curve over blocks.

    Attributes:
        starts: the first block of each band but the first one. levels: what each band has in each series.
        boundaries: `starts` as relative depth. low, high: the ends of their 95 % intervals over samples, nan without samples.
        blocks: how many there are. samples: how many were resampled.
    """

    starts: tuple[int, ...]
    levels: Float[np.ndarray, "bands series"]
    low: tuple[float, ...]
    high: tuple[float, ...]
    blocks: int
    samples: int

    @property
    def boundaries(self) -> tuple[float, ...]:
        return tuple(start / self.blocks for start in self.starts)

    @property
    def labels(self) -> Int[np.ndarray, " blocks"]:
        """The number of the band of every block."""
        return np.searchsorted(self.starts, np.arange(self.blocks), side="right")

    def contains(self, depth: float, boundary: int) -> bool:
        """Whether the interval of a boundary contains a relative depth, to the width of a block: one that is drawn between two
        blocks is that of the later one."""
        start = np.ceil(depth * self.blocks - 1e-9) / self.blocks
        return bool(self.low[boundary] - 1e-9 <= start <= self.high[boundary] + 1e-9)


@dataclass(frozen=True)
class Agreement:
    """The share of blocks with the same label, the mean of this over shuffled blocks, and how often these agree as well (p)."""

    share: float
    shuffled: float
    p: float


def bands(
    curves: Curves,
    changes: int | None = None,
    *,
    most: int = MOST,
    resamples: int = 1000,
    seed: int = 0,
) -> Bands:
    """The bands of the mean of curves, with intervals from drawing samples with replacement.

    Args:
        curves: one for each sample (or each draw of a bootstrap; then see `bands_of_draws`). changes: how many; up to `most`,
            decided by the shuffle test, when left out.

    Raises:
        InputError: a value that is not finite, or fewer blocks than bands.
    """
    values = _checked(curves, 3)
    random = np.random.default_rng(seed)
    counts = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples) / len(values)
    drawn = np.einsum("rs,sbc->rbc", counts, values) if len(values) > 1 else values[:0]
    return bands_of_draws(values.mean(axis=0), drawn, changes, most=most, seed=seed, samples=len(values))


def bands_of_draws(
    curve: Curve,
    draws: Curves,
    changes: int | None = None,
    *,
    most: int = MOST,
    seed: int = 0,
    samples: int = 0,
) -> Bands:
    """The bands of a curve, with intervals from curves that were drawn from its uncertainty in some other way.

    Args and errors: as for `bands`; `samples` is what the draws stand for.
    """
    values, drawn = _checked(curve, 2), _checked(draws, 3)
    changes = count_changes(values, most=most, seed=seed) if changes is None else changes
    starts = _starts(values[None], changes)[0]
    found = _starts(drawn, changes) / len(values) if len(drawn) else np.full((1, changes), np.nan)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    levels = np.stack([part.mean(axis=0) for part in np.split(values, starts)])
    ends = (tuple(map(float, end)) for end in (low, high))
    return Bands(tuple(map(int, starts)), levels, *ends, blocks=len(values), samples=samples)


def count_changes(curve: Curve, *, most: int = MOST, level: float = LEVEL, shuffles: int = 499, seed: int = 0) -> int:
    """How many changes a curve has, by the shuffle test; at most `most`."""
    values = _checked(curve, 2)
    random, blocks = np.random.default_rng(seed), len(values)
    errors = _errors(values[None], most)[0]
    scale = 1e-12 * max(errors[0], 1e-300)
    for changes in range(most):
        if errors[changes] <= scale:
            return changes
        starts = _starts(values[None], changes)[0]
        left = np.concatenate([part - part.mean(axis=0) for part in np.split(values, starts)])
        orders = random.permuted(np.tile(np.arange(blocks), (shuffles, 1)), axis=1)
        further = _errors(left[orders], most - changes)[:, -1]
        as_good = int((further <= errors[most] + scale).sum())
        if (1 + as_good) / (1 + shuffles) > level:
            return changes
    return most


def agreement(
    labels: Int[np.ndarray, "*orders blocks"] | Sequence[int],
    reference: Int[np.ndarray, " blocks"],
    shuffled: Int[np.ndarray, "orders blocks"],
) -> Agreement:
    """How far labels agree with those of a reference, and how far those agree that were found after shuffling."""
    share, null = float(np.mean(np.asarray(labels) == reference)), (shuffled == reference).mean(axis=1)
    return Agreement(share, float(null.mean()), (1 + int((null >= share - 1e-9).sum())) / (1 + len(null)))


def agreement_of_bands(curve: Curve, reference: Int[np.ndarray, " blocks"], *, shuffles: int = 499, seed: int = 0) -> Agreement:
    """How far the bands of a curve, cut as often as the reference, agree with it; held against the curve with shuffled blocks."""
    values, changes = _checked(curve, 2), int(reference.max())
    blocks = len(values)
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(blocks), (shuffles, 1)), axis=1)
    starts = _starts(np.concatenate([values[None], values[orders]]), changes)
    labels = (starts[:, None] <= np.arange(blocks)[:, None]).sum(axis=-1)
    return agreement(labels[0], reference, labels[1:])


def drawn_bands(depth: ArrayLike, boundaries: Sequence[float] = PAPER) -> Int[np.ndarray, " blocks"]:
    """The number of the band of blocks at these relative depths (block / number of blocks); the paper's unless given."""
    return np.searchsorted(boundaries, np.asarray(depth), side="right")


def _costs(values: Float[np.ndarray, "curves blocks series"]) -> Float[np.ndarray, "curves starts ends"]:
    """The squared error of one level for the blocks from start to before end; infinite where there is no block."""
    count, blocks, series = values.shape
    centred = values - values.mean(axis=1, keepdims=True)  # the sums below then lose no digits
    sums = np.concatenate([np.zeros((count, 1, series)), centred.cumsum(axis=1)], axis=1)
    squares = np.concatenate([np.zeros((count, 1)), (centred**2).sum(axis=2).cumsum(axis=1)], axis=1)
    lengths = np.arange(blocks + 1) - np.arange(blocks + 1)[:, None]
    spread = ((sums[:, None] - sums[:, :, None]) ** 2).sum(axis=-1) / np.maximum(lengths, 1)
    return np.where(lengths > 0, np.maximum(squares[:, None] - squares[:, :, None] - spread, 0), np.inf)


def _search(values: Float[np.ndarray, "curves blocks series"], changes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each number of changes: the least error of the first blocks, by how many they are, and where the last band starts."""
    if values.shape[1] <= changes:
        raise InputError(f"{changes} changes need at least {changes + 1} blocks, and the curve has {values.shape[1]}")
    costs = _costs(values)
    errors, places = [costs[:, 0]], []
    for _ in range(changes):
        options = errors[-1][:, :, None] + costs
        places.append(options.argmin(axis=1))
        errors.append(options.min(axis=1))
    return errors, places


def _errors(values: Float[np.ndarray, "curves blocks series"], most: int) -> Float[np.ndarray, "curves changes"]:
    """The least squared error with 0 to `most` changes."""
    return np.stack([error[:, -1] for error in _search(values, most)[0]], axis=1)


def _starts(values: Float[np.ndarray, "curves blocks series"], changes: int) -> Int[np.ndarray, "curves changes"]:
    """The first blocks of all bands but the first one."""
    places = _search(values, changes)[1]
    rows, end = np.arange(len(values)), np.full(len(values), values.shape[1])
    starts = []
    for place in reversed(places):
        end = place[rows, end]
        starts.append(end)
    return np.stack(starts[::-1], axis=1) if starts else np.zeros((len(values), 0), dtype=int)


def _checked(values: np.ndarray, axes: int) -> np.ndarray:
    """As floats, with an axis of series."""
    found = np.asarray(values, dtype=float)
    found = found[..., None] if found.ndim == axes - 1 else found
    if found.ndim != axes:
        raise InputError(f"change points are of a curve over blocks, or one for each sample, and this has shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(f"change points need finite values, and {int((~np.isfinite(found)).sum())} of {found.size} are not")
    return found
