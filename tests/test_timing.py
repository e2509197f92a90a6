"""When runs decide, from readings made by hand; and verdicts of the claims that rest on it, from results that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dit_lens.claims import judged
from experiments.decision_time_claims import CLAIMS as TIMES
from experiments.step_lens_claims import CLAIMS as STEPS
from experiments.timing import agreement, any_of, clustered, decisions, early, nearest

SIGMAS = (1.0, 0.97, 0.94, 0.88, 0.8, 0.73, 0.0)


def readings(shown: dict[int, list[int]], new: list[float] | None = None, answers: int = 2) -> pd.DataFrame:
    """Readings of one sample: what is shown by seed and step; what has come of the last third of the clip."""
    rows = []
    for seed, each in shown.items():
        for step, answer in enumerate(each):
            come = {"new_first": float(step >= 1), "new_last": new[step] if new else 1.0}
            run = {"task": "t", "sample": 0, "seed": seed, "answers": answers}
            rows.append({**run, "step": step, "sigma": SIGMAS[step], "shown": answer, **come})
    return pd.DataFrame(rows)


def test_a_run_decides_at_the_first_reading_after_which_nothing_changes() -> None:
    found = decisions(readings({0: [0, 1, 0, 0, 0], 1: [1, 1, 1, 1, 1]}, new=[0, 0, 0, 1, 1]))
    assert found["decided"].tolist() == [0.5, 0]
    assert found["decided_sigma"].tolist() == [SIGMAS[2], 1.0]
    assert found["first_own"].tolist() == [1, 1]
    assert found["first_other"].tolist() == [0, 0]
    assert found["came_first"].tolist() == [0.25, 0.25]
    assert found["lag"].tolist() == [0.5, 0.5]


def test_what_is_not_read_is_not_decided() -> None:
    assert decisions(readings({0: [0, 0]}, answers=1))["decided"].isna().all()
    nothing = decisions(readings({0: [0, -1], 1: [0, 0]}))
    assert np.isnan(nothing["decided"][0])
    assert np.isnan(nothing["first_own"][0])
    assert nothing["decided"][1] == 0
    alone = agreement(readings({0: [0, 1]}))
    assert alone["own"].tolist() == [0, 1]
    assert alone["other"].isna().all()


def test_rows_by_noise_level() -> None:
    table = pd.DataFrame({"sigma": [1.0, 0.97, 0.9, 0.5, np.nan], "value": [1, 0, 1, 0, 0]})
    assert table[early(table)]["sigma"].tolist() == [0.97, 0.9]
    assert table[nearest(table, 0.88)]["sigma"].tolist() == [0.9]
    named = clustered(pd.DataFrame({"task": ["a", "a"], "sample": [1, 2], "x": [np.nan, 1.0]}))
    assert named["cluster"].tolist() == ["a/1", "a/2"]
    assert any_of(named, "x", ["cluster"])["cluster"].tolist() == ["a/2"]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As these results are far from the thresholds, a rough interval will do."""
    monkeypatch.setattr("dit_lens.claims.RESAMPLES", 2000)


