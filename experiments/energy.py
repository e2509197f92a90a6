"""What is measured of the energy of tokens: maps made on the device, and numbers of a map and a region."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics

TRAINED, SHUFFLED, RANDOM = "trained", "trained, tokens shuffled", "random weights"
"""Whose energy it is."""
PAPER, CHANNELS, FRAMES = "as in the paper", "without dominant channels", "without the first frame"
CLEANED = "without dominant channels and first frame"
LOOKS = (PAPER, CHANNELS, FRAMES, CLEANED)
"""What of it is looked at."""
DOMINANT = 10.0
"""A channel dominates a block where its root mean square over all tokens of all samples is so many times the median channel's."""
SPARSE = 0.05
"""The share of the tokens, those with the most energy, whose share of the energy says how sparse it is."""
BEHIND = ("background", "wall", "open", "grid")
"""Regions that are no objects; all others together are the foreground."""


Channels = Mapping[tuple[str, int], Bool[np.ndarray, " channels"]]
"""The dominant channels of every block of every expert."""


def channel_squares(
    activation: Float[Tensor, "batch frames height width channels"], cell: dl.Cell
) -> Float[Tensor, "batch channels"]:
    """The mean square of every channel over the tokens of every row."""
    return activation.float().square().mean(dim=(1, 2, 3))


def dominating(squares: Float[np.ndarray, " channels"]) -> Bool[np.ndarray, " channels"]:
    """The channels that dominate, by their squares summed over all samples. All maps of a block lose the same ones: chosen for
    each sample, a channel near the limit would be taken out of some maps and left in others."""
    size = np.sqrt(squares)
    return size > DOMINANT * np.median(size)


@dataclass(frozen=True, eq=False)
class Energies:
    """A reducer to maps of every row, (batch, 2, frames, height, width): L2 norm, and the same without dominant channels."""

    dominant: Channels

    def __call__(self, activation: Float[Tensor, "batch frames height width channels"], cell: dl.Cell) -> Tensor:
        """The maps."""
        squares = activation.float().square()
        out = torch.from_numpy(self.dominant[cell.expert, cell.block]).to(squares.device)
        return torch.stack([squares.sum(dim=-1).sqrt(), squares.masked_fill(out, 0).sum(dim=-1).sqrt()], dim=1)


def components(activation: Float[Tensor, "batch frames height width channels"], cell: dl.Cell) -> Tensor:
    """The first three principal components of the first row's tokens, (1, 3, frames, height, width)."""
    tokens = activation[0].float().flatten(0, 2)
    centred = tokens - tokens.mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    # The sign of a component is free: its largest weight is positive.
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    return rearrange(centred @ (directions * signs), "(f y x) c -> 1 c f y x", y=activation.shape[2], x=activation.shape[3])


def regions(sample: Any) -> dict[str, Bool[np.ndarray, "16 16"]]:
    """The sample's masks, and the foreground."""
    objects = [mask for name, mask in sample.masks.items() if name not in BEHIND]
    return {**sample.masks, "foreground": np.any(objects, axis=0)}


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of some samples of one task: names, and the fraction of each token that lies inside."""

    names: tuple[str, ...]
    inside: Float[np.ndarray, "samples regions height width"]

    @classmethod
    def of(cls, samples: Sequence[Any], layout: tuple[int, int]) -> "Regions":
        """Those of a layout of (height, width) tokens."""
        masks = [regions(sample) for sample in samples]
        inside = [[metrics.mask_fractions(mask, layout) for mask in each.values()] for each in masks]
        return cls(tuple(masks[0]), np.array(inside, dtype=np.float64))


def looks(
    maps: Float[np.ndarray, "samples 2 frames height width"],
) -> dict[str, Float[np.ndarray, "samples frames height width"]]:
    """What is looked at of maps that `Energies` made; a picture of a single frame keeps it."""
    norm, without = maps[:, 0], maps[:, 1]
    later = slice(1 if maps.shape[2] > 1 else 0, None)
    return {PAPER: norm, CHANNELS: without, FRAMES: norm[:, later], CLEANED: without[:, later]}


def preference(
    energy: Float[np.ndarray, "samples frames height width"], inside: Float[np.ndarray, "samples regions height width"]
) -> Float[np.ndarray, "samples regions"]:
    """Share of the energy inside a region over its share of the area; nan for a region that is not there."""
    area = inside.mean(axis=(2, 3))
    return metrics.region_share(energy[:, None].astype(np.float64), inside) / np.where(area > 0, area, np.nan)


def localisation(
    energy: Float[np.ndarray, "samples frames height width"], inside: Float[np.ndarray, "samples regions height width"]
) -> Float[np.ndarray, "samples regions"]:
    """Area under the ROC curve of the energy for tokens of which any part lies inside; nan where all do, or none."""
    ranks = rankdata(energy.reshape(len(energy), -1), axis=1).reshape(energy.shape).sum(axis=1)
    positive = (inside > 0).sum(axis=(2, 3)) * energy.shape[1]
    negative = energy[0].size - positive
    above = np.einsum("syx,sryx->sr", ranks, (inside > 0).astype(float)) - positive * (positive + 1) / 2
    pairs = positive * negative
    return above / np.where(pairs > 0, pairs, np.nan)


def sparsity(energy: Float[np.ndarray, "samples frames height width"]) -> Float[np.ndarray, " samples"]:
    """Share of the energy in the `SPARSE` part of the tokens that has most of it; `SPARSE` itself where it is spread evenly."""
    falling = -np.sort(-energy.reshape(len(energy), -1).astype(np.float64), axis=1)
    most = SPARSE * falling.shape[1]
    # Where the part ends within a token, that token counts by as much of it as lies in the part.
    weights = (most - np.arange(falling.shape[1])).clip(0, 1)
    return falling @ weights / falling.sum(axis=1)
