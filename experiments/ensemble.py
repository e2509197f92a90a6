"""Ensemble: does averaging over seeds at the first step help? (paper 2603.16870, section 6 and appendix C)

The training-free ensemble averages the hidden states of three seeds in a window of blocks at the first step; reported are 0.716
right with the middle window (blocks 20 to 29 of 40), 0.690 with all, 0.688 with the first quarter and 0.685 without. It is
not said where the mean goes. *Written to all*, every seed goes on with the mean: from the first block of the window on their
streams are one, so that only where the window begins can matter. *Written to one*, only the first seed's stream gets it, and the
others run free.

Measured is the *gain*: right or not, minus what the same seed of the same sample is without. Windows are by relative depth.
Beside hidden states the velocity, the x0-hat and the initial noise are averaged (of K noises the mean has variance 1/K;
rescaled to 1 it is just another seed, which must gain nothing). A velocity holds the noise of its seed, noise - x0: a row
that goes on from its own noise with the mean of several leaves the noise level of the schedule, the less so the more steps there
are; with the mean x0-hat it does not. So may averaged hidden states, as what comes of them is a velocity: *on schedule*, a
row gets the x0-hat that this velocity implies at the mean latents, and keeps its own noise. Comparators: the best of K seeds by
an oracle, a majority vote of their answers, K times the steps for one seed, and one seed with K - 1 more steps, which is
what the ensemble costs if one video goes on.

Every sample of a task has seeds of its own, of which K = 2, 3, ... take the first; so what is found rests on as many noises as
there are samples, not on K. With few steps there are several sets of the paper's K. Sets and seeds of a sample stand or fall
together: intervals are over samples.

At its own number of steps the model is near its ceiling, with little to gain; so the same tasks also run with ``few`` steps.
Three steps were chosen on 12 training samples a task, without any ensemble: 28 of 36 were right, with four steps all, and
mazes leave no room with either (12 and 11 of 12).

Thinned in the full preset: K is 2, 3, 4 or 8; at the model's own steps one set of seeds, only what the claims need, and scored
for the first seed; with few steps two sets, the second only for what the claims need and its control.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from dit_lens import reasoner
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from dit_lens.pairs import batches
from experiments import ensemble_figures as figures
from experiments import merging
from experiments.ensemble_claims import BY_STEPS, CLAIMS, by_steps
from experiments.merging import Bench, Merge, best, voted

JUDGED = [
    Merge(merging.HIDDEN, to, window)
    for to in (merging.TO_ALL, merging.TO_ONE)
    for window in (merging.FIRST, merging.MIDDLE, merging.LAST, merging.EVERY)
]
JUDGED += [Merge(what, to) for to in (merging.TO_ALL, merging.TO_ONE) for what in (merging.VELOCITY, merging.X0_HAT)]
CONTROL = [Merge(merging.ON_SCHEDULE, to, merging.MIDDLE) for to in (merging.TO_ALL, merging.TO_ONE)]
FURTHER = [Merge(merging.HIDDEN, to, merging.WIDE) for to in (merging.TO_ALL, merging.TO_ONE)]
FURTHER += [Merge(merging.HIDDEN, to, merging.MIDDLE, branch="cond") for to in (merging.TO_ALL, merging.TO_ONE)]
FURTHER += [Merge(what) for what in (merging.LATENTS, merging.RESCALED)]
SHOWN = ((merging.HIDDEN, merging.MIDDLE), (merging.VELOCITY, ""))
"""Of what there are pictures."""
CURVE = [Merge(merging.HIDDEN, to, merging.MIDDLE) for to in (merging.TO_ALL, merging.TO_ONE)] + [Merge(merging.VELOCITY)]


@dataclass(frozen=True)
class Settings:
    """``tasks`` run with the model's own number of steps, those of ``few`` with ``few_steps``. ``samples`` of each; ``seeds`` is
    the K of the paper, ``counts`` other K; with few steps there are ``sets`` of that K, up to ``scored`` seeds go on, and with
    ``further`` in further ways; ``batch`` is samples times seeds."""

    tasks: tuple[str, ...] = ()
    few: tuple[str, ...] = ("tictactoe",)
    few_steps: int = 3
    samples: int = 2
    seeds: int = 3
    counts: tuple[int, ...] = ()
    sets: int = 1
    further: bool = False
    scored: int = 3
    batch: int = 8

    def seeds_of(self, sample: int, count: int, which: int) -> range:
        """The seeds of a sample, by its number: no other sample of the task has any of them."""
        first = sample * max(self.seeds * self.sets, *self.counts, 0) + which * count
        return range(first, first + count)


def measure(bench: Bench, merges: Sequence[Merge], scored: int, longer: bool, which: int) -> Part:
    """Some samples with K seeds, of the set with this number: a row for each way to merge, sample and seed that goes on; and with
    ``longer``, longer runs and the first sample's pictures by way, see `Bench.pictures`."""
    count, steps, branches = bench.count, bench.steps, len(bench.branches)
    alone = {"what": merging.NONE, "k": count, "calls": branches * steps}
    tables, first, pictures = [bench.rows(bench.clean).assign(measure=merging.RIGHT, **alone)], {}, {}
    for one in (one for one in merges if bench.possible(one)):
        answers = {} if one.of_noise else bench.first_step(one)
        run = bench.finished(one, answers, scored)
        way = {"what": one.what, "window": one.window, "to": one.to, "branch": one.branch, "k": count}
        tables.append(bench.rows(run).assign(measure=merging.RIGHT, calls=one.calls(steps, branches, count), **way))
        if one.to == merging.TO_ALL and one.branch != "cond" and answers:
            first[one.what, one.window] = (answers, way)
        if longer and (one.what, one.window) in SHOWN and one.branch != "cond":
            pictures[figures.way_of(one)] = bench.pictures(run, count)
    references = {merging.FROM_ALL: (merging.HIDDEN, merging.EVERY), merging.FROM_VELOCITY: (merging.VELOCITY, "")}
    for what, other in references.items():
        for answers, way in first.values() if other in first else ():
            tables.append(bench.apart(answers, first[other][0]).assign(measure=what, **way))
    for what, choose in ((merging.ORACLE, best), (merging.VOTE, voted)):
        tables.append(bench.chosen(choose).assign(measure=merging.RIGHT, what=what, k=count, calls=branches * steps * count))
    if not longer:
        return Part(pd.concat(tables, ignore_index=True).assign(set=which))
    tables.append(bench.shrinkage().assign(measure=merging.LENGTH, k=count))
    for what, more in ((merging.LONGER, steps + count - 1), (merging.LONG, steps * count)):
        tables.append(bench.rows(bench.longer(more)).assign(measure=merging.RIGHT, what=what, k=count, calls=branches * more))
    pictures = {merging.NONE: bench.pictures(bench.clean, count), **pictures}
    return Part(pd.concat(tables, ignore_index=True).assign(set=which), pictures)


