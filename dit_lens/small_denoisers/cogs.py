"""Small denoisers after CogVideoX: two streams, normalised and fed forward as one sequence."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXTransformer3DModel
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import HEADS, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

STREAMS = ("visual", "text")
COG = {("attn", "visual"): "attn1", ("attn", "text"): "attn1", ("mlp", "visual"): "ff", ("mlp", "text"): "ff"}
"""One feed-forward for both streams, text first."""
SIZES = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_DIMENSION,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": WORDS,
}


def cogvideox() -> nn.Module:
    """Positions are added to the tokens."""
    return alive(CogVideoXTransformer3DModel, **SIZES)


def cogvideox_arguments() -> dict[str, Any]:
    """Latents with frames before channels."""
    return {
        "hidden_states": common.whole(layout=VIDEO).transpose(1, 2).contiguous(),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
    }


ALL = (
    SmallDenoiser(
        name="CogVideoXTransformer3DModel",
        make=cogvideox,
        arguments=cogvideox_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=STREAMS, modules=COG),),
        tokens={"visual": 24, "text": WORDS},
        layout=VIDEO,
    ),
)
