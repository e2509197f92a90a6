"""Blocks that do not run and attention that is answered for, on both engines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_pipeline
from test_tracing import counting_alive, untouched
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import dit_lens as dl
from dit_lens.architectures import WAN
from dit_lens.attention import masked_attention
from dit_lens.hooks import HookEngine
from dit_lens.taps import Attention, Bypass, Tap, replaced_attribute
from dit_lens.tracing import TracingEngine

BLOCK = 1
Streams = Mapping[str, Tensor]
both_engines = pytest.mark.parametrize("engine_class", [TracingEngine, HookEngine])


def latents(pipe: Any, engine_class: type, taps: Any = (), bypasses: Any = (), attentions: Any = ()) -> Tensor:
    """The latents of a run with all of these."""
    call = {**arguments(pipe), "generator": [torch.Generator().manual_seed(3)], "output_type": "latent"}
    with replaced_attribute(pipe, "_progress_bar_config", {"disable": True}):
        return engine_class(pipe, WAN).call(lambda: pipe(**call), list(taps), list(bypasses), list(attentions)).frames


def plain(pipe: Any) -> Tensor:
    return latents(pipe, HookEngine)


def same(streams: Streams) -> Streams:
    return streams


def run_it(*_: Any) -> None:
    return None


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The model's own call."""
    return scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def zeros(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.zeros_like(query)


def clean(pipe: Any, forwards: list[Any]) -> None:
    """Assert that hooks, wrappers and every `forward` are as they were."""
    untouched(pipe)
    assert forwards == [vars(module).get("forward") for module in pipe.transformer.modules()]


class Identity(nn.Module):
    """A block that hands on what it takes."""

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return hidden_states


@both_engines
def test_a_skipped_block_is_one_that_hands_on_what_it_takes(any_pipe: Any, engine_class: type) -> None:
    seen: dict[str, list[Tensor]] = {"resid": [], "update": [], "mlp": [], "q": [], "heads": []}
    taps = [Tap("transformer", BLOCK, site, lambda tensor, site=site: seen[site].append(tensor)) for site in seen]
    taken: list[Tensor] = []
    skipped = latents(any_pipe, engine_class, taps, [Bypass("transformer", BLOCK, lambda s: taken.append(s["visual"]) or s)])
    untouched(any_pipe)
    assert len(taken) == len(seen["resid"]) == len(seen["update"]) > 0
    assert all(torch.equal(before, after) for before, after in zip(taken, seen["resid"], strict=True))
    assert not any(tensor.any() for tensor in seen["update"])
    assert not seen["mlp"] + seen["q"] + seen["heads"], "nothing inside is visited"
    any_pipe.transformer.blocks[BLOCK] = Identity()
    assert torch.equal(skipped, plain(any_pipe))


@both_engines
def test_a_block_may_hand_on_what_was_stored(image_pipe: Any, engine_class: type) -> None:
    stored: list[Tensor] = []
    before = latents(image_pipe, engine_class, [Tap("transformer", BLOCK, "resid", lambda tensor: stored.append(tensor))])
    ran: list[int] = []
    for block in image_pipe.transformer.blocks[: BLOCK + 1]:
        block.ffn.register_forward_hook(lambda *_: ran.append(1))
    kept = iter(stored)
    bypasses = [Bypass("transformer", BLOCK, lambda streams: {"visual": next(kept)}), Bypass("transformer", 0, same)]
    assert torch.equal(latents(image_pipe, engine_class, [], bypasses), before)
    assert not ran


@both_engines
def test_what_all_leave_alone_is_the_plain_pipeline(any_pipe: Any, engine_class: type) -> None:
    experts = [name for name in ("transformer", "transformer_2") if getattr(any_pipe, name) is not None]
    places = [(expert, block) for expert in experts for block in range(3)]
    bypasses = [Bypass(*place, run_it) for place in places]
    attentions = [Attention(*place, site, run_it) for place in places for site in ("attn", "cross_attn")]
    taps = [Tap(*place, site.name, run_it) for place in places for site in WAN.sites]
    expected = plain(any_pipe)
    assert torch.equal(latents(any_pipe, engine_class, [], bypasses, attentions), expected)
    assert torch.equal(latents(any_pipe, engine_class, taps, bypasses, attentions), expected)
    untouched(any_pipe)


@both_engines
def test_a_bypassed_block_shifts_no_count(image_pipe: Any, engine_class: type) -> None:
    """What each place sees is labelled by the call that torch hooks count, whichever calls bypass the block."""
    calls: list[int] = []
    image_pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    bypassed = {0, 1, 4, 6}
    seen: list[tuple[int, str]] = []

    def see(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((calls[-1], name))

    inside = ["q", "v", "heads", "attn", "cross_attn", "mlp"]
    taps = [Tap("transformer", block, site, see(f"{block} {site}")) for block in (1, 2) for site in (*inside, "resid")]
    way = Bypass("transformer", 1, lambda streams: streams if calls[-1] in bypassed else None)
    attentions = [Attention("transformer", block, "attn", see(f"{block} call")) for block in (1, 2)]
    latents(image_pipe, engine_class, taps, [way], attentions)
    image_pipe.transformer._forward_pre_hooks.clear()
    order = ["q", "v", "call", "heads", "attn", "cross_attn", "mlp", "resid"]
    expected = [(call, f"1 {site}") for call in range(8) for site in (order if call not in bypassed else ["resid"])]
    expected += [(call, f"2 {site}") for call in range(8) for site in order]
    assert seen == sorted(expected, key=lambda entry: (entry[0], entry[1][0]))


@both_engines
def test_taps_see_and_replace_what_is_handed_on(image_pipe: Any, engine_class: type) -> None:
    """Of a block that hands on its input plus one and gets an update of two, the next one takes the input plus two."""
    taken, after = [], []
    image_pipe.transformer.blocks[BLOCK].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    image_pipe.transformer.blocks[BLOCK + 1].register_forward_pre_hook(lambda module, args: after.append(args[0]))
    seen: list[Tensor] = []

    def two(update: Tensor) -> Tensor:
        seen.append(update)
        return torch.full_like(update, 2)

    bypass = Bypass("transformer", BLOCK, lambda streams: {"visual": streams["visual"] + 1})
    latents(image_pipe, engine_class, [Tap("transformer", BLOCK, "update", two)], [bypass])
    assert len(seen) == 8
    assert all(torch.allclose(update, torch.ones(()), atol=1e-5) for update in seen)
    assert all(torch.equal(before + 2, then) for before, then in zip(taken, after, strict=True))


@both_engines
@pytest.mark.parametrize("site", ["attn", "cross_attn"])
def test_an_answer_takes_the_place_of_the_call(image_pipe: Any, engine_class: type, site: str) -> None:
    """With nothing attended to, the module returns the bias of its projection; the same call again changes no bit."""
    shapes, outputs = [], []

    def nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.append((query.shape, key.shape, value.shape))
        return masked_attention(query, key, value, torch.zeros(query.shape[1], key.shape[1], dtype=torch.bool))

    tap = Tap("transformer", BLOCK, site, lambda tensor: outputs.append(tensor))
    changed = latents(image_pipe, engine_class, [tap], [], [Attention("transformer", BLOCK, site, nothing)])
    untouched(image_pipe)
    bias = image_pipe.transformer.blocks[BLOCK].get_submodule("attn1" if site == "attn" else "attn2").to_out[0].bias
    assert len(outputs) == 8
    assert all(torch.equal(output, bias.expand_as(output)) for output in outputs)
    keys = (1, 8 if site == "attn" else 16, 2, 8)
    assert shapes == [((1, 8, 2, 8), keys, keys)] * 8
    assert not torch.equal(changed, plain(image_pipe))
    again = latents(image_pipe, engine_class, [], [], [Attention("transformer", BLOCK, site, by_torch)])
    assert torch.equal(again, plain(image_pipe))


@both_engines
def test_an_answer_is_given_to_what_replacements_left(image_pipe: Any, engine_class: type) -> None:
    given: list[Tensor] = []
    heads: list[Tensor] = []

    def values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert (query == 2).all()
        given.append(value * 3)
        return given[-1]

    taps = [
        Tap("transformer", BLOCK, "heads", lambda tensor: heads.append(tensor)),
        Tap("transformer", BLOCK, "q", lambda tensor: torch.full_like(tensor, 2)),
    ]
    latents(image_pipe, engine_class, taps, [], [Attention("transformer", BLOCK, "attn", values)])
    assert len(given) == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, heads, strict=True))


