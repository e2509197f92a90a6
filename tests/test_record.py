"""Recording: what is kept, what is streamed, how much is too much, and the table that comes out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH, arguments
from torch import Tensor

import dit_lens as dl
from dit_lens.record import as_records

STEPS = 4


@pytest.fixture
def lens(image_pipe: Any) -> dl.Lens:
    return dl.wrap(image_pipe, engine="hooks")


def test_reducers_and_token_selections(lens: dl.Lens) -> None:
    corner = torch.tensor([[True, False], [False, False]])
    run = lens.run(
        **arguments(lens.pipe),
        record=[
            dl.at(block=1),
            dl.Record(dl.at(block=1), dl.norm),
            dl.Record(dl.at(block=1, frames=[1]), dl.frame_mean),
            dl.Record(dl.at(block=1), dl.region_mean(corner)),
            dl.at(block=1, tokens=corner),
            dl.Record(dl.at(block=1), lambda activation, cell: activation[0, 0, 0, 0, :2] + cell.step),
        ],
    )
    whole = run.activation(block=1, step=2, record=0)
    assert whole.shape == (1, 2, 2, 2, WIDTH)
    expected = {
        1: whole.norm(dim=-1),
        2: whole[:, 1:].mean(dim=(2, 3)),
        3: whole[:, :, 0, 0],
        4: whole[:, :, 0, 0],
        5: whole[0, 0, 0, 0, :2] + 2,
    }
    for record, value in expected.items():
        assert torch.allclose(run.activation(block=1, step=2, record=record), value, atol=1e-6), record
    table = run.activations.to_pandas()
    assert list(table.columns[:9]) == [*("expert", "step", "sigma", "timestep", "branch", "block", "depth", "site", "stream")]
    assert set(table["reduce"]) == {"full", "norm", "frame_mean", "region_mean", "<lambda>"}
    assert len(table) == 6 * STEPS * 2
    assert len(run.activations.cells) == STEPS * 2


def test_updates_add_up_to_the_stream(lens: dl.Lens) -> None:
    run = lens.run(**arguments(lens.pipe), record=dl.at(site=["resid", "update"], branch="uncond"))
    for step in range(STEPS):
        parts = [run.activation(block, step, "uncond", site="update") for block in range(1, BLOCKS)]
        total = run.activation(0, step, "uncond") + sum(parts)
        assert torch.allclose(total, run.activation(BLOCKS - 1, step, "uncond"), atol=1e-5)


def test_a_sink_receives_what_is_then_not_kept(lens: dl.Lens) -> None:
    streamed: dict[dl.Cell, Tensor] = {}
    record = [dl.Record(dl.at(block=[0, 2]), dl.norm, sink=streamed.__setitem__), dl.at(block=1, step=0)]
    run = lens.run(**arguments(lens.pipe), record=record)
    assert len(run.activations) == 2
    kept = lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(block=[0, 2]), dl.norm))
    assert list(streamed) == kept.activations.cells
    for cell, tensor in streamed.items():
        assert torch.equal(tensor, kept.activation(block=cell.block, step=cell.step, branch=cell.branch))


def test_a_part_of_a_block_output_does_not_keep_all_of_it(lens: dl.Lens) -> None:
    def first_token(activation: Tensor, cell: dl.Cell) -> Tensor:
        return activation[:, 0, 0, 0]

    records = [dl.Record(dl.at(), first_token), dl.at(frames=1), dl.at()]
    for entry in lens.run(**arguments(lens.pipe), record=records).activations:
        assert entry.tensor.untyped_storage().nbytes() == entry.tensor.nbytes, entry


def test_stack_has_leading_axes_for_blocks_and_steps(lens: dl.Lens) -> None:
    run = lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(), dl.norm))
    stacked = run.activations.stack()
    assert stacked.shape == (BLOCKS, STEPS, 1, 2, 2, 2)
    assert torch.equal(stacked[2, 1], run.activation(block=2, step=1))
    some = run.activations.stack(block=[2, 0], step=3, branch="uncond")
    assert some.shape == (2, 1, 1, 2, 2, 2)
    assert torch.equal(some[0, 0], run.activation(block=2, step=3, branch="uncond"))
    with pytest.raises(dl.InputError, match=r"nothing was recorded at branch='cond', site='update'; there is block 0, 1"):
        run.activations.stack(site="update")
    with pytest.raises(dl.InputError, match=r"nothing was recorded at block=7"):
        run.activations.stack(block=[7])


def test_an_activation_must_be_there_and_be_one(lens: dl.Lens) -> None:
    run = lens.run(**arguments(lens.pipe), record=[dl.at(block=[0, 1]), dl.Record(dl.at(block=0, step=0), dl.norm)])
    with pytest.raises(dl.InputError, match=r"nothing was recorded at block=2.*; there is block 0, 1; step"):
        run.activation(block=2, step=0)
    with pytest.raises(dl.InputError, match="name block=, one of 0, 1"):
        run.activation(step=1)
    with pytest.raises(dl.InputError, match=r"2 activations were recorded at .*; name record=, one of 0, 1"):
        run.activation(block=0, step=0)
    assert run.activation(block=0, step=0, record=1).shape == (1, 2, 2, 2)
    nothing = lens.run(**arguments(lens.pipe))
    with pytest.raises(dl.InputError, match="there is nothing"):
        nothing.activation(block=0, step=0)
    assert nothing.activations.to_pandas().empty


def test_stacking_needs_one_shape(lens: dl.Lens) -> None:
    def growing(activation: Tensor, cell: dl.Cell) -> Tensor:
        return activation.flatten()[: 1 + cell.step]

    run = lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(), growing))
    with pytest.raises(dl.InputError, match="different shapes cannot be stacked"):
        run.activations.stack()


@pytest.mark.parametrize("frames", [None, 1])
@pytest.mark.parametrize("site", ["resid", "update"])
@pytest.mark.parametrize("reduce", [dl.full, dl.norm, dl.frame_mean, dl.region_mean(torch.ones(2, 2))])
def test_the_bytes_are_known_before_any_block_has_run(lens: dl.Lens, reduce: Any, site: str, frames: Any) -> None:
    ran: list[int] = []
    handle = lens.pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    record = dl.Record(dl.at(site=site, frames=frames), reduce)
    kept = lens.run(**arguments(lens.pipe), record=record).activations.nbytes
    lens.run(**arguments(lens.pipe), record=record, limit_bytes=kept)
    ran.clear()
    with pytest.raises(dl.InputError, match=r"would keep .*, and the limit is .*limit_bytes="):
        lens.run(**arguments(lens.pipe), record=record, limit_bytes=kept - 1)
    assert not ran
    handle.remove()


def test_a_reducer_of_ones_own_is_measured_at_its_first_result(lens: dl.Lens) -> None:
    calls: list[dl.Cell] = []

    def own(activation: Tensor, cell: dl.Cell) -> Tensor:
        calls.append(cell)
        return activation.half()

    kept = lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(), own)).activations.nbytes
    calls.clear()
    with pytest.raises(dl.InputError, match="would keep"):
        lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(), own), limit_bytes=kept - 1)
    assert len(calls) == 1
    lens.run(**arguments(lens.pipe), record=dl.Record(dl.at(), own, sink=lambda *_: None), limit_bytes=0)


def test_the_run_says_what_it_will_keep(lens: dl.Lens, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dit_lens"):
        lens.run(**arguments(lens.pipe), record=dl.at(block=0))
    assert "recording 8 activations, 8 of them kept: 4.1 kB" in caplog.text


def test_half_precision_is_kept_as_it_is_and_reduced_in_float32(image_pipe: Any) -> None:
    image_pipe.transformer.to(torch.bfloat16)
    lens = dl.wrap(image_pipe, engine="hooks")
    record = [dl.at(block=0, step=0), dl.at(block=0, step=0, site="update"), dl.Record(dl.at(block=0, step=0), dl.norm)]
    run = lens.run(**arguments(image_pipe), record=record)
    dtypes = [run.activation(site=site, record=index).dtype for index, site in enumerate(("resid", "update", "resid"))]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("record", [[3], 5, "block 6", [dl.full]])
def test_only_selectors_and_records_are_recorded(record: Any) -> None:
    with pytest.raises(dl.InputError, match=r"record= takes dl.at\(...\) or dl.Record\(...\), or a list of them"):
        as_records(record)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"block": 3}, "block 3 is out of range: there are 3 blocks"),
        ({"step": 4}, "step 4 is out of range: there are 4 steps"),
        ({"branch": "skip"}, "there is no branch 'skip'"),
        ({"site": "attention"}, "there is no site 'attention'; write one of q, k, v"),
        ({"frames": 2}, "frames 2 is out of range: there are 2 latent frames"),
        ({"tokens": torch.ones(8, 8, dtype=torch.bool)}, r"token mask has shape \(8, 8\)"),
    ],
)
def test_selections_out_of_range_are_refused_and_leave_the_pipeline_alone(
    lens: dl.Lens, selection: dict[str, Any], message: str
) -> None:
    ran: list[int] = []
    handle = lens.pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(dl.InputError, match=message):
        lens.run(**arguments(lens.pipe), record=dl.at(**selection))
    handle.remove()
    assert not ran
    assert "step" not in vars(lens.pipe.scheduler)
