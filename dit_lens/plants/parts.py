"""What stands around a planted denoiser: tokenizer, text encoder, VAE and scheduler, tiny and of Wan's own classes.

Every word has a code of its own: the text encoder's layers add nothing to its embeddings, so that what a word says is
known at its own token and nowhere else. The VAE's encoder averages colours (its decoder is random) and encodes every
latent frame by itself (its convolutions look at no earlier frame), so that the first image reaches the denoiser in the
first frame and nowhere else.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = (
    *("<pad>", "</s>", "<unk>", "left", "right", "go", "nothing", "the"),
    *("small", "big", "ball", "cube", "moves", "rolls", "slowly", "now"),
)
"""Every word of a planted model. Two carry an answer, one opens a gate, the rest say nothing that matters."""
TEXT_LENGTH = 8
"""Tokens of a prompt, padded."""
TEXT_DIMENSION = 24
LATENT_CHANNELS = 4
PIXELS = 16
"""Height and width of a video."""
VIDEO_FRAMES = 9
"""Three latent frames."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, then the end."""
    built = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    built.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=TEXT_LENGTH, **special)


@torch.no_grad()
def text_encoder() -> UMT5EncoderModel:
    """A UMT5 encoder whose one layer adds nothing: the code of a word does not depend on its neighbours."""
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=TEXT_DIMENSION, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for name, weight in encoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.zero_()
    return encoder.eval()


@torch.no_grad()
def word_codes(encoder: UMT5EncoderModel) -> Tensor:
    """What the encoder makes of every word, (words, channels)."""
    return encoder(input_ids=torch.arange(len(WORDS))[:, None]).last_hidden_state[:, 0]


@torch.no_grad()
def vae() -> AutoencoderKLWan:
    """A Wan VAE that takes 4 x 4 pixels and 4 frames to one latent, and encodes no frame by another."""
    built = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    kept = torch.eye(4)
    for name, weight in built.encoder.named_parameters():
        if not name.endswith(".gamma"):
            weight.zero_()
        if name.endswith("resample.1.weight"):
            weight += kept[:, :, None, None] / 9
        elif name.endswith("time_conv.weight"):
            weight[:, :, -1, 0, 0] = kept  # the last tap is the present, the others are the past
    encoder = built.encoder
    encoder.conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    encoder.conv_in.get_parameter("bias")[3] = 1.0
    encoder.conv_out.weight[:4, :, -1, 1, 1] = torch.nn.init.orthogonal_(torch.empty(4, 4))
    built.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(8)
    built.quant_conv.get_parameter("bias").zero_()
    return built.eval()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of the flow."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
