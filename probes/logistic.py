"""Logistic probes for many cells and many targets at once, on the CPU or on a GPU.

Questions, splits and results are those of `ridge`; the log-loss stands in place of squares. A probe is what scikit-learn's
`make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=1 / penalty)))` fits: a binary target has one column,
of several classes each has one, against the rest. Its L2 penalty is searched inside the training part, with folds of whole
groups. Fitted cell by cell with scikit-learn, the same comes out; that is tested.

There is no closed form, so little is shared between targets. Instead all cells, columns and folds take their Newton steps side
by side (see `newton`), and the search goes from the strongest penalty to the weakest, each fit starting where the last one
ended (Friedman, Hastie and Tibshirani 2010, Journal of Statistical Software 33(1), section 2.5). Where classes can be
separated the log-loss alone has no minimum; with a penalty it has one, so penalties are positive.

A Newton step multiplies all pairs of features, where scikit-learn's default solver takes many steps that go through them once.
That is work for a GPU; on a few CPU cores `ridge` is the probe to take thousands of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.model_selection import GroupKFold
from torch import Tensor

from dit_lens.errors import InputError
from dit_lens.statistics import NO_DRAWS, Resampled
from probes.newton import Problems, areas, minimised
from probes.ridge import FOLDS, Question, Reading, check_rows, of_same_rows, resampled, varies

PENALTIES = tuple(10.0**power for power in range(-1, 6))
"""Of half the sum of squared weights on standardised features, beside the sum of the log-losses (scikit-learn's 1 / C)."""
HELD_ROWS = 2**24
"""Rows of all problems that are held at a time (128 MiB for each number that a row has); cells are taken in portions."""


def read_all(
    features: Float[np.ndarray, "rows channels"],
    questions: Sequence[Question],
    groups: Shaped[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
    device: str | torch.device | None = None,
) -> list[Reading]:
    """As `ridge.read_all`, with logistic probes; `read_stack` of one cell."""
    return read_stack(np.asarray(features)[None], questions, groups, test, penalties, folds, device)[0]


def read_stack(
    features: Float[np.ndarray, "cells rows channels"],
    questions: Sequence[Question],
    groups: Shaped[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
    device: str | torch.device | None = None,
) -> list[list[Reading]]:
    """Train a probe for every cell and question on the rows that are no test rows, and score it on those that are.

    Args:
        features: of every cell, for the same rows. questions: binary, or of classes.
        groups: rows of one group are never on both sides of a split, of the search too. test: the test rows.
        device: where to compute; a GPU if there is one, when left out.

    Returns:
        The readings of every cell. All nan where the training or the test part leaves nothing to learn or to score, and where
        a fit did not come to its end; a penalty at which a fold's fit did not is not chosen.

    Raises:
        InputError: a group is on both sides of the test split, lengths that differ, a question of a number, a penalty that is not
            positive, or features that are no finite numbers.
    """
    check_rows(features.shape[1], questions, groups, test)
    numbers = [question.name for question in questions if question.kind == "number"]
    if numbers:
        raise InputError(f"{numbers[0]} is a number, and logistic probes tell classes apart: read it with probes.ridge")
    if min(penalties) <= 0:
        raise InputError(f"a penalty is positive, and there is {min(penalties)}: without one, separable classes have no fit")
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
        raise InputError(f"the features of cell {finite.argmin()} of {len(features)} hold nan or infinity: look at its run")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: list[dict[str, Reading]] = [{} for _ in features]
    for same in of_same_rows(questions):
        asked = same[0].asked
        train, held = asked & ~test, asked & test
        nothing = Resampled(np.nan, NO_DRAWS, len(np.unique(groups[held])), int(held.sum()))
        empty = np.zeros((0, features.shape[2]))
        for own in found:
            own |= {question.name: Reading.of(question.name, nothing, np.nan, empty) for question in same}
        learnable = [question for question in same if varies(question, train) and varies(question, held)]
        if len(np.unique(groups[train])) < folds or not learnable:
            continue
        search = _Search.of(learnable, train, groups[train], penalties, folds)
        portion = max(1, HELD_ROWS // (search.labels.size * folds))
        for first in range(0, len(features), portion):
            cells = range(first, min(first + portion, len(features)))
            fits = search.fitted(torch.tensor(features[cells][:, train], dtype=torch.float64, device=where))
            for cell, of_cell in zip(cells, fits, strict=True):
                for question, (penalty, weights) in zip(learnable, of_cell, strict=True):
                    if not np.isnan(penalty):
                        guesses = features[cell][held].astype(np.float64) @ weights.T
                        score = resampled(question, guesses, train, held, groups[held])
                        found[cell][question.name] = Reading.of(question.name, score, penalty, weights)
    return [[own[question.name] for question in questions] for own in found]


@dataclass(frozen=True, eq=False)
class _Search:
    """What probes are to be fitted to, whatever the features.

    Attributes:
        labels: 0 or 1, a row for each column of each question. spans: which columns are whose.
        fold: of every row. penalties: from the strongest. folds: how many.
    """

    labels: Float[np.ndarray, "columns rows"]
    spans: tuple[slice, ...]
    fold: Int[np.ndarray, " rows"]
    penalties: tuple[float, ...]
    folds: int

    @staticmethod
    def of(
        questions: Sequence[Question],
        train: Bool[np.ndarray, " all_rows"],
        groups: Shaped[np.ndarray, " rows"],
        penalties: Sequence[float],
        folds: int,
    ) -> _Search:
        columns = [(question.columns(train) > 0).astype(float).T for question in questions]
        ends = np.cumsum([0, *map(len, columns)]).tolist()
        fold = np.zeros(len(groups), dtype=int)
        for number, (_, inside) in enumerate(GroupKFold(folds).split(groups, groups=groups)):
            fold[inside] = number
        spans = tuple(slice(first, end) for first, end in itertools.pairwise(ends))
        return _Search(np.concatenate(columns), spans, fold, tuple(sorted(penalties, reverse=True)), folds)

    def fitted(
        self, features: Float[Tensor, "cells rows channels"]
    ) -> list[list[tuple[float, Float[np.ndarray, "columns channels"]]]]:
        """For every cell and question the chosen penalty, nan where a fit came to no end, and the weights."""
        cells, columns = len(features), len(self.labels)
        scale = spread(features, constant=torch.inf)  # what says nothing becomes 0
        x = (features - features.mean(1, keepdim=True)) / scale[:, None]
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
        y, fold = torch.tensor(self.labels, device=x.device), torch.tensor(self.fold, device=x.device)
        inside = torch.stack([fold == number for number in range(self.folds)])
        # Problems are ordered by cell, then fold, then column.
        index = torch.arange(cells, device=x.device)
        fits = ~inside.repeat_interleave(columns, 0).repeat(cells, 1)
        truth = y.repeat(cells * self.folds, 1)
        # A scaler of a fold knows the fold's training rows only.
        scales = torch.stack([spread(x[:, ~rows, :-1]) for rows in inside], dim=1).repeat_interleave(columns, 1).flatten(0, 1)
        problems = Problems(x, index.repeat_interleave(self.folds * columns), truth, _varying(fits, truth), _ridge(scales))
        scores, path = self._searched(problems, inside)
        scores, path = (found.unflatten(1, (cells, self.folds, columns)) for found in (scores, path))
        means = torch.stack([scores[..., span].nanmean(-1).nanmean(-1) for span in self.spans], dim=-1).nan_to_num(0.0)
        # A tie goes to the smaller penalty, as with scikit-learn where penalties rise.
        chosen = len(self.penalties) - 1 - means.flip(0).argmax(0)
        # All rows at the chosen penalties, from the mean of what the folds found there.
        lengths = torch.tensor([span.stop - span.start for span in self.spans], device=x.device)
        best = chosen.repeat_interleave(lengths, dim=1)
        place = best, index[:, None], torch.arange(columns, device=x.device)
        start = path.mean(2)[place].flatten(0, 1)
        strength = torch.tensor(self.penalties, dtype=x.dtype, device=x.device)[best].flatten()[:, None]
        every = torch.ones_like(y).repeat(cells, 1)
        unit = _ridge(torch.ones_like(scale)).repeat_interleave(columns, 0)
        whole = Problems(x, index.repeat_interleave(columns), y.repeat(cells, 1), every, strength * unit)
        weights, solved = (found.unflatten(0, (cells, columns)) for found in minimised(whole, start))
        solved &= ~scores.isinf().any(2)[place]
        raw = (weights[..., :-1] / scale[:, None]).cpu().numpy()
        return [
            [
                (self.penalties[int(chosen[cell, number])] if bool(solved[cell, span].all()) else np.nan, raw[cell, span])
                for number, span in enumerate(self.spans)
            ]
            for cell in range(cells)
        ]

    def _searched(
        self, problems: Problems, inside: Bool[Tensor, "folds rows"]
    ) -> tuple[Float[Tensor, "penalties problems"], Float[Tensor, "penalties problems channels"]]:
        """Areas under the ROC curve on the rows that each problem left out (-inf where its fit came to no end), and weights."""
        weights = torch.zeros_like(problems.curvature)
        scores, path = [], []
        number_of = torch.arange(self.folds, device=weights.device).repeat_interleave(len(self.labels))
        number_of = number_of.repeat(len(problems.x))
        for penalty in self.penalties:
            at = Problems(problems.x, problems.cell, problems.y, problems.rows, penalty * problems.curvature)
            weights, solved = minimised(at, weights)
            guesses, found = at.scores(weights), torch.empty_like(weights[:, 0])
            for number, rows in enumerate(inside):
                own = number_of == number
                found[own] = areas(guesses[own][:, rows], problems.y[own][:, rows] > 0)
            scores.append(torch.where(solved, found, -torch.inf))
            path.append(weights)
        return torch.stack(scores), torch.stack(path)


def spread(features: Float[Tensor, "cells rows channels"], constant: float = 1.0) -> Float[Tensor, "cells channels"]:
    """The standard deviation of every feature, or `constant` where scikit-learn's StandardScaler would see rounding only."""
    variance, mean = torch.var_mean(features, dim=1, correction=0)
    rows, step = features.shape[1], torch.finfo(features.dtype).eps
    return torch.where(variance <= rows * step * variance + (rows * mean * step) ** 2, constant, variance.sqrt())


def _ridge(scale: Float[Tensor, "problems channels"]) -> Float[Tensor, "problems channels+1"]:
    """The curvature of the penalty for weights of features of these scales, and none for the offset."""
    return torch.cat([scale**2, torch.zeros_like(scale[:, :1])], dim=1)


def _varying(rows: Bool[Tensor, "problems rows"], labels: Float[Tensor, "problems rows"]) -> Float[Tensor, "problems rows"]:
    """The rows of each problem; none where they are all of one class, so that its weights stay 0 and its guesses equal."""
    positive = (rows & (labels > 0)).sum(1)
    return (rows & ((positive > 0) & (positive < rows.sum(1)))[:, None]).to(labels)
