"""Probe map: what can be read from the stream, block by block and step by step (paper 2603.16870, sections 4.3 and 5).

Linear probes read the tokens of the last latent frame, where the answer will stand. Every token inside a maze holds one
room with its upper and left edge. Four targets, from perception to output, and a control:

* wall: both of the room's edges are walls (at least three of the token's four squares);
* route: the room lies on the legal route (mazes with one);
* which: of the rooms that some but not all legal routes pass, those on the route that the model itself then drew (mazes
  with several, where it drew a legal one);
* output: the room is painted in the model's own final video (mazes with one route);
* control: every place in a maze of a size has a fixed random label. A probe's gain over it is its selectivity.

Start and goal count for wall and control only: they lie on every route. Mazes, with all their turned and mirrored copies,
are either in training or in testing. The baselines see no activation: the place of the room and the size of the maze; and
these with the straight distances to start and goal and the number of open edges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics, reasoner
from dit_lens.errors import InputError
from dit_lens.experiment import Context, Experiment, Part
from dit_lens.reasoner import board
from experiments import figures
from experiments.figures import PLACE, PROBE, SITUATION
from probes import fit_and_score
from probes.rooms import place_control, place_features, room_table, situation_features

ASKED = {"maze": ("wall", "route", "output", "control"), "maze-loops": ("which",)}


@dataclass(frozen=True)
class Settings:
    """``mazes`` of each kind; ``places`` are points along the schedule; ``batch`` is rows per pipeline call."""

    mazes: int = 40
    batch: int = 8
    places: tuple[float, ...] = (0, 0.05, 0.16, 0.42, 1)
    branch: str = "cond"
    test_share: float = 0.5


def half(activation: Tensor, cell: dl.Cell) -> Tensor:
    """Keeps the selected tokens in half precision, which is plenty for a linear probe."""
    return activation.half()


def observe(context: Context, samples: Sequence[Any], first: int) -> Part:
    """One pipeline call: a row per room, and for every step the rooms' activations as (rooms, blocks, channels)."""
    # A seed for every maze: what mazes share must not be on both sides of a split, and noise can be read from the stream.
    seeds = [[first + place] for place in range(len(samples))]
    inputs, branch = context.inputs(samples), context.settings.branch
    record = dl.Record(dl.at(step=context.steps(inputs), branch=branch, frames=-1), reduce=half)
    run = context.lens.run(**inputs, seed=seeds, record=record)
    inside = np.stack([sample.puzzle.room_tokens for sample in samples])
    if (run.layout.height, run.layout.width) != inside.shape[1:]:
        raise InputError(
            f"probe-map reads rooms from {inside.shape[1]} x {inside.shape[2]} tokens, and this run has"
            f" {run.layout.height} x {run.layout.width}: write another --height and --width"
        )
    video = metrics.resized(run.video, *samples[0].image.size[::-1]).numpy()
    routes = [score.which for score in samples[0].task.scores(video, samples)]
    painted = board.read(video[:, -1]) != np.stack([sample.boards[0] for sample in samples])
    rooms = [room_table(*maze) for maze in zip(samples, painted, routes, strict=True)]
    arrays = {}
    for step in context.steps(inputs):
        stream = run.activations.stack(step=step, branch=branch)[:, 0, :, 0].numpy()  # block, maze, row, column, channel
        arrays[f"step{step}"] = np.moveaxis(stream, 0, 3)[inside]
    return Part(pd.concat(rooms, ignore_index=True), arrays)


def probe(rooms: pd.DataFrame, features: np.ndarray, target: str, test_share: float) -> dict[str, Any]:
    """The held-out score of one reader on the rooms that the target is asked of."""
    if target == "control":
        rooms = rooms.assign(control=place_control(rooms))
    asked = rooms["contested"] & rooms["legal"] if target == "which" else np.ones(len(rooms), dtype=bool)
    asked &= ~rooms["end"] | (target in ("wall", "control"))
    labels, groups = (
        rooms.loc[asked, target].to_numpy(dtype=bool),
        rooms.loc[asked, "group"].to_numpy(dtype=str),
    )
    return {"target": target, **asdict(fit_and_score(features[asked], labels, groups, test_share))}


def probe_step(context: Context, observed: Mapping[str, Part], task: str, clock: dict[str, Any]) -> Part:
    """All probes of a task at one step: a row per block and target."""
    parts = [part for key, part in observed.items() if key.startswith(f"{task}_")]
    rooms = pd.concat([part.table for part in parts], ignore_index=True)
    stream = np.concatenate([part.arrays[f"step{clock['step']}"] for part in parts])
    rows = []
    for block in range(stream.shape[1]):
        where = {"task": task, "reader": PROBE, **clock, "block": block, "depth": block / stream.shape[1]}
        rows += [where | probe(rooms, stream[:, block], t, context.settings.test_share) for t in ASKED[task]]
    return Part(pd.DataFrame(rows))


def probe_baselines(context: Context, observed: Mapping[str, Part], task: str) -> Part:
    """What can be said of a task's rooms without any activation: a row per baseline and target."""
    rooms = pd.concat([part.table for key, part in observed.items() if key.startswith(f"{task}_")], ignore_index=True)
    rows = []
    for reader, features in ((PLACE, place_features(rooms)), (SITUATION, situation_features(rooms))):
        where = {"task": task, "reader": reader}
        rows += [where | probe(rooms, features, t, context.settings.test_share) for t in ASKED[task]]
    return Part(pd.DataFrame(rows))


def run(context: Context) -> pd.DataFrame:
    settings = context.settings
    runs, probes, observed = {}, {}, {}
    for task in ASKED:
        mazes = [reasoner.task(task).sample("test", i) for i in range(settings.mazes)]
        for first in range(0, len(mazes), settings.batch):
            runs[f"{task}_{first:03d}"] = partial(observe, context, mazes[first : first + settings.batch], first)
        for clock in context.clock(context.inputs(mazes[:1])):
            clock |= {"branch": settings.branch}
            probes[f"{task}_step{clock['step']:02d}"] = partial(probe_step, context, observed, task, clock)
        probes[f"{task}_baselines"] = partial(probe_baselines, context, observed, task)
    # Activations are large, and needed only while some probe is still to be trained.
    if not context.has("probes", list(probes)):
        observed.update(context.units("activations", runs))
    results = pd.concat([part.table for part in context.units("probes", probes).values()], ignore_index=True)
    results = results.astype({"step": "Int64", "block": "Int64"})  # none for a baseline
    control = results[results["target"] == "control"].set_index(["reader", "step", "block"])["estimate"]
    readers = pd.MultiIndex.from_frame(results[["reader", "step", "block"]])
    results["selectivity"] = results["estimate"] - control.reindex(readers).to_numpy()
    context.discard("activations")
    figures.probe_scores(context, results.rename(columns={"estimate": "mean"}))
    return results.rename(columns={"estimate": "auc"})


EXPERIMENT = Experiment(
    name="probe-map",
    title="Probe map",
    source="sections 4.3 and 5 of arXiv 2603.16870 (a probe of claims made there from pictures)",
    question="What can be read from the tokens at each block and step: the walls, the route, the choice, the output?",
    presets={
        "quick": Settings(),
        "full": Settings(mazes=256, batch=64, places=tuple(np.linspace(0, 1, 10).tolist())),
    },
    run=run,
)
