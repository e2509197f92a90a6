"""Pipelines as people run them: offloaded, cast, adapted, compiled; every setting, both engines, wrapped before and after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import WanPipeline
from living import (
    SITES,
    WORKS,
    Setting,
    adapt,
    attend,
    call,
    cast,
    denoisers,
    eagerly,
    load_adapters,
    lora,
    nothing_stays,
    offload_modules,
    plain,
    run,
    wrapped,
)
from test_obstacles import REFUSED
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.obstacles import EAGER

PAGE = Path(__file__).parent.parent / "docs" / "real-pipelines.md"


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    with nothing_stays():
        yield


def traces(pipe: Any) -> list[tuple[str, list[str], int]]:
    """What is on the modules of a pipeline: their own attributes by name, and how many torch hooks they have."""
    found = []
    for name, component in pipe.components.items():
        for path, module in component.named_modules() if isinstance(component, nn.Module) else []:
            # dynamo marks what it has looked at; the registry of diffusers' hooks is made by the pipeline itself.
            own = [key for key in sorted(vars(module)) if not key.startswith(("_dynamo", "_diffusers_hook"))]
            found.append((f"{name}.{path}", own, len(module._forward_hooks) + len(module._forward_pre_hooks)))
            assert "nnsight" not in type(vars(module).get("forward")).__module__, path
    return found


def same(ours: dl.Run, theirs: dl.Run) -> None:
    """Assert that two runs recorded the same bits and came to the same latents."""
    assert len(ours.activations) == len(theirs.activations) > 0
    for one, other in zip(ours.activations, theirs.activations, strict=True):
        assert one.cell == other.cell
        assert torch.equal(one.tensor, other.tensor), one.cell
    assert torch.equal(ours.latents, theirs.latents)


@dataclass(frozen=True)
class Outcome:
    """What a lens gave in one setting: a run that recorded, and one that edited."""

    recorded: dl.Run
    edited: dl.Run


@cache
def donor() -> dl.Run:
    """Another seed, on the pipeline as it is made."""
    return run(dl.wrap(tiny_pipeline(WanPipeline, experts=2), engine="hooks"), seed=4, record=dl.at(block=1, step=0))


def outcome(lens: dl.Lens) -> Outcome:
    """Run all there is to compare, and hold it to the plain pipeline on the way."""
    before = plain(lens)
    there = traces(lens.pipe)
    assert torch.equal(run(lens).latents[-1], before.cpu())
    recorded = run(lens, record=dl.at(site=SITES))
    assert torch.equal(recorded.latents[-1], before.cpu())
    edits = [
        dl.Zero(dl.at(block=0, step=0, site="heads", head=1)),
        dl.Zero(dl.at(block=0, step=1, site="attn")),
        dl.Patch(dl.at(block=1, step=0, frames=[1]), donor()),
        dl.Skip(dl.at(block=2, step=1)),
    ]
    edited = run(lens, record=dl.at(), edits=edits)
    assert all(edited.fired.values())
    same(run(lens, record=dl.at(site=SITES)), recorded)
    assert traces(lens.pipe) == there
    assert torch.equal(plain(lens), before)
    return Outcome(recorded, edited)


@pytest.mark.parametrize("name", WORKS)
def test_a_setting_changes_nothing_for_the_lens(name: str) -> None:
    """On a pipeline that nnsight has been in before, and on one that no engine has seen."""
    with WORKS[name].context():
        ours = outcome(wrapped(WORKS[name], "nnsight", first=True))
        theirs = outcome(wrapped(WORKS[name], "hooks", first=False))
    same(ours.recorded, theirs.recorded)
    same(ours.edited, theirs.edited)
    assert {cell.expert for cell in ours.recorded.activations.cells} == {"transformer", "transformer_2"}
    for step, block in ((0, 0), (0, 1), (1, 0)):
        place = {"block": block, "step": step, "branch": "cond"}
        assert not torch.equal(ours.edited.activation(**place), ours.recorded.activation(**place))
    skipped, taken = (ours.edited.activation(block, 1, "cond") for block in (2, 1))
    assert torch.equal(skipped, taken)


@pytest.mark.parametrize("name", ["LoRA, one for each expert", "LoRA, then model offload"])
def test_when_a_pipeline_is_wrapped_makes_no_difference(name: str) -> None:
    edit = dl.Zero(dl.at(block=1, step=0, site="heads", head=1))
    lenses = [wrapped(WORKS[name], engine, first) for engine, first in (("nnsight", False), ("nnsight", True), ("hooks", True))]
    after, before, hooked = (run(lens, edits=edit, record=dl.at(site=SITES)) for lens in lenses)
    same(after, before)
    same(after, hooked)


@contextmanager
def watching(module: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What a module takes and returns, seen by torch hooks of the test's own."""
    taken: list[Tensor] = []
    returned: list[Tensor] = []
    before = module.register_forward_pre_hook(lambda module, args: taken.append(args[0].clone()))
    after = module.register_forward_hook(lambda module, args, output: returned.append(output.clone()))
    try:
        yield taken, returned
    finally:
        before.remove()
        after.remove()


