"""The specialization map: planted contents give planted shares and bands, and a tiny pipeline goes from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pipeline, tiny_transformer
from hypothesis import given
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.experiment import Context, run_experiment
from dit_lens.report import write_report
from experiments import specialization
from experiments.content_shares import CONTENTS, of_damage, of_patching, of_readings, shares
from experiments.layer_figures import ABLATED, NOISE, OTHER, PATCHED
from experiments.probe_figures import TRAINED, UNTRAINED
from experiments.readings import NEEDED, readings
from probes.baselines import LATENTS

BLOCKS, DEPTH = range(14), np.arange(14) / 14
BAND = np.repeat([0, 1, 2], [4, 7, 3])
"""The paper's bands on 14 blocks."""


def planted_readings(levels: np.ndarray, width: float = 0.02) -> pd.DataFrame:
    """Two targets of each content in two tasks, whose selectivity is that of `levels` (blocks, contents) at every step."""
    rows = []
    for task, number, step in ((task, number, step) for task in ("maze", "circle") for number in range(2) for step in (0, 5)):
        for place, content in enumerate(CONTENTS):
            where = {"task": task, "target": f"{content} {number}", "content": content, "step": step, "samples": 40}
            rows.append({**where, "block": -1, "depth": np.nan, "value": 0.0, "low": 0.0, "high": 0.0})
            for block in BLOCKS:
                value = float(levels[block, place]) + (0.05 if number else -0.05)
                found = {"value": value, "low": value - width / 2, "high": value + width / 2}
                rows.append({**where, "block": block, "depth": block / 14, **found})
    return pd.DataFrame(rows)


def planted_damage(levels: np.ndarray, noise: float, count: int = 30) -> pd.DataFrame:
    """Damage of samples, in units that differ from content to content."""
    random = np.random.default_rng(0)
    values = levels + noise * random.normal(size=(count, *levels.shape))
    values *= (1.0, 0.1, 0.01)
    index = pd.MultiIndex.from_product([range(count), BLOCKS, CONTENTS], names=["one", "block", "content"])
    table = pd.DataFrame({"value": values.ravel()}, index=index).reset_index()
    return table.assign(depth=table["block"] / 14, step=0)


def test_planted_selectivity_gives_the_papers_bands() -> None:
    levels = np.where(np.arange(3) == BAND[:, None], 0.8, 0.1)
    profile, selectivity, gain = of_readings(planted_readings(levels))
    assert profile.values == pytest.approx(np.where(np.arange(3) == BAND[:, None], 0.8, 0.1))
    assert selectivity.values == pytest.approx(levels)
    assert gain.values[0] == pytest.approx(levels[0])  # over the noisy latents, from which nothing is read
    assert gain.values[4] == pytest.approx([-0.7, 0.7, 0.0])
    found = profile.compared()
    assert found["changes"] == 2
    assert (found["boundary 0"], found["boundary 1"]) == (4 / 14, 11 / 14)
    assert [place for place, *_ in found["found"]] == [4 / 14, 11 / 14]
    assert found["contains 0.25"]
    assert found["contains 0.75"]
    assert (found["bands share"], found["content share"]) == (1, 1)
    assert found["bands p"] < 0.05
    assert found["content p"] < 0.05
    table = profile.table()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert table["samples"].unique().tolist() == [40]


def test_other_bands_do_not_agree_with_the_papers() -> None:
    turned = np.where(np.arange(3) == 2 - BAND[:, None], 0.8, 0.1)
    found = of_readings(planted_readings(turned))[0].compared()
    assert found["content share"] == pytest.approx(7 / 14)  # the middle one stays
    late = np.where(np.arange(3) == np.repeat([0, 1, 2], [9, 3, 2])[:, None], 0.8, 0.1)
    found = of_readings(planted_readings(late))[0].compared()
    assert (found["boundary 0"], found["boundary 1"]) == (9 / 14, 12 / 14)
    assert not found["contains 0.25"]
    assert found["bands share"] < 0.75


