"""Step lens: what the model already shows at every denoising step (paper 2603.16870, Fig. 1, 2, 4, 5; equation 2).

At each step the velocity and the noisy latents imply a clean video, x0-hat = x - sigma v. Decoded, it shows what the model
would answer if it stopped there. Beside the pictures stand four numbers per step:

* right: whether the task's scorer accepts the decoded x0-hat;
* alive: how many legal answers its last frame has gone at least a quarter of the way to;
* entropy: of the evidence for the legal answers, in bits;
* cosine: between its motion map and the one of the final video. Motion maps are not negative, so even unrelated ones agree
  somewhat: the controls are the final videos of another seed and of another sample, and how well two seeds agree at the
  same step. The last matters at sigma 1, where the x0-hat of a perfect model is the mean of all its answers, whatever the
  seed: a blur there is forced by training and no sign of a search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import metrics, reasoner
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from experiments import figures


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule (0 the first step, 1 the last); ``batch`` is rows per pipeline call."""

    tasks: tuple[str, ...] = reasoner.tasks()
    samples: int = 4
    seeds: int = 2
    batch: int = 8
    places: tuple[float, ...] = (0, 0.05, 0.1, 0.16, 0.27, 0.42, 0.64, 1)
    branches: tuple[str, ...] = ("guided",)
    pictured_frames: int = 9


def measure(context: Context, samples: Sequence[Any], pictured: Sequence[int]) -> Part:
    """One pipeline call on samples of a task, with all seeds: a row per sample, seed, step and branch.

    The films of the ``pictured`` samples (first seed, first branch) come as uint8 (samples, steps, frames, H, W, 3).
    """
    settings, task, lens = context.settings, samples[0].task, context.lens
    inputs, seeds = context.inputs(samples), list(range(settings.seeds))
    run = lens.run(**inputs, seed=seeds)
    rows, size = [sample for sample in samples for _ in seeds], samples[0].image.size[::-1]

    def turned(maps: Any, axis: int) -> Any:
        """The maps of the next sample (axis 0) or of the next seed (axis 1) in each row's place."""
        return maps.unflatten(0, (len(samples), len(seeds))).roll(1, dims=axis).flatten(0, 1)

    final = metrics.motion_map(run.video)
    tables, films = [], []
    for clock in context.clock(inputs):
        for branch in settings.branches:
            video = lens.decode(run.x0_hat(step=clock["step"], branch=branch))
            board, motion = metrics.resized(video, *size).numpy(), metrics.motion_map(video)
            evidence = task.evidence(board, rows)
            tables.append(
                pd.DataFrame(
                    {
                        "task": task.name,
                        "sample": [sample.index for sample in rows],
                        "seed": run.seeds,
                        **clock,
                        "branch": branch,
                        "answers": [len(sample.answers) for sample in rows],
                        "right": [score.right for score in task.scores(board, rows)],
                        "alive": [metrics.answers_alive(found) if len(found) > 1 else np.nan for found in evidence],
                        "entropy": [metrics.answer_entropy(found) for found in evidence],
                        "cosine_final": metrics.map_cosine(motion, final),
                        "cosine_seeds": metrics.map_cosine(motion, turned(motion, 1)),
                        "cosine_other_seed": metrics.map_cosine(motion, turned(final, 1)),
                        "cosine_other_sample": metrics.map_cosine(motion, turned(final, 0)),
                    }
                )
            )
            if branch == settings.branches[0]:
                films.append((board[[i * len(seeds) for i in pictured]] * 255).round().astype(np.uint8))
    return Part(pd.concat(tables, ignore_index=True), {"films": np.stack(films, axis=1)} if pictured else {})


def run(context: Context) -> pd.DataFrame:
    settings = context.settings
    calls = -(-settings.samples * settings.seeds // settings.batch)
    if settings.seeds < 2 or settings.samples < 2 * calls:
        raise InputError("step-lens compares seeds and samples in one call: write --seeds 2 and --batch 4 or more")
    jobs, shown = {}, {}
    for name in settings.tasks:
        samples = [reasoner.task(name).sample("test", i) for i in range(settings.samples)]
        for call, places in enumerate(np.array_split(np.arange(settings.samples), calls)):
            group = [samples[place] for place in places]
            pictured = first_of_each_kind(group) if call == 0 else ()
            jobs[f"{name}-{call}"] = partial(measure, context, group, pictured)
            shown |= {f"{name}-0": [samples[i] for i in pictured]} if call == 0 else {}
    parts = context.units("videos", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    clock = results[["step", "sigma"]].drop_duplicates().sort_values("step")
    labels = [f"step {step}  \u03c3 {sigma:.2f}" for step, sigma in clock.itertuples(index=False)]
    mazes = [parts[f"{name}-0"].arrays["films"][0] for name in ("maze", "maze-loops") if name in settings.tasks]
    if mazes:
        figures.watch(context, mazes, labels)
    for branch in settings.branches:
        figures.step_numbers(context, results[results["branch"] == branch], branch)
    for key, samples in shown.items():
        for sample, film in zip(samples, parts[key].arrays["films"], strict=True):
            figures.step_film(context, sample, film, labels)
    return results


def first_of_each_kind(samples: Sequence[Any]) -> list[int]:
    """Where the first sample with one legal answer is and the first with several: what comes first, not what looks best."""
    several = [len(sample.answers) > 1 for sample in samples]
    return sorted(several.index(kind) for kind in set(several))


EXPERIMENT = Experiment(
    name="step-lens",
    title="Step lens",
    source="Fig. 1, 2, 4, 5 and equation 2 of arXiv 2603.16870",
    question="What does the model already show at each denoising step, and when does it decide?",
    presets={
        "quick": Settings(),
        "full": Settings(
            samples=48,
            seeds=4,
            batch=64,
            places=(0, 0.05, 0.1, 0.16, 0.21, 0.27, 0.32, 0.42, 0.53, 0.64, 0.79, 1),
            branches=("guided", "cond"),
        ),
    },
    run=run,
)
