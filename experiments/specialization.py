"""Specialization: which blocks hold, lose and decide what (paper 2603.16870, sections 4.3 and 5, and its three bands of layers).

The paper divides the layers into perception (relative depth below 0.25), reasoning (below 0.75) and consolidation. Here three
kinds of evidence are laid over depth, block by block and step by step, each with its interval and its control:

* selectivity: how much better probes read perceptual, reasoning and consolidation targets than control tasks (`probes.maps`);
* damage: what x0-hat of the same step, decoded, loses of perception, reasoning and picture without the block (`damage`). The
  control moves the stream as far in random directions;
* patching: how much more of the donor's answer that x0-hat paints, when the block's update is that of the donor's run at the same
  step. A pair differs in the words or in one object, by which no answer is right for both. An answer that is only erased counts
  for nothing. The control is the donor of another pair.

Damage and patching act on one guidance branch, whose own x0-hat is read. That is what a block does for the present bet; what
comes of it in the end is asked by layer-ablation. Shares of content and bands follow from these (`content_shares`); boundaries of
bands are change points of the shares, found from the data (`probes.change_points`), and compared with the paper's.

Selectivity is taken from the results of probe-map in the same folder, if these are of the same model; otherwise a small map is
made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.activations import Activations
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from experiments import layer_figures
from experiments.content_shares import CONTENT_OF, of_damage, of_patching, of_readings
from experiments.damage import Scorer
from experiments.layer_figures import ABLATED, NOISE, OTHER, PATCHED
from experiments.readings import blocks_of, call_of, readings
from experiments.specialization_claims import BESIDE, CLAIMS, beside

DONORS = "marks of the donor's answer"
"""Of the squares that a legal answer of the donor paints, the share that is painted (the marks of `damage`)."""


@dataclass(frozen=True)
class Settings:
    """``places`` are points along the schedule of ``steps``, ``depths`` along the blocks (all when there is none); ``batch`` is
    rows per pipeline call; ``read`` samples of each of the ``read_tasks`` are probed where there is no probe map."""

    tasks: tuple[str, ...] = ("circle",)
    pairs: int = 3
    batch: int = 4
    steps: int = 6
    places: tuple[float, ...] = (0.2,)
    depths: tuple[float, ...] = (0, 0.16, 0.31, 0.46, 0.62, 0.85, 1)
    branch: str = "cond"
    read_tasks: tuple[str, ...] = ("circle",)
    read: int = 12


def measure(context: Context, pairs: Sequence[Any]) -> Part:
    """One batch of pairs: a row for each pair, step, block, edit and measure."""
    lens, branch = context.lens, context.settings.branch
    inputs = {side: call_of(context, [getattr(pair, side) for pair in pairs]) for side in ("clean", "donor")}
    scorers = {side: Scorer([getattr(pair, side) for pair in pairs], lens.pipe._execution_device) for side in inputs}
    seeds = [[pair.clean.index] for pair in pairs]
    runs = {side: lens.run(**call, seed=seeds, decode=False, keep_calls=True) for side, call in inputs.items()}
    blocks, count = blocks_of(context, inputs["clean"])

    def scored(x0_hat: Any) -> dict[str, np.ndarray]:
        boards, picture = scorers["clean"].read(lens.decode(x0_hat))
        found = scorers["clean"].measured(boards, picture)
        return {**found, DONORS: scorers["donor"].marks(boards)}

    tables = []
    for clock in context.clock(inputs["clean"]):
        at = dl.at(step=clock["step"], branch=branch)
        call, before = runs["clean"].calls[clock["step"], branch], scored(runs["clean"].x0_hat(clock["step"], branch))
        streams = lens.replay(call, record=at).activations
        updates = lens.replay(runs["donor"].calls[clock["step"], branch], record=replace(at, site="update")).activations
        others = Activations([replace(entry, tensor=entry.tensor.roll(-1, dims=0)) for entry in updates])
        for block in blocks:
            here = replace(at, block=block, site="update")
            edits = {ABLATED: dl.Zero(here), NOISE: dl.AddNoise(here, dose=1.0)}
            edits |= {PATCHED: dl.PatchUpdate(here, updates), OTHER: dl.PatchUpdate(here, others)}
            # The blocks before it need not run again.
            start = dl.Resume(block, streams.one(block=block - 1)) if block else None
            where = {"task": pairs[0].clean.task.name, **clock, "branch": branch, "block": block, "depth": block / count}
            for name, edit in edits.items():
                after = scored(lens.replay(call, edits=edit, resume=start).x0_hat)
                for measured, value in after.items():
                    found = {"sample": [pair.clean.index for pair in pairs], "edit": name, "measure": measured}
                    tables.append(pd.DataFrame({**where, **found, "clean": before[measured], "value": value}))
    return Part(pd.concat(tables, ignore_index=True))


def run(context: Context) -> pd.DataFrame:
    settings, jobs = context.settings, {}
    calls = -(-settings.pairs // settings.batch)
    if settings.pairs < 2 * calls:
        raise InputError(
            "specialization patches from another pair's donor: write --pairs and --batch with two pairs or more a call"
        )
    for task in settings.tasks:
        pairs = reasoner.pairs(task, settings.pairs)
        for number, places in enumerate(np.array_split(np.arange(len(pairs)), calls)):
            jobs[f"{task}-{number:03d}"] = partial(measure, context, [pairs[place] for place in places])
    edited = pd.concat([part.table for part in context.units("edits", jobs).values()], ignore_index=True)
    # Pairs of two tasks with the same number are two pairs.
    edited["one"] = edited["task"] + edited["sample"].astype(str)
    lost = edited.assign(content=edited["measure"].map(CONTENT_OF), value=edited["clean"] - edited["value"]).dropna(
        subset="content"
    )
    moved = edited[edited["measure"] == DONORS]
    moved = moved.assign(content="reasoning", value=moved["value"] - moved["clean"])
    asked = readings(context)
    selectivity_shares, selectivity, gain = of_readings(asked)
    profiles = {
        "selectivity": selectivity_shares,
        "damage": of_damage(lost[lost["edit"] == ABLATED]),
        "noise": of_damage(lost[lost["edit"] == ABLATED], lost[lost["edit"] == NOISE], f"{NOISE}, over the damage"),
        "patching": of_patching(moved[moved["edit"] == PATCHED], PATCHED),
        "other": of_patching(moved[moved["edit"] == OTHER], OTHER),
    }
    layer_figures.specialization(context, profiles, gain)
    layer_figures.specialization_maps(context, asked, lost[lost["edit"].isin([ABLATED, NOISE])], moved)
    derived = [profile.table() for profile in (*profiles.values(), selectivity, gain)]
    raw = pd.concat([lost, moved]).drop(columns="one").assign(quantity="change by an edit")
    context.table("Damage in the claim's bands", beside(raw), BESIDE)
    return pd.concat([raw, asked, *derived], ignore_index=True).astype({"step": "Int64", "sample": "Int64", "samples": "Int64"})


EXPERIMENT = Experiment(
    name="specialization",
    title="Specialization map",
    source="sections 4.3 and 5.1 of arXiv 2603.16870 (a test of its three bands of layers)",
    question="Which blocks hold, lose and decide perception, reasoning and output, and are there bands as the paper draws them?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=("circle", "maze", "tictactoe"),
            pairs=100,
            batch=100,
            steps=20,
            places=(0, 0.16, 0.42, 0.8),
            depths=(),
            read_tasks=("circle", "maze", "tictactoe"),
            read=256,
        ),
    },
    run=run,
    claims=CLAIMS,
    after=("probe-map",),
    minutes=3,
)
