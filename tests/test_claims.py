"""Claims: each verdict follows from known numbers, intervals are as wide as many tests ask for, and none rests on few samples."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Toy

import dit_lens as dl
from dit_lens.claims import FAMILY, LEVEL, MINIMUM, Claim, Criterion, as_table, difference, judged, mean
from dit_lens.experiment import experiments, run_experiment
from dit_lens.statistics import mean_interval


def results(shift: float, samples: int = 200, noise: float = 0.5) -> pd.DataFrame:
    """Four measurements a sample, of which two are edited and lie higher by `shift`."""
    random = np.random.default_rng(3)
    rows = []
    for sample in range(samples):
        own = random.normal()
        for edited in (False, False, True, True):
            rows.append({"sample": sample, "edited": edited, "value": own + shift * edited + noise * random.normal()})
    return pd.DataFrame(rows)


def claim(threshold: float = 0.2, above: bool = True) -> Claim:
    def gain(table: pd.DataFrame) -> Any:
        return difference(table, "value", table["edited"], ~table["edited"])

    return Claim(
        "T1", "Edits raise the value.", "a test", "ours", (Criterion("gain", threshold, gain, above),), "the same, unedited"
    )


@pytest.mark.parametrize(("shift", "word"), [(0.6, "supported"), (-0.2, "refuted"), (0.2, "inconclusive")])
def test_the_verdict_follows_from_the_interval(shift: float, word: str) -> None:
    found = judged(claim(), results(shift))
    assert found.verdict == word
    assert found.found[0].clusters == 200
    assert found.found[0].low < shift < found.found[0].high


def test_below_turns_the_verdict_round() -> None:
    assert judged(claim(above=False), results(0.6)).verdict == "refuted"
    assert judged(claim(above=False), results(-0.2)).verdict == "supported"


def test_one_failing_criterion_refutes_and_is_named() -> None:
    other = Criterion("value of edited", 5.0, lambda table: mean(table["value"], table["sample"]))
    both = Claim("T2", "Both.", "a test", "ours", (*claim().criteria, other))
    found = judged(both, results(0.6))
    assert found.verdict == "refuted"
    assert "value of edited > 5" in found.reason
    assert "gain" not in found.reason


def test_few_samples_are_not_tested_whatever_they_show() -> None:
    found = judged(claim(), results(5.0, samples=MINIMUM - 1))
    assert found.verdict == "not tested"
    assert judged(claim(), results(5.0, samples=MINIMUM)).verdict == "supported"


def test_undefined_numbers_support_and_refute_nothing() -> None:
    table = results(1.0)
    table["value"] = np.where(table["edited"], np.nan, table["value"])
    assert judged(claim(), table).verdict == "not tested"  # no sample has both sides


def test_what_cannot_be_tested_says_why() -> None:
    found = judged(Claim("T3", "It hums.", "a test", "ours", untestable="this model has no sound"), results(0))
    assert (found.verdict, found.reason, found.found) == ("not testable", "this model has no sound", ())


def test_intervals_of_verdicts_are_wider_than_ordinary_ones() -> None:
    values, clusters = results(0)["value"], results(0)["sample"]
    wide, usual = mean(values, clusters), mean_interval(values, clusters)
    assert wide.high - wide.low > 1.4 * (usual.high - usual.low)  # normal quantiles: 3.4 against 1.96
    assert pytest.approx(1 - 0.05 / FAMILY) == LEVEL


def test_a_difference_that_never_varies_is_not_certain() -> None:
    table = pd.DataFrame({"sample": np.repeat(np.arange(200), 2), "edited": [True, False] * 200, "value": 1.0})
    found = difference(table, "value", table["edited"], ~table["edited"])
    assert found.estimate == 0
    assert -0.05 < found.low < -0.02
    assert found.high == -found.low
    assert mean(pd.Series([0.0] * 200), pd.Series(range(200))) == replace(found, measurements=200)
    assert mean(pd.Series([0.0, 1.0]), pd.Series([0, 0])).clusters == 1  # one sample has no interval, and gets none


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6))
def test_a_claim_at_its_threshold_is_hardly_ever_decided(seed: int) -> None:
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"sample": np.repeat(np.arange(120), 2), "edited": [True, False] * 120, "value": random.normal(size=240)}
    )
    assert judged(claim(threshold=0.0), table).verdict == "inconclusive"


def test_an_experiment_writes_its_verdicts(tmp_path: Path) -> None:
    toy = Toy().experiment()
    square = Criterion("mean square", 1.0, lambda table: mean(table["value"], table["step"]))
    manifest = run_experiment(
        replace(toy, claims=(Claim("T4", "Squares are large.", "a test", "ours", (square,)),)),
        dl.wrap(tiny_pipeline()),
        tmp_path,
        preset="quick",
    )
    written = json.loads((tmp_path / "toy" / "claims.json").read_text())
    assert manifest["claims"] == written
    assert written[0]["verdict"] == "not tested"
    assert written[0]["committed"] is None
    table = as_table(written)
    assert table["verdict"].tolist() == ["quick: not tested"]
    assert table["numbers"][0].startswith("mean square > 1: 3.5 [")


def test_a_table_marks_what_became_of_each_criterion() -> None:
    sides = (("large", 1.0, True), ("small", 1.0, False), ("as large", 3.5, True))
    criteria = tuple(Criterion(n, level, lambda table: mean(table["value"], table["sample"]), up) for n, level, up in sides)
    results = pd.DataFrame({"sample": range(120), "value": np.tile([3.0, 4.0], 60)})
    verdict = json.loads(json.dumps(asdict(judged(Claim("T", "s", "a test", "ours", criteria), results))))
    assert [line[:8] for line in as_table([verdict])["numbers"][0].split("\n")] == ["\u2713 large ", "\u2717 small ", "? as lar"]


def test_the_family_is_as_large_as_is_said() -> None:
    every = [claim for experiment in experiments().values() for claim in experiment.claims]
    assert sum(len(claim.criteria) for claim in every) <= FAMILY
    assert len({claim.name for claim in every}) == len(every)
    for one in every:
        assert bool(one.criteria) != bool(one.untestable), f"{one.name} needs criteria, or a reason why there are none"
        assert one.control or one.untestable, f"{one.name} names no control"
