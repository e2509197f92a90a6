"""Checks that a user runs on a model of their own: does the lens see it truly?

They ask what everything later rests on: that nothing changes when the model is recorded, that every block at every step and
branch is seen under the right label, that both engines see the same, that x0-hat is what the scheduler is led to; and then, of
the first call of each expert, all that `conformance` asks. What is known without the lens comes from a plain run of the
pipeline that was watched from outside. Each is a short run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.architectures import Architecture
from dit_lens.architectures.guidance import asking_for_another
from dit_lens.check_report import Check, CheckReport, Finding, asked
from dit_lens.conformance import Conformance
from dit_lens.errors import InputError, listed
from dit_lens.first_inputs import first_inputs
from dit_lens.knowing import knowing
from dit_lens.pictures import shown
from dit_lens.record import Record
from dit_lens.reducers import norm
from dit_lens.run import Run
from dit_lens.selection import at
from dit_lens.taps import to_host
from dit_lens.watched_run import WatchedRun, watching

ROUNDING = 1e-5
"""How far a decoded video may be from the pipeline's own: some scale the latents in another order."""
LEADS_TO = 0.05
"""How far from its aim, in units of it, a schedule may end that is led there; some end with a little noise."""


def check(lens: Any, inputs: Mapping[str, Any] | None = None) -> CheckReport:
    """Every check on a lens (a `dit_lens.Lens`); see `Lens.check`.

    Args:
        inputs: arguments of the pipeline; what is not given is chosen (see `first_inputs`).
    """
    checks = Checks(lens, first_inputs(lens.pipe, inputs))
    return CheckReport((*checks.of_runs(), *checks.of_denoisers()))


