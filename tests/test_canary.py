"""Canaries: one fact each that dit_lens relies on in nnsight, diffusers, torch and accelerate, on as small a model as shows it.

They import nothing of dit_lens, so that they can speak where it cannot be imported any more; `make canary` runs them against
the newest releases. docs/upgrading.md lists them and says what to do when one breaks.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from canaries import STARTS, TOKENS, WAN_CALL, Chain, each_visit, fact, outputs, same, traced, wan
from torch import nn


def thrice(chain: Chain) -> Any:
    """A function that calls a chain three times."""
    return lambda: [chain(x) for x in STARTS]


# nnsight


@fact(
    "nnsight: an open loop `tracer.iter[:]` sees every execution of a place, and OutOfOrderError ends it",
    used_in="tracing.py",
    look_at="nnsight.intervention.interleaver, and how tracer.iter[:] ends when the run is over",
)
def test_an_open_loop_ends_with_out_of_order_error() -> None:
    from nnsight.intervention.interleaver import OutOfOrderError

    chain, seen, ended = Chain(), [], []

    def worker(tracer: Any, model: Any) -> None:
        for _ in tracer.iter[:]:
            try:
                seen.append(model.get("blocks.1").output)
            except OutOfOrderError as error:
                ended.append(error)
                return

    with torch.no_grad():
        traced(chain, thrice(chain), worker)
    same(seen, [call[1] for call in outputs(chain)])
    assert len(ended) == 1


@fact(
    "nnsight: a place that is never reached ends its own worker the same way, and the run and the others go on",
    used_in="tracing.py",
    look_at="OutOfOrderError of a module that never runs (an expert that is not used)",
)
def test_a_place_that_is_never_reached_ends_its_worker_alone() -> None:
    chain, seen, visits = Chain(), [], []
    first = chain.blocks[0]
    with torch.no_grad():
        traced(
            chain,
            lambda: [first(x) for x in STARTS],
            lambda tracer, model: each_visit(tracer, lambda: visits.append(model.get("blocks.2").output)),
            lambda tracer, model: each_visit(tracer, lambda: seen.append(model.get("blocks.0").output)),
        )
        same(seen, [first(x) for x in STARTS])
    assert not visits


@fact(
    "nnsight: every invoke without input is a worker of its own; in whatever order they are opened, none waits for another,"
    " and a block that one of them skips moves no other's count",
    used_in="tracing.py",
    look_at="tracer.invoke() without arguments",
)
def test_workers_do_not_depend_on_each_other() -> None:
    chain, seen, skipped = Chain(), {0: [], 1: [], 2: []}, []

    def watcher(index: int) -> Any:
        return lambda tracer, model: each_visit(tracer, lambda: seen[index].append(model.get(f"blocks.{index}").output))

    def skipper(tracer: Any, model: Any) -> None:
        block = model.get("blocks.1")

        def visit() -> None:
            taken = block.input
            skipped.append(taken)
            if len(skipped) == 2:
                block.skip(taken)

        each_visit(tracer, visit)

    with torch.no_grad():
        traced(chain, thrice(chain), skipper, watcher(2), watcher(0), watcher(1))
    expected = outputs(chain)
    assert [len(each) for each in seen.values()] == [3, 3, 3]
    same(seen[0], [call[0] for call in expected])
    same([seen[1][0], seen[1][2]], [expected[0][1], expected[2][1]])
    assert torch.equal(seen[1][1], expected[1][0])


@fact(
    "nnsight: workers run in step with the model: what plain Python says at the moment of a visit is true of that visit",
    used_in="tracing.py schedule.py",
    look_at="whether workers are still greenlets that run while the module waits, and not threads or a later pass",
)
def test_visits_are_in_step_with_the_model() -> None:
    chain, events = Chain(), []
    for index, block in enumerate(chain.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: events.append(("runs", index)))

    def watcher(index: int) -> Any:
        def visit(model: Any) -> None:
            _ = model.get(f"blocks.{index}").output
            events.append(("seen", index))

        return lambda tracer, model: each_visit(tracer, lambda: visit(model))

    with torch.no_grad():
        traced(chain, thrice(chain), watcher(2), watcher(1), watcher(0))
    assert events == [(what, index) for _ in STARTS for index in range(3) for what in ("runs", "seen")]


@fact(
    "nnsight: `envoy.skip(value)` may be called once the inputs were shown; the block does not run, and its value is the output"
    " that others see and the next block takes",
    used_in="tracing.py detours.py",
    look_at="Envoy.skip, and when nnsight asks whether a module is skipped",
)
def test_a_skip_is_decided_after_the_inputs_are_shown() -> None:
    chain, ran, seen = Chain(), [], []
    inner = nn.Sequential(chain.blocks[1])
    inner[0].register_forward_hook(lambda *_: ran.append(1))
    chain.blocks[1] = inner

    def skipper(tracer: Any, model: Any) -> None:
        block = model.get("blocks.1")

        def visit() -> None:
            (taken,), named = block.inputs
            assert not named
            block.skip(-taken)

        each_visit(tracer, visit)

    with torch.no_grad():
        traced(
            chain,
            thrice(chain),
            skipper,
            lambda tracer, model: each_visit(tracer, lambda: seen.append(model.get("blocks.1").output)),
            lambda tracer, model: each_visit(tracer, lambda: seen.append(model.get("blocks.2").input)),
        )
        expected = [-chain.blocks[0](x) for x in STARTS]
    assert not ran
    same(seen, [each for each in expected for _ in range(2)])


@fact(
    "nnsight: what is assigned to `envoy.output` or `envoy.input` goes on in its place",
    used_in="tracing.py",
    look_at="the setters of Envoy.output and Envoy.input",
)
def test_what_is_assigned_goes_on() -> None:
    chain, results = Chain(), []

    def doubler(tracer: Any, model: Any) -> None:
        block = model.get("blocks.0")

        def visit() -> None:
            block.output = block.output * 2

        each_visit(tracer, visit)

    def negator(tracer: Any, model: Any) -> None:
        block = model.get("blocks.2")

        def visit() -> None:
            block.input = -block.input

        each_visit(tracer, visit)

    with torch.no_grad():
        traced(chain, lambda: results.extend(chain(x) for x in STARTS), doubler, negator)
        one, two, three = chain.blocks
        same(results, [three(-two(one(x) * 2)) for x in STARTS])


@fact(
    "nnsight: `model.trace(fn=function)` runs any function that calls a wrapped module, and changes no bit of it",
    used_in="tracing.py",
    look_at="NNsight.trace(fn=...), and nnsight.NNsight of a ModuleDict",
)
def test_a_trace_runs_any_function_and_changes_no_bit() -> None:
    model, results = wan(), []

    def run() -> None:
        results.append(model(**WAN_CALL).sample)

    with torch.no_grad():
        run()
        traced(model, run, lambda tracer, model: each_visit(tracer, lambda: model.get("blocks.0").output))
        run()
    same(results[1:], results[:1] * 2)


@fact(
    "nnsight: an exception of a worker ends the run with that exception or one raised from it, and the model can be used after",
    used_in="tracing.py",
    look_at="what tracing an exception raises, and what it leaves in the wrapped modules",
)
def test_an_exception_of_a_worker_ends_the_run() -> None:
    chain, calls, failures = Chain(), [], []

    def run() -> None:
        for x in STARTS:
            calls.append(chain(x))

    def worker(tracer: Any, model: Any) -> None:
        for _ in tracer.iter[:]:
            try:
                _ = model.get("blocks.1").output
                raise KeyError("of the visitor")
            except KeyError as error:
                failures.append(error)
                raise

    with torch.no_grad():
        with pytest.raises(Exception, match="of the visitor"):
            traced(chain, run, worker)
        assert not calls
        same([chain(x) for x in STARTS], [call[-1] for call in outputs(chain)])
    assert len(failures) == 1


@fact(
    "nnsight: `unmount('save')` takes the method `save` off every Python object again",
    used_in="tracing.py",
    look_at="nnsight._c (mount, unmount), and CONFIG.APP.PYMOUNT",
)
def test_save_can_be_unmounted() -> None:
    import nnsight
    from nnsight._c import mount, unmount

    assert mount is not None
    assert unmount is not None
    if hasattr(object(), "save"):  # unless dit_lens did it in this process already
        unmount("save")
        try:
            assert not hasattr(object(), "save")
        finally:
            mount(nnsight.save, "save")


@fact(
    "nnsight and diffusers: a Wan attention names the call of its processor '...processor...', and the processor that of"
    " attention 'dispatch_attention_fn...'",
    used_in="tracing.py",
    look_at="envoy.source.names, diffusers' WanAttention.forward and WanAttnProcessor.__call__",
)
def test_source_names_of_a_wan_attention() -> None:
    model, found = wan(num_layers=1), {}

    def worker(path: str) -> Any:
        def visit(model: Any) -> None:
            source = model.get(path).source
            processors = [name for name in source.names if "processor" in name]
            inside = list(source.node(processors[-1]).source.names) if processors else []
            found[path] = (list(source.names), inside)
            _ = model.get(path).output

        return lambda tracer, model: each_visit(tracer, lambda: visit(model))

    paths = ("blocks.0.attn1", "blocks.0.attn2")
    with torch.no_grad():
        traced(model, lambda: model(**WAN_CALL), *map(worker, paths))
    for path in paths:
        names, inside = found[path]
        assert [name for name in names if "processor" in name], names
        assert [name for name in inside if name.startswith("dispatch_attention_fn")], inside


def attention_call(model: Any, path: str) -> Any:
    """nnsight's node of the last call of attention inside a processor."""
    source = model.get(path).source
    inside = source.node([name for name in source.names if "processor" in name][-1]).source
    return inside.node([name for name in inside.names if name.startswith("dispatch_attention_fn")][-1])


