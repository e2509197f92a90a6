"""Runs into which noise was put, made once for the experiments that read them: `noise` and `propagation`.

An `Arm` says where noise goes and how (arms.py). `NoisedRuns` makes the runs of its arms for groups of samples, and keeps of
each what the two experiments need: what became of the answer, how much of the latents was destroyed, and how far the run is
from the unedited one at later steps. Each run starts with the unedited run's own velocities up to the first step that gets noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics, provenance, reasoner
from dit_lens.experiment import Context, Part
from dit_lens.reasoner import Task, board
from experiments import arms
from experiments.arms import Arm, How

FOLDER = "noised-runs"
STATES = "x0-hat"
"""Name of the place, beside depths, at which two runs are compared."""


@dataclass(frozen=True)
class Settings:
    """What shapes the runs that are shared.

    ``places`` are the steps that get noise, as points along the schedule (0 the first step, 1 the last), and ``later`` those at
    which runs are compared, ``depths`` the relative depths (0 the first block, 1 the last) of the streams compared, of which at
    most ``tokens`` evenly spaced tokens are taken; ``batch`` is rows per pipeline call.
    """

    tasks: tuple[str, ...] = ("maze-loops", "tictactoe")
    samples: int = 1
    batch: int = 4
    places: tuple[float, ...] = (0, 0.15, 0.4, 0.75)
    later: tuple[float, ...] = (0, 0.15, 0.4, 0.75, 1)
    depths: tuple[float, ...] = (0.25, 0.5, 0.9)
    tokens: int = 512


FULL: dict[str, Any] = {
    "tasks": ("maze", "maze-loops", "tictactoe"),
    "samples": 100,
    "batch": 300,
    "places": tuple(np.linspace(0, 1, 20).tolist()),
    "later": (*np.linspace(0, 18 / 19, 10).tolist(), 1),
}
"""The full preset of what is shared: every step of 20 gets noise, and every other one is compared."""


class Reference:
    """The unedited runs of a group of samples (seed 0), and how another run of them is compared with these."""

    def __init__(self, context: Context, samples: Sequence[Any], settings: Settings) -> None:
        self.context, self.samples, self.settings, self.lens = context, list(samples), settings, context.lens
        self.inputs = context.inputs(self.samples)
        self.clean: dl.Run = context.clean(self.samples)
        self.later = steps_at(settings.later, self.clean.steps)
        assert self.clean.video is not None
        self.outcome = outcomes(self.clean.video, self.samples)

    @cached_property
    def hidden(self) -> dict[tuple[int, int], Tensor]:
        """Streams of the unedited run by (step, block), on the model's device; made by running it again."""
        return self._again[0]

    @property
    def again(self) -> np.ndarray:
        """Distances of that second run from the first: nothing but rounding."""
        return self._again[1]

    @cached_property
    def _again(self) -> tuple[dict[tuple[int, int], Tensor], np.ndarray]:
        kept: dict[tuple[int, int], Tensor] = {}

        def keep(activation: Tensor, cell: dl.Cell) -> Tensor:
            kept[cell.step, cell.block] = self.some(activation).clone()
            return activation.new_zeros(len(activation))

        run = self.recorded(self.clean, 0, keep)
        return kept, self.distances(run)

    def recorded(self, clean: dl.Run, seed: int, reduce: Callable[[Tensor, dl.Cell], Tensor]) -> dl.Run:
        """An unedited run once more, for its activations; calls in which nothing is recorded are known from the first time."""
        known = {place: answer for place, answer in clean.answers().items() if place[1] != "cond" or place[0] not in self.later}
        return self.lens.run(**self.inputs, seed=seed, record=self.records(0, reduce), answers=known, decode=False)

    def records(self, first: int, reduce: Callable[[Tensor, dl.Cell], Tensor]) -> list[dl.Record]:
        """What is recorded from a step on: the stream after the blocks at the relative depths, on the cond branch."""
        blocks = self.lens.extent(**self.inputs).blocks
        steps = {expert: [i for i in self.later if i >= first and self.clean.experts[i] == expert] for expert in blocks}
        return [
            dl.Record(dl.at(step=chosen, expert=expert, block=self.blocks(blocks[expert]), branch="cond"), reduce)
            for expert, chosen in steps.items()
            if chosen
        ]

    def blocks(self, count: int) -> list[int]:
        """The blocks at the relative depths, among so many."""
        return [round(depth * (count - 1)) for depth in self.settings.depths]

    def some(self, activation: Tensor) -> Tensor:
        """Evenly spaced tokens of an activation, as (batch, tokens, channels)."""
        tokens = activation.flatten(1, 3)
        if tokens.shape[1] <= self.settings.tokens:
            return tokens
        places = torch.linspace(0, tokens.shape[1] - 1, self.settings.tokens).round().long()
        return tokens[:, places.to(tokens.device)]

    def against(self, activation: Tensor, cell: dl.Cell) -> Tensor:
        """A reducer: CKA dissimilarity and relative L2 distance from the unedited run's stream, (batch, 2)."""
        return apart(self.some(activation), self.hidden[cell.step, cell.block].to(activation.device))

    def row(self, arm: Arm, run: dl.Run) -> pd.DataFrame:
        """What became of the runs of an arm, and its dose."""
        assert run.video is not None
        table = compared(outcomes(run.video, self.samples), self.outcome)
        doses = arms.dose(arm, self.clean, self.samples, self.lens.pipe.scheduler)
        return pd.concat([table, doses], axis=1).assign(**arms.labels(arm, self.clean, self.samples))

    def distances(self, run: dl.Run, first: int = 0) -> np.ndarray:
        """CKA dissimilarity and L2 distance from the unedited run, (later, place, rows, 2); nan before the step ``first``.

        Places are x0-hat and the depths (nan where they were not recorded).
        """
        found = np.full((len(self.later), 1 + len(self.settings.depths), run.batch, 2), np.nan, dtype=np.float32)
        for index, step in enumerate(self.later):
            if step >= first:
                # Kept on the CPU, compared on the model's device: in float64, where a CPU is slow.
                pair = [one.x0_hat(step).to(self.lens.pipe.device).flatten(2).mT for one in (run, self.clean)]
                found[index, 0] = apart(*pair).cpu().numpy()
        counts = self.lens.extent(**self.inputs).blocks
        for entry in run.activations:
            blocks = self.blocks(counts[entry.cell.expert])
            for place in [i for i, block in enumerate(blocks) if block == entry.cell.block]:
                if entry.tensor.ndim == 2:
                    found[self.later.index(entry.cell.step), 1 + place] = entry.tensor.numpy()
        return found


