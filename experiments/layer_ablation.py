"""Layer ablation: what is lost without a block, or a part of it, for a part of the denoising steps.

Every case (see `ablation_cases`) is tried at every block by itself, in both guidance branches, in runs that are otherwise the
same: `skip update all` leaves the block out at every step, `mean attn early` puts the mean over samples that are not measured in
place of what its self-attention returns, at the first third of the steps (of their number, not of sigma). Damage is the clean
run's measure less the edited one's: to perception, to reasoning and to the picture (see `damage`).

Controls:

* noise: the update of the same block, or what the same part of it returns, moved exactly as far as leaving it out moves it, in
  random directions, at the same steps. What is lost by this too is lost by the size of the change; a block that is missed no
  more than this did nothing there in particular.
* another seed: the clean run from other noise, which shows how far no damage at all is from zero.

A model with random weights is no control here: it solves nothing, so nothing can be damaged. Nor is one branch alone, which
asks another question: guidance needs both. The full preset takes 8 steps, by which the grid of cases fits in minutes; what the
clean runs keep with so few is in a table. Thinned there: all cases but a block left out for good and its noise are tried at
every third block, from the first on. What the damage says of the paper's bands of layers is judged in `specialization`.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.activations import Activations
from dit_lens.experiment import Context, Experiment, Part
from experiments import layer_figures
from experiments.ablation_cases import POOLED, THINNED, Case, band_steps, pooled
from experiments.damage import Scorer
from experiments.layer_figures import OTHER_SEED

OTHER_NOISE = 10_000
"""Added to a sample's number, which is its seed, for its run from other noise."""


@dataclass(frozen=True)
class Settings:
    """``cases`` are "kind site band", and the ``thinned`` ones are tried at every third block, from the first on; ``depths``
    are places along the blocks (0 the first, 1 the last), all when there is none; ``pool`` further samples are what is put in
    place; ``steps`` of denoising; ``batch`` rows per pipeline call."""

    tasks: tuple[str, ...] = ("circle",)
    samples: int = 3
    pool: int = 4
    batch: int = 4
    steps: int = 6
    depths: tuple[float, ...] = (0, 0.35, 0.7)
    cases: tuple[str, ...] = (
        "skip update all",
        "skip update early",
        "skip update late",
        "mean update all",
        "noise update all",
        "zero attn all",
    )
    thinned: tuple[str, ...] = ()


class Ablations:
    """The runs of an experiment: what is clean, what comes from other samples, and what is ablated."""

    def __init__(self, context: Context) -> None:
        self.context, self.settings, self.lens = context, context.settings, context.lens
        self.pool, self.clean = cache(self._pool), cache(self._clean)
        self.tasks = reasoner.named(self.settings.tasks)
        extent = self.lens.extent(**self.call(next(iter(self.tasks)), 0, 1)[1])
        self.forecast, self.count = extent.forecast, min(extent.blocks.values())
        self.bands = band_steps(len(self.forecast.timesteps))
        self.cases = [Case.parse(case, [site.name for site in extent.sites]) for case in self.settings.cases]
        self.blocks = sorted({round(d * (self.count - 1)) for d in self.settings.depths}) or list(range(self.count))

    def call(self, task: str, first: int, end: int) -> tuple[list[Any], dict[str, Any], list[list[int]]]:
        """The samples of a batch, the arguments of its call, and for each sample noise of its own, by its number."""
        numbers = range(first, min(first + self.settings.batch, end))
        samples = [self.tasks[task].sample("test", number) for number in numbers]
        # What was overridden for this model goes before the settings.
        inputs = {**reasoner.inputs(samples), "num_inference_steps": self.settings.steps, **self.context.arguments}
        return samples, inputs, [[number] for number in numbers]

    def _clean(self, task: str, first: int) -> tuple[Scorer, dl.Run, dict[str, np.ndarray]]:
        samples, inputs, seeds = self.call(task, first, self.settings.samples)
        scorer, clean = Scorer(samples, self.lens.pipe._execution_device), self.lens.run(**inputs, seed=seeds)
        return scorer, clean, scorer(clean.video)

    def _pool(self, task: str) -> dict[str, Activations]:
        start, end = self.settings.samples, self.settings.samples + self.settings.pool
        calls = (self.call(task, first, end)[1:] for first in range(start, end, self.settings.batch))
        sites = list(dict.fromkeys(case.site for case in self.cases if case.kind in POOLED))
        return pooled(self.lens, dl.at(block=self.blocks, site=sites), calls)

    def places(self, case: Case) -> list[int]:
        """The blocks at which a case is tried."""
        return self.blocks[::3] if str(case) in self.settings.thinned else self.blocks

    def measure(self, task: str, first: int, case: Case | None) -> Part:
        """One case on one batch, or other noise: a row for each sample, block and measure."""
        samples, inputs, seeds = self.call(task, first, self.settings.samples)
        scorer, clean, before = self.clean(task, first)
        kind, site, band = (case.kind, case.site, case.band) if case else (OTHER_SEED, "none", "all")
        steps = self.bands[band]
        where = {"task": task, "case": str(case or OTHER_SEED), "kind": kind, "site": site, "band": band, "branch": "all"}
        where |= {"step": steps[0], "last_step": steps[-1], "last_sigma": self.forecast.sigmas[steps[-1]]}
        where |= {name: getattr(self.forecast, f"{name}s")[steps[0]] for name in ("sigma", "timestep", "expert")}
        pool = self.pool(task) if kind in POOLED else {}
        known = clean.answers(before=steps[0]) if steps[0] else None
        tables = []
        for block in self.places(case) if case else [None]:
            if case is None or block is None:
                edited = self.lens.run(**inputs, seed=[[seed + OTHER_NOISE] for (seed,) in seeds])
            else:
                edited = self.lens.run(**inputs, seed=seeds, edits=case.edit(block, steps, pool), answers=known)
            place = {"block": block, "depth": np.nan if block is None else block / self.count}
            for name, value in scorer(edited.video).items():
                found = {"sample": [sample.index for sample in samples], "measure": name, "clean": before[name], "value": value}
                tables.append(pd.DataFrame({**where, **place, **found}))
        table = pd.concat(tables, ignore_index=True).astype({"block": "Int64"})
        return Part(table.assign(damage=table["clean"] - table["value"]))


def run(context: Context) -> pd.DataFrame:
    ablations, settings = Ablations(context), context.settings
    jobs = {
        f"{task}-{first:04d}-{str(case or OTHER_SEED).replace(' ', '_')}": partial(ablations.measure, task, first, case)
        for task in ablations.tasks
        for first in range(0, settings.samples, settings.batch)
        for case in (None, *ablations.cases)
    }
    results = pd.concat([part.table for part in context.units("videos", jobs).values()], ignore_index=True)
    layer_figures.ablation(context, results)
    return results


EXPERIMENT = Experiment(
    name="layer-ablation",
    title="Layer ablation",
    source="section 5.2 of arXiv 2603.16870 (a test of its bands of layers by what is lost without them)",
    question="What is lost without a block, or a part of one: what was seen, what was decided, or the picture?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=("circle", "maze", "tictactoe"),
            samples=100,
            pool=50,
            batch=100,
            steps=8,
            depths=(),
            cases=("skip update all", "noise update all", *THINNED),
            thinned=THINNED,
        ),
    },
    run=run,
    minutes=7,
)
