"""Denoisers that write into every token what the lens is to say of it, and what their modules returned, by its label.

The blocks of a small pipeline are told apart by what is stated of its denoiser's class, its calls by what is stated of the
pipeline (tests/test_small_denoisers.py and tests/test_small_pipelines.py hold both); nothing here asks the lens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from stamps import bound, copied, latents_of
from torch import Tensor, nn

from dit_lens.small_denoisers import DENOISERS, Blocks
from dit_lens.small_pipelines import SmallPipeline

FIELDS = ("expert", "timestep", "branch", "block", "stream", "frame", "row", "column", "sample")
"""The first channels of a stamped token: numbers from 1 for what has a name, and the timestep as the denoiser was told it."""
STREAMS = ("visual", "text", "extra")

Label = tuple[str, int, str, int, str, str]
"""(expert, step, branch, block, site, stream)."""


@dataclass(frozen=True, eq=False)
class Part:
    """A block of a denoiser: its number in the order in which they run, and what is stated of the list that it is in."""

    number: int
    module: nn.Module
    blocks: Blocks


def parts(denoiser: nn.Module) -> list[Part]:
    """All blocks of a denoiser."""
    stated = DENOISERS[type(denoiser).__name__].blocks
    found = [(module, blocks) for blocks in stated for module in denoiser.get_submodule(blocks.path).children()]
    return [Part(number, *one) for number, one in enumerate(found)]


def tokens(tensor: Tensor) -> Tensor:
    """As (rows, tokens, channels): Sana's MLP returns a picture."""
    return tensor.flatten(2).mT if tensor.ndim == 4 else tensor


