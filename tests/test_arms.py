"""Arms: where noise goes, and that doses are what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import arguments, tiny_pipeline
from hypothesis import given
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens import reasoner
from experiments import arms
from experiments.arms import Arm


def samples(count: int, name: str = "maze") -> list[Any]:
    return [reasoner.task(name).sample("test", index) for index in range(count)]


@given(st.integers(1, 30), st.data())
def test_sets_of_frames_are_sets_and_not_too_many(count: int, data: Any) -> None:
    size = data.draw(st.integers(1, count))
    sets = arms.frame_sets(count, size)
    assert 0 < len(sets) <= arms.SETS
    for chosen in sets:
        assert len(set(chosen)) == size
        assert list(chosen) == sorted(chosen)
        assert chosen[0] >= 0
        assert chosen[-1] < count
    if math.comb(count, size) <= arms.SETS:
        assert len(set(sets)) == math.comb(count, size)


@given(st.floats(0, 1), st.integers(1, 40))
def test_shares_become_the_nearest_number_of_frames(share: float, count: int) -> None:
    found = arms.frames_for(share, count)
    assert 1 <= found <= count
    assert found == 1 or abs(found - share * count) <= 0.5


def test_samples_take_turns_at_the_frames() -> None:
    turns = Arm("frame", "replaced", (0,), 1 / 5)
    assert sorted(turns.frames(sample, 5) for sample in samples(5)) == [(0,), (1,), (2,), (3,), (4,)]
    assert {Arm("frame", "replaced", (0,), 1 / 5, frame=3).frames(sample, 5) for sample in samples(5)} == {(3,)}
    assert all(len(Arm("frame", "replaced", (0,), 0.6).frames(sample, 5)) == 3 for sample in samples(9))
    edits = turns.edits(samples(7), 5)
    assert sorted(row for edit in edits for row in edit.rows or ()) == list(range(7))


def test_every_sample_has_noise_of_its_own() -> None:
    mixed = [*samples(3), *samples(3, "tictactoe")]
    (edit,) = Arm("step", "replaced", (1,)).edits(mixed, 5)
    assert isinstance(edit.noise, list)
    assert len(set(edit.noise)) == 6
    (alone,) = Arm("step", "replaced", (1,)).edits(mixed[4:5], 5)
    assert alone.noise == [edit.noise[4]], "noise does not depend on what runs beside a sample"


@pytest.mark.parametrize("where", ["step", "frame"])
@pytest.mark.parametrize("how", ["replaced", "sigma-matched", "added"])
def test_doses_against_what_a_run_really_lost(where: Any, how: Any) -> None:
    """Latents of a run that was edited, split into what is left of the unedited ones and what is new."""
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    inputs, row = arguments(lens.pipe, width=64, height=64), samples(1)
    clean = lens.run(**inputs, seed=0, decode=False)
    arm = Arm(where, how, (2,), 0.5)
    edited = lens.run(**inputs, seed=0, decode=False, edits=arm.edits(row, 2))
    found = arms.dose(arm, clean, row, lens.pipe.scheduler).iloc[0]
    before, after = (run.latents[2, 0].double() for run in (clean, edited))
    signal = (1 - clean.sigmas[2]) * clean.x0_hat(1)[0].double() if how == "sigma-matched" else torch.zeros_like(before)
    chosen = list(arm.frames(row[0], 2))
    changed, old = after[:, chosen] - signal[:, chosen], before[:, chosen] - signal[:, chosen]
    if how == "added":
        fresh = changed - old
        assert found["destroyed"] == 0
    else:
        part = 1.0 if where == "frame" else 0.5
        fresh = changed - math.sqrt(1 - part) * old
        expected = part * old.square().sum() / before.square().sum()
        assert found["destroyed"] == pytest.approx(float(expected), rel=1e-6)
    # Noise is random, and its energy is what is expected of so many values.
    assert float(fresh.square().sum() / before.square().sum()) == pytest.approx(found["added"], rel=0.15)
    assert found["total"] == found["destroyed"]


def test_doses_of_a_frame_and_of_a_share_match() -> None:
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    clean = lens.run(**arguments(lens.pipe, width=64, height=64, num_frames=17), seed=0, decode=False)
    every = tuple(range(4))
    frame, share = (
        arms.dose(Arm(where, "replaced", every, 1 / 5), clean, samples(1), lens.pipe.scheduler) for where in ("frame", "step")
    )
    assert share["destroyed"][0] == pytest.approx(0.2)
    assert frame["destroyed"][0] == pytest.approx(0.2, abs=0.03)
    assert share["total"][0] == pytest.approx(0.8)


def test_labels_say_when() -> None:
    lens = dl.wrap(tiny_pipeline(), engine="hooks")
    clean = lens.run(**arguments(lens.pipe), seed=0, decode=False)
    steps = {(1,): arms.ONE, (0, 1): arms.SEVERAL, (0, 1, 2): arms.BUT_LAST, (0, 1, 2, 3): arms.ALL}
    for chosen, word in steps.items():
        found = arms.labels(Arm("frame", "replaced", chosen, 0.5), clean, samples(1))
        assert found["when"] == word
        assert np.isnan(found["sigma"]) == (word in (arms.ALL, arms.BUT_LAST))
        assert found["share"] == [0.5]
    assert found["frames"] == ["1"]
