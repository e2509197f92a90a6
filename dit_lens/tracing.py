"""The engine on nnsight, and the only module that imports it.

One trace runs around the whole pipeline call. Inside it every port (a place in a block with taps on it) has a worker of
its own, an nnsight invoke without input that loops over the executions of that place and shows each to the taps. A worker
per port keeps them independent: a skipped block or an expert that never runs cannot shift the count of another, and in
whatever order taps are given, none waits for a place that has gone by. The workers are greenlets and run in step with the
model, so the step clock, read inside a visitor, is exact; nnsight's own iteration index counts executions of a location
and is never read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nnsight
from nnsight._c import unmount
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.source import STATE, Controller
from torch import Tensor, nn

from dit_lens.architectures import Architecture
from dit_lens.detours import Detour, detours
from dit_lens.errors import InputError, listed
from dit_lens.obstacles import check_forward
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

    nnsight puts a controller into the `forward` of a module that it wraps, and would leave it there. A pipeline changes
    under a controller: an adapter that is loaded later, an offload that is switched on, puts itself beneath it, above it
    or in its place, and a trace then sees a part of the module, or nothing. So the modules that are read are wrapped for
    each call, as they are then, and no other; afterwards their `forward` is what it was.
    """

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
        """Run `function` in a trace with a worker for every port and every detour."""
        denoisers = self._architecture.denoisers(self._pipe)
        with ExitStack() as attached:
            visual = attached.enter_context(counting(self._architecture, denoisers))
            stops = ports(self._architecture, denoisers, taps, attentions, visual)
            ways = detours(self._architecture, denoisers, bypasses, visual)
            workers = [_Worker(stop) for stop in (*ways, *stops)]
            for worker in workers:
                check_forward(worker.path, worker.module)
            model = attached.enter_context(_wrapped(workers))
            for worker in workers:
                attached.callback(worker.module.register_forward_hook(worker.check).remove)
            workers += [other for worker in workers for other in worker.beside()]
            for port in stops:
                attached.enter_context(port.remembering())
            return _trace(model, function, workers)


class _Alone(Envoy):
    """nnsight's view of one module, and of no module inside it."""

    def _add_envoy(self, name: str, module: nn.Module) -> Any:
        return None


@contextmanager
def _wrapped(workers: Sequence[_Worker]) -> Iterator[Any]:
    """nnsight's model of the modules where workers stop, as long as the context lasts."""
    modules = {id(worker.module): worker.module for worker in workers}
    ours = (STATE, "forward")
    before = [(module, {name: vars(module)[name] for name in ours if name in vars(module)}) for module in modules.values()]
    try:
        model = nnsight.NNsight(nn.ModuleList(modules.values()), envoys={nn.Module: _Alone})
        envoys = dict(zip(modules, model, strict=True))
        for worker in workers:
            worker.envoy = envoys[id(worker.module)]
        yield model
    finally:
        for module, own in before:
            vars(module).pop(STATE, None)
            # What another library put there meanwhile is its own to take away.
            if isinstance(vars(module).get("forward"), Controller):
                del module.forward
                vars(module).update(own)


class _Worker:
    """Shows one port what passes there, each time that something does; or leads around a block.

    Attributes:
        path: of the module where it stops. envoy: nnsight's view of that module, while it is wrapped.
        failure: what a visitor raised.
    """

    def __init__(self, stop: Port | Detour) -> None:
        self._stop = stop
        self._processor = -1
        self._beside: list[_Worker] = []
        self._visits = 0
        self._executions = 0
        self._left: tuple[weakref.ref[Any], ...] = ()
        self.path = stop.path
        self.module = stop.module if isinstance(stop, Port) else stop.block
        self.envoy: Any = None
        self.failure: BaseException | None = None

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        """A torch hook on the module, after all others: was this execution seen, and is what comes out what was seen?"""
        self._executions += 1
        visits = self._visits + sum(other._visits for other in self._beside)
        if visits != self._executions:
            raise InputError(
                f"{self.path} ran {self._executions} times and nnsight saw {visits} of them: its forward was replaced"
                " during the run, or its attention went another way; write engine='hooks'"
            )
        if self._stop.kind == "output" and not self._passes(output):
            raise InputError(
                f"a torch hook on {self.path} replaces what it returns, after nnsight has seen it; write engine='hooks', whose"
                " own hook comes after that one, or take it off"
            )

    def beside(self) -> list[_Worker]:
        """Workers of the same port for further places where an attention may call its processor, one of which it reaches."""
        if self._stop.kind == "attention":
            for place in range(len(_processors(self.envoy.source)) - 1):
                other = _Worker(self._stop)
                other.envoy, other._processor = self.envoy, place
                self._beside.append(other)
        return self._beside

    def _passes(self, output: Any) -> bool:
        """Whether these are the tensors that the visitors of an output left."""
        passed = _tensors(output)
        return len(passed) == len(self._left) and all(left() is one for left, one in zip(self._left, passed, strict=True))

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
            self._visits += 1

    # Visits are functions of their own, so that no tensor outlives one in the frame of the loop, which stays parked until
    # the module runs again.

    def _output(self) -> None:
        output = self.envoy.output
        replacement = self._port.visit(output)
        if replacement is not None:
            self.envoy.output = output = replacement
        self._left = tuple(weakref.ref(tensor) for tensor in _tensors(output))

    def _input(self) -> None:
        replacement = self._port.visit(self.envoy.input)
        if replacement is not None:
            self.envoy.input = replacement

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
        handed_on = self._stop.handed_on(*self.envoy.inputs)
        if handed_on is not None:
            self.envoy.skip(handed_on)

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
        source = self.envoy.source
        processors = _processors(source)
        inside = source.node(processors[self._processor]).source if processors else source
        for function, order in ATTENTION_CALLS.items():
            calls = [name for name in inside.names if function in name]
            if calls:
                return inside.node(calls[-1]), order
        where = f"the processor of {self._port.path}" if processors else self._port.path
        raise InputError(
            f"{where} never calls {' or '.join(ATTENTION_CALLS)}, where q, k and v are read; it calls {listed(inside.names)}; a"
            " function further inside is seen with engine='hooks'"
        )


def _processors(source: Any) -> list[str]:
    """nnsight's names of the places where an attention calls its processor."""
    return [name for name in source.names if "processor" in name]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that a module returned."""
    return [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]


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