def test_torch_is_not_called_where_the_call_is_answered(image_pipe: Any) -> None:
    """In the hook engine even an answer without attention stands for the one call that the module must make."""
    calls: list[int] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(1) if func is scaled_dot_product_attention else None
            return func(*args, **(kwargs or {}))

    attentions = [Attention("transformer", block, site, zeros) for block in range(3) for site in ("attn", "cross_attn")]
    counts = []
    for engine_class in (HookEngine, TracingEngine):
        calls.clear()
        with Counting():
            latents(image_pipe, engine_class, [], [], attentions)
        counts.append(len(calls))
    with Counting():
        calls.clear()
        plain(image_pipe)
    assert counts == [len(calls) - 48] * 2, "the text encoder and the decoder go on as they were"


@both_engines
@pytest.mark.parametrize(
    ("bypasses", "attentions", "message"),
    [
        ([lambda streams: {"text": streams["visual"]}], [], r"blocks.1 takes no stream 'text'; it takes visual"),
        (
            [lambda streams: {"visual": streams["visual"][:, :1]}],
            [],
            r"the stream 'visual' that blocks.1 takes has shape \(1, 8, 16\), .* handed on \(1, 1, 16\)",
        ),
        ([same, same], [], r"blocks.1 was bypassed twice"),
        ([], [("mlp", zeros)], r"'mlp' is no attention module; write 'attn' or 'cross_attn'"),
        ([], [("attn", lambda q, k, v: q[:, :1])], r"blocks.1.attn1 returns shape \(1, 8, 2, 8\), .* has \(1, 1, 2, 8\)"),
        ([], [("cross_attn", zeros), ("cross_attn", zeros)], r"the attention call of blocks.1.attn2 was answered twice"),
    ],
)
def test_what_does_not_fit_is_refused(image_pipe: Any, engine_class: type, bypasses: Any, attentions: Any, message: str) -> None:
    ways = [Bypass("transformer", BLOCK, instead) for instead in bypasses]
    answers = [Attention("transformer", BLOCK, *attention) for attention in attentions]
    with pytest.raises(dl.InputError, match=message):
        latents(image_pipe, engine_class, [], ways, answers)
    untouched(image_pipe)


