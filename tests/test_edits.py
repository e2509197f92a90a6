"""Every edit does what it says: known answers, at every site, on both engines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH, arguments, tiny_pipeline
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.architectures import WAN

STEPS = 4
SITES = [site.name for site in WAN.sites if not site.read_only]
PER_HEAD = [site.name for site in WAN.sites if site.per_head]
OTHER = {"prompt": "draw the red circle"}
MASK = torch.tensor([[True, False], [False, True]])


@dataclass(frozen=True)
class Double(dl.Edit):
    """What the docs show as an edit of one's own."""

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        return 2 * activation


@dataclass(frozen=True, eq=False)
class Keep(dl.Edit):
    """Changes nothing, and keeps what it saw."""

    seen: dict[dl.Cell, Tensor]

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        self.seen[moment.cell] = activation.clone()
        return activation


@pytest.fixture
def lens(image_pipe: Any, engine: str) -> dl.Lens:
    return dl.wrap(image_pipe, engine=engine)


def run(lens: dl.Lens, *edits: Any, **changes: Any) -> dl.Run:
    """A run without a video."""
    return lens.run(**{**arguments(lens.pipe), "seed": 3, "decode": False, "edits": edits, **changes})


def same(ours: dl.Run, theirs: dl.Run) -> bool:
    """Whether two runs agree in every bit of latents, outputs and activations."""
    pairs = zip(ours.activations, theirs.activations, strict=True)
    return (
        torch.equal(ours.latents, theirs.latents)
        and all(torch.equal(ours.outputs[name], theirs.outputs[name]) for name in ours.outputs)
        and all(a.cell == b.cell and torch.equal(a.tensor, b.tensor) for a, b in pairs)
    )


