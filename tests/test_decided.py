"""Readable and decided: by rules on tables whose answer is known, and on a model in which it was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_targets import FEATURE, HERE

import dit_lens as dl
from dit_lens.plants import planted_feature
from probes.controls import read_with_controls
from probes.decided import LEAST, decided, edited, readable
from probes.levers import tokens_of
from probes.linear import split_groups
from probes.maps import LATENTS, PLACE, PROBE

STEPS, BLOCKS = 4, 3


def map_of(scores: Any, width: float = 0.05, place: float = 0.6, latents: float = 0.5, control: float = 0.5) -> pd.DataFrame:
    """A map of one target: a score for every step and block, with intervals of one width."""
    scores = np.asarray(scores)
    rows = [
        {"reader": PROBE, "target": "it", "branch": "cond", "step": step, "block": block, "sigma": 1 - step / 4}
        | {"estimate": score, "low": score - width, "high": score + width, "control": control}
        for (step, block), score in np.ndenumerate(scores)
    ]
    for step in range(len(scores)):
        for reader, score in ((PLACE, place), (LATENTS, latents)):
            same = {"estimate": score, "low": score - width, "high": score + width, "control": 0.5}
            rows.append({"reader": reader, "target": "it", "branch": "cond", "step": step, "block": np.nan} | same)
    return pd.DataFrame(rows).astype({"block": "Int64"})


def sweep_of(effects: Any, pairs: int = 12, noise: float = 0.1, control: float | None = None, seed: int = 0) -> dl.Sweep:
    """A sweep whose mean effects are known, (steps, blocks), with noise between pairs, and two seeds of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for (step, block), size in np.ndenumerate(np.asarray(effects, dtype=float)):
        for name, mean in (("edit", size), *([] if control is None else [("other", control)])):
            for sample, spread in enumerate(rng.normal(size=pairs) * noise):
                for number in range(2):
                    row = {"step": step, "block": block, "edit": name, "sample": sample, "seed": number, "outcome": "flip"}
                    rows.append(row | {"effect": mean + spread})
    return dl.Sweep(pd.DataFrame(rows), ("step", "block"))


def scores(**cells: float) -> np.ndarray:
    """A grid of 0.5 with other values, as s1b2=0.9."""
    grid = np.full((STEPS, BLOCKS), 0.5)
    for name, score in cells.items():
        grid[int(name[1]), int(name[3])] = score
    return grid


def test_a_target_is_readable_where_its_lower_end_is_above_all_it_is_held_against() -> None:
    grid = scores(s0b2=0.62, s1b1=0.69, s1b2=0.75, s2b0=0.9)
    found = readable(map_of(grid)).iloc[0]
    # Place only: 0.6, up to 0.65. At s1b1 the interval is 0.64 to 0.74.
    assert (found["readable_step"], found["readable_block"]) == (1, 2)
    assert (found["maybe_step"], found["maybe_block"]) == (0, 2)
    assert found["readable_sigma"] == 0.75
    assert found["readable_score"] == 0.75
    assert found["baselines"] == f"{PLACE}, {LATENTS}"
    assert readable(map_of(grid, control=0.8)).iloc[0]["readable_step"] == 2
    assert readable(map_of(grid, latents=0.72)).iloc[0]["readable_step"] == 2
    nowhere = readable(map_of(grid, place=0.99)).iloc[0]
    assert nowhere[["readable_step", "readable_block", "maybe_step"]].isna().all()


def test_what_is_to_last_is_there_at_the_next_blocks_of_the_step_too() -> None:
    grid = map_of(scores(s0b1=0.9, s1b1=0.9, s1b2=0.9, s2b2=0.9))
    assert tuple(readable(grid).iloc[0][["readable_step", "readable_block"]]) == (0, 1)
    assert tuple(readable(grid, lasting=2).iloc[0][["readable_step", "readable_block"]]) == (1, 1)
    last = map_of(scores(s0b1=0.9, s2b2=0.9))
    assert tuple(readable(last, lasting=2).iloc[0][["readable_step", "readable_block"]]) == (2, 2), "none comes after it"


def test_baselines_of_other_steps_blocks_and_targets_do_not_count() -> None:
    table = map_of(scores(s1b1=0.8), place=0.5)
    other = {"reader": "untrained", "branch": "cond", "estimate": 0.9, "low": 0.9, "high": 0.9, "control": 0.5, "target": "it"}
    for elsewhere in ({"step": 1, "block": 0}, {"step": 0, "block": 1}, {"step": 1, "block": 1, "target": "other"}):
        joined = pd.concat([table, pd.DataFrame([other | elsewhere])])
        assert readable(joined).iloc[0]["readable_step"] == 1, elsewhere
    here = pd.concat([table, pd.DataFrame([other | {"step": 1, "block": 1}])])
    assert readable(here)["readable_step"].isna().all()
    two = pd.concat([table, map_of(scores(s3b0=0.9)).assign(target="second")])
    assert readable(two)["readable_step"].tolist() == [1, 3]


