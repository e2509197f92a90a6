"""The pipeline's folder: in shards, hashed, under its limit, and the same model when it is opened again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dit_lens as dl
from dit_lens import loading, reasoner
from dit_lens.reasoner import folders, models
from dit_lens.reasoner.settings import CALL


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline, written over an older one."""
    where = tmp_path_factory.mktemp("weights") / "model"
    (where / "transformer").mkdir(parents=True)
    (where / "transformer" / "old.safetensors").write_bytes(b"left over")
    models.save_pipeline(models.untrained(), where, {"seed": 0})
    return where


@pytest.fixture(params=["saved", "bundled"])
def folder(request: pytest.FixtureRequest, saved: Path) -> Path:
    """A folder just written, and the one in the package."""
    return saved if request.param == "saved" else reasoner.folder()


def test_it_is_small_enough(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 16e6
    assert folders.megabytes(folder) == pytest.approx(sum(path.stat().st_size for path in files) / 1e6)
    assert folders.megabytes(folder) < 24


def test_its_hashes_are_of_everything_that_is_loaded(folder: Path) -> None:
    hashes = json.loads((folder / folders.HASHES).read_text())
    loaded = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.parent != folder}
    assert set(hashes) == loaded | {"model_index.json"}
    for name, digest in hashes.items():
        assert loading.file_hash(folder / name) == digest, name
    loading.check_folder(folder)
    assert not (folder / "transformer" / "old.safetensors").exists()


def test_its_settings_lie_beside_it(folder: Path) -> None:
    assert json.loads((folder / "call.json").read_text()) == CALL
    assert json.loads((folder / "training.json").read_text())


def test_a_damaged_shard_is_named(saved: Path) -> None:
    shard = next((saved / "transformer").glob("*.safetensors"))
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(dl.InputError, match=f"{shard.name} is damaged"):
            loading.check_folder(saved)
    finally:
        shard.write_bytes(content)


def test_what_was_written_is_opened(saved: Path) -> None:
    original, opened = models.untrained(), models.open_pipeline(saved)
    for part in ("transformer", "text_encoder", "vae"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (original, opened))
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert after[name].dtype == torch.float32
            # Diffusers keeps a few parts of a denoiser in float32 on its own account.
            assert torch.equal(after[name], tensor) or torch.equal(after[name], tensor.bfloat16().float()), name
    assert opened.scheduler.config.shift == original.scheduler.config.shift
    assert opened.tokenizer("Circle the red triangle").input_ids == original.tokenizer("Circle the red triangle").input_ids
