"""Small denoisers of Kandinsky: text by cross-attention, after blocks of its own; latents with channels last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel, Kandinsky6SRTransformer3DModel, Kandinsky6Transformer3DModel
from torch import Tensor, nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import ROTARY, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

ALONE = {("attn", "visual"): "self_attention", ("mlp", "visual"): "feed_forward"}
CROSSED = {**ALONE, ("cross_attn", "visual"): "cross_attention"}
FUSED_BLOCK = {
    (site, stream): f"{part}_dec_block.{module}"
    for stream, part in (("visual", "video"), ("audio", "audio"))
    for site, module in (("attn", "self_attention"), ("cross_attn", "cross_attention"), ("mlp", "feed_forward"))
}
"""Of a block of Kandinsky 6; between `cross_attention` and `feed_forward`, video and sound attend to each other."""
TILES = (2, 16, 8)
"""Layout of one tile across: Kandinsky 6 SR orders tokens by tiles of 8 x 8, which is row by row only so."""
SOUND = 9
SIZES = {"time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_visual_blocks": 3, "axes_dims": ROTARY, "patch_size": (1, 2, 2)}


def last(latents: Tensor) -> Tensor:
    """With the channels last."""
    return latents.movedim(1, -1).contiguous()


def kandinsky5() -> nn.Module:
    """A pooled text joins the timestep."""
    sizes = {**SIZES, "in_visual_dim": 5, "out_visual_dim": 5, "num_text_blocks": 2}
    return alive(Kandinsky5Transformer3DModel, **sizes, in_text_dim=TEXT_DIMENSION, in_text_dim2=8)


def kandinsky5_arguments() -> dict[str, Any]:
    """With the places of the tokens along each axis."""
    return {
        "hidden_states": last(common.whole(5, layout=VIDEO)),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
        "pooled_projections": torch.randn(2, 8),
        "visual_rope_pos": tuple(torch.arange(count) for count in VIDEO),
        "text_rope_pos": torch.arange(WORDS),
    }


def kandinsky6() -> nn.Module:
    """Video and sound, of different widths; beside the latents stand those of a picture and a mask."""
    sizes = {
        **SIZES,
        "in_visual_dim": 2,
        "out_visual_dim": 2,
        "num_text_blocks": 2,
        "in_text_dim": TEXT_DIMENSION,
        "in_text_dim2": 8,
    }
    sound = {"in_audio_dim": 6, "out_audio_dim": 6, "model_dim_a": 16, "ff_dim_a": 24, "axes_dims_a": (2, 2, 4)}
    return alive(Kandinsky6Transformer3DModel, **sizes, **sound)


def kandinsky6_arguments() -> dict[str, Any]:
    """Two channels of the video, two of the picture and one of the mask."""
    return {
        "hidden_states": last(common.whole(5, layout=VIDEO)),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(),
        "pooled_projections": torch.randn(2, 8),
        "audio_hidden_states": torch.randn(2, SOUND, 6),
    }


def kandinsky6_sr() -> nn.Module:
    """Without a text; every tile attends to those that matter to it."""
    return alive(Kandinsky6SRTransformer3DModel, **{**SIZES, "patch_size": (1, 1, 1)}, in_visual_dim=2, out_visual_dim=3)


def kandinsky6_sr_arguments() -> dict[str, Any]:
    """Two channels of the video, two of a coarser one and one of a mask."""
    return {"hidden_states": torch.randn(2, *TILES, 5), "timestep": common.times()}


ALL = (
    SmallDenoiser(
        name="Kandinsky5Transformer3DModel",
        make=kandinsky5,
        arguments=kandinsky5_arguments,
        blocks=(Blocks("visual_transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 24},
        layout=VIDEO,
        aside=("text_transformer_blocks",),
    ),
    SmallDenoiser(
        name="Kandinsky6Transformer3DModel",
        make=kandinsky6,
        arguments=kandinsky6_arguments,
        blocks=(Blocks("visual_transformer_blocks", count=3, streams=("visual", "audio"), modules=FUSED_BLOCK),),
        tokens={"visual": 24, "audio": SOUND},
        layout=VIDEO,
        aside=("video_text_transformer_blocks", "audio_text_transformer_blocks"),
    ),
    SmallDenoiser(
        name="Kandinsky6SRTransformer3DModel",
        make=kandinsky6_sr,
        arguments=kandinsky6_sr_arguments,
        blocks=(Blocks("visual_transformer_blocks", count=3, streams=("visual",), modules=ALONE),),
        tokens={"visual": 256},
        layout=TILES,
    ),
)
