"""Every experiment on a foreign model, two experts with random weights, and on a foreign task, a folder in VBVR-Bench layout."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from PIL import Image

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.errors import InputError
from dit_lens.experiment import Experiment, run_experiment
from dit_lens.reasoner import board, vbvr

DECLARED = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["entry-points"]
GROUP: dict[str, str] = DECLARED["dit_lens.experiments"]
STEPS = {"num_inference_steps": 3}
SMALLER = {"height": 32, "width": 32}
"""Pictures of half the size, but for probes, whose labels are of 8 x 8 tokens."""
NOISED = {"samples": 1, "places": (0, 0.5), "later": (0, 1), "depths": (0, 1)}
SMALL: dict[str, dict[str, Any]] = {
    "step-lens": {"tasks": ("tictactoe",), "branched": 1, "places": (0, 1), "leave": (0,)},
    "token-energy": {"tasks": ("maze",), "samples": 2, "places": (0, 1)},
    "probe-map": {"tasks": ("maze",), "samples": 10, "batch": 10, "places": (0, 1), "closer_places": (), "workers": 1},
    "noise": {"tasks": ("tictactoe",), **NOISED, "added": (0.5,), "matched": (0.5,)},
    "propagation": {"tasks": ("tictactoe",), **NOISED},
    "layer-swap": {"tasks": ("circle",), "depths": (0, 1), "places": (0, 1), "map_depths": (0,)},
    "ensemble": {"few": ("tictactoe",), "samples": 1},
    "decision-time": {"tasks": ("tictactoe",), "places": (0, 1), "leave": (0,)},
    "layer-ablation": {
        "tasks": ("circle",),
        "samples": 2,
        "pool": 1,
        "depths": (1,),
        "cases": ("skip update all", "mean update early", "noise update late", "zero attn all"),
    },
    "specialization": {"tasks": ("circle",), "pairs": 2, "batch": 12, "places": (0, 1), "depths": (), "read": 12},
}
"""Settings of each experiment, as small as they can be."""
ON_FOLDERS: dict[str, dict[str, Any]] = {
    "step-lens": {"single": 2},
    "probe-map": {"samples": 12, "batch": 12, "places": (0,)},
}
"""What is different where the task is a folder."""
REFUSED = {
    "layer-swap": "has no pairs: .* write bundled tasks that have pairs, as --tasks circle maze",
    "specialization": "has no pairs: .* write bundled tasks that have pairs, as --tasks circle maze",
    "decision-time": "no sample of mazes has several legal answers, so there is nothing to decide; leave it out",
}
"""Experiments that cannot take a folder, and what they say."""


def experiment(name: str) -> Experiment:
    """The experiment that is declared under a name."""
    module, _, attribute = GROUP[name].partition(":")
    return getattr(import_module(module), attribute)


@pytest.fixture(scope="module")
def lens() -> dl.Lens:
    """Two experts with random weights, of other numbers of blocks and channels than the bundled model."""
    torch.manual_seed(0)
    pipe = tiny_pipeline(experts=2, transformer=tiny_transformer(12, blocks=4), transformer_2=tiny_transformer(12, blocks=4))
    return dl.wrap(pipe, engine="hooks")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of results, so that clean runs are shared as they are by `dit-lens reproduce`."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mazes in VBVR-Bench layout, short and on wide pictures, of which nothing is known that their files do not say."""
    where = tmp_path_factory.mktemp("wide") / "mazes"
    samples = [reasoner.task("maze").sample("test", number, frames=9) for number in range(3)]
    for sample, path in zip(samples, vbvr.write(samples, where), strict=True):
        video = np.pad(board.paint(sample.boards), ((0, 0), (0, 0), (16, 16), (0, 0)), constant_values=96)
        vbvr.write_video(path / "ground_truth.mp4", video)
        for name, frame in (("first_frame.png", video[0]), ("final_frame.png", video[-1])):
            Image.fromarray(frame).save(path / name)
    return where


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough mazes to train probes on, and of a size that has 8 x 8 tokens."""
    where = tmp_path_factory.mktemp("squares") / "mazes"
    vbvr.write([reasoner.task("maze").sample("test", number, frames=9) for number in range(12)], where)
    return where


def run(
    name: str, lens: dl.Lens, out: Path, arguments: Mapping[str, Any], changes: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The manifest and the results of an experiment, and its outputs looked at."""
    one = experiment(name)
    settings = type(one.preset("quick"))(**{**SMALL[name], **(changes or {})})
    manifest = run_experiment(one, lens, out, preset="quick", settings=settings, arguments=arguments)
    where = out / name
    assert json.loads((where / "manifest.json").read_text()) == manifest
    results = pd.read_parquet(where / "results.parquet")
    assert len(results) == manifest["rows"] > 0
    assert {"step", "sigma", "timestep", "expert", "task"} <= set(results.columns)
    shown = [each["file"] for kind in ("figures", "films") for each in manifest[kind]]
    assert shown
    for file in shown:
        assert (where / file).read_bytes().startswith(b"\x89PNG")
    assert (where / "claims.json").exists() == bool(one.claims)
    verdicts = json.loads((where / "claims.json").read_text()) if one.claims else []
    assert verdicts == manifest["claims"]
    assert [verdict["claim"] for verdict in verdicts] == [claim.name for claim in one.claims]
    # Of so few samples nothing is said.
    assert {verdict["verdict"] for verdict in verdicts} <= {"not tested"}
    return manifest, results


