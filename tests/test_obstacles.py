"""Obstacles: each is refused before anything runs, in one line that says what to do, and doing that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import BLOCKS, arguments, tiny_pipeline
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    apply_first_block_cache,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks.group_offloading import LayerExecutionTrackerHook
from living import (
    adapt,
    align,
    attend,
    cast,
    compile_blocks,
    denoisers,
    eagerly,
    nothing_stays,
    offload_groups,
    offload_modules,
    plain,
    run,
)
from torch import Tensor, nn

import dit_lens as dl

ALL = ("nnsight", "hooks")
FIRST = FirstBlockCacheConfig(threshold=0.5)
BROADCAST = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(0, 1000),
    current_timestep_callback=lambda: 500,
)


def remove(path: str, hook: str) -> Callable[[Any], None]:
    """The way out that an error message shows for a hook of diffusers."""
    return lambda pipe: pipe.transformer.get_submodule(path)._diffusers_hook.remove_hook(hook)


def take_off_caches(pipe: Any) -> None:
    for block in range(BLOCKS):
        remove(f"blocks.{block}", "fbc_leader_block_hook" if block == 0 else "fbc_block_hook")(pipe)


def take_off_broadcast(pipe: Any) -> None:
    for block in range(BLOCKS):
        remove(f"blocks.{block}.attn1", "pyramid_attention_broadcast")(pipe)


def track(pipe: Any) -> None:
    """What group offload with a stream has on each group until the first call is over."""
    for block in pipe.transformer.blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(LayerExecutionTrackerHook(lambda: None), "layer_execution_tracker")


def settle(pipe: Any) -> None:
    """What the first call does to them."""
    for block in pipe.transformer.blocks:
        block._diffusers_hook.remove_hook("layer_execution_tracker", recurse=False)


def drop(pipe: Any) -> None:
    adapt(pipe, lora_dropout=0.5)
    for denoiser in denoisers(pipe):
        denoiser.train()


def stop_dropping(pipe: Any) -> None:
    for denoiser in denoisers(pipe):
        denoiser.eval()


def replace_block(pipe: Any) -> None:
    pipe.transformer.blocks[1] = torch.compile(pipe.transformer.blocks[1], backend="eager")


def put_block_back(pipe: Any) -> None:
    pipe.transformer.blocks[1] = pipe.transformer.blocks[1]._orig_mod


def compile_forward(pipe: Any) -> None:
    ffn = pipe.transformer.blocks[1].ffn
    ffn.forward = torch.compile(ffn.forward, backend="eager")


def uncompile_forward(pipe: Any) -> None:
    del pipe.transformer.blocks[1].ffn.forward


def uncompile(pipe: Any) -> None:
    for denoiser in denoisers(pipe):
        for module in denoiser.modules():
            module._compiled_call_impl = None


def divide(pipe: Any, how: Any = "half of the tokens each") -> None:
    pipe.transformer._parallel_config = how


@dataclass(frozen=True)
class Refusal:
    """Something done to a pipeline, what an error says of it, and what undoes it, where that can be done.

    `engines` are those that refuse it; `plainly` whether a run that reads nothing goes on all the same.
    """

    apply: Callable[[Any], Any]
    says: str
    undo: Callable[[Any], Any] | None
    engines: tuple[str, ...] = ALL
    plainly: bool = True


REFUSED = {
    "a cache, through `enable_cache`": Refusal(
        lambda pipe: pipe.transformer.enable_cache(FIRST),
        r"transformer skips blocks .* call pipe.transformer.disable_cache\(\) first",
        lambda pipe: pipe.transformer.disable_cache(),
    ),
    "a cache, put on by its function": Refusal(
        lambda pipe: apply_first_block_cache(pipe.transformer, FIRST),
        r"transformer.blocks.0 has the hook 'fbc_leader_block_hook'.*remove_hook\('fbc_leader_block_hook'\)",
        take_off_caches,
    ),
    "pyramid attention broadcast": Refusal(
        lambda pipe: apply_pyramid_attention_broadcast(pipe.transformer, BROADCAST),
        r"transformer.blocks.0.attn1 has the hook 'pyramid_attention_broadcast' .* take it off first",
        take_off_broadcast,
    ),
    "diffusers' layer skip": Refusal(
        lambda pipe: apply_layer_skip(pipe.transformer, LayerSkipConfig([1], fqn="blocks", skip_attention=False, skip_ff=True)),
        r"transformer.blocks.1.ffn has the hook 'layer_skip_hook' .* take it off first",
        remove("blocks.1.ffn", "layer_skip_hook"),
    ),
    "group offload with a stream, before the first run": Refusal(
        track, r"transformer.blocks.0 is offloaded by groups with a stream, .* run the pipeline once .* lens.plain", settle
    ),
    "compiled blocks": Refusal(
        compile_blocks, r"transformer.blocks.0 is compiled, .*torch.compiler.set_stance\('force_eager'\)", uncompile
    ),
    "compiled denoiser": Refusal(
        lambda pipe: pipe.transformer.compile(backend="eager"),
        r"transformer is compiled, .*torch.compiler.set_stance\('force_eager'\)",
        uncompile,
        plainly=False,
    ),
    "a compiled `forward`": Refusal(compile_forward, r"transformer.blocks.1.ffn is compiled, .*set_stance", uncompile_forward),
    "blocks replaced by `torch.compile(block)`": Refusal(
        replace_block, r"transformer.blocks.1 is an OptimizedModule, .*compile_repeated_blocks\(\)", put_block_back
    ),
    "context or tensor parallelism": Refusal(
        divide, r"transformer is spread over processes .* load it without", lambda pipe: divide(pipe, None)
    ),
    "dropout that is on": Refusal(
        drop,
        r"transformer.blocks.0.*lora_dropout.* drops a share of 0.5 at random, .* pipe.transformer.eval\(\)",
        stop_dropping,
        plainly=False,
    ),
    "attention backend `flex`, engine `hooks`": Refusal(
        lambda pipe: attend(pipe, "flex"),
        r"blocks.0.attn1 attends through the backend 'flex', .* engine='nnsight', or set_attention_backend\('native'\)",
        lambda pipe: attend(pipe, "native"),
        engines=("hooks",),
    ),
    "device map over layerwise casting, engine `nnsight`": Refusal(
        lambda pipe: (cast(pipe), align(pipe)),
        r"blocks.0.attn1.to_out.0 has a hook of accelerate and another wrapper besides, .* engine='hooks'",
        undo=None,
        engines=("nnsight",),
    ),
}
"""Settings in which reading is refused."""


class Counting:
    """Counts the calls of the denoisers."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        for denoiser in denoisers(pipe):
            denoiser.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    with nothing_stays():
        yield


