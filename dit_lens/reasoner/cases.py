"""A folder in VBVR-Bench layout as a task: whatever takes a task's name takes such a folder.

    cases = dl.reasoner.task("path/to/samples")     # one folder per sample, see `vbvr`
    sample = cases.sample(index=0)

Of a sample of unknown origin only the true video is known. It is looked at as every board is, in 16 x 16 squares: where its last
frame differs from its first is the answer, everything else must stay. That is less than a scorer of the task's own sees
(VBVR-Bench has one for each of its tasks, arXiv 2602.20159), and there is one legal answer, so nothing can be said of choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from dit_lens.errors import InputError
from dit_lens.reasoner import board, vbvr
from dit_lens.reasoner.settings import CALL
from dit_lens.reasoner.tasks import TASKS
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Split, Task

TRUE = "as in the true video"
"""The one answer that is known."""
CHANGED = 0.1
"""Mean absolute difference of a square's colour, of 1, from which on it has changed."""
THERE, STAYS = 0.75, 0.1
"""How far on average the answer's squares must have gone, and how far the others may differ from the true video."""
SIDE = board.SQUARES * board.PIXELS


@dataclass(frozen=True)
class CaseSample(Sample):
    """A sample from a folder; its picture and videos are scaled to the size of a board, but for what the model is given."""

    @property
    def case(self) -> vbvr.Case:
        """The folder."""
        return self.puzzle

    def video(self) -> Float[np.ndarray, "frames 64 64 3"]:
        """The true video in pixels, in [0, 1]."""
        return np.stack([scaled(Image.fromarray(frame)) for frame in self.case.video()])

    @property
    def image(self) -> Image.Image:
        """The first frame at the size of a board: what scorers compare with."""
        return Image.fromarray((scaled(self.case.first_frame) * 255).round().astype(np.uint8))

    @property
    def inputs(self) -> dict[str, Any]:
        """The pipeline's keyword arguments: the picture at its own size, and the length of the true video."""
        return {**CALL, **self.case.inputs, "num_frames": self.frames}

    @cached_property
    def ends(self) -> tuple[Float[np.ndarray, "16 16 3"], Float[np.ndarray, "16 16 3"]]:
        """Colours of the squares in the first and in the true last frame."""
        first, final = (board.square_colours(scaled(frame)) for frame in (self.case.first_frame, self.case.final_frame))
        return first, final