def test_sites_of_adapted_modules_are_the_whole_modules(engine: str) -> None:
    pipe = tiny_pipeline(WanPipeline, experts=2)
    lens = dl.wrap(pipe, engine=engine)
    bare = run(lens, record=dl.at(site=SITES))
    load_adapters(pipe)
    for step, denoiser in enumerate(denoisers(pipe)):
        attention = denoiser.blocks[1].attn1
        with watching(attention) as (_, returned), watching(attention.to_out[0]) as (taken, _):
            adapted = run(lens, record=dl.at(block=1, site=["attn", "heads"]))
        place = {"block": 1, "step": step, "branch": "cond"}
        assert torch.equal(adapted.activation(**place, site="attn").flatten(1, 3), returned[0])
        assert torch.equal(adapted.activation(**place, site="heads").flatten(1, 3).flatten(2), taken[0])
        assert not torch.equal(adapted.activation(**place, site="attn"), bare.activation(**place, site="attn"))
    # Without the second LoRA only the second expert changes: each has its own.
    pipe.transformer_2.disable_lora()
    one = run(lens, record=dl.at(block=1, site="attn"))
    ours, theirs = ([each.activation(step=step, site="attn") for step in (0, 1)] for each in (one, adapted))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])
    pipe.unload_lora_weights()
    same(run(lens, record=dl.at(site=SITES)), bare)


def test_the_scale_of_a_lora_reaches_runs_and_replays(engine: str) -> None:
    lens = wrapped(Setting(adapt), engine, first=False)
    pipe = lens.pipe
    half = lens.run(**call(pipe), seed=3, decode=False, attention_kwargs={"scale": 0.5}, record=dl.at(), keep_calls=True)
    for denoiser in denoisers(pipe):
        denoiser.set_adapters("default", 0.5)
    same(half, run(lens, record=dl.at()))
    for denoiser in denoisers(pipe):
        denoiser.set_adapters("default", 1.0)
    again = lens.replay(half.calls[1, "cond"], record=dl.at(block=2))
    assert torch.equal(again.velocity, half.outputs["cond"][1])


def test_the_hash_knows_adapters_and_how_they_are_set() -> None:
    pipe = tiny_pipeline(WanPipeline, experts=2)
    lens = dl.wrap(pipe)
    seen = [lens.hash]
    pipe.load_lora_weights(lora(pipe.transformer, seed=1), adapter_name="one")
    seen.append(lens.hash)
    pipe.transformer.set_adapters("one", 0.5)
    seen.append(lens.hash)
    pipe.transformer.disable_lora()
    seen.append(lens.hash)
    assert len(set(seen)) == 4
    pipe.unload_lora_weights()
    assert lens.hash == seen[0]


def test_the_hash_finds_weights_that_are_elsewhere() -> None:
    pipe = tiny_pipeline(WanPipeline, experts=2)
    there = dl.wrap(pipe).hash
    offload_modules(pipe)
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
    assert dl.wrap(pipe).hash == there


