"""What can be read about whole latent frames and whole clips, at every recorded cell, with controls and baselines.

    table = read_clips(store, samples)                                  the mean over all tokens, one row per clip
    table = read_frames(store, samples, site="heads", features=one_head(3, pooled_frames))
    table = read_clips(store, samples, features=each_sample, reduce="my_reducer")

The tables have the columns of `maps.read_map`. Splits are by group, as everywhere. A *kind* of row, to which a control task gives
its fixed random label and within which shuffled labels change places, is for a frame its number, and for a clip the wording of
its prompt. The baselines see the kind alone, and the noisy latents, pooled as the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, Shaped
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens.errors import InputError
from probes.clip_targets import ClipTarget, Unit, clip_questions, clip_targets
from probes.controls import read_with_controls
from probes.features import Features, Units, pooled_clip, pooled_frames
from probes.linear import check_split, split_groups
from probes.maps import CELL, LATENTS, LEVELS, PLACE, PROBE, drawn_by
from probes.ridge import Question, Reading, read_all
from probes.targets import Drawn

WORDING = "wording only"
"""The baseline of clips: which wording the prompt has."""
Read = Callable[..., list[Reading]]


def read_clips(
    store: dl.Store,
    samples: Sequence[Any],
    features: Features = pooled_clip,
    asked: Sequence[ClipTarget] | None = None,
    *,
    test_share: float = 0.5,
    seed: int = 0,
    read: Read = read_all,
    progress: bool = True,
    **wanted: Any,
) -> pd.DataFrame:
    """Read every target of clips at every cell that the store holds of these samples' task.

    Args:
        samples: those that were observed. features: what a probe sees, one row per sample. asked: which targets; all of the task
            when left out. read: `ridge.read_all` or `logistic.read_all`. wanted: which of the recorded tensors, by columns of
            `Store.index` and `Store.rows`, each a value or a list (site=, step=, reduce=, model=, ...).

    Returns:
        One row for each cell, reader and target, with the columns of `maps.read_map`.

    Raises:
        InputError: the store lacks a sample; nothing matches; features and labels have different numbers of rows.
    """
    return _read_units("clip", store, samples, features, asked, test_share, seed, read, progress, wanted)


def read_frames(
    store: dl.Store,
    samples: Sequence[Any],
    features: Features = pooled_frames,
    asked: Sequence[ClipTarget] | None = None,
    *,
    test_share: float = 0.5,
    seed: int = 0,
    read: Read = read_all,
    progress: bool = True,
    **wanted: Any,
) -> pd.DataFrame:
    """As `read_clips`, for targets of latent frames; features have one row per frame, and all frames were recorded."""
    return _read_units("frame", store, samples, features, asked, test_share, seed, read, progress, wanted)


def drawn_by_number(store: dl.Store, samples: Sequence[Any], model: str | None = None) -> dict[int, Drawn]:
    """What the model drew in the stored run of every sample, by the sample's number; errors as of `drawn_by`."""
    return dict(zip((sample.index for sample in samples), drawn_by(store, samples, model), strict=True))


@dataclass(frozen=True, eq=False)
class _Asked:
    """The same questions about the same rows, to be read from one thing and another."""

    questions: list[Question]
    contents: list[str]
    groups: Shaped[np.ndarray, " rows"]
    test: Bool[np.ndarray, " rows"]
    samples: Int[np.ndarray, " rows"]
    kinds: Int[np.ndarray, " rows"]
    seed: int
    read: Read

    def of(self, rows: Float[np.ndarray, "rows channels"]) -> pd.DataFrame:
        """What each target's probe reads from these features."""
        table = read_with_controls(rows, self.questions, self.groups, self.test, self.samples, self.kinds, self.seed, self.read)
        return table.assign(content=self.contents)


