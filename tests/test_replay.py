"""Reused work: stored answers and single calls give the bits that the whole computation gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BLOCKS, arguments, picture, tiny_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

import dit_lens as dl
from dit_lens.calls import LATENTS
from dit_lens.taps import Bypass, Tap

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 4
SCHEDULERS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


def batch(pipe: Any) -> dict[str, Any]:
    """Arguments for two prompts with two seeds each."""
    several: dict[str, Any] = {"prompt": ["walk the maze", "draw the red circle"], "seed": [3, 4]}
    if isinstance(pipe, WanImageToVideoPipeline):
        several["image"] = [picture((200, 30, 30)), picture((20, 30, 200))]
    return arguments(pipe, **several)


def pipelines() -> list[Any]:
    """One expert and two, two families of schedulers, image and text."""
    return [
        pytest.param((WanImageToVideoPipeline, 1, "Euler"), id="image one expert Euler"),
        pytest.param((WanImageToVideoPipeline, 2, "UniPC"), id="image two experts UniPC"),
        pytest.param((WanPipeline, 2, "Euler"), id="text two experts Euler"),
    ]


@pytest.fixture(params=pipelines())
def pipe(request: pytest.FixtureRequest) -> Any:
    """Each kind of pipeline in turn."""
    kind, experts, scheduler = request.param
    return tiny_pipeline(kind, experts, scheduler=SCHEDULERS[scheduler]())


def assert_same(one: dl.Run, other: dl.Run, steps: int = STEPS) -> None:
    """Bit-equal trajectories over the steps."""
    assert torch.equal(one.latents[: steps + 1], other.latents[: steps + 1])
    assert one.timesteps[:steps] == other.timesteps[:steps]
    for branch in one.outputs:
        assert torch.equal(one.outputs[branch][:steps], other.outputs[branch][:steps])


def counted(pipe: Any) -> tuple[list[tuple[str, int]], Any]:
    """A list that every execution of a block is added to as (expert, block), and what ends that."""
    ran: list[tuple[str, int]] = []
    handles = []
    for expert in ("transformer", "transformer_2"):
        for index, block in enumerate(getattr(getattr(pipe, expert), "blocks", ())):
            # The self-attention, as the hooks of a block run around its bypass too.
            note = lambda *_, place=(expert, index): ran.append(place)  # noqa: E731
            handles.append(block.attn1.register_forward_hook(note))
    return ran, lambda: [handle.remove() for handle in handles]


def test_stored_answers_stand_in_for_the_denoiser(pipe: Any, engine: str) -> None:
    lens = dl.wrap(pipe, engine=engine)
    inputs = batch(pipe)
    run = lens.run(**inputs, record=dl.at(step=[2, 3]), decode=False)
    answers = {**run.answers(before=2), (2, "uncond"): run.velocity(2, "uncond")}
    ran, stop = counted(pipe)
    again = lens.run(**inputs, answers=answers, record=dl.at(step=3), decode=False)
    stop()
    assert_same(again, run)
    assert len(ran) == 3 * BLOCKS, "one call at step 2, two at step 3"
    assert again.branches == run.branches
    assert again.experts == run.experts
    for entry in again.activations:
        assert torch.equal(entry.tensor, run.activation(entry.cell.block, entry.cell.step, entry.cell.branch))
    assert "forward" not in vars(pipe.transformer) or engine == "nnsight"
    assert_same(lens.run(**inputs, decode=False), run)
    assert_same(lens.run(**inputs, answers=run.answers(), decode=False), run)


def test_blocks_resume_from_stored_streams(pipe: Any, engine: str) -> None:
    lens = dl.wrap(pipe, engine=engine)
    inputs = batch(pipe)
    run = lens.run(**inputs, record=dl.at(), decode=False)
    answers: dict[tuple[int, str], Any] = run.answers(before=1)
    for step, branch, block in [(1, "cond", 2), (1, "uncond", 1), (2, "cond", BLOCKS), (3, "uncond", 2)]:
        answers[step, branch] = dl.Resume(block, run.activation(block - 1, step, branch))
    ran, stop = counted(pipe)
    seen = dl.at(block=BLOCKS - 1, step=[1, 3])
    again = lens.run(**inputs, answers=answers, record=seen, decode=False)
    stop()
    assert_same(again, run)
    assert len(ran) == (6 * BLOCKS) - 2 - 1 - BLOCKS - 2
    for entry in again.activations:
        assert torch.equal(entry.tensor, run.activation(BLOCKS - 1, entry.cell.step, entry.cell.branch))


def test_a_run_stops_where_it_is_told_to(pipe: Any, engine: str) -> None:
    lens = dl.wrap(pipe, engine=engine)
    inputs = batch(pipe)
    run = lens.run(**inputs, decode=False)
    for until in (0, 2, STEPS - 1):
        part = lens.run(**inputs, until=until, record=dl.at(block=0, step=until), decode=False)
        assert part.steps == until + 1
        assert part.latents.shape[0] == until + 2
        assert_same(part, run, until + 1)
    assert pipe._current_timestep is None
    assert_same(lens.run(**inputs, decode=False), run)


def test_a_call_made_again_gives_the_same_bits(pipe: Any, engine: str) -> None:
    lens = dl.wrap(pipe, engine=engine)
    run = lens.run(**batch(pipe), record=dl.at(), keep_calls=True, decode=False)
    assert list(run.calls) == [(step, branch) for step in range(STEPS) for branch in ("cond", "uncond")]
    for (step, branch), call in run.calls.items():
        assert (call.expert, call.timestep) == (run.experts[step], run.timesteps[step])
        plain = lens.replay(call)
        assert torch.equal(plain.velocity, run.velocity(step, branch))
        assert torch.equal(plain.x0_hat, run.x0_hat(step, branch))
        assert not plain.velocity.requires_grad
        recorded = lens.replay(call, record=dl.at(block=[0, 2], site=["resid", "heads"]))
        assert torch.equal(recorded.velocity, run.velocity(step, branch))
        assert len(recorded.activations) == 4
        assert torch.equal(recorded.activations.one(block=2, site="resid"), run.activation(2, step, branch))
        cell = recorded.activations.cells[0]
        assert (cell.step, cell.branch, cell.expert, cell.timestep) == (step, branch, call.expert, call.timestep)
        for block in (1, BLOCKS):
            ran, stop = counted(pipe)
            resumed = lens.replay(call, resume=dl.Resume(block, run.activation(block - 1, step, branch)))
            stop()
            assert torch.equal(resumed.velocity, run.velocity(step, branch))
            assert ran == [(call.expert, index) for index in range(block, BLOCKS)]


def test_half_precision_is_served_as_it_was(engine: str) -> None:
    pipe = tiny_pipeline(WanPipeline, 2).to(torch.bfloat16)
    lens = dl.wrap(pipe, engine=engine)
    run = lens.run(**batch(pipe), record=dl.at(block=1), keep_calls=True, decode=False)
    assert run.velocity(1, "cond").dtype == torch.bfloat16
    answers: dict[tuple[int, str], Any] = run.answers(before=2)
    answers[2, "cond"] = dl.Resume(2, run.activation(1, 2, "cond"))
    assert_same(lens.run(**batch(pipe), answers=answers, decode=False), run)
    for place, call in run.calls.items():
        assert torch.equal(lens.replay(call).velocity, run.velocity(*place))


def test_an_edit_does_in_a_replay_what_it_does_in_the_run(image_pipe: Any, engine: str) -> None:
    """The same taps and bypasses, in a whole run by hand and in one call."""
    lens = dl.wrap(image_pipe, engine=engine)
    run = lens.run(**batch(image_pipe), keep_calls=True, decode=False)
    taps = [Tap("transformer", 1, "resid", lambda tensor: 2 * tensor)]
    skip = [Bypass("transformer", 2, lambda streams: streams)]
    denoiser = image_pipe.transformer
    call = run.calls[2, "cond"]
    with torch.no_grad():
        doubled = denoiser.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)
        skipped = denoiser.blocks[2].register_forward_hook(lambda module, args, output: args[0])
        expected = denoiser(**call.kwargs)[0]
        doubled.remove()
        skipped.remove()
    assert torch.equal(lens.replay(call, taps=taps, bypasses=skip).velocity, expected)
    assert not torch.equal(expected, run.velocity(2, "cond"))
    assert torch.equal(lens.replay(call).velocity, run.velocity(2, "cond")), "nothing stays"


@pytest.mark.parametrize("start", [None, 1, 2])
def test_gradients_of_every_stream_come_from_one_call(image_pipe: Any, engine: str, start: int | None) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    run = lens.run(**batch(image_pipe), record=dl.at(), keep_calls=True, decode=False)
    call = run.calls[1, "cond"]
    streams: dict[int, Tensor] = {}
    blocks = range(start or 0, BLOCKS)
    taps = [Tap("transformer", block, "resid", lambda tensor, block=block: streams.update({block: tensor})) for block in blocks]
    resume = None if start is None else dl.Resume(start, run.activation(start - 1, 1, "cond"))
    live = lens.replay(call, taps=taps, resume=resume, gradients=True)
    assert torch.equal(live.velocity, run.velocity(1, "cond"))
    direction = torch.randn(live.velocity.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((live.velocity * direction).sum(), [streams[block] for block in blocks])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in image_pipe.transformer.parameters())
    for block, grad in zip(blocks, grads, strict=True):
        change = 1e-2 * torch.randn(grad.shape, generator=torch.Generator().manual_seed(6))
        moved = [Tap("transformer", block, "resid", lambda tensor, by=sign * change: tensor + by) for sign in (1, -1)]
        up, down = (lens.replay(call, taps=[tap]).velocity for tap in moved)
        assert torch.allclose((((up - down) / 2) * direction).sum(), (grad * change).sum(), rtol=2e-2, atol=1e-4)


def test_gradients_reach_the_latents_or_streams_of_the_caller(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    run = lens.run(**batch(image_pipe), record=dl.at(), keep_calls=True, decode=False)
    call = run.calls[1, "cond"]
    live = lens.replay(call, gradients=True)
    (grad,) = torch.autograd.grad(live.velocity.sum(), [live.call.taken])
    assert grad.shape == call.kwargs[LATENTS].shape
    assert grad.abs().sum() > 0
    assert not call.taken.requires_grad
    mine = run.activation(0, 1, "cond").requires_grad_()
    lens.replay(call, resume=dl.Resume(1, mine), gradients=True).velocity.sum().backward()
    assert mine.grad is not None
    assert mine.grad.abs().sum() > 0


def test_replays_record_only_what_the_call_has(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    run = lens.run(**arguments(image_pipe), record=dl.at(), keep_calls=True, decode=False)
    call = run.calls[1, "cond"]
    assert lens.replay(call, record=dl.at(step=-3, sigma=(0.0, 1.1))).activations.cells[0].step == 1
    for selector in (dl.at(step=2), dl.at(branch="uncond")):
        with pytest.raises(dl.InputError, match="selects nothing"):
            lens.replay(call, record=selector)
    resume = dl.Resume(2, run.activation(1, 1, "cond"))
    assert torch.equal(
        lens.replay(call, record=dl.at(block=1), resume=resume).activations.one(block=1), run.activation(1, 1, "cond")
    )
    with pytest.raises(dl.InputError, match=r"block 0 does not run at step 1, cond, .* there is no resid"):
        lens.replay(call, record=dl.at(block=0), resume=resume)
    with pytest.raises(dl.InputError, match=r"block 1 does not run at step 1, cond, .* there is no update"):
        lens.replay(call, record=dl.at(block=1, site="update"), resume=resume)


def test_what_cannot_be_reused_is_refused(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    inputs = arguments(image_pipe)
    run = lens.run(**inputs, record=dl.at(), keep_calls=True, decode=False)
    velocity, stream = run.velocity(0, "cond"), run.activation(1, 0, "cond")

    def refused(message: str, **more: Any) -> None:
        with pytest.raises(dl.InputError, match=message):
            lens.run(**inputs, **{"decode": False, **more})

    refused(r"holds one for step 4, 'cond', .* 4 steps \(0 to 3\) and the branches cond, uncond", answers={(4, "cond"): velocity})
    refused("holds one for step 0, 'guided'", answers={(0, "guided"): velocity})
    refused(
        r"has shape \(2, 4, 2, 4, 4\), and the denoiser takes .* \(1, 12, 2, 4, 4\)",
        answers={(0, "cond"): velocity.repeat(2, 1, 1, 1, 1)},
    )
    refused("cannot resume at block 4: there are 3 blocks, write 1 to 3", answers={(0, "cond"): dl.Resume(4, stream)})
    refused("the streams visual are needed, not text", answers={(0, "cond"): dl.Resume(2, {"text": stream})})
    refused(r"block 2 takes a stream of shape \(1, 8, 16\)", answers={(0, "cond"): dl.Resume(2, stream[:, 1:])})
    refused("block 0 does not run at step 0, cond", answers={(0, "cond"): velocity}, record=dl.at(block=0))
    refused("until=4 is no step of this run; write 0 to 3", until=4)
    refused("ends before there is a video; write decode=False", until=1, decode=True)
    refused("matched nothing: the run ended before", until=1, record=dl.at(step=3))
    assert torch.equal(lens.run(**inputs, decode=False).latents, run.latents), "nothing is left behind"
    call = run.calls[1, "cond"]
    call.kwargs[LATENTS].add_(0)
    with pytest.raises(dl.InputError, match="something wrote into the tensors of the call at step 1, cond"):
        lens.replay(call)


def test_calls_are_kept_when_asked_for_and_not_saved(image_pipe: Any, tmp_path: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    run = lens.run(**arguments(image_pipe), keep_calls=True, decode=False)
    assert run.calls[0, "cond"].kwargs[LATENTS] is not None
    shared = {run.calls[0, branch].taken.data_ptr() for branch in run.branches}
    assert len(shared) == 1, "the branches of a step share their latents"
    run.save(tmp_path)
    assert not dl.Run.load(tmp_path).calls
    assert not lens.run(**arguments(image_pipe), decode=False).calls
