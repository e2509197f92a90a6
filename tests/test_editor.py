"""The editor: what it refuses and how it says so, what it counts, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH, arguments, tiny_pipeline
from diffusers import WanPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_edits import MASK, OTHER, PER_HEAD, SITES, Double, Keep, run, same
from test_tracing import untouched
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.donors import Pool
from dit_lens.editor import as_edits
from dit_lens.loading import state_hash

ONES = torch.ones(WIDTH)


@pytest.fixture
def lens(image_pipe: Any) -> dl.Lens:
    return dl.wrap(image_pipe, engine="hooks")


@pytest.fixture
def donor(lens: dl.Lens) -> dl.Run:
    """Recorded: blocks 0 and 1 at steps 0 and 1."""
    return run(lens, record=dl.at(block=[0, 1], step=[0, 1]), **OTHER)


@dataclass(frozen=True, eq=False)
class Give(dl.Edit):
    """Returns what it is told to."""

    what: Callable[[Tensor], Any]

    def apply(self, activation: Tensor, moment: dl.Moment) -> Any:
        return self.what(activation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda donor: dl.Zero(dl.at(block=3)), "block 3 is out of range: there are 3 blocks, write 0 to 2"),
        (lambda donor: dl.Zero(dl.at(sigma=(2, 3))), r"sigma=\(2, 3\) matches nothing; there is"),
        (lambda donor: dl.Zero(dl.at(frames=2)), "frames 2 is out of range: there are 2 latent frames"),
        (lambda donor: dl.Zero(dl.at(tokens=torch.ones(3, 3, dtype=torch.bool))), r"token mask has shape \(3, 3\)"),
        (
            lambda donor: dl.Zero(dl.at(site="mlp_contribution")),
            r"Zero\(at\(site='mlp_contribution'\)\): the site 'mlp_contribution' is read-only; edit one of q, k, v, heads, attn",
        ),
        (lambda donor: dl.Zero(dl.at(site="qk", head=0)), "the site 'qk' is read-only; edit one of q, k, v"),
        (
            lambda donor: dl.Patch(dl.at(block=[1, 2], step=0), donor),
            r"Patch\(at\(block=\[1, 2\], step=0\)\): the donor lacks 2 of 4 cells, the first at block 2, step 0, branch cond,"
            r" site resid of transformer; it holds block 0, 1; step 0, 1; branch cond, uncond; site resid; run it with a record=",
        ),
        (lambda donor: dl.PatchUpdate(dl.at(block=1, step=0), donor), r"acts on 'resid'; write dl.at\(..., site='update'\)"),
        (lambda donor: dl.Mean(dl.at(block=2, step=0), [donor, donor]), "the donor lacks 2 of 2 cells"),
        (lambda donor: dl.Resample(dl.at(block=2, step=0), donor), "the donor lacks 2 of 2 cells"),
        (
            lambda donor: dl.Steer(dl.at(block=0), torch.ones(3)),
            r"direction has shape \(3,\), and the activation \(1, 2, 2, 2, 16\)",
        ),
        (
            lambda donor: dl.Steer(dl.at(block=0, site="q"), ONES),
            r"and the activation \(1, 2, 2, 2, 2, 8\); write one of shape \(8,\)",
        ),
        (lambda donor: dl.Average(dl.at(block=0), to=1), "to=1 is out of range: each prompt has 1 rows, write 0 to 0"),
        (lambda donor: dl.Skip(dl.at(block=0, frames=1)), r"leaves out whole blocks: name neither .* write dl.Zero\(dl.at"),
        (lambda donor: dl.Skip(dl.at(block=0, site="attn")), "leaves out whole blocks: name neither site"),
        (lambda donor: Give(dl.at(block=0), lambda x: x[:, :1]), r"apply gave a tensor of shape \(1, 1, 2, 2, 16\) at block 0"),
        (lambda donor: Give(dl.at(block=0), lambda x: None), r"apply gave NoneType at .*; return a tensor of shape \(1, 2, 2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(lens: dl.Lens, donor: dl.Run, make: Any, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        run(lens, make(donor))
    untouched(lens.pipe)


def test_a_donor_must_have_run_alike(lens: dl.Lens, donor: dl.Run) -> None:
    where = dl.at(block=1, step=0)
    reduced = run(lens, record=dl.Record(dl.at(block=1), dl.norm))
    shorter = run(lens, record=where, num_inference_steps=3)
    wider = run(lens, record=where, width=32)
    double = run(lens, record=where, seed=[1, 2])
    frame = run(lens, record=dl.at(block=1, step=0, frames=0))
    for source, at, message in (
        (reduced, where, "which it reduced with norm; it holds"),
        (shorter, where, r"the donor has another schedule: its 3 sigmas begin with 1, 0.7511, .*, and the 4 of this run with 1, 0.85"),
        (shorter.activations, dl.at(block=1, step=[0, 1]), "the donor lacks 2 of 4 cells"),
        (wider, where, r"rows have shape \(2, 2, 4, 16\), and \(2, 2, 2, 16\) is needed; run the donor with frames, height"),
        (double, where, "the donor has 2 rows, and this run 1; run the donor with one seed and prompt"),
        (
            frame,
            dl.at(block=1, step=0, frames=1),
            r"shape \(1, 2, 2, 16\) of other tokens or heads, and \(2, 2, 2, 16\) is needed",
        ),
    ):
        with pytest.raises(dl.InputError, match=message):
            run(lens, dl.Patch(at, source))
    later = run(lens, record=dl.at(block=1, step=1), num_inference_steps=3)
    with pytest.raises(
        dl.InputError, match=r"the donor is at sigma 0.7511 \(timestep 751.*\) at step 1, and this run at 0.8577"
    ):
        run(lens, dl.Patch(dl.at(block=1, step=1), later.activations))
    solver = tiny_pipeline()
    solver.scheduler = _heun(solver.scheduler)
    with pytest.raises(
        dl.InputError, match=r"donor ran with a FlowMatchEuler.*, and this run has a FlowMatchHeun.*; use the same"
    ):
        run(dl.wrap(solver, engine="hooks"), dl.Patch(dl.at(block=1, step=0), donor))


def _heun(scheduler: Any) -> Any:
    from diffusers import FlowMatchHeunDiscreteScheduler

    return FlowMatchHeunDiscreteScheduler.from_config(scheduler.config)


def test_a_donors_prompt_length_counts_where_the_text_is_read(lens: dl.Lens) -> None:
    record = [dl.at(block=1, step=0, site=["cross_attn", "resid"])]
    longer = run(lens, record=record, max_sequence_length=12)
    assert longer.text_tokens == 12
    with pytest.raises(
        dl.InputError, match=r"at block 1, step 0.*: the donor read 12 text tokens, and this run 16; run the donor"
    ):
        run(lens, dl.Patch(dl.at(block=1, step=0, site="cross_attn"), longer))
    assert run(lens, dl.Patch(dl.at(block=1, step=0), longer)).fired == {0: 2}


@pytest.mark.parametrize("wrong", [3, "run", [], [torch.zeros(1)], None])
def test_only_runs_are_donors_and_pools(wrong: object) -> None:
    with pytest.raises(dl.InputError, match=r"activations come from a Run that recorded them, or from its .activations"):
        Pool(wrong)


@pytest.mark.parametrize("wrong", [[3], 5, "Zero", [dl.at()], [dl.Zero], [dl.Zero.__new__(dl.Zero)]])
def test_only_edits_are_edits(wrong: Any) -> None:
    if isinstance(wrong, list) and isinstance(wrong[0], dl.Zero):
        object.__setattr__(wrong[0], "at", 6)
    with pytest.raises(dl.InputError, match=r"edits= takes edits such as dl.Zero\(dl.at\(...\)\), or a list of them, and not"):
        as_edits(wrong)


def test_an_edit_without_apply_says_what_to_write(lens: dl.Lens) -> None:
    with pytest.raises(NotImplementedError, match=r"Edit needs a method apply\(self, activation, moment\)"):
        run(lens, dl.Edit(dl.at(block=0)))


def test_an_edit_that_never_fired_is_an_error(lens: dl.Lens) -> None:
    def stop(pipe: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    edits = [dl.Zero(dl.at(block=0)), dl.Zero(dl.at(block=1, step=3))]
    with pytest.raises(
        dl.InputError, match=r"edits\[1\], Zero\(at\(block=1, step=3\)\), never fired: the run ended before .* 2 places"
    ):
        run(lens, *edits, callback_on_step_end=stop)
    assert run(lens, edits[0], callback_on_step_end=stop).fired == {0: 4}


@pytest.mark.parametrize(
    ("first", "second", "excluded"),
    [
        ({}, {}, True),
        ({"frames": 0}, {"frames": 1}, False),
        ({"frames": 0}, {"tokens": MASK}, True),
        ({"tokens": MASK}, {"tokens": ~MASK}, False),
        ({"branch": "cond"}, {"branch": "uncond"}, False),
        ({"block": 0}, {"block": [0, 2]}, True),
        ({"step": [0, 1]}, {"step": 2}, False),
        ({"site": "update"}, {"site": "resid"}, True),
        ({"site": "update", "frames": 0}, {"site": "resid", "frames": 1}, False),
        ({"site": "q", "head": 0}, {"site": "q", "head": 1}, False),
        ({"site": "q", "head": 0}, {"site": "q"}, True),
        ({"site": "q"}, {"site": "k"}, False),
    ],
)
def test_two_replacements_of_the_same_tokens_are_refused(lens: dl.Lens, first: Any, second: Any, excluded: bool) -> None:
    edits = [dl.Zero(dl.at(**{"block": 1, **first})), dl.Zero(dl.at(**{"block": 1, **second}))]
    if not excluded:
        assert all(run(lens, *edits).fired.values())
        return
    with pytest.raises(
        dl.InputError, match=r"edits\[1\], Zero\(.*, would undo edits\[0\], .*: both replace the same tokens at block"
    ):
        run(lens, *edits)
    between = [edits[0], dl.Steer(edits[1].at, torch.ones(1))]
    assert all(run(lens, *between).fired.values()), "an edit that builds on the one before is no replacement"


def test_what_is_inside_a_skipped_block_is_refused(lens: dl.Lens) -> None:
    skip = dl.Skip(dl.at(block=1, step=[0, 1]))
    inside = dl.Zero(dl.at(block=1, step=1, site="mlp", branch="cond"))
    with pytest.raises(
        dl.InputError,
        match=r"Zero\(at\(.*\)\) is inside a block that Skip\(at\(block=1, step=\[0, 1\]\)\) leaves out, at block 1, step 1",
    ):
        run(lens, inside, skip)
    with pytest.raises(
        dl.InputError, match=r"record at\(site='attn'\) is inside a block .* choose other blocks, steps or branches"
    ):
        run(lens, skip, record=dl.at(site="attn"))
    with pytest.raises(dl.InputError, match=r"KnockoutAttention\(.*\) is inside a block"):
        run(lens, skip, dl.KnockoutAttention(dl.at(site="attn")))
    fine = run(lens, skip, dl.Zero(dl.at(block=1, step=2, site="mlp")), record=[dl.at(), dl.at(site="attn", step=3)])
    assert fine.fired == {0: 4, 1: 2}


def test_a_run_inside_an_edit_is_refused(lens: dl.Lens) -> None:
    with pytest.raises(RuntimeError, match="cannot run inside a reducer, sink or edit"):
        run(lens, Give(dl.at(block=0), lambda activation: run(lens)))
    untouched(lens.pipe)


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


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


def test_order_is_the_order_given_for_any_pair_of_places(lens: dl.Lens) -> None:
    """Every edit sees what the one before it at its site left, whatever else is edited in between."""
    seen: list[dict[dl.Cell, Tensor]] = [{}, {}, {}]
    where = dl.at(block=1, site="mlp", step=0, branch="cond")
    keeps = [Keep(where, cells) for cells in seen]
    run(lens, keeps[0], Double(where), dl.Zero(dl.at(block=0)), keeps[1], dl.Steer(where, ONES), keeps[2])
    first, second, third = (next(iter(cells.values())) for cells in seen)
    assert torch.equal(second, 2 * first)
    assert torch.equal(third, second + 1)
