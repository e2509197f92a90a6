"""Loading: good folders load, and whatever is wrong with a bad one is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, shown, tiny_pipeline
from diffusers import WanPipeline

import dit_lens as dl
from dit_lens.loading import file_hash


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-expert pipeline on disk in bfloat16, with the hashes of its files."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe = tiny_pipeline(WanPipeline, experts=2)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    (folder / "hashes.json").write_text(json.dumps(hashes))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def test_a_folder_loads_in_the_precision_asked_for(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lens = dl.load(saved, engine="hooks", device="cpu")
    assert type(lens.pipe) is WanPipeline
    assert lens.pipe.transformer_2.blocks[0].ffn.net[2].weight.dtype == torch.float32
    run = lens.run(**arguments(lens.pipe), record=dl.at(block=0))
    assert torch.equal(shown(run), lens.plain(**arguments(lens.pipe), output_type="pt").frames.movedim(2, -1))
    half = dl.load(str(saved), engine="hooks", device="cpu", dtype=torch.bfloat16)
    assert half.pipe.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", ""), "loading shows nothing"


def test_the_hash_is_that_of_the_weights(saved: Path, folder: Path) -> None:
    first = dl.load(saved, engine="hooks", device="cpu")
    (folder / "hashes.json").unlink()
    second = dl.load(folder, engine="hooks", device="cpu")
    assert first.hash == second.hash
    assert len(first.hash) == 64
    wrapped, same = dl.wrap(first.pipe, engine="hooks"), dl.wrap(second.pipe, engine="hooks")
    assert wrapped.hash == same.hash != first.hash
    with torch.no_grad():
        second.pipe.transformer_2.blocks[1].scale_shift_table += 1
    assert dl.wrap(second.pipe, engine="hooks").hash != wrapped.hash


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_shard_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    shard = "transformer_2/diffusion_pytorch_model.safetensors"
    damage(folder / shard)
    with pytest.raises(dl.InputError, match=f"{shard} is (damaged|missing)") as error:
        dl.load(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_shard_is_named_without_hashes_too(folder: Path) -> None:
    (folder / "hashes.json").unlink()
    truncate(folder / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(dl.InputError, match=r"vae/diffusion_pytorch_model\.safetensors is damaged"):
        dl.load(folder)


def test_a_damaged_list_of_hashes_is_named(folder: Path) -> None:
    (folder / "hashes.json").write_text("{")
    with pytest.raises(dl.InputError, match=r"hashes\.json is damaged"):
        dl.load(folder)


def test_a_folder_that_lacks_a_part_is_one_line(folder: Path) -> None:
    (folder / "hashes.json").unlink()
    shutil.rmtree(folder / "vae")
    with pytest.raises(dl.InputError, match="tiny cannot be loaded: ") as error:
        dl.load(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(dl.InputError, match=r"is no diffusers pipeline: it has no model_index\.json"):
        dl.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(dl.InputError, match="is a file; write the folder of a pipeline"):
        dl.load(tmp_path / "file")
    with pytest.raises(dl.InputError, match=r"there is no folder .*nowhere; write the folder of a pipeline, a hub id"):
        dl.load(tmp_path / "nowhere")
    with pytest.raises(dl.InputError, match="there is no folder tiny"):
        dl.load("tiny")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your internet connection.")

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.DiffusionPipeline.from_pretrained", unreachable)
    with pytest.raises(
        dl.InputError, match=r"no folder owner/name, and it cannot be fetched from the hub: We couldn't connect to '.*'\.$"
    ):
        dl.load("owner/name")


def test_an_unknown_engine_is_named(image_pipe: Any) -> None:
    with pytest.raises(dl.InputError, match="no engine 'vllm'; write nnsight or hooks"):
        dl.wrap(image_pipe, engine="vllm")
