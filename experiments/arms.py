"""Where noise goes into a run, how, and how much it destroys.

How much is destroyed: the *dose* of an arm at a step is the energy (squared L2 norm) of what is overwritten, over that of the
latents. k of F frames that are replaced lose about k / F; a mixture sqrt(1 - a^2) x + a noise loses a^2 of all frames, so the two
are matched by a^2 = k / F. A sigma-matched draw keeps the video in the latents and destroys only the energy of their noise.
Added noise destroys nothing; its energy is compared. An arm that acts at several steps has that dose at each of them.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

import dit_lens as dl
from dit_lens.noise import noise_state

How = Literal["replaced", "sigma-matched", "added"]
ONE, SEVERAL, ALL, BUT_LAST = "one step", "several steps", "all steps", "all but the last"
NEITHER, START, SCORED, BOTH = "neither", "the first frame", "the scored frame", "both"
"""Which of two latent frames get noise: the first holds the picture that the video starts from, and the last the last frame of
the video, which is all that a score reads."""
SETS = 60
"""Of the sets of k frames, at most so many are used."""


@dataclass(frozen=True)
class Arm:
    """Where noise goes, and how.

    Attributes:
        where: into all frames (`step`), or into some (`frame`). how: see `dl.ReplaceLatents`; a `share` of all frames that is
            replaced is mixed, see above. steps: all those that get noise.
        share: dose: the share of the frames, or of the energy in all of them.
        frame: the frame; left out, samples take turns at the sets of as many frames as the share asks for.
    """

    where: Literal["step", "frame"]
    how: How
    steps: tuple[int, ...]
    share: float = 1.0
    frame: int | None = None

    @property
    def key(self) -> str:
        """A name for files."""
        steps = f"{self.steps[0]}-{self.steps[-1]}"
        return f"{self.where}-{self.how}-{steps}-{self.share:.3f}-{'turns' if self.frame is None else self.frame}"

    def frames(self, sample: Any, count: int) -> tuple[int, ...]:
        """The latent frames of so many that get noise in a sample's run."""
        if self.where == "step":
            return tuple(range(count))
        if self.frame is not None:
            return (self.frame,)
        sets = frame_sets(count, frames_for(self.share, count))
        return sets[(sample.index + len(sets) // 2) % len(sets)]

    def edits(self, samples: Sequence[Any], count: int) -> list[dl.ReplaceLatents]:
        """The edits of a run with a row for each sample; each has noise of its own."""
        noise = [zlib.crc32(f"{sample.task.name}/{sample.index}".encode()) for sample in samples]
        whole = self.where == "frame" or self.share == 1
        ways: dict[str, dict[str, Any]] = {
            "replaced": {} if whole else {"how": "mixed", "dose": math.sqrt(self.share)},
            "sigma-matched": {"how": "sigma_matched"} | ({} if whole else {"dose": math.sqrt(self.share)}),
            "added": {"how": "dose_matched", "dose": math.sqrt(self.share)},
        }
        by_frames: dict[tuple[int, ...], list[int]] = {}
        for row, sample in enumerate(samples):
            by_frames.setdefault(self.frames(sample, count), []).append(row)
        return [
            dl.ReplaceLatents(list(self.steps), noise=noise, frames=list(frames), rows=rows, **ways[self.how])
            for frames, rows in by_frames.items()
        ]


def held(frames: Sequence[int], count: int) -> str:
    """Which of the first and the scored frame are among these latent frames, of so many."""
    return {(False, False): NEITHER, (True, False): START, (False, True): SCORED}.get((0 in frames, count - 1 in frames), BOTH)


def frames_for(share: float, count: int) -> int:
    """How many of so many frames come nearest to a share of them; at least one."""
    return max(1, round(share * count))


def frame_sets(count: int, size: int) -> list[tuple[int, ...]]:
    """Sets of frames, all of them where there are at most `SETS`."""
    if math.comb(count, size) <= SETS:
        return list(itertools.combinations(range(count), size))
    random = np.random.default_rng([count, size])
    return [tuple(sorted(random.choice(count, size, replace=False).tolist())) for _ in range(SETS)]


def dose(arm: Arm, clean: dl.Run, samples: Sequence[Any], scheduler: Any) -> pd.DataFrame:
    """Energy destroyed and energy put in at a step of an arm, over that of the latents: means over its steps, by row.

    Energies are those of the unedited run's latents. ``scheduler``: the pipeline's own, as a run left it.
    """
    count, size = clean.latents.shape[3], clean.latents[0, 0, :, 0].numel()
    chosen = torch.tensor([[f in arm.frames(sample, count) for f in range(count)] for sample in samples])
    part = 1.0 if arm.where == "frame" else arm.share
    lost, put = [], []
    for step in arm.steps:
        latents = clean.latents[step].double()
        total, state = latents.square().sum(dim=(1, 2, 3, 4)), noise_state(scheduler, clean.timesteps[step], step)
        gone, fresh = latents, 1.0
        if arm.how == "sigma-matched":
            gone = latents - (state.signal * clean.x0_hat(step - 1).double() if step else 0)
            fresh = state.noise**2
        energy = (gone.square().sum(dim=(1, 3, 4)) * chosen).sum(dim=1)
        lost.append(part * energy / total if arm.how != "added" else torch.zeros_like(total))
        put.append(part * fresh * size * chosen.sum(dim=1) / total if arm.how != "added" else torch.full_like(total, arm.share))
    destroyed, added = (torch.stack(each).mean(dim=0).numpy() for each in (lost, put))
    return pd.DataFrame({"destroyed": destroyed, "added": added, "steps": len(arm.steps), "total": destroyed * len(arm.steps)})


def labels(arm: Arm, clean: dl.Run, samples: Sequence[Any]) -> dict[str, Any]:
    """What an arm did, as columns with a row for each sample; the clock of its first step where it does not act at all."""
    every, step = tuple(range(clean.steps)), arm.steps[0]
    when = ONE if len(arm.steps) == 1 else {every: ALL, every[:-1]: BUT_LAST}.get(arm.steps, SEVERAL)
    some = when in (ONE, SEVERAL)
    count = clean.latents.shape[3]
    frames = [arm.frames(sample, count) for sample in samples]
    return {
        "kind": "noise",
        "seed": 0,
        "where": arm.where,
        "how": arm.how,
        "when": when,
        "share": arm.share if arm.where == "step" else [len(each) / count for each in frames],
        "frames": ["+".join(map(str, each)) for each in frames],
        "count": [len(each) for each in frames],
        "holds": [held(each, count) for each in frames],
        "turns": arm.where == "frame" and arm.frame is None,
        "step": float(step) if some else np.nan,
        "sigma": float(clean.sigmas[step]) if some else np.nan,
        "timestep": clean.timesteps[step] if some else np.nan,
        "expert": clean.experts[step] if some else None,
    }
