"""Obstacles: what in a pipeline stands in the way of reading it, found before a run.

Much can be done to a pipeline besides calling it: its weights can be moved, stored in less precision, adapted, compiled; its
blocks can be skipped by a cache. Most of it leaves every activation where it was, and needs nothing here. This module
names the rest. Each check looks at the modules as they are, and raises an error of one line that says what was found, why it
cannot be read, and what to do; none of them runs anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dit_lens.architectures import EXPERTS
from dit_lens.errors import InputError

HARMLESS = ("layerwise_casting", "peft_autocast_disable", "group_offloading")
"""Hooks of diffusers that move weights or change how they are stored, and leave what is computed as it is."""
UNSETTLED = ("layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Those that take themselves off in the first call of the denoiser, and with them whatever was put over them."""
NATIVE = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""The attention backends of diffusers that call torch's scaled_dot_product_attention."""
EAGER = "write \"with torch.compiler.set_stance('force_eager'):\" around all runs that are compared"


def check_whole(pipe: Any) -> None:
    """Refuse a pipeline whose denoiser is what `torch.compile(module)` returned: it is no module of its class any more.

    Raises:
        InputError: there is such a denoiser.
    """
    for name in EXPERTS:
        if _is_wrapper(getattr(pipe, name, None)):
            raise InputError(
                f"{name} is an OptimizedModule, which torch.compile({name}) returned; write pipe.{name}._orig_mod in its"
                f" place, and compile it in place where you want it compiled: pipe.{name}.compile_repeated_blocks()"
            )


def check(pipe: Any, denoisers: Mapping[str, nn.Module], reading: bool, gradients: bool = False) -> None:
    """Refuse what cannot be run, read or edited as it is.

    Args:
        denoisers: of the pipeline, by name.
        reading: whether anything of them is read or edited, or their calls kept or answered; without it only the calls
            are counted.
        gradients: whether a graph is kept.

    Raises:
        InputError: the first obstacle that was found.
    """
    check_whole(pipe)
    for name, denoiser in denoisers.items():
        _check_repeatable(name, denoiser)
        _check_compiled(name, denoiser, reading)
        if reading:
            _check_cached(name, denoiser)
            _check_hooks(name, denoiser)
            _check_parallel(name, denoiser)
        if gradients:
            _check_weights_stay(name, denoiser)


def check_attention(path: str, module: nn.Module) -> None:
    """Refuse an attention module whose calls torch does not see: the hook engine reads q, k and v from torch.

    Raises:
        InputError: its backend is another than torch's own.
    """
    processor: Any = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    backend = str(getattr(chosen, "value", chosen))
    if backend not in NATIVE:
        raise InputError(
            f"{path} attends through the backend {backend!r}, and the hook engine reads q, k and v from torch's own; write"
            " engine='nnsight', or set_attention_backend('native')"
        )


def check_forward(path: str, module: nn.Module) -> None:
    """Refuse a module that accelerate and something else wrap at once: nnsight would leave out one of the two.

    nnsight takes accelerate's wrapper off, runs the class's own `forward`, and calls accelerate's hook itself.

    Raises:
        InputError: there is more than accelerate's wrapper around the class's `forward`.
    """
    if "_hf_hook" not in vars(module):
        return
    outer = getattr(vars(module).get("forward"), "func", None)
    inner = getattr(vars(module).get("_old_forward"), "__func__", None)
    if getattr(outer, "__module__", None) != "accelerate.hooks" or inner is not type(module).forward:
        raise InputError(
            f"{path} has a hook of accelerate and another wrapper besides, of which nnsight would leave out one; write"
            " engine='hooks'"
        )


def adapters(pipe: Any) -> tuple[str, ...]:
    """The adapters of peft (LoRA) in a pipeline and how they are set, a line for each layer that has some."""
    parts = {name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)}
    lines = []
    for name, part in parts.items():
        for path, layer in part.named_modules():
            if isinstance(getattr(layer, "base_layer", None), nn.Module):
                settings = ("active_adapters", "scaling", "merged_adapters", "disable_adapters")
                lines.append(" ".join([f"{name}.{path}", *(f"{one}={getattr(layer, one, None)}" for one in settings)]))
    return tuple(lines)


