"""The ensemble: what is merged is what was meant, choices among seeds are right, and the claims follow from the gains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.activations import Entry
from dit_lens.claims import judged
from dit_lens.errors import InputError
from dit_lens.experiment import Context, run_experiment
from dit_lens.reasoner import Score
from experiments import ensemble, ensemble_figures
from experiments.ensemble_claims import gain
from experiments.merging import (
    EVERY,
    FIRST,
    HIDDEN,
    LAST,
    LATENTS,
    LENGTH,
    MIDDLE,
    ON_SCHEDULE,
    RESCALED,
    RIGHT,
    TO_ALL,
    TO_ONE,
    VELOCITY,
    X0_HAT,
    Bench,
    Merge,
    best,
    voted,
)  # fmt: skip

SHORT = {"num_inference_steps": 2, "num_frames": 5}
SEEDS = 3
OWN = [range(SEEDS), range(8, 8 + SEEDS)]
"""Seeds of each sample."""


@pytest.fixture(scope="module")
def lens() -> Any:
    return dl.wrap(tiny_pipeline(), engine="hooks")


@pytest.fixture(scope="module")
def bench(lens: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("merges") / "ensemble"
    samples = [reasoner.task("circle").sample("test", index, frames=5) for index in range(2)]
    return Bench(Context(lens, ensemble.Settings(), folder, "ensemble", "test", SHORT), samples, OWN)


def by_seed(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(0, (2, SEEDS))


def test_hidden_states_are_averaged_over_the_seeds_of_each_sample(lens: Any, bench: Bench) -> None:
    found = bench.first_step(Merge(HIDDEN, TO_ALL, FIRST))
    record = dl.at(block=0, step=0)
    how: Any = {"seed": bench.seeds, "until": 0, "decode": False}
    run = lens.run(**bench.inputs, record=record, **how)
    means = [Entry(one.cell, 0, "full", by_seed(one.tensor).mean(1).repeat_interleave(SEEDS, 0)) for one in run.activations]
    by_hand = lens.run(**bench.inputs, edits=dl.Patch(record, dl.Activations(means)), **how)
    for branch in ("cond", "uncond"):
        torch.testing.assert_close(found[branch], by_hand.velocity(0, branch), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[branch], bench.clean.velocity(0, branch), atol=1e-3)


def test_written_to_all_only_the_beginning_of_the_window_matters(bench: Bench) -> None:
    first, every, last = (bench.first_step(Merge(HIDDEN, TO_ALL, window)) for window in (FIRST, EVERY, MIDDLE))
    for branch in ("cond", "uncond"):
        torch.testing.assert_close(first[branch], every[branch], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(first[branch], last[branch], atol=1e-4)
        rows = by_seed(last[branch])
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    assert bench.apart(first, every)["value"].max() < 1e-5
    assert bench.apart(first, last)["value"].min() > 1e-3


def test_written_to_one_the_others_run_free_and_every_block_matters(bench: Bench) -> None:
    first, every = (by_seed(bench.first_step(Merge(HIDDEN, TO_ONE, window))["cond"]) for window in (FIRST, EVERY))
    alone = by_seed(bench.clean.velocity(0, "cond"))
    for found in (first, every):
        torch.testing.assert_close(found[:, 1:], alone[:, 1:], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(found[:, 0], alone[:, 0], atol=1e-3)
    assert not torch.allclose(first, every, atol=1e-4)


def test_one_branch_alone_leaves_the_other(bench: Bench) -> None:
    one, both = (bench.first_step(Merge(HIDDEN, TO_ALL, MIDDLE, branch)) for branch in ("cond", "both"))
    torch.testing.assert_close(one["cond"], both["cond"])
    assert torch.equal(one["uncond"], bench.clean.velocity(0, "uncond"))


@pytest.mark.parametrize("to", [TO_ALL, TO_ONE])
def test_outputs_are_averaged(bench: Bench, to: str) -> None:
    got = [0, 1, 2] if to == TO_ALL else [0]
    velocity = bench.first_step(Merge(VELOCITY, to))
    for branch in ("cond", "uncond"):
        mean = by_seed(bench.clean.velocity(0, branch)).mean(1)
        torch.testing.assert_close(by_seed(velocity[branch])[:, got], mean[:, None].expand(-1, len(got), *mean.shape[1:]))
    merge = Merge(X0_HAT, to)
    run = bench.finished(merge, bench.first_step(merge), SEEDS)
    mean = by_seed(bench.clean.x0_hat(0)).mean(1)
    found = run.x0_hat(0).unflatten(0, (2, len(got)))  # guided, as a mean of sums is the sum of means
    torch.testing.assert_close(found, mean[:, None].expand_as(found), atol=1e-4, rtol=1e-4)


def test_a_first_step_that_is_not_merged_ends_as_the_seeds_alone(bench: Bench) -> None:
    own = {branch: bench.clean.velocity(0, branch) for branch in bench.branches}
    run = bench.finished(Merge(VELOCITY, TO_ALL), own, 2)
    assert run.seeds == (0, 1, 8, 9)
    torch.testing.assert_close(run.latents[-1], bench.clean.latents[-1][[0, 1, 3, 4]], atol=1e-5, rtol=1e-5)
    rows = bench.rows(run)
    assert rows["same"].eq(1).all()
    assert rows["value"].equals(rows["alone"])
    assert rows["seed"].tolist() == [0, 1, 8, 9]


def test_hidden_states_on_schedule_keep_the_noise_of_their_row(bench: Bench) -> None:
    """One x0-hat for all rows of a sample, that of the mean latents; what is left of a row's latents is its own noise."""
    hidden, merge = (Merge(what, TO_ALL, MIDDLE) for what in (HIDDEN, ON_SCHEDULE))
    x0_hat = bench.finished(merge, bench.first_step(merge), SEEDS).x0_hat(0)
    weights: Any = bench.clean.weights[0]
    a, b = weights
    velocity = bench.finished(hidden, bench.first_step(hidden), SEEDS).velocity(0, "guided")
    implied = a * by_seed(bench.clean.latents[0]).mean(1) + b * by_seed(velocity)[:, 0]
    torch.testing.assert_close(by_seed(x0_hat), implied[:, None].expand_as(by_seed(x0_hat)), atol=1e-4, rtol=1e-4)


