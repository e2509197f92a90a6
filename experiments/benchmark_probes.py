"""How much time shared work saves: `python -m experiments.benchmark_probes` writes `figures/benchmarks/<machine>.json`.

The whole grid of blocks and steps is read with ridge probes, every target with its control task and shuffled labels. Then random
probes of the same grid are fitted one by one as one would write it with scikit-learn alone: a pipeline behind a `GridSearchCV`
with grouped folds. Both are timed on the same machine, one after the other, and their scores compared. The grid's time includes
reading activations from disk, the baselines and the intervals; scikit-learn's is that of fitting and scoring, extrapolated from
the mean of each task to the number of its probes, as if it could be spread over the cores without any loss. Each process computes
on one core. Logistic probes, side by side on the GPU where there is one, are compared in the same way.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import provenance, reasoner
from dit_lens.files import write_text
from experiments.probes_alone import Split, logistic_alone, ridge_alone
from probes import logistic
from probes.clips import drawn_by_number
from probes.controls import control_task, shuffled
from probes.features import tokens
from probes.linear import split_groups
from probes.maps import CELL, PROBE, observe, read_map
from probes.ridge import Question
from probes.targets import ALL, questions, targets

VARIANTS = 3
"""Probes of a cell and target: its own, the control task's and that of shuffled labels."""


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    machine: str
    """What the file is called."""
    out: Path = Path("figures/benchmarks")
    tasks: tuple[str, ...] = ALL
    samples: int = 256
    """Of each task."""
    steps: tuple[int, ...] = ()
    """All when left out."""
    inference_steps: int = 0
    """Of a run; the model's own number when left out."""
    batch: int = 64
    """Samples per pipeline call."""
    checked: int = 100
    """Ridge probes that are fitted one by one, over all tasks."""
    logistic_cells: int = 16
    """Cells of the first task that logistic probes read."""
    logistic_checked: int = 20
    """Logistic probes that are fitted one by one."""
    workers: int = 1
    """Cores on both sides: processes of `read_map`, and what scikit-learn's time is divided by."""
    quick: bool = False
    """A minute on a laptop: a dozen mazes, at two of four steps."""


QUICK = {
    "tasks": ("maze",),
    "samples": 12,
    "steps": (0, 3),
    "inference_steps": 4,
    "checked": 10,
    "logistic_cells": 1,
    "logistic_checked": 3,
}


@dataclass(frozen=True, eq=False)
class Rows:
    """What every cell of a task shares: the questions about the tokens of its samples, and the split."""

    questions: dict[str, Question]
    frames: dict[str, int | None]
    split: Split
    samples: np.ndarray
    places: np.ndarray


def observed(lens: dl.Lens, task: str, settings: Settings, folder: Path) -> tuple[dl.Store, list[Any]]:
    """The runs of a task, with the stream at every block; the last frame of it where no target needs another one."""
    samples = [reasoner.task(task).sample("test", index) for index in range(settings.samples)]
    frames = -1 if all(target.frame == -1 for target in targets(task)) else None
    record = dl.at(step=list(settings.steps) or "all", branch="cond", frames=frames)
    given: dict[str, Any] = {"num_inference_steps": settings.inference_steps} if settings.inference_steps else {}
    observe(lens, store := dl.Store(folder), samples, record, batch=settings.batch, **given)
    return store, samples


def rows_of(store: dl.Store, samples: Sequence[Any], labels: pd.DataFrame) -> Rows:
    """What is asked of the tokens of one cell, for its samples in their order there."""
    numbered, drawn = {sample.index: sample for sample in samples}, drawn_by_number(store, samples)
    there = [numbered[number] for number in labels["sample"]]
    asked = targets(samples[0].task.name)
    found = questions(asked, there, [drawn[sample.index] for sample in there])
    count = len(found[0].values) // len(there)
    groups, numbers = (np.repeat([getattr(sample, name) for sample in there], count) for name in ("group", "index"))
    named = {question.name: question for question in found}
    frames = {target.name: target.frame for target in asked}
    return Rows(named, frames, Split(groups, split_groups(groups)[1]), numbers, np.tile(np.arange(count), len(there)))


def features_at(store: dl.Store, samples: Sequence[Any], cell: dict[str, Any], frame: int | None) -> np.ndarray:
    """The tokens of one cell and frame, sample by sample."""
    where = {axis: cell[axis] for axis in CELL}
    stack, _ = store.stack(**where, task=samples[0].task.name, sample=[sample.index for sample in samples])
    units = tokens(frame)(np.asarray(stack.float()))
    return units.reshape(-1, units.shape[-1])


def ridge_compared(store: dl.Store, samples: Sequence[Any], checked: int, random: np.random.Generator, workers: int) -> dict:
    """The grid of one task read in one pass, and some of its probes one by one."""
    begun = time.perf_counter()
    # Asked for only where there are several, so that one process needs nothing of it.
    options: dict[str, Any] = {"workers": workers} if workers > 1 else {}
    table = read_map(store, samples, **options)
    spent = time.perf_counter() - begun
    # Columns with the baselines' missing blocks and steps hold no whole numbers.
    grid = table[(table["reader"] == PROBE) & table["estimate"].notna()].astype({"block": int, "step": int})
    chosen = grid.iloc[random.permutation(len(grid))[:checked]]
    records: list[dict[str, Any]] = chosen.to_dict("records")  # pyright: ignore[reportAssignmentType]
    labels = store.stack(**{axis: records[0][axis] for axis in CELL}, task=samples[0].task.name)[1]
    rows = rows_of(store, samples, labels[labels["sample"].isin([sample.index for sample in samples])])
    alone, seconds = [], []
    for cell in tqdm(records, desc=f"ridge probes of {samples[0].task.name}, one by one", unit="probe"):
        x = features_at(store, samples, cell, rows.frames[cell["target"]])
        begun = time.perf_counter()
        alone.append(ridge_alone(x, rows.questions[cell["target"]], rows.split))
        seconds.append(time.perf_counter() - begun)
    return {
        "cells": len(grid.drop_duplicates(CELL)),
        "probes": len(grid) * VARIANTS,
        **_result(alone, list(zip(chosen["estimate"], chosen["penalty"], strict=True)), seconds, spent, len(grid), workers),
    }


