"""Canaries of diffusers: one fact each that dit_lens relies on in its models, pipelines and schedulers.

See tests/test_canary.py for those of nnsight, torch and accelerate, and docs/upgrading.md for all of them.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from canaries import STEPS, TOKENS, VIDEO_CALL, WAN_CALL, fact, same, video_pipeline, wan
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Raised inside diffusers, where schedulers hand torch tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


class AttentionCalls(TorchFunctionMode):
    """Writes down the queries and keys of every call of torch's scaled dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            self.shapes.append((named["query"].shape, named["key"].shape))
        return func(*args, **(kwargs or {}))


@fact(
    "diffusers and torch: the native attention backend calls torch's scaled_dot_product_attention once, with tensors of (batch,"
    " heads, tokens, channels), where a TorchFunctionMode sees it",
    used_in="hooks.py",
    look_at="_native_attention in diffusers/models/attention_dispatch.py, torch.overrides",
)
def test_native_attention_is_torchs() -> None:
    with torch.no_grad(), AttentionCalls() as calls:
        wan(num_layers=1)(**WAN_CALL)
    assert calls.shapes == [((1, 2, TOKENS, 8), (1, 2, TOKENS, 8)), ((1, 2, TOKENS, 8), (1, 2, 3, 8))]


@fact(
    "diffusers: a Wan cross-attention that has an `add_k_proj` attends to the picture first and then to the 512 tokens of text;"
    " one without makes one call",
    used_in="architectures/record.py hooks.py tracing.py",
    look_at="WanAttnProcessor.__call__ and WanAttention.add_k_proj",
)
def test_attention_to_a_picture_comes_before_the_modules_own() -> None:
    for picture, keys in ((None, [3]), (6, [5, 512])):
        model = wan(num_layers=1, image_dim=picture, added_kv_proj_dim=16 if picture else None)
        assert (model.blocks[0].attn2.add_k_proj is None) == (picture is None)
        call = dict(WAN_CALL)
        if picture:
            call["encoder_hidden_states"] = torch.ones(1, 512, 8)
            call["encoder_hidden_states_image"] = torch.ones(1, 5, picture)
        with torch.no_grad(), AttentionCalls() as calls:
            model(**call)
        assert [key[2] for _, key in calls.shapes[1:]] == keys


@fact(
    "diffusers: a Wan block adds attn1 times row 2 of its modulation, attn2 as it is, and ffn times row 5",
    used_in="architectures/record.py sites.py",
    look_at="WanTransformerBlock.forward: names of its modules, scale_shift_table, the argument temb",
)
def test_what_a_wan_block_adds() -> None:
    model, parts, stream = wan(num_layers=1), {}, []
    block = model.blocks[0]
    for name in ("attn1", "attn2", "ffn"):
        block.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: parts.update({name: out}))
    signature = inspect.signature(type(block).forward)

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        stream.extend((signature.bind(module, *args, **kwargs).arguments, output))

    block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**WAN_CALL)
        arguments, after = stream
        rows = (block.scale_shift_table + arguments["temb"]).unbind(1)
        added = parts["attn1"] * rows[2][:, None] + parts["attn2"] + parts["ffn"] * rows[5][:, None]
    torch.testing.assert_close(arguments["hidden_states"] + added, after, rtol=1e-5, atol=1e-6)


@fact(
    "diffusers: denoisers take the latents as `hidden_states` and the text as `encoder_hidden_states`",
    used_in="calls.py schedule.py",
    look_at="the signatures of `forward` in diffusers/models/transformers",
)
def test_names_of_latents_and_text() -> None:
    import diffusers

    for name in ("Wan", "HunyuanVideo", "CogVideoX", "LTXVideo", "Mochi"):
        denoiser = getattr(diffusers, f"{name}Transformer3DModel")
        assert {"hidden_states", "encoder_hidden_states", "timestep"} <= set(inspect.signature(denoiser.forward).parameters), name


@fact(
    "diffusers: a denoiser returns a Transformer2DModelOutput with the tensor as `sample`, or a tuple for return_dict=False",
    used_in="calls.py replay.py",
    look_at="diffusers.models.modeling_outputs.Transformer2DModelOutput",
)
def test_what_a_denoiser_returns() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    with torch.no_grad():
        output, packed = wan()(**WAN_CALL), wan()(**WAN_CALL, return_dict=False)
    assert type(output) is Transformer2DModelOutput
    assert type(packed) is tuple
    same([packed[0], Transformer2DModelOutput(sample=packed[0]).sample], [output.sample] * 2)


