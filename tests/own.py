"""The examples of docs/own as the tests hold them: small, with random weights; and their loops watched from outside."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "docs" / "own"


def module(name: str) -> Any:
    """One of the examples, as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class Own:
    """An example: its file, its sampler, arguments that ask for one thing, and the same that ask for another."""

    file: str
    make: Callable[[Any], Any]
    inputs: dict[str, Any]
    other: dict[str, Any]
    branches: tuple[str, ...] = ("cond", "uncond")
    streams: tuple[str, ...] = ("visual",)

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, module(self.file).RECORD.experts[0] if self.file == "causal_video" else "transformer")

    def pipe(self) -> Any:
        """With random weights, and not those at which training starts: there every block adds nothing."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = self.make(module(self.file))
            for parameter in self.denoiser(pipe).parameters():
                nn.init.normal_(parameter, std=0.1)
        return pipe


WORDS = ["red", "blue", "green"]
BLOCKS = 2
OWN = {
    "class_conditional": Own(
        "class_conditional",
        lambda own: own.ClassConditionalSampler(own.ClassConditionalDiT(size=4, blocks=BLOCKS)),
        {"class_labels": [3], "num_inference_steps": 5, "guidance_scale": 3.0},
        {"class_labels": [5]},
    ),
    "mmdit": Own(
        "mmdit",
        lambda own: own.RectifiedFlowSampler(own.MMDiT(size=4, blocks=BLOCKS), own.Words(WORDS)),
        {"prompt": "red red blue red", "num_inference_steps": 5, "guidance_scale": 3.0},
        {"prompt": "red green green red"},
        streams=("visual", "text"),
    ),
    "causal_video": Own(
        "causal_video",
        lambda own: own.FrameByFrameSampler(own.CausalVideoDiT(frames=3, size=4, blocks=BLOCKS)),
        {"class_labels": [3], "num_inference_steps": 3, "lag": 1},
        {"class_labels": [5]},
        branches=("cond",),
    ),
}


@dataclass(frozen=True)
class Call:
    """What a denoiser was given, by name, and what it said."""

    given: dict[str, Tensor]
    said: Tensor


def watched(own: Own, pipe: Any, inputs: dict[str, Any], seed: int = 0) -> tuple[list[Call], Tensor]:
    """The loop alone, without a lens: its calls, and what it made."""
    calls: list[Call] = []
    denoiser = own.denoiser(pipe)
    names = list(denoiser.forward.__annotations__)

    def write(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(Call(dict(zip(names, (one.clone() for one in args), strict=False)), output.clone()))

    handle = denoiser.register_forward_hook(write)
    made = pipe(**inputs, generator=torch.Generator().manual_seed(seed))
    handle.remove()
    return calls, made
