"""Maps of what can be read where: every target at every cell that was recorded, with its controls and baselines.

    store = dl.Store("activations")
    observe(lens, store, samples, dl.at(step=[0, 5, 19], branch="cond"))
    table = read_map(store, samples)

Runs are streamed to a store and cells read from it one by one, so that the activations of a thousand clips are never in
memory together. What is stored already is not run again. Each reading stands beside its control task and shuffled labels
(see `controls`), and beside baselines that see no activation (see `baselines`). An untrained model is observed into a store of
its own, and asked for what the trained one drew:

    untrained = read_map(other, samples, drawn=drawn_by(store, samples), baselines=False)

Whatever shares a puzzle (the tokens and frames of a clip, wordings of a sample, its turned and mirrored copies) is on one side
of every split; `check_split` refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens.errors import InputError
from probes.baselines import LATENTS, PLACE, SITUATION, TIMESTEP, latents, place, situation, timestep
from probes.cells import CELL, LEVELS, CellReader, Frame
from probes.closer import Closer
from probes.linear import check_split, split_groups
from probes.observed import drawn_by, kept_of, observe, rows_of, task_of
from probes.ridge import Question
from probes.targets import MAZES, Drawn, Target, questions, targets

__all__ = ["LATENTS", "PLACE", "PROBE", "SITUATION", "TIMESTEP", "check_split", "drawn_by", "observe", "read_map"]

PROBE = "probe"


def read_map(
    store: dl.Store,
    samples: Sequence[Any],
    asked: Sequence[Target] | None = None,
    *,
    test_share: float = 0.5,
    seed: int = 0,
    progress: bool = True,
    model: str | None = None,
    groups: Sequence[str] | None = None,
    drawn: Sequence[Drawn] | None = None,
    baselines: bool = True,
    closer: Closer | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Read every target at every cell that the store holds of these samples' task.

    Args:
        samples: those that were observed. asked: which targets. All of the task when left out; of these, what cannot be asked of
            this model is nan.
        test_share: share of the groups to test on. seed: of the split and the controls.
        model: the hash of the model, where the store holds runs of several. groups: for every sample a name of what must not
            be divided; the puzzle up to symmetry when left out.
        drawn: what is asked for as drawn, for every sample; by the stored runs when left out.
        baselines: whether to read those too. closer: what to look at more closely.
        workers: processes that read cells; 0 for one on each core. The table does not depend on it.

    Returns:
        One row for each cell, reader and target: the cell with its sigma, timestep and depth, `reader` (the probe, or a baseline,
        which has no block), `content` of the target, the columns of `read_with_controls`, and those of `Closer.look`.

    Raises:
        InputError: the store lacks a sample, holds it of several models or without a frame that a target reads, or holds other
            tokens than those of a board; samples of one puzzle are in different groups; the training part has fewer groups than
            there are folds; labels off the layout; a target among `asked` has no labels, or those of one class only, in the
            training or the test part; `groups` or `drawn` has not one entry for each sample.
    """
    task = task_of(samples)
    wanted = targets(task.name) if asked is None else list(asked)
    for name, given in (("groups", groups), ("drawn", drawn)):
        if given is not None and len(given) != len(samples):
            raise InputError(f"{name}= has {len(given)} entries, and there are {len(samples)} samples: write one for each")
    names = [sample.group for sample in samples] if groups is None else list(groups)
    check_split(samples, names)
    _, numbered = np.unique(names, return_inverse=True)
    rows = rows_of(store, samples, model)
    drawn = drawn_by(store, samples, model) if drawn is None else drawn
    found, (train, test) = questions(wanted, samples, drawn), split_groups(numbered, test_share, seed)
    if asked is not None:
        _check_answerable(found, samples, {"training": train, "test": test})
    frames, contents = zip(*[(target.frame, target.content) for target in wanted], strict=True)
    known = {"task": task.name, "model": rows["model"].iloc[0]}
    numbers = [sample.index for sample in samples]
    reader = CellReader(store, known, numbers, found, frames, contents, kept_of(rows), numbered, test, seed, closer)
    index = store.index[store.index["run"].isin(rows["run"])]
    cells = index.drop_duplicates(CELL)[CELL + LEVELS]
    jobs: list[Any] = [delayed(reader.cell)({**axes, "reader": PROBE}) for axes in cells.to_dict("records")]
    if baselines:
        jobs += [delayed(reader.read)(*job) for job in _baselines(store, rows, samples, cells, set(frames))]
    tables = Parallel(n_jobs=workers or -1, return_as="generator")(jobs)
    bar = tqdm(tables, total=len(jobs), desc=f"reading {task.name}", unit="cell", disable=not progress)
    return _at_every_step(pd.concat(bar, ignore_index=True), cells)


