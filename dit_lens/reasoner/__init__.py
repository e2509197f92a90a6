"""The bundled reasoner: a small image-to-video diffusion transformer of Wan2.2-I2V's own classes that solves puzzles.

`task(name)` gives a kind of puzzle, `task(name).sample(split, index)` one puzzle with everything known about it, and
`folder()` the pipeline. Every experiment runs on it within minutes on a laptop, and the same code runs on Wan2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit_lens.errors import InputError
from dit_lens.reasoner.folders import folder
from dit_lens.reasoner.settings import CALL
from dit_lens.reasoner.tasks import TASKS, Sample, Score, Split, Task, tasks
from dit_lens.reasoner.tasks import task as bundled


def task(name: str) -> Task:
    """The task with a name, or the samples of a folder in VBVR-Bench layout.

    Raises:
        InputError: there is neither, or the folder is not in that layout.
    """
    if name in TASKS or not Path(name).is_dir():
        return bundled(name)
    # Only who reads videos needs what decodes them.
    from dit_lens.reasoner.cases import FolderTask

    return FolderTask(name)


def named(names: Sequence[str]) -> dict[str, Task]:
    """Tasks by their own names; that of a folder is the last part of its path.

    Raises:
        InputError: as of `task`, or two have the same name.
    """
    found: dict[str, Task] = {}
    for name in names:
        one = task(name)
        if one.name in found:
            raise InputError(f"two tasks are named {one.name!r}; leave one out, or rename its folder")
        found[one.name] = one
    return found


def inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """The pipeline's keyword arguments for several samples at once: lists of prompts and images, everything else shared.

    Raises:
        InputError: there is no sample, or their clips differ in length or size.
    """
    lengths = sorted({s.frames for s in samples})
    if len(lengths) != 1:
        raise InputError(f"a batch needs samples of one length, and these have {lengths} frames; write one batch for each")
    each = [s.inputs for s in samples]
    sizes = sorted({(i["width"], i["height"]) for i in each})
    if len(sizes) != 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise InputError(f"a batch needs samples of one size, and these have {shown} pixels; write one folder for each size")
    return {**each[0], "prompt": [i["prompt"] for i in each], "image": [i["image"] for i in each]}


class Pair(NamedTuple):
    """Two samples that differ in a single thing, which decides the answer; what `dl.sweep` takes."""

    clean: Sample
    donor: Sample


def pairs(name: str, count: int, split: Split = "test", frames: int = CALL["num_frames"]) -> list[Pair]:
    """The first pairs of a task: of `circle` and `tictactoe` the prompt differs, of mazes the place of the goal.

    Raises:
        InputError: the task has no such pairs, or fewer than asked for.
    """
    kind = task(name)
    found: list[Pair] = []
    if kind.held is not None:
        raise InputError(
            f"the folder {name} has no pairs: of its samples only the true videos are known, not which differ in one thing;"
            " write bundled tasks that have pairs, as --tasks circle maze"
        )
    tried = 40 * count
    for index in range(tried):
        pair = kind.pair(kind.sample(split, index, frames))
        found += [Pair(*pair)] if pair else []
        if len(found) == count:
            return found
    raise InputError(f"{name} has {len(found)} pairs among its first {tried} samples, and {count} are asked for")


__all__ = ["Pair", "Sample", "Score", "Task", "folder", "inputs", "named", "pairs", "task", "tasks"]
