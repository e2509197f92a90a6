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


class Detour:
    """The ways around one block.

    Attributes:
        expert: the denoiser that holds the block. path: the block's path in it. block: the block. kind: `detour`.
    """

    kind = "detour"

    def __init__(self, architecture: Architecture, denoiser: nn.Module, bypasses: Sequence[Bypass]) -> None:
        self._architecture = architecture
        self._bypasses = bypasses
        self.expert = bypasses[0].expert
        self.path = architecture.block_paths(denoiser)[bypasses[0].block]
        self.block = denoiser.get_submodule(self.path)

    def handed_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the block with these arguments is to return without running; None when it is to run.

        Raises:
            InputError: a bypass answered with streams that the block does not have, or of another shape, or after
                another one had answered.
        """
        taken = self._architecture.streams_in(self.block, args, kwargs)
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
        return None if answer is None else self._architecture.returned(answer)


def detours(architecture: Architecture, denoisers: Mapping[str, nn.Module], bypasses: Sequence[Bypass]) -> list[Detour]:
    """One detour for every block that has bypasses."""
    groups: dict[tuple[str, int], list[Bypass]] = {}
    for bypass in bypasses:
        groups.setdefault((bypass.expert, bypass.block), []).append(bypass)
    return [Detour(architecture, denoisers[expert], group) for (expert, _), group in groups.items()]
