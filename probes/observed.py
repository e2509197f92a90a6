"""Runs of samples in a store: observed once, found again, and what the model drew in them.

A map is of one task and one model. `rows_of` finds the rows of a store that hold its samples, and refuses a mixture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import metrics
from dit_lens.errors import InputError
from dit_lens.reasoner import board
from probes.baselines import SIDE
from probes.cells import MIDDLE, Frame, named
from probes.targets import Drawn


def observe(
    lens: dl.Lens,
    store: dl.Store,
    samples: Sequence[Any],
    record: dl.Selector,
    *,
    frames: Iterable[Frame] | None = None,
    batch: int = 16,
    progress: bool = True,
    **arguments: Any,
) -> None:
    """Run samples of one task and keep their activations; those that the store holds of this model are not run again.

    Every sample has noise of its own, by its number: what samples share must not be on both sides of a split. Half precision is
    kept, which is plenty for a probe.

    Args:
        samples: of the reasoner, of one task. record: what to keep. frames: the latent frames to keep, as `Target.frame` names
            them; those of `record` when left out. arguments: of `Lens.run`, pipeline arguments that override the samples' own
            among them.
    """
    name = task_of(samples).name
    known = store.rows
    done = set(known.loc[(known["task"] == name) & (known["model"] == lens.hash), "sample"]) if len(known) else set()
    missing = [sample for sample in samples if sample.index not in done]
    wanted = None if frames is None else list(dict.fromkeys(frames))

    def half(activation: Tensor, cell: dl.Cell) -> Tensor:
        if wanted is not None:
            count = activation.shape[1]
            activation = activation[:, [count // 2 if frame is None else frame for frame in wanted]]
        return activation.half()

    kept = "" if wanted is None else " ".join(named(frame) for frame in wanted)
    for first in tqdm(range(0, len(missing), batch), desc=f"observing {name}", unit="call", disable=not progress):
        group = missing[first : first + batch]
        labels = {"task": name, "sample": [s.index for s in group], "group": [s.group for s in group], "frames": kept}
        with store.writing(lens.hash, **labels) as part:
            inputs = {**dl.reasoner.inputs(group), **arguments}
            run = lens.run(**inputs, seed=[[s.index] for s in group], record=part.streamed(dl.Record(record, reduce=half)))
            part.keep(run)


def drawn_by(store: dl.Store, samples: Sequence[Any], model: str | None = None) -> list[Drawn]:
    """What the model drew in the stored run of every sample.

    Raises:
        InputError: the store lacks a sample or holds it of several models, or the runs have no video.
    """
    found = _drawn(store, rows_of(store, samples, model), {sample.index: sample for sample in samples})
    return [found[sample.index] for sample in samples]


def _drawn(store: dl.Store, rows: pd.DataFrame, samples: dict[int, Any]) -> dict[int, Drawn]:
    """What the model drew in every sample's run."""
    found = {}
    for number, part in rows.groupby("run"):
        run = store.run(int(str(number)))
        if run.video is None:
            raise InputError(f"the run of sample {part['sample'].iloc[0]} has no video to ask about: write drawn=, or decode it")
        for row, index in zip(part["row"], part["sample"], strict=True):
            if index in samples:
                sample = samples[index]
                video = metrics.resized(run.video[[row]], *sample.image.size[::-1]).numpy()
                which = sample.task.scores(video, [sample])[0].which
                written = rearrange(run.latents[-1][row, :, -1].numpy(), "c (y py) (x px) -> c y x (py px)", py=2, px=2)
                found[index] = Drawn(board.read(video[0, -1]), which, written.mean(-1))
    return found


def rows_of(store: dl.Store, samples: Sequence[Any], model: str | None) -> pd.DataFrame:
    """The rows of the store that hold these samples, each of the same model."""
    name, numbers, rows = task_of(samples).name, {sample.index for sample in samples}, store.rows
    if len(rows):
        rows = rows[(rows["task"] == name) & rows["sample"].isin(numbers)]
        rows = rows if model is None else rows[rows["model"] == model]
    lacking = sorted(numbers - set(rows["sample"] if len(rows) else ()))
    if lacking:
        raise InputError(f"the store lacks {len(lacking)} of {len(samples)} samples of {name}, as {lacking[0]}: observe them")
    each = rows.drop_duplicates("model")
    if len(each) > 1:
        (one, first), (other, second) = each[["model", "sample"]].head(2).itertuples(index=False)
        raise InputError(
            f"the store holds {name} of {len(each)} models, as sample {first} of {one[:12]} and sample {second} of {other[:12]}:"
            " write model=, or give each model a store of its own"
        )
    return rows


def check_squares(store: dl.Store, samples: Sequence[Any]) -> None:
    """Refuse runs whose tokens are not those of a board, before many are made.

    Raises:
        InputError: a frame of the first run of these samples has not 8 x 8 tokens.
    """
    number = rows_of(store, samples, None)["run"].iloc[0]
    _, height, width = store.run(int(number)).layout.shape
    if (height, width) != (SIDE, SIDE):
        raise InputError(
            f"labels are of {SIDE} x {SIDE} tokens, and frames of {samples[0].task.name} have {height} x {width} here: write"
            f" --height and --width that give {SIDE} x {SIDE} (64 and 64 for the bundled model)"
        )


def kept_of(rows: pd.DataFrame) -> list[Frame] | None:
    """The latent frames that these rows kept, where they say so."""
    said = set(rows["frames"].fillna("") if "frames" in rows else [""])
    if len(said) > 1:
        raise InputError(f"these samples were observed with different frames, {sorted(said)}: observe them with the same")
    (text,) = said
    return [None if name == MIDDLE else int(name) for name in text.split()] or None


def task_of(samples: Sequence[Any]) -> Any:
    names = {sample.task.name for sample in samples}
    if len(names) != 1:
        raise InputError(f"a map is of samples of one task, and these are of {sorted(names)}")
    return samples[0].task
