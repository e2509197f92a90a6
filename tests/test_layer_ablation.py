"""Layer ablation: cases, pools, a model of which every block is missed in another way, and a tiny pipeline from end to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import arguments, tiny_pipeline

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.experiment import Context, run_experiment
from dit_lens.reasoner import board
from dit_lens.report import write_report
from experiments import layer_ablation
from experiments.ablation_cases import Case, band_steps, pooled
from experiments.damage import Expected

SITES = ("update", "attn", "mlp", "resid")
FORECAST = SimpleNamespace(sigmas=(1.0, 0.8, 0.4), timesteps=(1000.0, 800.0, 400.0), experts=("transformer",) * 3)


def test_cases_are_parsed_and_refused() -> None:
    assert Case.parse("mean attn early", SITES) == Case("mean", "attn", "early")
    assert str(Case("skip", "update", "all")) == "skip update all"
    for text, said in {
        "melt attn all": "no 'melt'; write one of skip",
        "zero heart all": "no 'heart'",
        "zero attn noon": "no 'noon'; write one of all",
        "zero attn": "2 words",
        "skip mlp all": "skipped whole; write 'skip update all'",
    }.items():
        with pytest.raises(InputError, match=said):
            Case.parse(text, SITES)


def test_bands_are_thirds_of_the_steps() -> None:
    bands = band_steps(20)
    assert bands["all"] == list(range(20))
    assert [*bands["early"], *bands["middle"], *bands["late"]] == bands["all"]
    assert [len(bands[name]) for name in ("early", "middle", "late")] == [7, 7, 6]


def test_a_pool_holds_the_mean_over_all_calls_and_rows_of_the_first() -> None:
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    calls = [(arguments(lens.pipe, prompt=prompts), seeds) for prompts, seeds in
             ((["walk the maze", "blue"], [[1], [2]]), (["red circle"], [[3]]))]  # fmt: skip
    at = dl.at(block=[0, 2], step=[0, 3], site=["update", "attn"])
    pool = pooled(lens, at, calls)
    runs = [lens.run(**inputs, seed=seeds, record=at, decode=False) for inputs, seeds in calls]
    where: Any = {"block": 2, "step": 3, "branch": "uncond", "site": "attn"}
    rows = [run.activations.one(**where) for run in runs]
    torch.testing.assert_close(pool["mean"].one(**where), torch.cat(rows).mean(dim=0, keepdim=True))
    assert torch.equal(pool["resample"].one(**where), rows[0])
    assert len(pool["mean"]) == len(pool["resample"]) == 2 * 2 * 2 * 2


@dataclass
class Planted:
    """As much of a lens as the experiment uses: without block 0 the answer is wrong, without block 1 the board is lost, without
    block 2 the colours are noisy; block 3 does nothing. Only what is skipped at the first step counts. Another seed, no harm."""

    ran: list[Any]
    pipe = SimpleNamespace(_execution_device="cpu")

    def extent(self, **_: Any) -> Any:
        sites = tuple(SimpleNamespace(name=name) for name in SITES)
        return SimpleNamespace(blocks={"transformer": 4}, forecast=FORECAST, sites=sites)

    def run(self, samples: list[Any], seed: Any, edits: Any = None, answers: Any = None) -> Any:
        self.ran.append((edits, answers))
        harm = edits.at.block if edits is not None and 0 in edits.at.step else None
        shown = torch.stack([torch.from_numpy(planted_video(sample, harm)) for sample in samples])
        return SimpleNamespace(video=shown, answers=lambda before: {"until": before})


def planted_video(sample: Any, harm: int | None) -> np.ndarray:
    boards = sample.boards.copy()
    if harm == 0:
        wrong = sample.task.wrong(sample.puzzle, np.random.default_rng(0))
        boards = sample.task.draw(sample.puzzle, wrong, sample.frames)
    if harm == 1:
        expected = Expected.of(sample)
        boards[1:][:, expected.stays & (expected.first != board.Colour.BLACK)] = board.Colour.BLACK
    video = board.paint(boards).astype(np.float32) / 255
    return 0.8 * video + 0.1 if harm == 2 else video


def planted_context(lens: Any, settings: layer_ablation.Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    made = Context(lens, settings, folder, "planted", "planted", {})
    monkeypatch.setattr(layer_ablation.Ablations, "call", lambda self, task, first, end: planted_call(self, task, first, end))
    return made


def planted_call(self: Any, task: str, first: int, end: int) -> Any:
    numbers = range(first, min(first + self.settings.batch, end))
    samples = [dl.reasoner.task(task).sample("test", number) for number in numbers]
    return samples, {"samples": samples}, [[number] for number in numbers]


def test_every_block_is_missed_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ("skip update all", "skip update early", "skip update late", "noise update all")
    settings = layer_ablation.Settings(tasks=("circle", "maze"), samples=3, batch=2, depths=(), cases=cases, thinned=cases[2:3])
    lens = Planted([])
    made = planted_context(lens, settings, tmp_path, monkeypatch)
    results = layer_ablation.run(made)
    cells = 3 * 4 + 2 + 1  # cases at every block, one at every third, another seed
    assert len(results) == 2 * 3 * 5 * cells  # tasks, samples, measures
    assert sorted(results.loc[results["case"] == "skip update late", "block"].unique()) == [0, 3]
    means: Any = results.pivot_table("damage", ["case", "block"], "measure", dropna=False)
    for case in ("skip update all", "skip update early"):
        found = means.loc[case]
        assert found.loc[0, "reasoning"] >= 0.8
        assert found.loc[0, ["perception", "picture"]].abs().max() < 0.02
        assert found.loc[1, "perception"] > 0.3
        assert found.loc[1, ["reasoning", "picture"]].abs().max() < 0.02
        assert found.loc[2, "picture"] > 0.2
        assert found.loc[2, ["perception", "reasoning"]].abs().max() < 0.02
        assert found.loc[3].abs().max() < 0.02
    assert means.loc["skip update late"].dropna().abs().to_numpy().max() < 0.02
    assert results.loc[results["kind"] == layer_ablation.OTHER_SEED, "damage"].abs().max() < 0.02
    # What comes before a band is taken from the clean run.
    assert {answers["until"] for edits, answers in lens.ran if answers} == {2}
    assert {"blocks.png", "map-circle.png", "map-maze.png"} <= set(made.files)
    kept = made.shown["tables"][0]
    assert [row[0] for row in kept["data"]] == ["circle", "maze"]
    assert all(row[2].startswith("1.00") for row in kept["data"])  # reasoning of the true videos
    top = made.shown["tables"][1]
    assert "(block 0)" in str(next(row for row in top["data"] if row[2] == "early"))


def test_runs_end_to_end_on_a_tiny_pipeline(tmp_path: Path) -> None:
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    replaced = ("zero update all", "zero cross_attn late", "mean update early", "resample mlp all", "noise mlp all")
    cases = ("skip update all", *replaced)
    settings = layer_ablation.Settings(tasks=("tictactoe",), samples=2, pool=2, batch=2, depths=(0, 1), cases=cases)
    given: Any = {"preset": "quick", "settings": settings, "arguments": {"num_inference_steps": 3}}
    manifest = run_experiment(layer_ablation.EXPERIMENT, lens, tmp_path, **given)
    results = pd.read_parquet(tmp_path / "layer-ablation" / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "branch"} <= set(results.columns)
    assert sorted(results["block"].dropna().unique()) == [0, 2]
    assert results.loc[results["case"] == "zero cross_attn late", "step"].unique().tolist() == [2]
    # A block that is skipped adds nothing, as one whose update is zero.
    skipped, zeroed = (results.loc[results["kind"] == kind].query("site == 'update'")["value"] for kind in ("skip", "zero"))
    assert skipped.tolist() == zeroed.tolist()
    assert {figure["file"] for figure in manifest["figures"]} == {"blocks.png", "components.png", "map-tictactoe.png"}
    assert "Layer ablation" in write_report(tmp_path).read_text()
    again = run_experiment(layer_ablation.EXPERIMENT, lens, tmp_path, **given)
    assert again["units"]["reused"] == again["units"]["units"] == 7


def test_presets_are_settings_of_one_kind() -> None:
    presets = layer_ablation.EXPERIMENT.presets
    assert set(presets) == {"quick", "full"}
    full = presets["full"]
    assert isinstance(full, layer_ablation.Settings)
    assert full.samples >= 100
    assert {"circle", "maze", "tictactoe"} <= set(full.tasks)
    for preset in presets.values():
        assert all(Case.parse(case, ("update", "attn", "cross_attn", "mlp")) for case in preset.cases)
