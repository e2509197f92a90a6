"""What `noise` shows: curves over sigma, over frames and over doses, and pictures of one sample; tables are in `noise_tables`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context, Part
from dit_lens.statistics import summarise
from experiments.arms import ALL, BOTH, BUT_LAST, NEITHER, ONE, SCORED, START, Arm

MEASURES = {
    "right": "share right",
    "legal": "share with a\nlegal answer",
    "same": "share with the\nunedited answer",
    "rerouted": "another answer,\nwhere both are right",
    "damage": "squares damaged,\nall frames",
    "damage_last": "squares damaged,\nlast frame",
}
LIMITS = {"right": (-0.03, 1.03), "legal": (-0.03, 1.03), "same": (-0.03, 1.03), "rerouted": (-0.03, 1.03)}
CLEAN, OTHER = "unedited", "unedited, another seed"
PLACES = {"step": "all frames, mixed in", "frame": "whole frames"}
INTERVALS = (
    "Shaded: 95 % bootstrap intervals over samples, N of them in the corner (a share of 0 or 1: exact binomial). A curve ends"
    f" where its points have fewer than {plots.FEW:.0%} of the panel's largest N."
)
SCORE = (
    "A score reads the last frame of the video only, which the last latent frame holds; latent frame 0 holds the picture that the"
    " video starts from."
)
OUTCOMES = (
    "A legal answer counts even where the rest of the board is damaged; damage is the share of squares that no legal answer"
    " touches and that differ from the first frame."
)


def draw(context: Context, results: pd.DataFrame, films: Sequence[tuple[str, np.ndarray]], sample: Any) -> None:
    """All figures and tables, of what the results hold."""
    noise = noisy(results)
    whole = noise[(noise["where"] == "step") & (noise["when"] == ONE) & np.isclose(noise["share"], 1)]
    over_sigma(context, results, whole)
    over_frames(context, results, noise[(noise["where"] == "frame") & noise["when"].isin([ALL, BUT_LAST])])
    over_doses(context, results, noise)
    pictures(context, films, sample)


def noisy(results: pd.DataFrame) -> pd.DataFrame:
    """The runs with noise; columns that unedited runs lack have the types of their values."""
    return results[results["kind"] == "noise"].astype({"turns": bool, "count": int, "share": float})


def measured(table: pd.DataFrame, by: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Means with intervals of several columns, one under the other; shares as such."""
    found = []
    for name in measures:
        values = table.dropna(subset=[name])
        share = name not in ("damage", "damage_last")
        each = summarise(values.assign(value=values[name].astype(bool if share else float)), "value", by, "cluster")
        found.append(each.assign(measure=name))
    # Nothing to concatenate leaves the columns alone.
    return pd.concat([each for each in found if len(each)] or found[:1], ignore_index=True)