def apart(one: Tensor, other: Tensor) -> Tensor:
    """CKA dissimilarity, and L2 distance over the norm of the other, of (batch, tokens, channels): (batch, 2)."""
    change, norm = ((tensor.double()).flatten(1).norm(dim=1) for tensor in (one.double() - other.double(), other))
    return torch.stack([1 - metrics.linear_cka(one, other), change / norm], dim=1).float()


def steps_at(places: Sequence[float], count: int) -> list[int]:
    """The steps at places along a schedule of so many."""
    return sorted({round(place * (count - 1)) for place in places})


def outcomes(video: Tensor, samples: Sequence[Any]) -> pd.DataFrame:
    """What a video did, a row for each sample.

    ``right``; ``which`` legal answer it shows (nan for none) and whether it is ``legal``, whatever happened to the rest of the
    board; ``answer`` in words; ``damage``: the share of squares that no legal answer touches and that are not as in the first
    frame, over all frames, and ``damage_last`` in the last.
    """
    pixels = metrics.resized(video, *samples[0].image.size[::-1]).numpy()
    read = board.read(pixels)
    rows = []
    for sample, clip, boards in zip(samples, pixels, read, strict=True):
        # Tasks that judge boards need not read them again; those that judge pixels have scores of their own.
        judges = type(sample.task).scores is Task.scores
        score = sample.task.judge(boards, sample) if judges else sample.task.scores(clip[None], [sample])[0]
        changed = (boards != sample.boards[0])[:, sample.untouched]
        rows.append(
            {
                "task": sample.task.name,
                "sample": sample.index,
                "cluster": f"{sample.task.name}/{sample.index}",
                "several": len(sample.answers) > 1,
                "right": score.right,
                "legal": score.which is not None,
                "which": np.nan if score.which is None else float(score.which),
                "answer": "" if score.answer is None else repr(score.answer),
                "damage": float(changed.mean()),
                "damage_last": float(changed[-1].mean()),
            }
        )
    return pd.DataFrame(rows)


def compared(outcome: pd.DataFrame, clean: pd.DataFrame) -> pd.DataFrame:
    """Outcomes beside those of the unedited runs of the same samples.

    ``same``: the answer is that of the unedited run (nan where that shows none); ``changed``: the opposite; ``rerouted``: both
    are right, and with different answers (nan where not both are right, or only one answer is legal).
    """
    shown, both = clean["answer"] != "", outcome["right"] & clean["right"] & outcome["several"]
    same = (outcome["answer"] == clean["answer"]).astype(float).where(shown)
    rerouted = (outcome["which"] != clean["which"]).astype(float).where(both)
    return outcome.assign(same=same, changed=1 - same, rerouted=rerouted, clean_right=clean["right"])