@dataclass
class Stamper:
    """Watches the blocks of a pipeline, and stamps what they return while it is `on`.

    Attributes:
        stamped: whose streams were stamped, in all calls since `begin`. returned: what their modules returned meanwhile.
        expert, told, rows: of the call under way, the timestep as it was told.
    """

    pipe: Any
    small: SmallPipeline
    on: bool = False
    stamped: list[Label] = field(default_factory=list)
    returned: dict[Label, Tensor] = field(default_factory=dict)
    expert: str = ""
    told: float = 0.0
    rows: int = 0

    def __post_init__(self) -> None:
        steps = range(self.small.inputs["num_inference_steps"])
        self.calls = [(step, branches) for step in steps for branches in self.small.calls(step)]
        self.parts: dict[nn.Module, Part] = {}
        self.kinds: dict[type, type] = {}
        self.begin()
        for expert in self.small.experts:
            denoiser = getattr(self.pipe, expert)
            denoiser.register_forward_pre_hook(self._calling(expert), with_kwargs=True)
            for part in parts(denoiser):
                self._stamping(part)
                sites: dict[tuple[str, str], list[str]] = {}
                for (site, stream), path in part.blocks.modules.items():
                    # Attention of a last block answers to the text too, which the block does not listen to any more.
                    unheard = stream == "text" and getattr(part.module, "context_pre_only", False)
                    if path and getattr(part.module, path, None) is not None and not unheard:
                        sites.setdefault((site, path), []).append(stream)
                for (site, path), streams in sites.items():
                    part.module.get_submodule(path).register_forward_hook(self._writing(part, site, tuple(streams)))

    def begin(self, on: bool = False) -> None:
        """A run begins."""
        self.on = on
        self.number = -1
        self.stamped.clear()
        self.returned.clear()

    @property
    def step(self) -> int:
        """Of the call under way."""
        return self.calls[self.number % len(self.calls)][0]

    @property
    def branches(self) -> tuple[str, ...]:
        """Whose rows are in the call under way, one after the other."""
        return self.calls[self.number % len(self.calls)][1]

    def _calling(self, expert: str) -> Callable[..., None]:
        def calling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = bound(module, args, kwargs)
            told = arguments["t" if "t" in arguments else "timestep"]
            self.number += 1
            self.expert, self.told, self.rows = expert, float(told.flatten()[-1]), len(latents_of(arguments))

        return calling

    def _stamping(self, part: Part) -> None:
        """Let a block be of a class that is called as its own is, and does the same and stamps."""
        kind: Any = type(part.module)

        @wraps(kind.forward)
        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = kind.forward(block, *args, **kwargs)
            return self._stamp(self.parts[block], output) if self.on else output

        if kind not in self.kinds:
            self.kinds[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        self.parts[part.module] = part
        part.module.__class__ = self.kinds[kind]

    def _stamp(self, part: Part, output: Any) -> Any:
        """What a block returned, with every token of every stream replaced by its stamp."""
        items = list(output) if isinstance(output, tuple) else [output]
        if part.blocks.joined:
            items[0] = torch.cat([self._stamped(part, *one) for one in self.apart(part.blocks.streams, items[0]).items()], dim=1)
        else:
            for place, stream in enumerate(part.blocks.streams):
                items[place] = None if items[place] is None else self._stamped(part, stream, items[place])
        return tuple(items) if isinstance(output, tuple) else items[0]

    def apart(self, streams: tuple[str, ...], sequence: Tensor) -> dict[str, Tensor]:
        """Streams that lie one after the other; all but the text have lengths that are known."""
        known = {"visual": torch.Size(self.small.layout).numel(), "extra": 1}
        rest = sequence.shape[1] - sum(known.get(stream, 0) for stream in streams)
        return dict(zip(streams, sequence.split([known.get(stream, rest) for stream in streams], dim=1), strict=True))

    def _stamped(self, part: Part, stream: str, tensor: Tensor) -> Tensor:
        for branch in self.branches:
            self.stamped.append((self.expert, self.step, branch, part.number, "resid", stream))
        samples = torch.arange(self.rows // len(self.branches))
        place = (part.number, stream, tensor, samples)
        return torch.cat([stamp(self.small, self.expert, self.told, branch, *place) for branch in self.branches])

    def _writing(self, part: Part, site: str, streams: tuple[str, ...]) -> Callable[..., None]:
        """A hook that keeps what a module returned, by its label."""

        def write(module: nn.Module, args: Any, output: Any) -> None:
            for stream, tensor in self._of(part, streams, output).items():
                for branch, rows in zip(self.branches, copied(tensor).chunk(len(self.branches)), strict=True):
                    self.returned[self.expert, self.step, branch, part.number, site, stream] = rows

        return write

    def _of(self, part: Part, streams: tuple[str, ...], output: Any) -> dict[str, Tensor]:
        """The streams in what a module returned: alone, in one sequence, or each in a tensor of its own."""
        visual = torch.Size(self.small.layout).numel()
        found = [tokens(one) for one in (output if isinstance(output, tuple) else (output,)) if isinstance(one, Tensor)]
        if len(found) == 1 == len(streams):
            return {streams[0]: found[0]}
        if len(found) == 1:
            # CogVideoX has the text before the video inside of its blocks.
            order = streams[::-1] if self.small.name == "cogvideox" else part.blocks.streams
            return self.apart(order, found[0]) if found[0].shape[1] > visual else {"visual": found[0]}
        named = {"visual" if one.shape[1] == visual else "text": one for one in found}
        return {stream: named[stream] for stream in streams}


def stamp(
    small: SmallPipeline, expert: str, told: float, branch: str, block: int, stream: str, like: Tensor, samples: Tensor
) -> Tensor:
    """The stamps of the tokens of one stream of one branch, (samples, tokens, channels)."""
    count, channels = like.shape[1:]
    shape = small.layout if stream == "visual" else (1, 1, count)
    places = torch.cartesian_prod(*(torch.arange(size) for size in shape))
    written = torch.zeros(len(samples), count, channels)
    names = (small.experts.index(expert) + 1, told, small.branches.index(branch) + 1, block + 1, STREAMS.index(stream) + 1)
    written[..., :5] = torch.tensor(names, dtype=torch.float32)
    written[..., 5:8] = places + 1.0
    written[..., 8] = samples[:, None] + 1.0
    return written.to(like)


def fingerprint(pipe: Any) -> list[Any]:
    """Hooks and attributes of every module of the pipeline, its weights, and what its scheduler and itself have of their own."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found: list[Any] = [sorted(vars(pipe)), sorted(key for key, value in vars(pipe.scheduler).items() if callable(value))]
    for module in (inner for part in modules for inner in part.modules()):
        own = {name: id(value) for name, value in vars(module).items() if name in ("forward", "cache_context")}
        found.append((type(module), own, len(module._forward_hooks), len(module._forward_pre_hooks)))
    weights = (weight for part in modules for weight in (*part.parameters(), *part.buffers()))
    found.append(sum(hash(weight.detach().numpy().tobytes()) for weight in weights))
    return found
