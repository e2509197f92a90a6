"""Damage: on drawn boards each kind of harm is seen by its own measure, and by no other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.reasoner import board
from dit_lens.reasoner.tasks import TASKS, Sample
from experiments import damage
from experiments.damage import MEASURES, PARTS, Expected, Scorer

COUNT = 12
every_task = pytest.mark.parametrize("name", list(TASKS))


@cache
def some(name: str) -> list[Sample]:
    return [TASKS[name].sample("test", index) for index in range(COUNT)]


def painted(boards: np.ndarray) -> Tensor:
    return torch.from_numpy(board.paint(boards).astype(np.float32) / 255)


def true_boards(samples: list[Sample]) -> np.ndarray:
    return np.stack([sample.boards for sample in samples])


def measured(samples: list[Sample], video: Tensor) -> dict[str, np.ndarray]:
    found = Scorer(samples)(video)
    assert set(found) == set(MEASURES)
    assert all(((values >= 0) & (values <= 1)).all() for values in found.values())
    return found


@every_task
def test_true_videos_are_perfect(name: str) -> None:
    found = measured(some(name), painted(true_boards(some(name))))
    for measure in MEASURES:
        assert found[measure] == pytest.approx(1, abs=1e-3), measure


@every_task
def test_a_wrong_answer_harms_reasoning_only(name: str) -> None:
    random, samples = np.random.default_rng(0), some(name)
    wrong = [sample.task.draw(sample.puzzle, sample.task.wrong(sample.puzzle, random), 17) for sample in samples]
    found = measured(samples, painted(np.stack(wrong)))
    assert found["reasoning"].mean() <= 0.1
    assert (found["marks"] < 1).mean() >= 0.5  # of permanence, the marks are read where the wrong place is not yet seen
    assert found["perception"].min() >= 0.98
    assert found["picture"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["maze", "maze-loops"])
def test_the_route_of_another_maze_harms_reasoning_only(name: str) -> None:
    samples = some(name)
    foreign = true_boards(samples)
    for video, sample, other in zip(foreign, samples, [*samples[1:], samples[0]], strict=True):
        video[:] = np.where(sample.masks["agent"], board.Colour.WHITE, sample.boards[0])
        route = np.isin(other.boards, (board.Colour.BLUE, board.Colour.GREEN))
        video[1:][route[1:]] = other.boards[1:][route[1:]]
    found = measured(samples, painted(foreign))
    assert (found["reasoning"] == 0).all()
    assert found["perception"].min() >= 0.99
    assert found["picture"] == pytest.approx(1, abs=1e-3)


@every_task
def test_what_must_stay_and_does_not_harms_perception_only(name: str) -> None:
    samples = some(name)
    harmed = true_boards(samples)
    for video, sample in zip(harmed, samples, strict=True):
        things = Expected.of(sample).stays & (sample.boards[0] != board.Colour.BLACK)
        # Every other thing that must stay is lost: in mazes walls open, elsewhere objects vanish.
        lost = np.argwhere(things)[::2]
        video[1:, lost[:, 0], lost[:, 1]] = board.Colour.WHITE if "maze" in name else board.Colour.BLACK
    found = measured(samples, painted(harmed))
    touched = [bool((video != sample.boards).any()) for video, sample in zip(harmed, samples, strict=True)]
    assert sum(touched) >= COUNT - 2
    assert (found["perception"][touched] <= 0.9).all()
    assert (found["reasoning"] == 1).all()
    assert found["marks"] == pytest.approx(1)
    assert found["picture"] == pytest.approx(1, abs=1e-3)
    assert found["right"].mean() <= 0.2  # the scorer itself wants board and answer


@every_task
@pytest.mark.parametrize("way", ["noise", "pale"])
def test_a_poor_picture_harms_the_picture_only(name: str, way: str) -> None:
    video = painted(true_boards(some(name)))
    if way == "noise":
        video = (video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    else:
        video = 0.8 * video + 0.1
    found = measured(some(name), video)
    assert found["picture"].max() < 0.85
    for measure in ("perception", "reasoning", "marks"):
        assert found[measure] == pytest.approx(1, abs=1e-3), measure


@every_task
def test_an_empty_video_has_lost_everything_but_its_colours(name: str) -> None:
    samples = some(name)
    found = measured(samples, torch.zeros(COUNT, 17, 64, 64, 3))
    assert (found["reasoning"] == 0).all()
    assert (found["perception"] <= 0.5).all()  # empty squares are right, things are gone
    assert found["picture"] == pytest.approx(1)


def test_a_board_flooded_with_ink_is_no_answer() -> None:
    (sample,) = some("circle")[:1]
    flooded = np.full_like(sample.boards, board.Colour.CYAN)
    found = measured([sample], painted(flooded[None]))
    assert found["perception"] == pytest.approx(0)
    assert found["reasoning"] == 0


def test_ink_and_what_stays() -> None:
    circle, maze, game = (Expected.of(some(name)[0]) for name in ("circle", "maze", "tictactoe"))
    assert np.flatnonzero(circle.ink).tolist() == [board.Colour.CYAN]
    assert np.flatnonzero(maze.ink).tolist() == [board.Colour.GREEN, board.Colour.BLUE]
    assert game.ink.sum() == 2
    assert (circle.stays == ~circle.sample.masks["answer"]).all()
    assert not (maze.stays & maze.sample.masks["route"]).any()
    assert maze.stays[maze.sample.masks["wall"]].all()
    # What comes back is read where it is gone, what stays at the end.
    assert maze.told == 16
    assert 0 < Expected.of(some("permanence")[0]).told < 16


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.08), st.integers(0, 2**16))
def test_more_noise_never_makes_a_cleaner_picture(level: float, seed: int) -> None:
    sample = some("maze")[:1]
    noise = torch.randn((1, 17, 64, 64, 3), generator=torch.Generator().manual_seed(seed))
    less, more = (measured(sample, painted(true_boards(sample)) + size * noise)["picture"][0] for size in (level, level + 0.02))
    assert more < less


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_reading_agrees_with_the_board(seed: int) -> None:
    video = torch.rand((2, 3, 64, 64, 3), generator=torch.Generator().manual_seed(seed))
    assert (damage.read(video)[0] == board.read(video.numpy())).all()


def test_the_picture_is_measured_in_the_reach_of_a_colour() -> None:
    # Half of the way from black to green, its nearest colour, is as far as black reaches.
    green = board.PALETTE[board.Colour.GREEN].astype(np.float32) / 255
    for share, clean in ((0.0, 1.0), (0.25, 0.5), (0.4, 0.2)):
        video = torch.from_numpy(np.broadcast_to(share * green, (1, 2, 64, 64, 3)).copy())
        index, found = damage.read(video)
        assert (index == board.Colour.BLACK).all()
        assert found == pytest.approx(clean, abs=1e-4)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[17\] frames, and these are 1 of 9"):
        Scorer(some("maze")[:1])(torch.zeros(1, 9, 64, 64, 3))


def test_outcomes_are_those_of_the_clean_sample() -> None:
    pairs: list[Any] = dl.reasoner.pairs("circle", 3)
    found = damage.outcomes(pairs)
    assert tuple(outcome.name for outcome in found) == MEASURES
    assert MEASURES[:3] == PARTS
    shown = {side: painted(true_boards([getattr(pair, side) for pair in pairs])) for side in ("clean", "donor")}
    right = next(outcome for outcome in found if outcome.name == "reasoning")
    assert right(shown["clean"], pairs).tolist() == [1, 1, 1]
    assert right(shown["donor"], pairs).tolist() == [0, 0, 0]
    assert all(outcome.decoded for outcome in damage.outcomes(pairs, of="x0_hat"))
