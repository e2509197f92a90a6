"""Training of the VAE: pixels back to pixels, and every square back to its colour.

The VAE decides whether an answer can be seen at all. With a plain pixel loss it drops what is small and rare (a trail, a ring),
and the denoiser then learns latents without answers. So the loss adds what the scorers do: each square's mean colour is
classified against the palette, rare colours weighing as much as common ones. A little noise on the latents makes the decoder
forgive the denoiser's errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_lens.reasoner.board import PIXELS, Colour
from dit_lens.reasoner.data import Clips, condition, decoded, encoded, palette, pixels
from dit_lens.reasoner.team import Team

LATENT_NOISE = 0.1
"""Noise on the latents in training, in standard deviations of each channel."""
SHARPNESS = 30.0
"""How steeply the classification falls with the squared distance of a square's colour (RGB in [0, 1])."""


def read_back(video: Float[Tensor, "clips 3 frames 64 64"]) -> Float[Tensor, "clips colours frames 16 16"]:
    """Logits of every square's palette colour."""
    means = reduce(video, "b c t (y py) (x px) -> b c t y x", "mean", py=PIXELS, px=PIXELS)
    distance = (means.unsqueeze(1) - palette(video.device).view(1, -1, 3, 1, 1, 1)).square().sum(2)
    return -SHARPNESS / 4 * distance


def colour_weights(boards: UInt8[np.ndarray, "clips frames 16 16"]) -> Float[Tensor, " colours"]:
    """Weights that make colours count more equally: one over the root of their frequency, of mean one."""
    counts = np.bincount(boards.ravel(), minlength=len(Colour)) + 1
    weights = torch.from_numpy(1 / np.sqrt(counts / counts.sum())).float()
    return weights / weights.mean()


def train(
    vae: AutoencoderKLWan,
    clips: Clips,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    minutes: float,
    team: Team,
) -> list[dict[str, float]]:
    """Train in place for `steps` or `minutes`, whichever comes first; returns the loss curve.

    A fifth of each batch are image conditions (a first frame, then zeros).
    """
    device = vae.device
    generator = torch.Generator(device).manual_seed(seed)
    order = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    weights = colour_weights(clips.boards).to(device)
    parameters = [p for p in vae.parameters() if p.requires_grad]

    def draw() -> tuple[Tensor, Tensor]:
        boards = torch.from_numpy(clips.boards[order.integers(len(clips.boards), size=batch)]).to(device)
        # Squares of any colour anywhere, so that what is rare in the tasks is still read everywhere.
        speckle = torch.rand(boards[:, :1].shape, device=device, generator=generator) < 0.02
        colours = torch.randint(len(Colour), speckle.shape, device=device, generator=generator, dtype=boards.dtype)
        latents = (batch, vae.config["z_dim"], (boards.shape[1] - 1) // 4 + 1, *boards.shape[2:])
        return torch.where(speckle, colours, boards), torch.randn(latents, device=device, generator=generator)

    def backward(boards: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        total, colours = losses(vae, boards, noise, weights)
        total.backward()
        return total.detach(), colours.detach()

    step_once = replayed(backward, draw, parameters) if device.type == "cuda" else backward
    curve, share, spent = [], 0.0, team.stopwatch()
    for step in tqdm(range(steps), desc="VAE", disable=not team.leads, mininterval=5):
        if step % 10 == 0:
            share = max(step / steps, spent() / (60 * minutes))
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        if device.type != "cuda":
            optimizer.zero_grad(set_to_none=True)
        total, colours = step_once(*draw())
        team.average([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            curve.append({"step": step, "loss": total.item(), "colours": colours.item(), "done": share})
    return curve


def losses(
    vae: AutoencoderKLWan,
    boards: UInt8[Tensor, "clips frames 16 16"],
    noise: Float[Tensor, "clips channels latent_frames 16 16"],
    weights: Float[Tensor, " colours"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of a batch, and the part of it that classifies squares. The first fifth of the clips become conditions."""
    blank = len(boards) // 5
    video = pixels(boards)
    video = torch.cat([condition(video[:blank]), video[blank:]])
    with torch.autocast(boards.device.type, torch.bfloat16, enabled=boards.is_cuda, cache_enabled=False):
        latents = encoded(vae, video)
        spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
        shown = decoded(vae, latents + LATENT_NOISE * spread * noise).float()
    weight = weights[boards[blank:].long()].repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3).unsqueeze(1)
    difference = (shown[blank:] - video[blank:]).abs()
    seen = (weight * (difference + difference.square())).mean() + (shown[:blank] - video[:blank]).abs().mean()
    colours = F.cross_entropy(read_back(shown[blank:]), boards[blank:].long(), weight=weights)
    # The last term keeps the latents bounded; the noise is relative to their spread, so nothing else does.
    return seen + 0.5 * colours + 1e-4 * latents.float().square().mean(), colours


def replayed(
    backward: Callable[..., tuple[Tensor, ...]], draw: Callable[[], tuple[Tensor, ...]], parameters: list[nn.Parameter]
) -> Callable[..., tuple[Tensor, ...]]:
    """A forward and backward pass as one CUDA graph.

    The VAE works through a clip in chunks of a few frames, thousands of small kernels a step: launching them takes longer than
    running them. A graph launches them at once. Gradients land in the same tensors at every replay.
    """
    inputs = draw()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            backward(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    for parameter in parameters:
        parameter.grad = None
    with torch.cuda.graph(graph):
        outputs = backward(*inputs)

    def replay(*fresh: Tensor) -> tuple[Tensor, ...]:
        for held, new in zip(inputs, fresh, strict=True):
            held.copy_(new)
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def normalise(vae: AutoencoderKLWan, clips: Clips, count: int = 1024) -> None:
    """Set `latents_mean` and `latents_std` from the latents of clips."""
    latents = []
    for rows in torch.from_numpy(clips.boards[:: max(1, len(clips.boards) // count)]).split(64):
        latents.append(encoded(vae, pixels(rows.to(vae.device))).float())
    every = torch.cat(latents)
    vae.register_to_config(latents_mean=every.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=every.std(dim=(0, 2, 3, 4)).tolist())


@torch.no_grad()
def read_back_of_every_colour(vae: AutoencoderKLWan, boards: UInt8[np.ndarray, "clips frames 16 16"]) -> dict[str, Any]:
    """Share of squares, by colour, that are read as they were drawn after encoding and decoding, and of faultless clips."""
    found = []
    for rows in torch.from_numpy(boards).split(64):
        shown = decoded(vae, encoded(vae, pixels(rows.to(vae.device))))
        found.append(read_back(shown.float()).argmax(1).cpu().numpy())
    right = np.concatenate(found) == boards
    return {
        "squares": float(right.mean()),
        "clips": float(right.all(axis=(1, 2, 3)).mean()),
        "colours": {c.name.lower(): float(right[boards == c].mean()) for c in Colour if (boards == c).any()},
    }
