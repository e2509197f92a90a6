"""The engine on plain torch hooks: the oracle that the nnsight engine is tested against, and the fast path.

A forward hook sees a block's arguments and its return value and may replace the latter. That is all that reading and
editing whole blocks takes, at about ten microseconds a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from dit_lens.architectures import Architecture
from dit_lens.taps import Result, Tap


class HookEngine:
    """Runs a pipeline with torch forward hooks on the tapped blocks."""

    def __init__(self, pipe: Any, architecture: Architecture) -> None:
        self._pipe = pipe
        self._architecture = architecture

    def call(self, function: Callable[[], Result], taps: Sequence[Tap]) -> Result:
        """Run `function` with a hook on every tapped block; the hooks go with the call, also when it fails."""
        denoisers = self._architecture.denoisers(self._pipe)
        blocks = {expert: self._architecture.block_list(module) for expert, module in denoisers.items()}
        with ExitStack() as hooks:
            for tap in taps:
                handle = blocks[tap.expert][tap.block].register_forward_hook(self._hook(tap), with_kwargs=True)
                hooks.callback(handle.remove)
            return function()

    def _hook(self, tap: Tap) -> Callable[..., Any]:
        architecture = self._architecture

        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = architecture.streams_in(block, args, kwargs) if tap.needs_before else None
            replacement = tap.visit(before, architecture.streams_out(output))
            return None if replacement is None else architecture.replaced(output, replacement)

        return hook
