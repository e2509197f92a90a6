"""The engine on nnsight, and the only module that imports it.

One trace runs around the whole pipeline call. Inside it every tapped block has a worker of its own, an nnsight invoke
without input that loops over the block's executions and hands each to the tap's visitor. A worker per block keeps
blocks independent: a skipped block or an expert that never runs cannot shift the count of another. The workers are
greenlets and run in step with the model, so the step clock, read inside a visitor, is exact; nnsight's own iteration
index counts executions of a location and is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import nnsight
from nnsight._c import unmount
from nnsight.intervention.interleaver import OutOfOrderError
from torch import nn

from dit_lens.architectures import Architecture
from dit_lens.taps import Result, Tap

# nnsight mounts `.save` on every Python object, which breaks dataclasses and argparse options of that name in code that
# has nothing to do with it. Nothing here needs it.
unmount("save")


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

    def call(self, function: Callable[[], Result], taps: Sequence[Tap]) -> Result:
        """Run `function` in a trace with a worker for every tapped block."""
        denoisers = self._architecture.denoisers(self._pipe)
        if self._wrapped != denoisers:
            self._wrapped = denoisers
            self._model = nnsight.NNsight(nn.ModuleDict(denoisers))
        paths = {expert: self._architecture.block_paths(module) for expert, module in denoisers.items()}
        workers = [_Worker(self._architecture, self._model, tap, paths[tap.expert][tap.block]) for tap in taps]
        return _trace(self._model, function, workers)


class _Worker:
    """Reads one block each time it runs and hands it to the tap's visitor."""

    def __init__(self, architecture: Architecture, model: Any, tap: Tap, path: str) -> None:
        self._architecture = architecture
        self._envoy = model.get(tap.expert).get(path)
        self._module = self._envoy._module
        self._tap = tap
        self.failure: BaseException | None = None

    def follow(self, tracer: Any) -> None:
        """Visit the block at every execution until the run is over."""
        for _ in tracer.iter[:]:
            try:
                self._visit()
            except OutOfOrderError:
                return  # the run has ended, or never called this expert
            except Exception as failure:
                self.failure = failure
                raise

    def _visit(self) -> None:
        # A function of its own, so that no tensor outlives the visit in the frame of the loop, which stays parked until
        # the block runs again.
        envoy, tap, architecture = self._envoy, self._tap, self._architecture
        before = None
        if tap.needs_before:
            args, kwargs = envoy.inputs
            before = architecture.streams_in(self._module, args, kwargs)
        output = envoy.output
        replacement = tap.visit(before, architecture.streams_out(output))
        if replacement is not None:
            envoy.output = architecture.replaced(output, replacement)


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
