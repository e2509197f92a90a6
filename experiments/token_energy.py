"""Token energy: where each block puts its energy (paper 2603.16870, Fig. 6a and section 5.1).

The energy of a token is the L2 norm of its stream after a block, on the `cond` branch as in the paper. The paper reads from
heat maps that early blocks attend to the background and middle blocks to what the prompt names. In numbers, for each region:

* preference: the share of energy inside it over its share of the area; 1 is none;
* localisation: the area under the ROC curve of a token's energy for lying in the region; 0.5 is none.

A norm grows with depth; both numbers are shares within a block and do not. Two more things can fill a map without meaning: a
few channels that are large on every token (massive activations, arXiv 2402.17762), and the tokens of the first frame, which is
given. Each number therefore comes in two looks: as in the paper, and without dominant channels and the first frame.

Controls: the same tokens shuffled within their frames, and a copy of the model with random weights that is shown the same
latents, and so says what the architecture and the first frame alone bring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import controls, metrics, reasoner
from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.experiment import CLOCK_COLUMNS, Context, Experiment, Part
from dit_lens.statistics import Interval
from experiments import energy_figures as figures
from experiments.energy import RANDOM, SHUFFLED, TRAINED, components, energies, localisation, regions

PAPER, CLEANED = "as in the paper", "without dominant channels and first frame"
EARLY, MIDDLE = (0.0, 0.25), (0.25, 0.75)
"""The paper's bands of 40 blocks, 0-9 and 10-29, as relative depth."""


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule (0 the first step, 1 the last); ``batch`` is rows per pipeline call."""

    tasks: tuple[str, ...] = ("maze", "circle")
    samples: int = 3
    batch: int = 4
    places: tuple[float, ...] = (0, 1)
    branch: str = "cond"


def measure(context: Context, model: str, lens: Any, samples: Sequence[Any]) -> Part:
    """One pipeline call: a row per sample, step, block, region, look and control; the first sample's maps at the first step."""
    branch = context.settings.branch
    steps = context.steps(context.inputs(samples))
    seen = dl.at(step=steps, branch=branch), dl.at(step=steps[0], branch=branch)
    record = [dl.Record(seen[0], reduce=energies), dl.Record(seen[1], reduce=components)]
    run = context.observed(samples, record, lens=lens)
    entries = [entry for entry in run.activations if entry.record == 0]
    random = np.random.default_rng(samples[0].index)
    tables = [rows(context, model, entry.cell, entry.tensor.numpy(), samples, random) for entry in entries]
    first = np.stack([entry.tensor.numpy()[0, 0] for entry in entries if entry.cell.step == steps[0]])
    shown = np.stack([entry.tensor.numpy()[0] for entry in run.activations if entry.record == 1])
    return Part(pd.concat(tables, ignore_index=True), {"energy": first, "components": shown})


def rows(
    context: Context, model: str, cell: dl.Cell, maps: np.ndarray, samples: Sequence[Any], random: np.random.Generator
) -> pd.DataFrame:
    """A cell's numbers."""
    shuffled = random.permuted(maps.reshape(*maps.shape[:3], -1), axis=-1).reshape(maps.shape)
    clock = {name: getattr(cell, name) for name in (*CLOCK_COLUMNS, "branch", "block", "depth")}
    found = []
    for kind, values in ((model, maps), *(((SHUFFLED, shuffled),) if model == TRAINED else ())):
        for sample, (norm, without, dominant) in zip(samples, values, strict=True):
            looks = {PAPER: norm, CLEANED: without[1:] if len(without) > 1 else without}
            for region, mask in regions(sample).items():
                inside = metrics.mask_fractions(mask, norm.shape[-2:])
                for look, energy in looks.items() if inside.any() else ():
                    where = {"model": kind, "task": sample.task.name, "sample": sample.index, "seed": 0, **clock}
                    found.append(
                        where
                        | {
                            "region": region,
                            "look": look,
                            "preference": float(metrics.region_share(energy, inside)) / float(inside.mean()),
                            "localisation": localisation(energy, inside),
                            "dominant": int(dominant.flat[0]),
                        }
                    )
    return pd.DataFrame(found)


