"""The noise experiment: verdicts on planted results, and all of it on a tiny pipeline with two experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens.claims import judged
from dit_lens.experiment import run_experiment
from dit_lens.report import write_report
from experiments import noise, noise_claims, noised
from experiments.arms import ALL, BUT_LAST, ONE

SIGMAS = (1.0, 0.95, 0.85, 0.8, 0.6, 0.2)
C4, C5 = noise.CLAIMS


def planted(
    success: dict[tuple[str, str, str, float], float], over_sigma: dict[tuple[str, float], float] | None = None, count: int = 120
) -> pd.DataFrame:
    """Samples that are right unedited; with noise, the share named for (where, when, how, share), 1 where none is.

    ``over_sigma``: the share right for (how, sigma) with noise in all frames at one step.
    """
    rows: list[dict[str, Any]] = []
    arms = [
        (where, when, how, 0.2)
        for where in ("step", "frame")
        for when in (ONE, BUT_LAST, ALL)
        for how in ("replaced", "sigma-matched")
    ]
    arms += [("step", ONE, how, 1.0) for how in ("replaced", "sigma-matched")]
    for sample in range(count):
        cluster = {"cluster": f"maze/{sample}", "clean_right": True, "kind": "noise"}
        rows.append({**cluster, "kind": "clean", "right": True})
        for arm in arms:
            for step, sigma in enumerate(SIGMAS) if arm[1] == ONE else [(np.nan, np.nan)]:
                share = success.get(arm, 1.0)
                if arm[3] == 1 and over_sigma is not None:
                    share = over_sigma.get((arm[2], sigma), 1.0)
                if sigma == 1 and arm[0] == "step":
                    share = success.get(("step", "first", "replaced", 1.0), 1.0)
                right = (sample * 7919 % count) < share * count
                labels = dict(zip(("where", "when", "how", "share"), arm, strict=True))
                rerouted = float((sample * 104729 % count) >= share * count)
                rows.append({**cluster, **labels, "step": step, "sigma": sigma, "right": right, "rerouted": rerouted})
    return pd.DataFrame(rows)


DESTROYED = {("step", ONE, how, 1.0): 0.1 for how in ("replaced", "sigma-matched")}
AT_DOSE = {("step", when, how, 0.2): 0.3 for when in (ONE, BUT_LAST) for how in ("replaced", "sigma-matched")}


def test_noise_at_a_step_that_destroys_at_every_dose_supports_the_claim() -> None:
    found = judged(C4, planted({**DESTROYED, **AT_DOSE}))
    assert found.verdict == "supported", found.reason
    assert found.found[0].estimate == pytest.approx(0.1 - noise_claims.KEPT)


@pytest.mark.parametrize(
    ("success", "named"),
    [
        ({**DESTROYED}, "the same with equal dose, at one step"),
        ({**AT_DOSE}, "success with noise at a step"),
        ({**DESTROYED, **AT_DOSE, ("step", ONE, "sigma-matched", 0.2): 1.0}, "equal dose and sigma-matched"),
        ({**DESTROYED, **AT_DOSE, ("step", "first", "replaced", 1.0): 0.5}, "success lost with noise at the first step"),
        ({**DESTROYED, **AT_DOSE, ("frame", ALL, "replaced", 0.2): 0.1}, "noise in a frame at all steps, minus at one step"),
    ],
)
def test_what_takes_the_claim_down_is_named(success: dict[tuple[str, str, str, float], float], named: str) -> None:
    found = judged(C4, planted(success))
    assert found.verdict == "refuted"
    assert named in found.reason


def test_a_peak_inside_the_band_supports_and_a_slope_refutes() -> None:
    peak = {(how, sigma): 0.2 for how in ("replaced", "sigma-matched") for sigma in (0.85, 0.8)}
    assert judged(C5, planted({}, peak)).verdict == "supported"
    slope = {
        (how, sigma): (0.2, 0.2, 0.3, 0.3, 0.5, 1.0)[i] for how in ("replaced", "sigma-matched") for i, sigma in enumerate(SIGMAS)
    }
    found = judged(C5, planted({("step", "first", "replaced", 1.0): 0.2}, slope))
    assert found.verdict == "refuted"
    assert "minus earlier" in found.reason
    assert "minus later" not in found.reason
    nothing = judged(C5, planted({}, count=200))
    assert nothing.verdict == "refuted", "no effect is no peak"


def test_all_of_it_on_a_tiny_pipeline_with_two_experts(tmp_path: Path) -> None:
    lens = dl.wrap(tiny_pipeline(experts=2), engine="hooks")
    settings = noise.Settings(tasks=("maze", "tictactoe"), samples=1, batch=2, places=(0, 0.5), singles=True, sets=(1,))
    arguments = {"num_inference_steps": 3, "height": 16, "width": 16}
    manifest = run_experiment(noise.EXPERIMENT, lens, tmp_path, preset="quick", settings=settings, arguments=arguments)
    results = pd.read_parquet(tmp_path / "noise" / "results.parquet")
    assert [claim["verdict"] for claim in manifest["claims"]] == ["not tested"] * 2
    assert {"sigma.png", "frame.png", "frames.png", "dose.png", "pictures.png"} <= {
        p.name for p in (tmp_path / "noise").iterdir()
    }
    assert {"step", "sigma", "timestep", "expert", "task", "sample", "seed"} <= set(results.columns)
    assert set(results["expert"].dropna()) == {"transformer", "transformer_2"}
    noisy = results[results["kind"] == "noise"]
    whole = noisy[(noisy["where"] == "step") & (noisy["share"] == 1) & (noisy["how"] == "replaced")]
    assert whole["destroyed"].to_numpy() == pytest.approx(1)
    assert noisy[(noisy["where"] == "step") & (noisy["share"] == 0.2) & (noisy["how"] == "replaced")][
        "destroyed"
    ].to_numpy() == pytest.approx(0.2)
    # Every frame alone in every sample, at all steps and without the last.
    alone = noisy[(noisy["how"] == "replaced") & (noisy["count"] == 1) & (noisy["turns"] == False)]  # noqa: E712
    assert alone.groupby(["when", "frames"]).size().tolist() == [2] * 10
    assert "Noise at a step" in write_report(tmp_path).read_text()


def test_presets_ask_for_enough() -> None:
    full = noise.EXPERIMENT.preset("full")
    assert full.samples >= 100
    assert len(noised.steps_at(full.places, 20)) == 20
    assert set(noised.steps_at(full.matched, 20)) <= set(noised.steps_at(full.places, 20))
    frames = [arm for arm in noise.arms(full, 20, 5) if arm.where == "frame" and len(arm.steps) == 20 and arm.how == "replaced"]
    assert {arm.frame for arm in frames} == {0, 1, 2, 3, 4, None}
    assert {round(arm.share * 5) for arm in frames} == {1, 2, 3, 4, 5}
    quick = noise.EXPERIMENT.preset("quick")
    assert len({arm.key for arm in noise.arms(quick, 20, 5)}) == len(noise.arms(quick, 20, 5))
