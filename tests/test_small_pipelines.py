"""Everything that the record of a small pipeline states, seen in the pipeline itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from stamps import Watched, said, stacked, watched
from torch import Tensor, nn

from dit_lens.errors import InputError
from dit_lens.small_pipelines import PIPELINES, SmallPipeline, pipeline
from dit_lens.small_pipelines.wan import BOUNDARY

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi asks for float32 there
]

every = pytest.mark.parametrize("small", PIPELINES.values(), ids=list(PIPELINES))


@cache
def plain(name: str) -> Watched:
    """A run with the record's own inputs."""
    return watched(PIPELINES[name], pipeline(name))


def changed(small: SmallPipeline, **changes: Any) -> set[str]:
    """The branches whose first answer differs when some of the inputs do."""
    before, after = plain(small.name).answers(small), watched(small, pipeline(small.name), **changes).answers(small)
    return {branch for branch in small.branches if not torch.equal(before[branch], after[branch])}


def stacks(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks: the outermost module lists that hold more than a tenth of what the largest of them holds."""
    lists = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name: found for name, found in lists.items() if not any(name.startswith(f"{outer}.") for outer in lists)}
    sizes = {name: sum(weight.numel() for weight in found.parameters()) for name, found in outermost.items()}
    return {name: found for name, found in outermost.items() if sizes[name] > max(sizes.values()) / 10}


@every
def test_a_step_is_as_many_calls_as_the_record_says_in_its_contexts(small: SmallPipeline) -> None:
    seen = plain(small.name)
    assert len(seen.steps) == small.inputs["num_inference_steps"]
    for number, step in enumerate(seen.steps):
        assert tuple(call.context for call in step) == small.contexts(number)
        assert [len(call.latents) for call in step] == [len(branches) for branches in small.calls(number)]
        assert len({call.expert for call in step}) == 1
        for call in step:  # where tokens have timesteps of their own, the last has that of the step
            slope, start = small.told
            assert call.timestep.flatten()[-1].item() == pytest.approx(slope * seen.received[number][1] + start, abs=1e-5)


@every
def test_a_prompt_reaches_its_own_branch_and_no_other(small: SmallPipeline) -> None:
    if small.name == "dit":
        assert changed(small, class_labels=[8]) == {"cond"}
        labels = plain("dit").calls[0].arguments["class_labels"].tolist()
        assert dict(zip(small.branches, labels, strict=True)) == {"cond": 7, "uncond": 1000}
        return
    assert changed(small, prompt="left cube rolls") == {"cond"}
    if "uncond" in small.branches:
        assert changed(small, negative_prompt="left cube") == {"uncond"}


@every
def test_samples_lie_within_their_branch(small: SmallPipeline) -> None:
    """Of two samples, the second's prompt reaches the second row of its own branch."""
    if small.name == "wan-vace":
        with pytest.raises(ValueError, match="list of prompts is not yet supported"):
            watched(small, pipeline(small.name), prompt=["left ball"] * 2, negative_prompt=["right"] * 2)
        return
    answers = []
    for word, label in (("ball", 7), ("cube", 8)):
        texts: dict[str, Any] = {"prompt": ["left ball", f"left {word}"], "negative_prompt": ["right", "right"]}
        if "uncond" not in small.branches:
            texts["negative_prompt"] = None
        inputs: dict[str, Any] = {"class_labels": [7, label]} if small.name == "dit" else texts
        answers.append(watched(small, pipeline(small.name), **inputs).answers(small))
    for branch in small.branches:
        rows = [row for row in (0, 1) if not torch.equal(answers[0][branch][row], answers[1][branch][row])]
        assert rows == ([1] if branch == "cond" else [])


@every
def test_only_an_embedded_guidance_scale_reaches_the_denoiser(small: SmallPipeline) -> None:
    embeds = small.name.startswith(("flux", "hunyuan-video"))
    assert small.guidance.startswith("embedded") == (embeds and small.branches == ("cond",))
    if small.name != "qwen-image":  # takes a scale for checkpoints that embed it, and there are none
        assert changed(small, guidance_scale=5.0) == (set(small.branches) if embeds else set())


@every
def test_the_scheduler_receives_the_guided_prediction_with_its_sign(small: SmallPipeline) -> None:
    seen = plain(small.name)
    scale = small.inputs.get("true_cfg_scale", small.inputs["guidance_scale"])
    for step, (received, _) in enumerate(seen.received):
        answers = seen.answers(small, step)
        guided = answers["cond"]
        if "uncond" in answers:
            guided = answers["uncond"] + scale * (answers["cond"] - answers["uncond"])
        if small.name == "z-image":  # its scale counts from the answer under the prompt
            guided = guided + answers["cond"] - answers["uncond"]
        if "skip-layers" in answers:
            guided = guided + 2.8 * (answers["cond"] - answers["skip-layers"])  # the pipeline's own scale
        guided = small.sign * (guided[:, :, 0] if small.name == "z-image" else guided)
        if small.name in ("pixart-alpha", "pixart-sigma", "dit", "lumina", "hunyuan-dit"):
            guided = guided.chunk(2, dim=1)[0]  # the other half is a variance, which no scheduler here takes
        if small.name == "dit":
            received, other = received.chunk(2)
            assert torch.equal(received, other)
        if small.name == "lumina":
            assert torch.equal(received[:, 3:], -answers["cond"][:, 3:4])  # it guides three of its channels
            received, guided = received[:, :3], guided[:, :3]
        if small.name.startswith(("qwen-image", "lumina-2")):  # these scale it to the norm of the one under the prompt
            received, guided = nn.functional.normalize(received, dim=-1), nn.functional.normalize(guided, dim=-1)
        torch.testing.assert_close(received, guided, rtol=1e-4, atol=1e-5)


@every
def test_each_expert_runs_where_the_boundary_says(small: SmallPipeline) -> None:
    seen = plain(small.name)
    ran = [step[0].expert for step in seen.steps]
    assert tuple(dict.fromkeys(ran)) == small.experts
    if len(small.experts) == 2:
        assert ran == ["transformer" if timestep >= BOUNDARY * 1000 else "transformer_2" for _, timestep in seen.received]


def test_the_5b_form_gives_every_token_its_timestep_and_none_to_the_image() -> None:
    for name in ("wan-5b", "wan-5b-image"):
        frames, height, width = PIPELINES[name].layout
        for call, (_, timestep) in zip(plain(name).calls[::2], plain(name).received, strict=True):
            levels = call.arguments["timestep"].reshape(frames, height, width)
            assert (levels[1:] == timestep).all()
            assert (levels[0] == (0 if name == "wan-5b-image" else timestep)).all()


def test_the_call_that_skips_layers_has_the_prompt() -> None:
    both, alone = plain("stable-diffusion-3-skip-layers").steps[1]
    assert alone.arguments["skip_layers"] == [1]
    for name in ("encoder_hidden_states", "pooled_projections", "hidden_states"):
        assert torch.equal(both.arguments[name][1:], alone.arguments[name])
    assert not torch.equal(both.output[1:], alone.output)


def visual_tokens(denoiser: nn.Module, arguments: Mapping[str, Any], count: int) -> Tensor:
    """What the first block to see that many tokens takes, (batch, tokens, channels)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == count)

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for stack in stacks(denoiser).values() for b in stack]
    with torch.no_grad():
        denoiser(**arguments)
    for handle in handles:
        handle.remove()
    return found[0]


@every
def test_visual_tokens_lie_as_the_layout_says(small: SmallPipeline) -> None:
    """Noise in one patch of the latents reaches one token, whose number is that of its place in the layout."""
    denoiser = pipeline(small.name).transformer
    call = plain(small.name).calls[0]
    arguments, latents = call.arguments, call.latents
    frames, height, width = small.layout
    count = 32 if small.name == "z-image" else frames * height * width  # padded there
    if small.name == "stable-audio":  # behind a token of the timestep and the duration
        before = visual_tokens(denoiser, arguments, 1 + count)
        moment = visual_tokens(denoiser, call.taking(latents + torch.eye(frames)[4]), 1 + count)
        assert (before != moment).any(dim=(0, 2)).nonzero().flatten().tolist() == [1 + 4]
        return
    before = visual_tokens(denoiser, arguments, count)
    if latents.ndim == 3:  # packed by the pipeline, which says how in further arguments
        assert latents.shape[1] == frames * height * width
        if "img_ids" in arguments:
            places = [[0, y, x] for y in range(height) for x in range(width)]
            assert arguments["img_ids"].tolist() == places
        elif "img_shapes" in arguments:
            assert arguments["img_shapes"] == [[small.layout]]
        else:
            assert (arguments["num_frames"], arguments["height"], arguments["width"]) == small.layout
        return
    patch = denoiser.config.get("patch_size", 2)
    patch = patch[-1] if isinstance(patch, tuple | list) else patch
    volume = latents if latents.ndim == 5 else latents[:, :, None]
    volume = volume.transpose(1, 2) if small.name == "cogvideox" else volume  # (batch, frames, channels, ...) there
    assert volume.shape[2:] == (frames, patch * height, patch * width)
    for frame, row, column in {(0, 0, 1), (frames - 1, 1, 0), (frames - 1, height - 1, width - 1)}:
        other = latents.clone()
        view = other if other.ndim == 5 else other[:, :, None]
        view = view.transpose(1, 2) if small.name == "cogvideox" else view
        view[:, :, frame, row * patch + patch - 1, column * patch] += 1
        after = visual_tokens(denoiser, call.taking(other), count)
        moved = (before != after).any(dim=(0, 2)).nonzero().flatten().tolist()
        assert moved == [(frame * height + row) * width + column]


@every
def test_every_block_is_alive(small: SmallPipeline) -> None:
    """The answer depends on every parameter, but for the text's of a last block, which nobody reads after it."""
    pipe = pipeline(small.name)
    for expert in small.experts:
        denoiser = getattr(pipe, expert)
        call = next(call for call in plain(small.name).calls if call.expert == expert)
        output = stacked(said(denoiser(**call.arguments)))
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        last = tuple(f"{name}.{len(stack) - 1}." for name, stack in stacks(denoiser).items())
        assert last
        for name, weight in denoiser.named_parameters():
            assert weight.std() > 0, name
            text = name.startswith(last) and any(part in name for part in ("add_q", "add_out", "added_q", "txt_mlp"))
            shift = name.endswith("k.bias")  # a softmax forgets what it adds to every score
            if weight.requires_grad and not (text or shift or name == "pad_token"):
                assert weight.grad is not None, name
                assert weight.grad.any(), name


@every
def test_a_run_can_be_repeated_to_the_bit(small: SmallPipeline) -> None:
    pipe = pipeline(small.name)
    results = [pipe(**small.inputs, generator=torch.Generator().manual_seed(0), return_dict=False)[0] for _ in range(2)]
    first, again = (torch.as_tensor(result) for result in results)
    assert first.isfinite().all()
    assert first.std() > 0
    assert torch.equal(first, again)
    assert torch.equal(first, plain(small.name).result), "another pipeline of the same seed, and watched"


@every
def test_the_seed_alone_draws_the_weights(small: SmallPipeline) -> None:
    state = torch.random.get_rng_state()
    built = [pipeline(small.name, seed).transformer.state_dict() for seed in (3, 4)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert any(not torch.equal(built[0][name], built[1][name]) for name in built[0])
    torch.manual_seed(5)
    again = small.build(3).transformer.state_dict()
    assert all(torch.equal(built[0][name], again[name]) for name in again)


SCHEDULERS = [(small, name) for small in PIPELINES.values() for name in small.schedulers]


@pytest.mark.parametrize(("small", "name"), SCHEDULERS, ids=[f"{small.name}-{name}" for small, name in SCHEDULERS])
def test_every_scheduler_runs_and_takes_the_prediction_as_stated(small: SmallPipeline, name: str) -> None:
    pipe = pipeline(small.name)
    if name == next(iter(small.schedulers)):
        assert pipe.scheduler.config == small.schedulers[name]().config
    pipe.scheduler = small.schedulers[name]()
    assert type(pipe.scheduler).__name__ == name
    stated = {"flow": "flow_prediction"}.get(small.prediction, small.prediction)
    assert name.startswith("FlowMatch") or pipe.scheduler.config.prediction_type == stated
    assert small.prediction == "flow" or not name.startswith("FlowMatch")
    seen = watched(small, pipe)
    assert seen.result.isfinite().all()
    assert len(seen.received) == 3
    assert [len(step) for step in seen.steps] == [len(small.calls(number)) for number in range(3)]


@pytest.mark.parametrize(("small", "name"), SCHEDULERS, ids=[f"{small.name}-{name}" for small, name in SCHEDULERS])
def test_a_denoiser_that_knows_the_answer_is_led_to_it(small: SmallPipeline, name: str) -> None:
    """What the record says of prediction and sign is what the scheduler takes them to be: the last sample is the answer."""
    pipe = pipeline(small.name)
    pipe.scheduler = small.schedulers[name]()
    target = torch.randn(plain(small.name).made[0].shape[1:], generator=torch.Generator().manual_seed(2))
    reached = watched(small, pipe, target).made[-1]
    if small.name == "wan-5b-image":  # its denoiser is shown the image in the place of the first frame, which it cannot move
        reached, target = reached[:, :, 1:], target[:, 1:]
    torch.testing.assert_close(reached, target.expand_as(reached), rtol=1e-3, atol=1e-3)


@every
def test_a_result_can_be_decoded(small: SmallPipeline) -> None:
    inputs = {**small.inputs, "output_type": "np"}
    shown = torch.as_tensor(pipeline(small.name)(**inputs, generator=torch.Generator().manual_seed(0), return_dict=False)[0])
    if small.name == "stable-audio":
        assert shown.shape == (1, 2, 48)  # channels, samples
        return
    frames, height, width = (small.inputs.get(name) for name in ("num_frames", "height", "width"))
    frames = small.inputs.get("segment_frame_length", frames)
    sizes = ((frames,) if frames else ()) + ((height, width) if height else (8, 8))
    assert shown.shape == (1, *sizes, 3)
    assert shown.isfinite().all()


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match="no small pipeline is called 'wann'; there are wan, "):
        pipeline("wann")
