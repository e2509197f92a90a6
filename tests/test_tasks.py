"""Every task: its scorer earns its trust, its splits are apart, its masks and evidence mean what they say."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.reasoner import board, unmixing
from dit_lens.reasoner.tasks import TASKS, Answer, Sample

COUNT = 60
"""Held-out samples of a task."""

every_task = pytest.mark.parametrize("name", list(TASKS))


@cache
def held_out(name: str) -> list[Sample]:
    """The first samples of the test split."""
    return [TASKS[name].sample("test", index) for index in range(COUNT)]


def carried_out(sample: Sample, answer: Answer, frames: int = 17) -> np.ndarray:
    """The video in which an answer, legal or not, is carried out."""
    return board.paint(sample.task.draw(sample.puzzle, answer, frames)).astype(np.float32) / 255


def share(name: str, videos: list[np.ndarray]) -> float:
    """Share of videos that are right, one for each held-out sample."""
    return float(np.mean([score.right for score in TASKS[name].scores(np.stack(videos), held_out(name)[: len(videos)])]))


@every_task
def test_true_videos_are_right(name: str) -> None:
    assert share(name, [sample.video() for sample in held_out(name)]) >= 0.99


@every_task
def test_frozen_foreign_and_wrong_videos_are_not(name: str) -> None:
    samples, random = held_out(name), np.random.default_rng(0)
    true = [sample.video() for sample in samples]
    assert share(name, [np.repeat(video[:1], len(video), axis=0) for video in true]) == 0
    assert share(name, [true[index - 1] for index in range(COUNT)]) <= 0.02
    assert share(name, [carried_out(sample, sample.task.wrong(sample.puzzle, random)) for sample in samples]) <= 0.02
    assert share(name, [np.zeros_like(video) for video in true]) == 0


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """The bundled VAE."""
    return AutoencoderKLWan.from_pretrained(reasoner.folder() / "vae", torch_dtype=torch.float32)


@torch.no_grad()
def through(vae: Any, samples: list[Sample]) -> np.ndarray:
    """True videos, encoded and decoded."""
    videos = torch.from_numpy(np.stack([sample.video() for sample in samples]))
    latents = vae.encode(2 * videos.permute(0, 4, 1, 2, 3) - 1).latent_dist.mode()
    assert latents.shape[1:] == (8, (videos.shape[1] + 3) // 4, 16, 16)
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


@every_task
def test_true_videos_survive_the_vae(name: str, vae: AutoencoderKLWan) -> None:
    assert share(name, list(through(vae, held_out(name)[:4]))) == 1


@pytest.mark.parametrize("frames", [5, 9, 13])
def test_short_true_videos_survive_the_vae(frames: int, vae: AutoencoderKLWan) -> None:
    samples = [TASKS["maze"].sample("test", index, frames) for index in range(3)]
    assert all(score.right for score in TASKS["maze"].scores(through(vae, samples), samples))


@every_task
def test_a_score_names_the_answer_that_the_video_shows(name: str) -> None:
    random = np.random.default_rng(1)
    for sample in held_out(name)[:30]:
        assert len(set(sample.answers)) == len(sample.answers) >= 1
        for which, answer in enumerate(sample.answers):
            score = sample.task.score(carried_out(sample, answer), sample)
            assert (score.right, score.answer, score.which, score.reason) == (True, answer, which, "")
        wrong = sample.task.wrong(sample.puzzle, random)
        assert wrong not in sample.answers
        score = sample.task.score(carried_out(sample, wrong), sample)
        assert not score.right
        assert score.which is None
        assert score.answer == wrong
        assert score.reason


@every_task
def test_nothing_done_is_no_answer(name: str) -> None:
    sample = held_out(name)[0]
    score = sample.task.score(np.repeat(sample.video()[:1], 17, axis=0), sample)
    assert not score.right
    assert score.which is None
    assert score.reason


@every_task
def test_short_clips_are_read_too(name: str) -> None:
    task = TASKS[name]
    for frames in (5, 9, 13):
        samples = [task.sample("test", index, frames) for index in range(10)]
        videos = np.stack([sample.video() for sample in samples])
        assert videos.shape == (10, frames, 64, 64, 3)
        assert all(score.right for score in task.scores(videos, samples))
        frozen = task.scores(np.repeat(videos[:, :1], frames, axis=1), samples)
        assert not any(score.right for score in frozen)
        assert all(np.array_equal(s.boards[0], t.boards[0]) for s, t in zip(samples, held_out(name), strict=False))


def digest() -> str:
    """Everything that four samples of every task say, in one number."""
    found = hashlib.sha256()
    for name, task in TASKS.items():
        for split in ("train", "test"):
            for index in (0, 12_345):
                sample = task.sample(split, index)
                found.update(f"{name} {sample.prompt} {sample.shown}".encode() + sample.boards.tobytes())
    return found.hexdigest()


def test_a_sample_is_the_same_every_time_and_in_every_process() -> None:
    # Orders of sets differ between processes; whatever depends on one would show here.
    code = "import test_tasks; print(test_tasks.digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digest()


@every_task
def test_train_and_test_are_apart_up_to_symmetry(name: str) -> None:
    task = TASKS[name]
    train = [task.sample("train", index) for index in range(COUNT)]
    assert {task.split(sample.puzzle) for sample in train} == {"train"}
    assert {task.split(sample.puzzle) for sample in held_out(name)} == {"test"}
    forms = [{task.canonical(sample.puzzle) for sample in samples} for samples in (train, held_out(name))]
    assert not forms[0] & forms[1]
    assert min(len(each) for each in forms) > 10
    assert len({sample.boards.tobytes() for sample in held_out(name)}) > 10, "an index is a sample of its own"


@every_task
def test_one_puzzle_in_eight_is_held_out(name: str) -> None:
    task, random = TASKS[name], np.random.default_rng(0)
    forms = {task.canonical(puzzle): task.split(puzzle) for puzzle in (task.generate(random) for _ in range(150))}
    held = sum(split == "test" for split in forms.values())
    assert 0.02 < held / len(forms) < 0.27


@every_task
def test_masks_cut_the_board_into_parts(name: str) -> None:
    for sample in held_out(name)[:30]:
        masks = np.stack(list(sample.masks.values()))
        assert masks.shape[1:] == (16, 16)
        assert (masks.sum(axis=0) == 1).all()
        first = sample.boards[0]
        # What an answer paints is part of no wall and of no background, and it is painted on the first frame.
        still = sample.masks["background"] | sample.masks.get("wall", np.zeros_like(masks[0]))
        for answer, painted in zip(sample.answers, sample.answer_masks, strict=True):
            assert not (painted & still).any()
            assert np.array_equal(painted, sample.task.draw(sample.puzzle, answer, 9)[-1] != first)


@every_task
def test_the_prompt_is_one_that_the_task_can_say(name: str) -> None:
    prompts = TASKS[name].prompts()
    assert len(set(prompts)) == len(prompts)
    said = {sample.prompt for sample in held_out(name)}
    assert said <= set(prompts)
    assert len(said) > 1
    assert not [prompt for prompt in prompts if "{" in prompt]


@every_task
def test_the_inputs_are_arguments_of_the_pipeline(name: str) -> None:
    sample = TASKS[name].sample("test", 0, frames=9)
    inspect.signature(WanImageToVideoPipeline.__call__).bind(None, **sample.inputs)
    assert sample.inputs["num_frames"] == 9
    assert np.array_equal(np.asarray(sample.image), board.paint(sample.boards[0]))
    assert sample.inputs["prompt"] == sample.prompt


@every_task
def test_evidence_is_all_for_what_is_shown_and_none_for_nothing(name: str) -> None:
    task, samples = TASKS[name], held_out(name)[:40]
    videos = np.stack([sample.video() for sample in samples])
    frozen = task.evidence(np.repeat(videos[:, :1], 17, axis=1), samples)
    if name == "permanence":  # the answer is the first frame again, so nothing in the last frame speaks for it
        assert all(np.array_equal(found, [0.0]) for found in task.evidence(videos, samples))
        return
    others = []
    for found, none, sample in zip(task.evidence(videos, samples), frozen, samples, strict=True):
        assert found.shape == (len(sample.answers),)
        assert found[sample.shown] == pytest.approx(1, abs=1e-5)
        assert none == pytest.approx(np.zeros(len(found)), abs=1e-5)
        others += np.delete(found, sample.shown).tolist()
    # Colours are not at right angles: going to purple is going towards blue a little.
    assert max(others, default=0) < 0.35
    assert np.mean(others or [0]) < 0.05


@pytest.mark.parametrize("name", ["maze-loops", "tictactoe", "pattern"])
def test_blends_with_known_weights_are_unmixed(name: str) -> None:
    several = [sample for sample in held_out(name) if len(sample.answers) > 1]
    assert len(several) >= 10
    random = np.random.default_rng(5)
    for sample in several:
        clips = [carried_out(sample, answer) for answer in sample.answers]
        even = sample.task.evidence(((clips[0] + clips[1]) / 2)[None], [sample])[0]
        if len(clips) == 2:
            assert even == pytest.approx([0.5, 0.5], abs=1e-5)
        # The first frame has a weight too, and the weights of answers that share squares are told apart.
        weights = random.dirichlet(np.ones(len(clips) + 1))
        blend = sum(weight * clip for weight, clip in zip(weights, [*clips, np.repeat(clips[0][:1], 17, axis=0)], strict=True))
        found = sample.task.evidence(np.asarray(blend, dtype=np.float32)[None], [sample])[0]
        own = unmixing.plan(sample.boards[0], sample.finals).own
        for which, mask in enumerate(own):
            if (mask & (sample.finals == sample.finals[which]).sum(axis=0) > 1).any():
                continue  # it is read on squares that others paint too
            assert found[which] == pytest.approx(weights[which], abs=1e-4)


@every_task
def test_half_way_to_an_answer_counts_half(name: str) -> None:
    for sample in held_out(name)[:30] if name != "permanence" else ():
        clip = carried_out(sample, sample.answers[0])
        found = sample.task.evidence(((clip + clip[:1]) / 2)[None], [sample])[0]
        assert found[0] == pytest.approx(0.5, abs=1e-5)


@every_task
def test_a_decoy_can_be_told_from_every_answer(name: str) -> None:
    for sample in held_out(name)[:30]:
        decoy = sample.task.decoy(sample)
        if name == "permanence" or decoy is None:
            continue
        assert decoy not in sample.answers
        seen = sample.task.evidence(carried_out(sample, decoy)[None], [sample], [[*sample.answers, decoy]])[0]
        assert seen[-1] == pytest.approx(1, abs=1e-5)
        right = sample.task.evidence(sample.video()[None], [sample], [[*sample.answers, decoy]])[0]
        assert right[-1] < 0.35
        assert right[sample.shown] == pytest.approx(1, abs=1e-5)
    if name != "permanence":  # medium, beside small and large, paints nothing that is its own
        assert np.mean([sample.task.decoy(sample) is not None for sample in held_out(name)[:30]]) > 0.7


def test_a_colour_that_no_answer_has_speaks_for_none() -> None:
    sample = next(sample for sample in held_out("tictactoe") if "BLUE" in repr(sample.puzzle.colour(sample.puzzle.player)))
    video = carried_out(sample, sample.answers[0])
    target = board.PALETTE[board.Colour.BLUE] / 255
    white = np.where(np.isclose(video, target.astype(np.float32), atol=1e-6).all(axis=-1, keepdims=True), 1.0, video)
    assert sample.task.evidence(white.astype(np.float32)[None], [sample])[0] == pytest.approx(np.zeros(len(sample.answers)))


def test_what_cannot_be_drawn_is_refused() -> None:
    assert reasoner.tasks() == ("maze", "maze-loops", "circle", "tictactoe", "permanence", "pattern", "bounce")
    with pytest.raises(dl.InputError, match="unknown task 'mazes'; there are maze, maze-loops, circle"):
        reasoner.task("mazes")
    task = reasoner.task("circle")
    with pytest.raises(dl.InputError, match="index -1 is negative"):
        task.sample("test", -1)
    for frames in (1, 0, -3, 16, 18):
        with pytest.raises(dl.InputError, match=f"cannot have {frames} frames; write 5, 9, 13 or 17"):
            task.sample("test", 0, frames)


@pytest.mark.parametrize("samples", [[], [(0, 17), (1, 9)]])
def test_a_batch_has_one_length(samples: list[tuple[int, int]]) -> None:
    task = reasoner.task("circle")
    with pytest.raises(dl.InputError, match="samples of one length"):
        reasoner.inputs([task.sample("test", index, frames) for index, frames in samples])


def test_a_batch_has_a_prompt_and_an_image_for_each() -> None:
    samples = [reasoner.task(name).sample("test", 3, 9) for name in ("circle", "bounce")]
    inputs = reasoner.inputs(samples)
    assert inputs["prompt"] == [sample.prompt for sample in samples]
    assert [np.asarray(image).tobytes() for image in inputs["image"]] == [np.asarray(s.image).tobytes() for s in samples]
    assert {k: v for k, v in inputs.items() if k not in ("prompt", "image")} == {
        k: v for k, v in samples[0].inputs.items() if k not in ("prompt", "image")
    }


@pytest.mark.parametrize("name", ["maze", "maze-loops", "circle", "tictactoe"])
def test_pairs_differ_in_one_thing_that_decides_the_answer(name: str) -> None:
    pairs = reasoner.pairs(name, 12)
    assert len({pair.clean.index for pair in pairs}) == 12
    for clean, donor in pairs:
        assert (clean.split, donor.split) == (clean.task.split(clean.puzzle), clean.task.split(donor.puzzle))
        assert clean.split == "test"
        others = [clean.task.split(puzzle) for puzzle in clean.task.counterparts(clean.puzzle)]
        assert donor.split == ("test" if "test" in others else "train")
        assert not set(clean.answers) & set(donor.answers)
        changed = int((clean.boards[0] != donor.boards[0]).sum())
        if name.startswith("maze"):
            assert changed == 2
            assert clean.prompt == donor.prompt
        else:
            assert changed == 0
            assert clean.prompt != donor.prompt
        # Each is a sample like any other: its own true video is right, and the other's is not.
        assert clean.task.score(donor.video(), donor).right
        assert not clean.task.score(donor.video(), clean).right
    assert all(a.puzzle == b.puzzle or name.startswith("maze") for a, b in zip(pairs[0], reasoner.pairs(name, 1)[0], strict=True))


def test_tasks_without_counterparts_say_so() -> None:
    with pytest.raises(dl.InputError, match="bounce has 0 pairs among its first 40 samples, and 1 are asked for"):
        reasoner.pairs("bounce", 1)


@every_task
def test_untouched_squares_stay_in_every_legal_video(name: str) -> None:
    sample = reasoner.task(name).sample("test", 1)
    moved = np.zeros((16, 16), dtype=bool)
    for answer in sample.answers:
        boards = sample.task.draw(sample.puzzle, answer, sample.frames)
        assert (boards[:, sample.untouched] == boards[0, sample.untouched]).all()
        moved |= (boards != boards[0]).any(axis=0)
    assert (moved == ~sample.untouched).all()
    assert sample.untouched.any()


def test_the_first_samples_of_a_kind() -> None:
    task = reasoner.task("pattern")
    several, single = task.first(4, several=True), task.first(4, several=False)
    assert all(len(sample.answers) > 1 for sample in several)
    assert all(len(sample.answers) == 1 for sample in single)
    indices = sorted(sample.index for sample in several + single)
    assert set(range(max(sample.index for sample in several))) - set(indices) <= set(range(single[-1].index, indices[-1]))
    assert reasoner.task("maze").first(3, several=True) == []
    assert [sample.index for sample in reasoner.task("maze").first(3, several=False)] == [0, 1, 2]
    assert task.first(0, several=True) == []
