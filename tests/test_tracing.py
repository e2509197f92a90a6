"""Both engines: they change nothing, they agree bit for bit, they hold little, and they leave nothing behind."""

from __future__ import annotations

import argparse
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import BLOCKS, arguments, picture, shown, tiny_pipeline, tiny_transformer
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.architectures import WAN
from dit_lens.hooks import HookEngine
from dit_lens.taps import Tap
from dit_lens.tracing import TracingEngine


def video(pipe: Any, lens: dl.Lens, **changes: Any) -> Tensor:
    """The plain pipeline's video, laid out as a run's."""
    return lens.plain(**{**arguments(pipe), "seed": 3, **changes}, output_type="pt").frames.movedim(2, -1)


def untouched(pipe: Any) -> None:
    """Assert that no hook and no wrapper is left on the pipeline."""
    for name, component in pipe.components.items():
        for module in component.modules() if isinstance(component, nn.Module) else []:
            assert not module._forward_hooks, name
            assert not module._forward_pre_hooks, name
        for wrapped in ("step", "cache_context", "encode"):
            assert wrapped not in getattr(component, "__dict__", {}), (name, wrapped)
    assert not hasattr(pipe, "_progress_bar_config")


def test_a_run_that_records_nothing_is_the_plain_pipeline(any_pipe: Any, engine: str) -> None:
    lens = dl.wrap(any_pipe, engine=engine)
    run = lens.run(**arguments(any_pipe), seed=3)
    assert torch.equal(shown(run), video(any_pipe, lens))
    assert len(run.activations) == 0
    untouched(any_pipe)


def test_a_run_that_records_everything_is_the_plain_pipeline(any_pipe: Any, engine: str) -> None:
    lens = dl.wrap(any_pipe, engine=engine)
    before = video(any_pipe, lens)
    run = lens.run(**arguments(any_pipe), seed=3, record=dl.at(site="all"))
    assert torch.equal(shown(run), before)
    assert len(run.activations) == BLOCKS * 4 * 2 * len(WAN.sites)
    assert torch.equal(video(any_pipe, lens), before), "the plain pipeline after a trace"
    untouched(any_pipe)


def test_a_batch_is_recorded_without_changing_it(engine: str) -> None:
    pipe = tiny_pipeline()
    lens = dl.wrap(pipe, engine=engine)
    changes = {"prompt": ["walk", "draw"], "image": [picture((200, 0, 0)), picture((0, 200, 0))]}
    run = lens.run(**arguments(pipe, **changes), seed=3, record=dl.at())
    assert torch.equal(shown(run), video(pipe, lens, **changes))


def test_both_engines_record_the_same_bits(any_pipe: Any) -> None:
    record = [dl.at(site="all"), dl.Record(dl.at(frames=[1]), dl.norm)]
    traced, hooked = (
        dl.wrap(any_pipe, engine=name).run(**arguments(any_pipe), seed=3, record=record) for name in ("nnsight", "hooks")
    )
    assert [entry.cell for entry in traced.activations] == [entry.cell for entry in hooked.activations]
    assert len(traced.activations) == (len(WAN.sites) + 1) * BLOCKS * 4 * 2
    for ours, theirs in zip(traced.activations, hooked.activations, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor), ours


def test_recorded_streams_are_what_a_torch_hook_sees(image_pipe: Any, engine: str) -> None:
    seen: list[Tensor] = []
    block = image_pipe.transformer.blocks[1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()) or seen.append(output))
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(block=1, site=["resid", "update"]))
    handle.remove()
    for index, (step, branch) in enumerate((step, branch) for step in range(4) for branch in ("cond", "uncond")):
        before, after = (tensor.unflatten(1, run.layout.shape) for tensor in seen[2 * index : 2 * index + 2])
        assert torch.equal(run.activation(block=1, step=step, branch=branch), after)
        assert torch.equal(run.activation(block=1, step=step, branch=branch, site="update"), after - before)


@contextmanager
def counting_alive(pipe: Any) -> Iterator[list[int]]:
    """How many block outputs were alive each time that a block had run; the garbage collector is off meanwhile."""
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in outputs))

    handles = [block.register_forward_hook(count) for block in pipe.transformer.blocks]
    gc.disable()
    try:
        yield alive
        alive.append(sum(reference() is not None for reference in outputs))
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", ["resid", "update", "mlp_contribution", "q", "all"])
@pytest.mark.parametrize("streamed", [False, True], ids=["reducer", "sink"])
def test_at_most_two_block_outputs_are_alive(image_pipe: Any, engine: str, site: str, streamed: bool) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    sizes: list[int] = []
    sink = (lambda cell, tensor: sizes.append(tensor.numel())) if streamed else None
    record = dl.Record(dl.at(site=site), dl.full if streamed else dl.norm, sink)
    with counting_alive(image_pipe) as alive:
        run = lens.run(**arguments(image_pipe), record=record)
    assert max(alive[:-1]) <= 2
    assert alive[-1] == 0
    sites = len(WAN.sites) if site == "all" else 1
    assert len(sizes if streamed else run.activations) == BLOCKS * 4 * 2 * sites


