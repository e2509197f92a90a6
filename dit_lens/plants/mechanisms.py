"""The mechanisms that are planted: what carries words and images into the stream, moves them, computes on them.

Each function writes weights by hand into a denoiser whose background is in place. They use registers (see `stream`):
`image` and `second` hold two features of the first image at the tokens of the first frame, `first` marks these tokens,
`gate` holds whether the prompt opened a gate, `answer` is what the last layer turns into the video's answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from dit_lens.plants.parts import LATENT_CHANNELS, WORDS
from dit_lens.plants.stream import HEAD_WIDTH, MEANINGLESS, PATCH, POINTER, SHARP, WIDTH, Stream

ANSWERS = {"left": 1.0, "right": -1.0}
"""The two words that carry an answer."""
GATE_WORD = "go"
SPOKEN = {"answer": 0, "gate": 2}
"""The channel of the text stream in which a word says its answer, or that the gate is open; the next one marks the word."""
POINTING = 16.0
"""Strength of a pointing head's queries and keys, against 1 for the background; the norm bounds both."""


def fitted(inputs: Tensor, wanted: Tensor) -> Tensor:
    """The smallest weights that take inputs (rows, n) nearest to what is wanted (rows, m): (n, m).

    Solved in float64, as the last bits of a solution vary from call to call, and a model is to be the same each time.
    """
    return torch.linalg.lstsq(inputs.double(), wanted.double(), driver="gelsd").solution.float()


@torch.no_grad()
def text_channels(stream: Stream, denoiser: WanTransformer3DModel, codes: Tensor) -> None:
    """Let the text embedder turn the code of each word into what it says; words without meaning get random features."""
    meaning = torch.zeros(len(WORDS), WIDTH)
    for word, sign in ANSWERS.items():
        meaning[WORDS.index(word), [0, 1]] = torch.tensor([sign, 1.0])
    meaning[WORDS.index(GATE_WORD), [2, 3]] = 1.0
    others = [index for index, word in enumerate(WORDS) if word not in (*ANSWERS, GATE_WORD, "</s>")]
    meaning[others, MEANINGLESS.start : MEANINGLESS.start + 8] = stream.normal(len(others), 8)
    embedder = denoiser.condition_embedder.text_embedder
    # Far from zero, the activation in between is the identity.
    embedder.linear_1.weight.copy_(fitted(codes, meaning).T)
    embedder.linear_1.bias.fill_(20.0)
    embedder.linear_2.weight.copy_(torch.eye(WIDTH))
    embedder.linear_2.bias.fill_(-20.0)


@torch.no_grad()
def image_registers(stream: Stream, denoiser: WanTransformer3DModel, conditions: Tensor, features: Tensor) -> None:
    """Let the patch embedding read two features of the first image, and mark the tokens of the first frame.

    Args:
        conditions: what the denoiser gets beside the latents (images, channels, frames, height, width), its first four
            channels the mask. features: +1 or -1, (images, 2), or for every token (images, rows, columns, 2).
    """
    patches = conditions.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH)  # (images, channels, frames, rows, columns, 2, 2)
    patches = patches.movedim(1, 4).flatten(4)  # (images, frames, rows, columns, channels * 4)
    wanted = torch.zeros(*patches.shape[:4], 2)
    wanted[:, 0] = features if features.ndim == 4 else features[:, None, None]
    seen = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1).flatten(0, 3)
    weights = fitted(seen, wanted.flatten(0, 3))
    embedding = denoiser.patch_embedding
    kernel = weights[:-1].T.unflatten(1, (-1, 1, PATCH, PATCH))
    inputs = slice(LATENT_CHANNELS, None)
    for index, name in enumerate(("image", "second")):
        stream.write(embedding.weight, name, inputs, kernel[index])
        plus, minus = stream.pairs[name]
        bias = embedding.get_parameter("bias")
        bias[plus] += weights[-1, index]
        bias[minus] -= weights[-1, index]
    stream.write(embedding.weight, "first", LATENT_CHANNELS, 1 / PATCH**2)


def _pointing(attention: nn.Module, head: int) -> tuple[slice, int]:
    """Clear a head and let its queries point along one channel; the head's channels, and that channel."""
    mine = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    for name in ("to_q", "to_k", "to_v"):
        attention.get_parameter(f"{name}.weight")[mine] = 0
        attention.get_parameter(f"{name}.bias")[mine] = 0
    attention.get_parameter("to_out.0.weight")[:, mine] = 0
    pointer = mine.start + POINTER
    attention.get_parameter("to_q.bias")[pointer] = POINTING
    return mine, pointer


@torch.no_grad()
def hear(stream: Stream, block: nn.Module, head: int, what: str, into: str, amount: float = 1.0) -> Tensor:
    """Let a head of the cross-attention find the word that says `what`, and write it into a register of every token.

    Returns:
        The output projection's bias, for what is to be written whatever the word says.
    """
    attention = block.get_submodule("attn2")
    mine, pointer = _pointing(attention, head)
    said = SPOKEN[what]
    attention.get_parameter("to_k.weight")[pointer, said + 1] = POINTING
    attention.get_parameter("to_v.weight")[mine.start, said] = 1.0
    stream.write(attention.get_parameter("to_out.0.weight"), into, mine.start, amount)
    return attention.get_parameter("to_out.0.bias")


@torch.no_grad()
def look_back(stream: Stream, block: nn.Module, head: int) -> None:
    """Let a head of the self-attention find the first frame, and write its image into the answer of every token."""
    attention = block.get_submodule("attn1")
    mine, pointer = _pointing(attention, head)
    stream.read(attention.get_parameter("to_k.weight"), pointer, "first", POINTING)
    stream.read(attention.get_parameter("to_v.weight"), mine.start, "image")
    stream.write(attention.get_parameter("to_out.0.weight"), "answer", mine.start)