@fact(
    "nnsight and diffusers: the call of attention in a processor shows (query, key, value) of (batch, tokens, heads, channels);"
    " they can be exchanged, and the call can be answered by `skip`",
    used_in="tracing.py ports.py",
    look_at="the arguments of diffusers' dispatch_attention_fn, nnsight's source nodes (inputs, skip)",
)
def test_the_call_of_attention_is_read_changed_and_answered() -> None:
    model, seen, results = wan(), [], []

    def worker(answer: str) -> Any:
        def visit(model: Any) -> None:
            node = attention_call(model, "blocks.1.attn1")
            (query, key, value), named = node.inputs
            seen.append((query.shape, key.shape, value.shape))
            if answer == "changed":
                node.inputs = ((query, key, value * 0), named)
            elif answer == "answered":
                node.skip(torch.zeros_like(query))

        return lambda tracer, wrapped: each_visit(tracer, lambda: visit(wrapped))

    with torch.no_grad():
        for answer in ("read", "changed", "answered"):
            traced(model, lambda: results.append(model(**WAN_CALL).sample), worker(answer))
        plain = model(**WAN_CALL).sample
    assert seen == [((1, TOKENS, 2, 8),) * 3] * 3
    assert torch.equal(results[0], plain)
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[1], plain)


@fact(
    "nnsight: it sits in a module's `forward`, inside the torch hooks, which run for a skipped module too and see what was"
    " assigned to its output",
    used_in="ports.py tracing.py schedule.py",
    look_at="where nnsight's Controller is put",
)
def test_torch_hooks_are_around_nnsight() -> None:
    chain, seen = Chain(), []
    chain.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    chain.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))

    def skipper(tracer: Any, model: Any) -> None:
        block = model.get("blocks.1")
        each_visit(tracer, lambda: block.skip(block.input * 3))

    with torch.no_grad():
        traced(chain, thrice(chain), skipper)
        taken = [chain.blocks[0](x) for x in STARTS]
    same(seen, [each for one in taken for each in (one, one * 3)])


