"""Which call is which.

A pipeline runs its denoiser once per step and guidance branch, at a noise level that falls from step to step. A
`Forecast` says before a run what its steps will be. The `StepClock` says during the run where it is: which expert,
which step, which branch. A step is one call of `scheduler.step`; the clock wraps that method on the scheduler instance,
the denoisers with torch hooks, and their `cache_context`, in which pipelines name the branch. It also keeps the
trajectory, as `scheduler.step` is the one place where latents, the guided output and the timestep meet.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dit_lens.architectures import Architecture, Guidance, Layout
from dit_lens.calls import DenoiserCall, detached, held_frames, in_form_of, sample_of, versions
from dit_lens.errors import InputError, listed
from dit_lens.noise import forget_history, noise_state, signed, with_frames, x0_weights
from dit_lens.taps import Result, replaced_attribute, to_host


@dataclass(frozen=True)
class Forecast:
    """What a run will do, known before it starts: timestep, sigma and expert of every step, and the branches.

    `batched` says whether one call of the denoiser holds the rows of all branches.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    experts: tuple[str, ...]
    branches: tuple[str, ...]
    batched: bool = False


def forecast(pipe: Any, architecture: Architecture, num_inference_steps: int, guidance_scale: float) -> Forecast:
    """The schedule that a pipeline call with these arguments will follow; the pipeline's scheduler is left alone.

    For an architecture whose guidance is known, in a pipeline that sets nothing but the number of its scheduler's steps.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return forecast_with(pipe, architecture, scheduler, architecture.guidance_at(guidance_scale))


def forecast_with(pipe: Any, architecture: Architecture, scheduler: Any, guidance: Guidance) -> Forecast:
    """The forecast for a scheduler whose steps are set."""
    timesteps, sigmas = levels(scheduler)
    experts = tuple(architecture.expert_at(pipe, timestep) for timestep in timesteps)
    return Forecast(timesteps, sigmas, experts, guidance.branches, guidance.batched)


def levels(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The timesteps of a scheduler that has them set, and their sigmas."""
    timesteps = tuple(float(timestep) for timestep in scheduler.timesteps)
    return timesteps, tuple(noise_state(scheduler, timestep, index).sigma for index, timestep in enumerate(timesteps))