def test_a_video_costs_its_calls_and_the_first_ones_that_are_merged() -> None:
    merges = (Merge(HIDDEN, TO_ALL, MIDDLE), Merge(HIDDEN, TO_ALL, MIDDLE, branch="cond"), Merge(LATENTS), Merge(RESCALED))
    assert [merge.calls(steps=3, branches=2, count=3) for merge in merges] == [10, 8, 6, 6]


def test_no_two_samples_have_a_seed_in_common() -> None:
    settings = ensemble.Settings(counts=(2, 8), sets=2)
    seeds = [{*settings.seeds_of(i, 8, 0), *settings.seeds_of(i, 3, 0), *settings.seeds_of(i, 3, 1)} for i in range(4)]
    assert len(set.union(*seeds)) == sum(len(own) for own in seeds) == 4 * 8
    assert list(settings.seeds_of(1, 2, 0)) == list(settings.seeds_of(1, 3, 0))[:2]


def test_merged_noise_has_less_variance_unless_rescaled(bench: Bench) -> None:
    for what, variance in ((LATENTS, 1 / SEEDS), (RESCALED, 1.0)):
        run = bench.finished(Merge(what), {}, SEEDS)
        assert run.batch == 2
        assert float(run.latents[0].var()) == pytest.approx(variance, rel=0.1)
        mean = by_seed(bench.clean.latents[0]).mean(1)
        torch.testing.assert_close(run.latents[0], mean * (variance * SEEDS) ** 0.5)


def test_lengths_of_means(lens: Any, bench: Bench) -> None:
    table = bench.shrinkage()
    latents = table[table["what"] == LATENTS]["value"]
    assert latents.to_numpy() == pytest.approx(SEEDS**-0.5, abs=0.05)  # independent noise
    run = lens.run(**bench.inputs, seed=bench.seeds, record=dl.at(block=1, step=0, branch="cond"), until=0, decode=False)
    streams = by_seed(run.activation(block=1, step=0)).numpy()
    by_hand = (np.linalg.norm(streams.mean(1), axis=-1) / np.linalg.norm(streams, axis=-1).mean(1)).mean(axis=(1, 2, 3))
    found = table[(table["what"] == HIDDEN) & (table["block"] == 1)]["value"]
    assert found.to_numpy() == pytest.approx(by_hand, rel=1e-4)
    assert set(table["what"]) == {HIDDEN, VELOCITY, X0_HAT, LATENTS}


def test_what_this_model_lacks_is_not_merged(bench: Bench) -> None:
    assert bench.blocks(EVERY) == [0, 1, 2]
    assert not bench.possible(Merge(HIDDEN, TO_ALL, LAST))  # of three blocks, none lies in the last quarter
    assert bench.possible(Merge(HIDDEN, TO_ALL, MIDDLE))
    paper = SimpleNamespace(
        inputs={}, lens=SimpleNamespace(extent=lambda: SimpleNamespace(blocks={"a": 40}, forecast=SimpleNamespace(experts=["a"])))
    )
    assert Bench.blocks(paper, MIDDLE) == list(range(20, 30))  # pyright: ignore[reportArgumentType]


