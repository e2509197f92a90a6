"""The step clock: every activation is labelled with where it really came from."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, cast

import pytest
import torch
from conftest import BLOCKS, arguments, tiny_pipeline
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.architectures import WAN
from dit_lens.schedule import StepClock, forecast

# Raised inside diffusers, where schedulers hand torch tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 4
SHIFT = 3.0


class StampingBlock(nn.Module):
    """Returns tokens whose channels say which call of which block this was, whatever came in."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.expert = 0.0
        self.call = (0.0, 0.0)

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        stamped = torch.zeros_like(hidden_states)
        stamped[..., :4] = torch.tensor([*self.call, self.expert, self.index])
        return stamped


class StampingTransformer(WanTransformer3DModel):
    """Stamps its timestep, its prompt embedding and its name into the output of every block."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Any, **more: Any):
        for block in cast(list[StampingBlock], self.blocks):
            block.call = (float(timestep[0]), float(encoder_hidden_states.abs().sum()))
        return super().forward(hidden_states, cast(Any, timestep), encoder_hidden_states, *rest, **more)


def stamping_pipeline(kind: type, experts: int) -> Any:
    """A tiny pipeline whose denoisers stamp."""
    pipe = tiny_pipeline(kind, experts)
    for number, (name, denoiser) in enumerate(WAN.denoisers(pipe).items()):
        stamping = remade(StampingTransformer, denoiser)
        blocks = [StampingBlock(index) for index in range(BLOCKS)]
        for block in blocks:
            block.expert = float(number)
        stamping.blocks = nn.ModuleList(blocks)
        pipe.register_modules(**{name: stamping})
    return pipe


def remade(kind: Any, denoiser: Any) -> Any:
    """A denoiser of another class with the same configuration."""
    return kind.from_config(denoiser.config).eval()


def shifted_sigmas(steps: int) -> list[float]:
    """The flow-matching schedule from its formula: even steps from 1 to 1/1000, shifted towards noise."""
    even = [1 - index * (1 - 1 / 1000) / (steps - 1) for index in range(steps)]
    once = [SHIFT * sigma / (1 + (SHIFT - 1) * sigma) for sigma in even]
    last = once[-1]  # diffusers takes the shifted end as its new end, and shifts again
    again = [1 - index * (1 - last) / (steps - 1) for index in range(steps)]
    return [SHIFT * sigma / (1 + (SHIFT - 1) * sigma) for sigma in again]


@pytest.mark.parametrize("engine", ["nnsight", "hooks"])
@pytest.mark.parametrize(("kind", "experts"), [(WanImageToVideoPipeline, 1), (WanImageToVideoPipeline, 2), (WanPipeline, 2)])
def test_every_activation_says_itself_where_it_came_from(kind: type, experts: int, engine: str) -> None:
    pipe = stamping_pipeline(kind, experts)
    inputs = arguments(pipe)
    run = dl.wrap(pipe, engine=engine).run(**inputs, record=dl.at())
    prompts = {"cond": inputs["prompt"], "uncond": inputs["negative_prompt"]}
    sums = {
        branch: float(pipe.encode_prompt(prompt, None, False, max_sequence_length=16)[0].detach().abs().sum())
        for branch, prompt in prompts.items()
    }
    sigmas = shifted_sigmas(STEPS)
    expert_of = [int(experts == 2 and 1000 * sigma < 800) for sigma in sigmas]
    assert len(set(expert_of)) == experts
    assert len(run.activations) == STEPS * 2 * BLOCKS
    for entry, (step, branch, block) in zip(
        run.activations, itertools.product(range(STEPS), prompts, range(BLOCKS)), strict=True
    ):
        cell, expected = entry.cell, [1000 * sigmas[step], sums[branch], expert_of[step], block]
        stamp = entry.tensor[..., :4].reshape(-1, 4)
        assert torch.allclose(stamp, torch.tensor(expected).expand_as(stamp), rtol=1e-4)
        assert (cell.step, cell.branch, cell.block) == (step, branch, block)
        assert cell.expert == ("transformer", "transformer_2")[expert_of[step]]
        assert cell.timestep == float(stamp[0, 0])
        assert cell.sigma == pytest.approx(sigmas[step], rel=1e-4)
        assert cell.depth == block / BLOCKS


class KnowingTransformer(WanTransformer3DModel):
    """Knows a clean sample for each prompt, and returns the velocity that points away from it."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Any, **more: Any):
        sigma = timestep.view(-1, 1, 1, 1, 1) / 1000
        return ((hidden_states[:, :4] - clean_sample(encoder_hidden_states)) / sigma,)


