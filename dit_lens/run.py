"""One run: what a pipeline call did, from the noise to the video, and what was recorded on the way.

A diffusion run is a trajectory. At each step the scheduler receives the noisy latents and the denoiser's guided output;
from both follows x0-hat, the clean video that the model would bet on if it had to stop here. A `Run` holds the whole
trajectory on the CPU, so that any of it can be looked at after the model is gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_lens.activations import Activations, Entry
from dit_lens.architectures import Layout
from dit_lens.calls import DenoiserCall
from dit_lens.errors import InputError, listed
from dit_lens.noise import signed, weighted
from dit_lens.selection import Cell

FORMAT = 1
"""Version of the folder that `Run.save` writes."""


@dataclass(frozen=True, eq=False)
class Run:
    """One call of the pipeline with its trajectory. All tensors are on the CPU.

    Attributes:
        seeds, prompts: one for each row of the batch, prompt-major.
        layout: the (frames, height, width) order of the visual tokens.
        scheduler: class name of the scheduler.
        timesteps, sigmas, experts: one entry per step; a step is one `scheduler.step` call.
        branches: the guidance branches that ran; `guided` is what the scheduler received.
        latents: what the scheduler received at each step, then what it made last.
        outputs: the denoiser's output by branch, and `guided`; step for step.
        weights: (a, b) of x0-hat = a * latents + b * output for each step, or None where there is no x0-hat.
        video: values in [0, 1] (its frames and pixels are not those of the latents), or None when it was not decoded.
        activations: what was recorded.
        fired: how often each edit was applied, by its place in `edits=`.
        text_tokens: number of text tokens that the denoiser read, padding included; None where it reads no text.
        calls: every call of a denoiser by (step, branch), when they were asked for; on the model's device, and not saved.
        sign: -1 where the pipeline negates what the denoiser returns before the scheduler receives it.
        held: latent frames in which the pipeline shows the denoiser something clean instead of the scheduler's latents, as
            the image that a Wan of the 5B form starts from; `latents` and x0-hat have that there.
    """

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    layout: Layout
    scheduler: str
    timesteps: tuple[float, ...]
    sigmas: Float[Tensor, " steps"]
    experts: tuple[str, ...]
    branches: tuple[str, ...]
    latents: Float[Tensor, "steps+1 batch ..."]
    outputs: Mapping[str, Float[Tensor, "steps batch ..."]] = field(repr=False)
    weights: tuple[tuple[float, float] | None, ...] = field(repr=False)
    video: Float[Tensor, "batch video_frames video_height video_width 3"] | None = None
    activations: Activations = field(default_factory=Activations)
    fired: Mapping[int, int] = field(default_factory=dict)
    text_tokens: int | None = None
    calls: Mapping[tuple[int, str], DenoiserCall] = field(default_factory=dict, repr=False)
    sign: int = 1
    held: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """Number of rows: prompts times seeds."""
        return self.latents.shape[1]

    @property
    def steps(self) -> int:
        """Number of `scheduler.step` calls."""
        return len(self.timesteps)

    def velocity(self, step: int, branch: str = "guided") -> Float[Tensor, "batch ..."]:
        """The denoiser's output at a step, of one branch or guided, as it came.

        In flow matching that is the velocity noise - x0 (x0 - noise where the scheduler has `invert_sigmas`); with other
        schedulers it is what they call their prediction.
        """
        if branch not in self.outputs:
            raise InputError(f"this run has no branch {branch!r}; write one of {listed(self.outputs)}")
        return self.outputs[branch][self._step(step)]

    def answers(self, before: int | None = None) -> dict[tuple[int, str], Tensor]:
        """The denoiser's outputs by (step, branch), for the `answers=` of a run that begins as this one did.

        Args:
            before: the first step that is left out; all steps are in when left out.
        """
        steps = self.steps if before is None else self._step(before)
        return {(step, branch): self.outputs[branch][step] for step in range(steps) for branch in self.branches}

    def x0_hat(self, step: int, branch: str = "guided") -> Float[Tensor, "batch ..."]:
        """The clean latents that the denoiser's output at a step implies, in float32.

        Args:
            step: index of the step, negative from the end.
            branch: guided (what the scheduler received), cond, uncond or another of `branches`.

        Raises:
            InputError: there is no such step or branch, or the output implies no clean sample there.
        """
        output = self.velocity(step, branch)
        weights = signed(self.weights[self._step(step)], 1 if branch == "guided" else self.sign)
        if weights is None:
            raise InputError(f"there is no x0-hat at step {step}: the sample is pure noise, the output epsilon")
        return weighted(weights, self.latents[self._step(step)], output, self.held)

    def activation(
        self,
        block: int | None = None,
        step: int | None = None,
        branch: str = "cond",
        site: str = "resid",
        expert: str | None = None,
        stream: str = "visual",
        record: int | None = None,
    ) -> Tensor:
        """One recorded activation, in the shape that its reducer gave it.

        Args:
            block, step, branch, site, expert, stream: the cell; what is left out must be unambiguous.
            record: place of the record in `record=`, where several recorded the cell.

        Raises:
            InputError: nothing, or more than one activation, was recorded there.
        """
        return self.activations.one(record, block=block, step=step, branch=branch, site=site, expert=expert, stream=stream)

    def rows(self, places: Sequence[int]) -> Run:
        """The run of some rows of the batch, in the order given; its trajectory and video, without activations and calls.

        Raises:
            InputError: there is no such row.
        """
        outside = [place for place in places if not 0 <= place < self.batch]
        if outside or not places:
            raise InputError(f"rows {listed(outside) or 'none'}: this run has {self.batch}, write some of 0 to {self.batch - 1}")
        chosen = list(places)
        return replace(
            self,
            seeds=tuple(self.seeds[place] for place in chosen),
            prompts=tuple(self.prompts[place] for place in chosen),
            latents=self.latents[:, chosen],
            outputs={branch: output[:, chosen] for branch, output in self.outputs.items()},
            video=None if self.video is None else self.video[chosen],
            activations=Activations(),
            calls={},
        )

    @staticmethod
    def joined(runs: Sequence[Run]) -> Run:
        """Runs of one schedule and layout as one, row after row; without activations and calls.

        Raises:
            InputError: there are none, or they differ in schedule, layout, branches or edits.
        """
        if not runs:
            raise InputError("there are no runs to join")
        first = runs[0]
        same = ("layout", "scheduler", "timesteps", "experts", "branches", "weights", "fired", "text_tokens", "sign", "held")
        for other in runs[1:]:
            differing = [name for name in same if getattr(other, name) != getattr(first, name)]
            if differing:
                raise InputError(f"runs that differ in {listed(differing)} cannot be joined; join those of one schedule and size")
        videos = [run.video for run in runs if run.video is not None]
        return replace(
            first,
            seeds=tuple(seed for run in runs for seed in run.seeds),
            prompts=tuple(prompt for run in runs for prompt in run.prompts),
            latents=torch.cat([run.latents for run in runs], dim=1),
            outputs={branch: torch.cat([run.outputs[branch] for run in runs], dim=1) for branch in first.outputs},
            video=torch.cat(videos) if len(videos) == len(runs) else None,
            activations=Activations(),
            calls={},
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the run as `run.safetensors` and `run.json`; a run that is there already is replaced.

        Raises:
            InputError: the folder cannot be written to; nothing half-written is left.
        """
        target = Path(folder)
        tensors = {"latents": self.latents, "sigmas": self.sigmas}
        tensors |= {f"outputs.{branch}": output for branch, output in self.outputs.items()}
        tensors |= {f"activations.{index}": entry.tensor for index, entry in enumerate(self.activations)}
        if self.video is not None:
            tensors["video"] = self.video
        labels = {name: getattr(self, name) for name in _LABELS} | {
            "format": FORMAT,
            "layout": asdict(self.layout),
            "fired": list(self.fired.items()),  # the keys of a JSON object would be strings
            "activations": [
                {"cell": asdict(entry.cell), "record": entry.record, "reduce": entry.reduce, "part": entry.part}
                for entry in self.activations
            ],
        }
        partial = [target / "run.safetensors.partial", target / "run.json.partial"]
        try:
            target.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial[0])
            partial[1].write_text(json.dumps(labels, indent=1), encoding="utf-8")
            for path in partial:
                path.replace(path.with_suffix(""))
        except (OSError, SafetensorError) as error:
            for path in partial:
                with suppress(OSError):
                    path.unlink()
            raise InputError(f"cannot write the run to {target}: {error}") from error

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Run:
        """Read a run that `save` wrote.

        Raises:
            InputError: the folder holds no run, or a damaged one.
        """
        source = Path(folder)
        try:
            labels = json.loads((source / "run.json").read_text(encoding="utf-8"))
            tensors = load_file(source / "run.safetensors")
        except FileNotFoundError as error:
            missing = Path(error.filename or "run.safetensors").name
            raise InputError(f"{source} holds no run: there is no {missing}") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the run in {source} cannot be read: {error}") from error
        if labels.get("format") != FORMAT:
            raise InputError(f"the run in {source} has format {labels.get('format')}, and this version reads {FORMAT}")
        entries = [
            Entry(Cell(**label["cell"]), label["record"], label["reduce"], tensors[f"activations.{index}"], label["part"])
            for index, label in enumerate(labels["activations"])
        ]
        outputs = {name: tensors[f"outputs.{name}"] for name in ("guided", *labels["branches"])}
        weights = tuple(None if pair is None else tuple(pair) for pair in labels["weights"])
        return Run(
            **{name: _tuple(labels[name]) for name in _LABELS if name in labels and name != "weights"},
            weights=weights,
            layout=Layout(**labels["layout"]),
            fired=dict(labels["fired"]),
            sigmas=tensors["sigmas"],
            latents=tensors["latents"],
            outputs=outputs,
            video=tensors.get("video"),
            activations=Activations(entries),
        )

    def _step(self, step: int) -> int:
        if not -self.steps <= step < self.steps:
            raise InputError(f"step {step} is out of range: there are {self.steps} steps, write 0 to {self.steps - 1}")
        return step % self.steps


_LABELS = ("seeds", "prompts", "scheduler", "timesteps", "experts", "branches", "weights", "text_tokens", "sign", "held")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
