"""Whatever is asked of them, both engines do the same to the last bit: random taps, replacements, bypasses and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from conftest import BLOCKS, arguments, tiny_pipeline
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tracing import untouched
from torch import Tensor

from dit_lens.architectures import WAN
from dit_lens.attention import masked_attention
from dit_lens.hooks import HookEngine
from dit_lens.taps import Attention, Bypass, Tap, replaced_attribute
from dit_lens.tracing import TracingEngine

STEPS = 3
Seen = list[tuple[int, int, str, Tensor]]


@dataclass(frozen=True)
class Wish:
    """What to do at one place: `where` is a site, `bypass` or a `call` of an attention; acts in the named denoiser calls."""

    expert: str
    block: int
    where: str
    calls: frozenset[int]
    kind: int

    def acts(self, clock: list[int]) -> bool:
        return clock[0] in self.calls


@cache
def pipeline(experts: int) -> Any:
    """One expert: image to video; two: text to video. Nothing may stay on them from one example to the next."""
    return tiny_pipeline() if experts == 1 else tiny_pipeline(WanPipeline, experts=2)


def tap(wish: Wish, clock: list[int], number: int, seen: Seen) -> Tap:
    def visit(tensor: Tensor) -> Tensor | None:
        seen.append((clock[0], number, wish.where, tensor.clone()))
        if not wish.acts(clock) or WAN.stacks[0].site(wish.where).read_only:
            return None
        return [torch.zeros_like(tensor), tensor.flip(1) * 1.5, tensor + 0.1][wish.kind]

    return Tap(wish.expert, wish.block, wish.where, visit)


def bypass(wish: Wish, clock: list[int], number: int, seen: Seen) -> Bypass:
    def instead(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        seen.append((clock[0], number, wish.where, streams["visual"].clone()))
        if not wish.acts(clock):
            return None
        return [streams, {}, {"visual": streams["visual"].roll(1, 1) * 0.5}][wish.kind]

    return Bypass(wish.expert, wish.block, instead)


def attention(wish: Wish, clock: list[int], number: int, seen: Seen) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        seen.append((clock[0], number, wish.where, torch.cat([query, key, value], dim=1)))
        if not wish.acts(clock):
            return None
        allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
        return [torch.zeros_like(query), masked_attention(query, key, value, allowed), query][wish.kind]

    return Attention(wish.expert, wish.block, wish.where.removesuffix(" call"), attend)


def outcome(engine_class: type, pipe: Any, wishes: list[Wish]) -> tuple[Tensor, Seen]:
    """The latents of a run with all wishes, and everything that was shown, in order."""
    clock, seen = [-1], Seen()

    def tick(*_: Any) -> None:
        clock[0] += 1

    kinds = {"taps": tap, "bypasses": bypass, "attentions": attention}
    parts: dict[str, list[Any]] = {name: [] for name in kinds}
    for number, wish in enumerate(wishes):
        name = {"bypass": "bypasses", "attn call": "attentions", "cross_attn call": "attentions"}.get(wish.where, "taps")
        parts[name].append(kinds[name](wish, clock, number, seen))
    call = {**arguments(pipe, num_inference_steps=STEPS), "output_type": "latent"}
    call["generator"] = [torch.Generator().manual_seed(3)]
    handles = [expert.register_forward_pre_hook(tick) for expert in WAN.denoisers(pipe).values()]
    try:
        with replaced_attribute(pipe, "_progress_bar_config", {"disable": True}):
            found = engine_class(pipe, WAN).call(lambda: pipe(**call).frames, **parts)
    finally:
        for handle in handles:
            handle.remove()
    assert clock[0] == 2 * STEPS - 1
    untouched(pipe)
    return found, seen


def wishes(experts: int) -> st.SearchStrategy[list[Wish]]:
    """Up to eight wishes; a block has one bypass and a module one attention, as a second answer is an error."""
    one = st.builds(
        Wish,
        expert=st.sampled_from(["transformer", "transformer_2"][:experts]),
        block=st.integers(0, BLOCKS - 1),
        where=st.sampled_from([*(site.name for site in WAN.sites), *["bypass", "attn call", "cross_attn call"] * 3]),
        calls=st.frozensets(st.integers(0, 2 * STEPS - 1)),
        kind=st.integers(0, 2),
    )
    return st.lists(one, min_size=1, max_size=8, unique_by=lambda wish: (wish.expert, wish.block, wish.where))


def agree(experts: int, asked: list[Wish]) -> None:
    pipe = pipeline(experts)
    (ours, seen), (theirs, shown) = (outcome(engine_class, pipe, asked) for engine_class in (TracingEngine, HookEngine))
    assert torch.equal(ours, theirs)
    assert [entry[:3] for entry in seen] == [entry[:3] for entry in shown]
    assert all(torch.equal(left[3], right[3]) for left, right in zip(seen, shown, strict=True))


@settings(max_examples=10, deadline=None)
@given(wishes(experts=1))
def test_both_engines_do_the_same_to_one_expert(asked: list[Wish]) -> None:
    agree(1, asked)


@settings(max_examples=10, deadline=None)
@given(wishes(experts=2))
def test_both_engines_do_the_same_to_two_experts(asked: list[Wish]) -> None:
    agree(2, asked)
