"""Cells, and how to select them.

One activation lives in one *cell*: (expert, step, branch, block, site, stream). `at(...)` selects cells by any of these
axes; an axis that is not named is all of it, except that `site` is `resid` and `stream` is `visual` unless named.

    at(block=6, step=0)                        one block at the first step, every branch
    at(block=[0, 5], step=slice(0, 10))        lists and slices
    at(depth=(0.5, 1.0), sigma=(0.8, 1.01))    ranges [low, high), where an axis is continuous
    at(site="update", branch="cond", tokens=mask)
    at(site="heads", block=6, head=[0, 3])     two heads of a block's self-attention

A selection is checked against the model and the schedule before a run starts: what is out of range is an error there,
and never an empty result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.architectures import Layout, Stack
from dit_lens.errors import InputError, listed
from dit_lens.schedule import Forecast
from dit_lens.sites import BLOCK_SITES, Site

Indices = int | np.integer | list[int] | range | set[int] | np.ndarray | slice | str | None
"""What selects along an axis that counts from 0."""

Levels = float | list[float] | tuple[float, float] | str | None
"""What selects along a continuous axis; a tuple is a range [low, high)."""


@dataclass(frozen=True, order=True)
class Cell:
    """Where one activation lives. Two cells are equal when their six coordinates are; the rest are labels.

    Attributes:
        expert, step, branch, block, site, stream: the coordinates; step and block count from 0.
        sigma: noise level of the step. timestep: what the denoiser received for it.
        depth: block / number of blocks of the expert.
    """

    expert: str
    step: int
    branch: str
    block: int
    site: str = "resid"
    stream: str = "visual"
    sigma: float = field(default=math.nan, compare=False)
    timestep: float = field(default=math.nan, compare=False)
    depth: float = field(default=math.nan, compare=False)


@dataclass(frozen=True)
class Extent:
    """All that there is to select from in one run.

    Attributes:
        blocks: how many each expert has. forecast: the schedule. branches, streams, sites, heads: all that some block has.
        stacks: for each expert the stack of every block, as not every block has all of it; all are alike when left out.
    """

    blocks: dict[str, int]
    forecast: Forecast
    branches: tuple[str, ...]
    streams: tuple[str, ...]
    sites: tuple[Site, ...] = BLOCK_SITES
    heads: int = 0
    stacks: Mapping[str, tuple[Stack, ...]] = field(default_factory=dict)

    def stack(self, expert: str, block: int) -> Stack:
        """The stack of a block."""
        return self.stacks[expert][block] if self.stacks else Stack("blocks", self.streams, self.streams, sites=self.sites)

    def site(self, cell: Cell) -> Site:
        """The record of a cell's site."""
        return self.stack(cell.expert, cell.block).site(cell.site, cell.stream)


