"""Sampling loops without a scheduler of diffusers': their steps are told by the calls of the denoiser.

A loop that nobody can look into still calls its denoiser, once for every branch of a step, with the latents and a timestep. What
the schedule will be is seen by letting the loop run once, with answers that are quick to give (see `watch_loop`); a run that then
does something else is refused. Guided is what classifier-free guidance makes of the branches, with the loop's `guidance_scale`;
where the loop mixes them otherwise, it is not what the loop goes on with. After the last step stand the latents that the loop
returns, or where it returns something else, the clean latents that the last step implies.

Frames may have timesteps of their own, as where a video is made frame by frame. Then a step has one noise level by name (see
`Loop.of_frames`), and x0-hat takes that of every frame.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.architectures import Architecture, Guidance, Loop
from dit_lens.calls import DenoiserCall, in_form_of
from dit_lens.errors import InputError, listed
from dit_lens.noise import Weights, weighted, x0_weights
from dit_lens.schedule import Forecast, StepClock, Stop
from dit_lens.taps import Result, replaced_attribute, to_host


@dataclass(frozen=True)
class Taken:
    """What one call of the denoiser takes.

    Attributes:
        expert: which denoiser. latents: (rows, channels, *space).
        timesteps: one for all frames, or one for each, where they differ.
    """

    expert: str
    latents: Tensor
    timesteps: tuple[float, ...]

    def at(self, loop: Loop) -> float:
        """The timestep that its step is known by."""
        return self.timesteps[0] if len(self.timesteps) == 1 else float(loop.of_frames(self.timesteps))

    def weights(self, loop: Loop) -> Weights | None:
        """(a, b) of x0-hat; None where a frame has none."""
        found = [x0_weights(loop.noise(timestep)) for timestep in self.timesteps]
        there = [pair for pair in found if pair is not None]
        if len(there) < len(found):
            return None
        return there[0] if len(there) == 1 else (tuple(a for a, _ in there), tuple(b for _, b in there))


def loop_of(architecture: Architecture) -> Loop:
    """The architecture's loop."""
    assert architecture.loop is not None
    return architecture.loop


