"""The engine on nnsight, and the only module that imports it.

One trace runs around the whole pipeline call. Inside it every port (a place in a block with taps on it) has a worker of
its own, an nnsight invoke without input that loops over the executions of that place and shows each to the taps. A worker
per port keeps them independent: a skipped block or an expert that never runs cannot shift the count of another, and in
whatever order taps are given, none waits for a place that has gone by. The workers are greenlets and run in step with the
model, so the step clock, read inside a visitor, is exact; nnsight's own iteration index counts executions of a location
and is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import nnsight
from nnsight._c import unmount
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from dit_lens.architectures import Architecture
from dit_lens.detours import Detour, detours
from dit_lens.errors import InputError, listed
from dit_lens.ports import Port, ports
from dit_lens.taps import Attention, Bypass, Result, Tap
from dit_lens.visual_tokens import counting

# nnsight mounts `.save` on every Python object, which breaks dataclasses and argparse options of that name in code that
# has nothing to do with it. Nothing here needs it.
unmount("save")

ATTENTION_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "dispatch_attention_fn": lambda tensor: tensor,
    "scaled_dot_product_attention": lambda tensor: tensor.transpose(1, 2),
}
"""Functions that attention hands q, k and v to: diffusers' own, which takes (batch, tokens, heads, channels), and torch's."""


class TracingEngine:
    """Runs a pipeline inside an nnsight trace.

    nnsight puts a controller into the `forward` of every module that it wraps and leaves it there; it changes no
    number. So the denoisers are wrapped when a trace is first asked for, and again if the pipeline gets new ones.
    """

    def __init__(self, pipe: Any, architecture: Architecture) -> None:
        self._pipe = pipe
        self._architecture = architecture
        self._wrapped: dict[str, nn.Module] = {}
        self._model: Any = None

    def call(
        self,
        function: Callable[[], Result],
        taps: Sequence[Tap],
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Result:
        """Run `function` in a trace with a worker for every port and every detour."""
        denoisers = self._architecture.denoisers(self._pipe)
        if self._wrapped != denoisers:
            self._wrapped = denoisers
            self._model = nnsight.NNsight(nn.ModuleDict(denoisers))
        with ExitStack() as attached:
            visual = attached.enter_context(counting(self._architecture, denoisers))
            stops = ports(self._architecture, denoisers, taps, attentions, visual)
            ways = detours(self._architecture, denoisers, bypasses, visual)
            workers = [_Worker(self._model, stop) for stop in (*ways, *stops)]
            for port in stops:
                attached.enter_context(port.remembering())
            return _trace(self._model, function, workers)


class _Worker:
    """Shows one port what passes there, each time that something does; or leads around a block."""

    def __init__(self, model: Any, stop: Port | Detour) -> None:
        self._stop = stop
        self._envoy = model.get(stop.expert).get(stop.path)
        self.failure: BaseException | None = None

    def follow(self, tracer: Any) -> None:
        """Stop at every execution until the run is over."""
        kinds = {"output": self._output, "input": self._input, "attention": self._attention, "detour": self._detour}
        visit = kinds[self._stop.kind]
        for _ in tracer.iter[:]:
            try:
                visit()
            except OutOfOrderError:
                return  # the run has ended, or never called this expert
            except Exception as failure:
                self.failure = failure
                raise

    # Visits are functions of their own, so that no tensor outlives one in the frame of the loop, which stays parked until
    # the module runs again.

    def _output(self) -> None:
        replacement = self._port.visit(self._envoy.output)
        if replacement is not None:
            self._envoy.output = replacement

    def _input(self) -> None:
        replacement = self._port.visit(self._envoy.input)
        if replacement is not None:
            self._envoy.input = replacement

    def _attention(self) -> None:
        call, order = self._attention_call()
        given = call.inputs
        args, kwargs, output = self._port.visit_call(given[0], given[1], order)
        if args is not given[0]:
            call.inputs = (args, kwargs)
        if output is not None:
            call.skip(output)

    def _detour(self) -> None:
        # nnsight asks whether to skip a block after it has shown the block's arguments, and shows what is handed on as
        # the block's output; nothing inside the block is reached then, and the count of nothing else moves.
        assert isinstance(self._stop, Detour)
        handed_on = self._stop.handed_on(*self._envoy.inputs)
        if handed_on is not None:
            self._envoy.skip(handed_on)

    @property
    def _port(self) -> Port:
        assert isinstance(self._stop, Port)
        return self._stop

    def _attention_call(self) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """nnsight's node for the call that hands q, k and v on, and what brings them into the order of sites, and back.

        The call is in the processor of the attention module, or in the module itself where it has none. Where there are several
        such calls, the last one is the module's own; those before it attend to further keys, as to those of a picture in
        cross-attention.
        """
        source = self._envoy.source
        processors = [name for name in source.names if "processor" in name]
        inside = source.node(processors[-1]).source if processors else source
        for function, order in ATTENTION_CALLS.items():
            calls = [name for name in inside.names if function in name]
            if calls:
                return inside.node(calls[-1]), order
        where = f"the processor of {self._port.path}" if processors else self._port.path
        raise InputError(
            f"{where} never calls {' or '.join(ATTENTION_CALLS)}, where q, k and v are read; it calls {listed(inside.names)}; a"
            " function further inside is seen with engine='hooks'"
        )


def _trace(model: Any, function: Callable[[], Result], workers: Sequence[_Worker]) -> Result:
    """Run `function` in one trace; an exception of a visitor comes out as it was raised."""
    results: list[Result] = []

    def run() -> None:
        results.append(function())

    try:
        # nnsight compiles the body of this block anew, so it holds calls only.
        with model.trace(fn=run) as tracer:  # pragma: no cover
            for worker in workers:
                with tracer.invoke():
                    worker.follow(tracer)
    except BaseException:
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure from None
        raise
    return results[0]
