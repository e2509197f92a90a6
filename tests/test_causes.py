"""From reading to cause, on models in which it is known whether what a probe reads is used."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_targets import FEATURE, HERE

import dit_lens as dl
from dit_lens.plants import PlantedFeature, planted_feature
from dit_lens.plants.features import READABLE
from dit_lens.plants.model import GUIDANCE
from probes.causes import ADD, ERASE, Effects, Erase, effects
from probes.levers import levers_at

WRITES, READS = 1, 3
CELL = dl.at(block=2, **HERE, frames=0)
FOUND = ("mass-mean", "ridge", "leace")
BRANCH = 1 / GUIDANCE
"""What one branch shows of an answer of 1."""


@cache
def model_of(use: str) -> PlantedFeature:
    return planted_feature("written", seed=3, block=WRITES, second=READS, use=use)


def outcomes(model: PlantedFeature, of: Any = "x0_hat") -> list[dl.Outcome]:
    """Whether the answer is right, and which it is."""
    return [
        dl.Outcome("right", lambda shown, pairs: model.agreement(shown, [pair.clean for pair in pairs]), of=of),
        dl.Outcome("answer", lambda shown, pairs: model.answer(shown).mean((-2, -1)), of=of),
    ]


@cache
def found(use: str, block: int = 2) -> Effects:
    """All levers found on some samples and pulled on others, between where the feature is written and where it is read."""
    model, at = model_of(use), dl.at(block=block, **HERE, frames=0)
    lens, samples = model.lens("hooks"), model.samples(64, seed=5)
    levers = levers_at(lens, samples[:32], at, FEATURE, draws=2)
    return effects(lens, samples[32:], at, FEATURE, levers, outcomes(model), progress=False)


def change(table: pd.DataFrame, edit: str, lever: str, outcome: str, dose: float = np.nan) -> pd.Series:
    """The row of a summary."""
    same = table["dose"].isna() if np.isnan(dose) else table["dose"] == dose
    return table[(table["edit"] == edit) & (table["lever"] == lever) & (table["outcome"] == outcome) & same].iloc[0]


@pytest.mark.parametrize("lever", ["mass-mean", "leace"])
def test_a_feature_that_is_used_takes_the_answer_with_it(lever: str) -> None:
    summary = found("reads").summary()
    gone = change(summary, ERASE, lever, "right")
    assert gone["mean"] == pytest.approx(-BRANCH, rel=0.15)
    assert gone["high"] < -0.5 * BRANCH
    assert gone["clusters"] == 32
    if lever != "leace":
        # The distance of the classes is from -1 to +1.
        for dose in (1.0, -1.0):
            assert change(summary, ADD, lever, "answer", dose)["mean"] == pytest.approx(2 * dose * BRANCH, rel=0.15)


def test_what_a_probe_reads_along_moves_the_answer_as_far_as_the_feature_lies_along_it() -> None:
    """Weights of a probe also take noise away, so they are not the direction in which the feature was written."""
    summary = found("reads").summary()
    gone, random = (change(summary, ERASE, lever, "right") for lever in ("ridge", "random"))
    assert -BRANCH < gone["mean"] < gone["high"] < random["low"] < 0.05 * BRANCH
    up, down = (change(summary, ADD, "ridge", "answer", dose) for dose in (1.0, -1.0))
    assert down["high"] < 0 < up["low"]
    assert up["mean"] < 2 * BRANCH


@pytest.mark.parametrize("lever", FOUND)
def test_a_feature_that_is_there_and_not_used_does_nothing(lever: str) -> None:
    summary = found("ignores").summary()
    assert found("ignores").readings.query("edit == 'none'")["estimate"].min() > 0.99, "it is read as well as where it is used"
    assert found("ignores").summary("clean")["mean"].max() == pytest.approx(BRANCH, rel=0.15)
    for row in summary[summary["lever"] == lever].itertuples():
        assert abs(float(row.mean)) < 0.05 * BRANCH, row  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("use", ["reads", "ignores"])
def test_directions_that_have_nothing_to_do_with_it_take_nothing(use: str) -> None:
    summary = found(use).summary()
    for control in ("random", "shuffled"):
        assert abs(change(summary, ERASE, control, "right")["mean"]) < 0.05 * BRANCH
    assert change(summary, ERASE, "random", "right")["measurements"] == 2 * 32
    # Of a step as long as the way from class to class, a random direction has a share of 1 / sqrt(64) along any other one.
    for dose in (1.0, -1.0):
        for control in ("random", "shuffled"):
            assert abs(change(summary, ADD, control, "answer", dose)["mean"]) < 3 / 64**0.5 * 2 * BRANCH


def test_what_is_erased_stays_away_unless_it_is_written_again() -> None:
    used, unused = found("reads").readings, found("ignores").readings

    def read(table: pd.DataFrame, lever: str) -> list[bool]:
        return (table[table["lever"] == lever].set_index("block")["estimate"] > READABLE).tolist()

    for lever in ("mass-mean", "leace"):
        assert read(used, lever) == [False, False, False]
        assert read(unused, lever) == [False, True, True], "the answer is made afresh at block 3"
    for table in (used, unused):
        for lever in ("none", "random 0", "shuffled"):
            assert read(table, lever) == [True, True, True]
        assert read(table, "ridge") == [True, True, True], "a direction that is read along is not all that can be read along"
        assert (table["control"] < READABLE).all()
        assert set(table["block"]) == {2, 3, 4}
        assert {"selectivity", "shuffled", "low", "high"} <= set(table)


def test_after_the_feature_was_read_its_loss_does_nothing() -> None:
    model, at = model_of("reads"), dl.at(block=READS, **HERE, frames=0)
    lens, samples = model.lens("hooks"), model.samples(48, seed=6)
    (early,) = (levers_at(lens, samples[:24], CELL, FEATURE, draws=0)["ridge"],)
    kept = effects(lens, samples[24:], at, FEATURE, {"ridge": early}, outcomes(model), reread=(), progress=False)
    assert abs(change(kept.summary(), ERASE, "ridge", "right")["mean"]) < 0.05 * BRANCH
    assert kept.readings.empty


def test_edits_of_all_steps_reach_the_final_latents() -> None:
    """The word is in one branch, so that is where it is erased."""
    shown = {}
    for use in ("reads", "ignores"):
        model = model_of(use)
        lens, samples = model.lens("hooks"), model.samples(30, seed=7)
        levers = levers_at(lens, samples[:24], CELL, FEATURE, draws=1)
        at = dl.at(block=2, branch="cond", frames=0)
        pulled = {name: levers[name] for name in ("leace", "random 0")}
        shown[use] = effects(lens, samples[24:], at, FEATURE, pulled, outcomes(model, "latents")[0], reread=[], progress=False)
        table = shown[use].outcomes
        assert table["clean"].between(0.7, 1.3).all()
        assert (table.loc[(table["lever"] == "random 0") & (table["edit"] == ERASE), "change"].abs() < 0.15).all()
    gone = {use: part.outcomes.query("lever == 'leace'")["value"] for use, part in shown.items()}
    assert gone["reads"].abs().max() < 0.3
    assert gone["ignores"].min() > 0.7


def test_it_is_what_a_sweep_says_and_what_whole_runs_say(engine: str) -> None:
    model = model_of("reads")
    lens, samples = model.lens(engine), model.samples(20, seed=8)
    lever = levers_at(lens, samples[:18], CELL, FEATURE, draws=0)["leace"]
    both = outcomes(model)[0]
    late = dl.Outcome("late", lambda shown, pairs: model.agreement(shown, [pair.clean for pair in pairs]), of="latents")
    one = samples[18:19]
    alone = effects(lens, one, CELL, FEATURE, {"leace": lever}, [both], reread=[], progress=False).outcomes
    whole = effects(lens, one, CELL, FEATURE, {"leace": lever}, [both, late], reread=[], progress=False).outcomes
    pair = dl.Pair(one[0], one[0])
    swept = dl.sweep(lens, [pair], lambda cell, runs: Erase(cell, lever.eraser), CELL, both, seeds=[one[0].seed], progress=False)
    for table in (whole[whole["outcome"] == "right"], swept.table):
        assert table["value"].tolist() == alone["value"].tolist()
        assert table["clean"].tolist() == alone["clean"].tolist()
    assert whole.query("outcome == 'late'")["change"].item() < -0.02


def test_what_does_not_fit_is_said() -> None:
    model = model_of("reads")
    lens, samples = model.lens("hooks"), model.samples(8)
    levers = levers_at(lens, samples, CELL, FEATURE, draws=0)
    right = outcomes(model)[0]
    for arguments, message in (
        ((samples, dl.at(block=[1, 2], **HERE), FEATURE, levers, right), "selects the blocks 1, 2, and a direction is of one"),
        ((samples, dl.at(block=2), FEATURE, levers, right), "is in 10 calls, and 'right' is of one: name step= and branch="),
        ((samples, CELL, FEATURE, {}, right), "there are 8 and 0"),
        ((samples, dl.at(block=2, **HERE, site="heads"), FEATURE, levers, right), r"the eraser is of rows \(64,\)"),
    ):
        with pytest.raises(dl.InputError, match=message):
            effects(lens, *arguments, progress=False)
    with pytest.raises(dl.InputError, match="nothing to measure"):
        effects(lens, samples, CELL, FEATURE, levers, reread=[], progress=False)
    with pytest.raises(dl.InputError, match=r"reread=\[1\]: what is edited after block 2"):
        effects(lens, samples, CELL, FEATURE, levers, right, reread=[1], progress=False)
