"""Pairs of samples of the tiny pipelines, for the tests of sweeps and attribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from conftest import arguments, picture
from diffusers import WanImageToVideoPipeline
from torch import Tensor

import dit_lens as dl

PROMPTS = ("walk the maze", "draw the red circle", "nothing", "blue", "green maze", "the the circle")


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample with nothing but its inputs."""

    inputs: dict[str, Any]


def sample(pipe: Any, number: int, **changes: Any) -> Sample:
    """One of six samples, in prompt and image."""
    own: dict[str, Any] = {"prompt": PROMPTS[number]}
    if isinstance(pipe, WanImageToVideoPipeline):
        own["image"] = picture((40 * number, 30, 200 - 40 * number))
    return Sample(arguments(pipe, **own, **changes))


def some_pairs(pipe: Any, count: int = 2, **changes: Any) -> list[dl.Pair]:
    """Pairs of which no two samples are the same."""
    return [dl.Pair(sample(pipe, 2 * i, **changes), sample(pipe, 2 * i + 1, **changes)) for i in range(count)]


def projected(shown: Tensor, pairs: Sequence[Any]) -> Tensor:
    """A sum with weights that differ everywhere, so that any change shows: one number per row, linear."""
    weights = torch.randn(shown.shape[1:], generator=torch.Generator().manual_seed(11), dtype=torch.float32)
    return (shown.float() * weights).flatten(1).sum(dim=1)


LATENTS = dl.Outcome("latents", projected, of="latents")
VELOCITY = dl.Outcome("velocity", projected, of="velocity")
X0_HAT = dl.Outcome("x0_hat", projected, of="x0_hat")
VIDEO = dl.Outcome("video", projected)


@contextmanager
def counting(pipe: Any) -> Iterator[Callable[[], int]]:
    """How many blocks have run; the self-attention is counted, as the hooks of a block run around its bypass too."""
    ran: list[int] = []
    handles = [
        block.attn1.register_forward_hook(lambda *_: ran.append(1))
        for expert in ("transformer", "transformer_2")
        for block in getattr(getattr(pipe, expert), "blocks", ())
    ]
    try:
        yield lambda: len(ran)
    finally:
        for handle in handles:
            handle.remove()
