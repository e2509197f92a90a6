"""Training data: puzzles drawn on all processor cores, then encoded once by the VAE and kept on the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dit_lens.reasoner.board import PALETTE, PIXELS
from dit_lens.reasoner.tasks import TASKS

SHARES = {
    "maze": 0.22,
    "maze-loops": 0.24,
    "circle": 0.09,
    "tictactoe": 0.11,
    "permanence": 0.12,
    "pattern": 0.12,
    "bounce": 0.10,
}
"""Share of each task in training."""

LENGTHS = {17: 0.7, 13: 0.1, 9: 0.1, 5: 0.1}
"""Share of each clip length, in frames."""

CHUNK = 250


@dataclass(frozen=True)
class Clips:
    """Clips of one length as palette indices, with the number of each clip's prompt in `prompts()`."""

    boards: UInt8[np.ndarray, "clips frames 16 16"]
    prompts: Int[np.ndarray, " clips"]


def prompts() -> list[str]:
    """Every prompt of every task, the empty one first."""
    return ["", *sorted({p for task in TASKS.values() for p in task.prompts()})]


def draw(count: int, first: int, frames: int, workers: int) -> Clips:
    """`count` training clips of one length from all tasks in their shares, numbered from `first` on."""
    jobs = []
    for name, share in SHARES.items():
        total = round(share * count)
        jobs += [(name, first + at, min(CHUNK, total - at), frames) for at in range(0, total, CHUNK)]
    if workers > 1:
        # Not forked from here, where a CUDA context and threads may be, but from a clean server that has imported this once.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            parts = list(pool.map(_draw, jobs))
    else:
        parts = [_draw(job) for job in jobs]
    number = {prompt: i for i, prompt in enumerate(prompts())}
    boards = np.concatenate([b for b, _ in parts])
    return Clips(boards, np.array([number[p] for _, said in parts for p in said]))


def held(clips: Clips, frames: int) -> Clips:
    """The clips with their last frame held, so that they all have this many frames."""
    missing = frames - clips.boards.shape[1]
    return Clips(np.concatenate([clips.boards, clips.boards[:, -1:].repeat(missing, axis=1)], axis=1), clips.prompts)


def _draw(job: tuple[str, int, int, int]) -> tuple[UInt8[np.ndarray, "clips frames 16 16"], list[str]]:
    name, first, count, frames = job
    samples = [TASKS[name].sample("train", first + i, frames) for i in range(count)]
    return np.stack([s.boards for s in samples]), [s.prompt for s in samples]


@cache
def palette(device: torch.device) -> Float[Tensor, "colours 3"]:
    """The palette in [-1, 1], copied to a device once (a CUDA graph cannot copy from the host)."""
    return torch.from_numpy(PALETTE).float().to(device) / 127.5 - 1


def pixels(boards: UInt8[Tensor, "clips frames 16 16"]) -> Float[Tensor, "clips 3 frames 64 64"]:
    """Boards as the video tensor that a VAE takes, in [-1, 1]."""
    video = palette(boards.device)[boards.long()].repeat_interleave(PIXELS, dim=2).repeat_interleave(PIXELS, dim=3)
    return video.permute(0, 4, 1, 2, 3)


def condition(video: Float[Tensor, "clips 3 frames height width"]) -> Float[Tensor, "clips 3 frames height width"]:
    """What the pipeline encodes as the image condition: the first frame, then zeros."""
    shown = torch.zeros_like(video)
    shown[:, :, 0] = video[:, :, 0]
    return shown


@dataclass(frozen=True)
class Encoded:
    """Normalised latents of clips and of their image conditions."""

    latents: Tensor
    conditions: Tensor
    prompts: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Random batches without end, each clip once per pass."""
        while True:
            order = torch.randperm(len(self.prompts), generator=generator).to(self.latents.device)
            for rows in order.split(size):
                if len(rows) == size:
                    yield self.latents[rows], self.conditions[rows], self.prompts[rows]


def encoded(vae: AutoencoderKLWan, video: Float[Tensor, "clips 3 frames height width"]) -> Tensor:
    """The modes of a VAE's latents."""
    return vae.encode(video).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]


def decoded(vae: AutoencoderKLWan, latents: Tensor) -> Float[Tensor, "clips 3 frames height width"]:
    """A VAE's video of latents."""
    return vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Clips, batch: int = 256) -> Encoded:
    """Encode clips and conditions with the VAE's modes, normalised by its `latents_mean` and `latents_std`, as bfloat16."""
    device = vae.device
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config["latents_mean"], vae.config["latents_std"])
    )

    def latents(video: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mode = encoded(vae, video)
        return ((mode.float() - mean) / std).to(torch.bfloat16)

    videos, conditions = [], []
    for rows in torch.from_numpy(clips.boards).split(batch):
        video = pixels(rows.to(device))
        videos.append(latents(video))
        conditions.append(latents(condition(video)))
    return Encoded(torch.cat(videos), torch.cat(conditions), torch.from_numpy(clips.prompts).to(device))
