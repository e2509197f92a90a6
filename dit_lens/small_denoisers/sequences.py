"""Small denoisers of images with text and image in one sequence from first to last: Ernie, Ideogram, Krea, OmniGen, Qwen 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    ErnieImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    OmniGenTransformer2DModel,
    QwenImage21Transformer2DModel,
)
from torch import nn

from dit_lens.small_denoisers import common
from dit_lens.small_denoisers.common import HEADS, IMAGE, ROTARY, TEXT_DIMENSION, WORDS
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

CHANNELS = 8
TEXT_FIRST = ("text", "visual")
VOCABULARY = 24
IMAGE_TOKEN, TEXT_TOKEN = 2, 3
"""How Ideogram marks which token is which."""
TOKENS = {"text": WORDS, "visual": 12}
LENGTH = WORDS + 12


def shared(streams: tuple[str, ...], attention: str, feed_forward: str) -> Mapping[tuple[str, str], str]:
    """One attention and one feed-forward for all streams."""
    return {(site, stream): path for stream in streams for site, path in (("attn", attention), ("mlp", feed_forward))}


def ernie() -> nn.Module:
    """Tokens come first, rows second; one modulation for all blocks."""
    return alive(
        ErnieImageTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        text_in_dim=TEXT_DIMENSION,
        rope_axes_dim=ROTARY,
    )


def ernie_arguments() -> dict[str, Any]:
    """A token a latent."""
    return {
        "hidden_states": common.whole(patch=1),
        "timestep": common.times(),
        "text_bth": common.texts(),
        "text_lens": torch.tensor([WORDS, WORDS]),
    }


def ideogram() -> nn.Module:
    """Latents and text come in sequences of full length, each empty where the other stands."""
    sizes = {"in_channels": CHANNELS, "num_layers": 3, "intermediate_size": 48, "adaln_dim": 16}
    return alive(Ideogram4Transformer2DModel, **HEADS, **sizes, llm_features_dim=TEXT_DIMENSION, mrope_section=(4, 2, 2))


def ideogram_arguments() -> dict[str, Any]:
    """With a mark on each token; a timestep between 0 and 1."""
    text = torch.arange(WORDS)[:, None].repeat(1, 3)
    return {
        "hidden_states": torch.randn(2, LENGTH, CHANNELS),
        "timestep": common.times(0.5),
        "encoder_hidden_states": torch.randn(2, LENGTH, TEXT_DIMENSION),
        "position_ids": torch.cat([text, 100 + common.places().long()]).repeat(2, 1, 1),
        "segment_ids": torch.zeros(2, LENGTH, dtype=torch.long),
        "indicator": torch.tensor([[TEXT_TOKEN] * WORDS + [IMAGE_TOKEN] * 12] * 2),
    }


def krea() -> nn.Module:
    """Several layers of the text's encoder, which are fused first."""
    return alive(
        Krea2Transformer2DModel,
        **HEADS,
        in_channels=CHANNELS,
        num_layers=3,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_DIMENSION,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        axes_dims_rope=ROTARY,
    )


def krea_arguments() -> dict[str, Any]:
    """Packed latents, and three layers of each word; a timestep between 0 and 1."""
    return {
        "hidden_states": common.packed(CHANNELS),
        "encoder_hidden_states": torch.randn(2, WORDS, 3, TEXT_DIMENSION),
        "timestep": common.times(0.5),
        "position_ids": torch.cat([torch.zeros(WORDS, 3), common.places()]),
    }


def omni_gen() -> nn.Module:
    """A language model's blocks, without modulation: the timestep is a token between text and image."""
    return alive(
        OmniGenTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=0,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=8,
        time_step_dim=16,
    )


def omni_gen_arguments() -> dict[str, Any]:
    """Words as indices; they see what is before them, the image sees everything."""
    mask = torch.ones(LENGTH + 1, LENGTH + 1)
    mask[: WORDS + 1] = mask[: WORDS + 1].tril()
    return {
        "hidden_states": common.whole(),
        "timestep": common.times(0.5),
        "input_ids": torch.randint(1, VOCABULARY, (2, WORDS)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(2, 1, 1),
        "position_ids": torch.arange(LENGTH + 1).repeat(2, 1),
    }


def qwen_21() -> nn.Module:
    """Words see what is before them and do not know the timestep; the answer holds a value for them too."""
    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "context_in_dim": TEXT_DIMENSION}
    return alive(QwenImage21Transformer2DModel, **HEADS, **sizes, axes_dims_rope=ROTARY)


def qwen_21_arguments() -> dict[str, Any]:
    """Where the text's encoder would see the image, a slot stands for four of its tokens."""
    return {
        "hidden_states": common.packed(CHANNELS),
        "encoder_hidden_states": common.texts(),
        "timestep": common.times(0.5),
        "img_shapes": [[IMAGE], [IMAGE]],
        "img_mask": torch.tensor([[False] * WORDS + [True] * 3] * 2),
    }


ALL = (
    SmallDenoiser(
        name="QwenImage21Transformer2DModel",
        make=qwen_21,
        arguments=qwen_21_arguments,
        blocks=(Blocks("transformer_blocks", 3, TEXT_FIRST, shared(TEXT_FIRST, "attn", "img_mlp"), joined=True),),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="ErnieImageTransformer2DModel",
        make=ernie,
        arguments=ernie_arguments,
        blocks=(Blocks("layers", 3, ("visual", "text"), shared(("visual", "text"), "self_attention", "mlp"), joined=True),),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="Ideogram4Transformer2DModel",
        make=ideogram,
        arguments=ideogram_arguments,
        blocks=(Blocks("layers", 3, TEXT_FIRST, shared(TEXT_FIRST, "attention", "feed_forward"), joined=True),),
        tokens=TOKENS,
        layout=IMAGE,
    ),
    SmallDenoiser(
        name="Krea2Transformer2DModel",
        make=krea,
        arguments=krea_arguments,
        blocks=(Blocks("transformer_blocks", 3, TEXT_FIRST, shared(TEXT_FIRST, "attn", "ff"), joined=True),),
        tokens=TOKENS,
        layout=IMAGE,
        aside=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
    ),
    SmallDenoiser(
        name="OmniGenTransformer2DModel",
        make=omni_gen,
        arguments=omni_gen_arguments,
        blocks=(
            Blocks(
                "layers",
                count=3,
                streams=("text", "extra", "visual"),
                modules=shared(("text", "extra", "visual"), "self_attn", "mlp"),
                joined=True,
            ),
        ),
        tokens={**TOKENS, "extra": 1},
        layout=IMAGE,
    ),
)