@dataclass(frozen=True, eq=False)
class Selector:
    """A set of cells, and of tokens in them; made by `at`. None means that the axis was not named: all of it."""

    block: Any = None
    depth: Any = None
    step: Any = None
    sigma: Any = None
    branch: Any = None
    expert: Any = None
    site: Any = "resid"
    stream: Any = "visual"
    head: Any = None
    frames: Any = None
    tokens: Tensor | None = None

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value is not None and name != "tokens"}
        if self.site == "resid":
            del shown["site"]
        if self.stream == "visual":
            del shown["stream"]
        arguments = [f"{name}={value!r}" for name, value in shown.items()]
        return f"at({', '.join([*arguments, *(['tokens=mask'] if self.tokens is not None else [])])})"

    def cells(self, extent: Extent) -> list[Cell]:
        """The selected cells in the order in which a run reaches them.

        Raises:
            InputError: a value is out of range or unknown, or the selection is empty.
        """
        forecast = extent.forecast
        experts = self._names("expert", self.expert, tuple(extent.blocks))
        branches = self._names("branch", self.branch, extent.branches)
        places = self._places(extent)
        steps = self.numbers("step", self.step, len(forecast.timesteps))
        steps &= self._levels("sigma", self.sigma, forecast.sigmas)
        selected = []
        for step in sorted(steps):
            expert = forecast.experts[step]
            if expert not in experts:
                continue
            count = extent.blocks[expert]
            depths = [block / count for block in range(count)]
            blocks = self.numbers("block", self.block, count) & self._levels("depth", self.depth, depths)
            level = {"sigma": forecast.sigmas[step], "timestep": forecast.timesteps[step]}
            there = {block: self._there(extent, expert, block, places) for block in sorted(blocks)}
            selected += [
                Cell(expert, step, branch, block, site, stream, **level, depth=depths[block])
                for branch in forecast.branches
                if branch in branches
                for block in there
                for site, stream in there[block]
            ]
        if not selected:
            raise InputError(
                f"{self} selects nothing: this run has the branches {listed(forecast.branches)} and"
                f" {len(forecast.timesteps)} steps, {listed(_spans(forecast))}"
            )
        return selected

    def _there(self, extent: Extent, expert: str, block: int, places: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of some (site, stream) that a block has; a block that was named is to have one of them."""
        stack = extent.stack(expert, block)
        there = [place for place in stack.offered if place in places]
        if not there and not (_everything(self.block) and _everything(self.depth)):
            offered = listed(dict.fromkeys(f"{site} of {stream}" for site, stream in stack.offered))
            wanted = listed(f"{site} of {stream}" for site, stream in places)
            raise InputError(f"{self}: block {block} of {expert} has no {wanted}; it has {offered}")
        return there

    def _places(self, extent: Extent) -> list[tuple[str, str]]:
        """The selected (site, stream) in the order in which a block computes them."""
        known = tuple(dict.fromkeys(site.name for site in extent.sites))
        sites = self._names("site", self.site, known)
        streams = self._names("stream", self.stream, extent.streams)
        if self.head is not None:
            per_head = list(dict.fromkeys(site.name for site in extent.sites if site.per_head))
            if not per_head or not set(sites) <= set(per_head):
                offered = f"the sites {listed(per_head)}; name them with site=" if per_head else "no site of this model"
                raise InputError(f"{self}: head= belongs to {offered}")
            self.numbers("head", self.head, extent.heads)
        found = [(site, stream) for site in extent.sites for stream in streams if site.name in sites]
        chosen = list(dict.fromkeys((site.name, stream) for site, stream in found if site.stream in (None, stream)))
        if not chosen:
            offered = listed(f"{site.name} of {site.stream}" for site in extent.sites if site.stream is not None)
            raise InputError(f"{self}: no block has {listed(sites)} of {listed(streams)}; there is {offered}")
        return chosen

    def check_tokens(self, layout: Layout) -> None:
        """Raise an InputError when `frames` or `tokens` do not fit the layout of the visual tokens."""
        if self.frames is not None:
            self.numbers("frames", self.frames, layout.frames, "latent frames")
        fitting = (layout.shape[1:], layout.shape)
        if self.tokens is not None and tuple(self.tokens.shape) not in fitting:
            raise InputError(
                f"{self}: the token mask has shape {tuple(self.tokens.shape)}, the layout (frames, height, width) is"
                f" {layout.shape}; write a mask of shape {fitting[0]} or {fitting[1]}"
            )
        if self.tokens is not None and not self.tokens.any():
            raise InputError(f"{self}: the token mask selects no token")

    def take_tokens(self, visual: Tensor) -> Tensor:
        """The selected heads and tokens of (batch, frames, height, width, channels) or (..., heads, channels).

        `head` and `frames` keep all axes. `tokens` leaves one axis in place of the three of the layout, in its order.
        """
        if self.head is not None:
            heads = torch.tensor(sorted(self.numbers("head", self.head, visual.shape[-2])))
            visual = visual.index_select(-2, heads.to(visual.device))
        kept = torch.arange(visual.shape[1])
        if self.frames is not None:
            kept = torch.tensor(sorted(self.numbers("frames", self.frames, visual.shape[1], "latent frames")))
            visual = visual.index_select(1, kept.to(visual.device))
        if self.tokens is None:
            return visual
        mask = self.tokens.cpu().expand(self.tokens.shape[-3:] if self.tokens.ndim == 3 else (len(kept), -1, -1))
        mask = mask[kept] if self.tokens.ndim == 3 else mask
        places = mask.flatten().nonzero()[:, 0]
        return visual.flatten(1, 3).index_select(1, places.to(visual.device))

    @property
    def whole(self) -> bool:
        """Whether it takes all heads and tokens of a tensor, in the shape of the layout."""
        return self.head is None and self.frames is None and self.tokens is None

    def places(self, shape: Sequence[int]) -> Tensor:
        """Which heads and tokens `take_tokens` takes of one row, in its order and shape.

        Args:
            shape: (frames, height, width) or (frames, height, width, heads).

        Returns:
            Indices into that shape, flattened.
        """
        return self.take_tokens(torch.arange(math.prod(shape)).view(1, *shape, 1))[0, ..., 0]

    def part(self, shape: Sequence[int]) -> str:
        """A name for what `take_tokens` takes: equal for selectors that take the same, empty where they take all.

        Args:
            shape: as for `places`.
        """
        places = self.places(shape)
        if places.shape == tuple(shape):
            return ""
        return hashlib.sha256(str(tuple(places.shape)).encode() + places.numpy().tobytes()).hexdigest()[:16]

    def put_tokens(self, visual: Tensor, given: Tensor, places: Tensor) -> Tensor:
        """`visual` with `given` in place of what `take_tokens` takes; all other values keep their bits.

        Args:
            visual: as for `take_tokens`. given: of the shape that it gives. places: what `places` gives.
        """
        if self.whole:
            return given
        index = places.flatten().to(visual.device)
        return visual.flatten(1, -2).index_copy(1, index, given.flatten(1, -2)).view(visual.shape)

    def _names(self, axis: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
        """The names that an axis value selects."""
        if _everything(value):
            return known
        if not isinstance(value, str | list | tuple | set):
            raise InputError(f"{self}: {axis}={value!r} is no name, list of names or 'all'; there is {listed(known)}")
        names = [value] if isinstance(value, str) else list(value)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(f"{self}: there is no {axis} {listed(map(repr, unknown))}; write one of {listed(known)}")
        return tuple(name for name in known if name in names)

    def numbers(self, axis: str, value: Any, count: int, what: str | None = None) -> set[int]:
        """The indices below `count` that an axis value selects; negative ones count from the end."""
        if _everything(value):
            return set(range(count))
        if isinstance(value, slice):
            chosen = set(range(count)[value])
        else:
            wanted = [value] if isinstance(value, int | np.integer) else value
            fitting = isinstance(wanted, list | range | set | np.ndarray)
            if not fitting or not all(isinstance(number, int | np.integer) for number in wanted):
                raise InputError(f"{self}: {axis}={value!r} is no int, list, slice or 'all'")
            outside = [number for number in wanted if not -count <= number < count]
            if outside:
                raise InputError(
                    f"{self}: {axis} {listed(outside)} is out of range: there are {count} {what or axis + 's'},"
                    f" write 0 to {count - 1}"
                )
            chosen = {int(number) % count for number in wanted}
        if not chosen:
            raise InputError(f"{self}: {axis}={value!r} selects none of the {count} {what or axis + 's'}")
        return chosen

    def _levels(self, axis: str, value: Any, levels: Sequence[float]) -> set[int]:
        """The indices of the levels that a value, a list of values or a range [low, high) selects."""
        everywhere = set(range(len(levels)))
        if _everything(value):
            return everywhere
        if isinstance(value, tuple) and len(value) == 2:
            chosen = {index for index in everywhere if value[0] <= levels[index] < value[1]}
        elif isinstance(value, float | int | np.number | list):
            values = value if isinstance(value, list) else [value]
            chosen = {i for i in everywhere if any(math.isclose(levels[i], v, rel_tol=1e-4) for v in values)}
        else:
            raise InputError(f"{self}: {axis}={value!r} is no number, list, (low, high) or 'all'")
        if not chosen:
            shown = listed(f"{level:.4g}" for level in levels)
            raise InputError(f"{self}: {axis}={value!r} matches nothing; there is {shown}")
        return chosen


def at(
    block: Indices = None,
    depth: Levels = None,
    step: Indices = None,
    sigma: Levels = None,
    branch: str | list[str] | None = None,
    expert: str | list[str] | None = None,
    site: str | list[str] = "resid",
    stream: str | list[str] = "visual",
    head: Indices = None,
    frames: Indices = None,
    tokens: Any = None,
) -> Selector:
    """Select cells; an axis that is not named is all of it.

    Args:
        block, step: index, list, slice or "all"; negative indices count from the end.
        depth, sigma: a number, a list, a range [low, high) as a tuple, or "all"; depth is block / number of blocks.
        branch: cond, uncond or what the pipeline has. expert: transformer or transformer_2.
        site: the tensor in the block, a name, a list or "all"; `Lens.describe` lists what the model has.
            resid: the stream after the block. update: that minus the stream before it.
            attn, cross_attn, mlp: what the module returns, before any gate; attn_contribution, cross_attn_contribution,
            mlp_contribution: what the block adds of it to the stream (they add up to update); read-only.
            heads: the input of the self-attention's output projection, one row per head.
            q, k, v: of the self-attention, after normalisation and rotary embedding. qk: q and k side by side, (...,
            heads, 2 * channels), for `dl.frame_map` and `dl.token_map`; read-only.
        stream: visual.
        head: as for block, at the sites that have rows per head: heads, q, k, v, qk, of shape (batch, frames, height, width,
            heads, channels). frames: latent frames, as for block.
        tokens: a boolean mask on the layout, of shape (height, width) or (frames, height, width).

    Returns:
        The selector; `Selector.cells` raises InputError for what does not exist in a run.
    """
    mask = None if tokens is None else torch.as_tensor(tokens)
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"tokens= is a mask of booleans on the layout, and this one holds {mask.dtype}")
    return Selector(block, depth, step, sigma, branch, expert, site, stream, head, frames, mask)


def _everything(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "all")


def _spans(forecast: Forecast) -> list[str]:
    """Which steps each expert runs, for messages: `transformer at 0 to 12`."""
    spans = []
    for expert in dict.fromkeys(forecast.experts):
        steps = [step for step, name in enumerate(forecast.experts) if name == expert]
        spans.append(f"{expert} at {steps[0]} to {steps[-1]}")
    return spans
