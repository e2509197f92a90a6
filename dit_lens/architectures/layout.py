"""Layouts: the order of a stream's tokens, and where it is found in what a denoiser is given.

Visual tokens cover the latents, patch by patch: where latents come as (batch, channels, frames, height, width) or the like, their
shape and the size of a patch say how. Some pipelines hand over latents that are packed into tokens already; how they lie then
stands in other arguments: as three numbers, as a list of shapes, or as the position of every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AXES = "fhw"
"""Latent frames, rows, columns."""


@dataclass(frozen=True)
class Layout:
    """The order of tokens: latent `frames`, then token rows (`height`), then token columns (`width`).

    A stream that covers no latents, as the text, lies in one line: a single frame of one row.
    """

    frames: int
    height: int
    width: int

    @staticmethod
    def line(tokens: int) -> Layout:
        """The layout of so many tokens in one line."""
        return Layout(1, 1, tokens)

    @property
    def tokens(self) -> int:
        """Number of tokens of one sample."""
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return (self.frames, self.height, self.width)


@dataclass(frozen=True)
class Patches:
    """How tokens cover the latents.

    Attributes:
        axes: of the latents after the batch: c channels, f frames, h rows, w columns, t tokens.
        size: of a patch along each axis but c, in their order.
    """

    axes: str = "cfhw"
    size: tuple[int, ...] = (1, 2, 2)

    @property
    def packed(self) -> bool:
        """Whether latents come as tokens."""
        return "t" in self.axes

    def layout(self, shape: Sequence[int], arguments: Mapping[str, Any]) -> Layout:
        """The layout of the visual tokens.

        Args:
            shape: of the latents, with the batch. arguments: of the call that hands them over, by name.
        """
        axes = [axis for axis in self.axes if axis != "c"]
        lengths = dict(zip(self.axes, shape[1:], strict=True))
        counts = {axis: lengths[axis] // size for axis, size in zip(axes, self.size, strict=True)}
        if self.packed:
            return packed_layout(counts["t"], arguments)
        return Layout(*(counts.get(axis, 1) for axis in AXES))


def packed_layout(tokens: int, arguments: Mapping[str, Any]) -> Layout:
    """The layout of tokens that were packed before the denoiser is called, from its other arguments; else one line."""
    named = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    candidates: Iterator[Layout | None] = iter(
        (
            Layout(*named) if all(isinstance(size, int) for size in named) else None,  # pyright: ignore[reportArgumentType]
            *(_of_shapes(value) for value in arguments.values()),
            *(_of_positions(value, tokens) for value in arguments.values()),
        )
    )
    fitting = (layout for layout in candidates if layout is not None and layout.tokens == tokens)
    return next(fitting, Layout.line(tokens))


def _of_shapes(value: Any) -> Layout | None:
    """A list of (frames, height, width), one for each sample and all alike, or a list of such lists of one."""
    while isinstance(value, list) and value and isinstance(value[0], (list, tuple)):
        if any(repr(one) != repr(value[0]) for one in value):
            return None
        value = value[0]
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(size, int) for size in value):
        return Layout(*value)
    return None


def _of_positions(value: Any, tokens: int) -> Layout | None:
    """A tensor with the position of every token, rows before columns: (tokens, 3 or 4), or (3, tokens) with where each begins.

    With the batch before it, or without; and with the two ends of each, (3, tokens, 2).
    """
    if not isinstance(value, Tensor):
        return None
    if value.ndim == 4 and value.shape[1:] == (3, tokens, 2):
        value = value[..., 0]
    if value.ndim == 3 and value.shape[1:] == (3, tokens) and tokens > 4:
        value = value.mT
    if value.ndim not in (2, 3) or value.shape[-2] < tokens or value.shape[-1] not in (3, 4):
        return None
    positions = value[0] if value.ndim == 3 else value
    # Where those of other streams stand beside them, they are at one end.
    return _grid(positions[:tokens]) or _grid(positions[-tokens:])


def _grid(positions: Tensor) -> Layout | None:
    """The layout whose places these are, one after the other."""
    tokens = len(positions)
    places = [column.unique(return_inverse=True) for column in positions.unbind(1)]
    moving = [(len(values), inverse) for values, inverse in places if len(values) > 1]
    counts = [count for count, _ in moving]
    if len(moving) > 3 or math.prod(counts) != tokens:
        return None
    grid = torch.cartesian_prod(*(torch.arange(count) for count in counts)).view(tokens, -1)
    if not all(torch.equal(inverse.cpu(), column) for (_, inverse), column in zip(moving, grid.unbind(1), strict=True)):
        return None
    return Layout(*([1] * (3 - len(counts))), *counts)
