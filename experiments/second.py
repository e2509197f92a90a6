"""A second reasoner, that differs in its seed: which verdicts does it share? `python -m experiments.second OUT` takes its
finished experiments from OUT and writes them to `figures/second-reasoner/`, beside its weights.

One trained model is one draw: intervals over samples say nothing of what another seed of the same training would have given. The
second reasoner has other first weights, another order of the same training puzzles, other noise; the VAE is the same. It is
no part of the installed package; `--model figures/second-reasoner/weights` runs anything on it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import tyro
from matplotlib.figure import Figure

from dit_lens.claims import COMMITTED, LEVEL, number
from dit_lens.errors import InputError
from dit_lens.experiment import DPI, read_manifest
from dit_lens.files import write_bytes, write_text
from dit_lens.plots import COLOURS, LOOK
from dit_lens.report import took

NAME, WEIGHTS = "second-reasoner", "weights"
PICTURE, PICTURE_TITLE = "criteria.png", "Every criterion, on two reasoners"
OPPOSITE = {"holds", "fails"}


@dataclass(frozen=True)
class Settings:
    """Where the second reasoner's results are, and the folder of figures with its weights."""

    out: tyro.conf.Positional[Path]
    to: Path = Path(__file__).parent.parent / "figures"


@dataclass(frozen=True)
class Second:
    """What was measured of the second reasoner: manifests of its experiments, how it was trained, its held-out accuracy."""

    manifests: list[dict[str, Any]]
    training: dict[str, Any]
    held_out: dict[str, Any]

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        """By the name of the claim."""
        return {one["claim"]: one for manifest in self.manifests for one in manifest.get("claims", [])}


