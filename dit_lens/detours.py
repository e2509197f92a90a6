"""Detours: the ways around a block, for both engines alike.

A block whose bypass answers does not run. Skipping it is handing on the streams that it took; a stored run can be taken
up in the middle by handing on what a block returned then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_lens.architectures import Architecture
from dit_lens.errors import InputError, listed
from dit_lens.taps import Bypass
from dit_lens.visual_tokens import VisualTokens


class Detour:
    """The ways around one block.

    Attributes:
        expert: the denoiser that holds the block. path: the block's path in it. block: the block. kind: `detour`.
    """

    kind = "detour"

    def __init__(self, architecture: Architecture, denoiser: nn.Module, bypasses: Sequence[Bypass], visual: VisualTokens) -> None:
        block = architecture.blocks(denoiser)[bypasses[0].block]
        self._stack = block.stack
        self._bypasses = bypasses
        self._visual = visual
        self.expert = bypasses[0].expert
        self.path = block.path
        self.block = block.module

    def handed_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the block with these arguments is to return without running; None when it is to run.

        Raises:
            InputError: a bypass answered with streams that the block does not have, or of another shape, or after
                another one had answered.
        """
        taken = self._stack.streams_in(self._stack.arguments(self.block, args, kwargs), self._visual.count)
        answer = None
        for bypass in self._bypasses:
            given = bypass.instead(dict(taken))
            if given is None:
                continue
            if answer is not None:
                raise InputError(f"{self.path} was bypassed twice; give one bypass for each block and moment")
            for name, tensor in given.items():
                if name not in taken:
                    raise InputError(f"{self.path} takes no stream {name!r}; it takes {listed(taken)}")
                if tensor.shape != taken[name].shape:
                    shapes = f"{tuple(taken[name].shape)}, and what is to be handed on {tuple(tensor.shape)}"
                    raise InputError(f"the stream {name!r} that {self.path} takes has shape {shapes}")
            answer = {name: given[name].to(tensor) if name in given else tensor for name, tensor in taken.items()}
        return None if answer is None else self._stack.handed_on(answer)


def detours(
    architecture: Architecture,
    denoisers: Mapping[str, nn.Module],
    bypasses: Sequence[Bypass],
    visual: Mapping[str, VisualTokens],
) -> list[Detour]:
    """One detour for every block that has bypasses."""
    groups: dict[tuple[str, int], list[Bypass]] = {}
    for bypass in bypasses:
        groups.setdefault((bypass.expert, bypass.block), []).append(bypass)
    return [Detour(architecture, denoisers[expert], group, visual[expert]) for (expert, _), group in groups.items()]