def logistic_compared(
    store: dl.Store, samples: Sequence[Any], settings: Settings, random: np.random.Generator, device: str
) -> dict[str, Any]:
    """Random cells of one task read side by side by logistic probes, and some of their probes one by one."""
    cells = store.index.drop_duplicates(CELL)
    picked = cells.iloc[random.permutation(len(cells))[: settings.logistic_cells]]
    records: list[dict[str, Any]] = picked.to_dict("records")  # pyright: ignore[reportAssignmentType]
    rows = rows_of(store, samples, store.stack(**{axis: records[0][axis] for axis in CELL})[1])
    own = [q for name, q in rows.questions.items() if q.kind != "number" and rows.frames[name] == -1]
    asked = [*own, *(control_task(q, rows.places) for q in own), *(shuffled(q, rows.samples, rows.places) for q in own)]
    stack = np.stack([features_at(store, samples, cell, -1) for cell in records])
    # The first call of a process sets the device up.
    logistic.read_stack(stack[:1, ..., :8], own[:1], rows.split.groups, rows.split.test, device=device)
    begun = time.perf_counter()
    found = logistic.read_stack(stack, asked, rows.split.groups, rows.split.test, device=device)
    spent = time.perf_counter() - begun
    places = [(i, j) for i in range(len(found)) for j in range(len(own)) if not np.isnan(found[i][j].score.estimate)]
    chosen = [places[place] for place in random.permutation(len(places))[: settings.logistic_checked]]
    alone, seconds = [], []
    for i, j in tqdm(chosen, desc=f"logistic probes of {samples[0].task.name}, one by one", unit="probe"):
        begun = time.perf_counter()
        logistic_alone(stack[i], own[j], rows.split)
        seconds.append(time.perf_counter() - begun)
        # At its own tolerance scikit-learn's scores differ from those of its exact fits by up to 1e-3; time is taken there.
        alone.append(logistic_alone(stack[i], own[j], rows.split, 1e-8))
    ours = [(found[i][j].score.estimate, found[i][j].penalty) for i, j in chosen]
    return {
        "task": samples[0].task.name,
        "device": device,
        "cells": len(found),
        "probes": len(places) * VARIANTS,
        **_result(alone, ours, seconds, spent, len(places), settings.workers),
    }


def _result(
    alone: list[tuple[float, float]],
    ours: list[tuple[float, float]],
    seconds: list[float],
    spent: float,
    count: int,
    workers: int,
) -> dict[str, Any]:
    foreseen = float(np.mean(seconds)) * count * VARIANTS / workers
    differences = [abs(one[0] - other[0]) for one, other in zip(alone, ours, strict=True)]
    return {
        "checked": len(alone),
        "largest_difference": max(differences),
        "other_penalties": sum(not np.isclose(one[1], other[1]) for one, other in zip(alone, ours, strict=True)),
        "seconds": {"together": spent, "one_by_one": foreseen, "ratio": foreseen / spent},
    }


def total(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All tasks together."""
    together, alone = (sum(task["seconds"][side] for task in tasks.values()) for side in ("together", "one_by_one"))
    sums = {name: sum(task[name] for task in tasks.values()) for name in ("cells", "probes", "checked", "other_penalties")}
    worst = max(task["largest_difference"] for task in tasks.values())
    return {
        **sums,
        "largest_difference": worst,
        "seconds": {"together": together, "one_by_one": alone, "ratio": alone / together},
    }


def measured(lens: dl.Lens, settings: Settings) -> dict[str, Any]:
    """Everything, written into the machine's file after every task."""
    path, random = settings.out / f"{settings.machine}.json", np.random.default_rng(0)
    device = lens.pipe.device.type
    found: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(settings).items() if k != "out"},
        "cores": {"workers": settings.workers, "threads_each": 1},
        "model": provenance.model_facts(lens)["hash"],
        "versions": provenance.versions(),
        "device": provenance.device_facts(lens),
        "ridge": {},
    }
    tasks: dict[str, dict[str, Any]] = {}
    shares = np.diff(np.linspace(0, settings.checked, len(settings.tasks) + 1).round().astype(int))
    for task, checked in zip(settings.tasks, shares.tolist(), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            store, samples = observed(lens, task, settings, Path(folder))
            seconds = time.perf_counter() - begun
            with threadpool_limits(1):
                tasks[task] = ridge_compared(store, samples, max(1, checked), random, settings.workers) | {
                    "seconds_observing": seconds
                }
                found["ridge"] = {"total": total(tasks), **tasks}
                _merge(path, found)
                if task == settings.tasks[0]:
                    threads = torch.get_num_threads()
                    torch.set_num_threads(settings.workers)
                    found["logistic"] = logistic_compared(store, samples, settings, random, device)
                    torch.set_num_threads(threads)
                    _merge(path, found)
    return found


def _merge(path: Path, found: dict[str, Any]) -> None:
    """Write what was found under `probes`, and leave what else the file holds."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    write_text(path, json.dumps({**results, "probes": found}, indent=1, default=str) + "\n")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that are started from here
    print(json.dumps(measured(dl.load("reasoner", engine="hooks"), settings), indent=1, default=str))


if __name__ == "__main__":
    main()
