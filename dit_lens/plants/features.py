"""Planted features: models in which a feature of the sample is written, erased, moved, hidden from linear probes, or absent.

    model = dl.plants.planted_feature("erased", seed=3)
    model.truth                               # FeatureTruth(kind='erased', block=1, second=3, ...)
    samples = model.samples(64)
    lens = model.lens()
    run = lens.run(**model.inputs(samples), seed=model.seeds(samples), until=0, decode=False, record=dl.at(step=0, frames=0))
    model.truth.expected(block=2)             # "linear": what probes and their controls are to report there

The feature is the product of two bits: a word of the prompt says one, the first image shows the other at each token of the
first frame (or the same at all of them). The image's bit is in the stream from the start, and tells nothing of the feature
without the word. A block brings the word in through its cross-attention, multiplies in its MLP, writes the product into
a register and takes the word out again; where the feature is to stay nonlinear, the word just stays.

What a block takes out must be gone: in a stream without noise, a millionth of a feature is read as well as the whole of it. So
the registers hold noise from the latents, which no probe can know from elsewhere, and the MLP's products saturate, so that
what one block adds another takes out, whatever the noise, to less than a hundredth of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from dit_lens.errors import InputError, listed
from dit_lens.lens import Lens, wrap
from dit_lens.pairs import Pair, joined_inputs
from dit_lens.plants import mechanisms, parts
from dit_lens.plants.model import GAIN, GUIDANCE, STEPS, TEXTURE
from dit_lens.plants.readings import PROBE_ALARM
from dit_lens.plants.stream import HEADS, PATCH, Stream, blank_pipeline, random_background

FEATURES = ("written", "erased", "moved", "nonlinear", "absent")
"""What can be planted; see `planted_feature`."""
FEATURE, ELSEWHERE, BIT = "far", "near", "gate"
"""The registers of the feature, of where it is moved to, and of the word's bit."""
NOISE = {FEATURE: 0.4, ELSEWHERE: 0.4, BIT: 0.1}
"""Standard deviation of the noise in these registers, whose values are +1 and -1. The area under the ROC curve of a feature that
is there is 0.9998; the word's bit goes through the MLPs, which stand noise of up to 1/2."""
ANCHOR = 16.0
SIDE = 4
"""Height and width of a latent frame in tokens."""
PIXELS = 4 * PATCH * SIDE
VIDEO_FRAMES = 5
"""Two latent frames."""
FITTED = 24
"""How many images the patch embedding is fitted to."""

READABLE = (1 + PROBE_ALARM) / 2
"""An area under the ROC curve, 0.8, from which a probe counts as reading something: the alarm of `plants.readings`. Of half of
64 clips that share a label each, an area by chance has a standard deviation of 0.1, so this is three of them."""
SELECTIVE = 0.2
"""How far a reading must be above its control task: a score of 0.8 beside a control that is right on more than half of all
pairs by what it remembers of places, at 0.6, is no reading of the sample."""

Finding = Literal["linear", "nonlinear", "absent"]
USES = ("silent", "reads", "ignores")


def finding(linear: float, selectivity: float, nonlinear: float, nonlinear_selectivity: float) -> Finding:
    """What probes say by their held-out areas under the ROC curve, with limits that are fixed here for all models.

    Args:
        linear, nonlinear: of a linear probe and of a small network. selectivity, nonlinear_selectivity: that less the area of
            the same probe's control task.
    """
    if linear >= READABLE and selectivity >= SELECTIVE:
        return "linear"
    return "nonlinear" if nonlinear >= READABLE and nonlinear_selectivity >= SELECTIVE else "absent"


@dataclass(frozen=True)
class FeatureTruth:
    """What was planted where.

    Attributes:
        kind: one of `FEATURES`. block: after which the feature is in the stream; None where it is absent.
        second: after which it is gone (erased) or elsewhere (moved).
        use: whether the video's answer is made of the feature (`reads`), is the same and made afresh (`ignores`), or is none.
        reader: the block that makes the answer. per: whether tokens have features of their own, or the clip has one.
        branch, frame: where it is written: of the first frame, in the branch whose prompt says the word.
    """

    kind: str
    block: int | None = None
    second: int | None = None
    use: str = "silent"
    reader: int | None = None
    per: str = "token"
    branch: str = "cond"
    frame: int = 0

    def expected(self, block: int) -> Finding:
        """What probes are to find in the stream after a block, at the first step."""
        if self.block is None or block < self.block:
            return "absent"
        if self.kind == "nonlinear":
            return "nonlinear"
        # An answer that was made is the feature again, whatever became of the feature itself.
        return "absent" if self.kind == "erased" and self.second is not None and block >= self.second else "linear"


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """One input of a model with a planted feature.

    Attributes:
        inputs: the pipeline's keyword arguments. seed: of the noise. index: its number. group: samples of one group share
            noise and image, and must not be on both sides of a split.
        feature: for every token of the first frame, whether it has it.
    """

    inputs: dict[str, Any]
    seed: int
    index: int
    group: int
    feature: np.ndarray


