"""Propagation: distances that tell a planted change, verdicts on planted results, and a tiny pipeline with two experts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens.claims import judged
from dit_lens.experiment import run_experiment
from dit_lens.report import write_report
from experiments import noise, propagation, propagation_tables
from experiments.noised import STATES
from experiments.propagation_tables import ANOTHER, LOST

(C6,) = propagation.CLAIMS


def planted(apart: float, right: float, changed: float, task: str = "maze", further: float = 0) -> pd.DataFrame:
    """120 samples with noise at two early steps: how far they end from the unedited run, and what becomes of the answer.

    Two seeds end 0.4 apart, and half of them with another answer. Distances tell changed answers, dissimilarities do not.
    ``further``: how much more all of these distances are.
    """
    random, count, rows = np.random.default_rng(0), 120, []
    for sample in range(count):
        base = {"task": task, "sample": sample, "cluster": f"{task}/{sample}", "place": STATES, "several": True}
        whole = {**base, "clean_right": True, "later": 3, "right": True, "legal": True}
        rows.append({**whole, "kind": "again", "how": "again", "dissimilarity": 0.0, "changed": 0.0})
        rows.append({**whole, "kind": "other seed", "how": "other seed", "dissimilarity": 0.4, "changed": float(sample % 2)})
        for step, sigma in ((0, 1.0), (1, 0.95), (2, 0.93)):
            lost, moved = sample >= right * count, float((sample * 7919 % count) < changed * count)
            noisy = {**whole, "kind": "noise", "how": "replaced", "step": step, "sigma": sigma, "changed": moved}
            for later in (2, 3):
                far = 1 + further + moved + 0.1 * random.random()
                values = {"dissimilarity": apart + 0.01 * random.normal(), "distance": far}
                rows.append({**noisy, "later": later, "right": not lost, "legal": not lost, **values})
    return propagation.beside_seeds(pd.DataFrame(rows).assign(same=lambda table: 1 - table["changed"]))


def test_divergence_with_loss_supports_and_divergence_without_is_reseeding() -> None:
    assert judged(C6, planted(0.5, right=0.3, changed=0.9)).verdict == "supported"
    reseeded = judged(C6, planted(0.5, right=1.0, changed=0.5))
    assert reseeded.verdict == "refuted"
    assert "success lost" in reseeded.reason
    assert "dissimilarity" not in reseeded.reason
    assert "final dissimilarity" in judged(C6, planted(0.05, right=0.3, changed=0.9)).reason


def test_prediction_finds_what_tells_and_what_does_not() -> None:
    table = propagation.predictions(planted(0.5, right=0.7, changed=0.4))
    assert set(zip(table["told"], table["counts"], strict=True)) == {(ANOTHER, "maze 72 and 12"), (LOST, "maze 72 and 36")}
    found = table.set_index(["told", "moment", "measure", "step"])
    assert len(found) == 2 * 2 * 2 * 3
    assert (found.xs("distance", level="measure")["mean"] == 1).all()
    chance = found.xs("dissimilarity", level="measure")
    assert ((chance["low"] < 0.5) & (chance["high"] > 0.5)).mean() > 0.6
    assert propagation.predictions(planted(0.5, right=1, changed=0.05))["mean"].isna().all(), "6 runs are too few"
    assert propagation.predictions(planted(0.5, right=1, changed=0))["mean"].isna().all()


def test_prediction_does_not_compare_across_tasks() -> None:
    """Distances of one task are larger whatever becomes of its answers, and its answers change more often."""
    tasks = [planted(0.5, 0.7, 0.4), planted(0.5, 0.7, 0.8, task="tictactoe", further=5)]
    single = tasks[0].assign(task="single", cluster="single/" + tasks[0]["sample"].astype(str), several=False)
    both = propagation.predictions(pd.concat([*tasks, single], ignore_index=True)).query("measure == 'distance'")
    assert (both["mean"] == 1).all()
    assert (both["clusters"] == 72 + 24 + both["positives"]).all(), "samples with one legal answer have nothing to tell"


def test_what_changed_is_parted_and_a_claim_stands_beside_its_parts() -> None:
    results = planted(0.5, right=0.7, changed=0.4)
    context: Any = SimpleNamespace(table=lambda title, table, about: shown.update({title: table}))
    shown: dict[str, pd.DataFrame] = {}
    told = propagation.predictions(results)
    propagation_tables.draw(context, results, told, propagation.CLAIMS, propagation.early(results), propagation.FEWEST)
    changes = shown["What a changed answer is"].set_index("what")["together"]
    assert [text.split(":")[0] for text in changes] == ["0.4 and 0.5", "0.1 and 0.5", "0.3 and 0"]
    assert shown["What the criteria pool"]["maze"][1].startswith("0.3 [")


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
