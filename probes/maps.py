"""Maps of what can be read where: every target at every cell that was recorded, with its controls and baselines.

    store = dl.Store("activations")
    observe(lens, store, samples, dl.at(step=[0, 5, 19], branch="cond"))
    table = read_map(store, samples)

Runs are streamed to a store and cells read from it one by one, so that the activations of a thousand clips are never in
memory together. What is stored already is not run again. Each reading stands beside its control task and shuffled labels
(see `controls`), and beside baselines that see no activation: the token's place, and the noisy latents that the step takes.
An untrained model is observed into a store of its own, and its table joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import metrics
from dit_lens.errors import InputError
from dit_lens.reasoner import board
from probes.controls import read_with_controls
from probes.linear import split_groups
from probes.targets import Drawn, Target, questions, targets

CELL = ["expert", "step", "branch", "block", "site", "stream"]
LEVELS = ["sigma", "timestep", "depth"]
PROBE, PLACE, LATENTS = "probe", "place only", "noisy latents"


def half(activation: Tensor, cell: dl.Cell) -> Tensor:
    """Keeps everything in half precision, which is plenty for a probe."""
    return activation.half()


def observe(
    lens: dl.Lens,
    store: dl.Store,
    samples: Sequence[Any],
    record: dl.Selector,
    *,
    batch: int = 16,
    progress: bool = True,
    **arguments: Any,
) -> None:
    """Run samples of one task and keep their activations; those that the store holds of this model are not run again.

    Every sample has noise of its own, by its number: what samples share must not be on both sides of a split.

    Args:
        samples: of the reasoner, of one task. record: what to keep, whole latent frames. arguments: pipeline arguments that
            override the samples' own.
    """
    name = _task(samples).name
    known = store.rows
    done = set(known.loc[(known["task"] == name) & (known["model"] == lens.hash), "sample"]) if len(known) else set()
    missing = [sample for sample in samples if sample.index not in done]
    for first in tqdm(range(0, len(missing), batch), desc=f"observing {name}", unit="call", disable=not progress):
        group = missing[first : first + batch]
        labels = {"task": name, "sample": [s.index for s in group], "group": [s.group for s in group]}
        with store.writing(lens.hash, **labels) as part:
            inputs = {**dl.reasoner.inputs(group), **arguments}
            run = lens.run(**inputs, seed=[[s.index] for s in group], record=part.streamed(dl.Record(record, reduce=half)))
            part.keep(run)


def read_map(
    store: dl.Store,
    samples: Sequence[Any],
    asked: Sequence[Target] | None = None,
    *,
    test_share: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Read every target at every cell that the store holds of these samples' task.

    Args:
        samples: those that were observed. asked: which targets; all of the task when left out.

    Returns:
        One row for each cell, reader and target: the cell with its sigma, timestep and depth, `reader` (the probe, or a baseline,
        which has no block), `content` of the target, and the columns of `read_with_controls`.

    Raises:
        InputError: the store lacks a sample, or holds other tokens than those of a board.
    """
    task = _task(samples)
    asked = targets(task.name) if asked is None else list(asked)
    by_number = {sample.index: sample for sample in samples}
    rows = store.rows[store.rows["task"] == task.name]
    lacking = sorted(set(by_number) - set(rows["sample"]))
    if lacking:
        raise InputError(
            f"the store lacks {len(lacking)} of {len(samples)} samples of {task.name}, as {lacking[0]}: observe them"
        )
    drawn = _drawn(store, rows, by_number)
    index = store.index[store.index["run"].isin(rows["run"])]
    cells = index.drop_duplicates(CELL)[CELL + LEVELS]
    found: list[pd.DataFrame] = []
    steps: set[tuple[int, str]] = set()
    for cell in tqdm(
        cells.itertuples(index=False), total=len(cells), desc=f"reading {task.name}", unit="cell", disable=not progress
    ):
        place = {axis: getattr(cell, axis) for axis in CELL}
        stack, labels = store.stack(**{k: v for k, v in place.items() if k != "expert"}, task=task.name, sample=list(by_number))
        there = [by_number[number] for number in labels["sample"]]
        levels = {level: getattr(cell, level) for level in LEVELS}
        stream = np.asarray(stack.float())
        if stream.ndim != 5 or stream.shape[2:4] != (board.SQUARES // board.TOKEN,) * 2:
            raise InputError(f"a map of targets needs whole frames of 8 x 8 tokens, and the store holds {stream.shape[1:]}")
        known = [drawn[sample.index] for sample in there]
        for frame in dict.fromkeys(target.frame for target in asked):
            here = [target for target in asked if target.frame == frame]
            features = _tokens(stream, frame)
            found.append(_read(features, here, there, known, test_share, seed).assign(**place, **levels, reader=PROBE))
            if (place["step"], place["branch"]) not in steps:
                baselines = {PLACE: np.tile(np.eye(64), (len(there), 1)), LATENTS: _noisy(store, labels, place["step"], frame)}
                for reader, seen in baselines.items():
                    table = _read(seen, here, there, known, test_share, seed)
                    same = {key: place[key] for key in ("expert", "step", "branch")}
                    found.append(table.assign(**same, sigma=levels["sigma"], timestep=levels["timestep"], reader=reader))
        steps.add((place["step"], place["branch"]))
    return pd.concat(found, ignore_index=True)


def _read(
    features: np.ndarray, asked: Sequence[Target], samples: Sequence[Any], drawn: Sequence[Drawn], test_share: float, seed: int
) -> pd.DataFrame:
    """All of these targets from these features of all tokens."""
    tokens = len(features) // len(samples)
    groups = np.repeat([sample.group for sample in samples], tokens)
    _, test = split_groups(groups, test_share, seed)
    numbers, places = np.repeat([sample.index for sample in samples], tokens), np.tile(np.arange(tokens), len(samples))
    table = read_with_controls(features, questions(asked, samples, drawn), groups, test, numbers, places, seed)
    return table.assign(content=[target.content for target in asked])


def _tokens(
    stream: Float[np.ndarray, "rows frames height width channels"], frame: int | None
) -> Float[np.ndarray, "tokens channels"]:
    """The tokens of one latent frame: sample by sample, row by row. Where one frame was recorded, it is that one."""
    count = stream.shape[1]
    place = 0 if count == 1 else count // 2 if frame is None else frame
    return rearrange(stream[:, place], "rows y x c -> (rows y x) c")


def _noisy(store: dl.Store, labels: pd.DataFrame, step: int, frame: int | None) -> Float[np.ndarray, "tokens channels"]:
    """The latents that a step takes, for every token the four places that it covers."""
    parts = []
    for number, rows in labels.groupby("run", sort=False):
        latents = store.run(int(str(number))).latents[step][rows["row"].tolist()]
        chosen = latents[:, :, latents.shape[2] // 2 if frame is None else frame]
        parts.append(rearrange(chosen.numpy(), "rows c (y py) (x px) -> (rows y x) (c py px)", py=2, px=2))
    return np.concatenate(parts)


def _drawn(store: dl.Store, rows: pd.DataFrame, samples: dict[int, Any]) -> dict[int, Drawn]:
    """What the model drew in every sample's run."""
    found = {}
    for number, part in rows.groupby("run"):
        run = store.run(int(str(number)))
        assert run.video is not None  # observed runs are decoded
        for row, index in zip(part["row"], part["sample"], strict=True):
            if index in samples:
                sample = samples[index]
                video = metrics.resized(run.video[[row]], *sample.image.size[::-1]).numpy()
                which = sample.task.scores(video, [sample])[0].which
                latents = rearrange(run.latents[-1][row, :, -1].numpy(), "c (y py) (x px) -> c y x (py px)", py=2, px=2)
                found[index] = Drawn(board.read(video[0, -1]), which, latents.mean(-1))
    return found


def _task(samples: Sequence[Any]) -> Any:
    names = {sample.task.name for sample in samples}
    if len(names) != 1:
        raise InputError(f"a map is of samples of one task, and these are of {sorted(names)}")
    return samples[0].task