@runtime_checkable
class Clock(Protocol):
    """What visitors ask while a denoiser runs: which call it is. The clock of a run, or of one call made again."""

    @property
    def pipe(self) -> Any: ...
    @property
    def step(self) -> int: ...
    @property
    def expert(self) -> str: ...
    @property
    def branch(self) -> str: ...
    @property
    def shared(self) -> tuple[str, ...]: ...
    def within(self, branch: str) -> AbstractContextManager[None]: ...
    @property
    def timestep(self) -> float: ...
    @property
    def sigma(self) -> float: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def batch(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def text_tokens(self) -> int | None: ...


class Stop(Exception):
    """Ends a pipeline call after the last step that was asked for."""


class StepClock:
    """Says where a run is while it is under way, and keeps its trajectory.

    Use it as a context manager around one pipeline call; everything that it attaches is gone afterwards.

    While the denoiser runs: `step`, `expert`, `branch`, `timestep`, `sigma`, and from the first call on `layout`,
    `batch` and `dtype` (of what the denoiser takes), and `text_tokens` (how many it takes; None where it takes none).
    Where a call holds the rows of several branches, these are `shared`, `batch` is the rows of one, and `branch` is the first
    of them but `within` another.
    After the run, one entry per step: `timesteps`, `sigmas`, `experts`, `weights` (of x0-hat), `samples` (what the
    scheduler received, then its last result) and `outputs[step, branch]`, with the branch `guided` for what the scheduler
    received; tensors of shape (batch, channels, *space) on the CPU. `sign` is -1 where the pipeline negates outputs.

    Args:
        pipe, architecture: the pipeline, and what is known about its family.
        begin: called with the clock at the first denoiser call, before any block runs.
        rewrite: called with (step, latents) for the latents that each step takes, before it takes them; returns others
            of the same shape, or None to leave them. The latents of step 0 are those of the pipeline's
            `prepare_latents`, later ones what `scheduler.step` returned; after the last step nothing is asked.
            A multistep solver begins anew where the latents change, as its history belongs to the old ones.
        keep_calls: whether to keep every denoiser call, as `calls[step, branch]`.
        until: the last step to run; `stopping` then ends the pipeline call.
        guidance: how the branches are called; the architecture's own when left out.
    """

    def __init__(
        self,
        pipe: Any,
        architecture: Architecture,
        begin: Callable[[StepClock], None] | None = None,
        rewrite: Callable[[int, Tensor], Tensor | None] | None = None,
        keep_calls: bool = False,
        until: int | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.pipe = pipe
        self._guidance = guidance or architecture.guidance or Guidance()
        self._architecture = architecture
        self._begin = begin
        self._rewrite = rewrite
        self._keep_calls = keep_calls
        self._until = until
        self._pending: dict[str, dict[str, Any]] = {}
        self._calls = 0
        self._context: str | None = None
        self._last: Tensor | None = None
        self._attached = ExitStack()
        self.step = 0
        self.expert = ""
        self.branch = ""
        self.shared: tuple[str, ...] = ()
        self.sign = 1
        self.held: tuple[int, ...] = ()
        self._taken = torch.empty(0)
        self.timestep = math.nan
        self.sigma = math.nan
        self.layout: Layout | None = None
        self.batch = 0
        self.dtype = torch.float32
        self.text_tokens: int | None = None
        self.branches: list[str] = []
        self.timesteps: list[float] = []
        self.sigmas: list[float] = []
        self.experts: list[str] = []
        self.weights: list[tuple[float, float] | None] = []
        self.samples: list[Tensor] = []
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.calls: dict[tuple[int, str], DenoiserCall] = {}
        self._levels: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def stopping(self, function: Callable[[], Result]) -> Result | None:
        """Run a function that calls the pipeline; None when the clock stopped it after the step `until`."""
        try:
            return function()
        except Stop:
            # What the pipeline does itself where its loop ends.
            if hasattr(self.pipe, "_current_timestep"):
                self.pipe._current_timestep = None
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()
            return None

    def __enter__(self) -> StepClock:
        with ExitStack() as attached:
            for expert, denoiser in self._architecture.denoisers(self.pipe).items():
                before = functools.partial(self._before_call, expert)
                attached.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
                attached.callback(denoiser.register_forward_hook(self._after_call).remove)
                context: Any = getattr(denoiser, "cache_context", None)
                if context is not None:
                    named = self._naming(context)
                    attached.enter_context(replaced_attribute(denoiser, "cache_context", named))
            scheduler = self.pipe.scheduler
            stepping = self._stepping(scheduler, scheduler.step)
            attached.enter_context(replaced_attribute(scheduler, "step", stepping))
            if self._rewrite is not None:
                if not hasattr(self.pipe, "prepare_latents"):
                    raise InputError(f"a {type(self.pipe).__name__} has no prepare_latents, so its latents cannot be replaced")
                preparing = self._preparing(self.pipe.prepare_latents)
                attached.enter_context(replaced_attribute(self.pipe, "prepare_latents", preparing))
            self._attached = attached.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()
        if self._last is not None:
            last = to_host(self._last[: self.batch])
            self.samples.append(with_frames(last, self.samples[-1], self.held) if self.samples else last)
            self._last = None

    @contextmanager
    def within(self, branch: str) -> Iterator[None]:
        """A context in which the rows of one of the branches of the call are looked at."""
        before, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = before

    def _before_call(self, expert: str, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.expert = expert
        self.shared = self._called()
        self.branch = self.shared[0]
        self._calls += 1
        self.branches += [branch for branch in self.shared if branch not in self.branches]
        self.timestep = self._timestep()
        self.sigma = self._level()
        arguments = self._architecture.arguments(denoiser, args, kwargs)
        self._taken = latents = self._architecture.taken(arguments)
        if self.layout is None:
            text = arguments.get(self._architecture.text)
            self.layout = self._architecture.layout(denoiser, arguments)
            self.batch = len(latents) // len(self.shared)
            self.dtype = latents.dtype
            self.text_tokens = text.shape[1] if isinstance(text, Tensor) and text.ndim > 2 else None
            if self._begin is not None:
                self._begin(self)
        if self._keep_calls:
            named = {name: detached(value) for name, value in kwargs.items()}
            written = versions(args, kwargs)
            for branch in self.shared:
                self._pending[branch] = {
                    "args": tuple(map(detached, args)), "kwargs": named, "versions": written,
                    "shared": self.shared, "parameter": self._architecture.latents,
                }  # fmt: skip

    def _called(self) -> tuple[str, ...]:
        """The branches of a call: the name that the pipeline gave it, or else the place of the call in its step."""
        branches = self._guidance.branches
        if self._guidance.batched and self._calls == 0:
            return branches
        if not self._guidance.batched and self._context is not None and (self._context in branches or len(branches) > 1):
            return (self._context,)
        if self._guidance.batched or self._calls >= len(branches):
            raise InputError(
                f"step {self.step} calls the denoiser more often than {self._architecture.name} has branches"
                f" ({listed(branches)}): activations cannot be labelled; give arguments without further guidance"
            )
        return (branches[self._calls],)

    def _timestep(self) -> float:
        """The timestep of the step under way; what the denoiser receives may be spread over samples or tokens."""
        timesteps = self.pipe.scheduler.timesteps
        if self.step < len(timesteps):
            return float(timesteps[self.step])
        raise InputError(
            f"the pipeline makes more steps than its scheduler has timesteps ({len(timesteps)}): where it goes through them again"
            " for every segment of a video, activations cannot be labelled; give arguments for one segment"
        )

    def _level(self) -> float:
        """The noise level of the step under way."""
        return noise_state(self.pipe.scheduler, self.timestep).sigma

    def _after_call(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows = to_host(sample_of(output)).chunk(len(self.shared))
        for branch, part in zip(self.shared, rows, strict=True):
            self.outputs[self.step, branch] = part.clone() if len(self.shared) > 1 else part

    def _naming(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `cache_context`, remembering the name that it was entered with."""

        @contextmanager
        @functools.wraps(cache_context)
        def named(name: str, **kwargs: Any):
            self._context = name
            try:
                with cache_context(name, **kwargs):
                    yield
            finally:
                self._context = None

        return named

    def _stepping(self, scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `step`, keeping what goes through it; pipelines inspect its signature, so it stays."""
        signature = inspect.signature(step)

        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            if float(call["timestep"]) != self.timestep:
                raise RuntimeError(
                    f"the scheduler was stepped at timestep {float(call['timestep'])}, but the denoiser was called at"
                    f" {self.timestep}: activations of step {self.step} cannot be labelled"
                )
            self.timesteps.append(self.timestep)
            self.sigmas.append(self.sigma)
            self.experts.append(self.expert)
            self.weights.append(x0_weights(noise_state(scheduler, self.timestep)))
            # A pipeline may step the rows of all branches, which are then alike.
            self.samples.append(self._shown(call["sample"][: self.batch]))
            self.outputs[self.step, "guided"] = to_host(call["model_output"][: self.batch])
            self._form_outputs()
            self._file_calls()
            result = step(*args, **kwargs)
            self.step += 1
            self._calls = 0
            stepped: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
            if self._until is not None and self.step > self._until:
                self._last = stepped
                raise Stop
            self._last = stepped if self.step == len(scheduler.timesteps) else self._rewritten(stepped)
            if self._last is stepped:
                return result
            # Latents that changed are no continuation of the steps before them.
            forget_history(scheduler)
            if isinstance(result, tuple):
                return (self._last, *result[1:])
            result.prev_sample = self._last
            return result

        return stepping

    def _shown(self, sample: Tensor) -> Tensor:
        """The scheduler's latents of the step under way, with what the denoiser takes in the place of some frames, on the CPU."""
        taken, self._taken = self._taken[: self.batch], torch.empty(0)
        if self.step == 0:
            self.held = held_frames(sample, taken)
        return with_frames(to_host(sample), to_host(taken), self.held) if self.held else to_host(sample)

    def _form_outputs(self) -> None:
        """Bring the outputs of the step under way into the form of its latents, and see whether the pipeline negates them."""
        branches = [branch for step, branch in self.outputs if step == self.step and branch != "guided"]
        if set(branches) != set(self.branches):
            raise InputError(
                f"step {self.step} calls {listed(branches)}, and a step before it {listed(self.branches)}: a run whose guidance"
                " changes on the way cannot be labelled; give arguments with which every step calls the same branches"
            )
        for branch in branches:
            self.outputs[self.step, branch] = in_form_of(self.samples[-1], self.outputs[self.step, branch])
        if self._architecture.guidance is None and self.step == 0:
            # Guided is a sum of the branches, with weights that add up to about 1, or -1.
            parts = torch.stack([self.outputs[0, branch].double().flatten() for branch in branches], dim=1)
            weights = torch.linalg.lstsq(parts, self.outputs[0, "guided"].double().flatten()[:, None]).solution
            self.sign = -1 if weights.sum() < 0 else 1

    def _file_calls(self) -> None:
        """File the denoiser calls of the step under way; all of what they are part of is known at its end."""
        if self._pending and not self._levels[0]:
            self._levels = levels(self.pipe.scheduler)
        for branch, call in self._pending.items():
            place = {"expert": self.expert, "step": self.step, "branch": branch}
            self.calls[self.step, branch] = DenoiserCall(
                **place, **call, latents=self.samples[-1], weights=signed(self.weights[-1], self.sign), levels=self._levels,
                held=self.held,
            )  # fmt: skip
        self._pending = {}

    def _preparing(self, prepare_latents: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline's `prepare_latents`, which returns the first latents, alone or before what it made for them."""

        @functools.wraps(prepare_latents)
        def preparing(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare_latents(*args, **kwargs)
            if isinstance(prepared, tuple):
                return (self._rewritten(prepared[0]), *prepared[1:])
            return self._rewritten(prepared)

        return preparing

    def _rewritten(self, latents: Tensor) -> Tensor:
        """The latents that the step to come takes: the same object, unless `rewrite` gave others."""
        given = self._rewrite(self.step, latents) if self._rewrite is not None else None
        if given is None:
            return latents
        if given.shape != latents.shape:
            raise InputError(
                f"the latents of step {self.step} have shape {tuple(latents.shape)}, and what is to replace them"
                f" {tuple(given.shape)}"
            )
        given = given.to(latents)
        return latents if torch.equal(given, latents) else given
