"""Step lens: what the model already shows at every denoising step (paper 2603.16870, sections 3.1.1 and 3.1.2).

At each step the velocity and the noisy latents imply a clean video, x0-hat = x - sigma v (equation 2). Decoded, it shows what
the model would answer if it stopped there: whether it is right, how many legal answers are alive and how undecided it is between
them, how near it has come to the final video, and how much of the first and of the last third of the clip has come
(`dit_lens.readings` has all numbers).

A perfect flow predictor's x0-hat is a mean over all videos that the state leaves open, so that a blend of answers is forced by
training and is no sign of a search. It is a mean in *latents*: there the weight of each answer is read (`dit_lens.blends`), as
the decoder hides the weaker of two. A control says how much: blends of endings, whose weights are known, read both ways. Three
comparisons tell what a blend means:
* at sigma 1, the mean of the final videos of other seeds, and how alike the x0-hats of two seeds are;
* later, endings of the same state by a stochastic sampler (`dit_lens.branching`): of live alternatives endings take each as
  often as x0-hat holds it. Their mean must be x0-hat, for the conditional branch: the calibration. Beside them stand endings
  of a renoised x0-hat, which leaves the model's distribution;
* where there is one legal answer, a *decoy*: how alive a reading finds a wrong one.

The full preset thins what is read of the conditional branch (`rarer`) and from where endings leave (`leave`), not samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import reasoner
from dit_lens.blends import Blends
from dit_lens.branching import branch_table, endings_table, with_distances
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from dit_lens.readings import Reader
from experiments import step_lens_figures
from experiments.step_lens_claims import CLAIMS
from experiments.timing import clock_at, clustered, decisions

SEEDS = "other seeds"
"""The way of endings that are final videos of other seeds."""


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule (0 the first step, 1 the last), ``rarer`` and ``leave`` some of them.

    ``several`` and ``single`` are samples of each task with several legal answers and with one, two at least of what a task
    has; ``batch`` is rows per pipeline call. Of ``branched`` samples with several answers per task, ``endings`` leave the
    places ``leave`` in each of the ``ways`` (of `dit_lens.branching`, and the guidance branch), beside ``finals`` seeds.
    """

    tasks: tuple[str, ...] = ("maze", "maze-loops", "tictactoe", "pattern")
    several: int = 1
    single: int = 1
    seeds: int = 2
    batch: int = 8
    places: tuple[float, ...] = (0, 0.05, 0.16, 0.27, 1)
    branches: tuple[str, ...] = ("guided",)
    rarer: tuple[float, ...] = ()
    branched: int = 2
    endings: int = 2
    finals: int = 2
    leave: tuple[float, ...] = (0.16,)
    ways: tuple[str, ...] = ("ancestral guided", "ancestral cond")
    pictured_frames: int = 9


def measure(context: Context, samples: Sequence[Any], pictured: Sequence[int]) -> Part:
    """All seeds of some samples of a task: a row per sample, seed, step and branch.

    The films of the ``pictured`` samples (first seed, first branch) come as uint8 (samples, steps, frames, H, W, 3).
    """
    settings, inputs = context.settings, context.inputs(samples)
    reader = Reader(context.lens, samples, context.clean(samples, range(settings.seeds), settings.batch))
    first, tables, films = settings.branches[0], [], []
    rarer = clock_at(context, inputs, settings.rarer)
    for branch, clock in [(b, c) for b in settings.branches for c in (context.clock(inputs) if b == first else rarer)]:
        table, pixels = reader.at(clock["step"], branch)
        tables.append(table.assign(**clock))
        if branch == first:
            films.append((pixels[[place * settings.seeds for place in pictured]] * 255).round().astype(np.uint8))
    return Part(pd.concat(tables, ignore_index=True), {"films": np.stack(films, axis=1)} if pictured else {})


def leave(context: Context, samples: Sequence[Any]) -> Part:
    """Endings of samples of a task with several answers, beside what x0-hat shows: a row per sample, step, way and branch."""
    settings, inputs, lens = context.settings, context.inputs(samples), context.lens
    own = context.clean(samples, [0], settings.batch)
    seeds = context.clean(samples, range(settings.finals), settings.batch)
    assert own.video is not None  # clean runs have one
    blends = Blends(lens, own.video)
    first = endings_table(lens, samples, own.x0_hat(0), seeds, own, blends)
    tables = [first.assign(seed=0, **context.clock(inputs)[0], way=SEEDS, branch="guided")]
    for clock in clock_at(context, inputs, settings.leave):
        for way, branch in map(str.split, settings.ways):
            tables.append(branch_table(lens, samples, own, clock, settings.endings, way, inputs, blends, branch == "guided"))
    return Part(pd.concat(tables, ignore_index=True))


def run(context: Context) -> pd.DataFrame:
    settings = context.settings
    jobs, endings, shown = {}, {}, {}
    for name, task in reasoner.named(settings.tasks).items():
        several, single = task.first(settings.several, several=True), task.first(settings.single, several=False)
        several = several if single or len(several) > 1 else task.first(2, several=True)
        single = single if several or len(single) > 1 else task.first(2, several=False)
        # The first of each kind is pictured: what comes first, not what looks best.
        shown[f"{name}-0"] = pictured = [*several[:1], *single[:1]]
        samples = [*pictured, *several[1:], *single[1:]]
        calls = -(-len(samples) * settings.seeds // settings.batch)
        if settings.seeds < 2 or len(samples) < 2 * calls:
            raise InputError("step-lens compares seeds and samples in one call: write --seeds 2 and --batch 4 or more")
        for call, places in enumerate(np.array_split(np.arange(len(samples)), calls)):
            pictures = range(len(pictured)) if call == 0 else ()
            jobs[f"{name}-{call}"] = partial(measure, context, [samples[place] for place in places], pictures)
        size = max(1, settings.batch // max(settings.endings, settings.finals))
        for start in range(0, min(settings.branched, len(several)), size):
            endings[f"{name}-{start}"] = partial(leave, context, several[: settings.branched][start : start + size])
    parts = context.units("videos", jobs)
    read = pd.concat([part.table for part in parts.values()], ignore_index=True)
    left = [part.table for part in context.units("endings", endings).values()]
    tables = {"x0-hat": read, "run": decisions(read[read["branch"] == settings.branches[0]])}
    tables |= {"endings": with_distances(pd.concat(left, ignore_index=True))} if left else {}
    results = clustered(pd.concat([table.assign(about=about) for about, table in tables.items()], ignore_index=True))
    films = {key: (samples, parts[key].arrays["films"]) for key, samples in shown.items()}
    step_lens_figures.draw(context, results, films)
    return results


EXPERIMENT = Experiment(
    name="step-lens",
    title="Step lens",
    source="Fig. 1, 2, 4, 5 and equation 2 of arXiv 2603.16870",
    question="What does the model already show at each denoising step, and when does it decide?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=reasoner.tasks(),
            several=100,
            single=50,
            batch=300,
            places=(0, 0.05, 0.1, 0.16, 0.27, 0.5, 1),
            branches=("guided", "cond"),
            rarer=(0, 0.16),
            branched=40,
            endings=3,
            finals=3,
            leave=(0.05, 0.16),
            ways=("ancestral guided", "ancestral cond", "renoised guided"),
        ),
    },
    run=run,
    claims=CLAIMS,
    minutes=3,
)
