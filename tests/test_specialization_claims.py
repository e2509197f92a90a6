"""The claim about bands of layers is judged by where damage lies, and by matched noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dit_lens.claims import judged
from experiments.layer_figures import ABLATED, NOISE
from experiments.specialization_claims import CLAIMS, EARLY, MIDDLE, beside, more

PLANTED = {"perception": (0.4, 0.1, 0.1), "reasoning": (0.1, 0.5, 0.1), "picture": (0.0, 0.1, 0.4)}


def damaged(losses: dict[str, tuple[float, float, float]], noise: float = 0.1, samples: int = 120) -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = []
    for sample in range(samples):
        for measure, bands in losses.items():
            for depth in np.arange(0, 1, 0.125):
                level = bands[0] if depth < 0.25 else bands[1] if depth < 0.75 else bands[2]
                for edit, mean in ((ABLATED, level), (NOISE, noise)):
                    value = mean + random.normal(scale=0.05)
                    where = {"quantity": "change by an edit", "task": "maze", "sample": sample, "edit": edit}
                    rows.append({**where, "measure": measure, "depth": depth, "value": value})
    # What else is in the table has neither samples nor edits.
    return pd.concat([pd.DataFrame(rows), pd.DataFrame([{"quantity": "selectivity", "value": 0.5}])], ignore_index=True)


def test_bands_as_the_paper_draws_them_support_it() -> None:
    found = judged(CLAIMS[0], damaged(PLANTED))
    assert found.verdict == "supported"
    assert [one.clusters for one in found.found] == [120] * 5
    assert found.found[1].estimate == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("measure", list(PLANTED))
def test_damage_in_another_band_refutes_it(measure: str) -> None:
    turned = {**PLANTED, measure: PLANTED[measure][1:] + PLANTED[measure][:1]}
    assert judged(CLAIMS[0], damaged(turned)).verdict == "refuted"


def test_what_noise_and_the_first_block_explain_is_told_beside_the_claim() -> None:
    """Where early blocks lose more by the first one alone, and noise does as much to that, the order turns round."""
    table = damaged(PLANTED)
    table.loc[(table["depth"] == 0) & (table["measure"] == "reasoning"), "value"] += 2
    names = ("as judged", "less matched noise", "without the first block", "both")
    judged_at = ({}, {"net": True}, {"first": False}, {"net": True, "first": False})
    found = {name: more("reasoning", MIDDLE, EARLY, **how)(table).estimate for name, how in zip(names, judged_at, strict=True)}
    assert found == pytest.approx(dict(zip(names, (-0.6, 0.4, 0.4, 0.4), strict=True)), abs=0.02)
    told = beside(table).set_index("damage").loc["reasoning lost, middle minus early blocks"]
    assert told["as judged"].startswith("-0.")
    assert told["both"].startswith("0.")


def test_damage_that_noise_does_too_refutes_it() -> None:
    assert judged(CLAIMS[0], damaged(PLANTED, noise=0.7)).verdict == "refuted"
