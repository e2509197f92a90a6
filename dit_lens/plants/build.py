"""Builds a planted model: draws where the plant goes, fills the background, and plants."""

from __future__ import annotations

import math

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

from dit_lens.errors import InputError, listed
from dit_lens.plants import mechanisms, parts
from dit_lens.plants.model import GAIN, GUIDANCE, STEPS, TEXTURE, Planted, plain_image, schedule
from dit_lens.plants.stream import HEADS, WIDTH, Stream, blank_pipeline, random_background
from dit_lens.plants.table import Truth

KINDS = ("text", "copy", "mlp", "step", "redundant", "distractor", "branch")
"""What can be planted; `none` is a model without a plant."""
ANCHOR = 16.0
"""Value of an anchor channel: the anchors are 64 long, an answer is 1.4."""
DISTRACTION = 6.0
"""Value of a channel of the distractor: its update is 12 long."""
LOUD = 40.0
"""How large the answers of a redundant pair are, beside anchors of `QUIET`: the last norm saturates at either of them."""
QUIET = 2.0
FITTED = 24
"""How many textured images the patch embedding is fitted to."""


def planted(
    kind: str,
    seed: int = 0,
    block: int | None = None,
    head: int | None = None,
    step: int | None = None,
    branch: str | None = None,
    blocks: int = 5,
    steps: int = STEPS,
) -> Planted:
    """A tiny image-to-video pipeline of Wan's own classes in which one known mechanism makes the answer.

    Args:
        kind: what is planted, one of `KINDS`, or `none`.
            text: the cross-attention of one block brings the answer from the prompt to the visual tokens.
            copy: one head of the self-attention of one block copies it from the first latent frame to all others.
            mlp: the MLP of one block computes it, as the product of two features of the first image.
            step: as copy, at one step only; from then on the noisy latents keep it.
            redundant: as text, in two blocks, either of which is enough.
            distractor: as text, and another block writes a larger update that follows the answer and that nobody reads.
            branch: the MLP of one block passes the first image on, if the prompt of its guidance branch opens a gate.
        seed: draws everything random: the background, and the places that are not given.
        block, head, step, branch: where to plant. `head` and `step` are for the kinds that have one, `branch` (cond or
            uncond) for the kind branch. A drawn block is neither the first nor the last; of a redundant pair, `block` is one
            and the other is drawn.
        blocks: how many blocks. steps: how many steps the samples ask for.

    Raises:
        InputError: there is no such kind, or no such place in it.
    """
    if kind not in (*KINDS, "none"):
        raise InputError(f"there is no kind {kind!r} of planted model; write {listed((*KINDS, 'none'))}")
    if blocks < 4 or steps < 3:
        raise InputError(f"blocks={blocks} and steps={steps} leave no room around a plant; write blocks=4 and steps=3, or more")
    pipe = blank_pipeline(blocks, seed)
    stream = Stream(seed, QUIET if kind == "redundant" else ANCHOR)
    truth = _place(kind, stream, blocks, steps, block, head, step, branch)
    denoiser: WanTransformer3DModel = pipe.transformer
    random_background(stream, denoiser)
    mechanisms.text_channels(stream, denoiser, parts.word_codes(pipe.text_encoder))
    _fit_images(stream, pipe)
    model = Planted(pipe, truth, seed, blocks, steps)
    _plant(stream, model)
    return model