def test_what_is_decided_is_where_edits_had_their_last_effect() -> None:
    found = edited(sweep_of(scores(s0b0=0.8, s1b1=1.0, s2b1=0.6) - 0.5)).iloc[0]
    assert (found["first_step"], found["last_step"]) == (0, 2)
    assert (found["peak_step"], found["peak_block"]) == (1, 1)
    assert found["peak_effect"] == pytest.approx(0.5, abs=0.1)
    assert found["pairs"] == 12
    assert found["nowhere"] == 0
    for name in ("first_step", "last_step", "peak_step", "peak_block"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_a_control_with_the_same_effect_leaves_nothing() -> None:
    grid = scores(s1b1=1.0) - 0.5
    assert edited(sweep_of(grid, control=0.0)).iloc[0]["last_step"] == 1
    alike = edited(sweep_of(grid, control=0.5)).iloc[0]
    assert pd.isna(alike["last_step"])
    assert alike["nowhere"] > 0.9
    assert np.isnan(alike["peak_effect"])
    tiny = edited(sweep_of((scores(s1b1=1.0) - 0.5) * LEAST, noise=0)).iloc[0]
    assert pd.isna(tiny["peak_step"]), "without spread, the smallest of effects would count"


def test_intervals_of_the_crossing_say_how_sure_it_is() -> None:
    """Effects that fall with the steps: where they stop to count, few noisy pairs do not know."""
    falling = np.repeat(np.linspace(0.9, 0, 10)[:, None], BLOCKS, axis=1)
    clear, noisy = (edited(sweep_of(falling, pairs, noise, seed=1)).iloc[0] for pairs, noise in ((60, 0.05), (6, 0.5)))
    widths = [row["last_step_high"] - row["last_step_low"] for row in (clear, noisy)]
    assert widths[0] < widths[1]
    assert clear["last_step_low"] <= 8 <= clear["last_step_high"]


def test_on_a_planted_model_the_answer_is_readable_at_once_and_decided_with_the_way_from_noise_to_video() -> None:
    model = planted_feature("written", seed=3, block=1, second=3, use="reads")
    lens, samples = model.lens("hooks"), model.samples(32, seed=5)
    run = lens.run(
        **model.inputs(samples), seed=model.seeds(samples), decode=False, record=dl.at(branch="cond", frames=0), until=1
    )
    tokens = tokens_of(dl.at(frames=0), run.layout, samples, FEATURE)
    _, test = split_groups(tokens.groups)
    rows = []
    for entry in run.activations:
        features = entry.tensor.flatten(0, 3).numpy()
        read = read_with_controls(features, [tokens.question], tokens.groups, test, tokens.samples, tokens.places)
        rows.append(
            read.assign(step=entry.cell.step, block=entry.cell.block, sigma=entry.cell.sigma, reader=PROBE, branch="cond")
        )
    places = np.eye(16)[tokens.places]
    only = read_with_controls(places, [tokens.question], tokens.groups, test, tokens.samples, tokens.places)
    rows += [only.assign(step=step, reader=PLACE, branch="cond") for step in (0, 1)]
    right = dl.Outcome("right", lambda shown, pairs: model.agreement(shown, [pair.clean for pair in pairs]), of="latents")
    over = dl.at(block="all", step="all", site="update", frames=[0])
    sweep = dl.sweep(lens, model.pairs(4), lambda cell, runs: dl.PatchUpdate(cell, runs.donor), over, right, progress=False)
    found = decided(pd.concat(rows, ignore_index=True), sweep).iloc[0]
    assert (found["readable_step"], found["readable_block"]) == (HERE["step"], 1)
    sigmas = lens.forecast(**samples[0].inputs).sigmas
    way = -np.diff([*sigmas, 0.0])
    assert found["peak_step"] == way.argmax()
    assert found["peak_block"] in (1, 3), "where it is written, and where it is read"
    assert found["last_step"] == np.flatnonzero(way > LEAST).max()
    assert found["first_step"] == 0
    assert found["peak_effect"] == pytest.approx(way.max(), rel=0.2)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(dl.InputError, match="the map lacks low, high, control"):
        readable(map_of(scores()).drop(columns=["low", "high", "control"]))
    sweep = sweep_of(scores())
    with pytest.raises(dl.InputError, match="name outcome=, one of flip"):
        edited(sweep, "right")
    with pytest.raises(dl.InputError, match="the axes block; sweep over block= and step="):
        edited(dl.Sweep(sweep.table, ("block",)))
    with pytest.raises(dl.InputError, match=r"needs 2 pairs .* there are 1"):
        edited(sweep_of(scores(), pairs=1))
