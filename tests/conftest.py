"""Small models for the tests: diffusers pipelines with random weights, built in memory, that run in moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from jaxtyping import install_import_hook
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# Shapes in annotations are checked here, and in the tests only; so this comes before the first import of the library.
install_import_hook("dit_lens", "typechecking.checked")
torch.set_num_threads(1)

import dit_lens as dl  # noqa: E402

WORDS = ("<pad>", "</s>", "<unk>", "walk", "draw", "circle", "the", "maze", "red", "green", "blue", "nothing")
CHANNELS = 4
WIDTH = 16
BLOCKS = 3


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a dozen words."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def tiny_text_encoder() -> UMT5EncoderModel:
    """A UMT5 encoder of one layer."""
    config = UMT5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def tiny_vae() -> AutoencoderKLWan:
    """A Wan VAE that takes 4 x 4 pixels and 4 frames to one latent."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    return vae.eval()


def tiny_transformer(in_channels: int, blocks: int = BLOCKS) -> WanTransformer3DModel:
    """A Wan transformer of a few blocks of width 16."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=in_channels,
        out_channels=CHANNELS,
        text_dim=8,
        freq_dim=8,
        ffn_dim=32,
        num_layers=blocks,
        rope_max_seq_len=32,
    )
    return transformer.eval()


def tiny_pipeline(kind: type = WanImageToVideoPipeline, experts: int = 1, seed: int = 0, **settings: Any) -> Any:
    """A pipeline with random weights: image to video or text to video, with one expert or two."""
    torch.manual_seed(seed)
    in_channels = CHANNELS + 4 + CHANNELS if kind is WanImageToVideoPipeline else CHANNELS
    components: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(in_channels),
        "transformer_2": tiny_transformer(in_channels) if experts == 2 else None,
        "boundary_ratio": 0.8 if experts == 2 else None,
    }
    return kind(**{**components, **settings})


def picture(color: tuple[int, int, int], size: int = 16) -> Image.Image:
    """A square picture in one colour with a white corner."""
    image = Image.new("RGB", (size, size), color)
    image.paste((255, 255, 255), (0, 0, size // 2, size // 4))
    return image


def arguments(pipe: Any, **changes: Any) -> dict[str, Any]:
    """Pipeline arguments for a run of four steps with guidance: layout (2, 2, 2), two branches."""
    inputs = {
        "prompt": "walk the maze",
        "negative_prompt": "nothing",
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
    }
    if isinstance(pipe, WanImageToVideoPipeline):
        inputs["image"] = picture((200, 30, 30))
    return {**inputs, **changes}


def shown(run: dl.Run) -> Tensor:
    """The video of a run that has one."""
    assert run.video is not None
    return run.video


@pytest.fixture
def image_pipe() -> Any:
    """Image to video, one expert."""
    return tiny_pipeline()


@pytest.fixture
def text_pipe() -> Any:
    """Text to video, two experts."""
    return tiny_pipeline(WanPipeline, experts=2)


@pytest.fixture(params=["image one expert", "image two experts", "text two experts"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    """Each kind of tiny pipeline in turn."""
    kind = WanPipeline if request.param.startswith("text") else WanImageToVideoPipeline
    return tiny_pipeline(kind, experts=2 if "two" in request.param else 1)


@pytest.fixture(params=["nnsight", "hooks"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return request.param
