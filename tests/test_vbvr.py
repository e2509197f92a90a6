"""The VBVR-Bench layout: what is written is read back, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.reasoner import board, vbvr
from dit_lens.reasoner.tasks import Sample


def some() -> list[Sample]:
    """One sample of every task, with clips of two lengths."""
    return [reasoner.task(name).sample("test", 2, 9 if at % 2 else 17) for at, name in enumerate(reasoner.tasks())]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    samples = some()
    folders = vbvr.write(samples, tmp_path / "new" / "bench")
    assert [folder.name for folder in folders] == [f"{name}_test_00002" for name in reasoner.tasks()]
    assert {path.name for folder in folders for path in folder.iterdir()} == set(vbvr.FILES)
    cases = {case.name: case for case in vbvr.read(tmp_path / "new")}
    assert sorted(cases) == list(cases)
    for folder, sample in zip(folders, samples, strict=True):
        case = cases[folder.name]
        assert case.prompt == sample.prompt
        assert np.array_equal(np.asarray(case.first_frame), board.paint(sample.boards[0]))
        assert np.array_equal(np.asarray(case.final_frame), board.paint(sample.boards[-1]))
        assert case.inputs == {
            "prompt": sample.prompt,
            "image": case.first_frame,
            "height": 64,
            "width": 64,
            "num_frames": sample.frames,
        }
        video = case.video()
        assert video.shape == (sample.frames, 64, 64, 3)
        score = sample.task.score(video / 255, sample)
        assert (score.right, score.which) == (True, sample.shown), "compression keeps every square's colour"


def test_a_folder_of_another_size_is_read(tmp_path: Path) -> None:
    (folder,) = vbvr.write(some()[1:2], tmp_path)
    for name in ("first_frame.png", "final_frame.png"):
        Image.new("L", (96, 48), 7).save(folder / name)
    (folder / "prompt.txt").write_text("  Wohin läuft er?\n\n", encoding="utf-8")
    (case,) = vbvr.read(tmp_path)
    assert (case.inputs["width"], case.inputs["height"], case.inputs["num_frames"]) == (96, 48, 9)
    assert case.first_frame.mode == "RGB"
    assert case.prompt == "Wohin läuft er?"


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    first = {path: path.read_bytes() for folder in vbvr.write(some()[:2], tmp_path) for path in folder.iterdir()}
    second = {path: path.read_bytes() for folder in vbvr.write(some()[:2], tmp_path) for path in folder.iterdir()}
    assert first == second


def test_a_folder_that_holds_no_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dl.InputError, match=r"nowhere is no folder; name one"):
        vbvr.read(tmp_path / "nowhere")
    with pytest.raises(dl.InputError, match=r"holds no samples; each is a folder with first_frame.png, "):
        vbvr.read(tmp_path)


@pytest.mark.parametrize("name", vbvr.FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (folder,) = vbvr.write(some()[2:3], tmp_path)
    (folder / name).unlink()
    with pytest.raises(dl.InputError, match=f"circle_test_00002 lacks {name}; each needs"):
        vbvr.read(tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, damage: str) -> None:
    (folder,) = vbvr.write(some()[2:3], tmp_path)
    picture = folder / "final_frame.png"
    content = picture.read_bytes()
    picture.write_bytes({"text": b"no picture", "cut": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(dl.InputError, match=r"final_frame.png is no picture; write a PNG there"):
        vbvr.read(tmp_path)


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    (folder,) = vbvr.write(some()[2:3], tmp_path)
    (folder / "ground_truth.mp4").write_bytes(b"no video")
    (case,) = vbvr.read(tmp_path)
    with pytest.raises(dl.InputError, match=r"ground_truth.mp4 is no video"):
        _ = case.inputs


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(dl.InputError, match=r"cannot write samples into .*file"):
        vbvr.write(some()[:1], tmp_path / "file")