@pytest.mark.parametrize("engine_class", [TracingEngine, HookEngine])
def test_a_visitor_may_replace_a_stream(image_pipe: Any, engine_class: type) -> None:
    """What edits will be built on: zeros after block 1 reach the next tap and the video, the same on both engines."""
    lens = dl.wrap(image_pipe, engine="hooks")
    seen: list[Tensor] = []

    def see(tensor: Tensor) -> None:
        seen.append(tensor)

    taps = [Tap("transformer", 1, "resid", torch.zeros_like), Tap("transformer", 1, "resid", see)]
    generator = torch.Generator().manual_seed(3)
    call = {**arguments(image_pipe), "generator": [generator], "output_type": "pt"}
    output = engine_class(image_pipe, WAN).call(lambda: image_pipe(**call), taps)
    assert len(seen) == 8
    assert all(not tensor.any() for tensor in seen)
    # The oracle: a block that returns zeros by itself.
    image_pipe.transformer.blocks[1] = Zero()
    expected = lens.plain(**arguments(image_pipe), seed=3, output_type="pt").frames
    assert torch.equal(output.frames, expected)


class Zero(nn.Module):
    """A block that returns zeros."""

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def test_an_exception_in_a_reducer_leaves_the_pipeline_as_it_was(any_pipe: Any, engine: str) -> None:
    lens = dl.wrap(any_pipe, engine=engine)
    before = video(any_pipe, lens)

    def fail(activation: Tensor, cell: dl.Cell) -> Tensor:
        if cell.step == 2:
            raise ZeroDivisionError("on purpose")
        return activation.mean()

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        lens.run(**arguments(any_pipe), seed=3, record=dl.Record(dl.at(), fail))
    untouched(any_pipe)
    assert torch.equal(video(any_pipe, lens), before)
    assert torch.equal(shown(lens.run(**arguments(any_pipe), seed=3, record=dl.at())), before)


def test_an_exception_in_the_pipeline_comes_out_as_it_is(image_pipe: Any, engine: str) -> None:
    def fail(pipe: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(), callback_on_step_end=fail)
    untouched(image_pipe)


def test_an_interrupted_run_keeps_what_it_came_to(image_pipe: Any, engine: str) -> None:
    def stop(pipe: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    lens = dl.wrap(image_pipe, engine=engine)
    run = lens.run(**arguments(image_pipe), record=dl.at(block=0), callback_on_step_end=stop)
    assert run.steps == 2
    assert [cell.step for cell in run.activations.cells] == [0, 0, 1, 1]
    with pytest.raises(dl.InputError, match=r"at\(step=3\) matched nothing: the run ended before"):
        lens.run(**arguments(image_pipe), record=dl.at(step=3), callback_on_step_end=stop)


def test_a_replaced_denoiser_is_followed(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    first = lens.run(**arguments(image_pipe), record=dl.at(block=0, step=0, branch="cond"))
    image_pipe.transformer = tiny_transformer(image_pipe.transformer.config.in_channels)
    second = lens.run(**arguments(image_pipe), record=dl.at(block=0, step=0, branch="cond"))
    assert not torch.equal(first.activation(), second.activation())
    assert torch.equal(shown(second), video(image_pipe, lens, seed=0))


def test_runs_in_threads_take_turns(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    results: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = lens.run(**arguments(image_pipe), seed=seed, record=dl.at(block=2)).activation(step=3)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        expected = lens.run(**arguments(image_pipe), seed=seed, record=dl.at(block=2)).activation(step=3)
        assert torch.equal(results[seed], expected)


def test_a_run_inside_a_run_is_refused(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)

    def nested(activation: Tensor, cell: dl.Cell) -> Tensor:
        lens.run(**arguments(image_pipe))
        return activation

    with pytest.raises(RuntimeError, match="cannot run inside a reducer, sink or edit"):
        lens.run(**arguments(image_pipe), record=dl.Record(dl.at(), nested))
    untouched(image_pipe)


def test_nnsight_mounts_nothing_on_other_objects() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    assert parser.parse_args([]).save is False
    assert not hasattr(object(), "save")