@dataclass(frozen=True, eq=False)
class PlantedFeature:
    """A pipeline with a known feature.

    Attributes:
        pipe: a WanImageToVideoPipeline. truth: what was planted. seed: of its weights. blocks: how many it has.
    """

    pipe: WanImageToVideoPipeline
    truth: FeatureTruth
    seed: int
    blocks: int

    def lens(self, engine: str = "nnsight") -> Lens:
        """A lens on the pipeline."""
        return wrap(self.pipe, engine)

    def samples(self, count: int, seed: int = 0) -> list[FeatureSample]:
        """Samples with noise of their own; of features of clips, every other clip has it."""
        return [pair.clean for pair in self.pairs(count, seed)]

    def pairs(self, count: int, seed: int = 0) -> list[Pair]:
        """Pairs of samples that differ in the word only: the donor has the feature where the clean sample has it not."""
        rng = torch.Generator().manual_seed(seed)
        return [self._pair(index, rng) for index in range(count)]

    def inputs(self, samples: Sequence[FeatureSample]) -> dict[str, Any]:
        """The keyword arguments of one call with several samples."""
        return joined_inputs(samples)

    def seeds(self, samples: Sequence[FeatureSample]) -> list[list[int]]:
        """The `seed=` of that call: for every sample its own."""
        return [[sample.seed] for sample in samples]

    def answer(self, latents: Float[Tensor, "*batch channels frames height width"]) -> Float[Tensor, "*batch rows columns"]:
        """The answer that latents or an x0-hat show at every token: near +1 or -1, 0 for none.

        The noise in final latents adds about 0.1 at a single token.
        """
        shown = latents[..., 0, self.truth.frame, :, :]
        return shown.unflatten(-2, (-1, PATCH)).unflatten(-1, (-1, PATCH)).mean(dim=(-3, -1)) / GAIN

    def agreement(
        self, latents: Float[Tensor, "batch channels frames height width"], samples: Sequence[FeatureSample]
    ) -> Float[Tensor, " batch"]:
        """The mean over tokens of the answer, turned so that the right one is 1: 0 where there is none, -1 where it is wrong."""
        turned = torch.tensor(np.stack([np.where(sample.feature, 1.0, -1.0) for sample in samples]))
        return (self.answer(latents) * turned.to(latents)).mean(dim=(-2, -1))

    def _pair(self, index: int, rng: torch.Generator) -> Pair:
        def coin(*shape: int) -> Tensor:
            return 2.0 * torch.randint(2, shape, generator=rng) - 1

        clip = self.truth.per == "clip"
        shown = coin(1, 1).expand(SIDE, SIDE) if clip else coin(SIDE, SIDE)
        other, word, spoken = coin(SIDE, SIDE), float(coin(1)), [int(v) for v in torch.randint(2, (4,), generator=rng)]
        if clip:  # as many clips with the feature as without
            word = float(shown[0, 0]) * (1.0 if index % 2 == 0 else -1.0)
        seed = int(torch.randint(2**31, (1,), generator=rng))
        picture = (_mosaic(shown, other) + TEXTURE * torch.randn(3, PIXELS, PIXELS, generator=rng)).clamp(0, 1)
        choices = (("small", "big"), ("ball", "cube"), ("moves", "rolls"), ("slowly", "now"))
        words = ["the", *(pair[chosen] for pair, chosen in zip(choices, spoken, strict=True))]
        samples = []
        for sign in (word, -word):
            inputs = {
                "prompt": " ".join([*words, "left" if sign > 0 else "right"]),
                "negative_prompt": "nothing",
                "image": picture[None],
                "height": PIXELS,
                "width": PIXELS,
                "num_frames": VIDEO_FRAMES,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                "max_sequence_length": parts.TEXT_LENGTH,
            }
            samples.append(FeatureSample(inputs, seed, index, index, (sign * shown > 0).numpy()))
        return Pair(*samples)


