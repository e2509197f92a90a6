"""Small denoisers of images that read the text by cross-attention, or a class: DiT, PixArt, HunyuanDiT, Lumina-Next."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, LuminaNextDiT2DModel, PixArtTransformer2DModel
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

CROSSED = {("attn", "visual"): "attn1", ("cross_attn", "visual"): "attn2", ("mlp", "visual"): "ff"}
"""Of most blocks that attend to the image and then to the text."""
SHARED = {("attn", "visual"): "", ("cross_attn", "visual"): "", ("mlp", "visual"): "feed_forward"}
"""Of a LuminaNextDiTBlock. `attn1` and `attn2` return heads, which the block adds and projects together, by `attn2.to_out.0`."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
"""Width 16."""


def dit() -> nn.Module:
    """A class in place of a text; square, and the output holds a variance too."""
    return alive(
        DiTTransformer2DModel, **HEADS, in_channels=4, out_channels=8, num_layers=3, sample_size=6, num_embeds_ada_norm=10
    )


def dit_arguments() -> dict[str, Any]:
    """An image of 6 by 6 latents; the model takes its side for the square root of the number of tokens."""
    return {
        "hidden_states": torch.randn(2, 4, 6, 6),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([3, 7]),
    }


def pixart() -> nn.Module:
    """One network makes the modulations of all blocks; the output holds a variance too."""
    return alive(
        PixArtTransformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    )


def pixart_arguments() -> dict[str, Any]:
    """8 by 6 latents and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def hunyuan_dit() -> nn.Module:
    """The last of four blocks reads the first one's output too, before its attention; the output holds a variance."""
    return alive(
        HunyuanDiT2DModel,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=3,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_dit_arguments() -> dict[str, Any]:
    """8 by 6 latents; three words of one encoder and four of another."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 3, 12),
        "text_embedding_mask": torch.ones(2, 3, dtype=torch.long),
        "encoder_hidden_states_t5": torch.randn(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4, dtype=torch.long),
    }


def padded(**settings: Any) -> nn.Module:
    """With its token of padding drawn, which is used by nothing, and which diffusers leaves as the memory was."""
    transformer = LuminaNextDiT2DModel(**settings)
    nn.init.normal_(transformer.pad_token)
    return transformer


def lumina_next() -> nn.Module:
    """The two attentions share one projection; the output holds a variance too."""
    return alive(
        padded,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
    )


def lumina_next_arguments() -> dict[str, Any]:
    """8 by 6 latents and seven words."""
    angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.1]))[:, None] + torch.zeros(4, 3, 2)
    across = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))[None] + torch.zeros(4, 3, 2)
    angles = torch.cat([angles, across], dim=-1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "encoder_mask": torch.ones(2, 7),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


ALL = (
    SmallDenoiser(
        name="DiTTransformer2DModel",
        make=dit,
        arguments=dit_arguments,
        blocks=(
            Blocks(
                "transformer_blocks",
                count=3,
                streams=("visual",),
                modules={("attn", "visual"): "attn1", ("mlp", "visual"): "ff"},
            ),
        ),
        tokens={"visual": 9},
        layout=(1, 3, 3),
    ),
    SmallDenoiser(
        name="PixArtTransformer2DModel",
        make=pixart,
        arguments=pixart_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
    SmallDenoiser(
        name="HunyuanDiT2DModel",
        make=hunyuan_dit,
        arguments=hunyuan_dit_arguments,
        blocks=(Blocks("blocks", count=4, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
    SmallDenoiser(
        name="LuminaNextDiT2DModel",
        make=lumina_next,
        arguments=lumina_next_arguments,
        blocks=(Blocks("layers", count=3, streams=("visual",), modules=SHARED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
)
