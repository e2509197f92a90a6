"""Numbers read from a video, or from the energy of its tokens.

Questions that come back in every experiment. *Where did something move?* The motion map answers it: how far each square of
the board has gone from the first frame, averaged over the frames. *How undecided is the video?* The evidence for each legal
answer, scaled to a distribution, has an entropy in bits and a number of answers that are still alive. Where several draws of
a distribution are compared with it, entropies mislead, as that of a few draws is too low; the chance that two draws differ
can be estimated without bias. *Does a block spend its energy on some region?* The share of energy inside a mask, divided by
the share of the area that the mask covers, is 1 where the block has no preference. *Do two states hold the same arrangement
of tokens?* Linear CKA says how alike the similarities among tokens are, whatever the directions of the channels.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy.stats import entropy
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

ALIVE = 0.25
"""An answer is alive when the video has gone at least this far (of 1) towards it."""

DECIDABLE = 0.1
"""Evidence summed over the answers below which a video shows none of them: its entropy is undefined."""


def motion_map(
    video: Float[Tensor, "batch frames height width 3"], squares: tuple[int, int] = (16, 16)
) -> Float[Tensor, "batch rows columns"]:
    """Mean absolute change from the first frame, per square of a board of ``squares`` (rows, columns).

    In units of the video's range [0, 1], averaged over the later frames, the colours and the pixels of a square. (Chains of
    frames: paper 2603.30043 counts changed pixels instead; a mean needs no threshold.)
    """
    change = (video[:, 1:] - video[:, :1]).abs().mean(dim=(1, 4))
    return adaptive_avg_pool2d(change.float(), squares)


def map_cosine(one: Float[Tensor, "*batch rows columns"], other: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """Cosine between two maps, square by square. Maps are not negative, so its floor is well above 0: read it beside the
    cosine to an unrelated map. Two empty maps have cosine 0."""
    return cosine_similarity(one.flatten(-2), other.flatten(-2), dim=-1)


def answers_alive(evidence: Float[np.ndarray, " answers"], level: float = ALIVE) -> int:
    """How many answers the video has gone at least ``level`` of the way to. ``evidence`` lies in [0, 1]."""
    return int((evidence >= level).sum())


def answer_entropy(evidence: Float[np.ndarray, " answers"], least: float = DECIDABLE) -> float:
    """Entropy in bits of the evidence, scaled to sum to 1: 0 when decided, log2(answers) when all are level.

    nan for fewer than two answers, and where the evidence sums to less than ``least``: nothing is drawn there yet.
    """
    if len(evidence) < 2 or evidence.sum() < least:
        return float("nan")
    return float(entropy(evidence, base=2))


def answer_shares(evidence: Float[np.ndarray, " answers"], least: float = DECIDABLE) -> Float[np.ndarray, " answers"]:
    """The evidence scaled to sum to 1: a distribution over the answers. All nan where it sums to less than ``least``."""
    total = float(evidence.sum())
    return evidence / total if total >= least else np.full(len(evidence), np.nan)


def draws_differ(shares: Float[np.ndarray, "*batch answers"]) -> Float[np.ndarray, "*batch"]:
    """The chance that two draws from a distribution differ: 0 when decided, 1 - 1 / answers when all are level."""
    return np.asarray(1 - (shares**2).sum(axis=-1))


def pairs_differ(draws: Float[np.ndarray, "draws answers"]) -> float:
    """The chance that two draws differ, estimated without bias from some of them, each a distribution or a one among zeros.

    The mean over all pairs of different draws; undefined draws (nan) are left out, and with fewer than two it is nan.
    """
    kept = draws[~np.isnan(draws).any(axis=-1)]
    if len(kept) < 2:
        return float("nan")
    pairs = kept @ kept.T
    return float(1 - (pairs.sum() - np.trace(pairs)) / (len(kept) * (len(kept) - 1)))


def total_variation(
    one: Float[np.ndarray, "*batch answers"], other: Float[np.ndarray, "*batch answers"]
) -> Float[np.ndarray, "*batch"]:
    """Half the sum of the differences of two distributions: the share of cases in which they must disagree."""
    return np.asarray(np.abs(one - other).sum(axis=-1) / 2)


def settled(agrees: Bool[np.ndarray, "steps *batch"]) -> Int[np.ndarray, "*batch"]:
    """The first step from which on all agree, to the last; the number of steps where the last one does not."""
    return np.asarray(len(agrees) - np.logical_and.accumulate(agrees[::-1]).sum(axis=0))


def bias_and_spread(draws: Float[np.ndarray, "draws *shape"], expected: Float[np.ndarray, "*shape"]) -> tuple[float, float]:
    """How far the mean of some draws' distribution is from what is expected, and how far the draws are from their mean.

    Both are mean squares over all elements, estimated without bias: the squared distance of the draws' mean holds a share
    of their variance, which is taken off (so that it may come out below 0).
    """
    spread = float(draws.var(axis=0, ddof=1).mean())
    return float(((draws.mean(axis=0) - expected) ** 2).mean() - spread / len(draws)), spread


def new_content(
    boards: UInt8[np.ndarray, "steps frames rows columns"], final: UInt8[np.ndarray, "frames rows columns"], parts: int = 3
) -> Float[np.ndarray, "steps parts"]:
    """How much of what is new in each part of the clip a video shows already, by parts of the clip from first to last.

    ``boards`` are videos read as palette indices, ``final`` the one that they become. New in a frame are the squares that
    differ from the frame before. nan for a part in which nothing is new.
    """
    frames, rows, columns = np.nonzero(final[1:] != final[:-1])
    right = boards[:, frames + 1, rows, columns] == final[frames + 1, rows, columns]
    found = np.full((len(boards), parts), np.nan)
    for part, within in enumerate(np.array_split(np.arange(len(final) - 1), parts)):
        here = np.isin(frames, within)
        if here.any():
            found[:, part] = right[:, here].mean(axis=1)
    return found


def row_correlation(one: Float[Tensor, "batch *shape"], other: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
    """Pearson's correlation of two tensors' elements, row by row."""
    rows = [tensor.flatten(1).double() for tensor in (one, other)]
    return cosine_similarity(*[row - row.mean(dim=1, keepdim=True) for row in rows], dim=1)


def mask_fractions(mask: Bool[np.ndarray, "rows columns"], layout: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Fraction of each token's area that lies in a mask of board squares; ``layout`` is (height, width) in tokens."""
    squares = torch.from_numpy(np.ascontiguousarray(mask)).float()
    return adaptive_avg_pool2d(squares[None, None], layout)[0, 0].numpy()