def planted(search: bool, count: int = 130) -> pd.DataFrame:
    """Results of a model that searches: undecided at early steps beyond what is left open; or of one that is a plain blur at
    sigma 1 and decided after it, frame by frame."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for sample in range(count):
        for task, answers in (("pattern", 2), ("maze", 1)):
            run = {"task": task, "sample": sample, "answers": answers, "branch": "guided", "seed": 0}
            several = answers > 1
            for step, sigma in enumerate(SIGMAS):
                blurred = several and (sigma > 0.85 if search else sigma == 1)
                found = {
                    "held_alive": (2 if blurred else 1) if several else np.nan,
                    "held_fooled": np.nan if several else 1,
                    "held_entropy": (0.9 if blurred else 0.01) + 0.01 * random.normal() if several else np.nan,
                    "held_top": (0.6 if blurred else 0.97) + 0.01 * random.normal() if several else np.nan,
                    "one_symbol": 0.3 * blurred + 0.01 * random.random(),
                    "two_symbols": 0.01 * random.random(),
                }
                rows.append({**run, "about": "x0-hat", "step": step, "sigma": sigma, **found})
            if several:
                lag = (0.0 if search else 0.4) + 0.02 * random.normal()
                decided = (0.5, 0.88) if search else (0.16, 0.97)
                own, other = random.integers(2), random.integers(2)
                kept = {"decided": decided[0], "decided_sigma": decided[1], "first_own": own, "first_other": other, "lag": lag}
                rows.append({**run, "about": "run", **kept})
                for way, step in (("other seeds", 0), ("ancestral", 1), ("ancestral", 2)):
                    hat = 0.5 if search or step == 0 else 0.02
                    live = hat - 0.05 * search - 0.02 if step < 2 else 0.02
                    numbers = {"held_differ": hat, "differ": live + 0.01 * random.normal(), "apart_shuffled": 0.5, "apart": 0.05}
                    rows.append({**run, "about": "endings", "way": way, "step": step, "sigma": SIGMAS[step], **numbers})
    return clustered(pd.DataFrame(rows))


def verdicts(claims: Any, results: pd.DataFrame) -> dict[str, str]:
    return {claim.name: judged(claim, results).verdict for claim in claims}


def test_verdicts_on_a_model_that_searches_and_on_one_that_does_not() -> None:
    found = verdicts(STEPS, planted(search=True))
    assert found["C1"] == "supported"
    assert found["C2"] == "supported"
    assert found["C3"] == "supported"
    found = verdicts(STEPS, planted(search=False))
    assert found == {"C1": "refuted", "C2": "refuted", "C2b": "refuted", "C3": "refuted"}


def test_live_alternatives_are_supported_and_a_blur_over_a_choice_is_not() -> None:
    live = planted(search=True)
    ends = (live["about"] == "endings") & (live["way"] == "ancestral")
    later = live["step"] == 2
    random = np.random.default_rng(1)
    noise = 0.01 * random.normal(size=len(live))
    live.loc[ends, "held_differ"] = np.where(later, 0.05, 0.45)[ends]
    live.loc[ends, "differ"] = (np.where(later, 0.05, 0.45) + noise)[ends]
    assert verdicts(STEPS, live)["C2b"] == "supported"
    blur = live.copy()
    blur.loc[ends, "differ"] = (0.02 + noise)[ends]
    assert verdicts(STEPS, blur)["C2b"] == "refuted"


def timed(readout: float, choice: float, storage: float, count: int = 130) -> pd.DataFrame:
    """Results of a model whose readout settles at one noise level, whose endings agree below another and whose noise
    holds the answer above a third."""
    random = np.random.default_rng(2)
    rows: list[dict[str, Any]] = []
    for sample in range(count):
        run = {"task": "t", "sample": sample, "answers": 2, "seed": 0, "branch": "guided"}
        rows.append({**run, "about": "run", "decided_sigma": readout})
        for step, sigma in enumerate(SIGMAS):
            cosine = (0.99 if sigma <= choice else 0.8) + 0.005 * random.normal()
            read = {"cosine_final": cosine, "cosine_other_seed": 0.8}
            rows.append({**run, "about": "x0-hat", "step": step, "sigma": sigma, **read})
            for way in ("ancestral", "renoised", "replaced"):
                lost = 0.5 * (sigma > (storage if way == "renoised" else choice)) + 0.01 * random.normal()
                rows.append({**run, "about": "endings", "way": way, "step": step, "sigma": sigma, "differ": lost, "lost": lost})
    return clustered(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ((0.97, 0.97, 0.75), {"T1a": "supported", "T1b": "refuted", "T1c": "supported"}),
        ((0.8, 0.8, 0.75), {"T1a": "refuted", "T1b": "supported", "T1c": "refuted"}),
        ((0.97, 0.97, 0.97), {"T1a": "supported", "T1b": "refuted", "T1c": "refuted"}),
    ],
)
def test_verdicts_on_the_two_papers_conflict(levels: tuple[float, float, float], words: dict[str, str]) -> None:
    assert verdicts(TIMES, timed(*levels)) == words