def _check_repeatable(name: str, denoiser: nn.Module) -> None:
    for path, module in denoiser.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise InputError(
                f"{name}.{path} drops a share of {module.p:g} at random, so that no two runs are alike; call"
                f" pipe.{name}.eval() first"
            )


def _check_compiled(name: str, denoiser: nn.Module, reading: bool) -> None:
    """Compiled code calls no hook that came after it was compiled, and compiles those that were there before."""
    for path, module in denoiser.named_modules():
        where = f"{name}.{path}" if path else name
        if _is_wrapper(module) and reading:
            raise InputError(
                f"{where} is an OptimizedModule, which torch.compile(module) returned, and has no sites of its own; compile"
                f" in place, with pipe.{name}.compile_repeated_blocks(), and {EAGER}"
            )
        if (reading or not path) and _is_compiled(module) and not _forced_eager():
            raise InputError(
                f"{where} is compiled, and nothing inside compiled code can be read or edited, nor its calls counted; {EAGER}"
            )


def _check_cached(name: str, denoiser: nn.Module) -> None:
    if getattr(denoiser, "is_cache_enabled", False):
        raise InputError(
            f"{name} skips blocks or parts of them (enable_cache), and what is not computed cannot be read; call"
            f" pipe.{name}.disable_cache() first"
        )


def _check_hooks(name: str, denoiser: nn.Module) -> None:
    for path, hook in _diffusers_hooks(denoiser):
        where = f"{name}.{path}" if path else name
        if hook in UNSETTLED:
            raise InputError(
                f"{where} is offloaded by groups with a stream, which takes off its hooks in the first call, and with them"
                " those of the lens; run the pipeline once before anything is read: lens.plain(...)"
            )
        if hook not in HARMLESS:
            raise InputError(
                f"{where} has the hook {hook!r} of diffusers, which may answer in place of a block or change what it"
                f" computes; take it off first: {where}._diffusers_hook.remove_hook({hook!r})"
            )


def _check_parallel(name: str, denoiser: nn.Module) -> None:
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise InputError(
            f"{name} is spread over processes (enable_parallelism), each of which has a part of the tokens or heads only;"
            " load it without, and run whole samples on each device"
        )


def _check_weights_stay(name: str, denoiser: nn.Module) -> None:
    """A graph wants the weights where they were; weights that are cast it holds on to as they were computed with."""
    if any(hook == "group_offloading" for _, hook in _diffusers_hooks(denoiser)):
        raise InputError(
            f"{name} is offloaded by groups, so that its weights are gone before its gradients are computed; load it on its"
            " device"
        )
    for module in denoiser.modules():
        if getattr(vars(module).get("_hf_hook"), "offload", False):
            raise InputError(
                f"{name} is offloaded module by module, so that its weights are gone before its gradients are computed; load"
                " it on its device"
            )


def _diffusers_hooks(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """The hooks of diffusers in a denoiser: path of the module, name of the hook."""
    for path, module in denoiser.named_modules():
        for hook in getattr(vars(module).get("_diffusers_hook"), "hooks", ()):
            yield path, hook


def _is_wrapper(module: Any) -> bool:
    """Whether a module is what `torch.compile(module)` returned. Every module has a `compile`; only these keep the original."""
    return isinstance(module, nn.Module) and "_orig_mod" in module._modules


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run compiled code: `module.compile()`, or a compiled `forward`."""
    calls = (vars(module).get("_compiled_call_impl"), vars(module).get("forward"))
    return any(hasattr(call, "_torchdynamo_orig_callable") for call in calls)


def _forced_eager() -> bool:
    """Whether torch was told to run compiled code as it was written."""
    return torch._dynamo.eval_frame._stance.stance == "force_eager"
