"""Any edits at any places: both engines agree, and nothing of a run stays, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import BLOCKS, arguments, tiny_pipeline
from diffusers import WanPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_edits import MASK, OTHER, PER_HEAD, SITES, Double, run, same
from test_tracing import untouched
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.loading import state_hash


@dataclass(frozen=True, eq=False)
class Fail(dl.Edit):
    """Raises an exception at one step."""

    error: type[BaseException] = ZeroDivisionError
    step: int = 2

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        if moment.cell.step == self.step:
            raise self.error("on purpose")
        return activation + 1


def state(pipe: Any) -> dict[str, Any]:
    """All that a run could leave behind: weights, hooks, and attributes of instances."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = [(name, part) for top, module in modules.items() for name, part in module.named_modules(prefix=top)]
    return {
        "weights": state_hash(modules),
        "hooks": {name: (len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in parts},
        "attributes": {
            name: {key: id(vars(part)[key]) for key in vars(part) if key in ("forward", "cache_context")} for name, part in parts
        },
        "pipe": sorted(vars(pipe)),
        "scheduler": sorted(key for key, value in vars(pipe.scheduler).items() if callable(value)),
    }


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("site", ["resid", "heads", "q"])
def test_an_exception_comes_out_and_nothing_stays(image_pipe: Any, engine: str, error: type[BaseException], site: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    everything = [
        dl.Skip(dl.at(block=0)),
        dl.KnockoutAttention(dl.at(block=1, site="attn", step=0)),
        dl.ReplaceLatents(1, noise=0),
    ]
    before, untroubled = run(lens, *everything), state(image_pipe)
    with pytest.raises(error, match="on purpose"):
        run(lens, *everything, Fail(dl.at(block=[1, 2], site=site), error), record=dl.at(block=2, site="attn"))
    assert state(image_pipe) == untroubled
    untouched(image_pipe)
    assert same(run(lens, *everything), before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_while_latents_or_attention_are_edited_leaves_nothing(image_pipe: Any, engine: str, error: Any) -> None:
    def fail(*_: Any) -> Any:
        raise error("on purpose")

    lens = dl.wrap(image_pipe, engine=engine)
    before, untroubled = run(lens, Double(dl.at(block=0))), state(image_pipe)
    calls: list[int] = []

    def later(layout: dl.Layout, keys: int) -> Tensor:
        calls.append(1)
        return torch.zeros(layout.tokens, keys, dtype=torch.bool) if len(calls) <= BLOCKS * 8 else fail()

    with pytest.raises(error, match="on purpose"):
        run(lens, dl.KnockoutAttention(dl.at(site="attn"), pairs=later))
    with pytest.raises(error, match="on purpose"):
        run(lens, dl.ReplaceLatents(2, noise=0), Double(dl.at(block=0)), callback_on_step_end=fail)
    assert state(image_pipe) == untroubled
    assert same(run(lens, Double(dl.at(block=0))), before)


@pytest.fixture(scope="module")
def pair() -> tuple[dl.Lens, dl.Lens, dl.Run, dict[str, Any]]:
    """Both engines on two experts with guidance, a donor that recorded everything, and the pipeline's state."""
    pipe = tiny_pipeline(WanPipeline, experts=2)
    traced, hooked = (dl.wrap(pipe, engine=engine) for engine in ("nnsight", "hooks"))
    donor = run(traced, record=dl.at(site=SITES), seed=9, **OTHER)
    return traced, hooked, donor, state(pipe)


@st.composite
def selections(draw: st.DrawFn) -> dict[str, Any]:
    """Any selection of this small model that edits could name."""
    site = draw(st.sampled_from(SITES))
    axes: dict[str, Any] = {
        "block": draw(st.sampled_from([None, 0, [1, 2], slice(1, None)])),
        "step": draw(st.sampled_from([None, 0, [1, 3], slice(2, 4)])),
        "branch": draw(st.sampled_from([None, "cond", "uncond"])),
        "frames": draw(st.sampled_from([None, 0, [0, 1]])),
        "tokens": draw(st.sampled_from([None, MASK])),
    }
    if site in PER_HEAD:
        axes["head"] = draw(st.sampled_from([None, 0, [0, 1]]))
    return {"site": site, **axes}


Make = Callable[[dl.Run], Any]
"""From a donor to an edit."""

KINDS: list[Callable[[dl.Selector, dl.Run], dl.Edit]] = [
    lambda at, donor: dl.Zero(at),
    lambda at, donor: Double(at),
    lambda at, donor: dl.Average(at),
    lambda at, donor: dl.Patch(at, donor),
    lambda at, donor: dl.Resample(at, [donor, donor]),
    lambda at, donor: dl.Steer(at, torch.full((1,), 0.5)),
    lambda at, donor: dl.AddNoise(at, dose=0.5),
]


@st.composite
def edits_anywhere(draw: st.DrawFn) -> Make:
    """An edit of any kind at random places."""
    kind = draw(st.integers(0, len(KINDS) + 3))
    if kind < len(KINDS):
        axes = draw(selections())
        return lambda donor: KINDS[kind](dl.at(**axes), donor)
    block, step = draw(st.sampled_from([0, [1, 2]])), draw(st.sampled_from([0, [1, 2], 3]))
    if kind == len(KINDS):
        return lambda donor: dl.Skip(dl.at(block=block, step=step))
    if kind == len(KINDS) + 1:
        site = draw(st.sampled_from(["attn", "cross_attn"]))
        return lambda donor: dl.KnockoutAttention(dl.at(block=block, site=site), queries=MASK)
    if kind == len(KINDS) + 2:
        return lambda donor: dl.KnockoutAttention.causal_frames(dl.at(step=step, site="attn"))
    frames = draw(st.sampled_from([None, 1]))
    return lambda donor: dl.ReplaceLatents(step, noise=1, frames=frames)


def outcome(lens: dl.Lens, edits: list[Any]) -> dl.Run | str:
    """What a run with these edits gives: itself, or what was wrong with them."""
    try:
        return run(lens, *edits, record=[dl.at(), dl.at(block=2, step=3, site=["heads", "update"])], seed=[3, 4])
    except dl.InputError as error:
        return str(error)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(makes=st.lists(edits_anywhere(), min_size=1, max_size=3))
def test_both_engines_agree_on_any_edits(pair: tuple[dl.Lens, dl.Lens, dl.Run, dict[str, Any]], makes: list[Make]) -> None:
    traced, hooked, donor, before = pair
    edits = [make(donor) for make in makes]
    ours, theirs = outcome(traced, edits), outcome(hooked, edits)
    assert state(traced.pipe) == before
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return
    assert same(ours, theirs)
    assert ours.fired == theirs.fired
    for index, edit in enumerate(edits):
        if isinstance(edit, dl.Edit):
            assert ours.fired[index] == len(edit.at.cells(traced._extent(traced.forecast(**arguments(traced.pipe))))), edit


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    makes=st.lists(edits_anywhere(), max_size=2),
    error=st.sampled_from([ZeroDivisionError, KeyboardInterrupt]),
    site=st.sampled_from(["resid", "attn", "v"]),
    step=st.integers(0, 3),
)
def test_nothing_stays_after_any_failure(
    pair: tuple[dl.Lens, dl.Lens, dl.Run, dict[str, Any]], makes: list[Make], error: type[BaseException], site: str, step: int
) -> None:
    traced, hooked, donor, before = pair
    edits = [*(make(donor) for make in makes), Fail(dl.at(block=2, site=site), error, step)]
    for lens in (traced, hooked):
        with pytest.raises((error, dl.InputError)):
            run(lens, *edits, seed=[3, 4])
        assert state(lens.pipe) == before
