"""The parts of the reasoner before training, and how the whole is written and read: Wan2.2-I2V's own classes, small.

Sizes are chosen so that all weights fit into 24 MB as bfloat16 and one forward of the denoiser takes under 0.1 s a sample on two
CPU cores: 5 x 8 x 8 = 320 visual tokens, 14 blocks of dimension 192.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_lens.reasoner import folders
from dit_lens.reasoner.settings import CALL, SHIFT
from dit_lens.reasoner.tasks import TASKS

LATENT_CHANNELS = 8
TEXT_DIMENSION = 128


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on every prompt of every task, with all printable characters so that any text can be read."""
    built = Tokenizer(models.BPE(unk_token="<unk>"))
    built.normalizer = normalizers.NFKC()
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(set(string.printable.strip())),
        show_progress=False,
    )
    built.train_from_iterator([p for task in TASKS.values() for p in task.prompts()], trainer)
    end = built.token_to_id("</s>")
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CALL["max_sequence_length"],
    )


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers of UMT5."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIMENSION,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,  # pyright: ignore[reportCallIssue]
        )
    )


def vae() -> AutoencoderKLWan:
    """Four times smaller in time, height and width: 17 x 64 x 64 pixels become 5 x 16 x 16 latents."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def transformer() -> WanTransformer3DModel:
    """The denoiser. Its input is the noisy latents, four channels that mark the first frame, and the encoded first frame."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=2 * LATENT_CHANNELS + 4,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIMENSION,
        freq_dim=256,
        ffn_dim=768,
        num_layers=14,
        rope_max_seq_len=64,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of the flow, with sigmas shifted towards noise."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def untrained(seed: int = 0) -> WanImageToVideoPipeline:
    """The whole pipeline with random weights: where training starts, and the control for everything that training should do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        return WanImageToVideoPipeline(
            tokenizer=words,  # pyright: ignore[reportArgumentType]
            text_encoder=text_encoder(len(words)),
            vae=vae(),
            scheduler=scheduler(),
            transformer=transformer(),
        )


def open_pipeline(where: Path, dtype: torch.dtype = torch.float32) -> WanImageToVideoPipeline:
    """A saved pipeline, computing in `dtype` (it is stored in bfloat16)."""
    return WanImageToVideoPipeline.from_pretrained(where, dtype=dtype, local_files_only=True)


def save_pipeline(pipeline: WanImageToVideoPipeline, where: Path, training: dict[str, Any]) -> None:
    """Write a pipeline in bfloat16, in shards under 16 MB, with its training record, default settings and hashes.

    What else lies in the folder (the model card) stays.
    """
    for old in (p for p in where.glob("*") if p.is_dir()):
        shutil.rmtree(old)
    pipeline.to(torch.bfloat16).save_pretrained(where, max_shard_size="15MB")
    (where / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    (where / "call.json").write_text(json.dumps(CALL, indent=1) + "\n")
    folders.write_hashes(where)
