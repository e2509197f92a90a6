"""What probes ask of whole frames and whole clips: one label for each latent frame, or one for the clip.

A target is one function from a sample, and from what the model then drew, to its labels; yours is too:

    left = ClipTarget("left", "perceptual", "binary", ("maze",), "starts left", "clip", lambda sample, drawn: mine(sample))

The VAE takes the first video frame to the first latent frame, and every four further ones to one more: latent frame f holds the
video frames 4 f - 3 to 4 f. What is asked of it is what its last video frame shows *in the true video*, so such targets exist
for tasks with one legal answer only. Frames and clips that are not asked hold nan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from dit_lens.errors import InputError
from dit_lens.reasoner.board import OBJECT_COLOURS, SHAPES, Colour
from dit_lens.reasoner.tasks.pattern import COLOURS, SIZES
from probes.ridge import Kind, Question
from probes.targets import ALL, MAZES, Drawn

Unit = Literal["frame", "clip"]
PER_LATENT = 4
"""Video frames of a latent frame, but for the first."""


@dataclass(frozen=True, eq=False)
class ClipTarget:
    """One question about the latent frames of a clip, or about the clip.

    Attributes:
        name, content, kind, tasks, rule: as of a `Target`. unit: what has a label.
        labels: (sample, what was drawn) -> one number for each latent frame, or one number; nan where it is not asked.
    """

    name: str
    content: Literal["perceptual", "reasoning", "consolidation"]
    kind: Kind
    tasks: tuple[str, ...]
    rule: str
    unit: Unit
    labels: Callable[[Any, Drawn], float | Float[np.ndarray, " frames"]]


def clip_questions(targets: Sequence[ClipTarget], samples: Sequence[Any], drawn: Sequence[Drawn], units: int) -> list[Question]:
    """The targets as questions about the units of all samples: sample by sample, frame by frame.

    Raises:
        InputError: a target has another number of labels than there are units; the sample is named.
    """
    found = []
    for target in targets:
        labels = []
        for sample, seen in zip(samples, drawn, strict=True):
            own = np.atleast_1d(np.asarray(target.labels(sample, seen), dtype=float))
            if own.shape != (units,):
                raise InputError(
                    f"{target.name!r} has labels of shape {own.shape} for sample {sample.index} of {sample.task.name}, and its"
                    f" features {units} rows: it is asked of each {target.unit}"
                )
            labels.append(own)
        found.append(Question(target.name, target.kind, np.concatenate(labels)))
    return found


def clip_targets(task: str, unit: Unit) -> list[ClipTarget]:
    """The targets of a task that have a label for each such unit."""
    return [target for target in CLIP_TARGETS if task in target.tasks and target.unit == unit]


def _shown(sample: Any) -> np.ndarray:
    """What the last video frame of each latent frame shows in the true video, as palette indices."""
    return sample.boards[::PER_LATENT]


def _place(colour: Colour, axis: int) -> Callable[[Any, Drawn], Float[np.ndarray, " frames"]]:
    """The row (axis 0) or column (axis 1) of the only square of a colour, in squares; not asked in the frame that is given."""

    def labels(sample: Any, drawn: Drawn) -> Float[np.ndarray, " frames"]:
        places = [np.argwhere(board == colour)[0, axis] for board in _shown(sample)]
        return np.array([np.nan, *places[1:]], dtype=float)

    return labels


def _behind(sample: Any, drawn: Drawn) -> Float[np.ndarray, " frames"]:
    boards = _shown(sample)
    if not sample.puzzle.hides:
        return np.full(len(boards), np.nan)
    covered = (boards == Colour.GREY)[:, sample.masks["target"]].mean(axis=1)
    return np.array([np.nan, *(covered[1:] >= 0.5)], dtype=float)


def _moves(sample: Any, drawn: Drawn) -> float:
    return (len(sample.answers[0]) - 1) / 2


def _only(sample: Any) -> Any:
    return sample.answers[0] if len(sample.answers) == 1 else None


def _winning(sample: Any, drawn: Drawn) -> float:
    return np.nan if _only(sample) is None else float(_only(sample))


def _next(sample: Any, drawn: Drawn) -> float:
    return np.nan if _only(sample) is None else float([*SIZES, *COLOURS].index(_only(sample)))


def _named_colour(sample: Any, drawn: Drawn) -> float:
    return float(list(OBJECT_COLOURS).index(sample.puzzle.target[0]))


def _named_shape(sample: Any, drawn: Drawn) -> float:
    return float(list(SHAPES).index(sample.puzzle.target[1]))


CLIP_TARGETS = (
    ClipTarget("rooms", "perceptual", "number", MAZES, "rooms per side", "clip", lambda s, drawn: float(s.puzzle.rooms)),
    ClipTarget("route length", "reasoning", "number", MAZES, "moves from room to room of a shortest route", "clip", _moves),
    ClipTarget("named colour", "perceptual", "classes", ("circle",), "of the objects to circle", "clip", _named_colour),
    ClipTarget("named shape", "perceptual", "classes", ("circle",), "of the objects to circle", "clip", _named_shape),
    ClipTarget("winning cell", "reasoning", "classes", ("tictactoe",), "where one cell wins", "clip", _winning),
    ClipTarget("next symbol", "reasoning", "classes", ("pattern",), "where one symbol is legal", "clip", _next),
    ClipTarget(
        "solved",
        "consolidation",
        "binary",
        ALL,
        "the model's own video is a legal answer",
        "clip",
        lambda s, d: d.which is not None,
    ),
    ClipTarget("agent's row", "reasoning", "number", ("maze",), "in squares", "frame", _place(Colour.GREEN, 0)),
    ClipTarget("agent's column", "reasoning", "number", ("maze",), "in squares", "frame", _place(Colour.GREEN, 1)),
    ClipTarget("ball's row", "reasoning", "number", ("bounce",), "in squares", "frame", _place(Colour.YELLOW, 0)),
    ClipTarget("ball's column", "reasoning", "number", ("bounce",), "in squares", "frame", _place(Colour.YELLOW, 1)),
    ClipTarget("behind screen", "reasoning", "binary", ("permanence",), "at least half of its squares", "frame", _behind),
)
