"""The experiments, on models whose mechanism was planted by hand, and end to end on a tiny pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
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
from dit_lens.schedule import Forecast
from experiments import decision_time, probe_map, step_lens
from experiments.probe_figures import TRAINED, UNTRAINED

SIGMAS = (1.0, 0.8, 0.4)
FORECAST = Forecast((1000.0, 800.0, 400.0), SIGMAS, ("transformer",) * 3, ("cond",))


@dataclass
class Planted:
    """As much of a lens as an experiment uses, over a model that does what the test says.

    ``videos`` gives the decoded x0-hat of a (sample, seed, step); ``stream`` what is recorded of a (sample, cell);
    ``endings`` the video of a (sample, step, number of the ending) of a state of seed 0. The video of the last step is the
    final one. Videos are the latents, and velocities are 0.
    """

    videos: Callable[[Any, int, int], np.ndarray]
    stream: Callable[[Any, dl.Cell], np.ndarray] | None = None
    endings: Callable[[Any, int, int], np.ndarray] | None = None
    blocks: int = 2
    pipe: Any = None

    def forecast(self, **_: Any) -> Any:
        return FORECAST

    def run(self, samples: list[Any], seed: Any, record: Any = None, edits: Any = (), **_: Any) -> dl.Run:
        seeds = [seed] if isinstance(seed, int) else seed
        lists = seeds if isinstance(seeds[0], list) else [seeds] * len(samples)
        rows = [(sample, s, place) for sample, its in zip(samples, lists, strict=True) for place, s in enumerate(its)]

        def video(sample: Any, seed: int, place: int, step: int) -> torch.Tensor:
            if not edits:
                return torch.from_numpy(self.videos(sample, seed, step)).float()
            assert self.endings is not None
            return torch.from_numpy(self.endings(sample, edits[0].step, place)).float()

        clips = torch.stack([torch.stack([video(*row, step) for row in rows]) for step in (0, 1, 2, 2)])
        entries = []
        for step, block in np.ndindex(3, self.blocks) if self.stream else ():
            cell = dl.Cell("transformer", step, "cond", block, sigma=SIGMAS[step], timestep=1000 * SIGMAS[step], depth=block / 2)
            tensor = torch.from_numpy(np.stack([self.stream(sample, cell) for sample in samples]))  # pyright: ignore
            entries.append(Entry(cell, 0, "planted", tensor))
        latents = clips.movedim(-1, 2)
        return dl.Run(
            seeds=tuple(s for _, s, _ in rows), prompts=tuple(sample.prompt for sample, _, _ in rows), layout=Layout(5, 8, 8),
            scheduler="planted", timesteps=FORECAST.timesteps, sigmas=torch.tensor(SIGMAS), experts=FORECAST.experts,
            branches=("cond",), latents=latents, weights=tuple((1.0, -sigma) for sigma in SIGMAS), video=clips[-1],
            outputs=dict.fromkeys(("guided", "cond"), torch.zeros_like(latents[:-1])), activations=Activations(entries),
        )  # fmt: skip

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.movedim(1, -1)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return video.movedim(-1, 1)


def context(lens: Any, settings: Any, folder: Path) -> Context:
    made = Context(lens, settings, folder, "planted", "planted", {})
    made.inputs = lambda samples: {"samples": list(samples)}  # a planted lens is handed the samples themselves
    made.clean = lambda samples, seeds=(0,), batch=None: lens.run(samples=list(samples), seed=list(seeds))
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


def alive_then_decided(sample: Any, step: int, ending: int) -> np.ndarray:
    """Endings of a blur take all answers in turn, those of a decided state the one that was decided."""
    return answer(sample, (ending if step == 0 else 0) % len(sample.answers))


def test_step_lens_reads_a_planted_decision(tmp_path: Path) -> None:
    settings = step_lens.Settings(
        tasks=("maze", "maze-loops", "pattern"), several=2, places=(0, 0.5, 1), leave=(0, 0.5), endings=6, finals=2
    )
    made = context(Planted(blurred_then_decided, endings=alive_then_decided), settings, tmp_path)
    results = step_lens.run(made)
    read = results[results["about"] == "x0-hat"]
    assert len(read) == (2 + 2 + 3) * 2 * 3
    several, single = read[read["answers"] > 1], read[read["answers"] == 1]
    first, last = several[several["step"] == 0], several[several["step"] == 2]
    for kind in ("", "held_"):
        assert (first[f"{kind}entropy"] > 0.95).all()  # level answers
        assert (first[f"{kind}alive"] == first["answers"]).all()
        assert last[f"{kind}entropy"].to_numpy() == pytest.approx(0, abs=1e-3)
        assert (last[f"{kind}alive"] == 1).all()
    assert first["held_own"].to_numpy() == pytest.approx(1 / first["answers"].to_numpy(), abs=1e-3)
    assert last["held_own"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert first["cosine_seeds"].to_numpy() == pytest.approx(1)  # a blur is the same for every seed
    assert first["correlation_seeds"].to_numpy() == pytest.approx(1)
    assert (first["correlation_samples"] < 0.999).all()
    assert last["right"].all()
    assert last["cosine_final"].to_numpy() == pytest.approx(1)
    assert (last["cosine_other_seed"] < 0.999).all()
    # One legal answer: decided from the start, nothing to be undecided about, and nothing of a decoy.
    assert single["right"].all()
    assert single["entropy"].isna().all()
    assert single["held_entropy"].isna().all()
    assert (single["fooled"].dropna() == 1).all()
    assert (single["held_fooled"].dropna() == 1).all()
    assert single["cosine_other_seed"].to_numpy() == pytest.approx(1)
    assert (single["cosine_other_sample"] < 0.999).all()
    assert read["sigma"].drop_duplicates().tolist() == list(SIGMAS)
    # Of two level symbols no single one explains what is seen.
    patterns = first[first["task"] == "pattern"]
    assert (patterns["one_symbol"] > 0.05).all()
    assert patterns["two_symbols"].to_numpy() == pytest.approx(0, abs=1e-4)
    endings = results[results["about"] == "endings"]
    blur, decided = endings[endings["step"] == 0], endings[endings["step"] == 1]
    sampled = blur[blur["way"] == "ancestral"]
    assert (sampled["differ"] > 0.5).all()
    assert (sampled["distance"] < 0.05).all()
    assert (blur.loc[blur["way"] == "other seeds", "differ"] > 0.9).all()  # two seeds, two answers
    # Here a blend of latents is one of pictures, and both readings find what was put in.
    for kind in ("held", "seen"):
        assert blur[f"blend_{kind}"].to_numpy() == pytest.approx(blur["blend_true"].to_numpy(), abs=0.02)
        assert (blur[f"blend_{kind}_alive"] >= 2).all()
    assert {"Blends of known weights: what either reading finds"} <= {table["title"] for table in made.shown["tables"]}
    assert decided["differ"].to_numpy() == pytest.approx(0, abs=1e-3)
    assert (decided["lost"] == 0).all()
    runs = results[results["about"] == "run"]
    assert (runs.loc[(runs["answers"] > 1) & (runs["seed"] == 1), "decided"] == 0.5).all()
    assert runs.loc[runs["answers"] == 1, "decided"].isna().all()
    pictures = {"right-guided.png", "weights.png", "watch.png", "settling.png", "endings.png", "superposition.png"}
    assert pictures | {"maze-0.png", "maze-loops-0.png"} <= set(made.files)


def test_step_lens_needs_something_to_compare(tmp_path: Path) -> None:
    for change in ({"seeds": 1}, {"batch": 2}):
        with pytest.raises(InputError, match="compares seeds and samples"):
            step_lens.run(context(None, replace(step_lens.Settings(), **change), tmp_path))


def test_decision_time_reads_a_planted_decision(tmp_path: Path) -> None:
    settings = decision_time.Settings(
        tasks=("maze-loops", "pattern"), samples=2, places=(0, 0.5, 1), branched=2, leave=(0, 0.5, 1), endings=4
    )
    made = context(Planted(blurred_then_decided, endings=alive_then_decided), settings, tmp_path)
    results = decision_time.run(made)
    runs = results[results["about"] == "run"]
    assert (runs.loc[runs["seed"] == 1, "decided_sigma"] == SIGMAS[1]).all()
    assert (runs.loc[runs["seed"] == 0, "decided_sigma"] >= SIGMAS[1]).all()
    endings = results[results["about"] == "endings"]
    assert set(endings["step"]) == {0, 1}  # nothing leaves the last step
    assert set(endings["way"]) == {"ancestral", "renoised", "replaced"}
    assert (endings.loc[endings["step"] == 0, "differ"] > 0.4).all()
    assert (endings.loc[endings["step"] == 1, "lost"] == 0).all()
    assert {"decision.png"} == set(made.files)
    with pytest.raises(InputError, match="compares with another seed"):
        decision_time.run(context(None, replace(settings, seeds=1), tmp_path))
    with pytest.raises(InputError, match="no sample of maze has several legal answers"):
        decision_time.run(context(None, replace(settings, tasks=("maze",)), tmp_path))


MAP = probe_map.Settings(samples=10, batch=5, places=(0, 1), closer_samples=10, workers=1)


def test_runs_end_to_end_with_nnsight_up_to_the_report(tmp_path: Path) -> None:
    lens, arguments = dl.wrap(tiny_pipeline(experts=2)), {"num_inference_steps": 3}
    settings = step_lens.Settings(tasks=("tictactoe",), branched=1, places=(0, 1), leave=(0,))
    one = step_lens.EXPERIMENT
    manifest = run_experiment(one, lens, tmp_path, preset="quick", settings=settings, arguments=arguments)
    assert {"step", "sigma", "timestep", "expert", "branch"} <= set(pd.read_parquet(tmp_path / one.name / "results.parquet"))
    assert [row["step"] for row in manifest["steps_measured"]] == [0, 2]
    assert one.title in write_report(tmp_path).read_text()


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
    first.units("permanence", {"trained": lambda: probe_map.read(first, dl.reasoner.task("permanence"))})
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


@pytest.mark.parametrize("module", [step_lens, probe_map, decision_time])
def test_presets_are_settings_of_one_kind(module: Any) -> None:
    presets = module.EXPERIMENT.presets
    assert set(presets) == {"quick", "full"}
    assert {type(preset) for preset in presets.values()} == {module.Settings}
