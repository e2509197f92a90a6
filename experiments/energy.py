"""What is measured of the energy of tokens: maps made on the device, and numbers of a map and a region."""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

import dit_lens as dl

TRAINED, SHUFFLED, RANDOM = "trained", "trained, tokens shuffled", "random weights"
"""Whose energy it is."""
DOMINANT = 10.0
"""A channel dominates where its root mean square over the tokens of a row is so many times that of the median channel."""
BEHIND = ("background", "wall", "open", "grid")
"""Regions that are no objects; all others together are the foreground."""


def energies(activation: Float[Tensor, "batch frames height width channels"], cell: dl.Cell) -> Tensor:
    """Maps of every row, (batch, 3, frames, height, width): L2 norm, the same without dominant channels, how many these are."""
    squares = activation.float().square()
    size = squares.mean(dim=(1, 2, 3)).sqrt()
    dominant = size > DOMINANT * size.median(dim=-1, keepdim=True).values
    without = squares.masked_fill(dominant[:, None, None, None], 0).sum(dim=-1).sqrt()
    count = dominant.sum(dim=-1).float()[:, None, None, None].expand_as(without)
    return torch.stack([squares.sum(dim=-1).sqrt(), without, count], dim=1)


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


def localisation(energy: Float[np.ndarray, "frames height width"], inside: Float[np.ndarray, "height width"]) -> float:
    """Area under the ROC curve of the energy for tokens of which any part lies inside."""
    truth = np.broadcast_to(inside > 0, energy.shape).ravel()
    ranks, positive = rankdata(energy), int(truth.sum())
    if positive in (0, len(truth)):
        return np.nan
    return float((ranks.ravel()[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))
