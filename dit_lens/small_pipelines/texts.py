"""Tiny tokenizers and text encoders, of the classes that pipelines come with, built without any file.

One tokenizer does for all of them: a word is a token, whatever it does not know is <unk>, and a prompt ends with </s>.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from dit_lens.plants.parts import TEXT_DIMENSION, TEXT_LENGTH, WORDS
from dit_lens.small_pipelines.making import made

CLIP_DIMENSION = 8
"""Channels of a CLIP text encoder and of what it pools."""
HEADS = 2
LAYERS = 2

CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
"""How messages become one text, for the pipelines that ask their tokenizer."""
PROMPTS = {"prompt": "left ball rolls", "negative_prompt": "right cube"}
"""A prompt and a negative one, of different lengths, in words that the tokenizer knows."""


def tokenizer(length: int = TEXT_LENGTH, leading: int = 0) -> PreTrainedTokenizerFast:
    """A token a word, a punctuation mark, a run of line breaks or a `<|marker|>`; `length` tokens at most.

    Pipelines that wrap a prompt into a template of a chat drop a fixed number of tokens from it. Cut like this, Qwen's
    template has as many tokens as with its own tokenizer. Llama's has two more with its own (a first token, and a word
    in two), which `leading` tokens make up for.
    """
    built = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    pattern = Regex(r"<\|\w+\|>|\w+|\n+|[^\w\s]")
    built.pre_tokenizer = Split(pattern, behavior="removed", invert=True)  # pyright: ignore[reportAttributeAccessIssue]
    built.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="</s> " * leading + "$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["chat_template"] = CHAT
    return PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=length, padding_side="right", **special)


def t5() -> T5EncoderModel:
    """The encoder of a T5."""
    small: dict[str, Any] = {"d_model": TEXT_DIMENSION, "d_kv": 4, "d_ff": 8, "num_layers": LAYERS, "num_heads": HEADS}
    return made(T5EncoderModel, config=T5Config(vocab_size=len(WORDS), **small))


def clip_config() -> CLIPTextConfig:
    """The sizes of a CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=CLIP_DIMENSION,
        intermediate_size=16,
        projection_dim=CLIP_DIMENSION,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=77,
        bos_token_id=WORDS.index("<pad>"),
        eos_token_id=WORDS.index("</s>"),
        pad_token_id=WORDS.index("<pad>"),
    )


def clip() -> CLIPTextModel:
    """A CLIP text encoder."""
    return made(CLIPTextModel, config=clip_config())


def projected_clip() -> CLIPTextModelWithProjection:
    """A CLIP text encoder with a projection of what it pools."""
    return made(CLIPTextModelWithProjection, config=clip_config())


def sizes(layers: int = LAYERS) -> dict[str, Any]:
    """The sizes of a decoder-only language model, as its configuration names them."""
    return {
        "vocab_size": len(WORDS),
        "hidden_size": TEXT_DIMENSION,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "pad_token_id": WORDS.index("<pad>"),
        "bos_token_id": WORDS.index("<pad>"),
        "eos_token_id": WORDS.index("</s>"),
    }


def gemma() -> GemmaModel:
    """A Gemma without its head."""
    return made(GemmaModel, config=GemmaConfig(head_dim=TEXT_DIMENSION // HEADS, **sizes()))


def gemma2() -> Gemma2Model:
    """A Gemma 2 without its head."""
    return made(Gemma2Model, config=Gemma2Config(head_dim=TEXT_DIMENSION // HEADS, **sizes()))


def llama() -> LlamaModel:
    """A Llama without its head, of three layers: HunyuanVideo reads the third state from the end."""
    return made(LlamaModel, config=LlamaConfig(**sizes(layers=3)))


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen 2.5 VL; its vision tower is there and sees nothing."""
    rotary = {"rope_type": "default", "type": "default", "mrope_section": [2, 2, 2]}
    text = {**sizes(), "rope_scaling": rotary, "max_position_embeddings": 2048}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": TEXT_DIMENSION}
    config = made(Qwen2_5_VLConfig, text_config=text, vision_config=vision)
    return made(Qwen2_5_VLForConditionalGeneration, config=config)


def qwen3() -> Qwen3Model:
    """A Qwen 3 without its head."""
    return made(Qwen3Model, config=Qwen3Config(head_dim=TEXT_DIMENSION // HEADS, **sizes()))


def bert() -> BertModel:
    """A BERT."""
    small: dict[str, Any] = {"hidden_size": TEXT_DIMENSION, "intermediate_size": 16, "max_position_embeddings": 128}
    heads: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return made(BertModel, config=BertConfig(vocab_size=len(WORDS), **small, **heads))