def edits_for(site: str, donor: dl.Run, pool: list[dl.Run], seen: dict[dl.Cell, Tensor]) -> list[dl.Edit]:
    """One edit of each kind, each at cells of its own and after a `Keep`; in turn of all tokens, of frames, of single ones."""
    width = WIDTH // 2 if site in PER_HEAD else WIDTH
    parts: list[dict[str, Any]] = [{}, {"frames": 1}, {"tokens": MASK}]
    makers: list[Any] = [
        lambda at: dl.Patch(at, donor),
        dl.Zero,
        lambda at: dl.Mean(at, pool),
        lambda at: dl.Resample(at, pool, seed=1),
        lambda at: dl.Steer(at, torch.arange(width) / width, scale=0.5),
        lambda at: dl.AddNoise(at, dose=0.3, seed=5),
        dl.Average,
        lambda at: dl.Average(at, to=1),
        Double,
    ]
    edits: list[dl.Edit] = []
    for index, make in enumerate(makers):
        # Early blocks last, so that every kind acts on streams that others have changed.
        where = {"block": BLOCKS - 1 - index % BLOCKS, "step": index // BLOCKS, **parts[index % 3 if index != 1 else 0]}
        if site in PER_HEAD and index % 2:
            where["head"] = 1
        selector = dl.at(site=site, **where)
        edits += [Keep(dl.at(site=site, block=where["block"], step=where["step"]), seen), make(selector)]
    return edits


@cache
def prepared(kind: type, experts: int) -> tuple[dl.Lens, dl.Lens, list[dl.Run]]:
    """One pipeline under both engines, and two donors that recorded everything."""
    pipe = tiny_pipeline(kind, experts)
    hooks, traced = (dl.wrap(pipe, engine=engine) for engine in ("hooks", "nnsight"))
    record = dl.at(site=SITES)
    return traced, hooks, [run(traced, record=record, seed=[7, 8], **OTHER), run(traced, record=record, seed=9)]


@pytest.mark.parametrize("kind", [(WanImageToVideoPipeline, 1), (WanPipeline, 2)], ids=["one expert", "two experts"])
@pytest.mark.parametrize("site", SITES)
def test_both_engines_agree_and_the_rest_keeps_its_bits(site: str, kind: tuple[type, int]) -> None:
    traced, hooks, pool = prepared(*kind)
    seen: dict[dl.Cell, Tensor] = {}
    edits = edits_for(site, pool[0], pool, seen)
    ours, theirs = (run(lens, *edits, record=dl.at(site=site), seed=[3, 4]) for lens in (traced, hooks))
    assert same(ours, theirs)
    assert ours.fired == theirs.fired == dict.fromkeys(range(len(edits)), 2)
    for index, edit in enumerate(edits):
        if isinstance(edit, Keep):
            continue
        for cell in (cell for cell in seen if (cell.block, cell.step) == (edit.at.block, edit.at.step)):
            before = seen[cell]
            after = ours.activation(block=cell.block, step=cell.step, branch=cell.branch, site=site)
            places = edit.at.places(before.shape[1:-1]).flatten()
            touched = torch.zeros(before.shape[1:-1].numel(), dtype=torch.bool)
            touched[places] = True
            flat = [tensor.flatten(1, -2) for tensor in (before, after)]
            assert torch.equal(flat[0][:, ~touched], flat[1][:, ~touched]), (index, cell)
            assert not torch.equal(flat[0][:, touched], flat[1][:, touched]), (index, cell)


def test_an_edit_of_ones_own_may_change_in_place(lens: dl.Lens) -> None:
    @dataclass(frozen=True)
    class Erase(dl.Edit):
        def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
            assert activation.shape == (2, 2, 2, 2, WIDTH)
            assert (moment.seeds, moment.prompts, moment.rows) == ((3, 4), (0, 0), 2)
            assert moment.layout == dl.Layout(2, 2, 2)
            return activation.zero_()

    where = dl.at(block=1, step=2, site="update")
    record = dl.at(block=[0, 1], step=2)
    ours, theirs = (run(lens, kind(where), seed=[3, 4], record=record) for kind in (Erase, dl.Zero))
    assert same(ours, theirs)
    assert torch.equal(ours.activation(block=0), ours.activation(block=1))


@pytest.mark.parametrize(("site", "path"), [("attn", "attn1.to_out.0"), ("cross_attn", "attn2.to_out.0"), ("mlp", "ffn.net.2")])
def test_zero_is_a_module_with_zero_weights(lens: dl.Lens, site: str, path: str) -> None:
    zeroed = run(lens, dl.Zero(dl.at(block=1, site=site)))
    layer = lens.pipe.transformer.blocks[1].get_submodule(path)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert same(zeroed, run(lens))


def test_a_patch_of_a_run_with_itself_changes_no_bit(lens: dl.Lens) -> None:
    donor = run(lens, record=dl.at(site=SITES))
    sites = [site for site in SITES if site != "update"]
    edits = [dl.Patch(dl.at(site=sites), donor.activations), dl.PatchUpdate(dl.at(site="update", step=2), donor)]
    assert same(run(lens, edits[0], record=dl.at(site=["resid", "update"])), run(lens, record=dl.at(site=["resid", "update"])))
    assert same(run(lens, edits[1], record=dl.at(site=["resid", "update"])), run(lens, record=dl.at(site=["resid", "update"])))


def test_the_last_stream_of_a_donor_gives_its_velocity(lens: dl.Lens) -> None:
    donor = run(lens, record=dl.at(block=-1), seed=9, **OTHER)
    edit = dl.Patch(dl.at(block=-1), donor)
    assert same(run(lens, edit, record=dl.at(block=-1), seed=9), donor)
    patched, several = run(lens, edit, seed=3), run(lens, edit, seed=[3, 4])
    for name in ("cond", "uncond", "guided"):
        assert torch.equal(patched.outputs[name], donor.outputs[name])
        assert torch.allclose(several.outputs[name], donor.outputs[name].expand_as(several.outputs[name]), atol=1e-5)
    assert not torch.equal(patched.latents, donor.latents)


def test_a_patch_of_an_update_adds_to_the_runs_own_stream(lens: dl.Lens) -> None:
    donor = run(lens, record=dl.at(block=1, step=1, site="update"), **OTHER)
    edit = dl.PatchUpdate(dl.at(block=1, step=1, branch="cond", site="update"), donor)
    patched = run(lens, edit, record=dl.at(block=[0, 1], step=1, branch="cond"))
    expected = patched.activation(block=0) + donor.activation(branch="cond", site="update")
    assert torch.equal(patched.activation(block=1), expected)
    assert patched.fired == {0: 1}


@pytest.mark.parametrize("part", [{"frames": 1}, {"tokens": MASK}, {"frames": 0, "tokens": MASK}])
def test_a_donor_may_hold_just_the_selection(lens: dl.Lens, part: dict[str, Any], tmp_path: Path) -> None:
    where = dl.at(block=1, step=[0, 2], **part)
    whole, some = (run(lens, record=record, **OTHER) for record in (dl.at(block=1), where))
    some.save(tmp_path)
    patched = [run(lens, dl.Patch(where, donor), record=dl.at()) for donor in (whole, some, dl.Run.load(tmp_path))]
    assert same(patched[0], patched[1])
    assert same(patched[0], patched[2])


def test_skipping_is_a_block_that_hands_on_what_it_takes(lens: dl.Lens) -> None:
    skipped = run(lens, dl.Skip(dl.at(block=1)), record=dl.at(site=["resid", "update"], block=1))
    assert skipped.fired == {0: STEPS * 2}
    assert all(not entry.tensor.any() for entry in skipped.activations if entry.cell.site == "update")
    once = run(lens, dl.Skip(dl.at(block=1, step=2, branch="uncond")))
    assert torch.equal(once.latents[:3], run(lens).latents[:3])
    assert not torch.equal(once.latents[3], run(lens).latents[3])

    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
            return hidden_states

    lens.pipe.transformer.blocks[1] = Nothing()
    assert torch.equal(skipped.latents, run(dl.wrap(lens.pipe, engine="hooks")).latents)


def test_a_skipped_block_can_be_written_to(lens: dl.Lens) -> None:
    where: dict[str, Any] = {"block": 1, "step": 1}
    edits = [dl.Skip(dl.at(**where)), dl.Steer(dl.at(**where), torch.ones(WIDTH))]
    edited = run(lens, *edits, record=dl.at(block=[0, 1], step=1, branch="cond"))
    assert torch.equal(edited.activation(block=1), edited.activation(block=0) + 1)


@pytest.mark.parametrize("site", ["resid", "heads"])
def test_the_dose_of_noise_is_measured_right(lens: dl.Lens, site: str) -> None:
    where = dl.at(block=1, step=[0, 2], site=site, frames=1)
    clean, none, noisy = (
        run(lens, *edits, record=dl.at(block=1, site=site), seed=[3, 4])
        for edits in ([], [dl.AddNoise(where, dose=0)], [dl.AddNoise(where, dose=0.25, seed=2)])
    )
    assert same(clean, none)
    before, after = (one.activation(step=0, site=site)[:, 1] for one in (clean, noisy))
    dose = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert torch.allclose(dose, torch.tensor(0.25), atol=1e-5)
    alone = run(lens, dl.AddNoise(where, dose=0.25, seed=2), record=dl.at(block=1, site=site), seed=4)
    change = alone.activation(step=0, site=site)[0] - clean.activation(step=0, site=site)[1]
    assert torch.allclose(change[1], (after - before)[1], atol=1e-5), "a row's noise does not depend on its neighbours"
    assert not torch.allclose((after - before)[0], (after - before)[1], atol=1e-2)


def test_averages_go_to_all_rows_of_a_prompt_or_to_one(lens: dl.Lens) -> None:
    where, record = dl.at(block=1, step=1, branch="cond"), dl.at(block=1, step=1, branch="cond")
    inputs = {"prompt": ["walk the maze", "draw the circle"], "seed": [3, 4, 5], "record": record}
    clean, everyone, one = (run(lens, *edits, **inputs) for edits in ([], [dl.Average(where)], [dl.Average(where, to=2)]))
    means = clean.activation().unflatten(0, (2, 3)).mean(dim=1)
    found = everyone.activation().unflatten(0, (2, 3))
    assert torch.allclose(found, means[:, None].expand_as(found), atol=1e-6)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(one.activation()[[2, 5]], everyone.activation()[[2, 5]])
    others = [0, 1, 3, 4]
    assert torch.equal(one.latents[:, others], clean.latents[:, others])
    single = run(lens, record=record)
    assert same(run(lens, dl.Average(where), record=record), single)


def test_means_and_draws_are_over_the_rows_of_a_pool(lens: dl.Lens) -> None:
    where: dict[str, Any] = {"block": [0, 2], "step": 1, "branch": "cond"}
    record = dl.at(**where)
    one = run(lens, record=record, **OTHER)
    assert same(run(lens, dl.Mean(record, one), record=record), run(lens, dl.Patch(record, one), record=record))
    pool = [run(lens, record=record, seed=[11, 12, 13], **OTHER), one]
    rows = {block: torch.cat([member.activation(block=block) for member in pool]) for block in (0, 2)}
    mean = run(lens, dl.Mean(record, pool), record=record, seed=[3, 4])
    assert torch.allclose(mean.activation(block=2), rows[2].mean(dim=0).expand(2, -1, -1, -1, -1), atol=1e-6)
    drawn = run(lens, dl.Resample(record, pool, seed=1), record=record, seed=list(range(8)))
    choice = {
        block: [[torch.equal(row, other) for other in rows[block]].index(True) for row in drawn.activation(block=block)]
        for block in (0, 2)
    }
    assert choice[0] == choice[2], "one row of the pool at all cells"
    assert len(set(choice[0])) > 1
    again = run(lens, dl.Resample(record, pool, seed=1), record=record, seed=5)
    assert torch.equal(again.activation(block=2)[0], drawn.activation(block=2)[5])


def test_steering_adds_a_direction(lens: dl.Lens) -> None:
    @dataclass(frozen=True)
    class Found:
        vector: Tensor
        scale: float

    direction = torch.linspace(-1, 1, WIDTH)
    where = dl.at(block=0, step=1, branch="cond", frames=1)
    clean = run(lens, record=dl.at(block=0, step=1, branch="cond")).activation()
    for given, scale, expected in ((direction, 2.0, direction * 2), (Found(direction, 3.0), -1.0, direction * -3)):
        steered = run(lens, dl.Steer(where, given, scale), record=dl.at(block=0, step=1, branch="cond")).activation()
        assert torch.equal(steered[:, 1], clean[:, 1] + expected)
        assert torch.equal(steered[:, 0], clean[:, 0])


def test_edits_act_in_the_order_given_and_records_see_what_they_left(lens: dl.Lens) -> None:
    where = dl.at(block=1, step=1, branch="cond")
    steer, double, seen = dl.Steer(where, torch.ones(WIDTH)), Double(where), dict[dl.Cell, Tensor]()
    plain = run(lens, record=where).activation()
    for edits, expected in (([steer, double], 2 * (plain + 1)), ([double, steer], 2 * plain + 1)):
        found = run(lens, Keep(where, seen), *edits, record=where)
        assert torch.equal(found.activation(), expected)
        assert torch.equal(seen[found.activations.cells[0]], plain)
    # Either of stream and update follows from the other, and the order holds across both.
    update = dl.Zero(dl.at(block=1, step=1, branch="cond", site="update"))
    record = dl.at(block=[0, 1], step=1, branch="cond")
    after = run(lens, double, update, record=record)
    assert torch.equal(after.activation(block=1), after.activation(block=0))
    before = run(lens, update, double, record=record)
    assert torch.equal(before.activation(block=1), 2 * before.activation(block=0))


def test_half_precision_stays_half_precision(image_pipe: Any, engine: str) -> None:
    image_pipe.transformer.to(torch.bfloat16)
    lens, where = dl.wrap(image_pipe, engine=engine), dl.at(block=1, step=1)
    donor = run(lens, record=dl.at(block=1, site=["resid", "update"]))
    assert same(run(lens, dl.Patch(where, donor), record=where), run(lens, record=where))
    edits = [dl.AddNoise(where, 0.1), dl.Average(where), dl.Steer(where, torch.ones(WIDTH)), dl.Zero(dl.at(block=0, site="q"))]
    edited = run(lens, *edits, dl.Mean(dl.at(block=1, step=0), [donor, donor]), record=where)
    assert edited.activation(branch="cond").dtype == torch.bfloat16


def test_fired_is_saved(lens: dl.Lens, tmp_path: Path) -> None:
    edited = run(lens, dl.Zero(dl.at(block=[0, 2], step=[0, 3])), dl.ReplaceLatents(1, noise=0))
    edited.save(tmp_path)
    assert dl.Run.load(tmp_path).fired == edited.fired == {0: 8, 1: 1}
    assert run(lens).fired == {}
