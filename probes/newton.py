"""Many logistic regressions solved side by side, by Newton's method with exact Hessians, on the CPU or on a GPU.

The loss of a problem is the sum of its rows' log-losses plus half a sum of its squared weights, each times its curvature.
Newton's method on it is iteratively reweighted least squares (Hastie, Tibshirani and Friedman 2009, The Elements of Statistical
Learning, section 4.4.1); a step is halved until the loss no longer rises (Boyd and Vandenberghe 2004, Convex Optimization,
section 9.5). All of it is in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

TOLERANCE = 1e-9
"""Largest entry of the gradient of the mean loss at which a problem is solved."""
STEPS, HALVINGS = 100, 30
"""Newton steps, and halvings of one, after which a problem is given up."""
HELD_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Of weighted features at a time, by device: Hessians are made in portions of problems."""


@dataclass(frozen=True, eq=False)
class Problems:
    """Logistic regressions on the same rows, or some of them.

    Attributes:
        x: the features of every cell; a column of ones makes an offset. cell: whose features a problem has.
        y: 0 or 1. rows: 1 for those that a problem is fitted to, 0 for others.
        curvature: of the penalty on every weight; 0 for an offset.
    """

    x: Float[Tensor, "cells rows channels"]
    cell: Int[Tensor, " problems"]
    y: Float[Tensor, "problems rows"]
    rows: Float[Tensor, "problems rows"]
    curvature: Float[Tensor, "problems channels"]

    def __getitem__(self, chosen: Tensor) -> Problems:
        return Problems(self.x, self.cell[chosen], self.y[chosen], self.rows[chosen], self.curvature[chosen])

    def scores(self, weights: Float[Tensor, "problems channels"]) -> Float[Tensor, "problems rows"]:
        """Log-odds of all rows, also of those that a problem is not fitted to."""
        found = torch.empty_like(self.y)
        for cell in self.cell.unique().tolist():
            own = self.cell == cell
            found[own] = weights[own] @ self.x[cell].T
        return found

    def loss(
        self, weights: Float[Tensor, "problems channels"], scores: Float[Tensor, "problems rows"]
    ) -> Float[Tensor, " problems"]:
        """What is minimised; `scores` are those of the weights."""
        return (self.rows * (softplus(scores) - self.y * scores)).sum(1) + (self.curvature * weights**2).sum(1) / 2

    def gradient(
        self, weights: Float[Tensor, "problems channels"], scores: Float[Tensor, "problems rows"]
    ) -> Float[Tensor, "problems channels"]:
        """Of the loss."""
        residual = self.rows * (scores.sigmoid() - self.y)
        found = self.curvature * weights
        for cell in self.cell.unique().tolist():
            own = self.cell == cell
            found[own] += residual[own] @ self.x[cell]
        return found

    def steps(
        self, gradient: Float[Tensor, "problems channels"], scores: Float[Tensor, "problems rows"]
    ) -> Float[Tensor, "problems channels"]:
        """The Newton steps: the inverse of each Hessian times the gradient."""
        weight = self.rows * scores.sigmoid() * (-scores).sigmoid()
        portion = max(1, HELD_BYTES[self.x.device.type] // self.x[0].nbytes)
        found = torch.empty_like(gradient)
        for first in range(0, len(gradient), portion):
            part = slice(first, first + portion)
            x = self.x if len(self.x) == 1 else self.x[self.cell[part]]
            hessian = (x * weight[part, :, None]).mT @ x
            diagonal = hessian.diagonal(dim1=1, dim2=2)
            diagonal += self.curvature[part]
            # Where all chances are 0 or 1 in every digit, the offset has no curvature left.
            diagonal += 1e-14 * diagonal.amax(1, keepdim=True)
            factor, failed = torch.linalg.cholesky_ex(hessian)
            solved = torch.cholesky_solve(gradient[part, :, None], factor)[..., 0]
            # Downhill is always right, and halvings make it short enough.
            found[part] = torch.where((failed > 0)[:, None], gradient[part], solved)
        return found


def minimised(
    problems: Problems, start: Float[Tensor, "problems channels"]
) -> tuple[Float[Tensor, "problems channels"], Bool[Tensor, " problems"]]:
    """The weights of the smallest loss of every problem, and whether they were reached."""
    weights, solved = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    limit = TOLERANCE * problems.rows.sum(1).clamp(min=1)
    left = torch.arange(len(start), device=start.device)
    for _ in range(STEPS):
        part, at = problems[left], weights[left]
        scores = part.scores(at)
        gradient = part.gradient(at, scores)
        ended = gradient.abs().amax(1) <= limit[left]
        solved[left[ended]] = True
        if bool(ended.all()):
            break
        left, part, at, scores, gradient = left[~ended], part[~ended], at[~ended], scores[~ended], gradient[~ended]
        step, before = part.steps(gradient, scores), part.loss(at, scores)
        # Near the minimum the loss changes by less than its last digits; that must not stop a full step.
        highest = before + 1e-12 * before.abs()
        share = torch.ones_like(before)
        for _ in range(HALVINGS):
            tried = at - share[:, None] * step
            lower = part.loss(tried, part.scores(tried)) <= highest
            if bool(lower.all()):
                break
            share = torch.where(lower, share, share / 2)
        weights[left] = at - share[:, None] * step
    return weights, solved


def areas(scores: Float[Tensor, "problems rows"], truth: Bool[Tensor, "problems rows"]) -> Float[Tensor, " problems"]:
    """The area under the ROC curve of every problem, ties counting half; nan where a class is missing."""
    scores = scores.contiguous()
    ordered = scores.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    positive = truth.sum(1).double()
    ranks = torch.where(truth, (below + up_to + 1).double() / 2, 0.0).sum(1)
    return (ranks - positive * (positive + 1) / 2) / (positive * (truth.shape[1] - positive))