def test_wide_intervals_of_probes_are_wide_intervals_of_boundaries() -> None:
    levels = np.where(np.arange(3) == BAND[:, None], 0.5, 0.3)
    narrow, wide = (of_readings(planted_readings(levels, width))[0].compared() for width in (0.02, 1.5))
    assert narrow["low 0"] == narrow["high 0"]
    assert wide["high 0"] - wide["low 0"] > 0.1


def test_a_target_that_is_not_read_everywhere_is_left_out() -> None:
    table = planted_readings(np.full((14, 3), 0.4))
    table.loc[(table["target"] == "reasoning 1") & (table["block"] == 3), "value"] = np.nan
    assert of_readings(table)[1].values[:, 1] == pytest.approx(0.35)
    assert (of_readings(table[table["content"] != "reasoning"])[0].values[:, 1] == 0).all()
    with pytest.raises(InputError, match="none of 6 targets"):
        of_readings(table.assign(value=np.nan))


def test_planted_damage_is_shared_over_blocks_whatever_its_unit() -> None:
    levels = np.where(np.arange(3) == BAND[:, None], 1.0, 0.0)
    exact = of_damage(planted_damage(levels, 0.0))
    assert exact.values == pytest.approx(levels / levels.sum(axis=0))
    noisy = of_damage(planted_damage(levels, 0.3))
    assert noisy.values.sum(axis=0) == pytest.approx(1)
    found = noisy.compared()
    assert (found["boundary 0"], found["boundary 1"], found["content share"]) == (4 / 14, 11 / 14, 1)
    # A control that does half as much is half as high, and not as high over its own sum.
    assert of_damage(planted_damage(levels, 0.0), planted_damage(levels / 2, 0.0)).values == pytest.approx(exact.values / 2)
    nothing = of_damage(planted_damage(0 * levels, 0.0))
    assert (nothing.values == 0).all()
    assert nothing.compared()["content share"] == 0


def test_patching_is_one_curve() -> None:
    curve = np.repeat([0.0, 0.8, 0.1], [4, 7, 3])
    values = np.repeat(curve[:, None], 3, axis=1)
    table = planted_damage(values, 0.1).query("content == 'perceptual'").assign(content="reasoning")
    profile = of_patching(table, PATCHED)
    assert profile.series == ("reasoning",)
    assert profile.values[:, 0] == pytest.approx(curve, abs=0.1)
    assert "content share" not in profile.compared()


@given(st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=6).map(np.array))
def test_shares_are_shares(values: np.ndarray) -> None:
    found = shares(values)
    assert found.sum(axis=-1) == pytest.approx(1)
    assert (found >= 0).all()
    assert (found[(values <= 0) & (values.max(axis=-1, keepdims=True) > 0)] == 0).all()


def test_bands_need_blocks() -> None:
    profile = of_damage(planted_damage(np.ones((14, 3)), 0.1).query("block < 3"))
    with pytest.raises(InputError, match="at least 4 blocks, and 3 were"):
        profile.compared()


SETTINGS = specialization.Settings(tasks=("circle",), pairs=2, batch=2, places=(0, 1), depths=(), read=12)


@pytest.fixture(scope="module")
def lens() -> dl.Lens:
    return dl.wrap(tiny_pipeline(transformer=tiny_transformer(12, blocks=5)), engine="hooks")


def test_runs_end_to_end_on_a_tiny_pipeline(lens: dl.Lens, tmp_path: Path) -> None:
    given: Any = {"preset": "quick", "settings": SETTINGS, "arguments": {"num_inference_steps": 3}}
    manifest = run_experiment(specialization.EXPERIMENT, lens, tmp_path, **given)
    results = pd.read_parquet(tmp_path / "specialization" / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "branch"} <= set(results.columns)
    assert [row["step"] for row in manifest["steps_measured"]] == [0, 2]
    edited = results[results["quantity"] == "change by an edit"]
    # Pairs, steps, blocks, edits; the three parts and the answer.
    assert len(edited) == 2 * 2 * 5 * 4 * (3 + 1)
    assert set(edited["edit"]) == {ABLATED, NOISE, PATCHED, OTHER}
    derived = results[results["quantity"] == "share of selectivity"]
    assert derived.groupby("block")["value"].sum().to_numpy() == pytest.approx(1)
    assert {"bands.png", "gain.png", "map-selectivity.png", "map-damage.png", "map-patching.png"} == {
        figure["file"] for figure in manifest["figures"]
    }
    assert "Specialization map" in write_report(tmp_path).read_text()