def clean_sample(embeds: Tensor) -> Tensor:
    """A clean sample of shape (batch, 4, 2, 4, 4) that depends on the prompt only."""
    return embeds[:, :8].sum(dim=(1, 2)).view(-1, 1, 1, 1, 1) + torch.linspace(-1, 1, 128).view(1, 4, 2, 4, 4)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_x0_hat_of_each_branch_is_what_its_denoiser_knows(scheduler: type) -> None:
    pipe = tiny_pipeline(scheduler=scheduler(shift=SHIFT))
    pipe.register_modules(transformer=remade(KnowingTransformer, pipe.transformer))
    inputs = arguments(pipe)
    run = dl.wrap(pipe, engine="hooks").run(**inputs, decode=False)
    cond, uncond = (
        clean_sample(pipe.encode_prompt(inputs[name], None, False, max_sequence_length=16)[0].detach())
        for name in ("prompt", "negative_prompt")
    )
    assert (cond - uncond).abs().max() > 0.1
    for step in range(run.steps):
        assert (run.x0_hat(step, "cond") - cond).abs().max() < 1e-5
        assert (run.x0_hat(step, "uncond") - uncond).abs().max() < 1e-5
        guided = uncond + inputs["guidance_scale"] * (cond - uncond)
        assert (run.x0_hat(step) - guided).abs().max() < 1e-4


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        FlowMatchHeunDiscreteScheduler(shift=SHIFT),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    ],
    ids=["Euler", "Heun", "UniPC"],
)
def test_a_forecast_is_what_the_run_then_does(scheduler: Any) -> None:
    pipe = tiny_pipeline(WanPipeline, 2, scheduler=scheduler)
    lens = dl.wrap(pipe, engine="hooks")
    foreseen = lens.forecast(**arguments(pipe))
    run = lens.run(**arguments(pipe), decode=False, record=dl.Record(dl.at(), dl.norm))
    assert run.timesteps == foreseen.timesteps
    assert torch.equal(run.sigmas, torch.tensor(foreseen.sigmas))
    assert run.experts == foreseen.experts
    assert run.branches == foreseen.branches
    assert run.steps == (2 * STEPS - 1 if "Heun" in type(scheduler).__name__ else STEPS)
    assert len(run.activations) == run.steps * 2 * BLOCKS
    assert forecast(pipe, WAN, STEPS, 1.0).branches == ("cond",)


def test_the_trajectory_is_what_went_through_the_scheduler(image_pipe: Any) -> None:
    received: list[tuple[Tensor, Tensor, Tensor]] = []
    step = image_pipe.scheduler.step

    @functools.wraps(step)
    def watching(model_output: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        result = step(model_output, timestep, sample, **more)
        received.append((model_output.clone(), sample.clone(), result[0].clone()))
        return result

    image_pipe.scheduler.step = watching
    run = dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe))
    assert image_pipe.scheduler.step is watching, "a wrapper that was there before is there again"
    assert run.latents.shape == (STEPS + 1, 1, 4, 2, 4, 4)
    for index, (output, sample, result) in enumerate(received):
        assert torch.equal(run.velocity(index), output)
        assert torch.equal(run.latents[index], sample)
        assert torch.equal(run.latents[index + 1], result)
        guided = run.velocity(index, "uncond") + 3.0 * (run.velocity(index, "cond") - run.velocity(index, "uncond"))
        assert torch.equal(guided, output)


def test_without_guidance_there_is_one_branch(image_pipe: Any) -> None:
    run = dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe, guidance_scale=1.0), record=dl.at(block=0))
    assert run.branches == ("cond",)
    assert [cell.branch for cell in run.activations.cells] == ["cond"] * STEPS
    assert torch.equal(run.velocity(2, "cond"), run.velocity(2, "guided"))


def test_the_scheduler_keeps_its_signature(image_pipe: Any) -> None:
    before = inspect.signature(image_pipe.scheduler.step)
    with StepClock(image_pipe, WAN):
        assert inspect.signature(image_pipe.scheduler.step) == before
    assert "step" not in vars(image_pipe.scheduler)


def test_a_branch_is_what_the_pipeline_calls_it(image_pipe: Any) -> None:
    """Whatever the order of the calls, and under the pipeline's own name where it has branches of its own."""
    image_pipe.scheduler.set_timesteps(STEPS)
    seen = []
    with torch.no_grad(), StepClock(image_pipe, WAN) as clock:
        for name in ("uncond", "skip_layer", "cond"):
            with image_pipe.transformer.cache_context(name):
                image_pipe.transformer(**empty_call(image_pipe))
            seen.append(clock.branch)
    assert seen == ["uncond", "skip_layer", "cond"]
    assert set(clock.outputs) == {(0, name) for name in seen}