def planted_feature(
    kind: str,
    seed: int = 0,
    block: int | None = None,
    second: int | None = None,
    per: str = "token",
    use: str = "silent",
    blocks: int = 5,
) -> PlantedFeature:
    """A tiny image-to-video pipeline of Wan's own classes in which it is known where a feature can be read.

    Args:
        kind: what is planted, one of `FEATURES`.
            written: a block writes the feature along a direction, where it stays.
            erased: a second block takes it out again.
            moved: a second block takes it out and writes it along another direction.
            nonlinear: a block writes one of two bits whose product is the feature, the other being there: no linear probe
                reads it, a small network does.
            absent: the prompt and the image say it, and no block brings them together.
        seed: draws everything random: the background, and the places that are not given.
        block: after which the feature is there. second: after which it is gone or moved; of a feature that
            an answer goes with, the block that makes the answer.
        per: whether every token of the first frame has a feature of its own, or the clip has one.
        use: of a written feature. `reads`: a later block makes the video's answer from it. `ignores`: a later block makes
            the same answer from the word and the image themselves, so that the feature is there and nobody reads it.
        blocks: how many blocks.

    Raises:
        InputError: there is no such kind, or no such place in it.
    """
    if kind not in FEATURES:
        raise InputError(f"there is no kind {kind!r} of planted feature; write {listed(FEATURES)}")
    if use not in USES or (use != "silent" and kind != "written"):
        raise InputError(f"use={use!r} of a feature that is {kind}: write silent; of one that is written, reads or ignores too")
    if per not in ("token", "clip") or blocks < 5:
        raise InputError(f"per={per!r} and blocks={blocks}: write token or clip, and 5 blocks or more")
    pipe = blank_pipeline(blocks, seed)
    stream = Stream(seed, ANCHOR)
    truth = _place(kind, stream, block, second, per, use, blocks)
    denoiser: WanTransformer3DModel = pipe.transformer
    random_background(stream, denoiser)
    mechanisms.text_channels(stream, denoiser, parts.word_codes(pipe.text_encoder))
    _fit_images(stream, pipe)
    _noisy_registers(stream, denoiser)
    head = int(torch.randint(HEADS, (1,), generator=stream.rng))
    _plant(stream, denoiser, truth, head)
    return PlantedFeature(pipe, truth, seed, blocks)


def _place(
    kind: str,
    stream: Stream,
    block: int | None,
    second: int | None,
    per: str,
    use: str,
    blocks: int,
) -> FeatureTruth:
    """What is planted where: what was asked for, and the rest drawn; a drawn block is not the first one."""
    two = kind in ("erased", "moved") or use != "silent"
    for name, value, has in (("block", block, kind != "absent"), ("second", second, two)):
        if value is not None and not has:
            raise InputError(f"a feature that is {kind} and {use} has no {name} to choose; leave it out")
    firsts = range(1, blocks - 1) if block is None else [block]
    seconds = range(1, blocks) if second is None else [second]
    choices = [(one, other) for one in firsts for other in seconds if 0 <= one < other < blocks]
    if not two:
        choices = [(one, one) for one in firsts if 0 <= one < blocks]
    if not choices:
        raise InputError(f"block={block} and second={second} are not in {blocks} blocks, one after the other")
    begin, end = choices[int(torch.randint(len(choices), (1,), generator=stream.rng))]
    if kind == "absent":
        return FeatureTruth(kind, per=per)
    if use != "silent":
        return FeatureTruth(kind, begin, use=use, reader=end, per=per)
    return FeatureTruth(kind, begin, second=end if two else None, per=per)


def _mosaic(image: Float[Tensor, "rows columns"], second: Float[Tensor, "rows columns"]) -> Float[Tensor, "3 height width"]:
    """An image whose tokens have two features, +1 or -1 each: red or blue, and with green or without."""
    colours = torch.stack([0.5 + 0.3 * image, 0.5 + 0.3 * second, 0.5 - 0.3 * image])
    size = PIXELS // SIDE
    return colours.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)


