"""Planted models: tiny Wan pipelines whose mechanism was set by hand, so that it is known where the answer comes from.

    model = dl.planted("copy", seed=3)
    model.truth                               # Truth(kind='copy', block=2, head=1, component='attn', ...)
    lens = model.lens()
    pair = model.pairs(1)[0]                  # a clean and a donor sample that differ in the answer only
    run = lens.run(**pair.clean.inputs, seed=pair.clean.seed)
    model.answer(run.latents[-1])             # near +1 or -1, and 0 where the video shows no answer

A tool that points at a block of a trained model cannot be checked: nobody knows what the block does. Here it can: run it
on planted models, and compare with `table.TABLE`, which was written down before any tool was run on them. Everything but
the mechanism is a random background, so that models of different seeds differ, and no tool can win by looking for what
is not zero.

    dl.plants.measure(model, "update")        # the effect that patching a block's update has, block by block
    dl.plants.measure(model, my_tool)         # the same of a tool of your own; see `plants.tools`

Probes have known answers of their own: `planted_feature` plants a feature that a block writes, and another erases; see
`plants.features`.

What every tool of the table found on many models is in docs/tools.md, which `python -m dit_lens.plants` writes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dit_lens.pairs import Pair
from dit_lens.plants.build import KINDS, planted
from dit_lens.plants.features import FEATURES, FeatureTruth, PlantedFeature, planted_feature
from dit_lens.plants.model import Planted, Sample
from dit_lens.plants.readings import verdict
from dit_lens.plants.table import TABLE, TOOLS, Entry, Truth

if TYPE_CHECKING:
    from dit_lens.plants.tools import Trial, measure, measure_all

LATER = {"Trial": "tools", "measure": "tools", "measure_all": "tools"}
"""What brings sweeps and probes along, imported when it is asked for."""

__all__ = [
    "FEATURES",
    "KINDS",
    "TABLE",
    "TOOLS",
    "Entry",
    "FeatureTruth",
    "Pair",
    "Planted",
    "PlantedFeature",
    "Sample",
    "Trial",
    "Truth",
    "measure",
    "measure_all",
    "planted",
    "planted_feature",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(f"dit_lens.plants.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