class FolderTask(Task):
    """The samples of a folder. `sample` numbers them in the order of their names; there is no training split.

    Raises:
        InputError: the folder is not in VBVR-Bench layout.
    """

    wordings = ()

    def __init__(self, folder: str | Path) -> None:
        self.cases = vbvr.read(folder)
        self.held = len(self.cases)
        own = Path(folder).resolve().name
        # What is known of a bundled task is not known of a folder that is called as one.
        self.name = f"folder-{own}" if own in TASKS else own  # pyright: ignore[reportAttributeAccessIssue]

    def sample(self, split: Split = "test", index: int = 0, frames: int = CALL["num_frames"]) -> Sample:
        """The case with a number; its own video says how many frames it has."""
        if not 0 <= index < len(self.cases) or split != "test":
            raise InputError(
                f"the folder {self.name} holds {len(self.cases)} samples, and {split} sample {index} is asked for:"
                f" write test samples 0 to {len(self.cases) - 1} (as --samples {len(self.cases)})"
            )
        case = self.cases[index]
        # The longest clip that a VAE of four frames a latent can hold.
        own = (case.frames - 1) // 4 * 4 + 1
        return CaseSample(self, split, index, case, case.prompt, 0, own, (TRUE,))

    def generate(self, random: np.random.Generator) -> Any:
        raise InputError(f"the samples of the folder {self.name} are given; none can be made")

    def wrong(self, puzzle: Any, random: np.random.Generator) -> Answer:
        raise InputError(f"nothing is known of wrong answers in the folder {self.name}")

    def solve(self, puzzle: vbvr.Case) -> tuple[Answer, ...]:
        return (TRUE,)

    def draw(self, puzzle: vbvr.Case, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        """The true video in the palette's nearest colours, from its first frame to its last."""
        video = puzzle.video()
        chosen = np.linspace(0, len(video) - 1, frames).round().astype(int)
        return board.read(np.stack([scaled(Image.fromarray(video[place])) for place in chosen]))

    def masks(self, puzzle: vbvr.Case) -> dict[str, Bool[np.ndarray, "16 16"]]:
        first, final = (board.square_colours(scaled(frame)) for frame in (puzzle.first_frame, puzzle.final_frame))
        changed = np.abs(final - first).mean(axis=-1) > CHANGED
        return {"answer": changed, "background": ~changed}

    def canonical(self, puzzle: vbvr.Case) -> bytes:
        picture = np.asarray(puzzle.first_frame)
        return hashlib.sha256(picture.tobytes() + puzzle.prompt.encode()).digest()

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """A video that is known as palette indices."""
        return self.scores(board.paint(boards)[None].astype(np.float32) / 255, [sample])[0]

    def scores(self, videos: Float[np.ndarray, "batch frames 64 64 3"], samples: Sequence[Sample]) -> list[Score]:
        """Right where the last frame went at least `THERE` of the way to the true one, and no further than `STAYS` from it
        where that does not change."""
        return [self._score(video, sample) for video, sample in zip(np.asarray(videos), samples, strict=True)]

    def _score(self, video: Float[np.ndarray, "frames 64 64 3"], sample: Sample) -> Score:
        assert isinstance(sample, CaseSample)
        (way,) = self.evidence(video[None], [sample])[0]
        stays = ~sample.masks["answer"]
        off = np.abs(board.square_colours(video[-1]) - sample.ends[1]).mean(axis=-1)[stays].mean() if stays.any() else 0.0
        if way < THERE:
            return Score(False, None, None, f"the last frame went {way:.2f} of the way to the true one, of {THERE}")
        if off > STAYS:
            return Score(False, TRUE, 0, f"what must stay differs by {off:.2f} from the true video, of at most {STAYS}")
        return Score(True, TRUE, 0)

    def decoy(self, sample: Sample) -> None:
        """There is none: nothing is known of wrong answers."""

    def evidence(
        self,
        videos: Float[np.ndarray, "batch frames 64 64 3"],
        samples: Sequence[Sample],
        answers: Sequence[Sequence[Answer]] | None = None,
    ) -> list[Float[np.ndarray, " answers"]]:
        """How near the last frame has come to the true one, from 0 (no nearer than the first frame) to 1: one minus the distance
        (RGB) of the colour of each square that changes, over the distance from which it started, clipped, averaged.

        Raises:
            InputError: `answers` has another one than the true one.
        """
        if answers is not None and any(list(each) != [TRUE] for each in answers):
            raise InputError(f"only the true video of a sample of the folder {self.name} is known; leave out answers=")
        found = []
        for last, sample in zip(board.square_colours(np.asarray(videos)[:, -1]), samples, strict=True):
            assert isinstance(sample, CaseSample)
            first, final = sample.ends
            changed = sample.masks["answer"]
            if not changed.any():
                found.append(np.zeros(1))
                continue
            left = np.linalg.norm(last - final, axis=-1)[changed] / np.linalg.norm(first - final, axis=-1)[changed]
            found.append(np.array([(1 - left).clip(0, 1).mean()]))
        return found


def scaled(picture: Image.Image) -> Float[np.ndarray, "64 64 3"]:
    """A picture at the size of a board, in [0, 1]: enlarged to whole multiples first, each pixel the mean of what it covers."""
    width, height = (-(-side // SIDE) * SIDE for side in picture.size)
    pixels = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return reduce(pixels, "(y py) (x px) c -> y x c", "mean", y=SIDE, x=SIDE)