@pytest.mark.parametrize("name", ["model offload", "device map", "LoRA, then layerwise casting"])
def test_stored_answers_and_replays(name: str, engine: str) -> None:
    lens = wrapped(WORKS[name], engine, first=False)
    clean = run(lens, keep_calls=True, record=dl.at(block=0))
    for (step, branch), kept in clean.calls.items():
        assert torch.equal(lens.replay(kept, record=dl.at(block=1)).velocity, clean.outputs[branch][step])
    edit = dl.Zero(dl.at(block=1, step=1, site="mlp"))
    whole = run(lens, edits=edit, record=dl.at(block=2, step=1))
    first = {(0, "cond"): clean.outputs["cond"][0]}
    same(run(lens, edits=edit, record=dl.at(block=2, step=1), answers=first), whole)
    resumed = {**first, (1, "cond"): dl.Resume(1, clean.activation(0, 1, "cond"))}
    same(run(lens, edits=edit, record=dl.at(block=2, step=1), answers=resumed), whole)
    assert torch.equal(run(lens, until=0).outputs["cond"][0], clean.outputs["cond"][0])
    assert torch.equal(run(lens).latents, clean.latents)


def test_gradients_through_weights_that_are_cast(engine: str) -> None:
    gradients = []
    for rounded in (False, True):
        pipe = tiny_pipeline(WanPipeline, experts=2)
        cast(pipe)
        if rounded:
            storing = {path for path, module in pipe.transformer.named_modules() if "_diffusers_hook" in vars(module)}
            pipe = tiny_pipeline(WanPipeline, experts=2)
            for path in storing:
                pipe.transformer.get_submodule(path).to(torch.float16).to(torch.float32)
        lens = dl.wrap(pipe, engine=engine)
        replay = lens.replay(run(lens, keep_calls=True).calls[0, "cond"], gradients=True)
        gradients.append(torch.autograd.grad(replay.velocity.square().sum(), replay.call.taken)[0])
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_what_a_lens_says_of_a_cast_pipeline_is_what_it_computes_in() -> None:
    pipe = tiny_pipeline(WanPipeline, experts=2)
    cast(pipe)
    lens = dl.wrap(pipe)
    assert "M parameters in float32" in str(lens.describe())
    assert {entry.tensor.dtype for entry in run(lens, record=dl.at(site=SITES)).activations} == {torch.float32}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_nnsight_reads_what_another_backend_is_given() -> None:
    lens = wrapped(Setting(partial(attend, backend="flex")), "nnsight", first=False)
    flexible = outcome(lens).recorded
    attend(lens.pipe, "native")
    native = run(lens, record=dl.at(site=SITES))
    # Before any attention has been computed the two agree to the bit; its result differs in rounding.
    for site in ("q", "heads"):
        ours, theirs = (one.activation(0, 0, "cond", site=site) for one in (flexible, native))
        assert torch.equal(ours, theirs) if site == "q" else torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("engine", "whole"), [("nnsight", True), ("nnsight", False), ("hooks", False)])
def test_compiled_code_stays_compiled_and_the_same(engine: str, whole: bool) -> None:
    """What is read eagerly in between leaves nothing that compiled code would see."""
    pipe = tiny_pipeline(WanPipeline, experts=2)
    lens = dl.wrap(pipe, engine=engine)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for denoiser in denoisers(pipe):
        denoiser.compile(backend=backend) if whole else denoiser.compile_repeated_blocks(backend=backend)
    before = plain(lens)
    compiled = len(graphs)
    assert compiled > 0
    with eagerly():
        read = run(lens, record=dl.at(site="all"), edits=[dl.Zero(dl.at(block=1, step=1, site="heads"))])
        assert len(read.activations) > 0
    assert torch.equal(plain(lens), before)
    if not whole:
        assert torch.equal(run(lens).latents[-1], before)
    assert len(graphs) == compiled


def rows() -> dict[str, str]:
    """The table of the page: what is said of each setting."""
    cells = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells[1:]}


def test_every_row_of_the_page_is_held_by_a_test() -> None:

    page = rows()
    assert {name for name, verdict in page.items() if verdict == "works"} == set(WORKS)
    assert {name for name, verdict in page.items() if verdict == "refused"} == set(REFUSED)
    assert {verdict for verdict in page.values()} == {"works", "refused"}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        assert len(re.findall(r"\|", line)) in (0, 4), line
    assert "torch.compiler.set_stance('force_eager')" in EAGER
    assert 'torch.compiler.set_stance("force_eager")' in PAGE.read_text(encoding="utf-8")
