"""The experiments, on models whose mechanism was planted by hand, and end to end on a tiny pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens.activations import Activations, Entry
from dit_lens.architectures import Layout
from dit_lens.errors import InputError
from dit_lens.experiment import Context, run_experiment
from dit_lens.reasoner import board
from dit_lens.report import write_report
from experiments import probe_map, step_lens
from experiments.probe_figures import TRAINED, UNTRAINED

SIGMAS = (1.0, 0.8, 0.4)
FORECAST = SimpleNamespace(sigmas=SIGMAS, timesteps=(1000.0, 800.0, 400.0), experts=("transformer",) * 3)


@dataclass
class Planted:
    """As much of a lens as an experiment uses, over a model that does what the test says.

    ``videos`` gives the decoded x0-hat of a (sample, seed, step); ``stream`` what is recorded of a (sample, cell). The
    video of the last step is the final one.
    """

    videos: Callable[[Any, int, int], np.ndarray]
    stream: Callable[[Any, dl.Cell], np.ndarray] | None = None
    blocks: int = 2
    pipe: Any = None

    def forecast(self, **_: Any) -> Any:
        return FORECAST

    def run(self, samples: list[Any], seed: Any, record: Any = None, decode: bool = True) -> Any:
        seeds = [seed] if isinstance(seed, int) else seed
        lists = seeds if isinstance(seeds[0], list) else [seeds] * len(samples)
        rows = [(sample, s) for sample, its in zip(samples, lists, strict=True) for s in its]
        clips = [torch.stack([torch.from_numpy(self.videos(x, s, step)).float() for x, s in rows]) for step in range(3)]
        entries = []
        for step, block in np.ndindex(3, self.blocks) if self.stream else ():
            cell = dl.Cell("transformer", step, "cond", block, sigma=SIGMAS[step], timestep=1000 * SIGMAS[step], depth=block / 2)
            tensor = torch.from_numpy(np.stack([self.stream(sample, cell) for sample in samples]))  # pyright: ignore
            entries.append(Entry(cell, 0, "planted", tensor))
        return SimpleNamespace(
            seeds=tuple(s for _, s in rows), video=clips[-1], layout=Layout(5, 8, 8),
            activations=Activations(entries), x0_hat=lambda step, branch: clips[step],
        )  # fmt: skip

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def context(lens: Any, settings: Any, folder: Path) -> Context:
    made = Context(lens, settings, folder, "planted", "planted", {})
    made.inputs = lambda samples: {"samples": list(samples)}  # a planted lens is handed the samples themselves
    return made


def answer(sample: Any, which: int) -> np.ndarray:
    """The video in which a legal answer is carried out, in [0, 1]."""
    boards = sample.task.draw(sample.puzzle, sample.answers[which], sample.frames)
    return board.paint(boards).astype(np.float32) / 255


def blurred_then_decided(sample: Any, seed: int, step: int) -> np.ndarray:
    """The mean of all answers at the first step, then the answer that belongs to the seed."""
    if step == 0:
        return np.mean([answer(sample, which) for which in range(len(sample.answers))], axis=0)
    return answer(sample, seed % len(sample.answers))


def test_step_lens_reads_a_planted_decision(tmp_path: Path) -> None:
    settings = step_lens.Settings(tasks=("maze", "maze-loops"), samples=3, seeds=2, batch=6, places=(0, 0.5, 1))
    made = context(Planted(blurred_then_decided), settings, tmp_path)
    results = step_lens.run(made)
    assert len(results) == 2 * 3 * 2 * 3
    loops, mazes = (results[results["task"] == name] for name in ("maze-loops", "maze"))
    first, last = loops[loops["step"] == 0], loops[loops["step"] == 2]
    assert (first["entropy"] > 0.8).all()  # two or three level answers
    assert (first["alive"] == first["answers"]).all()
    assert first["cosine_seeds"].to_numpy() == pytest.approx(1)  # a blur is the same for every seed
    assert last["entropy"].to_numpy() == pytest.approx(0)
    assert (last["alive"] == 1).all()
    assert last["right"].all()
    assert last["cosine_final"].to_numpy() == pytest.approx(1)
    assert (last["cosine_other_seed"] < 0.999).all()
    # One legal route: decided from the start, and nothing to be undecided about.
    assert mazes["right"].all()
    assert mazes["entropy"].isna().all()
    assert mazes["cosine_other_seed"].to_numpy() == pytest.approx(1)
    assert (mazes["cosine_other_sample"] < 0.999).all()
    assert results["sigma"].drop_duplicates().tolist() == list(SIGMAS)
    assert {"right-guided.png", "entropy-guided.png", "watch.png", "maze-0.png", "maze-loops-0.png"} <= set(made.files)


def test_step_lens_needs_something_to_compare(tmp_path: Path) -> None:
    for change in ({"seeds": 1}, {"batch": 2}):
        with pytest.raises(InputError, match="compares seeds and samples"):
            step_lens.run(context(None, replace(step_lens.Settings(), **change), tmp_path))


MAP = probe_map.Settings(samples=10, batch=5, places=(0, 1), closer_samples=10, workers=1)


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (step_lens, step_lens.Settings(tasks=("tictactoe",), samples=2, seeds=2, batch=4, places=(0, 1))),
        (probe_map, MAP),
    ],
)
def test_runs_end_to_end_on_a_tiny_pipeline(module: Any, settings: Any, tmp_path: Path) -> None:
    lens, arguments = dl.wrap(tiny_pipeline()), {"num_inference_steps": 3}
    manifest = run_experiment(module.EXPERIMENT, lens, tmp_path, preset="quick", settings=settings, arguments=arguments)
    results = pd.read_parquet(tmp_path / module.EXPERIMENT.name / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "branch"} <= set(results.columns)
    assert [row["step"] for row in manifest["steps_measured"]] == [0, 2]
    assert module.EXPERIMENT.title in write_report(tmp_path).read_text()


def test_a_probe_map_has_every_control_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Interrupted before the untrained model's readings: the trained one's are taken up, and its store is not run again."""
    settings = replace(MAP, tasks=("permanence",), places=(0,), closer_places=())
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    steps = {"num_inference_steps": 2}

    def made() -> Context:
        return Context(lens, settings, tmp_path, "probe-map", "same", steps)

    first, ran = made(), []
    run = lens.run
    lens.run = lambda **given: ran.append(1) or run(**given)  # pyright: ignore[reportAttributeAccessIssue]
    first.units("permanence", {"trained": lambda: probe_map.read(first, "permanence")})
    assert len(ran) == 2
    again = made()
    results = probe_map.run(again)
    assert len(ran) == 2
    assert again.counts == {"units": 2, "reused": 1}
    assert again.has("permanence", ["trained", "untrained"])
    assert not list(first.parts.glob("activations--*"))
    assert all(path.suffix == ".parquet" for path in first.parts.iterdir())
    assert set(results["reader"]) == {TRAINED, UNTRAINED, "place only", "noisy latents", "timestep only"}
    each = results[results["reader"].isin([TRAINED, UNTRAINED])].groupby(["reader", "step", "block"])["target"].count()
    assert each.to_dict() == {(reader, 0, block): 4 for reader in (TRAINED, UNTRAINED) for block in range(3)}
    known = results.dropna(subset=["estimate"])
    assert known[["control", "shuffled", "selectivity"]].notna().all().all()
    assert set(again.files) == {"map-permanence.png", "depth-permanence.png"}
    assert [len(table["data"]) for table in again.shown["tables"]] == [4]
    for figure in again.shown["figures"]:
        assert "10 held-out samples, 50% of the puzzles for testing. Thinned: 1 of 7 tasks" in figure["caption"]


@pytest.mark.parametrize("module", [step_lens, probe_map])
def test_presets_are_settings_of_one_kind(module: Any) -> None:
    presets = module.EXPERIMENT.presets
    assert set(presets) == {"quick", "full"}
    assert {type(preset) for preset in presets.values()} == {module.Settings}
