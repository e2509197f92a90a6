"""Token energy: where each block puts its energy (paper 2603.16870, Fig. 6a and section 5.1).

The energy of a token is the L2 norm of its stream after a block, on the `cond` branch as in the paper. The paper reads from
heat maps that early blocks attend to the background and middle blocks to what the prompt names. In numbers, for each region:

* preference: the share of energy inside it over its share of the area; 1 is none;
* localisation: the area under the ROC curve of a token's energy for lying in the region; 0.5 is none.

* sparsity, of a map as a whole: the share of energy in the twentieth of the tokens that has most of it; 0.05 is an even spread.

A norm grows with depth; these numbers are shares within a block and do not. Two more things can fill a map without meaning: a
few channels that are large on every token (massive activations, arXiv 2402.17762), and the tokens of the first frame, which is
given. Each number therefore comes in four looks: as in the paper, without dominant channels, without the first frame, and
without both. Which look is taken can turn an answer round, so figures and tables show more than one. A first pass over all
samples finds the channels that dominate a block, so that every map of a block loses the same ones.

Controls: the same tokens shuffled within their frames, and a copy of the model with random weights that is shown the same
latents, and so says what the architecture and the first frame alone bring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import controls, reasoner
from dit_lens.claims import Claim, Criterion, difference, mean
from dit_lens.experiment import CLOCK_COLUMNS, Context, Experiment, Part
from dit_lens.statistics import Interval
from experiments import energy_figures as figures
from experiments.energy import (
    CLEANED,
    RANDOM,
    SHUFFLED,
    TRAINED,
    Channels,
    Energies,
    Regions,
    channel_squares,
    components,
    dominating,
    localisation,
    looks,
    preference,
    sparsity,
)

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


def sizes(context: Context, lens: Callable[[], Any], samples: Sequence[Any]) -> Part:
    """The first pass, one pipeline call: a row per step, block and channel, its mean square over tokens summed over samples."""
    at = dl.at(step=context.steps(context.inputs(samples)), branch=context.settings.branch)
    run = context.observed(samples, dl.Record(at, reduce=channel_squares), lens=lens())
    tables = []
    for entry in run.activations:
        squares = entry.tensor.double().sum(dim=0).numpy()
        place = {"expert": entry.cell.expert, "step": entry.cell.step, "block": entry.cell.block}
        tables.append(pd.DataFrame({**place, "channel": np.arange(len(squares)), "square": squares}))
    return Part(pd.concat(tables, ignore_index=True))


def measure(context: Context, model: str, lens: Callable[[], Any], samples: Sequence[Any], dominant: Channels) -> Part:
    """One pipeline call: a row per sample, step, block, region, look and control; the first sample's maps at the first step."""
    branch = context.settings.branch
    steps = context.steps(context.inputs(samples))
    seen = dl.at(step=steps, branch=branch), dl.at(step=steps[0], branch=branch)
    record = [dl.Record(seen[0], reduce=Energies(dominant)), dl.Record(seen[1], reduce=components)]
    run = context.observed(samples, record, lens=lens())
    entries = [entry for entry in run.activations if entry.record == 0]
    random = np.random.default_rng(samples[0].index)
    height, width = entries[0].tensor.shape[-2:]
    where = Regions.of(samples, (height, width))
    tables = [rows(model, entry.cell, entry.tensor.numpy(), samples, where, random) for entry in entries]
    counts = {place: int(channels.sum()) for place, channels in dominant.items()}
    table = pd.concat(tables, ignore_index=True)
    table["dominant"] = [counts[place] for place in zip(table["expert"], table["block"], strict=True)]
    first = np.stack([entry.tensor.numpy()[0] for entry in entries if entry.cell.step == steps[0]], axis=1)
    shown = np.stack([entry.tensor.numpy()[0] for entry in run.activations if entry.record == 1])
    return Part(table, {"energy": first[0], "without": first[1], "components": shown})


def rows(
    model: str, cell: dl.Cell, maps: np.ndarray, samples: Sequence[Any], where: Regions, random: np.random.Generator
) -> pd.DataFrame:
    """A cell's numbers: a row per sample, region, look and control. The sparsity is that of the whole map in every region."""
    kinds = {model: maps}
    if model == TRAINED:
        kinds[SHUFFLED] = random.permuted(maps.reshape(*maps.shape[:3], -1), axis=-1).reshape(maps.shape)
    count = len(where.names)
    clock = {name: getattr(cell, name) for name in (*CLOCK_COLUMNS, "branch", "block", "depth")}
    named = {
        "task": samples[0].task.name,
        "sample": np.repeat([sample.index for sample in samples], count),
        "seed": 0,
        **clock,
        "region": np.tile(where.names, len(samples)),
    }
    found = [
        pd.DataFrame(
            {
                "model": kind,
                **named,
                "look": look,
                "preference": preference(energy, where.inside).ravel(),
                "localisation": localisation(energy, where.inside).ravel(),
                "sparsity": np.repeat(sparsity(energy), count),
            }
        )
        for kind, values in kinds.items()
        for look, energy in looks(values).items()
    ]
    return pd.concat(found, ignore_index=True).dropna(subset="preference")


def run(context: Context) -> pd.DataFrame:
    settings = context.settings

    @cache
    def untrained() -> Any:
        return dl.wrap(controls.random_weights(context.lens.pipe), engine=context.lens.engine)

    tasks = reasoner.named(settings.tasks)
    groups = {}
    for name, task in tasks.items():
        samples = [task.sample("test", i) for i in range(settings.samples)]
        groups |= {f"{name}-{i:03d}": samples[i : i + settings.batch] for i in range(0, len(samples), settings.batch)}
    # An untrained model is made when it is first needed: a run that goes on may need none.
    lenses: dict[str, Callable[[], Any]] = {"trained": lambda: None, "random": untrained}
    calls = [(short, key) for short in lenses for key in groups]
    first = context.units(
        "channels", {f"{key}-{short}": partial(sizes, context, lenses[short], groups[key]) for short, key in calls}
    )
    dominant = {short: chosen([first[f"{key}-{short}"].table for key in groups]) for short in lenses}
    jobs = {
        f"{key}-{short}": partial(measure, context, model, lenses[short], groups[key], dominant[short])
        for short, model in (("trained", TRAINED), ("random", RANDOM))
        for key in groups
    }
    parts = context.units("norms", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    figures.numbers(context, results, EARLY, MIDDLE)
    shown = next(iter(tasks.values())).sample("test", 0)
    for short in lenses:
        arrays = parts[f"{shown.task.name}-000-{short}"].arrays
        figures.maps(context, arrays["energy"], arrays["without"], short, shown)
        figures.component_maps(context, arrays["components"], short, shown)
    return results


def chosen(tables: Sequence[pd.DataFrame]) -> Channels:
    """The dominant channels of a model, over all samples, tasks and steps."""
    squares = pd.concat(tables).groupby(["expert", "block", "channel"])["square"].sum()
    places: Any = squares.groupby(["expert", "block"], sort=False)
    return {place: dominating(each.to_numpy()) for place, each in places}


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
        changed="dominant channels are chosen for each block over all samples, not for each sample, as one near the limit was"
        " taken out of some samples only",
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
    minutes=1,
)
