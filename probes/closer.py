"""A closer look at few targets: how a probe of another kind reads them, and how easily they are read.

The ridge probe of a map is one of many. Where a target matters, three others read the same rows: logistic regression, the
difference of means, to which nothing is fitted, and a small network as an upper bound. The code length of its labels says how
much has to be learned before they are read well (see `linear`). Each kind also reads a control task (see `controls`): what a
network can remember of places is not what a line can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from probes.linear import FOLDS, code_length, fit_and_score, searched_strength
from probes.ridge import Question

KINDS = ("logistic", "mass-mean", "nonlinear")
"""The other probes; the first one has its penalty searched, as the ridge probe has."""


@dataclass(frozen=True)
class Closer:
    """Where to look closely.

    Attributes:
        targets: their names; of binary labels or classes. steps: which steps. samples: the first so many samples only.
    """

    targets: tuple[str, ...]
    steps: tuple[int, ...]
    samples: int = 64

    def look(
        self,
        features: Float[np.ndarray, "rows channels"],
        question: Question,
        control: Question,
        groups: Shaped[np.ndarray, " rows"],
        test: Bool[np.ndarray, " rows"],
        numbers: Shaped[np.ndarray, " rows"],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Held-out scores of the other kinds of probes, and the code length, of one question.

        Args:
            features, groups, test: as for `read_all`. control: the question's control task. numbers: which sample a row is of,
                counted from 0. seed: of the order in which labels are sent.

        Returns:
            Scores by `KINDS`, for each of them its selectivity (as `logistic selectivity`; the control has the penalty that was
            chosen for the true labels), `bits` per label, `compression`, and `closer_clusters`, the number of test groups. Nan
            where a part has labels of one class, or too few groups.
        """
        rows = question.asked & (numbers < self.samples)
        values, random = (np.asarray(one.values, dtype=float)[rows] for one in (question, control))
        x, of, inside = features[rows], groups[rows], test[rows]
        train, held = groups[rows & ~test], groups[rows & test]
        found = dict.fromkeys((*KINDS, *(f"{name} selectivity" for name in KINDS), "bits", "compression"), np.nan)
        if len(np.unique(train)) >= FOLDS and len(held):
            strength = searched_strength(x[~inside], values[~inside], of[~inside])
            for name in KINDS:
                how: Any = {"test": inside, "probe": name, "strength": strength if name == "logistic" else None}
                score, other = (fit_and_score(x, labels, of, **how).estimate for labels in (values, random))
                found |= {name: score, f"{name} selectivity": score - other}
        if len(np.unique(values)) > 1:
            code = code_length(x, values, of, seed)
            found |= {"bits": code.bits, "compression": code.compression}
        return {**found, "closer_clusters": len(np.unique(held))}
