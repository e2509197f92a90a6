"""Anatomy: attention and MLPs of blocks that are written here, and of diffusers' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from test_discovery import small
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.architectures import WAN, Stack
from dit_lens.architectures.anatomy import Anatomy, anatomy
from dit_lens.architectures.discovery import discover
from dit_lens.architectures.watching import watched
from dit_lens.sites import BLOCK_SITES, Site, attention_sites

WIDTH, TOKENS = 8, 6


class Attend(nn.Module):
    """Attention under a name of its own."""

    def __init__(self, usual: bool = True) -> None:
        super().__init__()
        self.usual = usual
        self.to_q, self.back = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, other: Tensor | None = None) -> Tensor:
        keys = tokens if other is None else other
        query = self.to_q(tokens)
        if self.usual:
            return self.back(scaled_dot_product_attention(query[:, None], keys[:, None], keys[:, None])[:, 0])
        return self.back(query @ (keys.mT @ keys))


class Fused(nn.Module):
    """Attention and MLP side by side, into one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.grow = Attend(), nn.Linear(WIDTH, 2 * WIDTH)
        self.shrink = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        return tokens + self.shrink(torch.cat([self.attention(tokens), self.grow(tokens).relu()], dim=2))


class Block(nn.Module):
    """Whatever is named in ``parts`` adds to the stream of tokens, or to that of words."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.order = list(parts)

    def forward(self, tokens: Tensor, words: Tensor) -> Any:
        for name in self.order:
            part = self.get_submodule(name)
            if name.startswith("spoken"):
                words = words + part(words)
            elif name.startswith("both"):
                whole = part(torch.cat([tokens, words], dim=1))
                tokens, words = tokens + whole[:, :TOKENS], words + whole[:, TOKENS:]
            else:
                tokens = tokens + (part(tokens, words) if name.startswith("across") else part(tokens))
        return tokens, words


class Denoiser(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, tokens: Tensor, words: Tensor) -> Any:
        return self.blocks[0](tokens, words)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def found(block: nn.Module, words: int = 4, single: bool = False) -> Anatomy:
    torch.manual_seed(0)
    given = {"tokens": torch.randn(2, TOKENS, WIDTH), "words": torch.randn(2, words, WIDTH)}
    (call,) = watched(small(Denoiser(block)), given)
    streams = ("visual",) if single else ("visual", "text")
    stack = Stack("blocks", streams, ("tokens", "words")[: len(streams)])
    return anatomy(stack, call, {"visual": TOKENS, "text": words})


def test_every_part_is_of_its_kind_and_of_its_stream() -> None:
    there = found(Block(look=Attend(), across=Attend(), think=mlp(), spoken=mlp()))
    parts = [replace(site, stream="visual") for site in attention_sites("look", "back")]
    parts += [Site("attn", "look", stream="visual"), Site("cross_attn", "across", stream="visual")]
    parts += [Site("mlp", "think", stream="visual"), Site("mlp", "spoken", stream="text")]
    assert there == Anatomy((*parts, *BLOCK_SITES), (), heads=1)


@pytest.mark.parametrize("words", [4, TOKENS])
def test_cross_attention_is_told_even_where_lengths_are_equal(words: int) -> None:
    assert found(Block(across=Attend()), words) == Anatomy((Site("cross_attn", "across", stream="visual"), *BLOCK_SITES), ())


def test_attention_that_never_calls_the_usual_function() -> None:
    assert found(Block(linear=Attend(usual=False))).sites[0] == Site("attn", "linear", stream="visual")


def test_a_module_for_several_streams_has_a_part_of_each() -> None:
    order = ("visual", "text")
    assert found(Block(both=mlp())).sites[:2] == tuple(Site("mlp", "both", stream=stream, within=order) for stream in order)
    there = {(site.name, site.stream): site for site in found(Block(both=Attend())).sites}
    for name in ("attn", "heads", "q", "k", "v", "qk"):
        assert [there[name, stream].within for stream in order] == [order, order]
    # What mixes the streams later hides whose tokens they were, but not how many.
    assert Site("mlp", "think", stream="visual") in found(Block(think=mlp(), both=Attend())).sites


def test_one_projection_of_attention_and_mlp_is_two_blocks_of_columns() -> None:
    there = found(Fused(), single=True)
    assert there.missed == ()
    assert [site for site in there.sites if site.columns] == [
        Site("attn", "shrink", columns=(0, WIDTH)), Site("mlp", "shrink", columns=(WIDTH, 3 * WIDTH))
    ]  # fmt: skip


def test_the_second_of_a_kind_has_a_number() -> None:
    twice = found(Block(think=mlp(), look=Attend(), again=mlp(), there=Attend()))
    modules = {site.name: site.module for site in twice.sites if not site.per_head and site.module}
    assert modules == {"mlp": "think", "attn": "look", "mlp_2": "again", "attn_2": "there"}
    assert {site.name: site.module for site in twice.sites if site.name.startswith("q")} == {
        "q": "look", "qk": "look", "q_2": "there", "qk_2": "there"
    }  # fmt: skip


def test_what_no_site_stands_for_is_named() -> None:
    # Where streams are as long as each other, and mixed later, nobody can tell.
    assert found(Block(think=mlp(), both=Attend()), TOKENS).missed == ("think",)
    # What a part adds for nobody to hear is not its stream's.
    idle = Block(look=Attend(), think=mlp())
    idle.order.remove("think")
    assert "mlp" not in [site.name for site in found(idle).sites]


def of(denoiser: nn.Module, **given: Any) -> dict[str, Anatomy]:
    there, calls = discover(denoiser, given), watched(denoiser, given)
    firsts = {stack.path: next(call for call in calls if call.path == stack.path) for stack in there.stacks}
    return {stack.path: anatomy(stack, firsts[stack.path], there.tokens) for stack in there.stacks}


def test_wan_has_the_sites_of_its_record() -> None:
    denoiser = small(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=3,
        )
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 7, 16)}
    there = of(denoiser, hidden_states=torch.randn(1, 4, 3, 8, 6), **inputs)["blocks"]
    written = tuple(site for site in WAN.sites if site.measures != "contribution")
    assert there == Anatomy(written, (), heads=2)


def test_a_layer_with_an_adapter_in_it_is_one_linear_map() -> None:
    """Its parts are linear maps too, but no projection of heads, and no MLP."""

    def adapt(owner: nn.Module, *names: str) -> nn.Module:
        for name in names:
            setattr(owner, name, Linear(getattr(owner, name), "one", config=LoraConfig(r=2), r=2, init_lora_weights=False))
        return owner

    adapted = Block(look=adapt(Attend(), "to_q", "back"), think=adapt(mlp(), "2"))
    assert found(adapted, single=True) == found(Block(look=Attend(), think=mlp()), single=True)
    assert found(adapt(Fused(), "grow", "shrink"), single=True) == found(Fused(), single=True)


def test_both_streams_of_an_mmdit() -> None:
    denoiser = small(
        diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
        )
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([500]), "pooled_projections": torch.randn(1, 16)}
    there = of(denoiser, hidden_states=torch.randn(1, 4, 8, 6), encoder_hidden_states=torch.randn(1, 7, 32), **inputs)
    sites = [Site("attn", "attn", stream="visual"), Site("attn", "attn", item=1, stream="text")]
    sites += [Site("mlp", "ff", stream="visual"), Site("mlp", "ff_context", stream="text")]
    inside = there["transformer_blocks"]
    assert (inside.missed, inside.heads) == ((), 4)
    assert [site for site in inside.sites if site.module and not site.per_head] == sites
    projections = {site.stream: site.module for site in inside.sites if site.name == "heads"}
    assert projections == {"visual": "attn.to_out.0", "text": "attn.to_add_out"}
    assert {site.within for site in inside.sites if site.port == "attention"} == {("visual", "text")}
