"""Work that need not be done again: stored answers for a run, and single denoiser calls made again.

Two runs that differ in one edit agree in every step before it, in the other branch of its step, and in every block before
its block. `Answers` serves what is stored of them to a run in place of the computation. And what an edit does to the
velocity of its own step needs no run at all: a `DenoiserCall` that was kept is made again, alone (`Lens.replay`).
Nothing here changes a bit: a denoiser computes the same output from the same arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_lens.activations import Activations
from dit_lens.architectures import Architecture, Layout, Stack
from dit_lens.calls import DenoiserCall, returned, with_variance
from dit_lens.errors import InputError, listed
from dit_lens.noise import weighted
from dit_lens.schedule import Clock, Forecast
from dit_lens.selection import Cell
from dit_lens.taps import Bypass, replaced_attribute


@dataclass(frozen=True, eq=False)
class Resume:
    """A denoiser call that starts at a block, from stored streams; the blocks before it do not run.

    Attributes:
        block: the first block that runs; the number of blocks leaves the final head alone.
        streams: what that block takes, which is `resid` of the block before it: a tensor where there is one stream, or
            tensors by name; of shape (batch, tokens, channels) or (batch, frames, height, width, channels).
    """

    block: int
    streams: Tensor | Mapping[str, Tensor]

    def check(self, stacks: Sequence[Stack]) -> None:
        """Raise an InputError for a block that there is not, or other streams than it takes; `stacks` has one for every block."""
        blocks = len(stacks)
        if not 1 <= self.block <= blocks:
            raise InputError(
                f"a call cannot resume at block {self.block}: there are {blocks} blocks, write 1 to {blocks} ({blocks}"
                " runs none of them)"
            )
        streams = stacks[self.block - 1].streams
        given = set(self._named(streams))
        if given != set(streams):
            raise InputError(f"to resume, the streams {listed(streams)} are needed, not {listed(sorted(given))}")

    def reaches(self, block: int, site: str) -> bool:
        """Whether a site can be seen in this call: those of blocks that run, and the stored streams themselves."""
        return block >= self.block or (block == self.block - 1 and site == "resid")

    def instead(self, block: int, streams: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """What a block hands on that would take these streams; None when it is to run."""
        if block >= self.block:
            return None
        if block < self.block - 1:
            return streams
        stored = self._named(tuple(streams))
        return {name: self._fitted(stored[name], stream) for name, stream in streams.items()}

    def _fitted(self, stored: Tensor, stream: Tensor) -> Tensor:
        """A stored stream as the block takes it: tokens on one axis, on its device and in its precision."""
        tokens = stored.flatten(1, -2) if stored.ndim > 3 else stored
        if tokens.shape != stream.shape:
            raise InputError(
                f"block {self.block} takes a stream of shape {tuple(stream.shape)} (batch, tokens, channels), and what is"
                f" stored has {tuple(stored.shape)}"
            )
        return tokens.to(stream)

    def _named(self, streams: Sequence[str]) -> Mapping[str, Tensor]:
        return {streams[0]: self.streams} if isinstance(self.streams, Tensor) else self.streams


@dataclass
class ReplayClock:
    """The moment of one denoiser call that is made again."""

    pipe: Any
    expert: str
    step: int
    branch: str
    shared: tuple[str, ...]
    timestep: float
    sigma: float
    layout: Layout
    batch: int
    dtype: torch.dtype
    text_tokens: int | None

    @contextmanager
    def within(self, branch: str) -> Iterator[None]:
        """As `StepClock.within`."""
        before, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = before


@dataclass(frozen=True, eq=False)
class Replay:
    """What one denoiser call gave when it was made again; tensors are on the model's device.

    Attributes:
        call: the call as it was made; with gradients, the latents that it takes are a leaf of the graph.
        velocity: the denoiser's output.
        activations: what was recorded.
    """

    call: DenoiserCall
    velocity: Float[Tensor, "batch ..."] = field(repr=False)
    activations: Activations

    @property
    def x0_hat(self) -> Float[Tensor, "batch ..."]:
        """The clean latents that the velocity implies, in float32.

        Raises:
            InputError: the output implies no clean sample at this step.
        """
        if self.call.weights is None:
            raise InputError(f"there is no x0-hat at step {self.call.step}: the sample is pure noise, the output epsilon")
        return weighted(self.call.weights, self.call.latents.to(self.velocity.device), self.velocity, self.call.held)


def forecast_of(call: DenoiserCall) -> Forecast:
    """A forecast in which nothing but this call runs; of its schedule, selections by step and sigma are as in the run."""
    timesteps, sigmas = call.levels
    # No expert has this name, so that no selection finds a cell at another step.
    experts = [call.expert if step == call.step else "(not replayed)" for step in range(len(timesteps))]
    shared = call.shared or (call.branch,)
    return Forecast(timesteps, sigmas, tuple(experts), shared, batched=len(shared) > 1)


def clock_of(call: DenoiserCall, pipe: Any, architecture: Architecture) -> ReplayClock:
    """The clock that tells visitors which call it is."""
    shared = call.shared or (call.branch,)
    denoiser = architecture.denoisers(pipe)[call.expert]
    arguments = architecture.arguments(denoiser, call.args, call.kwargs)
    latents, text = architecture.taken(arguments), arguments.get(architecture.text)
    return ReplayClock(
        pipe, call.expert, call.step, shared[0], shared, call.timestep, call.sigma,
        layout=architecture.layout(denoiser, arguments),
        batch=len(latents) // len(shared),
        dtype=latents.dtype,
        text_tokens=text.shape[1] if isinstance(text, Tensor) and text.ndim > 2 else None,
    )  # fmt: skip


@contextmanager
def differentiable(denoiser: nn.Module) -> Iterator[None]:
    """Keep the graph of what runs, without the gradients of weights: these would double what a backward pass does."""
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def with_leaves(call: DenoiserCall, resume: Resume | None) -> tuple[DenoiserCall, Resume | None]:
    """The call, and the streams that it resumes from, as starts of a graph."""
    call = call.taking(_leaf(call.taken))
    if resume is None:
        return call, None
    streams = resume.streams
    leaves = _leaf(streams) if isinstance(streams, Tensor) else {name: _leaf(one) for name, one in streams.items()}
    return call, Resume(resume.block, leaves)


def _leaf(tensor: Tensor) -> Tensor:
    """A tensor as the start of a graph; one that belongs to a graph of the caller's stays in that."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


