"""The engine on plain torch hooks: the oracle that the nnsight engine is tested against, and the fast path.

A forward hook sees what a module returns, a forward pre-hook what it takes, and both may replace it, at about ten
microseconds a block. Queries, keys and values pass through no module once they are normalised and rotated; a torch
function mode sees them where the attention hands them to torch, and answers for it. A block that is bypassed has another
`forward` meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, no_type_check

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dit_lens.architectures import Architecture
from dit_lens.detours import Detour, detours
from dit_lens.errors import InputError
from dit_lens.obstacles import check_attention
from dit_lens.ports import Port, ports
from dit_lens.taps import Attention, Bypass, Result, Tap, replaced_attribute
from dit_lens.visual_tokens import counting


class HookEngine:
    """Runs a pipeline with torch hooks on the tapped modules."""

    def __init__(self, pipe: Any, architecture: Architecture) -> None:
        self._pipe = pipe
        self._architecture = architecture

    def call(
        self,
        function: Callable[[], Result],
        taps: Sequence[Tap],
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Result:
        """Run `function` with a hook on every tapped module; the hooks go with the call, also when it fails."""
        denoisers = self._architecture.denoisers(self._pipe)
        attention = _Attention()
        with ExitStack() as attached:
            visual = attached.enter_context(counting(self._architecture, denoisers))
            stops = ports(self._architecture, denoisers, taps, attentions, visual)
            ways = detours(self._architecture, denoisers, bypasses, visual)
            for port in stops:
                if port.kind == "attention":
                    check_attention(port.path, port.module)
            for port in stops:
                for handle in _hooks(port, attention):
                    attached.callback(handle.remove)
            # After the hooks that visit: of the hooks of one block, the last forgets its arguments.
            for port in stops:
                attached.enter_context(port.remembering())
            for detour in ways:
                attached.enter_context(replaced_attribute(detour.block, "forward", _forward(detour)))
            if any(port.kind == "attention" for port in stops):
                attached.enter_context(attention)
            return function()


def _forward(detour: Detour) -> Callable[..., Any]:
    """The `forward` of a block, with its detour before it; the hooks of the block are around both."""
    forward = detour.block.forward

    def forward_or_around(*args: Any, **kwargs: Any) -> Any:
        handed_on = detour.handed_on(args, kwargs)
        return forward(*args, **kwargs) if handed_on is None else handed_on

    return forward_or_around


def _hooks(port: Port, attention: _Attention) -> list[RemovableHandle]:
    """The hooks of one port."""
    module = port.module
    if port.kind == "attention":
        return [
            module.register_forward_pre_hook(lambda *_: attention.enter(port)),
            module.register_forward_hook(lambda *_: attention.leave(port)),
        ]
    if port.kind == "output":
        return [module.register_forward_hook(lambda module, args, output: port.visit(output))]

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replacement = port.visit(args[0])
        return None if replacement is None else (replacement, *args[1:])

    return [module.register_forward_pre_hook(before)]


class _Attention(TorchFunctionMode):
    """Shows a port what its attention module hands to torch, while that module runs and at no other time."""

    def __init__(self) -> None:
        super().__init__()
        self._port: Port | None = None
        self._calls = 0

    def enter(self, port: Port) -> None:
        """The attention module of a port begins."""
        self._port, self._calls = port, 0

    def leave(self, port: Port) -> None:
        """It has ended, and must have called scaled dot-product attention as often as it does."""
        self._port = None
        if self._calls != port.calls:
            raise InputError(
                f"{port.path} called torch's scaled_dot_product_attention {self._calls} times, and the hook engine reads"
                f" q, k and v from call {port.calls} of {port.calls}: write engine='nnsight', or choose the attention"
                " backend 'native'"
            )

    @no_type_check  # it is asked for every operation of a run
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._port is not None and func is scaled_dot_product_attention:
            self._calls += 1
            if self._calls == self._port.calls:
                args, kwargs, output = self._port.visit_call(args, kwargs, _swapped)
                if output is not None:
                    return output
        return func(*args, **kwargs)


def _swapped(tensor: Tensor) -> Tensor:
    """(batch, heads, tokens, channels), as torch has it, to (batch, tokens, heads, channels) and back."""
    return tensor.transpose(1, 2)
