"""Selectivity of every target at every block and step: of the probe map beside an experiment, or of a small one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.experiment import CLOCK_COLUMNS, Context, Part, read_manifest
from experiments.content_shares import CONTENTS
from experiments.probe_figures import TRAINED
from probes.maps import LATENTS, PROBE, observe, read_map

NEEDED = {"task", "target", "content", "reader", *CLOCK_COLUMNS, "branch", "block", "depth"}
NEEDED |= {"selectivity", "low", "high", "clusters"}
"""Columns of a probe map that can be taken up."""


def call_of(context: Context, samples: Sequence[Any]) -> dict[str, Any]:
    """Arguments of a call; what was overridden for this model goes before the settings."""
    return {**reasoner.inputs(samples), "num_inference_steps": context.settings.steps, **context.arguments}


def blocks_of(context: Context, inputs: dict[str, Any]) -> tuple[list[int], int]:
    """The blocks that are measured, and how many there are."""
    count = min(context.lens.extent(**inputs).blocks.values())
    return sorted({round(depth * (count - 1)) for depth in context.settings.depths}) or list(range(count)), count


def read(context: Context, task: str) -> Part:
    """A small map of a task's targets: what `read_map` says of the last latent frame."""
    samples = [reasoner.task(task).sample("test", index) for index in range(context.settings.read)]
    inputs = call_of(context, samples[:1])
    record = dl.at(step=context.steps(inputs), branch=context.settings.branch, block=blocks_of(context, inputs)[0], frames=-1)
    steps = inputs["num_inference_steps"]
    with TemporaryDirectory() as folder:
        store = dl.Store(folder)
        others = {"batch": context.settings.batch, **context.arguments, "num_inference_steps": steps}
        observe(context.lens, store, samples, record, progress=False, **others)
        return Part(read_map(store, samples, progress=False).assign(task=task))


def readings(context: Context) -> pd.DataFrame:
    """Selectivity of every target at every block and step (block -1: of the noisy latents), with an interval."""
    found, folder = None, context.folder.parent / "probe-map"
    manifest = read_manifest(folder)
    if manifest and manifest["model"]["hash"] == context.lens.hash:
        there = pd.read_parquet(folder / "results.parquet")
        if set(there.columns) >= NEEDED and set(CONTENTS) <= set(there["content"].dropna()):
            found = (
                there[there["branch"] == context.settings.branch].replace({"reader": {TRAINED: PROBE}}).assign(source="probe-map")
            )
    if found is None:
        jobs = {task: partial(read, context, task) for task in context.settings.read_tasks}
        parts = context.units("probes", jobs).values()
        found = pd.concat([part.table for part in parts], ignore_index=True).assign(source="own map")
    found = found[found["reader"].isin([PROBE, LATENTS])]
    found = found.assign(block=found["block"].where(found["reader"] == PROBE, -1).astype(int), value=found["selectivity"])
    # The control's own error is taken to be as large as that of the score.
    half = np.sqrt(2) * (found["high"] - found["low"]) / 2
    kept = ["task", "target", "content", *CLOCK_COLUMNS, "branch", "block", "depth", "value", "low", "high", "samples", "source"]
    found = found.assign(low=found["value"] - half, high=found["value"] + half, samples=found["clusters"])
    return found[kept].reset_index(drop=True).assign(quantity="selectivity of a target", edit=PROBE)