def test_what_is_measured_at_a_step_is_what_a_run_shows_there(lens: dl.Lens, tmp_path: Path) -> None:
    few = replace(SETTINGS, places=(1,), depths=(0.75,))
    made = Context(lens, few, tmp_path, "specialization", "once", {"num_inference_steps": 3})
    pairs = dl.reasoner.pairs("circle", 2)
    table = specialization.measure(made, pairs).table
    inputs = {**dl.reasoner.inputs([pair.clean for pair in pairs]), "num_inference_steps": 3}
    seeds: Any = [[pair.clean.index] for pair in pairs]
    cell = dl.at(block=3, step=2, branch="cond", site="update")
    run = lens.run(**inputs, seed=seeds, edits=dl.Zero(cell), until=2, decode=False)
    kept = specialization.Scorer([pair.clean for pair in pairs])(lens.decode(run.x0_hat(2, "cond")))
    here = table.query("block == 3 and step == 2").query("edit == @ABLATED")
    for measure in ("perception", "picture"):
        assert here.loc[here["measure"] == measure, "value"].to_numpy() == pytest.approx(kept[measure], abs=1e-6)


def test_a_probe_map_of_the_same_model_is_taken_up(lens: dl.Lens, tmp_path: Path) -> None:
    table = planted_readings(np.full((14, 3), 0.4)).rename(columns={"value": "selectivity", "samples": "clusters"})
    table["reader"] = np.where(table["block"] < 0, LATENTS, TRAINED)
    table["block"] = table["block"].where(table["block"] >= 0).astype("Int64")
    table = table.assign(sigma=1.0, timestep=1000.0, expert="transformer", branch="cond")
    assert set(table.columns) >= NEEDED
    untrained = table[table["reader"] == TRAINED].assign(reader=UNTRAINED, selectivity=-1.0)
    folder = tmp_path / "probe-map"
    folder.mkdir()
    pd.concat([table, untrained]).to_parquet(folder / "results.parquet", index=False)
    (folder / "manifest.json").write_text(json.dumps({"model": {"hash": lens.hash}}))
    arguments = {"num_inference_steps": 3}
    made = Context(lens, SETTINGS, tmp_path / "specialization", "specialization", "once", arguments)
    found = readings(made)
    assert found["source"].unique().tolist() == ["probe-map"]
    assert len(found) == len(table)
    assert sorted(found["block"].unique()) == [-1, *BLOCKS]
    # Half the width is that of the score, times the root of two.
    wide = found[found["block"] >= 0]
    assert (wide["high"] - wide["low"]).to_numpy() == pytest.approx(0.02 * np.sqrt(2))
    (folder / "manifest.json").write_text(json.dumps({"model": {"hash": "another"}}))
    assert readings(made)["source"].unique().tolist() == ["own map"]


def test_a_control_needs_another_pair(lens: dl.Lens, tmp_path: Path) -> None:
    few = specialization.Settings(pairs=3, batch=2)
    with pytest.raises(InputError, match="another pair's donor"):
        specialization.run(Context(lens, few, tmp_path, "specialization", "once", {}))


def test_presets_are_settings_of_one_kind() -> None:
    presets = specialization.EXPERIMENT.presets
    assert {type(preset) for preset in presets.values()} == {specialization.Settings}
    assert presets["full"].pairs >= 100
    assert max(presets["full"].places) < 1  # after the last step nothing that is changed is seen