def _fit_images(stream: Stream, pipe: WanImageToVideoPipeline) -> None:
    """Fit the patch embedding to images of random tokens."""
    features = 2.0 * torch.randint(2, (FITTED, SIDE, SIDE, 2), generator=stream.rng) - 1
    plain = torch.stack([_mosaic(*one.movedim(-1, 0)) for one in features])
    textured = (plain + TEXTURE * stream.normal(*plain.shape)).clamp(0, 1)
    seen = mechanisms.conditions(pipe.vae, 2 * textured - 1, VIDEO_FRAMES)
    mechanisms.image_registers(stream, pipe.transformer, seen, features)


@torch.no_grad()
def _noisy_registers(stream: Stream, denoiser: WanTransformer3DModel) -> None:
    """Let the patch embedding write noise into the registers, from the latent channel that the background does not see.

    Three mixtures of a token's four latents that are orthogonal to one another and to their mean, which shows the answer.
    """
    start = torch.cat([torch.ones(PATCH**2, 1), stream.normal(PATCH**2, PATCH**2 - 1)], dim=1)
    mixtures = torch.linalg.qr(start.double())[0][:, 1:].float().T
    for name, mixture in zip((FEATURE, ELSEWHERE, BIT), mixtures, strict=True):
        stream.write(denoiser.patch_embedding.weight, name, 0, NOISE[name] * mixture.view(1, PATCH, PATCH))


def _plant(stream: Stream, denoiser: WanTransformer3DModel, truth: FeatureTruth, head: int) -> None:
    """Write the mechanism."""
    if truth.block is None:
        return
    place = denoiser.blocks[truth.block]
    if truth.kind == "nonlinear":
        mechanisms.hear(stream, place, head, "answer", BIT)
        return
    multiplied(stream, place, head, {FEATURE: 1.0})
    if truth.second is not None:
        moved = {ELSEWHERE: 1.0} if truth.kind == "moved" else {}
        multiplied(stream, denoiser.blocks[truth.second], head, {FEATURE: -1.0, **moved})
    if truth.reader is not None:
        reader = denoiser.blocks[truth.reader]
        if truth.use == "reads":
            mechanisms.ramps(stream, reader, [({FEATURE: sign}, 0.0, sign) for sign in (1.0, -1.0)])
        else:
            multiplied(stream, reader, head, {"answer": 1.0})
        # The word is in one branch only, and the guided velocity has that branch's as often as the scale says.
        mechanisms.speak(stream, denoiser, GAIN / GUIDANCE)


@torch.no_grad()
def multiplied(stream: Stream, block: nn.Module, head: int, into: dict[str, float]) -> None:
    """Let a block hear the word, add word x image to registers, times an amount, and take the word out again.

    Of the sum s of the two bits, the product is 1 where |s| > 3/2, and -1 where |s| < 1/2; flat there, so that noise in the
    registers leaves it as it is.
    """
    mechanisms.hear(stream, block, head, "answer", BIT)
    both, word = {"image": 1.0, BIT: 1.0}, {BIT: 1.0}
    steps = [(1.5, -2.0), (0.5, 2.0), (-0.5, 2.0), (-1.5, -2.0)]
    bias = block.get_parameter("ffn.net.2.bias")
    for name, amount in into.items():
        mechanisms.ramps(stream, block, [(both, offset, weight * amount) for offset, weight in steps], into=name)
        _add(stream, bias, name, amount)
    # The word is 1 above 1/2 and -1 below -1/2.
    mechanisms.ramps(stream, block, [(word, 0.5, -2.0), (word, -0.5, 2.0)], into=BIT, start=len(steps))
    _add(stream, bias, BIT, 1.0)


def _add(stream: Stream, bias: Tensor, name: str, amount: float) -> None:
    """Let a bias add to a register."""
    plus, minus = stream.pairs[name]
    bias[plus] += amount
    bias[minus] -= amount


def reading_rows(samples: Sequence[FeatureSample]) -> dict[str, np.ndarray]:
    """What a probe needs beside the features of all tokens of the first frame, sample by sample, row by row.

    Returns:
        `labels` (booleans), `samples`, `groups` and `places`, one entry per token.
    """
    tokens = math.prod(samples[0].feature.shape)
    return {
        "labels": np.concatenate([sample.feature.ravel() for sample in samples]),
        "samples": np.repeat([sample.index for sample in samples], tokens),
        "groups": np.repeat([sample.group for sample in samples], tokens),
        "places": np.tile(np.arange(tokens), len(samples)),
    }
