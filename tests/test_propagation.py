"""Propagation: distances that tell a planted change, verdicts on planted results, and a tiny pipeline with two experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens.claims import judged
from dit_lens.experiment import run_experiment
from dit_lens.report import write_report
from experiments import noise, propagation
from experiments.noised import STATES

(C6,) = propagation.CLAIMS


def planted(apart: float, right: float, changed: float) -> pd.DataFrame:
    """120 samples with noise at two early steps: how far they end from the unedited run, and what becomes of the answer.

    Two seeds end 0.4 apart, and half of them with another answer. Distances tell changed answers, dissimilarities do not.
    """
    random, count, rows = np.random.default_rng(0), 120, []
    for sample in range(count):
        base = {
            "task": "maze",
            "sample": sample,
            "cluster": f"maze/{sample}",
            "place": STATES,
            "several": True,
            "clean_right": True,
        }
        rows.append({**base, "kind": "again", "how": "again", "later": 3, "dissimilarity": 0.0, "right": True, "changed": 0.0})
        other = {"kind": "other seed", "how": "other seed", "later": 3, "dissimilarity": 0.4, "right": True}
        rows.append({**base, **other, "changed": float(sample % 2)})
        for step, sigma in ((0, 1.0), (1, 0.95), (2, 0.93)):
            lost, moved = sample >= right * count, float((sample * 7919 % count) < changed * count)
            noisy = {"kind": "noise", "how": "replaced", "step": step, "sigma": sigma, "right": not lost, "changed": moved}
            for later in (2, 3):
                values = {"dissimilarity": apart + 0.01 * random.normal(), "distance": 1 + moved + 0.1 * random.random()}
                rows.append({**base, **noisy, "later": later, **values})
    return propagation.beside_seeds(pd.DataFrame(rows))


def test_divergence_with_loss_supports_and_divergence_without_is_reseeding() -> None:
    assert judged(C6, planted(0.5, right=0.3, changed=0.9)).verdict == "supported"
    reseeded = judged(C6, planted(0.5, right=1.0, changed=0.5))
    assert reseeded.verdict == "refuted"
    assert "success lost" in reseeded.reason
    assert "dissimilarity" not in reseeded.reason
    assert "final dissimilarity" in judged(C6, planted(0.05, right=0.3, changed=0.9)).reason


def test_prediction_finds_what_tells_and_what_does_not() -> None:
    found = propagation.predictions(planted(0.5, right=0.8, changed=0.4)).set_index(["moment", "measure", "step"])
    assert len(found) == 2 * 2 * 3
    assert (found.xs("distance", level="measure")["mean"] == 1).all()
    chance = found.xs("dissimilarity", level="measure")
    assert ((chance["low"] < 0.5) & (chance["high"] > 0.5)).mean() > 0.6
    assert found["share"].to_numpy() == pytest.approx(0.4)
    nothing = propagation.predictions(planted(0.5, right=1, changed=0))
    assert nothing["mean"].isna().all()


def test_it_shares_its_runs_with_noise_on_a_tiny_pipeline_with_two_experts(tmp_path: Path) -> None:
    lens = dl.wrap(tiny_pipeline(experts=2), engine="hooks")
    shared = {
        "tasks": ("maze", "tictactoe"),
        "samples": 1,
        "batch": 2,
        "places": (0, 0.4),
        "later": (0, 0.4, 1),
        "depths": (0, 1),
    }
    arguments = {"num_inference_steps": 4, "height": 16, "width": 16}
    first = run_experiment(
        propagation.EXPERIMENT, lens, tmp_path, preset="quick", settings=propagation.Settings(**shared), arguments=arguments
    )
    second = run_experiment(
        noise.EXPERIMENT, lens, tmp_path, preset="quick", settings=noise.Settings(**shared), arguments=arguments
    )
    assert first["units"]["reused"] == 0
    assert second["units"]["reused"] == first["units"]["units"]
    assert first["claims"][0]["verdict"] == "not tested"
    results = pd.read_parquet(tmp_path / "propagation" / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "later", "later_sigma"} <= set(results.columns)
    assert set(results["kind"]) == {"noise", "other seed", "again"}
    assert results.loc[results["kind"] == "again", "dissimilarity"].abs().max() < 1e-5
    noisy = results[results["kind"] == "noise"]
    assert (noisy["later"] >= noisy["step"]).all()
    assert noisy.groupby(["how", "step", "place"]).size().to_dict() == {
        (how, step, place): 2 * later
        for how in ("replaced", "sigma-matched")
        for step, later in ((0.0, 3), (1.0, 2))
        for place in (STATES, "depth 0", "depth 1")
    }
    assert noisy["seeds"].notna().all()
    assert "How far noise spreads" in write_report(tmp_path).read_text()