class Answers:
    """What is stored for a run: by (step, branch), the denoiser's output, or the streams that it can resume from.

    Args:
        answers: a tensor (the output as the run of `Run.answers` had it) or a `Resume` for each call that has one. Where one
            call holds several branches, what is not there for all of them is left out, and computed.
        forecast, pipe, architecture: of the run that they are for.

    Raises:
        InputError: there is no such call, or no such block.
    """

    def __init__(
        self,
        answers: Mapping[tuple[int, str], Tensor | Resume],
        forecast: Forecast,
        pipe: Any,
        architecture: Architecture,
    ) -> None:
        self._outputs = {place: answer for place, answer in answers.items() if not isinstance(answer, Resume)}
        self._resumes = {place: answer for place, answer in answers.items() if isinstance(answer, Resume)}
        self._denoisers = architecture.denoisers(pipe)
        self._architecture = architecture
        self._experts = forecast.experts
        self._asked: set[tuple[int, str]] = set()
        steps = len(forecast.timesteps)
        for place in answers:
            if not 0 <= place[0] < steps or place[1] not in forecast.branches:
                raise InputError(
                    f"answers= holds one for step {place[0]}, {place[1]!r}, and this run has {steps} steps (0 to"
                    f" {steps - 1}) and the branches {listed(forecast.branches)}"
                )
        if forecast.batched:
            self._leave_out(forecast.branches)
        for (step, _), resume in self._resumes.items():
            denoiser = self._denoisers[forecast.experts[step]]
            resume.check([block.stack for block in architecture.blocks(denoiser)])

    def _leave_out(self, branches: tuple[str, ...]) -> None:
        """Leave out what is stored for some branches of a call and not for all: it is computed anyway."""
        for step in {step for step, _ in (*self._outputs, *self._resumes)}:
            places = [(step, branch) for branch in branches]
            whole = all(place in self._outputs for place in places)
            same = len({self._resumes[place].block if place in self._resumes else None for place in places} - {None}) == 1
            if not whole and not (same and all(place in self._resumes for place in places)):
                for place in places:
                    self._outputs.pop(place, None)
                    self._resumes.pop(place, None)

    def check_reach(self, cells: Iterable[Cell]) -> None:
        """Raise an InputError for a cell that lies in what is not computed."""
        for cell in cells:
            place = (cell.step, cell.branch)
            resume = self._resumes.get(place)
            if place in self._outputs or (resume is not None and not resume.reaches(cell.block, cell.site)):
                raise InputError(
                    f"block {cell.block} does not run at step {cell.step}, {cell.branch}, for which answers= holds what is"
                    f" stored, so there is no {cell.site}; select other steps, or leave that answer out"
                )

    def bypasses(self, clock: Clock) -> list[Bypass]:
        """What lets blocks hand on stored streams, for the engine."""
        last: dict[str, int] = {}
        for (step, _), resume in self._resumes.items():
            last[self._experts[step]] = max(last.get(self._experts[step], 0), resume.block)
        return [Bypass(e, block, self._instead(clock, block)) for e, count in last.items() for block in range(count)]

    def _instead(self, clock: Clock, block: int) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor] | None]:
        def instead(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
            place = (clock.step, clock.branch)
            resume = self._resumes.get(place)
            if resume is None:
                return None
            self._asked.add(place)
            return resume.instead(block, streams)

        return instead

    @contextmanager
    def serving(self, clock: Clock) -> Iterator[None]:
        """Let the denoisers answer with what is stored, as long as the context lasts.

        The swap is made where the engine has set up all of its own, so that neither finds the other's `forward` to
        restore. The denoiser's hooks run as ever, by which the clock knows which call it is.
        """
        with ExitStack() as attached:
            if self._outputs:
                for denoiser in self._denoisers.values():
                    attached.enter_context(replaced_attribute(denoiser, "forward", self._answering(denoiser, clock)))
            yield

    def _answering(self, denoiser: nn.Module, clock: Clock) -> Callable[..., Any]:
        forward = denoiser.forward

        @functools.wraps(forward)
        def answering(*args: Any, **kwargs: Any) -> Any:
            place = (clock.step, clock.branch)
            if place not in self._outputs:
                return forward(*args, **kwargs)
            shared = [(clock.step, branch) for branch in clock.shared]
            self._asked.update(shared)
            parts = [self._outputs[one] for one in shared]
            stored = parts[0] if len(parts) == 1 else torch.cat(parts)
            latents = self._architecture.taken(self._architecture.arguments(denoiser, args, kwargs))
            if (stored.shape[0], *stored.shape[2:]) != (latents.shape[0], *latents.shape[2:]):
                raise InputError(
                    f"the stored output for step {place[0]}, {place[1]!r}, has shape {tuple(stored.shape)}, and the denoiser"
                    f" takes latents of shape {tuple(latents.shape)}; batch, frames, height and width must agree"
                )
            return returned(denoiser, args, kwargs, with_variance(denoiser, stored).to(latents))

        return answering

    def check_asked(self, steps: int) -> None:
        """After a run of this many steps: raise an InputError for an answer that nobody asked for."""
        idle = [place for place in (*self._outputs, *self._resumes) if place not in self._asked and place[0] < steps]
        if idle:
            raise InputError(f"answers= holds {listed(map(str, idle))}, and the run never came to that call")