@pytest.fixture
def pipe(text_pipe: Any) -> Any:
    """Text to video, two experts."""
    return text_pipe


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_runs(name: str, engine: str, pipe: Any) -> None:
    refusal = REFUSED[name]
    lens = dl.wrap(pipe, engine=engine)
    record = dl.at(site=["resid", "heads", "q"])
    refusal.apply(pipe)
    if engine not in refusal.engines:
        run(lens, record=record)
        return
    counting = Counting(pipe)
    with pytest.raises(dl.InputError, match=refusal.says) as error:
        run(lens, record=record)
    assert "\n" not in str(error.value)
    assert counting.calls == 0
    if refusal.plainly:
        assert torch.equal(run(lens).latents[-1], plain(lens))
    else:
        with pytest.raises(dl.InputError, match=refusal.says):
            run(lens)
    if refusal.undo is not None:
        refusal.undo(pipe)
        assert len(run(lens, record=record).activations) > 0


def test_the_stance_of_the_compiler_is_seen(pipe: Any, engine: str) -> None:
    """Torch has no public way to ask for its stance: this fails where a new one keeps it elsewhere."""
    lens = dl.wrap(pipe, engine=engine)
    compile_blocks(pipe)
    with eagerly():
        assert len(run(lens, record=dl.at(block=0)).activations) > 0
    with pytest.raises(dl.InputError, match="is compiled"):
        run(lens, record=dl.at(block=0))
    with pytest.raises(dl.InputError, match="is compiled"):
        run(lens, keep_calls=True)


def test_a_denoiser_that_torch_compile_returned_is_refused_when_it_is_wrapped(pipe: Any) -> None:
    lens = dl.wrap(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    says = r"transformer is an OptimizedModule, .* write pipe.transformer._orig_mod in its place"
    with pytest.raises(dl.InputError, match=says):
        dl.wrap(pipe)
    with pytest.raises(dl.InputError, match=says):
        run(lens)
    pipe.transformer = pipe.transformer._orig_mod
    assert len(run(dl.wrap(pipe), record=dl.at()).activations) > 0


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (lambda pipe: offload_groups(pipe, "leaf_level"), "transformer is offloaded by groups, .* load it on its device"),
        (offload_modules, "transformer is offloaded module by module, .* load it on its device"),
    ],
    ids=["groups", "modules"],
)
def test_gradients_need_weights_that_stay(apply: Callable[[Any], None], says: str, pipe: Any) -> None:
    apply(pipe)
    lens = dl.wrap(pipe, engine="hooks")
    call = run(lens, keep_calls=True).calls[0, "cond"]
    with pytest.raises(dl.InputError, match=says):
        lens.replay(call, gradients=True)
    assert lens.replay(call).velocity.any()


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_a_torch_hook_that_replaces_what_is_read(pipe: Any) -> None:
    traced, hooked = (dl.wrap(pipe, engine=engine) for engine in ALL)
    handle = pipe.transformer.blocks[1].register_forward_hook(doubled)
    with pytest.raises(dl.InputError, match=r"a torch hook on blocks.1 replaces what it returns, .* engine='hooks'"):
        run(traced, record=dl.at(block=1))
    # The other engine sees what goes on to the next block; and so does this one, there.
    after = run(hooked, record=dl.at(block=[1, 2]))
    assert torch.equal(run(traced, record=dl.at(block=2)).activation(2, 0, "cond"), after.activation(2, 0, "cond"))
    handle.remove()
    before = run(traced, record=dl.at(block=1)).activation(1, 0, "cond")
    assert torch.equal(after.activation(1, 0, "cond"), 2 * before)


def test_a_module_that_loses_its_forward_during_a_run(pipe: Any) -> None:
    block, calls = pipe.transformer.blocks[1], []

    def lose(module: nn.Module, args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            vars(block).pop("forward")

    pipe.transformer.blocks[2].register_forward_pre_hook(lose)
    with pytest.raises(dl.InputError, match=r"blocks.1 ran 3 times and nnsight saw 2 of them: .* engine='hooks'"):
        dl.wrap(pipe).run(**arguments(pipe, num_inference_steps=4), decode=False, record=dl.at(block=1))


def test_a_module_that_a_researcher_wrapped_stays_so(engine: str) -> None:
    """An own `forward` of a module is run, and is there afterwards."""
    pipe = tiny_pipeline()
    attention = pipe.transformer.blocks[1].attn1
    forward = attention.forward

    def halved(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) / 2

    lens = dl.wrap(pipe, engine=engine)
    before = run(lens, record=dl.at(block=1, step=0, site="attn")).activation(site="attn")
    attention.forward = halved
    after = run(lens, record=dl.at(block=1, step=0, site="attn")).activation(site="attn")
    assert torch.equal(after, before / 2)
    assert vars(attention)["forward"] is halved
