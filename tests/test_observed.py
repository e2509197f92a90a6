"""Samples are observed once into a store, and found again with what the model drew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens import reasoner
from probes.maps import PROBE, drawn_by, observe, read_map
from probes.targets import Target

STEPS: dict[str, Any] = {"num_inference_steps": 3}
RECORD = dl.at(step=[0, 2], block=[0, 2], branch="cond")


@pytest.fixture(scope="module")
def lens() -> dl.Lens:
    """A tiny pipeline with random weights, which sees the boards and knows nothing."""
    return dl.wrap(tiny_pipeline(), engine="hooks")


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return [reasoner.task("maze").sample("test", index) for index in range(10)]


@pytest.fixture(scope="module")
def store(lens: dl.Lens, samples: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dl.Store:
    """Activations of two blocks at two steps, observed in two goes."""
    found = dl.Store(tmp_path_factory.mktemp("store"))
    observe(lens, found, samples[:6], RECORD, batch=4, progress=False, **STEPS)
    observe(lens, found, samples, RECORD, batch=4, progress=False, **STEPS)
    return found


def channel(store: dl.Store, frame: int) -> Target:
    """The first channel of the stored streams themselves, as a number to be read."""
    features, rows = store.stack(block=0, step=0, task="maze")
    seen = {int(number): features[i, frame, :, :, 0].float().numpy() for i, number in enumerate(rows["sample"])}
    return Target(
        f"channel {frame}",
        "perceptual",
        "number",
        ("maze",),
        "itself",
        lambda sample, drawn: seen[sample.index],
        None if frame == 2 else frame,
    )


def test_what_is_stored_is_not_run_again(store: dl.Store) -> None:
    assert len(store) == 2 + 1  # six samples in fours, then the other four
    assert sorted(store.rows["sample"]) == list(range(10))
    assert store.rows["seed"].tolist() == store.rows["sample"].tolist()


def test_the_tokens_are_those_of_their_samples_and_frames(store: dl.Store, samples: list[Any], lens: dl.Lens) -> None:
    """A label read off the stored activations themselves is read without a fault; of other samples' it would not be."""
    run = lens.run(**samples[3].inputs | STEPS, seed=3, record=dl.at(step=0, block=2, branch="cond"))
    stack, rows = store.stack(block=2, step=0, task="maze", sample=[3])
    assert rows["sample"].tolist() == [3]
    assert np.allclose(stack[0].float(), run.activation(block=2, step=0)[0].half().float(), atol=2e-3)
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    table = read_map(store, shuffled, [channel(store, 2), channel(store, 4)], progress=False)
    here = table[(table["reader"] == PROBE) & (table["block"] == 0) & (table["step"] == 0)]
    assert (here["estimate"] > 0.999).all()
    assert (here["shuffled"] < 0.9).all()


def test_frames_that_were_kept_are_those_that_were_named(
    store: dl.Store, samples: list[Any], lens: dl.Lens, tmp_path: Any
) -> None:
    few = dl.Store(tmp_path)
    observe(lens, few, samples, RECORD, frames=[-1, None], batch=10, progress=False, **STEPS)
    assert few.index["shape"].iloc[0][1] == 2
    asked = [channel(store, 2), channel(store, -1)]
    whole, part = (read_map(each, samples, asked, progress=False, baselines=False) for each in (store, few))
    assert np.allclose(whole["estimate"], part["estimate"], atol=1e-3)
    with pytest.raises(dl.InputError, match="reads the latent frame 0, and the store kept -1, middle: write frames="):
        read_map(few, samples, [channel(store, 0)], progress=False)


def test_runs_without_a_video_are_asked_for_what_others_drew(
    store: dl.Store, samples: list[Any], lens: dl.Lens, tmp_path: Any
) -> None:
    blind = dl.Store(tmp_path)
    observe(lens, blind, samples, dl.at(step=0, block=0, branch="cond"), progress=False, decode=False, until=0, **STEPS)
    with pytest.raises(dl.InputError, match="the run of sample 0 has no video to ask about: write drawn=, or decode it"):
        read_map(blind, samples, progress=False)
    drawn = drawn_by(store, samples)
    assert len(drawn) == 10
    assert drawn[0].board.shape == (16, 16)
    table = read_map(blind, samples, drawn=drawn, baselines=False, progress=False)
    assert set(table["step"]) == {0}
    assert table.loc[table["target"] == "colour", "estimate"].notna().all()
    with pytest.raises(dl.InputError, match="drawn= has 3 entries, and there are 10 samples: write one for each"):
        read_map(blind, samples, drawn=drawn[:3], progress=False)


def test_different_frames_are_not_mixed(store: dl.Store, lens: dl.Lens, samples: list[Any], tmp_path: Any) -> None:
    mixed, record = dl.Store(tmp_path), dl.at(step=0, block=0, branch="cond")
    short: dict[str, Any] = {"decode": False, "until": 0, "progress": False, **STEPS}
    observe(lens, mixed, samples[:5], record, frames=[-1], **short)
    observe(lens, mixed, samples, record, frames=[None], **short)
    with pytest.raises(dl.InputError, match=r"observed with different frames, \['-1', 'middle'\]: observe them with the same"):
        read_map(mixed, samples, drawn=drawn_by(store, samples), progress=False)