def region_share(
    energy: Float[np.ndarray, "... frames height width"], fractions: Float[np.ndarray, "... height width"]
) -> Float[np.ndarray, "..."]:
    """Share of all energy that lies in a region; a token counts by the fraction of it that the region covers. What stands before
    the frames of the one and the rows of the other is broadcast."""
    inside = (energy * fractions[..., None, :, :]).sum(axis=(-3, -2, -1))
    return np.asarray(inside / energy.sum(axis=(-3, -2, -1)))


def resized(
    video: Float[Tensor, "batch frames height width 3"], height: int, width: int
) -> Float[Tensor, "batch frames new_height new_width 3"]:
    """The video at another size, each new pixel the mean of what it covers: how a scorer of small boards reads any
    model."""
    if video.shape[2:4] == (height, width):
        return video
    planes = video.movedim(-1, 2).flatten(0, 2)
    pooled = adaptive_avg_pool2d(planes, (height, width))
    return pooled.unflatten(0, (len(video), video.shape[1], 3)).movedim(2, -1)


def linear_cka(
    one: Float[Tensor, "batch tokens channels"], other: Float[Tensor, "batch tokens other_channels"], rows: int = 32
) -> Float[Tensor, " batch"]:
    """Linear centred kernel alignment of two sets of features of the same tokens, row by row, in float64.

    ||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms of features centred over the tokens (Kornblith et al., 2019, arXiv
    1905.00414, section 3). It lies between 0 and 1; rotations and one scale for all channels leave it as it is. 1 - CKA is
    the *dissimilarity*: 0 for the same state, 1 where nothing is alike. nan where a set does not vary over the tokens.

    Args:
        one, other: features, on one device. rows: how many rows of the batch are computed at a time.
    """
    found = [_linear_cka(x.double(), y.double()) for x, y in zip(one.split(rows), other.split(rows), strict=True)]
    return torch.cat(found)


def _linear_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = (features - features.mean(dim=1, keepdim=True) for features in (x, y))
    scales = [features.flatten(1).norm(dim=1) for features in (x, y)]
    # Of length 1, so that squares of squares neither overflow nor vanish.
    x, y = (features / scale.view(-1, 1, 1) for features, scale in zip((x, y), scales, strict=True))
    if x.shape[1] < max(x.shape[2], y.shape[2]):
        # The same three numbers from the similarities among tokens: the smaller matrices where there are few tokens.
        likeness = [features @ features.mT for features in (x, y)]
        together = (likeness[0] * likeness[1]).sum(dim=(1, 2))
        alone = [matrix.flatten(1).norm(dim=1) for matrix in likeness]
    else:
        together = (y.mT @ x).flatten(1).square().sum(dim=1)
        alone = [(features.mT @ features).flatten(1).norm(dim=1) for features in (x, y)]
    return together / (alone[0] * alone[1])