@both_engines
@pytest.mark.parametrize("what", ["attend", "qk"])
def test_a_call_with_a_mask_of_its_own_is_refused(image_pipe: Any, engine_class: type, what: str) -> None:
    mask = torch.ones(8, 8, dtype=torch.bool)
    attention = image_pipe.transformer.blocks[BLOCK].attn1
    handle = attention.register_forward_pre_hook(lambda module, args: (*args[:2], mask, *args[3:]))
    attentions = [Attention("transformer", BLOCK, "attn", run_it)] if what == "attend" else []
    taps = [Tap("transformer", BLOCK, "qk", run_it)] if what == "qk" else []
    with pytest.raises(dl.InputError, match=r"the attention call of blocks.1.attn1 already has attn_mask, .* choose another"):
        latents(image_pipe, engine_class, taps, [], attentions)
    latents(image_pipe, engine_class, [Tap("transformer", BLOCK, "q", run_it)])
    handle.remove()
    untouched(image_pipe)


@both_engines
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["instead", "attend", "visit"])
def test_an_exception_comes_out_as_raised_and_leaves_nothing(
    image_pipe: Any, engine_class: type, error: type[BaseException], where: str
) -> None:
    before = plain(image_pipe)
    latents(image_pipe, engine_class, [Tap("transformer", BLOCK, "q", run_it)])
    forwards = [vars(module).get("forward") for module in image_pipe.transformer.modules()]
    raised = error("on purpose")
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise raised

    parts = {
        "visit": [Tap("transformer", BLOCK, "k", fail if where == "visit" else run_it), Tap("transformer", 2, "resid", run_it)],
        "instead": [Bypass("transformer", BLOCK, fail if where == "instead" else run_it), Bypass("transformer", 2, same)],
        "attend": [Attention("transformer", BLOCK, "attn", fail if where == "attend" else zeros)],
    }
    with pytest.raises(error, match="on purpose") as caught:
        latents(image_pipe, engine_class, *(parts[name] for name in ("visit", "instead", "attend")))
    assert caught.value is raised
    clean(image_pipe, forwards)
    assert torch.equal(plain(image_pipe), before)
    assert torch.equal(latents(image_pipe, engine_class, [], [Bypass("transformer", BLOCK, run_it)]), before)


def test_one_pipeline_goes_through_both_engines(image_pipe: Any) -> None:
    """nnsight leaves a `forward` of its own on every module, under which and over which a detour works."""
    bypasses = [Bypass("transformer", BLOCK, lambda streams: {"visual": streams["visual"] * 2})]
    found = [latents(image_pipe, engine, [], bypasses) for engine in (HookEngine, TracingEngine, HookEngine, TracingEngine)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], plain(image_pipe))


@both_engines
def test_no_tensor_outlives_a_visit(image_pipe: Any, engine_class: type) -> None:
    shown: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        alive.append(sum(reference() is not None for reference in shown))
        shown.extend(map(weakref.ref, (query, key, value)))
        return value * 2

    def instead(streams: Streams) -> Streams:
        alive.append(sum(reference() is not None for reference in shown))
        return {"visual": streams["visual"] + 1}

    attentions = [Attention("transformer", block, "attn", attend) for block in (0, 2)]
    with counting_alive(image_pipe) as outputs:
        latents(image_pipe, engine_class, [], [Bypass("transformer", BLOCK, instead)], attentions)
    assert max(outputs[:-1]) <= 2
    assert outputs[-1] == 0
    assert len(alive) == 24
    assert not any(alive)


def test_half_precision_stays() -> None:
    """Answers in another precision are brought to that of the model, the same on both engines."""
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    bypasses = [Bypass("transformer", BLOCK, lambda streams: {"visual": streams["visual"].double() + 1})]
    attentions = [Attention("transformer", 2, "attn", lambda q, k, v: (v * 2).double())]
    dtypes: list[torch.dtype] = []
    taps = [
        Tap("transformer", block, site, lambda tensor: dtypes.append(tensor.dtype))
        for block, site in ((1, "resid"), (2, "heads"))
    ]
    found = [latents(pipe, engine_class, taps, bypasses, attentions) for engine_class in (TracingEngine, HookEngine)]
    assert torch.equal(*found)
    assert set(dtypes) == {torch.bfloat16}
