"""Blends: which answers an x0-hat holds, read in its latents.

    blends = Blends(lens, run.video)                     # clips of this size
    held = blends.held(run.x0_hat(step=1), samples)      # row by row the weight of each legal answer

What the model predicts is a mean of *latents*, and no mean of pictures: a decoder is not linear, and of an uneven blend of two
answers it tends to draw the stronger one alone. So the weights are read where the mean is one. The last latent frame is taken
for a convex mixture of corners, the sample's first frame held still and the true video of each answer, encoded by the model's
own VAE; the weights are those of the mixture nearest to it. Of a blend of latents they are its weights, whatever the decoder
makes of it. Like `Task.evidence` of a decoded video they lie in [0, 1]; here they sum to 1 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import interpolate

from dit_lens.reasoner import board

CLIPS = 128
"""Clips that are drawn and encoded at a time."""
SUM = 1e4
"""How much the weights' sum counts against the fit, which makes it 1 to about eight digits."""
LEAST = 0.1
"""Part of the way to a symbol below which nothing has changed enough to be explained."""


class Blends:
    """Reads weights of answers in latents.

    Args:
        lens: whose VAE encodes. like: a video of the size of those whose latents are read.
    """

    def __init__(self, lens: Any, like: Float[Tensor, "batch frames height width 3"]) -> None:
        self._lens = lens
        self._size = like.shape[1:4]
        # By sample and answer; None is the still clip. The sample beside it, so that its number stays its own.
        self._known: dict[tuple[int, Any], tuple[Any, Tensor]] = {}

    def held(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        samples: Sequence[Any],
        answers: Sequence[Sequence[Any]] | None = None,
    ) -> list[Float[np.ndarray, " answers"]]:
        """The weight of each answer in each row.

        Args:
            answers: what to look for in each row, legal or not, in place of the sample's legal answers.
        """
        wanted = [sample.answers for sample in samples] if answers is None else answers
        edges = self._edges(samples, wanted)
        return [
            _weights(*_within(self._moved(row, sample), each)) for row, sample, each in zip(latents, samples, edges, strict=True)
        ]

    def unexplained(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        samples: Sequence[Any],
        alphabets: Sequence[Sequence[Any]],
        pairs: Sequence[tuple[Any, Any]],
    ) -> Float[np.ndarray, "batch 2"]:
        """What one answer, blended with the first frame, and what a blend of two leave unexplained of the change.

        The one is whichever of the alphabet explains most, which is the harder opponent. Both are shares of the squared change
        from the first frame, as far as it lies in what the alphabet can make; nan where there is next to none.
        """
        found = np.full((len(samples), 2), np.nan)
        edges, others = self._edges(samples, alphabets), self._edges(samples, pairs)
        for place, (row, sample, every, two) in enumerate(zip(latents, samples, edges, others, strict=True)):
            basis = torch.linalg.qr(torch.cat([every, two]).T).Q
            point, along, pair = (x @ basis for x in (self._moved(row, sample), every, two))
            change = float(point @ point)
            if change >= float((LEAST * along.norm(dim=1)).square().min()):
                alone = ((along @ point) / along.square().sum(dim=1)).clamp(0, 1)
                weights = torch.from_numpy(_weights(point, pair))
                left = (point - alone[:, None] * along).square().sum(dim=1).min(), (point - weights @ pair).square().sum()
                found[place] = [float(each) / change for each in left]
        return found

    def _moved(self, latents: Float[Tensor, "channels frames height width"], sample: Any) -> Float[Tensor, " dims"]:
        """The last latent frame from that of the still clip on."""
        return latents[:, -1].flatten().double().cpu() - self._known[id(sample), None][1]

    def _edges(self, samples: Sequence[Any], answers: Sequence[Sequence[Any]]) -> list[Float[Tensor, "answers dims"]]:
        """The last latent frames of the answers' true videos from those of the still clips on."""
        keys = {(id(s), answer): s for s, wanted in zip(samples, answers, strict=True) for answer in (None, *wanted)}
        missing = [(sample, answer) for (name, answer), sample in keys.items() if (name, answer) not in self._known]
        for start in range(0, len(missing), CLIPS):
            some = missing[start : start + CLIPS]
            encoded = self._lens.encode(torch.stack([self._clip(*each) for each in some]))[:, :, -1].flatten(1).double()
            self._known |= {(id(s), answer): (s, row) for (s, answer), row in zip(some, encoded, strict=True)}
        return [
            torch.stack([self._known[id(sample), answer][1] for answer in wanted]) - self._known[id(sample), None][1]
            for sample, wanted in zip(samples, answers, strict=True)
        ]

    def _clip(self, sample: Any, answer: Any) -> Float[Tensor, "frames height width 3"]:
        """The true video of an answer, or the first frame held still."""
        frames, height, width = self._size
        still = sample.boards[:1].repeat(frames, axis=0)
        boards = still if answer is None else sample.task.draw(sample.puzzle, answer, frames)
        pixels = torch.from_numpy(board.paint(boards)).float() / 255
        if pixels.shape[1:3] == (height, width):
            return pixels
        return interpolate(pixels.movedim(-1, 1), (height, width), mode="nearest-exact").movedim(1, -1)


def _within(
    point: Float[Tensor, " dims"], edges: Float[Tensor, "answers dims"]
) -> tuple[Float[Tensor, " basis"], Float[Tensor, "answers basis"]]:
    """The same in a basis of what the edges span: what lies outside is as far from every mixture."""
    basis = torch.linalg.qr(edges.T).Q
    return point @ basis, edges @ basis


def _weights(point: Float[Tensor, " basis"], edges: Float[Tensor, "answers basis"]) -> Float[np.ndarray, " answers"]:
    """Weights of the edges' ends in the mixture nearest to a point, beside that of the origin."""
    corners = np.concatenate([np.zeros((1, edges.shape[1])), edges.numpy()])
    # In units of the longest edge, so that the sum counts equally whatever the latents' scale.
    scale = float(np.linalg.norm(corners, axis=1).max()) or 1.0
    system = np.concatenate([corners.T / scale, np.full((1, len(corners)), SUM)])
    return nnls(system, np.append(point.numpy() / scale, SUM))[0][1:].clip(0, 1)
