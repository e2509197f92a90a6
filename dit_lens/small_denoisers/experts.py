"""Small denoisers with experts by token or by modality: HiDream, MiniMax H3 and Cosmos 3."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Cosmos3OmniTransformer, HiDreamImageTransformer2DModel, MiniMaxH3Transformer3DModel
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import HEADS, IMAGE, TEXT_DIMENSION, VIDEO, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

DREAM = {("attn", "visual"): "block.attn1", ("attn", "text"): "block.attn1"}
DREAM_DOUBLE = {**DREAM, ("mlp", "visual"): "block.ff_i", ("mlp", "text"): "block.ff_t"}
DREAM_SINGLE = {**DREAM, ("mlp", "visual"): "block.ff_i", ("mlp", "text"): "block.ff_i"}
"""`ff_i` chooses among experts."""
SECOND_WORDS = 3
SOUND = 5
MODALITIES = ("text", "audio", "visual")
MIXED = {(site, stream): path for stream in MODALITIES for site, path in (("attn", "attn"), ("mlp", "ff"))}
COSMOS = {
    ("attn", "visual"): "self_attn",
    ("attn", "text"): "self_attn",
    ("mlp", "visual"): "mlp_moe_gen",
    ("mlp", "text"): "mlp",
}


def hidream() -> nn.Module:
    """Each block has a layer of a language model, behind a text that goes from block to block."""
    return alive(
        HiDreamImageTransformer2DModel,
        **HEADS,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        caption_channels=[12, TEXT_DIMENSION],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 6),
        llama_layers=[0, 1, 2, 3, 4],
    )


def hidream_arguments() -> dict[str, Any]:
    """Of the greatest size that there can be, to which others are padded; two texts, one in five layers."""
    return {
        "hidden_states": common.whole(),
        "timesteps": common.times(),
        "encoder_hidden_states_t5": common.texts(12, SECOND_WORDS),
        "encoder_hidden_states_llama3": [common.texts() for _ in range(5)],
        "pooled_embeds": torch.randn(2, 8),
    }


def minimax() -> nn.Module:
    """One sequence, whose tokens are modulated by what they are."""
    return alive(
        MiniMaxH3Transformer3DModel,
        **HEADS,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=6,
        text_dim=TEXT_DIMENSION,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def minimax_arguments() -> dict[str, Any]:
    """Packed latents of video and sound; which token is what, and where."""
    length = WORDS + SOUND + 24
    sound, video = WORDS, WORDS + SOUND
    grid = torch.zeros(length, 3)
    grid[:video, 0] = torch.cat([torch.arange(WORDS), WORDS + torch.arange(SOUND)])
    grid[video:] = WORDS + common.places(VIDEO)
    return {
        "hidden_states": common.packed(16, VIDEO),
        "audio_hidden_states": torch.randn(2, SOUND, 6),
        "encoder_hidden_states": common.texts(),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": torch.tensor([1] * WORDS + [2] * SOUND + [0] * 24),
        "position_ids": grid,
        "video_indices": torch.arange(video, length),
        "audio_indices": torch.arange(sound, video),
        "text_indices": torch.arange(sound),
    }


def cosmos() -> nn.Module:
    """A language model, to whose keys and values a denoiser of the same depth attends; the text does not see the video."""
    return alive(
        Cosmos3OmniTransformer,
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        num_key_value_heads=1,
        vocab_size=24,
        rope_axes_dim=(4, 2, 2),
    )


def cosmos_arguments() -> dict[str, Any]:
    """One row: tokens have no batch. A timestep for each token that is noisy, here all."""
    length = WORDS + 24
    grid = torch.cat([torch.arange(WORDS)[:, None].repeat(1, 3), WORDS + common.places(VIDEO).long()])
    return {
        "input_ids": torch.randint(24, (WORDS,)),
        "text_indexes": torch.arange(WORDS),
        "position_ids": grid.T.contiguous(),
        "und_len": WORDS,
        "sequence_length": length,
        "vision_tokens": [common.whole(layout=VIDEO)[:1]],
        "vision_token_shapes": [VIDEO],
        "vision_sequence_indexes": torch.arange(WORDS, length),
        "vision_mse_loss_indexes": torch.arange(WORDS, length),
        "vision_timesteps": torch.full((24,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
    }


ALL = (
    SmallDenoiser(
        name="HiDreamImageTransformer2DModel",
        make=hidream,
        arguments=hidream_arguments,
        blocks=(
            Blocks("double_stream_blocks", count=2, streams=("visual", "text"), modules=DREAM_DOUBLE),
            Blocks("single_stream_blocks", count=3, streams=("visual", "text"), modules=DREAM_SINGLE, joined=True),
        ),
        tokens={"visual": 12, "text": SECOND_WORDS + 2 * WORDS},
        layout=IMAGE,
        aside=("caption_projection",),
    ),
    SmallDenoiser(
        name="MiniMaxH3Transformer3DModel",
        make=minimax,
        arguments=minimax_arguments,
        blocks=(Blocks("transformer_blocks", count=3, streams=MODALITIES, modules=MIXED, joined=True),),
        tokens={"text": WORDS, "audio": SOUND, "visual": 24},
        layout=VIDEO,
        aside=("token_refiner.refiner_blocks",),
    ),
    SmallDenoiser(
        name="Cosmos3OmniTransformer",
        make=cosmos,
        arguments=cosmos_arguments,
        blocks=(Blocks("layers", count=3, streams=("text", "visual"), modules=COSMOS),),
        tokens={"text": WORDS, "visual": 24},
        layout=VIDEO,
    ),
)
