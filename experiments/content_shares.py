"""Shares of perceptual, reasoning and consolidation content over the blocks, from three kinds of evidence.

* *Selectivity*: for each content the mean over its targets (of all tasks, and over the steps measured) of how much better a probe
  reads the target than a control task; negative means count as 0; divided by the sum over the three contents. What is read from
  a block need not have been written by it: the *gain* is a block's mean selectivity less that of the block before, for the first
  block less that of the noisy latents, and says where content becomes readable.
* *Damage*: what is lost of perception, reasoning and picture by leaving the block out, means over samples and steps, negative
  means 0. The three have units of their own, so each is divided by its own sum over the blocks: of all the damage that blocks
  do to it one by one, the share of this block. Where nothing is lost, all three are 0.
  Matched noise, the control, is given in the same units: over what leaving blocks out loses, not over its own sum.
* *Patching*: how much more of the donor's answer is painted with the update of its run; one curve, no shares.

Where no content has any selectivity, each has a third. Intervals: for damage and patching samples are drawn with
replacement. Of a probe the interval over test samples is known, so selectivity is drawn from normal distributions of that width,
times the root of two for the control's own error; of each target independently for blocks, the same for all steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dit_lens.errors import InputError
from probes.change_points import PAPER, agreement, agreement_of_bands, bands_of_draws, drawn_bands

CONTENTS = ("perceptual", "reasoning", "consolidation")
CONTENT_OF = dict(zip(("perception", "reasoning", "picture"), CONTENTS, strict=True))
DRAWS = 1000
WIDTH = 2 * 1.959964
"""Standard deviations from end to end of a 95 % interval."""


@dataclass(frozen=True, eq=False)
class Profile:
    """A quantity over the blocks, and draws of it from its uncertainty.

    Attributes:
        name: of the quantity. blocks: their numbers. depth: relative. series: contents, or what the one curve is.
        values, draws: the quantity. samples: how many are behind it.
    """

    name: str
    blocks: tuple[int, ...]
    depth: tuple[float, ...]
    series: tuple[str, ...]
    values: Float[np.ndarray, "blocks series"]
    draws: Float[np.ndarray, "draws blocks series"]
    samples: int

    def table(self) -> pd.DataFrame:
        """One row per block and series with its interval."""
        low, high = np.quantile(self.draws, [0.025, 0.975], axis=0) if len(self.draws) else (self.values * np.nan,) * 2
        index = pd.MultiIndex.from_product([self.blocks, self.series], names=["block", "content"])
        columns = {"value": self.values.ravel(), "low": low.ravel(), "high": high.ravel()}
        depth = dict(zip(self.blocks, self.depth, strict=True))
        table = pd.DataFrame(columns, index=index).reset_index()
        return table.assign(quantity=self.name, depth=table["block"].map(depth), samples=self.samples)

    def compared(self) -> dict[str, Any]:
        """Its bands beside the paper's: how many changes it has, where two of them are, and how far the labels agree."""
        if len(self.blocks) < 4:
            raise InputError(f"bands need at least 4 blocks, and {len(self.blocks)} were measured; name more depths")
        free = bands_of_draws(self.values, self.draws, samples=self.samples)
        found = [[self._place(end * free.blocks) for end in ends] for ends in zip(free.low, free.high, strict=True)]
        two = bands_of_draws(self.values, self.draws, len(PAPER), samples=self.samples)
        row: dict[str, Any] = {"quantity": self.name, "changes": len(free.starts), "samples": self.samples}
        row["found"] = [(self.depth[start], *ends) for start, ends in zip(free.starts, found, strict=True)]
        for place, depth in enumerate(PAPER):
            start = self.depth[two.starts[place]]
            # Blocks may be thinned out, so a boundary's place is told by the block where it is, of all that the model has.
            low, high = (self._place(end * two.blocks) for end in (two.low[place], two.high[place]))
            row |= {f"boundary {place}": start, f"low {place}": low, f"high {place}": high}
            row[f"contains {depth}"] = two.contains(self._nearest(depth), place)
        reference = drawn_bands(self.depth)
        row |= {f"bands {name}": value for name, value in asdict(agreement_of_bands(self.values, reference)).items()}
        if len(self.series) == len(CONTENTS):
            labels = np.where(self.values.max(axis=1) > 0, self.values.argmax(axis=1), -1)
            orders = np.random.default_rng(0).permuted(np.tile(labels, (999, 1)), axis=1)
            row |= {f"content {name}": value for name, value in asdict(agreement(labels, reference, orders)).items()}
        return row

    def _place(self, index: float) -> float:
        """The depth of a boundary that is between blocks of a resample's quantile, in the measured blocks."""
        return float(np.interp(index, np.arange(len(self.depth)), self.depth))

    def _nearest(self, depth: float) -> float:
        """A relative depth of the model as one of the measured blocks."""
        return float(np.searchsorted(self.depth, depth - 1e-9)) / len(self.depth)


