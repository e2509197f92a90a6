"""The residual stream of a planted model: named registers, and what reads and writes them.

A *register* is a pair of channels that holds a number x as (+x, -x), so that no write moves the mean that a layer norm
subtracts. Constant *anchor* channels are much larger than all registers, so that the norm divides by the same number
whatever the registers hold, and reading is linear: `SIGMA` is that number. The remaining channels are the *background*:
random weights move noise, words without meaning and time through them, from block to block and into the video, and
nothing that carries an answer is ever read into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from torch import Tensor, nn

from dit_lens.plants import parts
from dit_lens.plants.parts import LATENT_CHANNELS, TEXT_DIMENSION

HEADS = 4
HEAD_WIDTH = 16
WIDTH = HEADS * HEAD_WIDTH
PATCH = 2
REGISTERS = ("answer", "image", "second", "first", "gate", "latent", "near", "far")
ANCHORS = 16
POINTER = 6
"""A channel of a head in which queries and keys meet: the slowest that turns with time (one radian in 1000 frames)."""
SHARP = 20.0
"""How steep the ramps are that MLPs are made of; the kink of a ramp is 1 / SHARP wide."""


class Stream:
    """Which channels mean what in one model; the assignment is a random one.

    Attributes:
        rng: draws everything random about the denoiser. anchors, background: channels. time: the channel in which the
            time embedding may hold what it likes. sigma: what a layer norm divides by.
    """

    def __init__(self, seed: int, anchor: float) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(WIDTH, generator=self.rng).tolist()
        self.pairs = {name: (order[2 * i], order[2 * i + 1]) for i, name in enumerate(REGISTERS)}
        used = 2 * len(REGISTERS)
        self.anchors, self.time = order[used : used + ANCHORS], order[used + ANCHORS]
        self.background = order[used + ANCHORS + 1 :]
        self.anchor = anchor
        self.sigma = anchor * math.sqrt(ANCHORS / WIDTH)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of this model's own."""
        return torch.randn(*shape, generator=self.rng)

    def write(self, weight: Tensor, name: str, column: int | slice, amount: float | Tensor = 1.0) -> None:
        """Let a projection to the stream add `amount` x its input `column` to a register."""
        plus, minus = self.pairs[name]
        weight[plus, column] += amount
        weight[minus, column] -= amount

    def read(self, weight: Tensor, row: int | slice, name: str, amount: float = 1.0) -> None:
        """Let a projection of the normed stream add `amount` x a register to its output `row`."""
        plus, minus = self.pairs[name]
        weight[row, plus] += amount * self.sigma / 2
        weight[row, minus] -= amount * self.sigma / 2

    def read_background(self, weight: Tensor, rows: Sequence[int], amount: float = 1.0) -> None:
        """Let a projection of the normed stream read random mixtures of the background, of size `amount`."""
        mixture = self.normal(len(rows), len(self.background)) * amount * self.sigma / math.sqrt(len(self.background))
        weight[torch.tensor(rows)[:, None], torch.tensor(self.background)] = mixture

    def write_background(self, weight: Tensor, columns: Sequence[int], amount: float = 1.0) -> None:
        """Let a projection to the stream add random mixtures of its inputs to the background, of size `amount`."""
        mixture = self.normal(len(self.background), len(columns)) * amount / math.sqrt(len(columns))
        weight[torch.tensor(self.background)[:, None], torch.tensor(columns)] = mixture


def blank(blocks: int) -> WanTransformer3DModel:
    """A Wan denoiser in which every norm is plain, every gate open, and every other weight zero."""
    denoiser = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=2 * LATENT_CHANNELS + 4,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIMENSION,
        freq_dim=32,
        ffn_dim=64,
        num_layers=blocks,
        rope_max_seq_len=32,
    )
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for block in denoiser.blocks:
            table: Tensor = block.scale_shift_table  # pyright: ignore[reportAssignmentType]
            table[:, [2, 5]] = 1.0
    return denoiser.eval()


def blank_pipeline(blocks: int, seed: int) -> WanImageToVideoPipeline:
    """A pipeline around a blank denoiser, its other parts drawn after a seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanImageToVideoPipeline(
            tokenizer=parts.tokenizer(),  # pyright: ignore[reportArgumentType]
            text_encoder=parts.text_encoder(),
            vae=parts.vae(),
            scheduler=parts.scheduler(),
            transformer=blank(blocks),
        )


@torch.no_grad()
def random_background(stream: Stream, denoiser: WanTransformer3DModel) -> None:
    """Fill the background: noise in, random attention and MLPs in every block, three of four latent channels out."""
    background = stream.background
    embedding = denoiser.patch_embedding
    embedding.get_parameter("bias")[torch.tensor(stream.anchors)] = stream.anchor * torch.tensor([1.0, -1.0]).repeat(ANCHORS // 2)
    noisy = stream.normal(len(background), LATENT_CHANNELS - 1, 1, PATCH, PATCH) * 0.3
    embedding.weight[background, 1:LATENT_CHANNELS] = noisy  # all but the channel that holds the answer
    time = denoiser.condition_embedder.time_embedder
    time.linear_1.weight[8:] = 0.3 * stream.normal(WIDTH - 8, time.linear_1.in_features)
    time.linear_2.weight[background, 8:] = 0.03 * stream.normal(len(background), WIDTH - 8)
    for block in denoiser.blocks:
        _random_block(stream, block)
    for position in range(PATCH**2):
        rows = [position * LATENT_CHANNELS + channel for channel in range(1, LATENT_CHANNELS)]
        stream.read_background(denoiser.proj_out.weight, rows)
        stream.read_background(denoiser.proj_out.weight, [position * LATENT_CHANNELS], 0.01)


def _random_block(stream: Stream, block: nn.Module) -> None:
    """Random attention, cross-attention and MLP of one block, from background to background."""
    columns = range(WIDTH)
    for name in ("attn1", "attn2"):
        attention = block.get_submodule(name)
        stream.read_background(attention.get_parameter("to_q.weight"), columns)
        if name == "attn1":
            stream.read_background(attention.get_parameter("to_k.weight"), columns)
            stream.read_background(attention.get_parameter("to_v.weight"), columns)
        else:
            # Of the text, only the channels of words that mean nothing.
            attention.get_parameter("to_k.weight")[:, MEANINGLESS] = stream.normal(WIDTH, WIDTH - MEANINGLESS.start)
            attention.get_parameter("to_v.weight")[:, MEANINGLESS] = stream.normal(WIDTH, WIDTH - MEANINGLESS.start) / 4
        attention.get_parameter("to_k.bias").copy_(0.1 * stream.normal(WIDTH))
        stream.write_background(attention.get_parameter("to_out.0.weight"), columns, 0.2)
    first, last = block.get_parameter("ffn.net.0.proj.weight"), block.get_parameter("ffn.net.2.weight")
    hidden = range(8, len(first))  # the first eight are kept for a plant
    stream.read_background(first, hidden)
    stream.write_background(last, hidden, 0.2)
    table = block.get_parameter("scale_shift_table")
    table[0][:, stream.background] += 0.1 * stream.normal(6, len(stream.background))


MEANINGLESS = slice(8, WIDTH)
"""The channels of the text stream in which words differ that carry no answer; see `plants.text_channels`."""