# torch and accelerate


@fact(
    "torch: a tensor's `_version` counts what is written to it, also through a detached one",
    used_in="calls.py encoded.py",
    look_at="torch.Tensor._version and is_inference",
)
def test_writes_to_a_tensor_are_counted() -> None:
    tensor = torch.zeros(3)
    before = tensor._version
    tensor.detach()[0] = 1
    assert tensor._version == before + 1
    with torch.inference_mode():
        assert torch.zeros(3).is_inference()
    assert not tensor.is_inference()


@fact(
    "torch: a module calls the `forward` in its own `__dict__`, inside its hooks; of the hooks of a module, the first that was"
    " registered runs first, and the next sees what it returned",
    used_in="hooks.py schedule.py",
    look_at="torch.nn.Module._call_impl",
)
def test_hooks_are_around_an_instances_own_forward() -> None:
    module, seen = nn.Linear(1, 1), []
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    module.register_forward_hook(lambda module, args, output: seen.append(("first", output.item())) or output + 1)
    module.register_forward_hook(lambda module, args, output: seen.append(("second", output.item())))
    vars(module)["forward"] = lambda x: x * 10
    assert module(torch.ones(1)).item() == 21
    assert seen == [("first", 20), ("second", 21)]
    del vars(module)["forward"]
    assert module.forward.__func__ is nn.Linear.forward


@fact(
    "accelerate: a module with its hooks (offload) still calls torch's hooks once a call, with the arguments that it was given",
    used_in="schedule.py hooks.py",
    look_at="accelerate.hooks.add_hook_to_module",
)
def test_accelerates_hooks_leave_torchs_alone() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    chain, seen = Chain(), []
    add_hook_to_module(chain, ModelHook())
    chain.register_forward_pre_hook(lambda module, args, kwargs: seen.append(("before", set(kwargs))), with_kwargs=True)
    chain.register_forward_hook(lambda *_: seen.append(("after", set())))
    with torch.no_grad():
        same([chain(x=STARTS[1])], [outputs(chain)[1][-1]])
    assert seen == [("before", {"x"}), ("after", set())]
    assert list(inspect.signature(type(chain).forward).parameters) == ["self", "x"]
