"""What `noise` shows: curves over sigma, over frames and over doses, a table of doses, and pictures of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context, Part
from dit_lens.statistics import in_words, summarise
from experiments.arms import ALL, BUT_LAST, ONE, SEVERAL, Arm

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
INTERVALS = "Shaded: 95 % bootstrap intervals over samples, N of them in the corner (a share of 0 or 1: exact binomial)."
OUTCOMES = (
    "A legal answer counts even where the rest of the board is damaged; damage is the share of squares that no legal answer"
    " touches and that differ from the first frame."
)


def draw(context: Context, results: pd.DataFrame, films: Sequence[tuple[str, np.ndarray]], sample: Any) -> None:
    """All figures and tables, of what the results hold."""
    noise = results[results["kind"] == "noise"].astype({"turns": bool, "count": int, "share": float})
    whole = noise[(noise["where"] == "step") & (noise["when"] == ONE) & np.isclose(noise["share"], 1)]
    over_sigma(context, results, whole)
    over_frames(context, results, noise[(noise["where"] == "frame") & noise["when"].isin([ALL, BUT_LAST])])
    over_doses(context, results, noise)
    doses(context, results)
    pictures(context, films, sample)


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
    found = [measured(clean, by, [name for name in measures if name not in agreeing]).assign(series=CLEAN)]
    found += [measured(other, by, agreeing).assign(series=OTHER)] if agreeing else []
    return pd.concat(found, ignore_index=True)


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
    context.figure("sigma", figure, "Noise at a step", f"{about} {OUTCOMES} {INTERVALS}")


def over_frames(context: Context, results: pd.DataFrame, frames: pd.DataFrame) -> None:
    """Noise in one frame, and in sets of frames, at every step."""
    names = ["right", "same", "damage", "damage_last"]
    about = "Noise in the latents of these frames at every step, or at every step but the last."
    singles = frames[frames["count"] == 1]
    # Samples that take turns bring few to each frame; they stand in where no frame was noised in all samples.
    singles = singles[~singles["turns"]] if not singles["turns"].all() else singles
    shown = {
        "frame": (singles.assign(x=singles["frames"].astype(int)), "latent frame that gets noise", "Noise in one latent frame"),
        "frames": (frames.assign(x=frames["count"]), "number of latent frames that get noise", "Noise in sets of latent frames"),
    }
    for name, (rows, label, title) in shown.items():
        if rows["x"].nunique() < 2:
            continue
        series = rows["how"] + ", " + rows["when"]
        figure = plots.curve_grid(
            measured(rows.assign(series=series), ["task", "series", "x"], names),
            x="x",
            x_label=label,
            row="measure",
            column="task",
            series="series",
            row_labels={name: MEASURES[name] for name in names},
            levels=levels(results, ["task"], names),
            limits=LIMITS,
        )
        turns = " Samples take turns at the sets." if name == "frames" else ""
        context.figure(name, figure, title, f"{about}{turns} {OUTCOMES} {INTERVALS}")


def over_doses(context: Context, results: pd.DataFrame, noise: pd.DataFrame) -> None:
    """Noise in some frames against the same share of noise in all frames."""
    names = ["right", "same", "damage_last"]
    kinds = {"step": "all frames, mixed in", "frame": "whole frames"}
    rows = noise[noise["when"].isin([ONE, BUT_LAST]) & (noise["how"] != "added")]
    at = rows[(rows["where"] == "frame") & (rows["when"] == ONE)]["step"].unique()
    rows = rows[(rows["when"] == BUT_LAST) | rows["step"].isin(at)]
    title = [
        f"at one step, \u03c3 {s:.2f}" if when == ONE else "at all steps but the last"
        for s, when in zip(rows["sigma"], rows["when"], strict=True)
    ]
    rows = rows.assign(at=title, series=rows["where"].map(kinds) + ", " + rows["how"], x=rows["share"])
    rows = rows.sort_values(["when", "step"], kind="stable")
    figure = plots.curve_grid(
        measured(rows, ["at", "series", "x"], names),
        x="x",
        x_label="dose: share of the frames, or of the energy in all frames, at each step that gets noise",
        row="measure",
        column="at",
        series="series",
        row_labels={name: MEASURES[name] for name in names},
        levels=levels(results, ["kind"], names).merge(rows[["at"]].drop_duplicates(), how="cross"),
        limits=LIMITS,
    )
    about = (
        "Tasks together. Noise in whole frames destroys the energy of these; mixed in, sqrt(1 - a\u00b2) of the latents are kept"
        " in all frames and the dose is a\u00b2. At dose 1 both replace everything. Sigma-matched: the dose is of the noise in"
        " the latents, whose video is kept. Samples take turns at the frames."
    )
    context.figure("dose", figure, "The same dose in some frames and in all", f"{about} {INTERVALS}")


def doses(context: Context, results: pd.DataFrame) -> None:
    """Every kind of arm with its dose and its outcomes."""
    noise = results[results["kind"] == "noise"].assign(share=lambda table: table["share"].astype(float).round(3))
    rows = [
        _line("unedited", results[results["kind"] == "clean"]),
        _line("another seed", results[results["kind"] == "other seed"]),
    ]
    order = {ONE: 0, SEVERAL: 1, BUT_LAST: 2, ALL: 3}
    columns = ["how", "where", "when", "share"]
    kinds = {tuple(group[columns].iloc[0]): group for _, group in noise.groupby(columns)}
    for (how, place, when, share), group in sorted(kinds.items(), key=lambda item: (*item[0][:2], order[item[0][2]], item[0][3])):
        # Noise at the first step is a reseed and not counted here.
        kept = group[group["step"] != 0] if when == ONE and (group["step"] > 0).any() else group
        where = "all frames" if place == "step" else "some frames"
        number = {"destroyed": kept["destroyed"], "in all": kept["total"], "put in": kept["added"]}
        rows.append(_line(f"{how}, {where}, {when}, {share:g}", kept) | {name: f"{c.mean():.2f}" for name, c in number.items()})
    table = pd.DataFrame(rows).fillna("-")
    about = (
        "Tasks together; means over steps after the first and over frames, with 95 % bootstrap intervals over samples. Named:"
        " how, where, when, and the share of the frames or of the energy mixed in. Destroyed: energy of the latents overwritten"
        " at a step, over all of it; in all: summed over the steps that get noise; put in: energy of the noise, over that of the"
        " latents."
    )
    context.table("Doses and what they do", table, about)


def _line(name: str, rows: pd.DataFrame) -> dict[str, str]:
    columns = {"right": "right", "legal": "legal", "same": "same answer", "damage": "damage"}
    found = {"noise": name, "destroyed": "-", "in all": "-", "put in": "-"}
    for column, title in columns.items():
        here = rows.dropna(subset=[column])
        found[title] = in_words(measured(here, ["kind"], [column]))
    return found | {"N": str(rows["cluster"].nunique())}


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