def run(context: Context) -> pd.DataFrame:
    settings = context.settings

    @cache
    def untrained() -> Any:
        return dl.wrap(controls.random_weights(context.lens.pipe), engine=context.lens.engine)

    jobs = {}
    tasks = reasoner.named(settings.tasks)
    for name, task in tasks.items():
        samples = [task.sample("test", i) for i in range(settings.samples)]
        for first in range(0, len(samples), settings.batch):
            group = samples[first : first + settings.batch]
            jobs[f"{name}-{first:03d}-trained"] = partial(measure, context, TRAINED, None, group)
            jobs[f"{name}-{first:03d}-random"] = lambda group=group: measure(context, RANDOM, untrained(), group)
    parts = context.units("norms", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    figures.numbers(context, results, PAPER, CLEANED)
    shown = next(iter(tasks.values())).sample("test", 0)
    for model in ("trained", "random"):
        arrays = parts[f"{shown.task.name}-000-{model}"].arrays
        figures.maps(context, arrays["energy"], model, shown)
        figures.component_maps(context, arrays["components"], model, shown)
    return results


def rise(results: pd.DataFrame, model: str) -> Interval:
    """By how much the foreground's preference is higher in the middle blocks than in the early ones."""
    kept = results[(results["region"] == "foreground") & (results["look"] == CLEANED) & (results["model"] == model)]
    kept = kept.assign(maze=kept["task"] + "/" + kept["sample"].astype(str))
    return difference(kept, "preference", kept["depth"].between(*MIDDLE, "left"), kept["depth"].between(*EARLY, "left"), "maze")


def trained_over_random(results: pd.DataFrame) -> Interval:
    """By how much more it rises in the trained model than in the untrained one."""
    kept = results[(results["region"] == "foreground") & (results["look"] == CLEANED)]
    kept = kept.assign(maze=kept["task"] + "/" + kept["sample"].astype(str), early=kept["depth"].between(*EARLY, "left"))
    kept = kept[kept["early"] | kept["depth"].between(*MIDDLE, "left")]
    means = kept.groupby(["model", "maze", "early"])["preference"].mean().unstack("early")
    rises = (means[False] - means[True]).rename("rise").reset_index()
    return difference(rises, "rise", rises["model"] == TRAINED, rises["model"] == RANDOM, "maze")


def early_background(results: pd.DataFrame) -> Interval:
    """The background's preference in the early blocks."""
    kept = results[(results["region"] == "background") & (results["look"] == CLEANED) & (results["model"] == TRAINED)]
    kept = kept[kept["depth"].between(*EARLY, "left")]
    return mean(kept["preference"], kept["task"] + "/" + kept["sample"].astype(str))


CLAIMS = (
    Claim(
        name="C10a",
        statement="The first quarter of the blocks puts its energy into the background, the middle half into objects.",
        source="section 5.1 and Fig. 6a of arXiv 2603.16870",
        grade="near-verbatim",
        criteria=(
            # A trend of any size, after what could fill the maps without meaning is taken out (1 is no preference).
            Criterion("background's preference, depth 0 to .25", 1.0, early_background),
            Criterion("foreground's preference, depth .25 to .75 minus 0 to .25", 0.0, lambda table: rise(table, TRAINED)),
            Criterion("the same minus that of the untrained model", 0.0, trained_over_random),
        ),
        control="an untrained model that is shown the same latents; shuffled tokens have no preference",
    ),
)

EXPERIMENT = Experiment(
    name="token-energy",
    title="Token energy",
    source="Fig. 6a and section 5.1 of arXiv 2603.16870",
    question="Which parts of the picture do the blocks put their energy into, and is it more than the architecture does?",
    presets={
        "quick": Settings(),
        "full": Settings(tasks=("maze", "maze-loops", "circle", "tictactoe"), samples=32, batch=32, places=(0, 0.5, 1)),
    },
    run=run,
    claims=CLAIMS,
)
