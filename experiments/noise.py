"""Noise put into a run, at a step or in a frame (paper 2603.16870, Fig. 3a and 3b).

The paper replaces the latents of one step by noise (*noise at step*) or those of one frame at every step (*noise at frame*), and
finds that the first destroys the answer and the second hardly does. The two differ in three things at once, which are taken
apart here:

* the noise level: latents replaced in mid-run are noisier than the step expects. *Sigma-matched* noise keeps the level and the
  video that the latents hold, and draws only their noise again. *Added* noise destroys nothing.
* the dose, as energy destroyed over that of the latents: noise at a step destroys all of it, once. Noise in one of F latent
  frames destroys 1 / F (with few frames a large dose: a fifth on the bundled model), at every step. Matched to it are: noise
  of that share mixed into all frames, at one step against a frame at one step, and at every step against a frame at every step;
  and one frame at F steps in a row, which sums up to all of the latents, once.
* the last step: what is destroyed there cannot be repaired, so noise at every step runs with it and without.

Outcomes are the video's score, whether its answer is a legal one, whether it is that of the unedited run, and how much of the
board that no answer touches has changed. A score reads the last frame of the video only, so noise in the latent frame that holds
it, in the first one and in others are told apart. Noise at the first step is another seed and must leave the score as it is. The
bundled model has one expert, so a peak over sigma cannot be a change of experts. Thinned in the full preset: added noise is at
every third step, and matched doses at three steps. Where noise goes into sets of frames, into one frame at one step, or into one
frame by another way than replacing it, samples take turns at the frames. There is one seed.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dit_lens.experiment import Context, Experiment
from experiments import noise_figures, noise_tables, noised
from experiments.arms import Arm, How, frames_for
from experiments.noise_claims import CLAIMS


@dataclass(frozen=True)
class Settings(noised.Settings):
    """Beside the shared ones: ``added`` and ``matched``, places of added noise and of matched doses; ``shares`` of the frames
    that are matched; ``sets``, shares of the frames that get noise together; ``singles``, whether each frame is noised in all
    samples, or samples take turns."""

    added: tuple[float, ...] = (0.4,)
    matched: tuple[float, ...] = (0.4,)
    shares: tuple[float, ...] = (0.2,)
    sets: tuple[float, ...] = (0.6,)
    singles: bool = False


def arms(settings: Settings, steps: int, frames: int) -> list[Arm]:
    """Every arm that is not shared, for a schedule and a number of latent frames."""
    every = tuple(range(steps))
    shares = [frames_for(share, frames) / frames for share in settings.shares]
    one = 1 / frames
    found = [Arm("step", "added", (step,)) for step in noised.steps_at(settings.added, steps)]
    found += [Arm("frame", "replaced", every, one, frame) for frame in (range(frames) if settings.singles else [None])]
    others: tuple[How, ...] = ("sigma-matched", "added") if settings.singles else ()
    found += [Arm("frame", how, every, one) for how in others]
    found += [Arm("frame", "replaced", every, frames_for(share, frames) / frames) for share in settings.sets]
    found += [Arm("step", "replaced", every, share) for share in shares]
    hows: tuple[tuple[How, list[float]], ...] = (("replaced", shares), ("sigma-matched", shares[:1]))
    for step in noised.steps_at(settings.matched, steps):
        found += [Arm(where, how, (step,), share) for how, some in hows for share in some for where in ("step", "frame")]
        row = tuple(range(step, min(step + frames, steps - 1)))
        found += [Arm("frame", "replaced", row, one)] if settings.singles and len(row) > 1 else []
    return found


def run(context: Context) -> pd.DataFrame:
    runs = noised.NoisedRuns(context)
    unedited = runs.unedited()
    frames = int(unedited[0].table["latent_frames"].iloc[0])
    made = [*runs.at_steps(), *runs.run(arms(context.settings, runs.count, frames), "arms")]
    tables = [part.table.drop(columns="latent_frames", errors="ignore") for part in (*unedited, *(part for _, part in made))]
    columns = list(dict.fromkeys(name for table in tables for name in table))
    # Columns without any value have no type of their own to bring.
    results = pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True).reindex(columns=columns)
    films = [("unedited", unedited[0].arrays["film"]), *noise_figures.pictured(made)]
    noise_figures.draw(context, results, films, runs.groups[0][0])
    noise_tables.draw(context, results, CLAIMS)
    return results


EXPERIMENT = Experiment(
    name="noise",
    title="Noise at a step, noise in a frame",
    source="Fig. 3a, 3b and section 3.2 of arXiv 2603.16870",
    question="Which noise destroys an answer, and is it the place, the dose or the noise level?",
    presets={
        "quick": Settings(),
        "full": Settings(
            **noised.FULL,
            added=tuple(np.linspace(0, 1, 7).tolist()),
            matched=(0.1, 0.37, 0.6),
            shares=(0.2, 0.6),
            sets=(0.4, 0.6, 0.8, 1),
            singles=True,
        ),
    },
    run=run,
    claims=CLAIMS,
    # The first of the two makes the runs that both read, and this one has others to make.
    after=("propagation",),
    minutes=5,
)