def _baselines(
    store: dl.Store, rows: pd.DataFrame, samples: Sequence[Any], cells: pd.DataFrame, frames: set[Frame]
) -> list[tuple[dict[Frame, np.ndarray], dict[str, Any]]]:
    """Features by latent frame, and labels, of what sees no activation; without a step where all steps have the same."""
    steps = cells.drop_duplicates("step")
    blind: list[tuple[str, Callable[[], np.ndarray]]] = [(PLACE, lambda: place(samples))]
    if samples[0].task.name in MAZES:
        blind.append((SITUATION, lambda: situation(samples)))
    blind.append((TIMESTEP, lambda: timestep(samples, float(steps["timestep"].iloc[0]))))
    jobs: list[Any] = [(dict.fromkeys(frames, features()), {"reader": reader}) for reader, features in blind]
    taken: dict[tuple[int, Frame], dict[int, np.ndarray]] = {(step, frame): {} for step in steps["step"] for frame in frames}
    for number, part in rows.groupby("run"):
        run = store.run(int(str(number)))
        for (step, frame), of in taken.items():
            seen = latents(run.latents[step][part["row"].tolist()].numpy(), frame)
            of |= dict(zip(part["sample"], np.split(seen, len(part)), strict=True))
    for step in steps["step"]:
        seen = {frame: np.concatenate([taken[step, frame][sample.index] for sample in samples]) for frame in frames}
        jobs.append((seen, {"reader": LATENTS, "step": step}))
    return jobs


def _at_every_step(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The table with a row of every baseline for each step and branch of the cells."""
    at = cells.drop_duplicates(["expert", "step", "branch"])[["expert", "step", "branch", "sigma", "timestep"]]
    probed, blind = table[table["reader"] == PROBE], table[table["reader"] != PROBE]
    if blind.empty:
        return table
    own = blind["step"].notna()
    clock = [name for name in at if name in blind]
    each = blind[own].drop(columns=[name for name in clock if name != "step"]).astype({"step": at["step"].dtype})
    parts = [probed, blind[~own].drop(columns=clock).merge(at, how="cross"), each.merge(at, on="step")]
    return pd.concat(parts, ignore_index=True)


def _check_answerable(asked: Sequence[Question], samples: Sequence[Any], parts: dict[str, Bool[np.ndarray, " samples"]]) -> None:
    """An InputError where a target has nothing to learn or to score."""
    for question in asked:
        labels = np.asarray(question.values, dtype=float).reshape(len(samples), -1)
        about = f"the target {question.name!r} of {samples[0].task.name}"
        if np.isnan(labels).all():
            raise InputError(f"{about} is nan for every token of all {len(samples)} samples, as {samples[0].index}: label some")
        for part, inside in parts.items():
            values = np.unique(labels[inside][~np.isnan(labels[inside])])
            if len(values) < 2:
                there = [sample.index for sample, row in zip(samples, inside, strict=True) if row]
                raise InputError(
                    f"{about} has {f'only the label {values[0]:g}' if len(values) else 'no label'} in all {len(there)} {part}"
                    f" samples, as {there[0]}: add samples that differ, or leave the target out"
                )