def levels(results: pd.DataFrame, by: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """The unedited runs, and for answers those of another seed: how often two seeds agree by themselves."""
    clean, other = (results[results["kind"] == kind] for kind in ("clean", "other seed"))
    agreeing = [name for name in measures if name in ("same", "rerouted")]
    own = [name for name in measures if name not in agreeing]
    kinds = ((clean, own, CLEAN), (other, agreeing, OTHER))
    return pd.concat([measured(rows, by, some).assign(series=name) for rows, some, name in kinds if some], ignore_index=True)


def over_sigma(context: Context, results: pd.DataFrame, whole: pd.DataFrame) -> None:
    """Noise in all frames at one step."""
    names = ["right", "legal", "same", "rerouted", "damage_last"]
    figure = plots.curve_grid(
        measured(whole.assign(series=whole["how"]), ["task", "series", "sigma"], names),
        x="sigma",
        x_label="\u03c3 of the step that gets noise (the first step on the left)",
        row="measure",
        column="task",
        series="series",
        row_labels={name: MEASURES[name] for name in names},
        levels=levels(results, ["task"], names),
        limits=LIMITS,
        noise_axis=True,
    )
    about = (
        "All frames of one step get noise. Replaced: the latents by pure noise. Sigma-matched: their noise drawn again around the"
        " video that they hold. Added: noise of the norm of the latents on top. At \u03c3 = 1 the first two are another seed."
    )
    context.figure("sigma", figure, "Noise at a step", f"{about} {SCORE} {OUTCOMES} {INTERVALS}")


def over_frames(context: Context, results: pd.DataFrame, frames: pd.DataFrame) -> None:
    """Noise in one frame, and in sets of frames, at every step."""
    singles = frames[frames["count"] == 1]
    # Samples that take turns bring few to each frame: a way that was put into each frame of all samples does without them.
    whole = singles[~singles["turns"]]
    singles = pd.concat([whole, singles[singles["turns"] & ~singles["how"].isin(whole["how"])]])
    # Of the other ways, only the table has both ends.
    singles = singles[(singles["when"] == BUT_LAST) | (singles["how"] == "replaced")]
    singles = singles.assign(x=singles["frames"].astype(int), series=singles["how"] + ", " + singles["when"])
    sets = frames[(frames["how"] == "replaced") & (frames["when"] == BUT_LAST)]
    order = [NEITHER, START, SCORED, BOTH]
    sets = sets.assign(x=sets["count"], series="noise in " + sets["holds"])
    sets = sets.sort_values("holds", key=lambda held: held.map(order.index), kind="stable")
    about = {
        "frame": "Noise in the latents of one frame at every step, or at every step but the last: dashed, as it may lie on the"
        " other curve. Of ways other than replacing, samples take turns at the frames.",
        "frames": "The latents of so many frames are replaced by noise at every step but the last, by whether the first and the"
        " scored frame are among them (dashed, as it may lie on another curve). Samples take turns at sets of several frames.",
    }
    shown = {
        "frame": (singles, "latent frame that gets noise", "Noise in one latent frame"),
        "frames": (sets, "number of latent frames that get noise", "Noise in sets of latent frames"),
    }
    names = ["right", "legal", "same", "damage", "damage_last"]
    for name, (rows, label, title) in shown.items():
        if rows["x"].nunique() < 2:
            continue
        figure = plots.curve_grid(
            measured(rows, ["task", "series", "x"], names),
            x="x",
            x_label=label,
            row="measure",
            column="task",
            series="series",
            row_labels={name: MEASURES[name] for name in names},
            dashed={name: name for name in (f"replaced, {BUT_LAST}", f"noise in {SCORED}")},
            levels=levels(results, ["task"], names),
            limits=LIMITS,
        )
        context.figure(name, figure, title, f"{about[name]} {SCORE} {OUTCOMES} {INTERVALS}")


def over_doses(context: Context, results: pd.DataFrame, noise: pd.DataFrame) -> None:
    """Noise in some frames against the same share of noise in all frames, task by task."""
    rows = matched(noise)
    rows = rows.assign(series=rows["where"].map(PLACES) + ", " + rows["how"], x=rows["share"])
    about = (
        "Rows: when. Noise in whole frames destroys the energy of these; mixed in, sqrt(1 - a\u00b2) of the latents are kept in"
        " all frames and the dose is a\u00b2. At dose 1 both replace everything. Sigma-matched: the dose is of the noise in the"
        f" latents, whose video is kept. Samples take turns at the frames. {SCORE} At the smallest dose and at one step, either"
        " may be too little to tell the two apart."
    )
    for measure, name in (("right", "dose"), ("legal", "dose-legal"), ("same", "dose-same")):
        shown = measured(rows, ["task", "at", "series", "x"], [measure])
        if shown.empty:
            continue
        figure = plots.curve_grid(
            shown,
            x="x",
            x_label="dose: share of the frames, or of the energy in all frames, at each step that gets noise",
            row="at",
            column="task",
            series="series",
            row_labels={at: f"{MEASURES[measure]}\n{at}" for at in dict.fromkeys(rows["at"])},
            levels=levels(results, ["task"], [measure]).merge(rows[["at"]].drop_duplicates(), how="cross"),
            limits=dict.fromkeys(rows["at"], LIMITS[measure]),
        )
        title = f"The same dose in some frames and in all: {MEASURES[measure].replace(chr(10), ' ')}"
        context.figure(name, figure, title, f"{about} {INTERVALS}")


def matched(noise: pd.DataFrame) -> pd.DataFrame:
    """The arms that are compared at equal doses, with ``at``, when they act; the steps of one row are those of the other."""
    rows = noise[noise["when"].isin([ONE, BUT_LAST]) & (noise["how"] != "added")]
    steps = rows[(rows["where"] == "frame") & (rows["when"] == ONE)]["step"].unique()
    rows = rows[(rows["when"] == BUT_LAST) | rows["step"].isin(steps)]
    at = [
        f"at one step, \u03c3 {s:.2f}" if when == ONE else "at all steps but the last"
        for s, when in zip(rows["sigma"], rows["when"], strict=True)
    ]
    return rows.assign(at=at).sort_values(["when", "step"], kind="stable")


def pictured(made: Sequence[tuple[Arm, Part]]) -> list[tuple[str, np.ndarray]]:
    """The films of a few arms, of the first sample: a middle step, and one frame, at the dose of a frame and in full."""
    found: dict[str, np.ndarray] = {}
    steps = sorted({arm.steps[0] for arm, _ in made if arm.where == "step" and arm.how == "replaced" and len(arm.steps) == 1})
    middle = steps[len(steps) // 2]
    for arm, part in made:
        films = part.arrays["film"]
        if arm.where == "step" and arm.share == 1 and arm.steps == (middle,):
            found.setdefault(f"all frames {arm.how},\nstep {middle}", films[0])
        if arm.where == "frame" and arm.how == "replaced" and len(films) > 1 and part.table["count"].iloc[0] == 1:
            frame = part.table["frames"].iloc[0]
            found.setdefault(f"frame {frame} replaced,\nall steps", films[0])
            found.setdefault(f"frame {frame} replaced,\nall but the last", films[1])
    return list(found.items())


def pictures(context: Context, films: Sequence[tuple[str, np.ndarray]], sample: Any) -> None:
    """The same sample unedited and with noise in it."""
    frames = np.linspace(0, len(films[0][1]) - 1, 9).round().astype(int)
    sheet = np.stack([film[frames] for _, film in films])
    figure = plots.film(sheet, [name for name, _ in films], [f"frame {i}" for i in frames], title=f"\u201c{sample.prompt}\u201d")
    about = (
        f"{sample.task.name}, held-out sample {sample.index}, seed 0, the first of the list. Columns: frames of the video; latent"
        " frames are fewer."
    )
    context.figure("pictures", figure, "One sample, unedited and with noise", about, wide=False)
