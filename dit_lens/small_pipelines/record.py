"""What a small pipeline is, and what is known of it beforehand: how it guides, which expert runs, where its tokens lie.

Everything that a record states is held to the pipeline's own behaviour by tests/test_small_pipelines.py, so that whatever
finds these facts out from a pipeline can be tested against them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Guidance = Literal["sequential with context", "sequential", "batched with context", "batched", "embedded with context"]
"""How a step asks the denoiser for its branches.

`sequential`: one call a branch. `batched`: one call for all, one after another along the batch. `embedded`: one call and one
branch, with the guidance scale among its inputs. `with context`: the call lies inside diffusers' `cache_context`, whose
name is "cond_uncond" in batched guidance and the branch's own otherwise.
"""

Calls = tuple[tuple[str, ...], ...]
"""Calls of a denoiser, each as the branches that lie along its batch."""

SHARE = (0.001, 0.0)
"""For `told`: the timestep as a share of a thousand, 1 for noise."""
UPWARD_SHARE = (-0.001, 1.0)
"""For `told`: the same upside down, 0 for noise."""


@dataclass(frozen=True, eq=False)
class SmallPipeline:
    """A diffusers pipeline with random weights, and the truth about it.

    Attributes:
        name: its key in `PIPELINES`.
        make: makes the pipeline, with weights from torch's generator; `build` gives that a seed.
        inputs: arguments for a run of 3 steps. A generator is the caller's to add.
        guidance: see `Guidance`. One that embeds a scale and takes a negative prompt too is named by what its branches do.
        branches: in the order in which they run, or lie in the batch.
        prediction: what the scheduler takes the prediction to be: "flow", "epsilon" or "v_prediction".
        sign: -1 where the pipeline negates what the denoiser returned before the scheduler receives it.
        told: (a, b): of a timestep of the scheduler the denoiser is told a * timestep + b.
        experts: its denoisers, by attribute, in the order in which they run.
        schedulers: makers of schedulers that checkpoints of the pipeline ship with or that its documentation names, by
            class; the first is the one that it is built with.
        irregular: the steps whose calls are others than guidance and branches say, and those calls (see `calls`).
        layout: (frames, height, width) of the visual tokens for these inputs; frames are latent frames, an image is one.
            Of a sound, (length, 1, 1).
    """

    name: str
    make: Callable[[], Any] = field(repr=False)
    inputs: Mapping[str, Any] = field(repr=False)
    guidance: Guidance
    branches: tuple[str, ...]
    prediction: str
    schedulers: Mapping[str, Callable[[], Any]] = field(repr=False)
    layout: tuple[int, int, int]
    experts: tuple[str, ...] = ("transformer",)
    sign: Literal[1, -1] = 1
    told: tuple[float, float] = (1.0, 0.0)
    irregular: Mapping[int, Calls] = field(default_factory=dict)

    def build(self, seed: int = 0) -> Any:
        """The pipeline with weights drawn from a seed; torch's own generators stay as they were."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of diffusers to itself, about names that will move
            torch.manual_seed(seed)
            built = self.make()
        built.set_progress_bar_config(disable=True)
        return built

    @property
    def batched(self) -> bool:
        """Whether one call of the denoiser holds all branches."""
        return self.guidance.startswith("batched")

    def calls(self, step: int) -> Calls:
        """The calls of a step in order, each as its branches along the batch."""
        usual = (self.branches,) if self.batched else tuple((branch,) for branch in self.branches)
        return self.irregular.get(step, usual)

    def contexts(self, step: int) -> tuple[str | None, ...]:
        """The name of the `cache_context` of each call of a step, None outside of one."""
        if not self.guidance.endswith("with context"):
            return (None,) * len(self.calls(step))
        return tuple("_".join(sorted(branches)) for branches in self.calls(step))