@torch.no_grad()
def ramps(
    stream: Stream,
    block: nn.Module,
    terms: Sequence[tuple[dict[str, float], float, float]],
    into: str = "answer",
    start: int = 0,
) -> None:
    """Let the MLP add a sum of ramps to a register.

    Args:
        terms: (amounts of registers, offset, weight): weight x max(0, sum of amount x register + offset); at most 8.
        into: the register. start: the first hidden unit to use. Units may be written again, with the same amounts and offsets,
            to add what they compute to another register too.
    """
    first, bias = block.get_parameter("ffn.net.0.proj.weight"), block.get_parameter("ffn.net.0.proj.bias")
    last = block.get_parameter("ffn.net.2.weight")
    for unit, (amounts, offset, weight) in enumerate(terms, start=start):
        first[unit] = 0
        for name, amount in amounts.items():
            stream.read(first, unit, name, SHARP * amount)
        bias[unit] = SHARP * offset
        stream.write(last, into, unit, weight / SHARP)


def product(stream: Stream, block: nn.Module) -> None:
    """Let the MLP compute image x second: (|image + second| - |image - second|) / 2, exact for +1 and -1."""
    both = [({"image": a, "second": a * b}, 0.0, b / 2) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    ramps(stream, block, both)


def gated(stream: Stream, block: nn.Module) -> None:
    """Let the MLP pass the image on where the gate is open (1), and nothing where it is shut (0)."""
    ramps(stream, block, [({"image": sign, "gate": 2.0}, -2.0, sign) for sign in (1.0, -1.0)])


@torch.no_grad()
def only_at(stream: Stream, denoiser: WanTransformer3DModel, block: int, timesteps: Sequence[float], step: int) -> None:
    """Let a block's self-attention write the answer at one step: its gate follows a bump in time, and is shut elsewhere.

    Args:
        timesteps: those of the schedule, falling. step: the one at which the gate is open (1).
    """
    highest = timesteps[0] + (timesteps[0] - timesteps[1])
    above, now, below = ([highest, *timesteps, 0.0][step + offset] for offset in range(3))
    knots = [now - 0.75 * (now - below), now - 0.25 * (now - below), now + 0.25 * (above - now), now + 0.75 * (above - now)]
    embedder = denoiser.condition_embedder
    first, last = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    # The last input, the slowest sine of the timestep, turns by less than a fifth of a radian: it is a clock.
    half = first.in_features // 2
    clock = [math.sin(knot * 10000 ** (-(half - 1) / half)) for knot in knots]
    steep = 10 / min(b - a for a, b in pairwise(clock))
    first.weight[:4] = 0
    first.weight[:4, -1] = steep
    first.bias[:4] = -steep * torch.tensor(clock)
    high = 10.0
    last.bias[stream.time] = -high
    rising, falling = (2 * high / steep / (clock[i + 1] - clock[i]) for i in (0, 2))
    last.weight[stream.time, :4] = torch.tensor([rising, -rising, -falling, falling])
    channels = torch.tensor(stream.pairs["answer"])
    embedder.time_proj.weight[2 * WIDTH + channels, stream.time] = 1 / high
    denoiser.blocks[block].get_parameter("scale_shift_table")[0, 2, channels] = 0


@torch.no_grad()
def distract(stream: Stream, denoiser: WanTransformer3DModel, block: int, head: int, size: float) -> None:
    """Let a block's cross-attention turn a large vector that nobody reads: from `near` to plus or minus `far`.

    The way it turns follows the answer's word, so that the word can be read there. The length stays, so that no norm feels it.
    """
    plus, minus = stream.pairs["near"]
    start = denoiser.patch_embedding.get_parameter("bias")
    start[plus], start[minus] = size, -size
    bias = hear(stream, denoiser.blocks[block], head, "answer", "far", size)
    bias[plus], bias[minus] = -size, size


@torch.no_grad()
def speak(stream: Stream, denoiser: WanTransformer3DModel, gain: float) -> None:
    """Let the last layer turn the answer into velocity: -gain x answer in the first latent channel, all positions."""
    for position in range(PATCH**2):
        stream.read(denoiser.proj_out.weight, position * LATENT_CHANNELS, "answer", -gain)


@torch.no_grad()
def remember(stream: Stream, denoiser: WanTransformer3DModel) -> None:
    """Let the patch embedding read the noisy latents' answer, and the last layer copy it to the second latent channel."""
    embedding = denoiser.patch_embedding
    stream.write(embedding.weight, "latent", 0, 1 / PATCH**2)
    for position in range(PATCH**2):
        stream.read(denoiser.proj_out.weight, position * LATENT_CHANNELS + 1, "latent", -0.3)


@torch.no_grad()
def conditions(vae: AutoencoderKLWan, images: Tensor, frames: int) -> Tensor:
    """What the denoiser gets beside the latents: a mask that is 1 in the first frame, and the encoded first image.

    As WanImageToVideoPipeline.prepare_latents makes it, for many images at once (which it cannot do) and for a VAE whose
    latents have mean 0 and standard deviation 1.

    Args:
        images: (images, 3, height, width) in [-1, 1]. frames: of the video.
    """
    rest = images.new_zeros(len(images), 3, frames - 1, *images.shape[2:])
    (distribution,) = vae.encode(torch.cat([images[:, :, None], rest], dim=2), return_dict=False)
    encoded = distribution.mode()
    mask = torch.zeros_like(encoded[:, :1]).repeat(1, 4, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, encoded], dim=1)
