"""Maps of targets: streamed from a store, resumed, beside their baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens import reasoner
from probes.maps import LATENTS, PLACE, PROBE, observe, read_map
from probes.targets import Target

STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def lens() -> dl.Lens:
    """A tiny pipeline with random weights, which sees the boards and knows nothing."""
    return dl.wrap(tiny_pipeline(), engine="hooks")


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return [reasoner.task("maze").sample("test", index) for index in range(14)]


@pytest.fixture(scope="module")
def store(lens: dl.Lens, samples: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dl.Store:
    """Activations of two blocks at two steps, observed in two goes."""
    found = dl.Store(tmp_path_factory.mktemp("store"))
    record = dl.at(step=[0, 2], block=[0, 2], branch="cond")
    observe(lens, found, samples[:6], record, batch=4, progress=False, **STEPS)
    observe(lens, found, samples, record, batch=4, progress=False, **STEPS)
    return found


def test_what_is_stored_is_not_run_again(store: dl.Store, samples: list[Any]) -> None:
    assert len(store) == 2 + 2  # six samples in fours, then the other eight
    assert sorted(store.rows["sample"]) == list(range(14))
    assert store.rows["seed"].tolist() == store.rows["sample"].tolist()


def test_every_target_is_read_at_every_cell_with_controls_and_baselines(store: dl.Store, samples: list[Any]) -> None:
    inside = np.zeros((8, 8))
    inside[:, :4] = 1
    mine = Target("left half", "perceptual", "binary", ("maze",), "by its column", lambda sample, drawn: inside)
    wall = Target("wall", "perceptual", "binary", ("maze",), "any", lambda sample, drawn: 1.0 * (sample.boards[0][::2, ::2] == 2))
    table = read_map(store, samples, [mine, wall], progress=False)
    probes = table[table["reader"] == PROBE]
    assert len(probes) == 2 * 2 * 2
    assert set(zip(probes["step"], probes["block"], strict=True)) == {(0, 0), (0, 2), (2, 0), (2, 2)}
    assert probes["sigma"].is_monotonic_decreasing
    for reader in (PLACE, LATENTS):
        assert len(table[table["reader"] == reader]) == 2 * 2
        assert table.loc[table["reader"] == reader, "block"].isna().all()
    known = table[(table["reader"] == PLACE) & (table["target"] == "left half")]
    assert (known["estimate"] == 1).all()
    assert table[["estimate", "low", "high", "control", "shuffled", "selectivity"]].notna().all().all()


def test_the_tokens_are_those_of_their_samples(store: dl.Store, samples: list[Any], lens: dl.Lens) -> None:
    """A label read off the stored activations themselves is read without a fault; of other samples' it would not be."""
    run = lens.run(**samples[3].inputs | STEPS, seed=3, record=dl.at(step=0, block=2, branch="cond"))
    stack, rows = store.stack(block=2, step=0, task="maze", sample=[3])
    assert rows["sample"].tolist() == [3]
    assert np.allclose(stack[0].float(), run.activation(block=2, step=0)[0].half().float(), atol=2e-3)
    features, rows = store.stack(block=0, step=0, task="maze")
    channel = {int(number): features[i, -1, :, :, 0].float().numpy() for i, number in enumerate(rows["sample"])}
    seen = Target(
        "channel", "perceptual", "number", ("maze",), "itself", lambda sample, drawn: channel[sample.index].astype(float)
    )
    table = read_map(store, samples, [seen], progress=False)
    here = table[(table["reader"] == PROBE) & (table["block"] == 0) & (table["step"] == 0)]
    assert here["estimate"].item() > 0.999
    assert here["shuffled"].item() < 0.9


def test_what_does_not_fit_is_said(store: dl.Store, samples: list[Any], tmp_path: Path, lens: dl.Lens) -> None:
    more = reasoner.task("maze").sample("test", 99)
    with pytest.raises(dl.InputError, match="the store lacks 1 of 15 samples of maze, as 99"):
        read_map(store, [*samples, more], progress=False)
    with pytest.raises(dl.InputError, match="samples of one task, and these are of"):
        read_map(store, [samples[0], reasoner.task("circle").sample("test", 0)], progress=False)
