"""A run after the fact: its trajectory, its lookups, and its way to disk and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments

import dit_lens as dl


@pytest.fixture
def run(text_pipe: Any) -> dl.Run:
    """Two experts, two seeds, two records."""
    record = [dl.at(block=[0, 2], step=[0, 3]), dl.Record(dl.at(site="update"), dl.norm)]
    return dl.wrap(text_pipe, engine="hooks").run(**arguments(text_pipe), seed=[5, 6], record=record)


def test_shapes(run: dl.Run) -> None:
    assert run.batch == 2
    assert run.steps == 4
    assert run.seeds == (5, 6)
    assert run.prompts == ("walk the maze", "walk the maze")
    assert run.layout == dl.Layout(2, 2, 2)
    assert run.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert run.experts == ("transformer", "transformer", "transformer_2", "transformer_2")
    assert run.branches == ("cond", "uncond")
    assert run.sigmas.dtype == torch.float32
    assert run.latents.shape == (5, 2, 4, 2, 4, 4)
    assert run.video is not None
    assert run.video.shape == (2, 5, 16, 16, 3)
    assert 0 <= run.video.min() <= run.video.max() <= 1


def test_x0_hat_moves_the_sample_along_the_velocity_to_sigma_zero(run: dl.Run) -> None:
    for branch in ("guided", "cond", "uncond"):
        for step in range(run.steps):
            expected = run.latents[step] - run.sigmas[step] * run.velocity(step, branch)
            assert torch.allclose(run.x0_hat(step=step, branch=branch), expected, atol=1e-6)
    assert torch.equal(run.x0_hat(-1), run.x0_hat(3))


def test_what_a_run_does_not_have_is_an_error(run: dl.Run) -> None:
    with pytest.raises(dl.InputError, match="step 4 is out of range: there are 4 steps, write 0 to 3"):
        run.x0_hat(4)
    with pytest.raises(dl.InputError, match="no branch 'skip'; write one of guided, cond, uncond"):
        run.velocity(0, "skip")


def test_there_and_back(run: dl.Run, tmp_path: Path) -> None:
    run.save(tmp_path / "deep" / "run")
    loaded = dl.Run.load(tmp_path / "deep" / "run")
    for name in ("seeds", "prompts", "layout", "scheduler", "timesteps", "experts", "branches", "weights"):
        assert getattr(loaded, name) == getattr(run, name), name
    assert torch.equal(loaded.sigmas, run.sigmas)
    assert torch.equal(loaded.latents, run.latents)
    assert loaded.video is not None
    assert run.video is not None
    assert torch.equal(loaded.video, run.video)
    assert torch.equal(loaded.x0_hat(1, "uncond"), run.x0_hat(1, "uncond"))
    assert loaded.activations.to_pandas().equals(run.activations.to_pandas())
    assert loaded.activations.cells[0].sigma == run.activations.cells[0].sigma
    for ours, theirs in zip(run.activations, loaded.activations, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
    assert sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()) == ["run.json", "run.safetensors"]


def test_a_later_run_replaces_an_earlier_one(run: dl.Run, text_pipe: Any, tmp_path: Path) -> None:
    run.save(tmp_path)
    later = dl.wrap(text_pipe, engine="hooks").run(**arguments(text_pipe), seed=9, decode=False)
    later.save(tmp_path)
    loaded = dl.Run.load(tmp_path)
    assert loaded.seeds == (9,)
    assert loaded.video is None
    assert len(loaded.activations) == 0


def test_precision_survives(image_pipe: Any, tmp_path: Path) -> None:
    image_pipe.transformer.to(torch.bfloat16)
    run = dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe), record=dl.at(block=0, step=0))
    run.save(tmp_path)
    loaded = dl.Run.load(tmp_path)
    assert loaded.velocity(0, "cond").dtype == run.velocity(0, "cond").dtype == torch.bfloat16
    assert torch.equal(loaded.activation(block=0, step=0), run.activation(block=0, step=0))
    assert loaded.x0_hat(0, "cond").dtype == torch.float32


def test_a_folder_without_a_run_is_named(run: dl.Run, tmp_path: Path) -> None:
    with pytest.raises(dl.InputError, match=r"nowhere holds no run: there is no run\.json"):
        dl.Run.load(tmp_path / "nowhere")
    run.save(tmp_path)
    (tmp_path / "run.safetensors").write_bytes(b"rubbish")
    with pytest.raises(dl.InputError, match="cannot be read"):
        dl.Run.load(tmp_path)
    (tmp_path / "run.safetensors").unlink()
    with pytest.raises(dl.InputError, match=r"there is no run\.safetensors"):
        dl.Run.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(dl.InputError, match="cannot be read"):
        dl.Run.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    run_file = tmp_path / "run.safetensors"
    run.save(tmp_path / "other")
    (tmp_path / "other" / "run.safetensors").rename(run_file)
    with pytest.raises(dl.InputError, match="has format 99, and this version reads 1"):
        dl.Run.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_and_left_clean(
    run: dl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(dl.InputError, match=r"cannot write the run to .*file"):
        run.save(tmp_path / "file" / "run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(dl.InputError, match="No space left on device"):
        run.save(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