class Checks:
    """The checks of one lens, on runs with the same arguments."""

    def __init__(self, lens: Any, inputs: Mapping[str, Any]) -> None:
        self.lens, self.inputs = lens, dict(inputs)
        self.architecture: Architecture = lens.discover(**inputs)
        self.denoisers: dict[str, nn.Module] = self.architecture.denoisers(lens.pipe)
        # What the lens refuses to run is refused here too, before anything else.
        self.bare: Run = lens.run(**inputs, decode=False)

    def of_runs(self) -> list[Check]:
        """Those of whole runs."""
        questions: dict[str, Callable[[], Finding]] = {
            "recording nothing leaves the pipeline as it is": lambda: self.as_plain(self.bare),
            "recording every site of every block leaves it as it is": lambda: self.as_plain(self.recorded),
            "every block, site, step and branch is recorded once, under its timestep": self.labels,
            "a prompt reaches its own branch": self.branches,
            "nnsight and plain hooks record the same": self.engines,
            "a denoiser that answers with an x0-hat leads there": self.leads_to,
            "the result is the pipeline's own": self.result,
            "decoding the last latents gives the result": self.decoding,
        }
        return asked(questions)

    def of_denoisers(self) -> list[Check]:
        """Those of every expert, on its first call."""
        return [check for expert in self.denoisers for check in self.conformance(expert)]

    # The runs that several checks look at.

    @cached_property
    def plain(self) -> WatchedRun:
        """The pipeline alone."""
        with watching(self.lens.pipe, self.denoisers) as seen:
            output = self.lens.plain(**self._taken(output_type="latent"))
        seen.returned = output if isinstance(output, Tensor) else next(iter(vars(output).values()), None)
        return seen

    @cached_property
    def recorded(self) -> Run:
        """Recording the norms of everything."""
        return self.lens.run(**self.inputs, decode=False, record=self._everything())

    def _everything(self) -> list[Record]:
        return [Record(at(site="all", stream=stream), reduce=norm) for stream in self.architecture.streams]

    def _taken(self, **more: Any) -> dict[str, Any]:
        """The arguments with more of them, if the pipeline takes these."""
        parameters = inspect.signature(type(self.lens.pipe).__call__).parameters
        return {**self.inputs, **{name: value for name, value in more.items() if name in parameters}}

    # The checks.

    def as_plain(self, run: Run) -> Finding:
        """The scheduler received and made the same, to the bit; but in frames whose place an image takes."""
        if not self.plain.received:
            return None, "the loop has no scheduler to look at"
        expected = [*self.plain.received, self.plain.made]
        pairs = [
            (_without(one, run.held), _without(other[: len(one)], run.held))
            for one, other in zip(run.latents, expected, strict=False)
        ]
        differing = [(one.float() - other.float()).abs().max().item() for one, other in pairs]
        if len(run.latents) == len(expected) and all(torch.equal(one, other) for one, other in pairs):
            held = f" but in the frames {listed(map(str, run.held))}, which hold an image" if run.held else ""
            return True, f"{len(pairs) - 1} steps, bit-identical{held}"
        return False, f"differs by up to {max(differing):.3g}"

    def labels(self) -> Finding:
        """Every block of every expert that ran, at every step, branch, site and stream, once, and each step as it was."""
        run, foreseen = self.recorded, self.lens.forecast(**self.inputs)
        blocks = {name: self.architecture.blocks(module) for name, module in self.denoisers.items()}
        expected = {
            (step, expert, branch, number, *place)
            for step, expert in enumerate(run.experts)
            for branch in run.branches
            for number, block in enumerate(blocks[expert])
            for place in block.stack.offered
        }
        cells = [(cell.step, cell.expert, cell.branch, cell.block, cell.site, cell.stream) for cell in run.activations.cells]
        same = len(cells) == len(expected) and set(cells) == expected
        plain = (tuple(self.plain.timesteps), tuple(self.plain.experts))
        if plain[0] and (run.timesteps, run.experts) != plain:
            return False, f"the timesteps {listed(f'{one:g}' for one in run.timesteps)}, or experts, are not the pipeline's"
        if (foreseen.timesteps, foreseen.experts) != (run.timesteps, run.experts):
            return False, "the forecast is not what the run does"
        idle = [name for name in self.denoisers if name not in run.experts]
        more = f", {listed(idle)} did not run: more steps, or other ones, show it too" if idle else ""
        return same, f"{len(set(cells) & expected)} of {len(expected)} cells ({', '.join(run.branches)}){more}"

    def branches(self) -> Finding:
        """Another prompt changes what is conditional, and nothing of what is not; another negative prompt the other way round."""
        before = self._first_step(self.inputs)
        heard = self._heard(before, asking_for_another(self.inputs))
        if not heard:
            return None, "another prompt changes nothing"
        if "cond" not in heard or "uncond" in heard:
            return False, f"another prompt changes {listed(heard)}"
        said = [f"the prompt changes {listed(heard)}"]
        if "uncond" in before.branches and isinstance(self.inputs.get("negative_prompt"), str):
            other = " ".join(reversed(self.inputs["negative_prompt"].split()))
            heard = self._heard(before, {**self.inputs, "negative_prompt": other})
            if heard not in (["uncond"], []):
                return False, f"another negative prompt changes {listed(heard)}"
            said.append(f"the negative one {listed(heard) or 'nothing'}")
        return True, ", ".join(said)

    def _first_step(self, inputs: Mapping[str, Any]) -> Run:
        last = len(self.architecture.block_list(next(iter(self.denoisers.values())))) - 1
        return self.lens.run(**inputs, until=0, decode=False, record=at(step=0, block=last, frames=0))

    def _heard(self, before: Run, inputs: Mapping[str, Any]) -> list[str]:
        """The branches whose output, and whose stream after the last block, are others with these arguments."""
        after = self._first_step(inputs)
        seen = [
            [branch for branch in before.branches if not _same(*(run.outputs[branch][0] for run in (before, after)))],
            [
                branch
                for branch in before.branches
                if not _same(*(run.activations.one(None, branch=branch) for run in (before, after)))
            ],
        ]
        if seen[0] != seen[1]:
            return [f"{listed(seen[0]) or 'no'} outputs and {listed(seen[1]) or 'no'} activations"]
        return seen[0]

    def engines(self) -> Finding:
        """Both engines record the same bits."""
        other = copy.copy(self.lens)
        vars(other).pop("_engine", None)
        other.engine = "hooks" if self.lens.engine == "nnsight" else "nnsight"
        again = other.run(**self.inputs, decode=False, record=self._everything())
        pairs = list(zip(self.recorded.activations, again.activations, strict=True))
        differing = sum(a.cell != b.cell or not torch.equal(a.tensor, b.tensor) for a, b in pairs)
        return not differing, f"{len(pairs) - differing} of {len(pairs)} bit-identical"

    def leads_to(self) -> Finding:
        """A denoiser whose every answer has the same x0-hat, by the run's weights, brings the scheduler to it."""
        clean = self.bare
        if not self.plain.received:
            return None, "the loop has no scheduler to lead"
        if any(weights is None for weights in clean.weights):
            return None, "there is no x0-hat at a step: the sample is pure noise, the output epsilon"
        aim = torch.randn(clean.latents[0].shape, generator=torch.Generator().manual_seed(2))
        with knowing(self.lens.pipe, self.denoisers, clean, aim):
            run = self.lens.run(**self.inputs, decode=False)
        aim = _without(aim, run.held)
        bets = max(_relative(_without(run.x0_hat(step), run.held), aim) for step in range(run.steps))
        if bets > LEADS_TO:
            return False, f"x0-hat is {bets:.1g} away from what was answered"
        end = _relative(_without(run.latents[-1], run.held), aim)
        return end < LEADS_TO, f"ends {end:.1g} away"

    def result(self) -> Finding:
        """What a run shows is what the pipeline alone shows."""
        ours = self.decoded.video
        theirs = shown(self.lens.plain(**self._taken(output_type="pt")))
        if ours is None or theirs is None:
            return None, "it shows neither pictures nor video"
        return _equal(ours, theirs)

    @cached_property
    def decoded(self) -> Run:
        """A run to its result."""
        return self.lens.run(**self.inputs)

    def decoding(self) -> Finding:
        """Decoding a run's last latents gives its video, up to rounding."""
        if getattr(self.lens.pipe, "vae", None) is None:
            return None, "the pipeline has no VAE"
        if self.decoded.video is None:
            return None, "it shows neither pictures nor video"
        shape, last = self.decoded.video.shape, self.decoded.latents[-1]
        returned = self.plain.returned
        if isinstance(returned, Tensor) and returned.shape == last.shape and not torch.equal(last, to_host(returned).to(last)):
            return None, "the pipeline changes its latents after the last step, and shows others"
        try:
            found = self.lens.decode(last)
        except InputError as refusal:
            return None, str(refusal)
        if (*found.shape[:1], *found.shape[2:]) != (*shape[:1], *shape[2:]) or found.shape[1] < shape[1]:
            return False, f"{tuple(found.shape)} for {tuple(shape)}"
        if found.shape[1] > shape[1]:
            # Latents of reference pictures come before those of the video, and are cut off before these are decoded.
            return None, f"the pipeline shows {shape[1]} frames, and its latents hold {found.shape[1]}"
        error = (found - self.decoded.video).abs().max().item()
        return error < ROUNDING, f"differs by up to {error:.1g}" if error else "bit-identical"

    def conformance(self, expert: str) -> list[Check]:
        """What is asked of one expert, on its first call."""
        prefix = f"{expert}: " if len(self.denoisers) > 1 else ""
        if expert not in self.plain.first:
            return [Check(f"{prefix}its blocks", None, "it was not called in this run")]
        architecture = replace(self.architecture, experts=(expert,))
        found = Conformance(self.denoisers[expert], architecture, self.plain.first[expert])
        return [Check(f"{prefix}{one.name}", one.passed, one.found) for one in found.checks()]


def _without(latents: Tensor, held: Sequence[int]) -> Tensor:
    """Latents without the frames that hold an image."""
    if not held:
        return latents
    return latents[:, :, [frame for frame in range(latents.shape[2]) if frame not in held]]


def _same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _equal(found: Tensor, expected: Tensor) -> Finding:
    """Two results, bit for bit."""
    if found.shape != expected.shape:
        return False, f"{tuple(found.shape)} for {tuple(expected.shape)}"
    if torch.equal(found, expected):
        return True, "bit-identical"
    return False, f"differs by up to {(found.float() - expected.float()).abs().max():.3g}"


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()
