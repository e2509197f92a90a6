"""Architecture records: found by class name, and right about streams and layouts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH
from diffusers import WanPipeline
from torch import Tensor, nn

from dit_lens.architectures import WAN, Architecture, Layout, Stack, lookup, record, register
from dit_lens.errors import InputError


def test_a_pipeline_is_found_by_its_class_or_a_parent(image_pipe: Any, text_pipe: Any) -> None:
    assert lookup(image_pipe) is WAN
    assert lookup(text_pipe) is WAN

    class OwnPipeline(WanPipeline):
        """A pipeline of a user's own."""

    own = OwnPipeline(**text_pipe.components, boundary_ratio=0.5)
    assert lookup(own) is WAN


def test_a_pipeline_without_a_record_has_none() -> None:
    assert lookup(SimpleNamespace()) is None


def test_a_denoiser_of_another_class_is_named(text_pipe: Any) -> None:
    text_pipe.transformer_2 = nn.Linear(2, 2)
    with pytest.raises(InputError, match="transformer_2 is a Linear, but Wan pipelines have a WanTransformer3DModel"):
        lookup(text_pipe)
    text_pipe.transformer = text_pipe.transformer_2 = None
    with pytest.raises(InputError, match="WanPipeline has no denoiser: transformer, transformer_2 are all None"):
        lookup(text_pipe)


def test_a_record_of_ones_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_registered", [WAN])
    own = Architecture("own", (Stack("layers"),), ("SimpleNamespace",), denoiser="Linear")
    register(own)
    assert lookup(SimpleNamespace(transformer=nn.Linear(1, 1))) is own


def test_experts_blocks_and_width(text_pipe: Any) -> None:
    denoisers = WAN.denoisers(text_pipe)
    assert list(denoisers) == ["transformer", "transformer_2"]
    denoiser = text_pipe.transformer
    assert WAN.block_list(denoiser) == list(denoiser.blocks)
    assert [block.path for block in WAN.blocks(denoiser)] == [f"blocks.{index}" for index in range(BLOCKS)]
    assert WAN.width(denoiser) == WIDTH


def test_layout_counts_tokens_and_not_latents(image_pipe: Any) -> None:
    layout = WAN.layout(image_pipe.transformer, {"hidden_states": torch.empty(7, 12, 5, 6, 8)})
    assert layout == Layout(frames=5, height=3, width=4)
    assert layout.tokens == 60
    assert layout.shape == (5, 3, 4)


def test_the_expert_changes_at_the_boundary(image_pipe: Any, text_pipe: Any) -> None:
    assert [WAN.expert_at(text_pipe, t) for t in (1000, 800, 799.9, 0)] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert WAN.expert_at(image_pipe, 0) == "transformer"


class JointBlock(nn.Module):
    """A block that reads and writes two streams."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states


JOINT = Stack("blocks", ("text", "visual"), ("encoder_hidden_states", "hidden_states"))
ONE = Stack("blocks")


def taken(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return JOINT.streams_in(JOINT.arguments(JointBlock(), args, kwargs), 0)


def test_streams_are_found_however_a_block_is_called() -> None:
    visual, text, temb = torch.zeros(1), torch.ones(1), torch.zeros(1)
    by_position = taken(visual, text, temb)
    by_keyword = taken(visual, temb=temb, encoder_hidden_states=text)
    for streams in (by_position, by_keyword, JOINT.streams_out(JointBlock()(visual, text, temb), 0)):
        assert streams["visual"] is visual
        assert streams["text"] is text


def test_a_stream_is_replaced_in_the_structure_it_came_in() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    replaced = JOINT.replaced((old, old), {"visual": new}, 0)
    assert replaced[0] is old
    assert replaced[1] is new
    assert ONE.replaced(old, {"visual": new}, 0) is new


def test_streams_that_are_handed_on_are_what_the_block_returns() -> None:
    visual, text = torch.zeros(1), torch.ones(1)
    returned = JOINT.handed_on({"visual": visual, "text": text})
    assert JOINT.streams_out(returned, 0)["visual"] is visual
    assert JOINT.streams_out(returned, 0)["text"] is text
    assert ONE.handed_on({"visual": visual}) is visual


def test_what_is_returned_beside_streams_is_nothing_or_a_refusal() -> None:
    """The last block of Stable Diffusion 3 returns None for the text."""
    visual = torch.zeros(1)
    last = Stack("blocks", ("visual",), ("hidden_states",), places=(1,), returned=2, nothing=(0,))
    assert last.handed_on({"visual": visual}) == (None, visual)
    assert last.streams_out((None, visual), 0) == {"visual": visual}
    with pytest.raises(InputError, match=r"return 2 values, and 1 of them are streams: they cannot be left out; write dl\.Zero"):
        replace(last, nothing=()).handed_on({"visual": visual})


def test_joined_streams_are_taken_apart_and_put_together() -> None:
    sequence = torch.arange(7.0).view(1, 7, 1)
    joined = Stack("blocks", ("text", "visual"), ("sequence",))
    streams = joined.streams_out(sequence, visual_tokens=4)
    assert streams["text"].flatten().tolist() == [0, 1, 2]
    assert streams["visual"].flatten().tolist() == [3, 4, 5, 6]
    assert torch.equal(joined.handed_on(streams), sequence)
    changed = joined.replaced(sequence, {"text": -streams["text"]}, visual_tokens=4)
    assert changed.flatten().tolist() == [0, -1, -2, 3, 4, 5, 6]
    with_registers = Stack("blocks", ("extra", "visual", "text"), ("sequence",), extra=2)
    assert with_registers.streams_out(sequence, visual_tokens=4)["text"].flatten().tolist() == [6]
    with pytest.raises(InputError, match="7 tokens, of which 8 are to be visual"):
        joined.streams_out(sequence, visual_tokens=8)
