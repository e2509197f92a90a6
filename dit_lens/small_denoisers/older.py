"""Small denoisers of older making: Transformer2DModel, the prior of unCLIP, and a decoder of spectrograms."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PriorTransformer, T5FilmDecoder, Transformer2DModel
from torch import nn

from dit_lens.small_denoisers.crossed import CROSSED, HEADS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

PRIOR_MODULES = {
    (site, stream): path for site, path in (("attn", "attn1"), ("mlp", "ff")) for stream in ("text", "extra", "visual")
}
FILM_MODULES = {
    ("attn", "visual"): "layer.0.attention",
    ("cross_attn", "visual"): "layer.1.attention",
    ("mlp", "visual"): "layer.2.DenseReluDense",
}
"""Of a DecoderLayer: three layers, each of which adds what its module returns."""


def transformer_2d() -> nn.Module:
    """On patches, as PixArt, which was made of it."""
    return alive(
        Transformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
    )


def transformer_2d_arguments() -> dict[str, Any]:
    """8 by 6 latents and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def prior() -> nn.Module:
    """An embedding of the prompt as a whole and the timestep are two tokens between the words and the latents."""
    return alive(
        PriorTransformer,
        **HEADS,
        num_layers=3,
        embedding_dim=12,
        num_embeddings=7,
        additional_embeddings=8,
        added_emb_type=None,
    )


def prior_arguments() -> dict[str, Any]:
    """Six latents, in a row, and seven words."""
    return {
        "hidden_states": torch.randn(2, 6, 12),
        "timestep": torch.tensor([500, 500]),
        "proj_embedding": torch.randn(2, 12),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }


def film() -> nn.Module:
    """A token a frame of the spectrogram; it reads notes, and sound that came before. A block returns a tuple of one."""
    return alive(T5FilmDecoder, input_dims=4, targets_length=6, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=32)


def film_arguments() -> dict[str, Any]:
    """Six frames; four notes and three frames that came before."""
    return {
        "encodings_and_masks": [(torch.randn(2, 4, 16), torch.ones(2, 4)), (torch.randn(2, 3, 16), torch.ones(2, 3))],
        "decoder_input_tokens": torch.randn(2, 6, 4),
        "decoder_noise_time": torch.tensor([0.5, 0.5]),
    }


ALL = (
    SmallDenoiser(
        name="Transformer2DModel",
        make=transformer_2d,
        arguments=transformer_2d_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("visual",), modules=CROSSED),),
        tokens={"visual": 12},
        layout=(1, 4, 3),
    ),
    SmallDenoiser(
        name="PriorTransformer",
        make=prior,
        arguments=prior_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("text", "extra", "visual"), modules=PRIOR_MODULES, joined=True),),
        tokens={"text": 7, "extra": 2, "visual": 6},
        layout=(6, 1, 1),
    ),
    SmallDenoiser(
        name="T5FilmDecoder",
        make=film,
        arguments=film_arguments,
        blocks=(Blocks("decoders", count=3, streams=("visual",), modules=FILM_MODULES),),
        tokens={"visual": 6},
        layout=(6, 1, 1),
    ),
)
