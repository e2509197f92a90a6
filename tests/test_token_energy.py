"""Token energy: planted maps are read rightly, what fills maps without meaning is taken out, and claims are judged by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import dit_lens as dl
from dit_lens import metrics, reasoner
from dit_lens.claims import judged
from dit_lens.reasoner import board
from experiments import token_energy
from experiments.energy import (
    CHANNELS,
    CLEANED,
    FRAMES,
    LOOKS,
    PAPER,
    RANDOM,
    SHUFFLED,
    TRAINED,
    Energies,
    Regions,
    channel_squares,
    components,
    dominating,
    localisation,
    looks,
    preference,
    regions,
    sparsity,
)

CELL = dl.Cell("transformer", 0, "cond", 1, sigma=1.0, timestep=1000.0, depth=0.5)


def measured(samples: list[Any]) -> pd.DataFrame:
    """Equal energy at block 0; three times as much on tokens that are all wall at block 1."""
    walls = np.stack([board.tokens(sample.masks["wall"]) for sample in samples])
    tables = []
    for block in (0, 1):
        energy = np.broadcast_to((1 + 2.0 * block * walls)[:, None, None], (len(samples), 2, 5, 8, 8)).astype(np.float32)
        cell = dl.Cell("transformer", 0, "cond", block, sigma=1.0, timestep=1000.0, depth=block / 2)
        where = Regions.of(samples, (8, 8))
        tables.append(token_energy.rows(TRAINED, cell, energy, samples, where, np.random.default_rng(0)))
    return pd.concat(tables, ignore_index=True)


def test_finds_a_planted_preference() -> None:
    table = measured([reasoner.task("maze").sample("test", number) for number in range(4)])
    means = table.groupby(["model", "look", "block", "region"])["preference"].mean().unstack("region")
    for look in LOOKS:
        trained: Any = means.loc[TRAINED].loc[look]
        assert trained.loc[0].to_numpy() == pytest.approx(1, abs=1e-5)
        assert trained.loc[1, "wall"] > 1.2
        assert trained.loc[1, "background"] < 0.9
        shuffled: Any = means.loc[SHUFFLED].loc[look]
        assert shuffled.loc[1, "wall"] == pytest.approx(1, abs=0.15)
    localised = table[table["model"] == TRAINED].groupby(["block", "region"])["localisation"].mean()
    assert localised.loc[(0, "wall")] == pytest.approx(0.5)
    assert localised.loc[(1, "wall")] > 0.8


def test_numbers_of_all_maps_and_regions_at_once_are_those_of_each() -> None:
    random = np.random.default_rng(0)
    energy = random.integers(1, 6, size=(2, 3, 4, 5)).astype(np.float32)  # with ties
    inside = random.random((2, 4, 4, 5)) * (random.random((2, 4, 4, 5)) > 0.5)
    inside[0, 2], inside[1, 3] = 1, 0
    preferences, areas = preference(energy, inside), localisation(energy, inside)
    for sample, region in np.ndindex(2, 4):
        tokens, part = energy[sample], inside[sample, region]
        truth = np.broadcast_to(part > 0, tokens.shape).ravel()
        if truth.any():
            expected = metrics.region_share(tokens, part) / part.mean()
            assert preferences[sample, region] == pytest.approx(expected, rel=1e-6)
        if 0 < truth.sum() < truth.size:
            assert areas[sample, region] == pytest.approx(roc_auc_score(truth, tokens.ravel()))
    assert np.isnan(areas[0, 2])  # all tokens lie inside
    assert np.isnan(areas[1, 3])
    assert np.isnan(preferences[1, 3])
    assert np.isfinite(preferences).sum() == 7


def test_sparsity_is_the_share_of_the_tokens_with_most_energy() -> None:
    energy = np.ones((3, 2, 3, 5))  # 30 tokens: the twentieth is one token and a half
    energy[1, 0, 0, 0] = 71.0
    energy[2, 1, 2, :2] = [60.0, 12.0]
    assert sparsity(energy) == pytest.approx([0.05, 71.5 / 100, 66.0 / 100])


def test_looks_leave_out_channels_frames_or_both() -> None:
    maps = np.random.default_rng(0).random((2, 2, 3, 4, 4))
    seen = looks(maps)
    assert list(seen) == list(LOOKS)
    assert (seen[PAPER] == maps[:, 0]).all()
    assert (seen[CHANNELS] == maps[:, 1]).all()
    assert (seen[FRAMES] == maps[:, 0, 1:]).all()
    assert (seen[CLEANED] == maps[:, 1, 1:]).all()
    assert looks(maps[:, :, :1])[CLEANED].shape == (2, 1, 4, 4)


def test_channels_that_dominate_are_taken_out_of_all_maps_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 3, 4, 4, 20, generator=generator)
    # By itself the first row would keep channel 7 and the second one lose it; together they lose it.
    stream[0, ..., 7] *= 8
    stream[1, ..., 7] *= 30
    squares = channel_squares(stream, CELL)
    assert [dominating(row.numpy()).sum() for row in squares] == [0, 1]
    tables = [
        pd.DataFrame({"expert": "transformer", "step": 0, "block": 1, "channel": range(20), "square": row})
        for row in squares.numpy()
    ]
    found = token_energy.chosen(tables)
    assert np.flatnonzero(found["transformer", 1]).tolist() == [7]
    maps = Energies(found)(stream, CELL)
    assert maps.shape == (2, 2, 3, 4, 4)
    torch.testing.assert_close(maps[:, 0], stream.norm(dim=-1))
    torch.testing.assert_close(maps[:, 1], stream[..., [c for c in range(20) if c != 7]].norm(dim=-1))


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
        for model, after in ((TRAINED, middle), (RANDOM, untrained)):
            for depth in np.arange(0, 1, 0.1):
                level = early if depth < 0.25 else after if depth < 0.75 else 1.0
                noise = random.normal(scale=0.05)
                where = {"task": "maze", "sample": sample, "model": model, "depth": depth, "look": CLEANED}
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
