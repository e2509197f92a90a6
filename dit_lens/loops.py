"""Sampling loops without a scheduler of diffusers': their steps are told by the calls of the denoiser.

A loop that nobody can look into still calls its denoiser, once for every branch of a step, with the latents and a timestep. What
the schedule will be is seen by letting the loop run once, with answers that are quick to give (see `watch_loop`). Guided is what
classifier-free guidance makes of the branches, with the loop's `guidance_scale`; where the loop mixes them otherwise, it is not
what the loop goes on with. After the last step stand, as its result, the clean latents that it implies.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.architectures import Architecture, Guidance, Loop
from dit_lens.calls import DenoiserCall, in_form_of
from dit_lens.errors import InputError
from dit_lens.noise import weighted, x0_weights
from dit_lens.schedule import Forecast, StepClock, Stop
from dit_lens.taps import replaced_attribute, to_host


def loop_of(architecture: Architecture) -> Loop:
    """The architecture's loop."""
    assert architecture.loop is not None
    return architecture.loop


def timestep_of(loop: Loop, arguments: Mapping[str, Any]) -> float:
    """The timestep of a call; where tokens or frames have timesteps of their own, the highest."""
    return float(torch.as_tensor(arguments[loop.timestep]).max())


def guidance_scale(pipe: Any, inputs: Mapping[str, Any]) -> float:
    """The loop's own guidance scale for these arguments; 1 where it has none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    default = 1.0 if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    return float(inputs.get("guidance_scale", default))


def watch_loop(pipe: Any, architecture: Architecture, inputs: Mapping[str, Any]) -> Forecast:
    """What a run with these arguments will do: the loop runs once, and its denoiser answers with its first output each time.

    Where the shape of the latents changes on the way, the denoiser runs anew.
    """
    loop, guidance = loop_of(architecture), architecture.guidance_at(guidance_scale(pipe, inputs))
    seen: list[tuple[str, float]] = []
    known: dict[Any, Any] = {}

    def answering(expert: str, denoiser: nn.Module) -> Callable[..., Any]:
        forward = denoiser.forward

        @functools.wraps(forward)
        def answer(*args: Any, **kwargs: Any) -> Any:
            arguments = architecture.arguments(denoiser, args, kwargs)
            seen.append((expert, timestep_of(loop, arguments)))
            shape = architecture.taken(arguments).shape
            if shape not in known:
                known[shape] = forward(*args, **kwargs)
            return known[shape]

        return answer

    with ExitStack() as attached, torch.no_grad():
        for expert, denoiser in architecture.denoisers(pipe).items():
            attached.enter_context(replaced_attribute(denoiser, "forward", answering(expert, denoiser)))
        pipe(**inputs)
    size = 1 if guidance.batched else len(guidance.branches)
    if len(seen) % size:
        raise InputError(f"the loop calls its denoiser {len(seen)} times, and the record says {size} times a step")
    first = seen[::size]
    timesteps = tuple(timestep for _, timestep in first)
    sigmas = tuple(loop.noise(timestep).sigma for timestep in timesteps)
    return Forecast(timesteps, sigmas, tuple(expert for expert, _ in first), guidance.branches, guidance.batched)


class LoopClock(StepClock):
    """The step clock of a loop without a scheduler.

    Args:
        scale: of guidance, to say what is guided. The others are as for `StepClock`.
    """

    def __init__(self, pipe: Any, architecture: Architecture, scale: float, **named: Any) -> None:
        super().__init__(pipe, architecture, **named)
        self._loop = loop_of(architecture)
        self._scale = scale
        if self._rewrite is not None:
            raise InputError(f"the latents of a {type(pipe).__name__} cannot be replaced: its loop has no scheduler to ask")

    def __enter__(self) -> LoopClock:
        with ExitStack() as attached:
            for expert, denoiser in self._architecture.denoisers(self.pipe).items():
                before = functools.partial(self._begin_call, expert)
                attached.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
                attached.callback(denoiser.register_forward_hook(self._after_call).remove)
            self._attached = attached.pop_all()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._attached.close()
        if kind is None and self._calls:
            self._end_step()
        if kind is None and self.samples:
            weights = self.weights[-1]
            guided = self.outputs[self.step - 1, "guided"]
            self.samples.append(guided if weights is None else weighted(weights, self.samples[-1], guided).to(guided))

    def _begin_call(self, expert: str, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        of_step = 1 if self._guidance.batched else len(self._guidance.branches)
        if self._calls == of_step:
            self._end_step()
        if self._until is not None and self.step > self._until:
            raise Stop
        arguments = self._architecture.arguments(denoiser, args, kwargs)
        self._now = timestep_of(self._loop, arguments)
        if not self._calls:
            self._latents = self._architecture.taken(arguments)
        self._before_call(expert, denoiser, args, kwargs)

    def _timestep(self) -> float:
        return self._now

    def _level(self) -> float:
        return self._loop.noise(self._now).sigma

    def _end_step(self) -> None:
        """File what the step that is over did."""
        self.timesteps.append(self.timestep)
        self.sigmas.append(self.sigma)
        self.experts.append(self.expert)
        self.weights.append(x0_weights(self._loop.noise(self.timestep)))
        self.samples.append(to_host(self._latents[: self.batch]))
        branches = [branch for step, branch in self.outputs if step == self.step]
        formed = {branch: in_form_of(self.samples[-1], self.outputs[self.step, branch]) for branch in branches}
        self.outputs |= {(self.step, branch): output for branch, output in formed.items()}
        self.outputs[self.step, "guided"] = self._guided(formed)
        for branch, call in self._pending.items():
            place: Any = {"expert": self.expert, "step": self.step, "branch": branch}
            self.calls[self.step, branch] = DenoiserCall(
                **place, **call, latents=self.samples[-1], weights=self.weights[-1], levels=self._planned
            )
        self._pending = {}
        self.step += 1
        self._calls = 0

    def _guided(self, outputs: Mapping[str, Tensor]) -> Tensor:
        if "uncond" not in outputs:
            return outputs["cond"]
        return outputs["uncond"] + self._scale * (outputs["cond"] - outputs["uncond"])

    def follow(self, forecast: Forecast) -> None:
        """Tell the clock what the run will do, for the calls that it keeps."""
        self._planned = (forecast.timesteps, forecast.sigmas)


def loop_guidance(forecast: Forecast) -> Guidance:
    """How the branches of a forecast are called."""
    kind = "batched" if forecast.batched else "sequential" if len(forecast.branches) > 1 else "none"
    return Guidance(kind, forecast.branches)