@fact(
    "diffusers: `is_cache_enabled` of a denoiser says whether `enable_cache` lets it skip blocks",
    used_in="lens.py",
    look_at="CacheMixin in diffusers/models/cache_utils.py",
)
def test_a_denoiser_says_whether_it_caches() -> None:
    from diffusers import FirstBlockCacheConfig

    model = wan()
    found = [model.is_cache_enabled]
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    found.append(model.is_cache_enabled)
    model.disable_cache()
    assert [*found, model.is_cache_enabled] == [False, True, False]


def contexts(pipe: Any, **inputs: Any) -> list[str]:
    """The names of the `cache_context`s that a run opens, of the instance's own method."""
    names, opened = [], pipe.transformer.cache_context

    @contextmanager
    def named(name: str, **kwargs: Any) -> Any:
        names.append(name)
        with opened(name, **kwargs):
            yield

    vars(pipe.transformer)["cache_context"] = named
    pipe(**inputs)
    return names


@fact(
    "diffusers: WanPipeline calls its denoiser in `cache_context('cond')`, then in `cache_context('uncond')`, at every step",
    used_in="schedule.py",
    look_at="cache_context in WanPipeline.__call__",
)
def test_wan_names_its_branches() -> None:
    assert contexts(video_pipeline(), **VIDEO_CALL) == ["cond", "uncond"] * STEPS
    assert contexts(video_pipeline(), **VIDEO_CALL, guidance_scale=1.0) == ["cond"] * STEPS


@fact(
    "diffusers: a pipeline that batches its branches calls the context of both 'cond_uncond', with the unconditional half first",
    used_in="schedule.py architectures/guidance.py small_pipelines/record.py",
    look_at="cache_context in CogVideoXPipeline.__call__",
)
def test_batched_branches_have_one_name() -> None:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    sizes: dict[str, Any] = {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 3}
    widths: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 8}
    denoiser: Any = CogVideoXTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes, **widths)
    absent: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe: Any = CogVideoXPipeline(transformer=denoiser.eval(), scheduler=CogVideoXDDIMScheduler(), **absent)
    pipe.set_progress_bar_config(disable=True)
    texts: list[Tensor] = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    assert contexts(pipe, **VIDEO_CALL) == ["cond_uncond"] * STEPS
    halves = [VIDEO_CALL["negative_prompt_embeds"], VIDEO_CALL["prompt_embeds"]]
    same(texts, [torch.cat(halves)] * STEPS)


@fact(
    "diffusers: WanPipeline has `transformer` where the timestep is at or above boundary_ratio * num_train_timesteps, and"
    " `transformer_2` below",
    used_in="architectures/record.py",
    look_at="boundary_timestep in WanPipeline.__call__",
)
def test_which_expert_runs() -> None:
    pipe, ran = video_pipeline(transformer_2=wan(), boundary_ratio=0.8), []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    pipe(**VIDEO_CALL, guidance_scale=1.0)
    assert ran == ["transformer" if timestep >= 800 else "transformer_2" for timestep in pipe.scheduler.timesteps.tolist()]
    assert set(ran) == {"transformer", "transformer_2"}


STEPPED = (
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "CogVideoXDPMScheduler",
    "EDMDPMSolverMultistepScheduler",
)


@fact(
    "diffusers: `scheduler.step` takes model_output, timestep and sample by these names",
    used_in="schedule.py architectures/guidance.py",
    look_at="the signatures of `step` in diffusers/schedulers",
)
def test_parameters_of_a_schedulers_step() -> None:
    import diffusers

    for name in STEPPED:
        parameters = inspect.signature(getattr(diffusers, name).step).parameters
        assert {"model_output", "timestep", "sample", "return_dict"} <= set(parameters), name


@fact(
    "diffusers: WanPipeline asks its scheduler instance's own `step` once a step, and goes on with the first that it returns",
    used_in="schedule.py",
    look_at="self.scheduler.step in WanPipeline.__call__",
)
def test_a_pipeline_goes_on_with_what_step_returns() -> None:
    pipe, taken, returned = video_pipeline(), [], []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(step).bind(*args, **kwargs).arguments
        taken.append((float(arguments["timestep"]), arguments["sample"]))
        returned.append(step(*args, **kwargs)[0] + 1)
        return (returned[-1],)

    vars(pipe.scheduler)["step"] = stepping
    last = pipe(**VIDEO_CALL).frames
    assert [timestep for timestep, _ in taken] == pipe.scheduler.timesteps.tolist()
    same([*(sample for _, sample in taken[1:]), last], returned)


