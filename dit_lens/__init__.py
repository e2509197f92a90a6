"""dit_lens: mechanistic interpretability of diffusion transformers.

    import dit_lens as dl

    lens = dl.load("reasoner")                                  # or dl.wrap(pipe), for any pipeline of your own
    run = lens.run(**inputs, seed=0, record=dl.at(block=6, step=0, branch="cond"))
    run.activation(block=6, step=0)                             # (batch, frames, height, width, channels)
    lens.decode(run.x0_hat(step=0))                             # what the model bets on at the first step, as video

The words are few, and each has one meaning: an *expert* is a denoiser, a *step* a call of the scheduler, a *branch* one
side of the guidance, a *block* a transformer block, a *site* one tensor of a block, a *cell* the place of an activation
along all of these, a *run* one call of the pipeline with all that was seen of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dit_lens.activations import Activations
from dit_lens.architectures import Architecture, Guidance, Layout, Loop, Patches, Stack, register
from dit_lens.attention_maps import frame_map, token_map
from dit_lens.calls import DenoiserCall
from dit_lens.directions import (
    Direction,
    Eraser,
    cosine,
    difference_of_means,
    differences_of_means,
    from_probe,
    project,
    random_directions,
)
from dit_lens.edits import AddNoise, Average, Edit, Mean, Moment, Patch, PatchUpdate, Resample, Skip, Steer, Zero
from dit_lens.errors import InputError
from dit_lens.knockout import KnockoutAttention
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.layer_lens import TunedLens, fit_tuned_lens, layer_lens
from dit_lens.lens import Lens, load, wrap
from dit_lens.noise import NoiseState, x0_hat
from dit_lens.pairs import Pair, PairRuns
from dit_lens.record import Record
from dit_lens.reducers import frame_mean, full, norm, region_mean
from dit_lens.replay import Replay, Resume
from dit_lens.run import Run
from dit_lens.selection import Cell, Selector, at
from dit_lens.sites import BLOCK_SITES, Gate, Site, attention_sites
from dit_lens.store import Store

if TYPE_CHECKING:
    from dit_lens import plants, reasoner
    from dit_lens.attribution import Attribution, attribute
    from dit_lens.bench import Outcome
    from dit_lens.blends import Blends
    from dit_lens.branching import branches
    from dit_lens.plants import planted
    from dit_lens.sweeping import Sweep, sweep

LATER = {
    "Outcome": "bench",
    "Sweep": "sweeping",
    "sweep": "sweeping",
    "Attribution": "attribution",
    "attribute": "attribution",
    "Blends": "blends",
    "branches": "branching",
}
"""What brings the plots and scipy along, imported when it is asked for."""

__all__ = [
    "BLOCK_SITES",
    "Activations",
    "AddNoise",
    "Architecture",
    "Attribution",
    "Average",
    "Blends",
    "Cell",
    "DenoiserCall",
    "Direction",
    "Edit",
    "Eraser",
    "Gate",
    "Guidance",
    "InputError",
    "KnockoutAttention",
    "Layout",
    "Lens",
    "Loop",
    "Mean",
    "Moment",
    "NoiseState",
    "Outcome",
    "Pair",
    "PairRuns",
    "Patch",
    "PatchUpdate",
    "Patches",
    "Record",
    "ReplaceLatents",
    "Replay",
    "Resample",
    "Resume",
    "Run",
    "Selector",
    "Site",
    "Skip",
    "Stack",
    "Steer",
    "Store",
    "Sweep",
    "TunedLens",
    "Zero",
    "at",
    "attention_sites",
    "attribute",
    "branches",
    "cosine",
    "difference_of_means",
    "differences_of_means",
    "fit_tuned_lens",
    "frame_map",
    "frame_mean",
    "from_probe",
    "full",
    "layer_lens",
    "load",
    "norm",
    "planted",
    "plants",
    "project",
    "random_directions",
    "reasoner",
    "region_mean",
    "register",
    "sweep",
    "token_map",
    "wrap",
    "x0_hat",
]


def __getattr__(name: str) -> Any:
    # The reasoner brings its tasks and their drawing along, which a user of another model does not need.
    if name in ("plants", "reasoner"):
        return importlib.import_module(f"dit_lens.{name}")
    if name == "planted":
        return importlib.import_module("dit_lens.plants").planted
    if name in LATER:
        return getattr(importlib.import_module(f"dit_lens.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
