"""Runs with noise: outcomes that are known, distances that must vanish, and work that is done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.experiment import Context
from dit_lens.reasoner import board
from experiments import noised
from experiments.arms import ALL, BUT_LAST, Arm

SMALL = {"num_inference_steps": 4, "height": 16, "width": 16}
SETTINGS = noised.Settings(tasks=("maze", "tictactoe"), samples=2, batch=3, places=(0, 0.7), later=(0, 0.4, 1), depths=(0, 1))


def painted(sample: Any, which: int, *marks: tuple[int, int, int]) -> torch.Tensor:
    """The true video of a legal answer, with squares in other colours from some frame on."""
    boards = sample.task.draw(sample.puzzle, sample.answers[which], sample.frames).copy()
    for frame, row, column in marks:
        boards[frame:, row, column] = (boards[frame:, row, column] + 1) % 9
    return torch.from_numpy(board.paint(boards).astype(np.float32) / 255)


def test_outcomes_of_painted_videos() -> None:
    sample = reasoner.task("maze-loops").sample("test", 0)
    spots = [tuple(spot) for spot in np.argwhere(sample.untouched)[:10].tolist()]
    videos = [
        painted(sample, 0),
        painted(sample, 1),
        painted(sample, 0, *((12, *spot) for spot in spots)),
        torch.zeros(17, 64, 64, 3),
    ]
    found = noised.outcomes(torch.stack(videos), [sample] * 4)
    assert found["right"].tolist() == [True, True, False, False]
    assert found["legal"].tolist() == [True, True, True, False]
    assert found["which"].tolist()[:3] == [0, 1, 0]
    assert found["answer"].tolist()[3] == ""
    squares = sample.untouched.sum()
    assert found["damage"][:3].tolist() == pytest.approx([0, 0, 10 / squares * 5 / 17])
    assert found["damage_last"][2] == pytest.approx(10 / squares)
    clean = found.iloc[[0] * 4].reset_index(drop=True)
    beside = noised.compared(found, clean)
    assert beside["same"].tolist() == [1, 0, 1, 0]
    assert beside["changed"].tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(beside["rerouted"], [0, 1, np.nan, np.nan])
    nothing = noised.compared(found, found.iloc[[3] * 4].reset_index(drop=True))
    assert nothing["same"].isna().all()


def test_distances_of_what_is_equal_scaled_and_unrelated() -> None:
    one = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(1))
    assert noised.apart(one, one).abs().max() < 1e-6
    scaled = noised.apart(3 * one, one)
    assert scaled[:, 0].abs().max() < 1e-6
    assert scaled[:, 1].numpy() == pytest.approx(2)
    assert (noised.apart(other, one)[:, 0] > 0.95).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> noised.NoisedRuns:
    return made(tmp_path_factory.mktemp("out"))


def made(out: Path, name: str = "planted") -> noised.NoisedRuns:
    lens = dl.wrap(tiny_pipeline(experts=2), engine="hooks")
    return noised.NoisedRuns(Context(lens, SETTINGS, out / name, name, "mark", SMALL))


def test_samples_are_cut_into_groups_of_a_call(runs: noised.NoisedRuns) -> None:
    assert [[(s.task.name, s.index) for s in group] for group in runs.groups] == [
        [("maze", 0), ("tictactoe", 0), ("maze", 1)],
        [("tictactoe", 1)],
    ]


def test_unedited_runs_and_their_nulls(runs: noised.NoisedRuns) -> None:
    parts = runs.unedited()
    assert [len(part.table) for part in parts] == [6, 2]
    for part in parts:
        assert part.arrays["again"].shape == (3, 3, len(part.table) // 2, 2)
        assert np.abs(part.arrays["again"][:, 0]).max() < 1e-4, "the same seed again is the same run"
        assert np.isnan(part.arrays["again"][:, 1:]).all()
        assert (part.arrays["other seed"] > 1e-3).all(), "another seed is another run, in x0-hat and in the streams"
    assert parts[0].table["latent_frames"].dropna().tolist() == [5] * 3


def test_noise_at_a_step_is_seen_from_there_on(runs: noised.NoisedRuns) -> None:
    parts = list(runs.at_steps())
    assert {(arm.how, arm.steps) for arm, _ in parts} == {(how, (s,)) for how in ("replaced", "sigma-matched") for s in (0, 2)}
    for arm, part in parts:
        distances = part.arrays["distances"]
        for later, there in zip(runs.later, distances, strict=True):
            assert np.isnan(there).all() if later < arm.steps[0] else (there > 1e-4).all()
    replaced, matched = (
        next(part for arm, part in parts if arm.how == how and arm.steps == (0,)) for how in ("replaced", "sigma-matched")
    )
    np.testing.assert_array_equal(replaced.arrays["distances"], matched.arrays["distances"])
    assert set(matched.table["how"]) == {"sigma-matched"}


def test_runs_are_those_of_the_lens(runs: noised.NoisedRuns) -> None:
    """With noise at all steps, and without the last: against the lens alone, which starts from the first step."""
    arm = Arm("frame", "replaced", tuple(range(4)), 1 / 5)
    ((_, part), *_) = runs.run([arm], "arms")
    assert part.table["when"].tolist() == [ALL] * 3 + [BUT_LAST] * 3
    assert part.table["destroyed"].to_numpy() == pytest.approx(0.2, abs=0.06)
    group = runs.groups[0]
    for film, steps in zip(part.arrays["film"], (4, 3), strict=True):
        edits = Arm("frame", "replaced", tuple(range(steps)), 1 / 5).edits(group, 5)
        direct = runs.context.lens.run(**runs.context.inputs(group), seed=0, edits=edits)
        outcome = noised.outcomes(direct.video, group)
        rows = part.table[part.table["when"] == (ALL if steps == 4 else BUT_LAST)]
        assert rows["damage"].to_numpy() == pytest.approx(outcome["damage"].to_numpy(), abs=0.01)
        whole = noised.metrics.resized(direct.video, 64, 64)[0].numpy() * 255
        assert np.abs(film - whole).mean() < 1


def test_nothing_is_done_twice(runs: noised.NoisedRuns) -> None:
    before = [part.table for _, part in runs.at_steps()]
    again = made(runs.context.folder.parent, "another")
    again.reference = lambda group: pytest.fail("nothing is to be run")
    after = [part.table for _, part in again.at_steps()]
    assert again.context.counts["units"] == again.context.counts["reused"] > 0
    assert runs.context.seconds > again.context.seconds == 0, "shared units are the time of the experiment that made them"
    for one, other in zip(before, after, strict=True):
        assert one.equals(other)
