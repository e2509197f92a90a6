"""A folder in VBVR-Bench layout is a task: its true videos are right, others are not, and experiments take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_lens import reasoner
from dit_lens.errors import InputError
from dit_lens.reasoner import cases, vbvr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("cases") / "mazes"
    vbvr.write([reasoner.task("maze").sample("test", number) for number in range(3)], where)
    return where


@pytest.fixture(scope="module")
def sample(folder: Path) -> Any:
    return reasoner.task(str(folder)).sample(index=0)


def still(sample: Any) -> np.ndarray:
    return np.repeat(sample.video()[:1], len(sample.video()), axis=0)


def test_a_folder_is_a_task_with_a_sample_for_each_case(folder: Path) -> None:
    task = reasoner.task(str(folder))
    own = [reasoner.task("maze").sample("test", number) for number in range(3)]
    found = [task.sample("test", number) for number in range(3)]
    assert task.name == "mazes"
    assert [one.prompt for one in found] == [one.prompt for one in own]
    assert len({one.group for one in found}) == 3
    assert np.array_equal(found[0].boards[[0, -1]], own[0].boards[[0, -1]])


def test_the_true_video_is_right_and_a_still_one_is_not(sample: Any) -> None:
    (right,), (wrong,) = (sample.task.scores(video[None], [sample]) for video in (sample.video(), still(sample)))
    assert right.right
    assert not wrong.right
    assert wrong.answer is None
    assert sample.task.evidence(still(sample)[None], [sample])[0] == pytest.approx([0], abs=0.02)  # the MP4 is compressed


def test_halfway_there_counts_half(sample: Any) -> None:
    halfway = (sample.video() + still(sample)) / 2
    assert sample.task.evidence(halfway[None], [sample])[0] == pytest.approx([0.5], abs=0.02)


def test_what_must_stay_must_stay(sample: Any) -> None:
    broken = np.where(cases_mask(sample), sample.video(), 1 - sample.video())
    (score,) = sample.task.scores(broken[None], [sample])
    assert not score.right
    assert "must stay" in score.reason


def cases_mask(sample: Any) -> np.ndarray:
    return sample.masks["answer"].repeat(4, axis=0).repeat(4, axis=1)[None, :, :, None]


def test_pictures_of_any_size_are_looked_at_as_boards(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, size=(16, 16, 3), dtype=np.uint8)
    large = Image.fromarray(colours.repeat(12, axis=0).repeat(20, axis=1))
    assert np.allclose(cases.scaled(large)[::4, ::4], colours / 255, atol=0.15)
    assert cases.scaled(Image.fromarray(colours)).shape == (64, 64, 3)


def test_the_model_is_given_the_case_itself(sample: Any) -> None:
    inputs = reasoner.inputs([sample])
    assert inputs["image"] == [sample.case.first_frame]
    assert (inputs["height"], inputs["width"], inputs["num_frames"]) == (64, 64, 17)


def test_one_answer_is_known_and_no_wrong_one(folder: Path, sample: Any) -> None:
    task, shown = sample.task, sample.video()[None]
    assert task.decoy(sample) is None
    assert task.evidence(shown, [sample], [(cases.TRUE,)])[0] == pytest.approx(task.evidence(shown, [sample])[0])
    with pytest.raises(InputError, match="only the true video of a sample of the folder mazes is known"):
        task.evidence(shown, [sample], [("another",)])
    assert len(task.first(2, several=False)) == 2
    assert task.first(2, several=True) == []
    with pytest.raises(InputError, match="has 3 samples with one answer where 4 are asked for"):
        task.first(4, several=False)


def test_samples_are_as_long_and_large_as_their_videos(tmp_path: Path) -> None:
    vbvr.write([reasoner.task("maze").sample("test", number, frames=9) for number in range(2)], tmp_path)
    one, other = (reasoner.task(str(tmp_path)).sample(index=number) for number in range(2))
    assert isinstance(other, cases.CaseSample)
    assert one.frames == len(one.boards) == one.inputs["num_frames"] == 9
    Image.new("RGB", (96, 48)).save(other.case.path / "first_frame.png")
    wide = reasoner.task(str(tmp_path)).sample(index=1)
    with pytest.raises(InputError, match="samples of one size, and these have 64 x 64, 96 x 48 pixels; write one folder"):
        reasoner.inputs([one, wide])


def test_a_folder_that_is_called_as_a_task_is_not_taken_for_it(tmp_path: Path) -> None:
    for where in ("maze", "a/mazes", "b/mazes"):
        vbvr.write([reasoner.task("maze").sample("test", 0)], tmp_path / where)
    assert reasoner.task(str(tmp_path / "maze")).name == "folder-maze"
    assert list(reasoner.named(["maze", str(tmp_path / "maze")])) == ["maze", "folder-maze"]
    with pytest.raises(InputError, match="two tasks are named 'mazes'; leave one out, or rename its folder"):
        reasoner.named([str(tmp_path / "a/mazes"), str(tmp_path / "b/mazes")])


def test_says_how_many_there_are(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds 3 samples, and test sample 3 is asked for.*--samples 3"):
        reasoner.task(str(folder)).sample("test", 3)
    with pytest.raises(InputError, match="has no pairs: of its samples only the true videos are known"):
        reasoner.pairs(str(folder), 1)
    with pytest.raises(InputError, match="or write a folder in VBVR-Bench layout"):
        reasoner.task("mazy")