def _place(
    kind: str, stream: Stream, blocks: int, steps: int, block: int | None, head: int | None, step: int | None, branch: str | None
) -> Truth:
    """What is planted where: what was asked for, and the rest drawn."""
    allowed = {"block": kind != "none", "head": kind in ("copy", "step"), "step": kind == "step", "branch": kind == "branch"}
    given = {"block": (block, range(blocks)), "head": (head, range(HEADS)), "step": (step, range(steps))}
    for name, (value, known) in {**given, "branch": (branch, ("cond", "uncond"))}.items():
        if value is not None and not allowed[name]:
            raise InputError(f"a planted model of kind {kind!r} has no {name} to choose; leave {name}= out")
        if value is not None and value not in known:
            raise InputError(f"{name}={value!r} is not in this model; write one of {listed(known)}")

    def drawn(count: int) -> int:
        return int(torch.randint(count, (1,), generator=stream.rng))

    inner = [1 + index for index in torch.randperm(blocks - 2, generator=stream.rng).tolist()]
    places = inner[0] if block is None else block
    other = next(index for index in inner if index != places)
    if kind == "none":
        return Truth(kind)
    if kind in ("text", "redundant", "distractor"):
        spare = {"redundant": {"second": other}, "distractor": {"distractor": other}}.get(kind, {})
        if kind == "redundant":
            places, spare = min(places, other), {"second": max(places, other)}
        return Truth(kind, places, "cross_attn", branches=("cond",), reads="text", **spare)
    if kind in ("copy", "step"):
        which = drawn(HEADS) if head is None else head
        when = (1 + drawn(steps - 2) if step is None else step) if kind == "step" else None
        return Truth(kind, places, "attn", head=which, step=when)
    if kind == "branch":
        return Truth(kind, places, "mlp", branches=(branch or ("cond", "uncond")[drawn(2)],), frame=0)
    return Truth(kind, places, "mlp", frame=0)


def _fit_images(stream: Stream, pipe: WanImageToVideoPipeline) -> None:
    """Fit the patch embedding to textured images of all four feature pairs."""
    features = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).repeat(FITTED // 4, 1)
    plain = torch.stack([plain_image(*row) for row in features.tolist()])
    textured = (plain + TEXTURE * stream.normal(*plain.shape)).clamp(0, 1)
    seen = mechanisms.conditions(pipe.vae, 2 * textured - 1, parts.VIDEO_FRAMES)
    mechanisms.image_registers(stream, pipe.transformer, seen, features.float())


def _plant(stream: Stream, model: Planted) -> None:
    """Write the mechanism, and let the last layer speak the answer, so loud that the guided velocity carries +1 or -1."""
    truth, denoiser = model.truth, model.pipe.transformer
    timesteps, sigmas = schedule(model.pipe, model.steps)
    factor = {"cond": GUIDANCE, "uncond": 1 - GUIDANCE}[truth.branches[0]] if len(truth.branches) == 1 else 1.0
    gain = GAIN / factor
    place = denoiser.blocks[truth.block] if truth.block is not None else None
    head = int(torch.randint(HEADS, (1,), generator=stream.rng)) if truth.head is None else truth.head
    if place is None:
        pass
    elif truth.kind in ("text", "distractor"):
        mechanisms.hear(stream, place, head, "answer", "answer")
    elif truth.kind == "copy":
        mechanisms.look_back(stream, place, head)
    elif truth.kind == "mlp":
        mechanisms.product(stream, place)
    elif truth.kind == "branch":
        mechanisms.hear(stream, place, head, "gate", "gate")
        mechanisms.gated(stream, place)
    elif truth.kind == "step" and truth.step is not None and truth.block is not None:
        mechanisms.look_back(stream, place, head)
        mechanisms.only_at(stream, denoiser, truth.block, timesteps, truth.step)
        mechanisms.remember(stream, denoiser)
        gain /= sigmas[truth.step] - sigmas[truth.step + 1]
    elif truth.kind == "redundant" and truth.second is not None:
        for one in (place, denoiser.blocks[truth.second]):
            mechanisms.hear(stream, one, head, "answer", "answer", LOUD)
        # A stream in which nothing but the answer is left has this value in the answer's channels after the norm.
        gain /= math.sqrt(WIDTH / 2) * stream.sigma
    if truth.distractor is not None:
        mechanisms.distract(stream, denoiser, truth.distractor, head, DISTRACTION)
    mechanisms.speak(stream, denoiser, gain)