def empty_call(pipe: Any) -> dict[str, Any]:
    """Arguments for a call of the denoiser by hand, at the first timestep."""
    return {
        "hidden_states": torch.zeros(1, 12, 2, 4, 4),
        "timestep": pipe.scheduler.timesteps[:1],
        "encoder_hidden_states": torch.zeros(1, 16, 8),
    }


def test_unnamed_calls_are_branches_by_their_order(image_pipe: Any) -> None:
    """Some pipelines call their denoiser without naming the branch."""
    image_pipe.scheduler.set_timesteps(STEPS)
    call = empty_call(image_pipe)
    with torch.no_grad(), StepClock(image_pipe, WAN) as clock:
        image_pipe.transformer(**call)
        assert clock.branch == "cond"
        output = image_pipe.transformer(**call).sample
        assert clock.branch == "uncond"
        with pytest.raises(dl.InputError, match="step 0 calls the denoiser more often than Wan has branches"):
            image_pipe.transformer(**call)
        with pytest.raises(RuntimeError, match=r"stepped at timestep .* cannot be labelled"):
            image_pipe.scheduler.step(output, image_pipe.scheduler.timesteps[1], output)
        image_pipe.scheduler.step(output, image_pipe.scheduler.timesteps[0], output)
        image_pipe.transformer(**call)
        assert (clock.step, clock.branch) == (1, "cond")


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}


def rewritten(pipe: Any, rewrite: Any, **changes: Any) -> StepClock:
    """The clock of a run of the pipeline in which `rewrite` is asked for latents."""
    generator = torch.Generator("cpu").manual_seed(0)
    with StepClock(pipe, WAN, rewrite=rewrite) as clock:
        pipe(**arguments(pipe, **changes), generator=generator, output_type="latent")
    assert "prepare_latents" not in vars(pipe)
    return clock


@pytest.mark.parametrize("kind", [WanImageToVideoPipeline, WanPipeline])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=SHIFT), UniPCMultistepScheduler(**UNIPC)])
def test_rewritten_latents_are_what_the_steps_take(kind: type, scheduler: Any) -> None:
    pipe = tiny_pipeline(kind, scheduler=scheduler)
    asked: list[tuple[int, Tensor]] = []
    plain = rewritten(pipe, lambda step, latents: asked.append((step, latents.clone())))
    assert [step for step, _ in asked] == list(range(STEPS))
    assert all(torch.equal(latents, plain.samples[step]) for step, latents in asked)
    for place in range(STEPS):
        same = rewritten(pipe, lambda step, latents, place=place: latents.clone() if step == place else None)
        assert all(torch.equal(one, other) for one, other in zip(same.samples, plain.samples, strict=True))
        changed = rewritten(pipe, lambda step, latents, place=place: -latents if step == place else None)
        assert all(torch.equal(changed.samples[step], plain.samples[step]) for step in range(place))
        assert torch.equal(changed.samples[place], -plain.samples[place])
        assert not torch.equal(changed.outputs[place, "cond"], plain.outputs[place, "cond"]), "the denoiser saw them"


def test_a_multistep_solver_begins_anew_where_latents_change() -> None:
    pipe = tiny_pipeline(WanPipeline, scheduler=UniPCMultistepScheduler(**UNIPC))
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator("cpu").manual_seed(9))
    clock = rewritten(pipe, lambda step, latents: noise if step == 2 else None)
    fresh = UniPCMultistepScheduler(**UNIPC)
    fresh.set_timesteps(STEPS)
    fresh.set_begin_index(2)
    sample = noise
    for step in (2, 3):
        assert torch.equal(clock.samples[step], sample)
        sample = fresh.step(clock.outputs[step, "guided"], fresh.timesteps[step], sample, return_dict=False)[0]
    assert torch.equal(clock.samples[4], sample)


def test_rewritten_latents_keep_their_shape(image_pipe: Any) -> None:
    for place in (0, 2):
        with pytest.raises(dl.InputError, match=rf"latents of step {place} have shape \(1, 4, 2, 4, 4\), .* \(1, 4, 2, 4\)"):
            rewritten(image_pipe, lambda step, latents, place=place: latents[..., 0] if step == place else None)
    assert "step" not in vars(image_pipe.scheduler)
