"""The benchmark of probes: what it compares agrees on a real grid, and what it writes is merged. No times are looked at."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import tiny_pipeline

import dit_lens as dl
from experiments.benchmark_probes import Settings, measured, total


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        machine="trial",
        out=tmp_path_factory.mktemp("benchmarks"),
        tasks=("maze", "permanence"),
        samples=12,
        steps=(1,),
        inference_steps=2,
        batch=12,
        checked=6,
        logistic_cells=1,
        logistic_checked=1,
    )


@pytest.fixture(scope="module")
def found(settings: Settings) -> dict[str, Any]:
    """A tiny pipeline with random weights, measured; the machine's file holds something else already."""
    (settings.out / "trial.json").write_text(json.dumps({"patching": {"kept": 1}}))
    return measured(dl.wrap(tiny_pipeline(), engine="hooks"), settings)


def test_random_cells_of_a_real_grid_agree_with_scikit_learn(found: dict[str, Any]) -> None:
    for task in ("maze", "permanence"):
        part = found["ridge"][task]
        assert part["cells"] == 3
        assert part["checked"] == 3
        assert part["largest_difference"] <= 1e-3
        assert part["other_penalties"] == 0
    assert found["logistic"]["checked"] == 1
    assert found["logistic"]["largest_difference"] <= 1e-3


def test_what_the_file_held_is_kept(found: dict[str, Any], settings: Settings) -> None:
    written = json.loads((settings.out / "trial.json").read_text())
    assert written["patching"] == {"kept": 1}
    assert set(written) == {"patching", "probes"}
    assert written["probes"]["ridge"] == found["ridge"]
    assert written["probes"]["cores"] == {"workers": 1, "threads_each": 1}
    assert written["probes"]["logistic"] == found["logistic"]


def test_a_total_is_of_all_tasks() -> None:
    def part(together: float, alone: float, difference: float) -> dict[str, Any]:
        seconds = {"together": together, "one_by_one": alone, "ratio": alone / together}
        return {"cells": 1, "probes": 9, "checked": 3, "other_penalties": 1, "largest_difference": difference, "seconds": seconds}

    found = total({"a": part(1, 10, 1e-4), "b": part(3, 90, 1e-5)})
    assert found["seconds"] == {"together": 4, "one_by_one": 100, "ratio": 25}
    assert (found["cells"], found["probes"], found["largest_difference"]) == (2, 18, 1e-4)
