"""Token energy: planted maps are read rightly, what fills maps without meaning is taken out, and claims are judged by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pipeline
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.claims import judged
from dit_lens.experiment import Context, run_experiment
from dit_lens.reasoner import board
from dit_lens.report import write_report
from experiments import token_energy
from experiments.energy import components, energies, localisation, regions

CELL = dl.Cell("transformer", 0, "cond", 1, sigma=1.0, timestep=1000.0, depth=0.5)


def measured(tmp_path: Path, samples: list[Any]) -> pd.DataFrame:
    """Equal energy at block 0; three times as much on tokens that are all wall at block 1."""
    settings = token_energy.Settings(tasks=("maze",), samples=len(samples))
    context = Context(None, settings, tmp_path, "planted", "planted", {})
    walls = np.stack([board.tokens(sample.masks["wall"]) for sample in samples])
    tables = []
    for block in (0, 1):
        energy = np.broadcast_to((1 + 2.0 * block * walls)[:, None, None], (len(samples), 3, 5, 8, 8)).astype(np.float32)
        cell = dl.Cell("transformer", 0, "cond", block, sigma=1.0, timestep=1000.0, depth=block / 2)
        tables.append(token_energy.rows(context, token_energy.TRAINED, cell, energy, samples, np.random.default_rng(0)))
    return pd.concat(tables, ignore_index=True)


def test_finds_a_planted_preference(tmp_path: Path) -> None:
    table = measured(tmp_path, [reasoner.task("maze").sample("test", number) for number in range(4)])
    means = table.groupby(["model", "look", "block", "region"])["preference"].mean().unstack("region")
    for look in (token_energy.PAPER, token_energy.CLEANED):
        trained: Any = means.loc[token_energy.TRAINED].loc[look]
        assert trained.loc[0].to_numpy() == pytest.approx(1, abs=1e-5)
        assert trained.loc[1, "wall"] > 1.2
        assert trained.loc[1, "background"] < 0.9
        shuffled: Any = means.loc[token_energy.SHUFFLED].loc[look]
        assert shuffled.loc[1, "wall"] == pytest.approx(1, abs=0.15)
    localised = table[table["model"] == token_energy.TRAINED].groupby(["block", "region"])["localisation"].mean()
    assert localised.loc[(0, "wall")] == pytest.approx(0.5)
    assert localised.loc[(1, "wall")] > 0.8


def test_localisation_is_the_area_under_the_roc_curve() -> None:
    random = np.random.default_rng(0)
    energy, inside = random.integers(0, 5, size=(3, 4, 5)).astype(float), random.random((4, 5)) * (random.random((4, 5)) > 0.5)
    truth = np.broadcast_to(inside > 0, energy.shape).ravel()
    assert localisation(energy, inside) == pytest.approx(roc_auc_score(truth, energy.ravel()))
    assert np.isnan(localisation(energy, np.ones((4, 5))))


def test_channels_that_dominate_are_named_and_taken_out() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 3, 4, 4, 20, generator=generator)
    stream[1, ..., 7] += 100
    maps = energies(stream, CELL)
    assert maps.shape == (2, 3, 3, 4, 4)
    assert maps[:, 2].unique().tolist() == [0, 1]
    torch.testing.assert_close(maps[0, 0], stream[0].norm(dim=-1))
    torch.testing.assert_close(maps[0, 1], maps[0, 0])
    torch.testing.assert_close(maps[1, 1], stream[1][..., [c for c in range(20) if c != 7]].norm(dim=-1))


def test_components_are_the_principal_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randn(2, 3, 4, 5, 6, generator=generator) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.3, 0.1])
    found = components(stream, CELL)[0].flatten(1).T.numpy()
    expected = PCA(3).fit_transform(stream[0].flatten(0, 2).numpy())
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-3)


def test_every_sample_has_a_foreground() -> None:
    for name in reasoner.tasks():
        sample = reasoner.task(name).sample("test", 1)
        assert regions(sample)["foreground"].any()
        assert not (regions(sample)["foreground"] & sample.masks["background"]).any()


def constructed(early: float, middle: float, untrained: float) -> pd.DataFrame:
    """Preferences of the foreground; the background has what is left of 2."""
    random = np.random.default_rng(0)
    rows = []
    for sample in range(120):
        for model, after in ((token_energy.TRAINED, middle), (token_energy.RANDOM, untrained)):
            for depth in np.arange(0, 1, 0.1):
                level = early if depth < 0.25 else after if depth < 0.75 else 1.0
                noise = random.normal(scale=0.05)
                where = {"task": "maze", "sample": sample, "model": model, "depth": depth, "look": token_energy.CLEANED}
                rows.append({**where, "region": "foreground", "preference": level + noise})
                rows.append({**where, "region": "background", "preference": 2 - level + noise})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ((0.7, 1.5, 0.7), "supported"),
        ((0.7, 1.5, 1.5), "inconclusive"),
        ((0.7, 1.5, 1.9), "refuted"),
        ((1.5, 0.7, 1.0), "refuted"),
    ],
)
def test_the_claim_is_judged_by_the_trend_and_the_control(levels: tuple[float, float, float], word: str) -> None:
    assert judged(token_energy.CLAIMS[0], constructed(*levels)).verdict == word


@pytest.mark.parametrize("experts", [1, 2])
def test_runs_end_to_end_on_a_tiny_pipeline(experts: int, tmp_path: Path) -> None:
    lens, arguments = dl.wrap(tiny_pipeline(experts=experts)), {"num_inference_steps": 3}
    settings = token_energy.Settings(tasks=("maze", "circle"), samples=2, places=(0, 1))
    experiment = token_energy.EXPERIMENT
    manifest = run_experiment(experiment, lens, tmp_path, preset="quick", settings=settings, arguments=arguments)
    assert [row["step"] for row in manifest["steps_measured"]] == [0, 2]
    assert manifest["claims"][0]["verdict"] == "not tested"
    assert experiment.title in write_report(tmp_path).read_text()