def test_votes_and_oracles() -> None:
    def scores(*answers: Any) -> list[Score]:
        return [Score(answer == "right", answer, 0 if answer == "right" else None) for answer in answers]

    assert voted(scores("a", "right", "right")).right
    assert not voted(scores("a", "right", "a")).right
    assert voted(scores("right", "a", "b")).right  # among equals the first
    assert voted(scores(None, None, "right")).right  # no answer has no vote
    assert voted(scores(None, None)).answer is None
    assert best(scores("a", "b", "right")).right
    assert not best(scores("a", "b", None)).right
    assert ensemble_figures.agreement(pd.Series(["a", "a", "b"])) == pytest.approx(1 / 3)
    assert ensemble_figures.agreement(pd.Series(["a", "a"])) == 1


def planted(gains: dict[tuple[str, str], float], samples: int = 120) -> pd.DataFrame:
    """Results in which each way to merge (what, window) makes this share of the videos right that would be wrong."""
    random = np.random.default_rng(2)
    rows = []
    ways = [*((HIDDEN, window) for window in (FIRST, MIDDLE, LAST, EVERY)), (VELOCITY, ""), (X0_HAT, "")]
    for to in (TO_ALL, TO_ONE):
        for what, window in ways:
            drawn = (random.random(samples) < abs(gains.get((what, window), 0.0))) * np.sign(gains.get((what, window), 0.0))
            way = {"measure": RIGHT, "what": what, "window": window, "to": to, "branch": "both", "k": 3}
            rows += [{**way, "cluster": f"maze/{i}", "case": f"few/{i}", "gain": gain} for i, gain in enumerate(drawn)]
    noise = {"measure": LENGTH, "what": HIDDEN, "window": MIDDLE, "to": TO_ALL, "branch": "both", "k": 3, "gain": 9.0}
    return pd.DataFrame([*rows, {**noise, "cluster": "maze/0"}])


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ({(HIDDEN, MIDDLE): 0.2}, "supported"),
        ({(HIDDEN, MIDDLE): -0.2}, "refuted"),
        ({(HIDDEN, MIDDLE): 0.2, (VELOCITY, ""): 0.6}, "refuted"),  # merging outputs does better
        ({(HIDDEN, MIDDLE): 0.2, (HIDDEN, EVERY): 0.2}, "inconclusive"),  # and so does any window
        ({}, "inconclusive"),
    ],
)
def test_claims_follow_from_the_gains(gains: dict[tuple[str, str], float], word: str) -> None:
    assert [judged(claim, planted(gains)).verdict for claim in ensemble.CLAIMS] == [word, word]


def test_setups_of_a_sample_weigh_the_same_however_many_videos_they_have() -> None:
    way = {"measure": RIGHT, "what": HIDDEN, "window": MIDDLE, "to": TO_ALL, "branch": "both", "k": 3}
    few = [{**way, "cluster": f"maze/{i}", "case": f"few/{i}", "gain": 1.0} for i in range(2) for _ in range(6)]
    own = [{**way, "cluster": f"maze/{i}", "case": f"own/{i}", "gain": 0.0} for i in range(2)]
    assert gain(TO_ALL, HIDDEN, MIDDLE)(pd.DataFrame([*few, *own])).estimate == 0.5


def test_an_ensemble_needs_two_seeds() -> None:
    for settings in (ensemble.Settings(seeds=1), ensemble.Settings(counts=(1,))):
        with pytest.raises(InputError, match="two seeds or more"):
            ensemble.run(SimpleNamespace(settings=settings))  # pyright: ignore[reportArgumentType]


def test_runs_with_two_experts_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lens = dl.wrap(tiny_pipeline(experts=2), engine="hooks")
    settings = ensemble.Settings(tasks=("maze",), few=("circle",), few_steps=2, counts=(2,), sets=2, further=True, batch=6)
    how: Any = {"preset": "quick", "settings": settings, "arguments": {**SHORT, "height": 32, "width": 32}}
    manifest = run_experiment(ensemble.EXPERIMENT, lens, tmp_path, **how)
    results = pd.read_parquet(tmp_path / "ensemble" / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "sample", "seed", "task"} <= set(results.columns)
    assert {claim["verdict"] for claim in manifest["claims"]} == {"not tested"}
    shown = {figure["file"] for figure in manifest["figures"]}
    assert shown == {"gains.png", "seeds.png", "lengths.png", "pictures-circle.png"}
    longer = results[results["what"] == "K times the steps"]
    assert (longer["calls"] == 2 * 2 * 3).all()
    right = results[results["measure"] == RIGHT]
    assert right.groupby(["task", "k", "set"])["seed"].nunique().to_dict() == {
        ("circle", 2, 0): 4, ("circle", 3, 0): 6, ("circle", 3, 1): 6, ("maze", 3, 0): 6}  # fmt: skip
    table = next(table for table in manifest["tables"] if table["title"] == "The claims' numbers by the number of steps")
    assert table["columns"] == ["claim", "number", "2 steps"]  # here both setups have two
    assert len(table["data"]) == 2 * (6 + 3)
    again = run_experiment(ensemble.EXPERIMENT, lens, tmp_path, **how)
    assert again["units"] == {"units": 4, "reused": 4}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "ensemble" / "results.parquet"), results)
