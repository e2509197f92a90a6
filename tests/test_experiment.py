"""Experiments: interrupted work goes on, finished work is reused, and what is written is whole and says where it came from."""

import json
import os
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pipeline
from PIL import Image
from toy import Settings, Toy

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.experiment import experiments, read_manifest, run_experiment


@pytest.fixture(scope="module")
def lens() -> Any:
    return dl.wrap(tiny_pipeline())


def run(toy: Toy, lens: Any, out: Path, **changes: Any) -> dict[str, Any]:
    return run_experiment(toy.experiment(), lens, out, **{"preset": "quick", **changes})


def test_goes_on_where_it_was_interrupted(lens: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run(toy, lens, tmp_path)
    assert read_manifest(tmp_path / "toy") is None
    toy.stop_after = None
    manifest = run(toy, lens, tmp_path)
    assert toy.computed == [0, 1, 2, 3]
    assert manifest["units"] == {"units": 4, "reused": 2}
    assert "reused 2 of 4 units" in capsys.readouterr().err


def test_an_interrupted_run_ends_like_an_uninterrupted_one(lens: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run(Toy(stop_after=3, error=lambda: RuntimeError("power cut")), lens, tmp_path / "a")
    for folder in ("a", "b"):
        run(Toy(), lens, tmp_path / folder)
    one, other = (pd.read_parquet(tmp_path / folder / "toy" / "results.parquet") for folder in ("a", "b"))
    pd.testing.assert_frame_equal(one, other)


def test_a_finished_experiment_is_reused_and_says_so(lens: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(Toy(), lens, tmp_path)
    again = Toy()
    second = run(again, lens, tmp_path)
    assert again.computed == []
    assert second["units"] == {"units": 4, "reused": 4}
    assert second["compute_seconds"] == first["compute_seconds"]
    assert "finished before" in capsys.readouterr().err


def test_other_settings_weights_or_arguments_are_measured_anew(lens: Any, tmp_path: Path) -> None:
    run(Toy(), lens, tmp_path)
    for change in (
        {"settings": Settings(count=4, places=(0.0,))},
        {"arguments": {"guidance_scale": 1.0}},
    ):
        toy = Toy()
        run(toy, lens, tmp_path, **change)
        assert len(toy.computed) == 4
    toy = Toy()
    run(toy, dl.wrap(tiny_pipeline(seed=1)), tmp_path)
    assert len(toy.computed) == 4


def test_the_folder_holds_results_figures_and_a_manifest(lens: Any, tmp_path: Path) -> None:
    manifest = run(Toy(), lens, tmp_path, command="dit-lens run toy")
    folder = tmp_path / "toy"
    assert sorted(os.listdir(folder)) == ["curve.png", "film.png", "manifest.json", "parts", "results.parquet"]
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert pd.read_parquet(folder / "results.parquet")["value"].tolist() == [0, 1, 4, 9]
    assert manifest["settings"] == {"count": 4, "places": [0, 1]}
    assert manifest["model"]["hash"] == lens.hash
    assert manifest["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert manifest["steps_measured"][1] == {"step": 1, "sigma": 0.5}
    assert {"torch", "diffusers", "nnsight", "dit_lens"} <= set(manifest["versions"])
    assert manifest["command"] == "dit-lens run toy"
    assert manifest["tables"][0]["columns"] == ["step", "sigma", "value"]
    with Image.open(folder / "film.png") as sheet:
        assert sheet.size == (12, 8)


def test_figures_that_are_no_longer_made_are_removed(lens: Any, tmp_path: Path) -> None:
    run(Toy(), lens, tmp_path)
    toy = Toy()
    experiment = toy.experiment()

    def without_film(context: Any) -> pd.DataFrame:
        results = toy.run(context)
        del context.files["film.png"]
        context.shown["films"].clear()
        return results

    run_experiment(type(experiment)("toy", "T", "F", "Q", experiment.presets, without_film), lens, tmp_path, preset="quick")
    assert not (tmp_path / "toy" / "film.png").exists()
    assert (tmp_path / "toy" / "curve.png").exists()


def test_nothing_is_written_where_nothing_can_be(lens: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    toy = Toy()
    with pytest.raises(InputError, match="cannot write"):
        run(toy, lens, tmp_path / "file")
    assert toy.computed == []


def test_an_unknown_preset_is_named(lens: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no preset 'slow' of toy: write one of quick, full"):
        run(Toy(), lens, tmp_path, preset="slow")


def test_stages_can_be_discarded(lens: Any, tmp_path: Path) -> None:
    toy = Toy()
    experiment = toy.experiment()

    def discarding(context: Any) -> pd.DataFrame:
        results = toy.run(context)
        assert context.has("squares", ["n0", "n3"])
        folder = context.scratch("squares", "store")
        folder.mkdir()
        (folder / "bulk").write_text("large")
        context.discard("squares")
        assert not folder.exists()
        assert not context.has("squares", ["n0"])
        return results

    run_experiment(type(experiment)("toy", "T", "F", "Q", experiment.presets, discarding), lens, tmp_path, preset="quick")
    assert not list((tmp_path / "toy" / "parts").rglob("*.parquet"))


@dataclass
class FakeLens:
    """As much of a lens as places on a schedule need."""

    steps: int

    @cached_property
    def _ahead(self) -> Any:
        count = self.steps

        class Forecast:
            timesteps = tuple(np.linspace(1000, 1, count).tolist())
            sigmas = tuple(np.linspace(1, 0.001, count).tolist())
            experts = ("transformer",) * count

        return Forecast()

    def forecast(self, **_: Any) -> Any:
        return self._ahead


@pytest.mark.parametrize(("steps", "expected"), [(20, [0, 1, 2, 19]), (50, [0, 2, 5, 49]), (1, [0]), (3, [0, 2])])
def test_places_are_found_on_any_schedule(steps: int, expected: list[int], tmp_path: Path) -> None:
    from dit_lens.experiment import Context

    settings = Settings(places=(0, 0.05, 0.1, 1))
    context = Context(FakeLens(steps), settings, tmp_path, "toy", "f", {})
    assert context.steps({}) == expected
    assert context.steps({}, [1, 1]) == expected[-1:]
    assert [clock["step"] for clock in context.clock({})] == expected


def test_the_experiments_are_found_through_their_entry_points() -> None:
    found = experiments()
    declared = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(found) == set(declared["dit_lens.experiments"])
    assert [one.source for one in found.values()] == sorted(one.source for one in found.values())
    assert all(set(experiment.presets) >= {"quick", "full"} for experiment in found.values())