class NoisedRuns:
    """The shared runs of an experiment's samples; see above."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings(**{field.name: getattr(context.settings, field.name) for field in fields(Settings)})
        tasks = reasoner.named(self.settings.tasks).values()
        samples = [task.sample("test", i) for i in range(self.settings.samples) for task in tasks]
        self.groups = [samples[first : first + self.settings.batch] for first in range(0, len(samples), self.settings.batch)]
        facts = {**asdict(self.settings), "arms": provenance.code_hash(Path(arms.__file__))}
        mark = provenance.fingerprint(context.lens, facts, context.arguments, Path(__file__))
        folder = context.folder.parent / FOLDER
        self._stored = Context(context.lens, self.settings, folder, context.name, mark, context.arguments)
        self._last: tuple[int, Reference] | None = None
        ahead = context.lens.forecast(**context.inputs(samples[:1]))
        self.clock = [
            {"step": i, "sigma": sigma, "timestep": ahead.timesteps[i], "expert": ahead.experts[i]}
            for i, sigma in enumerate(ahead.sigmas)
        ]
        self.count = len(self.clock)
        self.later = steps_at(self.settings.later, self.count)

    def reference(self, group: int) -> Reference:
        """The unedited runs of a group; those of one group are held at a time."""
        if self._last is None or self._last[0] != group:
            self._last = None
            self._last = (group, Reference(self.context, self.groups[group], self.settings))
        return self._last[1]

    def units(self, stage: str, jobs: Mapping[str, Callable[[], Part]]) -> dict[str, Part]:
        """As `Context.units`, in the folder that experiments share; the experiment's own count and time go on."""
        found = self._stored.units(stage, jobs)
        for name, value in self._stored.counts.items():
            self.context.counts[name] += value
        self.context.seconds += self._stored.seconds
        self._stored.counts, self._stored.seconds = dict.fromkeys(self._stored.counts, 0), 0.0
        return found

    def unedited(self) -> list[Part]:
        """For each group, the outcomes of seed 0 and of seed 1, and distances: seed 1 from seed 0, and seed 0 run again."""
        jobs = {f"group-{group}": partial(self._unedited, group) for group in range(len(self.groups))}
        return list(self.units("unedited", jobs).values())

    def at_steps(self) -> Iterator[tuple[Arm, Part]]:
        """Noise in all frames at each of the places, replaced and sigma-matched, with distances.

        At sigma 1 the two are the same noise, and the second is a copy of the first.
        """
        steps = steps_at(self.settings.places, self.count)
        hows: tuple[How, ...] = ("replaced", "sigma-matched")
        every = [Arm("step", how, (step,)) for how in hows for step in steps]
        made = [arm for arm in every if arm.how == "replaced" or self.clock[arm.steps[0]]["sigma"] != 1]
        for arm, part in self.run(made, "steps", distances=True):
            yield arm, part
            if arm.how == "replaced" and self.clock[arm.steps[0]]["sigma"] == 1:
                yield replace(arm, how="sigma-matched"), replace(part, table=part.table.assign(how="sigma-matched"))

    def run(self, wanted: Sequence[Arm], stage: str, distances: bool = False) -> list[tuple[Arm, Part]]:
        """The parts of these arms, group by group.

        An arm at all steps also brings its runs without noise at the last step. The film of a part is of its first row.
        """
        places = [(group, arm) for group in range(len(self.groups)) for arm in dict.fromkeys(wanted)]
        jobs = {f"{arm.key}-group-{group}": partial(self._measure, group, arm, distances) for group, arm in places}
        return [(arm, part) for (_, arm), part in zip(places, self.units(stage, jobs).values(), strict=True)]

    def _unedited(self, group: int) -> Part:
        reference = self.reference(group)
        first = compared(reference.outcome, reference.outcome).assign(kind="clean", seed=0)
        first["latent_frames"] = reference.clean.latents.shape[3]
        clean = self.context.clean(reference.samples, [1])
        assert clean.video is not None
        other = compared(outcomes(clean.video, reference.samples), reference.outcome).assign(kind="other seed", seed=1)
        _ = reference.hidden  # before a run is under way that compares with it
        seeds = reference.distances(reference.recorded(clean, 1, reference.against))
        arrays = {"other seed": seeds, "again": reference.again, "film": _film(reference.clean.video, reference.samples)}
        return Part(pd.concat([first, other], ignore_index=True), arrays)

    def _measure(self, group: int, arm: Arm, distances: bool) -> Part:
        reference = self.reference(group)
        clean, samples = reference.clean, reference.samples
        record = []
        if distances:
            _ = reference.hidden
            record = reference.records(arm.steps[0], reference.against)
        frames = clean.latents.shape[3]
        run = self.context.lens.run(
            **reference.inputs,
            seed=0,
            edits=arm.edits(samples, frames),
            answers=clean.answers(before=arm.steps[0]),
            record=record,
        )
        found = [(arm, run)]
        if len(arm.steps) == self.count > 1:
            but_last = replace(arm, steps=arm.steps[:-1])
            edits, known = but_last.edits(samples, frames), run.answers(before=self.count - 1)
            found.append((but_last, self.context.lens.run(**reference.inputs, seed=0, edits=edits, answers=known)))
        tables = [reference.row(one, each) for one, each in found]
        arrays = {"film": np.stack([_film(each.video, samples) for _, each in found])}
        if distances:
            arrays["distances"] = reference.distances(run, arm.steps[0])
        return Part(pd.concat(tables, ignore_index=True), arrays)


def _film(video: Tensor | None, samples: Sequence[Any]) -> np.ndarray:
    """The first row as uint8 (frames, height, width, 3), in the size of the sample."""
    assert video is not None
    pixels = metrics.resized(video[:1], *samples[0].image.size[::-1])[0]
    return (pixels.numpy() * 255).round().astype(np.uint8)
