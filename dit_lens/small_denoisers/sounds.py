"""Small denoisers of sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
)
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

EXTRA_CROSSED = {
    (site, stream): path
    for site, path in (("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ff"))
    for stream in ("extra", "visual")
}
"""Of blocks as the images', with a token before those of the latents."""

AUDIO3_MODULES = {
    (site, stream): path
    for site, path in (("attn", "self_attn"), ("cross_attn", "cross_attn"), ("mlp", "ff"))
    for stream in ("extra", "visual")
}
"""Of a StableAudio3DiTBlock; a condition of each latent is added between cross-attention and MLP."""
OWN_NAMES = {("attn", "visual"): "self_attn", ("cross_attn", "visual"): "cross_attn"}
MUSIC3_MODULES = {(site, stream): path for site, path in (("attn", "attn"), ("mlp", "ff_out")) for stream in ("extra", "visual")}
"""Of a MiniMaxMusic3TransformerBlock, whose MLP is two layers in the block; the second returns what is added."""


def stable_audio() -> nn.Module:
    """A token a latent, after one that holds timestep and duration."""
    return alive(
        StableAudioDiTModel,
        sample_size=6,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=12,
        global_states_input_dim=10,
        time_proj_dim=8,
    )


def stable_audio_arguments() -> dict[str, Any]:
    """Six latents and five words."""
    angles = torch.outer(torch.arange(7.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
    return {
        "hidden_states": torch.randn(2, 4, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "global_hidden_states": torch.randn(2, 1, 10),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def stable_audio3() -> nn.Module:
    """Two learned tokens before those of the latents; attention is the difference of two."""
    return alive(
        StableAudio3DiTModel,
        io_channels=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=10,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        ff_mult=2.0,
        num_memory_tokens=2,
    )


def stable_audio3_arguments() -> dict[str, Any]:
    """Six latents, with a condition for each, and seven words."""
    return {
        "hidden_states": torch.randn(2, 4, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "global_hidden_states": torch.randn(2, 10),
        "local_add_cond": torch.randn(2, 5, 6),
    }


def ace_step() -> nn.Module:
    """A token of two latents; blocks attend within a window, which here holds all, and to all by turns."""
    return alive(
        AceStepTransformer1DModel,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=10,
        audio_acoustic_hidden_dim=4,
        sliding_window=6,
        encoder_hidden_size=12,
    )


def ace_step_arguments() -> dict[str, Any]:
    """Twelve latents, with a condition for each, and seven words."""
    return {
        "hidden_states": torch.randn(2, 12, 4),
        "timestep": torch.tensor([0.5, 0.5]),
        "timestep_r": torch.tensor([0.4, 0.4]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "context_latents": torch.randn(2, 12, 6),
    }


def longcat_audio() -> nn.Module:
    """One network makes the modulations of all blocks; what goes into the blocks is added to what comes out."""
    return alive(LongCatAudioDiTTransformer, dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0)


def longcat_audio_arguments() -> dict[str, Any]:
    """Six latents, with a condition for each, and seven words."""
    return {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "timestep": torch.tensor([0.5, 0.5]),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "latent_cond": torch.randn(2, 6, 4),
    }


def music3() -> nn.Module:
    """A token of the timestep before those of the latents; a condition lies beside the latents, and no text is read."""
    return alive(
        MiniMaxMusic3Transformer1DModel,
        in_channels=4,
        condition_dim=6,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )


def music3_arguments() -> dict[str, Any]:
    """Six latents, with a condition for each."""
    return {
        "hidden_states": torch.randn(2, 4, 6),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 6, 6),
    }


ALL = (
    SmallDenoiser(
        name="StableAudioDiTModel",
        make=stable_audio,
        arguments=stable_audio_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("extra", "visual"), modules=EXTRA_CROSSED, joined=True),),
        tokens={"extra": 1, "visual": 6},
        layout=(6, 1, 1),
    ),
    SmallDenoiser(
        name="StableAudio3DiTModel",
        make=stable_audio3,
        arguments=stable_audio3_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("extra", "visual"), modules=AUDIO3_MODULES, joined=True),),
        tokens={"extra": 2, "visual": 6},
        layout=(6, 1, 1),
    ),
    SmallDenoiser(
        name="AceStepTransformer1DModel",
        make=ace_step,
        arguments=ace_step_arguments,
        blocks=(Blocks("layers", count=3, streams=("visual",), modules={**OWN_NAMES, ("mlp", "visual"): "mlp"}),),
        tokens={"visual": 6},
        layout=(6, 1, 1),
    ),
    SmallDenoiser(
        name="LongCatAudioDiTTransformer",
        make=longcat_audio,
        arguments=longcat_audio_arguments,
        blocks=(Blocks("blocks", count=3, streams=("visual",), modules={**OWN_NAMES, ("mlp", "visual"): "ffn"}),),
        tokens={"visual": 6},
        layout=(6, 1, 1),
    ),
    SmallDenoiser(
        name="MiniMaxMusic3Transformer1DModel",
        make=music3,
        arguments=music3_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=("extra", "visual"), modules=MUSIC3_MODULES, joined=True),),
        tokens={"extra": 1, "visual": 6},
        layout=(6, 1, 1),
    ),
)
