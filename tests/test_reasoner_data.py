"""Training data: puzzles of every task in their shares, encoded as the pipeline encodes what it is given."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_vae
from PIL import Image

from dit_lens.reasoner import board, data
from dit_lens.reasoner.tasks import TASKS


@pytest.fixture(scope="module")
def clips() -> data.Clips:
    """Forty short clips."""
    return data.draw(40, first=3, frames=5, workers=1)


def test_every_prompt_has_a_number() -> None:
    prompts = data.prompts()
    assert prompts[0] == ""
    assert len(set(prompts)) == len(prompts)
    assert set(prompts[1:]) == {prompt for task in TASKS.values() for prompt in task.prompts()}


def test_shares_are_of_all_tasks_and_lengths() -> None:
    assert set(data.SHARES) == set(TASKS)
    assert sum(data.SHARES.values()) == pytest.approx(1)
    assert sum(data.LENGTHS.values()) == pytest.approx(1)
    assert all(frames % 4 == 1 for frames in data.LENGTHS)


def test_clips_are_training_samples_with_their_prompts(clips: data.Clips) -> None:
    prompts, at = data.prompts(), 0
    for name, share in data.SHARES.items():
        for index in range(round(40 * share)):
            sample = TASKS[name].sample("train", 3 + index, 5)
            assert np.array_equal(clips.boards[at], sample.boards)
            assert prompts[clips.prompts[at]] == sample.prompt
            at += 1
    assert len(clips.boards) == len(clips.prompts) == at


def test_many_workers_draw_what_one_draws(clips: data.Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads in place of processes, which take seconds to start; the jobs are the same.
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(data, "CHUNK", 3)
    many = data.draw(40, first=3, frames=5, workers=2)
    assert np.array_equal(many.boards, clips.boards)
    assert np.array_equal(many.prompts, clips.prompts)


def test_pixels_are_what_the_pipeline_makes_of_a_picture(clips: data.Clips) -> None:
    video = data.pixels(torch.from_numpy(clips.boards[:3]))
    assert video.shape == (3, 3, 5, 64, 64)
    processor = tiny_pipeline().video_processor
    for made, boards in zip(video, clips.boards, strict=False):
        pictures = [Image.fromarray(board.paint(each)) for each in boards]
        assert torch.allclose(made, processor.preprocess(pictures).transpose(0, 1), atol=1e-6)
    shown = data.condition(video)
    assert torch.equal(shown[:, :, 0], video[:, :, 0])
    assert not shown[:, :, 1:].any()


def test_conditions_are_what_the_pipeline_encodes(clips: data.Clips) -> None:
    torch.manual_seed(0)
    pipe = tiny_pipeline(vae=tiny_vae())
    found = data.encode(pipe.vae, data.Clips(clips.boards[:3], clips.prompts[:3]), batch=2)
    assert found.latents.shape == found.conditions.shape == (3, 4, 2, 16, 16)
    assert found.latents.dtype == torch.bfloat16
    assert found.prompts.tolist() == clips.prompts[:3].tolist()
    pictures = [Image.fromarray(board.paint(each[0])) for each in clips.boards[:3]]
    for row, picture in enumerate(pictures):
        image = pipe.video_processor.preprocess(picture, height=64, width=64)
        with torch.no_grad():
            _, condition = pipe.prepare_latents(image, 1, 4, 64, 64, 5, torch.float32, torch.device("cpu"), torch.Generator())
        assert torch.allclose(found.conditions[row].float(), condition[0, 4:], rtol=0.01, atol=0.01)
    whole = data.pixels(torch.from_numpy(clips.boards[:1]))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    with torch.no_grad():
        expected = (pipe.vae.encode(whole).latent_dist.mode() - mean) / std
    assert torch.allclose(found.latents[:1].float(), expected, rtol=0.01, atol=0.01)


def test_a_pass_takes_each_clip_once() -> None:
    numbers = torch.arange(10)
    encoded = data.Encoded(numbers.view(10, 1).float(), -numbers.view(10, 1).float(), numbers)
    feed = encoded.batches(3, torch.Generator().manual_seed(0))
    for _ in range(3):
        batches = [next(feed) for _ in range(3)]
        said = torch.cat([prompts for _, _, prompts in batches]).tolist()
        assert len(set(said)) == 9
        for latents, conditions, prompts in batches:
            assert torch.equal(latents.flatten(), prompts.float())
            assert torch.equal(conditions.flatten(), -prompts.float())
    first, again, other = (encoded.batches(9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert next(first)[2].tolist() == next(again)[2].tolist() != next(other)[2].tolist()
