"""Guidance: found on pipelines that are written here, whose branches lie as they are told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import arguments
from torch import Tensor, nn

from dit_lens.architectures.discovery import Undecided
from dit_lens.architectures.guidance import Guidance, discover_guidance
from dit_lens.small_pipelines import PIPELINES


class Denoiser(nn.Module):
    def forward(self, hidden_states: Tensor, words: Tensor, table: Tensor) -> Tensor:
        return hidden_states + words.sum() + table.sum()


class Scheduler:
    def step(self, output: Tensor, timestep: float, sample: Tensor) -> Tensor:
        return sample - output


class Pipe:
    """``calls`` are the branches of each call: c, u, or several in its rows."""

    def __init__(self, *calls: str) -> None:
        self.calls, self.transformer, self.scheduler, self.steps = calls, Denoiser(), Scheduler(), 0

    def maybe_free_model_hooks(self) -> None: ...

    def __call__(self, prompt: Any, generator: torch.Generator, **_: Any) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        latents = torch.randn(len(prompts), 4, 3, generator=generator)
        # As many numbers as the prompt has letters, so that lengths differ too.
        longest = max(len(text) for text in prompts)
        heard = torch.tensor([[float(ord(letter)) for letter in text.ljust(longest)] for text in prompts])
        branches = {"c": heard, "u": torch.zeros_like(heard)}
        for _step in range(2):
            for call in self.calls:
                words = torch.cat([branches[branch] for branch in call])
                output = self.transformer(latents.repeat(len(call), 1, 1), words=words[..., None], table=torch.ones(9, 2))
            self.steps += 1
            latents = self.scheduler.step(output[: len(latents)], 1.0, latents)
        return latents


def found(pipe: Pipe, prompt: Any = "walk the maze") -> Guidance:
    return discover_guidance(pipe, {"transformer": pipe.transformer}, {"prompt": prompt})


@pytest.mark.parametrize("prompt", ["walk the maze", "maze", ["walk the maze", "find red", "x", "level"]])
@pytest.mark.parametrize(
    ("calls", "guidance"),
    [
        (("c",), Guidance("none", ("cond",))),
        (("c", "u"), Guidance("sequential", ("cond", "uncond"))),
        (("u", "c"), Guidance("sequential", ("uncond", "cond"))),
        (("uc",), Guidance("batched", ("uncond", "cond"))),
        (("cu",), Guidance("batched", ("cond", "uncond"))),
    ],
)
def test_branches_are_found_in_their_order(calls: tuple[str, ...], guidance: Guidance, prompt: Any) -> None:
    pipe = Pipe(*calls)
    assert found(pipe, prompt) == guidance
    assert pipe.steps == 2, "begun twice, and left in the first step"
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("calls", [("c", "u", "u"), ("u", "u"), ("c", "c"), ("cuu",), ("ucu",), ("u",), ("cu", "c")])
def test_what_is_neither_kind_is_not_guessed(calls: tuple[str, ...]) -> None:
    with pytest.raises(Undecided, match="hear the prompt"):
        found(Pipe(*calls))


def test_something_must_be_asked_for() -> None:
    pipe = Pipe("c")
    with pytest.raises(Undecided, match="nothing in height, prompt says what is asked for"):
        discover_guidance(pipe, {"transformer": pipe.transformer}, {"height": 8, "prompt": None})


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_wan_calls_cond_and_then_uncond(image_pipe: Any, scale: float) -> None:
    inputs = {name: value for name, value in arguments(image_pipe).items() if name != "generator"} | {"guidance_scale": scale}
    expected = Guidance("sequential", ("cond", "uncond")) if scale > 1 else Guidance("none", ("cond",))
    assert discover_guidance(image_pipe, {"transformer": image_pipe.transformer}, inputs) == expected


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_small_pipeline_is_found_as_it_is(name: str) -> None:
    small = PIPELINES[name]
    pipe = small.build()
    guidance = discover_guidance(pipe, {expert: getattr(pipe, expert) for expert in small.experts}, small.inputs)
    assert guidance.branches == small.branches
    assert guidance.kind == ("none" if len(small.branches) == 1 else small.guidance.split()[0])
