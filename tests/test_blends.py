"""Blends: weights of answers in latents come back as they were put in, whatever the decoder makes of them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.blends import Blends
from dit_lens.reasoner import board
from dit_lens.reasoner.tasks.pattern import PatternTask

SIZE = torch.zeros(1, 5, 64, 64, 3)


def encode(video: Tensor) -> Tensor:
    """A codec that keeps everything."""
    return (3 * video - 1).movedim(-1, 1)


LENS = SimpleNamespace(encode=encode)


@cache
def samples() -> list[Any]:
    """Some with several answers."""
    return [s for name in ("tictactoe", "pattern", "maze-loops") for s in reasoner.task(name).first(3, several=True)]


def clip(sample: Any, answer: Any) -> Tensor:
    return torch.from_numpy(board.paint(sample.task.draw(sample.puzzle, answer, 5))).float() / 255


def blend(sample: Any, weights: list[float], still: float) -> Tensor:
    """Latents of a mixture of the answers' clips and of the first frame."""
    clips = [clip(sample, answer) for answer in sample.answers]
    mixed = sum(weight * encode(each[None]) for weight, each in zip(weights, clips, strict=False))
    return mixed + still * encode(clips[0][None, :1].expand(1, 5, -1, -1, -1))


@given(
    st.deferred(lambda: st.sampled_from(samples())),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    st.floats(0, 1),
    st.floats(0, 5),
)
def test_weights_come_back(sample: Any, drawn: list[float], still: float, beside: float) -> None:
    weights = (drawn * 3)[: len(sample.answers)]
    total = sum(weights) + still
    weights, still = [weight / total for weight in weights], still / total
    latents = blend(sample, weights, still)
    # What no answer changes is no matter, and neither is what the clip was before its end.
    ends = torch.cat([encode(clip(sample, answer)[None]) for answer in sample.answers])[:, :, -1]
    first = encode(clip(sample, sample.answers[0])[None])[:, :, 0]
    latents[:, :, -1] += beside * ((ends - first).abs().amax(dim=0, keepdim=True) == 0)
    latents[:, :, :-1] = torch.randn(latents[:, :, :-1].shape)
    found = Blends(LENS, SIZE).held(latents, [sample])[0]
    assert found == pytest.approx(weights, abs=1e-5)


def test_beyond_the_answers_is_the_nearest_mixture() -> None:
    sample = samples()[0]
    ends = [encode(clip(sample, answer)[None]) for answer in sample.answers[:2]]
    still = encode(clip(sample, sample.answers[0])[None, :1].expand(1, 5, -1, -1, -1))
    found = Blends(LENS, SIZE).held(torch.cat([still + 2 * (ends[0] - still), still - (ends[0] - still)]), [sample, sample])
    assert found[0][0] == pytest.approx(1, abs=1e-6)
    assert found[1].max() == pytest.approx(0, abs=1e-6)


def test_other_answers_can_be_looked_for_and_other_sizes() -> None:
    samples = reasoner.task("tictactoe").first(2, several=False)
    asked = [(sample.answers[0], sample.task.decoy(sample)) for sample in samples]
    clips = torch.stack([clip(sample, decoy) for sample, (_, decoy) in zip(samples, asked, strict=True)])
    large = clips.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = Blends(LENS, large).held(encode(large), samples, asked)
    assert np.array(found) == pytest.approx(np.array([[0, 1]] * 2), abs=1e-6)


def test_what_one_symbol_and_two_leave_unexplained() -> None:
    task = PatternTask()
    for sample in task.first(6, several=True):
        alphabet, pair = task.alphabet(sample.puzzle), (sample.answers[0], sample.answers[1])
        ends = [encode(clip(sample, answer)[None]) for answer in pair]
        still = encode(clip(sample, pair[0])[None, :1].expand(1, 5, -1, -1, -1))
        points = torch.cat([ends[0], (ends[0] + ends[1]) / 2, 0.3 * still + 0.7 * ends[1], still])
        found = Blends(LENS, SIZE).unexplained(points, [sample] * 4, [alphabet] * 4, [pair] * 4)
        assert found[0] == pytest.approx((0, 0), abs=1e-6)
        assert found[1, 1] == pytest.approx(0, abs=1e-6)
        # Red and green blend to a dim yellow, but no single size is two of them.
        assert found[1, 0] > 0.01 or sample.puzzle.kind == "colour"
        assert found[2] == pytest.approx((0, 0), abs=1e-6)
        assert np.isnan(found[3]).all(), "nothing has changed"


def test_the_reasoners_decoder_hides_the_weaker_answer_and_its_latents_do_not() -> None:
    lens = dl.load("reasoner", engine="hooks")
    samples = [s for s in reasoner.task("pattern").first(6, several=True) if len(s.answers) == 2][:4]
    clips = torch.stack([clip(s, answer) for s in samples for answer in s.answers])
    latents = lens.encode(clips)
    assert (board_of(lens.decode(latents)) == board_of(clips)).float().mean() > 0.995
    mixed = torch.stack([0.7 * one + 0.3 * other for one, other in latents.unflatten(0, (-1, 2))])
    held = Blends(lens, clips).held(mixed, samples)
    assert np.array(held) == pytest.approx(np.array([[0.7, 0.3]] * 4), abs=1e-4)
    shown = np.array(reasoner.task("pattern").evidence(lens.decode(mixed).numpy(), samples))
    assert shown[:, 1].mean() < 0.2


def board_of(video: Tensor) -> Tensor:
    """The last frame as palette indices."""
    return torch.from_numpy(board.read(video[:, -1:].numpy()))
