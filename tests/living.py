"""What is done to pipelines when people run them: each setting by name, on a tiny pipeline of two experts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import arguments, tiny_pipeline
from diffusers import WanPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor, nn

import dit_lens as dl

CPU = torch.device("cpu")
ADAPTED = ["to_q", "to_k", "to_out.0", "ffn.net.2"]
SITES = ["resid", "attn", "heads", "q"]


def denoisers(pipe: Any) -> list[Any]:
    """Both experts."""
    return [pipe.transformer, pipe.transformer_2]


def adapt(pipe: Any, **settings: Any) -> None:
    """A LoRA of its own for each expert, none of it zero."""
    with torch.random.fork_rng(devices=[]):
        for seed, denoiser in enumerate(denoisers(pipe)):
            torch.manual_seed(seed)
            config = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "target_modules": ADAPTED}
            denoiser.add_adapter(LoraConfig(**config, **settings))


def lora(denoiser: nn.Module, seed: int, scale: float = 0.3) -> dict[str, Tensor]:
    """A LoRA for a denoiser, as files of it hold one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in denoiser.named_modules():
        if path.startswith("blocks") and path.endswith(tuple(ADAPTED)):
            assert isinstance(module, nn.Linear)
            state[f"transformer.{path}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator) * scale
            state[f"transformer.{path}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator) * scale
    return state


def load_adapters(pipe: Any) -> None:
    """One for each expert, as from files."""
    pipe.load_lora_weights(lora(pipe.transformer, seed=1), adapter_name="noisy")
    pipe.load_lora_weights(lora(pipe.transformer_2, seed=2), adapter_name="clean", load_into_transformer_2=True)


def fuse_adapters(pipe: Any) -> None:
    adapt(pipe)
    for denoiser in denoisers(pipe):
        denoiser.fuse_lora()


def cast(pipe: Any, storage: torch.dtype = torch.float16) -> None:
    for denoiser in denoisers(pipe):
        denoiser.enable_layerwise_casting(storage_dtype=storage, compute_dtype=denoiser.dtype)


def offload_groups(pipe: Any, kind: str) -> None:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)


def offload_modules(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to each denoiser: weights are on `meta` unless their module runs."""
    for denoiser in denoisers(pipe):
        cpu_offload(denoiser, CPU)


def align(pipe: Any) -> None:
    """What a device map does to a denoiser: every module has a hook that brings its arguments to its device."""
    for denoiser in denoisers(pipe):
        for module in denoiser.modules():
            add_hook_to_module(module, AlignDevicesHook(CPU, io_same_device=module is denoiser))


def fuse_projections(pipe: Any) -> None:
    for denoiser in denoisers(pipe):
        for block in denoiser.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()


def attend(pipe: Any, backend: str) -> None:
    for denoiser in denoisers(pipe):
        denoiser.set_attention_backend(backend)


def compile_blocks(pipe: Any) -> None:
    for denoiser in denoisers(pipe):
        denoiser.compile_repeated_blocks(backend="eager")


def compile_whole(pipe: Any) -> None:
    for denoiser in denoisers(pipe):
        denoiser.compile(backend="eager")


def each(*steps: Callable[[Any], None]) -> Callable[[Any], None]:
    """One setting after another."""

    def apply(pipe: Any) -> None:
        for step in steps:
            step(pipe)

    return apply


@dataclass(frozen=True)
class Setting:
    """Something done to a pipeline, and a context in which all of its runs take place."""

    apply: Callable[[Any], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


eagerly = partial(torch.compiler.set_stance, "force_eager")
WORKS = {
    "bfloat16": Setting(lambda pipe: pipe.to(torch.bfloat16)),
    "float16": Setting(lambda pipe: pipe.to(torch.float16)),
    "model offload": Setting(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "group offload, by blocks": Setting(partial(offload_groups, kind="block_level")),
    "module offload of the denoisers": Setting(offload_modules),
    "device map": Setting(align),
    "layerwise casting, float16 to float32": Setting(cast),
    "layerwise casting, float8 to bfloat16": Setting(
        each(lambda pipe: pipe.to(torch.bfloat16), partial(cast, storage=torch.float8_e4m3fn))
    ),
    "LoRA, one for each expert": Setting(load_adapters),
    "LoRA, fused": Setting(fuse_adapters),
    "LoRA, then layerwise casting": Setting(each(adapt, cast)),
    "group offload, by leaves, then LoRA": Setting(each(partial(offload_groups, kind="leaf_level"), load_adapters)),
    "LoRA, then model offload": Setting(each(adapt, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))),
    "fused projections": Setting(fuse_projections),
    "attention backend `_native_math`": Setting(partial(attend, backend="_native_math")),
    "compiled blocks, run eagerly": Setting(compile_blocks, eagerly),
    "compiled denoiser, run eagerly": Setting(compile_whole, eagerly),
}
"""Settings in which everything works, wrapped before or after."""


@contextmanager
def nothing_stays() -> Iterator[None]:
    """What outlives a pipeline: a backend of attention is set for the process, compiled code is kept for its functions.

    Diffusers warns of casts that are meant here.
    """
    active = _AttentionBackendRegistry.get_active_backend()[0]
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(active)
        logging.getLogger("diffusers").setLevel(level)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()


def call(pipe: Any) -> dict[str, Any]:
    """Two steps, one on each expert, and no guidance."""
    return arguments(pipe, num_inference_steps=2, guidance_scale=1.0)


def plain(lens: dl.Lens) -> Tensor:
    """The last latents of the pipeline itself."""
    return lens.plain(**call(lens.pipe), seed=3, output_type="latent").frames


def run(lens: dl.Lens, seed: int = 3, **options: Any) -> dl.Run:
    return lens.run(**call(lens.pipe), seed=seed, decode=False, **options)


def wrapped(setting: Setting, engine: str, first: bool) -> dl.Lens:
    """A lens on a pipeline in this setting; with `first`, one that has been read and edited before it was made so."""
    pipe = tiny_pipeline(WanPipeline, experts=2)
    if first:
        lens = dl.wrap(pipe, engine=engine)
        run(lens, record=dl.at(site=SITES), edits=[dl.Zero(dl.at(block=1, step=0, site="heads", head=0))])
        setting.apply(pipe)
        return lens
    setting.apply(pipe)
    return dl.wrap(pipe, engine=engine)