def test_no_experiment_is_forgotten() -> None:
    assert set(SMALL) == set(GROUP)
    assert {name: experiment(name).name for name in GROUP} == {name: name for name in GROUP}


@pytest.mark.parametrize("name", GROUP)
def test_runs_on_two_experts_with_random_weights(name: str, lens: dl.Lens, out: Path) -> None:
    manifest, results = run(name, lens, out, STEPS if name == "probe-map" else {**STEPS, **SMALLER})
    ahead = lens.forecast(**{**reasoner.inputs([reasoner.task("maze").sample()]), **STEPS})
    measured = {int(row["step"]): row["expert"] for row in manifest["steps_measured"]}
    assert measured == {step: ahead.experts[step] for step in measured}
    # The ensemble acts on the first step only.
    assert set(measured.values()) == ({"transformer"} if name == "ensemble" else {"transformer", "transformer_2"})
    asked = SMALL[name].get("tasks", ()) + SMALL[name].get("few", ())
    assert set(asked) <= set(results["task"])


@pytest.mark.parametrize("name", [name for name in GROUP if name not in REFUSED])
def test_takes_a_folder(name: str, lens: dl.Lens, out: Path, folder: Path, squares: Path) -> None:
    where = squares if name == "probe-map" else folder
    tasks = {"few" if name == "ensemble" else "tasks": (str(where),)}
    manifest, results = run(name, lens, out, STEPS, {**ON_FOLDERS.get(name, {}), **tasks})
    assert set(results["task"].dropna()) == {"mazes"}
    # Neither files nor columns carry the path.
    assert all("/" not in figure["file"] for figure in manifest["figures"])


def test_probes_say_that_their_labels_are_of_a_board(lens: dl.Lens, tmp_path: Path, folder: Path) -> None:
    settings = type(experiment("probe-map").preset("quick"))(tasks=(str(folder),), samples=3, batch=3)
    given: Any = {"preset": "quick", "settings": settings, "arguments": STEPS}
    with pytest.raises(InputError, match="labels are of 8 x 8 tokens, and frames of mazes have 8 x 12 here: write --height"):
        run_experiment(experiment("probe-map"), lens, tmp_path, **given)


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_it_takes_no_folder(name: str, lens: dl.Lens, out: Path, folder: Path) -> None:
    settings = type(experiment(name).preset("quick"))(**{**SMALL[name], "tasks": (str(folder),)})
    with pytest.raises(InputError, match=REFUSED[name]) as said:
        run_experiment(experiment(name), lens, out / "refused", preset="quick", settings=settings, arguments=STEPS)
    assert "\n" not in str(said.value)
    assert not list((out / "refused").rglob("results.parquet"))
