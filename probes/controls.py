"""What a probe's score is to be held against.

A probe can score well without reading anything of interest: tokens have places, places have habits, and a large probe
memorises. So every reading comes with that of a *control task* (Hewitt and Liang 2019, arXiv 1909.03368): labels that are
random, but the same for every token of a *kind* (here its place on the board), as often each as the true ones. What can be
learned of them is memory of places. *Selectivity* is the score less the control's. *Shuffled* labels, those of other samples
at the same places, say what is left of the score when the label's link to the sample is cut: what place alone gives away.

All of them ask the same rows, so that they share the factorisations of the true question and cost next to nothing. The
interval of selectivity is over the test groups, resampled for the score and the control alike: what makes both easy in a group
is no uncertainty of their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped

from probes.ridge import Question, Reading, read_all

CONTROL, SHUFFLED = "control", "shuffled"


def control_task(question: Question, kinds: Shaped[np.ndarray, " rows"], seed: int = 0) -> Question:
    """The question with a label for every kind of row instead, drawn from the labels of the rows that are asked."""
    values, asked = np.asarray(question.values, dtype=float), question.asked
    random = np.random.default_rng(seed)
    names, kind_of = np.unique(kinds, return_inverse=True)
    found = values[asked]
    if len(found) == 0:
        return replace(question, name=f"{question.name}, {CONTROL}")
    # Quantiles in random order, so that even with few kinds each label is as frequent as it was.
    drawn = np.sort(found)[((np.arange(len(names)) + 0.5) / len(names) * len(found)).astype(int)]
    labels = random.permutation(drawn)[kind_of]
    return replace(question, name=f"{question.name}, {CONTROL}", values=np.where(asked, labels, np.nan))


def shuffled(
    question: Question, samples: Shaped[np.ndarray, " rows"], kinds: Shaped[np.ndarray, " rows"], seed: int = 0
) -> Question:
    """The question with the labels of other samples: within every kind of row, they change places among the samples."""
    values = np.asarray(question.values, dtype=float).copy()
    random = np.random.default_rng(seed)
    asked = question.asked
    names = np.unique(samples)
    # One order of samples for all kinds, so that what belongs together in a sample stays together as far as it is asked.
    rank = dict(zip(names.tolist(), random.permutation(len(names)).tolist(), strict=True))
    order = np.array([rank[name] for name in samples.tolist()])
    for kind in np.unique(kinds):
        rows = np.flatnonzero((kinds == kind) & asked)
        values[rows] = values[rows][np.argsort(order[rows], kind="stable")]
    return replace(question, name=f"{question.name}, {SHUFFLED}", values=values)


def read_with_controls(
    features: Float[np.ndarray, "rows channels"],
    questions: Sequence[Question],
    groups: Shaped[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    samples: Shaped[np.ndarray, " rows"],
    kinds: Shaped[np.ndarray, " rows"],
    seed: int = 0,
    read: Callable[..., list[Reading]] = read_all,
    **search: Any,
) -> pd.DataFrame:
    """Every question read, beside its control task and its shuffled labels.

    Args:
        features, groups, test: as for `read_all`. samples: which sample a row is of. kinds: which kind of row it is, as its
            place. seed: of the controls. read: `ridge.read_all` or `logistic.read_all`. search: further arguments of it.

    Returns:
        One row per question: `target`, `kind`, `estimate`, `low`, `high`, `clusters`, `measurements`, `penalty`; `control` and
        `shuffled`, the scores of these; and `selectivity` with `selectivity_low` and `selectivity_high`.
    """
    controls = [control_task(question, kinds, seed) for question in questions]
    mixed = [replace(shuffled(question, samples, kinds, seed), interval=False) for question in questions]
    readings = read(features, [*questions, *controls, *mixed], groups, test, **search)
    rows = []
    for place, question in enumerate(questions):
        true, control, other = readings[place :: len(questions)]
        selectivity = true.resampled.less(control.resampled).interval()
        rows.append(
            {
                "target": question.name,
                "kind": question.kind,
                **asdict(true.score),
                "penalty": true.penalty,
                CONTROL: control.score.estimate,
                SHUFFLED: other.score.estimate,
                "selectivity": selectivity.estimate,
                "selectivity_low": selectivity.low,
                "selectivity_high": selectivity.high,
            }
        )
    return pd.DataFrame(rows)
