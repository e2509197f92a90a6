"""Decision time: two papers disagree on when the answer is fixed, so three things are measured on the same runs, against sigma.

Paper 2603.16870 (CoS) has the conclusion solidify in the middle, at steps 20 to 30 of 50, which is sigma .88 to .77. Paper
2603.30043 (ChEaP) has the route all but fixed at step 5 of 40, sigma .97, and fixed by step 10, sigma .94. Both can hold, if the
first is about what the state keeps and the second about what was chosen:
* *readout*: the first reading after which the answer that x0-hat shows most never changes; and ChEaP's commitment, the cosine
  between motion maps of x0-hat and of the final video, with the control that it lacks, the final video of another seed. (Their
  mask of an animated goal has no counterpart on these boards.)
* *choice*: endings of the same state by a stochastic sampler, and how often two of them differ (`dit_lens.branching`);
* *storage*: endings after the next state was renoised about x0-hat, and how many of them lose the run's own answer: what the
  noisy state holds beyond x0-hat. Beside it, the state replaced by noise as in CoS; nothing of it is left then, and its noise
  level is wrong, so that a loss says nothing of when the answer was stored. Renoised x0-hats are no states of the model either.

All of it is held against a new seed, which is what the endings of step 0 are. Only samples with several legal answers. Endings
leave at a step; their noise enters at the next one, whose sigma is lower. The full preset thins the places from where they leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from dit_lens import reasoner
from dit_lens.blends import Blends
from dit_lens.branching import branch_table
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from dit_lens.readings import Reader
from experiments import decision_time_figures
from experiments.decision_time_claims import CLAIMS
from experiments.timing import clock_at, clustered, decisions

WAYS = ("ancestral", "renoised", "replaced")


@dataclass(frozen=True)
class Settings:
    """``samples`` of each task, with several legal answers, in ``seeds`` runs each; ``batch`` is rows per pipeline call.

    ``places`` are points along the schedule (0 the first step, 1 the last) that are read; of ``branched`` samples, ``endings`` of
    the first seed's run leave those of them that are in ``leave``, in each way.
    """

    tasks: tuple[str, ...] = ("maze-loops",)
    samples: int = 1
    seeds: int = 2
    batch: int = 8
    places: tuple[float, ...] = (0, 0.05, 0.1, 0.16, 0.21, 0.27, 0.37, 0.5, 1)
    branched: int = 1
    endings: int = 2
    leave: tuple[float, ...] = (0, 0.16, 0.37)


def read(context: Context, samples: Sequence[Any]) -> Part:
    """What x0-hat shows of samples of a task: a row per sample, seed and step."""
    run = context.clean(samples, range(context.settings.seeds), context.settings.batch)
    reader = Reader(context.lens, samples, run)
    tables = [reader.at(clock["step"], "guided")[0].assign(**clock) for clock in context.clock(context.inputs(samples))]
    return Part(pd.concat(tables, ignore_index=True))


def leave(context: Context, samples: Sequence[Any]) -> Part:
    """Endings of the first seed's runs: a row per sample, step and way."""
    settings, inputs = context.settings, context.inputs(samples)
    run = context.clean(samples, [0], settings.batch)
    assert run.video is not None  # clean runs have one
    blends = Blends(context.lens, run.video)
    return Part(
        pd.concat(
            [
                branch_table(context.lens, samples, run, clock, settings.endings, way, inputs, blends)
                for clock in clock_at(context, inputs, settings.leave)
                for way in WAYS
                if clock["step"] < run.steps - 1
            ],
            ignore_index=True,
        )
    )


def run(context: Context) -> pd.DataFrame:
    settings, readings, endings = context.settings, {}, {}
    if settings.seeds < 2:
        raise InputError("decision-time compares with another seed: write --seeds 2 or more")
    for name, task in reasoner.named(settings.tasks).items():
        samples = task.first(settings.samples, several=True)
        if not samples:
            raise InputError(f"no sample of {name} has several legal answers, so there is nothing to decide; leave it out")
        parts = {"read": (readings, read, samples, settings.seeds)}
        parts["leave"] = (endings, leave, samples[: settings.branched], settings.endings)
        for jobs, measure, chosen, rows in parts.values():
            size = max(1, settings.batch // rows)
            for start in range(0, len(chosen), size):
                jobs[f"{name}-{start}"] = partial(measure, context, chosen[start : start + size])
    shown = pd.concat([part.table for part in context.units("readings", readings).values()], ignore_index=True)
    left = pd.concat([part.table for part in context.units("endings", endings).values()], ignore_index=True)
    tables = {"x0-hat": shown, "run": decisions(shown), "endings": left}
    results = clustered(pd.concat([table.assign(about=about) for about, table in tables.items()], ignore_index=True))
    decision_time_figures.draw(context, results)
    return results


EXPERIMENT = Experiment(
    name="decision-time",
    title="Decision time",
    source="section 3.2 and Fig. 3c of arXiv 2603.16870, and arXiv 2603.30043",
    question="Is the answer fixed in the first steps or in the middle ones: what is shown, what is chosen, what is stored?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=("maze-loops", "tictactoe", "pattern"),
            samples=50,
            batch=200,
            places=(0, 0.05, 0.1, 0.16, 0.21, 0.27, 0.32, 0.37, 0.42, 0.47, 0.53, 0.64, 0.79, 1),
            branched=50,
            endings=4,
            leave=(0, 0.1, 0.16, 0.27, 0.37, 0.53),
        ),
    },
    run=run,
    claims=CLAIMS,
    minutes=4,
)
