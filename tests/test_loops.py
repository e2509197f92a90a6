"""Loops without a scheduler: what is told by their calls, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from own import OWN, module
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.architectures import record
from dit_lens.loops import taken_by


class Loop:
    """A loop that can be made to break every rule."""

    def __init__(self, transformer: nn.Module, calls: Any) -> None:
        self.transformer, self.calls = transformer, calls

    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        return self.calls(self.transformer, torch.randn(1, 3, 4, 4, generator=generator))


class Unseeded(Loop):
    def __call__(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.calls(self.transformer, torch.randn(1, 3, 4, 4))


def time(*values: float) -> Tensor:
    return torch.tensor(values)


WORD = torch.zeros(1, 4, 64)
ADAPTIVE = count()


def grows(model: Any, x: Tensor) -> None:
    model(x, WORD, time(1))
    model(x[..., :2], WORD, time(0.5))


def once(model: Any, x: Tensor) -> None:
    model(x, WORD, time(1))


def guided_late(model: Any, x: Tensor) -> None:
    for moment in (1, 0.8, 0.5, 0.5):
        model(x, WORD, time(moment))


def mixed(model: Any, x: Tensor) -> None:
    model(torch.cat([x, x]), WORD.repeat(2, 1, 1), time(1, 0.5))


def different(model: Any, x: Tensor) -> None:
    model(torch.cat([x, 2 * x]), WORD.repeat(2, 1, 1), time(1, 1))


def adaptive(model: Any, x: Tensor) -> None:
    model(x, WORD, time(1))
    model(x, WORD, time(0.5 if next(ADAPTIVE) else 0.6))


ALONE = {"guidance": dl.Guidance("none", ("cond",))}
BATCHED = {"guidance": dl.Guidance("batched"), "guided_above": 0.0}


@pytest.mark.parametrize(
    ("calls", "changes", "message"),
    [
        (grows, ALONE, r"latents of a Loop change from \(1, 3, 4, 4\) to \(1, 3, 4, 2\) on the way"),
        (once, {"guided_above": 0.0}, "calls its denoiser 1 times, not 2 times for each step"),
        (guided_late, {"guided_above": 0.0}, "calls its denoiser 4 times, not 2 times for each step with the same latents"),
        (once, BATCHED, "the 1 rows of a Loop's call are not those of its branches, and the record says"),
        (different, BATCHED, "the 2 rows of a Loop's call are not those of its branches"),
        (mixed, ALONE, r"rows of a call have the timesteps \[1.0, 0.5\], and a step has one"),
        (once, ALONE | {"loop": dl.Loop("t", lambda _: _)}, r"called with latents, text, time, and no 't'; write loop=dl\.Loop"),
        (once, ALONE | {"latents": "x"}, r"called with latents, text, time, and no 'x'; write latents= as its forward calls it"),
        (lambda model, x: None, ALONE, "never calls its denoiser; write experts="),
        (adaptive, ALONE, "step 1 of a Loop is at timestep 0.5 of transformer, and when it was watched there was timestep 0.6"),
    ],
)
def test_a_loop_that_is_not_as_its_record_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, calls: Any, changes: dict[str, Any], message: str
) -> None:
    own = module("mmdit")
    monkeypatch.setattr(record, "_registered", [replace(own.RECORD, pipelines=("Loop",), **changes)])
    lens = dl.wrap(Loop(own.MMDiT(size=4, blocks=1), calls), "hooks")
    with pytest.raises(dl.InputError, match=message):
        lens.run(decode=False)


def test_width_and_heads_are_to_be_said_where_no_configuration_does(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module("mmdit")
    for asked in ("width", "heads"):
        stack = replace(own.RECORD.stacks[0], **{asked: 0})
        monkeypatch.setattr(record, "_registered", [replace(own.RECORD, stacks=(stack,))])
        with pytest.raises(dl.InputError, match=rf"a MMDiT has no configuration that says its {asked}; write dl\.Stack"):
            dl.wrap(OWN["mmdit"].pipe()).describe()


class Experts:
    """Two denoisers, in chunks: noise rises again where the second chunk begins, and low noise is the second expert's."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        self.high, self.low = high, low

    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        for _ in range(2):
            x = torch.randn(1, 3, 4, 4, generator=generator)
            for expert, moment in ((self.high, 1), (self.high, 0.75), (self.low, 0.25)):
                x = x - expert(x, WORD, time(moment)) / 4
        return x


def test_experts_and_chunks_are_told_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module("mmdit")
    found = replace(own.RECORD, pipelines=("Experts",), experts=("high", "low"), **ALONE)
    monkeypatch.setattr(record, "_registered", [found])
    lens = dl.wrap(Experts(own.MMDiT(size=4, blocks=1), own.MMDiT(size=4, blocks=2)), "hooks")
    run = lens.run(record=dl.at(stream="all"))
    assert run.timesteps == (1, 0.75, 0.25) * 2
    assert run.experts == ("high", "high", "low") * 2
    assert {(cell.step, cell.expert, cell.block) for cell in run.activations.cells} == {
        *((step, "high", 0) for step in (0, 1, 3, 4)),
        *((step, "low", block) for step in (2, 5) for block in (0, 1)),
    }
    assert "2 blocks" in str(lens.describe())


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        (torch.tensor(0.5), (0.5,)),
        (torch.tensor([0.5, 0.5]), (0.5,)),
        (torch.tensor([[0.5, 0.5, 0.5]] * 2), (0.5,)),
        (torch.tensor([[0.0, 0.5, 1.0]] * 2), (0.0, 0.5, 1.0)),
        (torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(4).expand(2, -1), (0.0, 0.5, 1.0)),
        (torch.zeros(2, 5), r"the timestep has shape \(2, 5\), and there are 3 frames of 12 tokens"),
        (torch.arange(12.0).expand(2, -1), "the tokens of a frame have different timesteps"),
        (torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]), r"the rows of a call have the timesteps \[0.0, 1.0\]"),
    ],
)
def test_timesteps_are_of_all_of_rows_of_frames_or_of_tokens(levels: Tensor, found: Any) -> None:
    own = module("causal_video")
    given = (torch.zeros(2, 3, 3, 4, 4), torch.zeros(2), levels)
    highest = replace(own.RECORD, loop=replace(own.RECORD.loop, of_frames=max))
    if isinstance(found, str):
        with pytest.raises(dl.InputError, match=found):
            taken_by(highest, "model", own.CausalVideoDiT(frames=3, size=4, blocks=1), given, {})
        return
    taken = taken_by(highest, "model", own.CausalVideoDiT(frames=3, size=4, blocks=1), given, {})
    assert taken.timesteps == found
    assert taken.at(highest.loop) == max(found)


def test_a_loop_whose_noise_no_seed_decides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module("mmdit")
    monkeypatch.setattr(record, "_registered", [replace(own.RECORD, pipelines=("Unseeded",), **ALONE)])
    with pytest.raises(dl.InputError, match="a Unseeded takes no generator, so that no seed decides its noise"):
        dl.wrap(Unseeded(own.MMDiT(size=4, blocks=1), once), "hooks").run()
