"""Token energy: where each block puts its energy (paper 2603.16870, Fig. 6a and section 5.1).

The energy of a token is the L2 norm of its stream after a block, on the `cond` branch as in the paper. The paper reads from
heat maps that early blocks attend to the background and middle blocks to what the prompt names. A norm grows with depth, so
the maps are shown raw and divided by their block's mean. In numbers: the share of energy inside a region over the region's
share of the area, its *preference*, is 1 where a block has none.

Controls: the same tokens shuffled within their frames, and a copy of the model with random weights, which sees the same
picture and so shows what the architecture and the first frame alone bring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import controls, metrics, reasoner
from dit_lens.experiment import CLOCK_COLUMNS, Context, Experiment, Part
from experiments import figures
from experiments.figures import RANDOM, SHUFFLED, TRAINED

REGIONS = ("agent", "goal", "route", "wall", "open", "background")


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule (0 the first step, 1 the last); ``batch`` is rows per pipeline call."""

    tasks: tuple[str, ...] = ("maze", "maze-loops")
    samples: int = 4
    batch: int = 4
    places: tuple[float, ...] = (0, 0.5, 1)
    branch: str = "cond"


def measure(context: Context, lens: Any, model: str, samples: Sequence[Any]) -> Part:
    """One pipeline call: a row per sample, step, block, region and control; the first sample's norms at the first step."""
    branch, inputs = context.settings.branch, context.inputs(samples)
    steps = context.steps(inputs)
    record = dl.Record(dl.at(step=steps, branch=branch, site="resid"), reduce=dl.norm)
    run = lens.run(**inputs, seed=0, record=record, decode=False)
    random = np.random.default_rng(samples[0].index)
    rows = []
    for cell, energy in ((entry.cell, entry.tensor.numpy()) for entry in run.activations):
        shuffled = random.permuted(energy.reshape(*energy.shape[:2], -1), axis=-1).reshape(energy.shape)
        seen = {model: energy, SHUFFLED: shuffled} if model == TRAINED else {model: energy}
        clock = {name: getattr(cell, name) for name in (*CLOCK_COLUMNS, "branch", "block", "depth")}
        for row, sample in enumerate(samples):
            for region in REGIONS:
                inside = metrics.mask_fractions(sample.masks[region], energy.shape[-2:])
                area = float(inside.mean())
                for kind, values in seen.items() if area else ():
                    share = float(metrics.region_share(values[row], inside))
                    where = {"model": kind, "task": sample.task.name, "sample": sample.index, "seed": 0, **clock}
                    rows.append({**where, "region": region, "share": share, "area": area, "preference": share / area})
    first = run.activations.stack(step=steps[0], branch=branch)[:, 0, 0].numpy()
    return Part(pd.DataFrame(rows), {"energy": first})


def run(context: Context) -> pd.DataFrame:
    settings = context.settings

    @cache
    def untrained() -> Any:
        return dl.wrap(controls.random_weights(context.lens.pipe), engine=context.lens.engine)

    jobs = {}
    for name in settings.tasks:
        samples = [reasoner.task(name).sample("test", i) for i in range(settings.samples)]
        for first in range(0, len(samples), settings.batch):
            group = samples[first : first + settings.batch]
            jobs[f"{name}-{first:03d}-trained"] = partial(measure, context, context.lens, TRAINED, group)
            jobs[f"{name}-{first:03d}-random"] = lambda group=group: measure(context, untrained(), RANDOM, group)
    parts = context.units("norms", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    figures.energy_numbers(context, results)
    shown = reasoner.task(settings.tasks[0]).sample("test", 0)
    for model in ("trained", "random"):
        figures.energy_maps(context, parts[f"{shown.task.name}-000-{model}"].arrays["energy"], model, shown)
    return results


EXPERIMENT = Experiment(
    name="token-energy",
    title="Token energy",
    source="Fig. 6a and section 5.1 of arXiv 2603.16870",
    question="Which parts of the picture do the blocks put their energy into, and is it more than the architecture does?",
    presets={
        "quick": Settings(),
        "full": Settings(samples=64, batch=64, places=tuple(np.linspace(0, 1, 5).tolist())),
    },
    run=run,
)
