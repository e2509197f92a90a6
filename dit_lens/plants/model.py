"""A planted model as its users hold it: the pipeline, the truth about it, samples to run and the answer to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanImageToVideoPipeline
from jaxtyping import Float
from torch import Tensor

from dit_lens.lens import Lens, wrap
from dit_lens.pairs import Pair
from dit_lens.plants import mechanisms, parts
from dit_lens.plants.stream import HEADS
from dit_lens.plants.table import TABLE, Place, Truth

GUIDANCE = 3.0
STEPS = 5
GAIN = 4.0
"""How far the answer moves the mean of its latents; their noise has a standard deviation of 1/4 in the mean."""
TEXTURE = 0.04
"""Standard deviation of the pixels of an image, of [0, 1], that says nothing."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One input of a planted model.

    Attributes:
        inputs: the pipeline's keyword arguments. seed: of the noise. answer: what it asks for, +1 or -1.
    """

    inputs: dict[str, Any]
    seed: int
    answer: int


@dataclass(frozen=True, eq=False)
class Planted:
    """A pipeline with a known mechanism.

    Attributes:
        pipe: a WanImageToVideoPipeline. truth: what was planted. seed: of its weights. blocks: how many it has.
        steps: of its samples; a plant at one step holds for this number of steps only.
    """

    pipe: WanImageToVideoPipeline
    truth: Truth
    seed: int
    blocks: int
    steps: int = STEPS

    def lens(self, engine: str = "nnsight") -> Lens:
        """A lens on the pipeline."""
        return wrap(self.pipe, engine)

    def pairs(self, count: int, seed: int = 0) -> list[Pair]:
        """Pairs of samples with the same noise, which differ in what decides the answer and in nothing else.

        Clean answers alternate between +1 and -1, so that a pool of an even number is balanced.

        Args:
            count: how many. seed: draws the words and the texture that mean nothing, and the noise.
        """
        rng = torch.Generator().manual_seed(seed)
        return [self._pair(1 if index % 2 == 0 else -1, rng) for index in range(count)]

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The keyword arguments of one call with several samples; give it one of their seeds, or a list for each of them."""
        prompts, images = ([sample.inputs[name] for sample in samples] for name in ("prompt", "image"))
        return {**samples[0].inputs, "prompt": prompts, "image": torch.cat(images)}

    def answer(
        self,
        shown: Float[Tensor, "*batch channels frames height width"],
        of: Literal["latents", "velocity"] = "latents",
    ) -> Float[Tensor, "*batch"]:
        """Which answer latents or a velocity carry: near +1 or -1, 0 for none; differentiable.

        It is linear: the mean of the first latent channel over the frame that shows the answer, in units of what the plant
        writes. Halfway between a clean and a donor answer is 0, which is also what is left when the plant is destroyed.

        Args:
            shown: latents or an x0-hat (the noise in them adds about 0.06 to the final ones), or the guided velocity of a
                step at which the plant works.
        """
        mean = shown[..., 0, self.truth.frame, :, :].mean(dim=(-2, -1))
        return mean / GAIN if of == "latents" else -mean / GAIN * self._stride

    def decided(self, shown: Float[Tensor, "*batch channels frames height width"]) -> Tensor:
        """The answer of final latents as +1, -1, or 0 where they show none: integers of shape (*batch,)."""
        answer = self.answer(shown)
        return (answer.sign() * (answer.abs() > 0.5)).int()

    def expected(self, tool: str) -> dict[Place, float]:
        """What a tool must report on this model: the effect at every place of the tool's axis; see `table`."""
        _, sigmas = schedule(self.pipe, self.steps)
        return TABLE[self.truth.kind][tool].expected(self.truth, self.blocks, HEADS, sigmas, GUIDANCE)

    @property
    def _stride(self) -> float:
        """How much of the way from noise to video the plant has to do its work."""
        if self.truth.step is None:
            return 1.0
        _, sigmas = schedule(self.pipe, self.steps)
        return sigmas[self.truth.step] - sigmas[self.truth.step + 1]

    def _pair(self, answer: int, rng: torch.Generator) -> Pair:
        def one_of(*choices: Any) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=rng))]

        words = ["the", one_of("small", "big"), one_of("ball", "cube"), one_of("moves", "rolls"), one_of("slowly", "now")]
        factors = (one_of(1, -1), one_of(0, 1))
        texture = TEXTURE * torch.randn(3, parts.PIXELS, parts.PIXELS, generator=rng)
        seed = int(torch.randint(2**31, (1,), generator=rng))
        clean, donor = (self._sample(sign, words, factors, texture, seed) for sign in (answer, -answer))
        return Pair(clean, donor)

    def _sample(self, answer: int, words: list[str], factors: tuple[int, int], texture: Tensor, seed: int) -> Sample:
        """One sample; `factors` is the feature of the image that does not say the answer, and which one it is (of a product)."""
        truth, (other, which) = self.truth, factors
        prompt, negative, features = list(words), ["nothing"], (other, 1)
        if truth.reads == "text" or truth.kind == "none":
            prompt[-1] = "left" if answer > 0 else "right"
        if truth.kind == "mlp":
            features = (other, answer * other) if which == 0 else (answer * other, other)
        elif truth.reads == "image":
            features = (answer, other)
        if truth.kind == "branch":
            (prompt if truth.branches == ("cond",) else negative).append(mechanisms.GATE_WORD)
        inputs = {
            "prompt": " ".join(prompt),
            "negative_prompt": " ".join(negative),
            "image": (plain_image(*features) + texture).clamp(0, 1)[None],
            "height": parts.PIXELS,
            "width": parts.PIXELS,
            "num_frames": parts.VIDEO_FRAMES,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": parts.TEXT_LENGTH,
        }
        return Sample(inputs, seed, answer)


def plain_image(image: int, second: int) -> Float[Tensor, "3 height width"]:
    """An image of one colour that has two features, +1 or -1 each: red or blue, and with green or without."""
    colour = torch.tensor([0.5 + 0.3 * image, 0.5 + 0.3 * second, 0.5 - 0.3 * image])
    return colour[:, None, None].expand(3, parts.PIXELS, parts.PIXELS)


def schedule(pipe: WanImageToVideoPipeline, steps: int) -> tuple[list[float], list[float]]:
    """The timesteps, and the sigmas with the last one, 0."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
