"""The editor: what it refuses and how it says so, what it counts, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import WIDTH, tiny_pipeline
from test_edits import MASK, OTHER, Double, Keep, run, same
from test_tracing import untouched
from torch import Tensor

import dit_lens as dl
from dit_lens.donors import Pool
from dit_lens.editor import as_edits

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
        (
            shorter,
            where,
            r"the donor has another schedule: its 3 sigmas begin with 1, 0.7511, .* 4 of this run with 1, 0.85",
        ),
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
    with pytest.raises(dl.InputError, match=r"the donor is at sigma 0.7511 \(timestep 751.*\) at step 1, and this run at 0.8577"):
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


@pytest.mark.parametrize("resumed", [False, True])
def test_a_call_made_again_is_edited_as_in_the_run(image_pipe: Any, engine: str, resumed: bool) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    clean = run(lens, keep_calls=True, record=dl.at(block=0), seed=[3, 4])
    donor = run(lens, record=dl.at(block=1), seed=[3, 4], **OTHER)
    where = dl.at(block=1, step=2, branch="cond")
    edits = [
        dl.Patch(where, donor),
        dl.AddNoise(where, 0.2),
        dl.Average(dl.at(block=2, step=2, site="mlp"), to=1),
        dl.KnockoutAttention(dl.at(block=1, step=2, site="cross_attn")),
    ]
    edited = run(lens, *edits, record=dl.at(block=2), seed=[3, 4])
    stored = dl.Resume(1, clean.activation(block=0, step=2)) if resumed else None
    again = lens.replay(clean.calls[2, "cond"], record=dl.at(block=2), edits=edits, resume=stored)
    assert torch.equal(again.velocity, edited.velocity(2, "cond"))
    assert torch.equal(again.activations.one(), edited.activation(block=2, step=2))
    skipped = lens.replay(clean.calls[2, "cond"], edits=dl.Skip(dl.at(block=2)))
    assert torch.equal(skipped.velocity, run(lens, dl.Skip(dl.at(block=2, step=2)), seed=[3, 4]).velocity(2, "cond"))
    with pytest.raises(dl.InputError, match=r"at\(step=1\) selects nothing"):
        lens.replay(clean.calls[2, "cond"], edits=dl.Zero(dl.at(step=1)))
    with pytest.raises(dl.InputError, match=r"ReplaceLatents\(step=2, .* is between calls"):
        lens.replay(clean.calls[2, "cond"], edits=dl.ReplaceLatents(2, noise=1))


def test_edits_let_gradients_through(lens: dl.Lens) -> None:
    call = run(lens, keep_calls=True).calls[1, "cond"]
    direction = torch.zeros(WIDTH, requires_grad=True)
    for edit in (dl.Steer(dl.at(block=1, frames=1), direction), dl.Steer(dl.at(block=1), direction)):
        lens.replay(call, edits=edit, gradients=True).velocity.square().sum().backward()
        assert direction.grad is not None
        assert direction.grad.abs().max() > 0
        direction.grad = None


def test_steps_that_are_stored_are_not_edited(lens: dl.Lens) -> None:
    clean, edit = run(lens), dl.Zero(dl.at(block=1, step=2))
    assert same(run(lens, edit, answers=clean.answers(before=2)), run(lens, edit))
    with pytest.raises(dl.InputError, match="block 1 does not run at step 2, cond, for which answers= holds what is stored"):
        run(lens, edit, answers=clean.answers(before=3))
    with pytest.raises(dl.InputError, match="never fired: the run ended before"):
        run(lens, edit, until=1)
    assert torch.equal(run(lens, edit, until=2).outputs["cond"], run(lens, edit).outputs["cond"][:3])


def test_order_is_the_order_given_for_any_pair_of_places(lens: dl.Lens) -> None:
    """Every edit sees what the one before it at its site left, whatever else is edited in between."""
    seen: list[dict[dl.Cell, Tensor]] = [{}, {}, {}]
    where = dl.at(block=1, site="mlp", step=0, branch="cond")
    keeps = [Keep(where, cells) for cells in seen]
    run(lens, keeps[0], Double(where), dl.Zero(dl.at(block=0)), keeps[1], dl.Steer(where, ONES), keeps[2])
    first, second, third = (next(iter(cells.values())) for cells in seen)
    assert torch.equal(second, 2 * first)
    assert torch.equal(third, second + 1)