def taken_by(architecture: Architecture, expert: str, denoiser: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Taken:
    """What a call of a denoiser takes.

    Raises:
        InputError: a parameter that the record names is not given, or timesteps that belong to no rows, frames or tokens.
    """
    given, loop = architecture.arguments(denoiser, args, kwargs), loop_of(architecture)
    for what, name in (("latents=", architecture.latents), ("loop=dl.Loop(timestep=", loop.timestep)):
        if name not in given:
            names = listed(name for name in given if name != "self")
            raise InputError(f"{expert} is called with {names}, and no {name!r}; write {what} as its forward calls it")
    latents, times = architecture.taken(given), torch.as_tensor(given[loop.timestep]).double()
    rows = times.reshape(len(times), -1) if times.ndim else times.reshape(1, 1)
    if (rows != rows[0]).any():
        raise InputError(f"the rows of a call have the timesteps {rows[:, 0].tolist()}, and a step has one; run them one by one")
    layout = architecture.layout(denoiser, given)
    if rows.shape[1] not in (1, layout.frames, layout.tokens):
        raise InputError(
            f"the timestep has shape {tuple(times.shape)}, and there are {layout.frames} frames of {layout.tokens} tokens; give"
            " one for all, one for every row, or (rows, frames) or (rows, tokens)"
        )
    frames = rows[0].reshape(layout.frames if rows.shape[1] > 1 else 1, -1)
    if (frames != frames[:, :1]).any():
        raise InputError("the tokens of a frame have different timesteps, and x0-hat is known where a frame has one")
    timesteps = frames[:, 0].tolist()
    several = len(set(timesteps)) > 1
    if several and (architecture.patches is None or architecture.patches.axes != "cfhw"):
        raise InputError("frames have timesteps of their own, which is known for (batch, channels, frames, rows, columns)")
    return Taken(expert, latents, tuple(timesteps) if several else (timesteps[0],))


def guidance_scale(pipe: Any, inputs: Mapping[str, Any]) -> float:
    """The loop's own guidance scale for these arguments; 1 where it has none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    default = 1.0 if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    return float(inputs.get("guidance_scale", default))


def watch_loop(pipe: Any, architecture: Architecture, inputs: Mapping[str, Any]) -> Forecast:
    """What a run with these arguments will do: the loop runs once, and its denoiser answers with its first output each time.

    Raises:
        InputError: the loop draws its noise where no seed reaches, or does something else than its record says.
    """
    name = type(pipe).__name__
    if "generator" not in inspect.signature(type(pipe).__call__).parameters:
        raise InputError(f"a {name} takes no generator, so that no seed decides its noise; give its __call__ generator=None")
    loop, guidance = loop_of(architecture), architecture.guidance_at(guidance_scale(pipe, inputs))
    seen: list[Taken] = []
    known: dict[str, Any] = {}

    def answering(expert: str, denoiser: nn.Module) -> Callable[..., Any]:
        forward = denoiser.forward

        @functools.wraps(forward)
        def answer(*args: Any, **kwargs: Any) -> Any:
            taken = taken_by(architecture, expert, denoiser, args, kwargs)
            seen.append(replace(taken, latents=taken.latents.clone()))
            if seen[-1].latents.shape != seen[0].latents.shape:
                shapes = [tuple(call.latents.shape) for call in (seen[0], seen[-1])]
                raise InputError(
                    f"the latents of a {name} change from {shapes[0]} to {shapes[1]} on the way, and a run has one shape;"
                    " give the denoiser all frames at every step, or those before as another argument"
                )
            if expert not in known:
                known[expert] = forward(*args, **kwargs)
            return known[expert]

        return answer

    with ExitStack() as attached, torch.no_grad():
        for expert, denoiser in architecture.denoisers(pipe).items():
            attached.enter_context(replaced_attribute(denoiser, "forward", answering(expert, denoiser)))
        pipe(**inputs, generator=torch.Generator().manual_seed(0))
    steps = _steps(name, seen, guidance)
    timesteps = tuple(step.at(loop) for step in steps)
    sigmas = tuple(float(loop.noise(timestep).sigma) for timestep in timesteps)
    return Forecast(timesteps, sigmas, tuple(step.expert for step in steps), guidance.branches, guidance.batched, known)


def _steps(name: str, seen: Sequence[Taken], guidance: Guidance) -> list[Taken]:
    """The first call of every step, where the calls are as the guidance says."""
    says = f"the record says that its guidance is {guidance.kind} ({listed(guidance.branches)})"
    size = 1 if guidance.batched else len(guidance.branches)
    if not seen:
        raise InputError(f"a {name} never calls its denoiser; write experts= of the attributes that hold what it calls")
    apart = [call for place, call in enumerate(seen) if not _same(call, seen[place - place % size])]
    if len(seen) % size or apart:
        raise InputError(
            f"a {name} calls its denoiser {len(seen)} times, not {size} times for each step with the same latents and timestep,"
            f" and {says}"
        )
    if guidance.batched:
        parts = seen[0].latents.chunk(len(guidance.branches))
        if len(parts) < len(guidance.branches) or any(not torch.equal(part, parts[0]) for part in parts):
            raise InputError(f"the {len(seen[0].latents)} rows of a {name}'s call are not those of its branches, and {says}")
    return list(seen[::size])


def _same(one: Taken, other: Taken) -> bool:
    """Whether two calls are of one step."""
    return one.expert == other.expert and one.timesteps == other.timesteps and torch.equal(one.latents, other.latents)


class LoopClock(StepClock):
    """The step clock of a loop without a scheduler.

    Args:
        scale: of guidance, to say what is guided. foreseen: what the loop did when it was watched. The others are as for
            `StepClock`.
    """

    def __init__(self, pipe: Any, architecture: Architecture, scale: float, foreseen: Forecast, **named: Any) -> None:
        super().__init__(pipe, architecture, **named)
        self._loop = loop_of(architecture)
        self._scale = scale
        self._foreseen = foreseen
        self._of_loop: Taken | None = None
        self._made: Tensor | None = None
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
            self.samples.append(self._last_sample())

    def stopping(self, function: Callable[[], Result]) -> Result | None:
        """As that of `StepClock`, remembering what the loop made."""
        output = super().stopping(function)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and self._of_loop is not None and first.shape[1:] == self._of_loop.latents.shape[1:]:
            self._made = to_host(first)
        return output

    def _last_sample(self) -> Tensor:
        """What the last step made."""
        if self._made is not None:
            return self._made
        weights, guided = self.weights[-1], self.outputs[self.step - 1, "guided"]
        return guided if weights is None else weighted(weights, self.samples[-1], guided).to(guided)

    def _begin_call(self, expert: str, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        of_step = 1 if self._guidance.batched else len(self._guidance.branches)
        if self._calls == of_step:
            self._end_step()
        taken = taken_by(self._architecture, expert, denoiser, args, kwargs)
        if self._until is not None and self.step > self._until:
            self._made = to_host(taken.latents[: self.batch])
            raise Stop
        if not self._calls:
            self._check_foreseen(taken)
            # The loop may write into its latents before the step is filed.
            self._of_loop = replace(taken, latents=to_host(taken.latents))
        self._before_call(expert, denoiser, args, kwargs)

    def _check_foreseen(self, taken: Taken) -> None:
        """A step of another kind than was foreseen cannot be selected by what was foreseen of it."""
        steps, timestep = self._foreseen.timesteps, taken.at(self._loop)
        if self.step >= len(steps) or (timestep, taken.expert) != (steps[self.step], self._foreseen.experts[self.step]):
            there = f"timestep {steps[self.step]:g}" if self.step < len(steps) else f"{len(steps)} steps"
            raise InputError(
                f"step {self.step} of a {type(self.pipe).__name__} is at timestep {timestep:g} of {taken.expert}, and when it was"
                f" watched there was {there}: its steps depend on what its denoiser answers, and so cannot be selected"
            )

    def _kept(self, argument: Any) -> Any:
        # A loop of one's own may write into what it gave, as with `latents += ...`.
        return argument.detach().clone() if isinstance(argument, Tensor) else argument

    def _timestep(self) -> float:
        return self._of_step.at(self._loop)

    def _level(self) -> float:
        return float(self._loop.noise(self._timestep()).sigma)

    @property
    def _of_step(self) -> Taken:
        """What the step under way takes."""
        assert self._of_loop is not None
        return self._of_loop

    def _end_step(self) -> None:
        """File what the step that is over did."""
        self.timesteps.append(self.timestep)
        self.sigmas.append(self.sigma)
        self.experts.append(self.expert)
        self.weights.append(self._of_step.weights(self._loop))
        self.samples.append(self._of_step.latents[: self.batch].clone())
        branches = [branch for step, branch in self.outputs if step == self.step]
        formed = {branch: in_form_of(self.samples[-1], self.outputs[self.step, branch]) for branch in branches}
        self.outputs |= {(self.step, branch): output for branch, output in formed.items()}
        self.outputs[self.step, "guided"] = self._guided(formed)
        for branch, call in self._pending.items():
            place: Any = {"expert": self.expert, "step": self.step, "branch": branch}
            levels = (self._foreseen.timesteps, self._foreseen.sigmas)
            self.calls[self.step, branch] = DenoiserCall(
                **place, **call, latents=self.samples[-1], weights=self.weights[-1], levels=levels
            )
        self._pending = {}
        self.step += 1
        self._calls = 0

    def _guided(self, outputs: Mapping[str, Tensor]) -> Tensor:
        if "uncond" not in outputs:
            return outputs["cond"]
        return outputs["uncond"] + self._scale * (outputs["cond"] - outputs["uncond"])


def loop_guidance(forecast: Forecast) -> Guidance:
    """How the branches of a forecast are called."""
    kind = "batched" if forecast.batched else "sequential" if len(forecast.branches) > 1 else "none"
    return Guidance(kind, forecast.branches)