def run(context: Context) -> pd.DataFrame:
    settings = context.settings
    if settings.seeds < 2 or min(settings.counts, default=2) < 2:
        raise InputError("an ensemble averages two seeds or more: write --seeds 3, and --counts of 2 or more")
    jobs, own, short = {}, reasoner.named(settings.tasks), reasoner.named(settings.few)
    for task, few in [*((task, False) for task in own.values()), *((task, True) for task in short.values())]:
        name, samples = task.name, [task.sample("test", place) for place in range(settings.samples)]
        sets = [(settings.seeds, which) for which in range(settings.sets if few else 1)]
        for count, which in [*sets, *((count, 0) for count in (settings.counts if few else ()))]:
            usual = count == settings.seeds
            whole = few and usual and which == 0
            merges = [*JUDGED, *(CONTROL if few else ()), *(FURTHER if whole and settings.further else ())] if usual else CURVE
            for call, places in enumerate(batches(len(samples), max(1, settings.batch // count))):
                seeds = [settings.seeds_of(place, count, which) for place in places]
                bench = Bench(context, [samples[place] for place in places], seeds, settings.few_steps if few else None)
                key = f"{name}-{'few' if few else 'own'}-{count}-{call}{f'-set-{which}' * bool(which)}"
                jobs[key] = partial(measure, bench, merges, settings.scored if few else 1, whole, which)
    parts = context.units("merges", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    results["gain"] = results["value"].where(results["measure"] == merging.RIGHT) - results["alone"]
    figures.gains(context, results)
    figures.by_count(context, results)
    figures.lengths(context, results)
    figures.numbers(context, results)
    context.table("The claims' numbers by the number of steps", by_steps(results), BY_STEPS)
    for name in short:
        figures.examples(context, name, parts[f"{name}-few-{settings.seeds}-0"].arrays)
    return results


EXPERIMENT = Experiment(
    name="ensemble",
    title="Ensemble over seeds",
    source="Section 6 and appendix C of arXiv 2603.16870",
    question="Does averaging several seeds at the first step make more videos right, and does it matter where?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=("maze-loops", "tictactoe", "pattern", "permanence"),
            few=("tictactoe", "pattern", "permanence"),
            samples=100,
            counts=(2, 4, 8),
            sets=2,
            further=True,
            batch=300,
        ),
    },
    run=run,
    claims=CLAIMS,
    minutes=7,
)