def shares(values: Float[np.ndarray, "*batch contents"]) -> Float[np.ndarray, "*batch contents"]:
    """Of each content its part of the sum, negative values taken as 0; a third each where nothing is left."""
    left = np.clip(values, 0, None)
    total = left.sum(axis=-1, keepdims=True)
    return np.where(total > 0, left / np.where(total > 0, total, 1), 1 / values.shape[-1])


def of_readings(readings: pd.DataFrame, seed: int = 0) -> tuple[Profile, Profile, Profile]:
    """Shares of selectivity, selectivity itself, and the gain of every block.

    Args:
        readings: one row per task, target, step and block: `content`, `value` (selectivity), `low`, `high`, `depth`, `samples`.
            As block -1 stands what the noisy latents give; a target that has no score somewhere (a single class, as
            in the videos of a model that solves nothing) is left out, and a content without targets counts as 0.
    """
    keys = ["task", "target", "content", "step"]
    wide = {name: readings.pivot_table(name, keys, "block", dropna=False) for name in ("value", "low", "high")}
    there = pd.concat(wide.values(), axis=1).notna().all(axis=1)
    if not there.any():
        raise InputError(f"none of {readings['target'].nunique()} targets has a selectivity at every block; read more samples")
    value, low, high = (np.asarray(wide[name][there], dtype=float) for name in ("value", "low", "high"))
    blocks, rows = tuple(int(block) for block in wide["value"].columns), wide["value"][there].index
    units = np.unique([f"{task}, {target}" for task, target, *_ in rows], return_inverse=True)[1]
    noise = np.random.default_rng(seed).normal(size=(DRAWS, units.max() + 1, len(blocks)))
    drawn = value + noise[:, units] * (high - low) / WIDTH
    member = np.stack([rows.get_level_values("content") == content for content in CONTENTS]).astype(float)
    member /= np.maximum(member.sum(axis=1, keepdims=True), 1)
    mean, draws = (member @ value).T, (member @ drawn).transpose(0, 2, 1)
    gain, gains = np.diff(mean, axis=0), np.diff(draws, axis=1)
    blocks, mean, draws = blocks[1:], mean[1:], draws[:, 1:]
    place = readings.dropna(subset=["depth"]).drop_duplicates("block").set_index("block")["depth"]
    common = {"blocks": blocks, "depth": tuple(float(place[block]) for block in blocks), "series": CONTENTS}
    common["samples"] = int(readings["samples"].min())
    return (
        Profile("share of selectivity", values=shares(mean), draws=shares(draws), **common),
        Profile("selectivity", values=mean, draws=draws, **common),
        Profile("gain", values=gain, draws=gains, **common),
    )


def of_damage(damage: pd.DataFrame, by: pd.DataFrame | None = None, name: str = "share of damage", seed: int = 0) -> Profile:
    """Of all that is lost of a content at one block or another, the share of each block.

    Args:
        damage: one row per sample (`one`), step, block and content: `value`, `depth`.
        by: instead of `damage`, what is lost by something else, in shares of the sum of `damage`.
    """
    values, blocks, depth = _by_sample(damage, list(CONTENTS))
    others = values if by is None else _by_sample(by, list(CONTENTS))[0]

    def over_blocks(mean: np.ndarray, lost: np.ndarray) -> np.ndarray:
        total = np.clip(lost, 0, None).sum(axis=-2, keepdims=True)
        return np.clip(mean, 0, None) / np.where(total > 0, total, 1)

    shared = over_blocks(others.mean(axis=0), values.mean(axis=0))
    # A unit that is drawn anew can come near nothing where samples are few, so that of another thing is not.
    draws = over_blocks(_resampled(others, seed), _resampled(values, seed) if by is None else values.mean(axis=0))
    return Profile(name, blocks, depth, CONTENTS, shared, draws, len(values))


def of_patching(effects: pd.DataFrame, name: str, seed: int = 0) -> Profile:
    """How much more of the donor's answer is painted; columns as of damage, with one `content`."""
    values, blocks, depth = _by_sample(effects, ["reasoning"])
    return Profile(name, blocks, depth, ("reasoning",), values.mean(axis=0), _resampled(values, seed), len(values))


def _by_sample(table: pd.DataFrame, contents: list[str]) -> tuple[np.ndarray, tuple[int, ...], tuple[float, ...]]:
    """Means over the steps as (samples, blocks, contents), and the blocks with their depths."""
    wide = table.pivot_table("value", "one", ["block", "content"], sort=True)
    blocks = sorted(table["block"].unique().tolist())
    place = table.drop_duplicates("block").set_index("block")["depth"]
    stacked = np.stack([np.stack([wide[block, content] for content in contents], axis=-1) for block in blocks], axis=1)
    return stacked, tuple(blocks), tuple(float(place[block]) for block in blocks)


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over samples drawn with replacement; none where there is one sample."""
    count = len(values)
    if count < 2:
        return np.zeros((0, *values.shape[1:]))
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.einsum("rs,s...->r...", counts / count, values)
