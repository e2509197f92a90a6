"""Encoding once: equal arguments give the same result without another call, anything else is encoded anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import arguments, tiny_pipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_lens as dl
from dit_lens import encoded
from dit_lens.encoded import KEPT, encoded_once, remembering


class Counting:
    """A function that says how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return 2 * x


@given(st.lists(st.integers(0, KEPT - 1), min_size=1, max_size=12))
def test_each_of_a_few_values_is_computed_once(numbers: list[int]) -> None:
    counting = Counting()
    remembered = remembering(counting)
    for number in numbers:
        assert torch.equal(remembered(torch.full((2,), float(number))), torch.full((2,), 2.0 * number))
    assert counting.calls == len(set(numbers))


def test_more_than_a_few_are_kept_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    counting, values = Counting(), [torch.full((2,), float(number)) for number in range(3 * KEPT)]
    remembered = remembering(counting)
    for value in values * 2:
        remembered(value)
    assert counting.calls == len(values)
    monkeypatch.setattr(encoded, "KEPT_BYTES", values[0].nbytes * (KEPT + 1))
    for value in values:
        remembered(value + 0.5)
    before = counting.calls
    for value in reversed(values):
        remembered(value + 0.5)
    assert counting.calls == before + len(values) - (KEPT + 1)


def test_what_differs_in_anything_is_computed_anew() -> None:
    counting = Counting()
    remembered = remembering(counting)
    ones = torch.ones(2)
    for x, options in ((ones, {}), (ones, {"a": 1}), (ones.double(), {}), (ones[:1], {}), (ones, {"a": [ones]})):
        remembered(x, **options)
    assert counting.calls == 5


def test_arguments_changed_in_place_are_not_taken_for_what_they_were() -> None:
    counting = Counting()
    remembered = remembering(counting)
    x = torch.ones(2)
    remembered(x)
    x += 1
    assert torch.equal(remembered(x), torch.full((2,), 4.0))
    assert torch.equal(remembered(torch.full((2,), 2.0)), torch.full((2,), 4.0))


def test_a_pipeline_gives_the_same_bits_and_encodes_once() -> None:
    pipe = tiny_pipeline()
    lens, inputs = dl.wrap(pipe), arguments(pipe)
    plain = lens.run(**inputs, seed=[0, 1])
    ran: list[str] = []
    hooks = [pipe.text_encoder.encoder.register_forward_hook(lambda *_: ran.append("text"))]
    hooks += [pipe.vae.encoder.register_forward_hook(lambda *_: ran.append("picture"))]
    with encoded_once(pipe):
        first = lens.run(**inputs, seed=[0, 1])
        made = list(ran)
        second = lens.run(**inputs, seed=[0, 1])
    for hook in hooks:
        hook.remove()
    assert {"text", "picture"} == set(made)
    assert ran == made
    for run in (first, second):
        assert torch.equal(run.latents, plain.latents)
        assert torch.equal(torch.as_tensor(run.video), torch.as_tensor(plain.video))
    assert "encode" not in vars(pipe.vae)
    assert "forward" not in vars(pipe.text_encoder)
