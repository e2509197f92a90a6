"""Readings: what the decoded x0-hat of every row of a run shows at a step, in numbers.

    reader = Reader(lens, samples, run)                  # a run of samples of a task, each with the same number of seeds
    table, pixels = reader.at(step=3, branch="guided")   # a row for every sample and seed

| column | what it says |
|---|---|
| `right` | whether the task's scorer accepts it |
| `held_alive` | legal answers whose weight in latents is a quarter or more (nan where one is legal); see `dit_lens.blends` |
| `held_fooled` | the same of the one legal answer and a decoy: what is found where nothing is to be found (nan elsewhere) |
| `held_entropy`, `held_top` | of the weights of the legal answers, in bits, and the largest (nan where one is legal) |
| `held_own` | the weight of the answer of the run's own video among the legal ones (nan where one is legal, or none shown) |
| `alive`, `fooled`, `entropy`, `top`, `own_share` | the same, read from the decoded video |
| `shown` | the legal answer with most evidence in the decoded video; -1 where nothing is drawn |
| `new_first`, `new_last` | how much has come of what is new in the first and in the last third of the run's own video |
| `cosine_final` | of its motion map with that of the run's own video; the controls, as maps of motion are never unrelated: |
| `cosine_seeds` | with that of another seed at the same step, |
| `cosine_other_seed`, `cosine_other_sample` | with that of another seed's video, and of another sample's |
| `one_symbol`, `two_symbols` | what the best single symbol, and two given ones, leave unexplained, in latents (pattern alone) |
| `correlation_seeds`, `correlation_samples` | of its latents with those of another seed and of another sample, at the same step |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import metrics
from dit_lens.blends import Blends
from dit_lens.reasoner import board
from dit_lens.reasoner.tasks.pattern import PatternTask
from dit_lens.run import Run


class Reader:
    """Reads the x0-hats of a run.

    Args:
        lens: what decodes. samples: of one task, each in as many rows as there are seeds. run: theirs, prompt-major, with its
            video.
    """

    def __init__(self, lens: Any, samples: Sequence[Any], run: Run) -> None:
        assert run.video is not None
        self._lens, self._run = lens, run
        self._task, self._size = samples[0].task, samples[0].image.size[::-1]
        self._shape = (len(samples), len(run.seeds) // len(samples))
        self.rows = [sample for sample in samples for _ in range(self._shape[1])]
        decoys = {sample.index: self._task.decoy(sample) for sample in samples if len(sample.answers) == 1}
        found = [(sample, decoys.get(sample.index)) for sample in self.rows]
        self.candidates = [[*sample.answers] if decoy is None else [*sample.answers, decoy] for sample, decoy in found]
        """For each row its legal answers, and beside a single one a decoy, where there is one."""
        self._blends = Blends(lens, run.video)
        self._motion = metrics.motion_map(run.video)
        final = metrics.resized(run.video, *self._size).numpy()
        self._did, self._ends = [_most(found) for found in self._task.evidence(final, self.rows)], board.read(final)

    def at(self, step: int, branch: str) -> tuple[pd.DataFrame, np.ndarray]:
        """The readings of a step, row by row, and the videos that were read: (rows, frames, height, width, 3) in [0, 1]."""
        hats = self._run.x0_hat(step=step, branch=branch)
        video = self._lens.decode(hats)
        pixels, motion = metrics.resized(video, *self._size).numpy(), metrics.motion_map(video)
        boards, seen = board.read(pixels), self._task.evidence(pixels, self.rows, self.candidates)
        several = [place for place, found in enumerate(self.candidates) if len(found) > 1]
        held = [np.full(1, np.nan)] * len(self.rows)
        if several:
            chosen = [[each[place] for place in several] for each in (self.rows, self.candidates)]
            for place, found in zip(several, self._blends.held(hats[several], *chosen), strict=True):
                held[place] = found
        new = np.array([metrics.new_content(clip[None], end)[0] for clip, end in zip(boards, self._ends, strict=True)])
        table = {
            "task": self._task.name,
            "sample": [sample.index for sample in self.rows],
            "seed": self._run.seeds,
            "branch": branch,
            "answers": [len(sample.answers) for sample in self.rows],
            "right": [self._task.judge(clip, sample).right for clip, sample in zip(boards, self.rows, strict=True)],
            **{f"held_{name}": values for name, values in self._undecided(held).items()},
            **self._undecided(seen),
            "shown": [_most(found[: len(sample.answers)]) for found, sample in zip(seen, self.rows, strict=True)],
            "new_first": new[:, 0],
            "new_last": new[:, -1],
            "cosine_final": metrics.map_cosine(motion, self._motion),
            "cosine_seeds": metrics.map_cosine(motion, self._turned(motion, 1)),
            "cosine_other_seed": metrics.map_cosine(motion, self._turned(self._motion, 1)),
            "cosine_other_sample": metrics.map_cosine(motion, self._turned(self._motion, 0)),
            "correlation_seeds": metrics.row_correlation(hats, self._turned(hats, 1)),
            "correlation_samples": metrics.row_correlation(hats, self._turned(hats, 0)),
        }
        left = np.full((len(self.rows), 2), np.nan)
        if isinstance(self._task, PatternTask):
            pairs = [(*answers, *answers)[:2] for answers in self.candidates]
            left = self._blends.unexplained(hats, self.rows, [self._task.alphabet(s.puzzle) for s in self.rows], pairs)
        table |= {"one_symbol": left[:, 0], "two_symbols": left[:, 1]}
        return pd.DataFrame(table).rename(columns={"own": "own_share"}), pixels

    def _undecided(self, found: Sequence[np.ndarray]) -> dict[str, list[float]]:
        """How undecided each row is between the answers that it is asked for: its legal ones, or one of these and a decoy."""
        table: dict[str, list[float]] = {name: [] for name in ("alive", "fooled", "entropy", "top", "own")}
        for each, sample, did in zip(found, self.rows, self._did, strict=True):
            several, decoy = len(sample.answers) > 1, len(each) > len(sample.answers)
            shares = metrics.answer_shares(each) if several else np.full(len(each), np.nan)
            table["alive"].append(metrics.answers_alive(each) if several else np.nan)
            table["fooled"].append(metrics.answers_alive(each) if decoy else np.nan)
            table["entropy"].append(metrics.answer_entropy(each) if several else np.nan)
            table["top"].append(float(shares.max()))
            table["own"].append(float(shares[did]) if did >= 0 else np.nan)
        return table

    def _turned(self, values: Any, axis: int) -> Any:
        """The values of the next sample (axis 0) or of the next seed (axis 1) in each row's place."""
        return values.unflatten(0, self._shape).roll(1, dims=axis).flatten(0, 1)


def _most(evidence: np.ndarray) -> int:
    """The answer with most evidence; -1 where there is too little of any."""
    return int(evidence.argmax()) if evidence.sum() >= metrics.DECIDABLE else -1