@fact(
    "diffusers: while the denoiser runs, `pipe._current_timestep` is what `scheduler.step` is then called with; None afterwards",
    used_in="schedule.py",
    look_at="_current_timestep in WanPipeline.__call__",
)
def test_the_timestep_under_way_is_told() -> None:
    pipe, told = video_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: told.append(float(pipe._current_timestep)))
    pipe(**VIDEO_CALL)
    assert told == [timestep for timestep in pipe.scheduler.timesteps.tolist() for _ in range(2)]
    assert pipe._current_timestep is None


@fact(
    "diffusers: a scheduler's `step_index` is None before its first step, which `set_begin_index` places, and then counts along"
    " `sigmas`, which has one more entry than there are steps",
    used_in="noise.py schedule.py",
    look_at="step_index, begin_index, index_for_timestep and sigmas of the schedulers",
)
def test_where_a_scheduler_stands() -> None:
    import diffusers

    for name in ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(STEPS)
        assert len(scheduler.sigmas) == STEPS + 1, name
        stands = [scheduler.step_index]
        assert scheduler.begin_index is None
        assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 1
        sample = torch.ones(1, 4, 2, 4, 4)
        scheduler.set_begin_index(1)
        for timestep in scheduler.timesteps[1:]:
            sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
            stands.append(scheduler.step_index)
        assert stands == [None, *range(2, STEPS + 1)], name


@fact(
    "diffusers: Wan pipelines take their first latents from `prepare_latents`: a tensor, or the first of a tuple with an image",
    used_in="schedule.py latent_edits.py",
    look_at="prepare_latents of WanPipeline and WanImageToVideoPipeline",
)
def test_where_the_first_latents_come_from() -> None:
    for name in ("WanPipeline", "WanImageToVideoPipeline"):
        image = name == "WanImageToVideoPipeline"
        pipe: Any = video_pipeline(name, transformer=wan(in_channels=12 if image else 4))
        prepare, taken = pipe.prepare_latents, []
        marked = torch.linspace(-3, 3, 128).view(1, 4, 2, 4, 4)

        def prepared(*args: Any, prepare: Any = prepare, marked: Any = marked, image: Any = image, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            assert isinstance(made, tuple if image else Tensor)
            assert (made[0] if isinstance(made, tuple) else made).shape == marked.shape
            return (marked, *made[1:]) if image else marked

        vars(pipe)["prepare_latents"] = prepared
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, taken=taken: taken.append(kwargs["hidden_states"]), with_kwargs=True
        )
        pipe(**VIDEO_CALL, **({"image": torch.zeros(1, 3, 32, 32)} if image else {}))
        assert torch.equal(taken[0][:, :4], marked), name


@fact(
    "diffusers: WanImageToVideoPipeline with N generators encodes its whole condition N times, and an encoding can be made anew"
    " of its distribution's parameters",
    used_in="batching.py",
    look_at="prepare_latents of WanImageToVideoPipeline, AutoencoderKLOutput.latent_dist",
)
def test_an_image_is_encoded_once_a_generator() -> None:
    pipe: Any = video_pipeline("WanImageToVideoPipeline", transformer=wan(in_channels=12))
    encode, rows = pipe.vae.encode, []

    def encoding(x: Tensor) -> Any:
        rows.append(len(x))
        output = encode(x)
        distribution = output.latent_dist
        return type(output)(latent_dist=type(distribution)(distribution.parameters))

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    inputs = {**VIDEO_CALL, "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        inputs[name] = inputs[name].repeat(2, 1, 1)
    vars(pipe.vae)["encode"] = encoding
    latents = pipe(**inputs, generator=generators).frames
    assert rows == [1, 1]
    assert len(latents) == 2
    torch.testing.assert_close(latents[0], latents[1])


@fact(
    "diffusers: DiffusionPipeline.from_pretrained takes `dtype`, `local_files_only` and `use_safetensors`, and loads what"
    " save_pretrained wrote",
    used_in="loading.py",
    look_at="DiffusionPipeline.from_pretrained (diffusers.pipelines.pipeline_utils)",
)
def test_a_pipeline_is_loaded_from_its_folder(tmp_path: Path) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    pipe = video_pipeline()
    absent = {name: None for name, part in pipe.components.items() if part is None}
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    loaded: Any = DiffusionPipeline.from_pretrained(
        str(tmp_path), dtype=torch.float64, local_files_only=True, use_safetensors=True, **absent
    )
    for library in libraries:
        library.enable_progress_bar()
    assert loaded.transformer.dtype is torch.float64
    expected = pipe.transformer.state_dict()
    assert all(torch.equal(weight.float(), expected[name]) for name, weight in loaded.transformer.state_dict().items())
    assert list(tmp_path.rglob("*.safetensors"))