def read(folder: Path) -> Second | None:
    """What `main` wrote into a folder of figures; None where it did not."""
    home = folder / NAME
    if not (home / WEIGHTS).is_dir():
        return None
    manifests = [manifest for each in sorted(home.iterdir()) if each.is_dir() and (manifest := read_manifest(each))]
    training, held_out = (
        json.loads((home / WEIGHTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("training", "held_out")
    )
    return Second(sorted(manifests, key=lambda manifest: manifest["source"]), training, held_out)


def criteria(first: Sequence[dict[str, Any]], second: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A row for every criterion that both were measured on: outcomes, and estimates and intervals from the threshold on."""
    rows = []
    for one in first:
        other = {found["criterion"]: found for found in second.get(one["claim"], {"found": []})["found"]}
        for found in one["found"]:
            if found["criterion"] in other:
                rows.append({"claim": one["claim"], "criterion": found["criterion"]})
                for name, model in (("first", found), ("second", other[found["criterion"]])):
                    rows[-1] |= {f"{name}_outcome": model["outcome"]}
                    rows[-1] |= {f"{name}_{end}": model[end] - found["threshold"] for end in ("estimate", "low", "high")}
    return pd.DataFrame(rows)


def forest(table: pd.DataFrame) -> Figure:
    """Every criterion of both models: how far it lies from its threshold, with the interval of the verdicts."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 1.2 + 0.2 * len(table)), layout="constrained")
        axis = figure.subplots()
        for name, shift, colour in (("first", -0.17, COLOURS[0]), ("second", 0.17, COLOURS[1])):
            at = [place + shift for place in range(len(table))]
            axis.hlines(at, table[f"{name}_low"], table[f"{name}_high"], color=colour, linewidth=1.4)
            label = "bundled reasoner" if name == "first" else "second reasoner"
            axis.plot(table[f"{name}_estimate"], at, "o", color=colour, markersize=3.2, label=label)
        axis.axvline(0, color="#333333", linewidth=0.8)
        starts = [place for place in range(1, len(table)) if table["claim"].iloc[place] != table["claim"].iloc[place - 1]]
        for place in starts:
            axis.axhline(place - 0.5, color="#bbbbbb", linewidth=0.6)
        axis.set_yticks(range(len(table)), [f"{row.claim}: {row.criterion}" for row in table.itertuples()], fontsize=7)
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.set_xlabel("estimate minus threshold, in the criterion's own unit")
        figure.suptitle(f"Bars: intervals at {LEVEL:.4%}, clustered by sample", x=0.02, ha="left", fontsize=9)
        axis.grid(visible=False, axis="y")
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def section(first: Sequence[dict[str, Any]], held_out: dict[str, Any], second: Second) -> str:
    """The part of the page of results that sets the two side by side."""
    table = criteria(first, second.verdicts)
    pairs = [(one["verdict"], second.verdicts[one["claim"]]["verdict"]) for one in first if one["claim"] in second.verdicts]
    same = sum(this == other for this, other in pairs)
    against = sum({this, other} == {"supported", "refuted"} for this, other in pairs)
    outcomes = [*zip(table["first_outcome"], table["second_outcome"], strict=True)]
    agree, opposite = sum(a == b for a, b in outcomes), sum({a, b} == OPPOSITE for a, b in outcomes)
    dit = second.training["dit"]
    last = dit["curve"][-1]
    trained = (
        f"{last['step']:,} steps of {dit['settings']['batch']:,} clips in {last['seconds'] / 60:.1f} minutes on {dit['devices']},"
        f" loss {last['loss']:.4f}"
    )
    made = (
        "A second reasoner was trained with another seed (first weights, order of the puzzles, noise; the VAE is the bundled"
        f" one): {trained}. Its weights are in [{NAME}/{WEIGHTS}]({NAME}/{WEIGHTS}). Every experiment with a manifest in"
        f" [{NAME}]({NAME}) was run on it with the same full preset, but for the sizes of batches: the verdicts agree in"
        f" **{same} of {len(pairs)} claims**, and {against} are contrary (supported by one, refuted by the other). Of"
        f" {len(table)} criteria, {agree} come out alike and"
        f" {opposite} opposite (one holds, the other fails). What was changed in a claim after"
        " the first full run on the bundled reasoner had not been tried on this one."
    )
    accuracy = ["| held-out accuracy | bundled | second |", "| --- | --- | --- |"]
    for task, found in second.held_out["tasks"].items():
        accuracy.append(f"| {task} | {_share(held_out['tasks'][task]['right'])} | {_share(found['right'])} |")
    lines = ["| claim | bundled | second | what differs |", "| --- | --- | --- | --- |"]
    for one in first:
        other = second.verdicts.get(one["claim"])
        differs = table[(table["claim"] == one["claim"]) & (table["first_outcome"] != table["second_outcome"])]
        said = "; ".join(f"{row.criterion}: {row.first_outcome}, {row.second_outcome}" for row in differs.itertuples())
        word = f"**{other['verdict']}**" if other else "not measured"
        lines.append(f"| {one['claim']} | {one['verdict']} | {word} | {said.replace('|', '')} |")
    picture = (
        f"![{PICTURE_TITLE}]({NAME}/{PICTURE})\n\n*{PICTURE_TITLE}.* How far each lies from its"
        " threshold; whether it must lie above or below stands in its name."
    )
    times = ", ".join(f"{manifest['experiment']} {took(manifest)}" for manifest in second.manifests)
    return "\n\n".join(["## A second reasoner", made, "\n".join(lines), picture, "\n".join(accuracy), f"Computed in: {times}."])


def _share(found: dict[str, Any]) -> str:
    return f"{number(found['estimate'])} [{number(found['low'])}, {number(found['high'])}]"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    home = settings.to / NAME
    finished = [folder for folder in sorted(settings.out.glob("*")) if read_manifest(folder)]
    if not finished:
        raise InputError(
            f"no finished experiment in {settings.out}: run dit-lens reproduce --preset full --model {home / WEIGHTS}"
        )
    for folder in finished:
        write_text(home / folder.name / "manifest.json", (folder / "manifest.json").read_text(encoding="utf-8"))
    found, first = read(settings.to), json.loads((Path(__file__).parent / COMMITTED).read_text(encoding="utf-8"))
    if found is None:
        raise InputError(f"there is no {home / WEIGHTS}: it holds the second reasoner, with training.json and held_out.json")
    picture = io.BytesIO()
    forest(criteria(first, found.verdicts)).savefig(picture, format="png", dpi=DPI, metadata={"Title": PICTURE_TITLE})
    write_bytes(home / PICTURE, picture.getvalue())


if __name__ == "__main__":
    main()
