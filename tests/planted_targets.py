"""What planted features are asked for, and runs of them in a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dit_lens as dl
from dit_lens.plants.features import FeatureSample, PlantedFeature
from probes.targets import Target

FEATURE = Target("feature", "perceptual", "binary", ("planted",), "the token's own", lambda sample, drawn: sample.feature, 0)
HERE = {"step": 0, "branch": "cond"}


def stored(
    folder: Path, model: PlantedFeature, samples: Sequence[FeatureSample], record: dl.Selector, until: int | None = 0
) -> dl.Store:
    """The samples' runs in a store, in two goes."""
    store, lens = dl.Store(folder), model.lens("hooks")
    for part in (samples[: len(samples) // 2], samples[len(samples) // 2 :]):
        run = lens.run(**model.inputs(part), seed=model.seeds(part), record=record, decode=False, until=until)
        labels = {"sample": [sample.index for sample in part], "group": [sample.group for sample in part]}
        store.append(run, lens.hash, task="planted", **labels)
    return store
