"""Probe map: what can be read from the stream, block by block and step by step (paper 2603.16870, sections 4.3 and 5).

Ridge probes read the tokens of the last latent frame, where the answer will stand (of the middle one, for what is hidden
there). They are asked the targets of every task: *perceptual* ones are seen in the first frame, *reasoning* ones follow from
it, *consolidation* ones are what the model itself then wrote, right or wrong (`painted`: any square that its video changed).
`which` asks, where answers differ and the model drew a legal one, for the answer that it drew. `probes.targets` has them all.

Every sample has noise of its own: the stream carries the noise, and what samples share must not be on both sides of a split.
Puzzles, with all their turned and mirrored copies and wordings, are either in training or in testing; penalties are chosen
inside the training part. Beside every score stand

* its control task (a random label for every place on the board) and its selectivity, the score less the control's;
* shuffled labels, those of other samples at the same places;
* an untrained model of the same architecture, run with the same prompts, pictures and noise along its own way, and asked
  for what the trained one drew;
* baselines without activations: the place; in mazes also the situation of the room; the noisy latents that the step takes.

The timestep is a baseline too, and a dull one: within a step it is the same for all tokens, so it tells them apart by chance
only. It is in the table, and in the figures as the line at chance.

Few targets are looked at more closely, in fewer samples: by logistic, mass-mean and nonlinear probes and by code length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import controls, reasoner
from dit_lens.experiment import Context, Experiment, Part
from experiments import probe_figures as figures
from experiments.probe_figures import TRAINED, UNTRAINED
from probes.closer import Closer
from probes.maps import PROBE, drawn_by, observe, read_map
from probes.observed import check_squares
from probes.targets import ALL, headlines, targets


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule (0 the first step, 1 the last), and ``closer_places`` those of them where
    ``closer_samples`` of the ``samples`` are looked at more closely; ``batch`` is rows per pipeline call. ``workers`` are
    processes that fit probes, 0 for one on each core; the results do not depend on it."""

    tasks: tuple[str, ...] = ("maze",)
    samples: int = 20
    batch: int = 10
    places: tuple[float, ...] = (0, 0.05)
    branches: tuple[str, ...] = ("cond",)
    test_share: float = 0.5
    closer_places: tuple[float, ...] = (0,)
    closer_samples: int = 20
    workers: int = 0


def read(context: Context, task: reasoner.Task, untrained: Callable[[], Any] | None = None) -> Part:
    """Observe all samples of a task, and read every target at every cell: of the trained model, or of another one."""
    settings = context.settings
    samples = [task.sample("test", index) for index in range(settings.samples)]
    inputs = context.inputs(samples[:1])
    steps = context.steps(inputs)
    record = dl.at(step=steps, branch=list(settings.branches))
    look = {"frames": [target.frame for target in targets(task.name)], "batch": settings.batch, **context.arguments}
    shared = {"test_share": settings.test_share, "workers": settings.workers}
    closer_steps = context.steps(inputs, settings.closer_places)
    shared["closer"] = Closer(headlines(task.name), tuple(closer_steps), settings.closer_samples)
    trained = dl.Store(context.scratch("activations", f"{task.name}-trained"))
    observe(context.lens, trained, samples[: settings.batch], record, **look)
    check_squares(trained, samples[: settings.batch])
    observe(context.lens, trained, samples, record, **look)
    if untrained is None:
        table = read_map(trained, samples, **shared)
    else:
        # What it would draw is of no interest, so it stops after the last step that is read.
        other = dl.Store(context.scratch("activations", f"{task.name}-untrained"))
        observe(untrained(), other, samples, record, **look, decode=False, until=max(steps))
        table = read_map(other, samples, drawn=drawn_by(trained, samples), baselines=False, **shared)
    table["reader"] = table["reader"].replace(PROBE, TRAINED if untrained is None else UNTRAINED)
    return Part(table.assign(task=task.name))


def run(context: Context) -> pd.DataFrame:
    @cache
    def untrained() -> Any:
        return dl.wrap(controls.random_weights(context.lens.pipe), engine=context.lens.engine)

    parts = []
    for name, task in reasoner.named(context.settings.tasks).items():
        jobs = {"trained": partial(read, context, task), "untrained": partial(read, context, task, untrained)}
        parts += context.units(name, jobs).values()
        # Activations are large, and needed only until their task is read.
        context.discard("activations")
    results = pd.concat([part.table for part in parts], ignore_index=True)
    results = results.astype({"step": "Int64", "block": "Int64"})  # no block for a baseline
    figures.draw(context, results)
    return results


EXPERIMENT = Experiment(
    name="probe-map",
    title="Probe map",
    source="sections 4.3 and 5 of arXiv 2603.16870 (a probe of claims made there from pictures)",
    question="What can be read from the tokens at each block and step: what is seen, what follows from it, what is drawn?",
    presets={
        "quick": Settings(),
        "full": Settings(tasks=ALL, samples=256, batch=64, places=tuple(np.linspace(0, 1, 10).tolist()), closer_samples=96),
    },
    run=run,
    minutes=10,
)
