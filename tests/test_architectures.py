"""Architecture records: found by class name, and right about streams and layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH
from diffusers import WanPipeline
from torch import Tensor, nn

from dit_lens.architectures import WAN, Architecture, Layout, lookup, record, register
from dit_lens.errors import InputError


def test_a_pipeline_is_found_by_its_class_or_a_parent(image_pipe: Any, text_pipe: Any) -> None:
    assert lookup(image_pipe) is WAN
    assert lookup(text_pipe) is WAN

    class OwnPipeline(WanPipeline):
        """A pipeline of a user's own."""

    own = OwnPipeline(**text_pipe.components, boundary_ratio=0.5)
    assert lookup(own) is WAN


def test_an_unknown_pipeline_is_named() -> None:
    with pytest.raises(InputError, match=r"SimpleNamespace is not a pipeline .*WanPipeline.*dl\.register"):
        lookup(SimpleNamespace())


def test_a_denoiser_of_another_class_is_named(text_pipe: Any) -> None:
    text_pipe.transformer_2 = nn.Linear(2, 2)
    with pytest.raises(InputError, match="transformer_2 is a Linear, but Wan pipelines have a WanTransformer3DModel"):
        lookup(text_pipe)
    text_pipe.transformer = text_pipe.transformer_2 = None
    with pytest.raises(InputError, match="WanPipeline has no denoiser: transformer, transformer_2 are all None"):
        lookup(text_pipe)


def test_a_record_of_ones_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_registered", [WAN])
    own = Architecture("own", ("SimpleNamespace",), denoiser="Linear", blocks=("layers",))
    register(own)
    assert lookup(SimpleNamespace(transformer=nn.Linear(1, 1))) is own


def test_experts_blocks_and_width(text_pipe: Any) -> None:
    denoisers = WAN.denoisers(text_pipe)
    assert list(denoisers) == ["transformer", "transformer_2"]
    denoiser = text_pipe.transformer
    assert WAN.block_list(denoiser) == list(denoiser.blocks)
    assert WAN.block_paths(denoiser) == [f"blocks.{index}" for index in range(BLOCKS)]
    assert WAN.width(denoiser) == WIDTH


def test_layout_counts_tokens_and_not_latents(image_pipe: Any) -> None:
    layout = WAN.layout(image_pipe.transformer, (7, 12, 5, 6, 8))
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


JOINT = Architecture(
    name="joint",
    pipelines=(),
    denoiser="",
    blocks=("blocks",),
    streams=("text", "visual"),
    parameters=("encoder_hidden_states", "hidden_states"),
)


def test_streams_are_found_however_a_block_is_called() -> None:
    visual, text, temb = torch.zeros(1), torch.ones(1), torch.zeros(1)
    by_position = JOINT.streams_in(JointBlock(), (visual, text, temb), {})
    by_keyword = JOINT.streams_in(JointBlock(), (visual,), {"temb": temb, "encoder_hidden_states": text})
    for streams in (by_position, by_keyword, JOINT.streams_out(JointBlock()(visual, text, temb))):
        assert streams["visual"] is visual
        assert streams["text"] is text


def test_a_stream_is_replaced_in_the_structure_it_came_in() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    replaced = JOINT.replaced((old, old), {"visual": new})
    assert replaced[0] is old
    assert replaced[1] is new
    assert WAN.replaced(old, {"visual": new}) is new


def test_streams_that_are_handed_on_are_what_the_block_returns() -> None:
    visual, text = torch.zeros(1), torch.ones(1)
    returned = JOINT.returned({"visual": visual, "text": text})
    assert JOINT.streams_out(returned)["visual"] is visual
    assert JOINT.streams_out(returned)["text"] is text
    assert WAN.returned({"visual": visual}) is visual
