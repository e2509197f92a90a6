"""Stores of runs that never ran: streams that hold exactly what a test writes into them, and the true videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dit_lens as dl
from dit_lens.activations import Activations, Entry
from dit_lens.architectures import Layout

Stream = Callable[[Any, int, int], np.ndarray]
"""(sample, block, step) -> stream (frames, 8, 8, channels)."""
SIGMAS = (1.0, 0.6)


def planted_store(
    folder: Path, samples: Sequence[Any], stream: Stream, blocks: int, *, model: str = "planted", steps: int = 1, batch: int = 16
) -> dl.Store:
    """A store with a run for every few samples, which drew the answer that their true video shows."""
    store = dl.Store(folder)
    for first in range(0, len(samples), batch):
        group = samples[first : first + batch]
        rng = torch.Generator().manual_seed(first)
        latents = torch.randn(steps + 1, len(group), 2, 5, 16, 16, generator=rng)
        entries = []
        for step, block in np.ndindex(steps, blocks):
            level = {"sigma": SIGMAS[step], "timestep": 1000 * SIGMAS[step], "depth": block / blocks}
            cell = dl.Cell("transformer", step, "cond", block, **level)
            tensor = torch.from_numpy(np.stack([stream(sample, block, step) for sample in group])).half()
            entries.append(Entry(cell, 0, "planted", tensor))
        run = dl.Run(
            seeds=tuple(sample.index for sample in group),
            prompts=tuple(sample.prompt for sample in group),
            layout=Layout(5, 8, 8),
            scheduler="planted",
            timesteps=tuple(1000 * sigma for sigma in SIGMAS[:steps]),
            sigmas=torch.tensor(SIGMAS[:steps]),
            experts=("transformer",) * steps,
            branches=("cond",),
            latents=latents,
            outputs={branch: latents[:-1].clone() for branch in ("guided", "cond")},
            weights=(None,) * steps,
            video=torch.from_numpy(np.stack([sample.video() for sample in group])),
            activations=Activations(entries),
        )
        labels = {"task": group[0].task.name, "sample": [s.index for s in group], "group": [s.group for s in group]}
        store.append(run, model, **labels)
    return store


def noise(sample: Any, block: int, step: int, channels: int = 8) -> np.ndarray:
    """Noise that is the same whenever it is asked for: (1, 8, 8, channels)."""
    return np.random.default_rng([sample.index, block, step]).normal(size=(1, 8, 8, channels))