def _read_units(
    unit: Unit,
    store: dl.Store,
    samples: Sequence[Any],
    features: Features,
    asked: Sequence[ClipTarget] | None,
    test_share: float,
    seed: int,
    read: Read,
    progress: bool,
    wanted: dict[str, Any],
) -> pd.DataFrame:
    drawn, task = drawn_by_number(store, samples, wanted.get("model")), samples[0].task
    asked = clip_targets(task.name, unit) if asked is None else list(asked)
    other = [target.name for target in asked if target.unit != unit]
    if other or not asked:
        raise InputError(
            f"{other[0]!r} is not asked of a {unit}" if other else f"{task.name} has no target of a {unit}: write one"
        )
    check_split(samples, [sample.group for sample in samples])
    by_number = {sample.index: sample for sample in samples}
    here = {**wanted, "task": task.name, "sample": list(by_number)}
    index = store.index[store.index["run"].isin(_matching(store.rows, here)["run"])]
    cells = _matching(index, here).drop_duplicates(CELL)[CELL + LEVELS]
    if cells.empty:
        raise InputError(f"the store holds nothing of {task.name} at {wanted}")
    found: list[pd.DataFrame] = []
    moments: set[tuple[Any, ...]] = set()
    rows: list[dict[str, Any]] = cells.to_dict("records")  # pyright: ignore[reportAssignmentType]
    for row in tqdm(rows, desc=f"reading {unit}s of {task.name}", unit="cell", disable=not progress):
        stack, labels = store.stack(**{**here, **{axis: row[axis] for axis in CELL}})
        there = [by_number[number] for number in labels["sample"]]
        units = features(np.asarray(stack.float()))
        if units.ndim != 3 or len(units) != len(there):
            raise InputError(f"features gave {units.shape} for {len(there)} samples: return (samples, units, channels)")
        groups, numbers = (np.repeat([getattr(sample, name) for sample in there], units.shape[1]) for name in ("group", "index"))
        reader = _Asked(
            clip_questions(asked, there, [drawn[sample.index] for sample in there], units.shape[1]),
            [target.content for target in asked],
            groups,
            split_groups(groups, test_share, seed)[1],
            numbers,
            _kinds(unit, there, units.shape[1]),
            seed,
            read,
        )
        found.append(reader.of(_joined(units)).assign(**row, reader=PROBE))
        moment = {key: row[key] for key in ("expert", "step", "branch", "sigma", "timestep")}
        if tuple(moment.values()) not in moments:
            moments.add(tuple(moment.values()))
            alone = reader.of(np.eye(reader.kinds.max() + 1)[reader.kinds])
            found.append(alone.assign(**moment, reader=PLACE if unit == "frame" else WORDING))
            found.append(reader.of(_joined(_noisy(store, labels, row["step"], unit))).assign(**moment, reader=LATENTS))
    return pd.concat(found, ignore_index=True)


def _joined(units: Units) -> Float[np.ndarray, "rows channels"]:
    """Sample by sample, unit by unit."""
    return rearrange(units, "samples units channels -> (samples units) channels")


def _matching(table: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    """The rows whose columns have these values, or one of a list."""
    for name in set(wanted) & set(table):
        values = wanted[name] if isinstance(wanted[name], list) else [wanted[name]]
        table = table[table[name].isin(values)]
    return table


def _kinds(unit: Unit, samples: Sequence[Any], units: int) -> Int[np.ndarray, " rows"]:
    """The number of a frame, or of the wording of a clip's prompt."""
    if unit == "frame":
        return np.tile(np.arange(units), len(samples))
    said = []
    for sample in samples:
        words = sample.task.words(sample.puzzle)
        said.append([wording.format(**words) for wording in sample.task.wordings].index(sample.prompt))
    return np.repeat(said, units)


def _noisy(store: dl.Store, labels: pd.DataFrame, step: int, unit: Unit) -> Units:
    """The latents that a step takes, averaged over each frame or over the clip."""
    parts: list[Float[np.ndarray, "samples frames channels"]] = []
    for number, rows in labels.groupby("run", sort=False):
        latents = store.run(int(str(number))).latents[step][rows["row"].tolist()]
        parts.append(reduce(latents.numpy(), "samples channels frames y x -> samples frames channels", "mean"))
    frames = np.concatenate(parts)
    return frames if unit == "frame" else frames.mean(axis=1, keepdims=True)
