"""The page of committed results: `python -m experiments.page` writes `figures/README.md` and `experiments/verdicts.json`.

Both are made from what lies in `figures/` and nothing else: the manifests say what was measured and how, `claims.json` what
became of the claims. The verdicts travel with the package, so that a quick run shows them beside its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_lens.claims import COMMITTED, FAMILY, LEVEL, as_table
from dit_lens.experiment import read_manifest
from dit_lens.files import write_text
from dit_lens.reasoner import folder
from dit_lens.report import took
from experiments import second
from experiments.paper import ITEMS, Item

ROOT = Path(__file__).parent.parent
SHOWN = 4
"""Figures of an experiment on the page; all of them lie in its folder."""


def main() -> None:
    figures = ROOT / "figures"
    found = [manifest for folder in sorted(figures.iterdir()) if (manifest := read_manifest(folder))]
    found.sort(key=lambda manifest: manifest["source"])
    verdicts = [one for manifest in found for one in manifest.get("claims", [])]
    slim = [{key: value for key, value in one.items() if key != "committed"} for one in verdicts]
    write_text(Path(__file__).parent / COMMITTED, json.dumps(slim, indent=1) + "\n")
    held_out = json.loads((folder() / "held_out.json").read_text(encoding="utf-8"))
    other = second.read(figures)
    write_text(figures / "README.md", page(found, slim, second.section(slim, held_out, other) if other else ""))


def page(manifests: list[dict[str, Any]], verdicts: list[dict[str, Any]], other: str) -> str:
    """The page as Markdown. `other`: its part on the second reasoner."""
    there = {manifest["experiment"] for manifest in manifests}
    parts = [
        "# Results",
        "<!-- Written by `python -m experiments.page`. Change results or experiments and run it again, not this page. -->",
        "Committed results of the full presets on the bundled reasoner. Every folder holds an experiment's `manifest.json` (model"
        " and its hash, schedule, seeds, sizes, versions, machine, time), `results.parquet` (one row per measurement),"
        " `claims.json` and figures. `dit-lens reproduce --preset full --device cuda` makes them again.",
        "## Verdicts",
        "What the paper (arXiv 2603.16870) states, and what became of it **on this model**, a 14-block Wan-class DiT trained on"
        " seven kinds of puzzle. Tests and thresholds were written down before the first full run; what was changed since, and"
        f" why, stands beside the source. Intervals are clustered by sample, at {LEVEL:.4%} each, so that with up to {FAMILY}"
        " criteria in all the chance of any wrong one is at most 5 %. A claim is supported when all its criteria hold (\u2713)"
        " and refuted when one fails (\u2717; ?: open); every verdict rests on 100 samples or more.",
        verdict_rows(verdicts),
        other,
        "## The paper's figures and tables",
        "\n".join(["| paper | shows | counterpart |", "| --- | --- | --- |", *(item_row(item, there) for item in ITEMS)]),
        *(section(manifest) for manifest in manifests),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_rows(verdicts: list[dict[str, Any]]) -> str:
    """The table of verdicts."""
    if not verdicts:
        return "None was tested yet."
    lines = ["| claim | statement (source, grade) | verdict | measured | control |", "| --- | --- | --- | --- | --- |"]
    for row in as_table(verdicts).to_dict("records"):
        cells = (row["claim"], f"{row['statement']} ({row['source']})", f"**{row['verdict']}**", row["numbers"], row["control"])
        lines.append("| " + " | ".join(str(text).replace("|", "\\|").replace("\n", "<br>") for text in cells) + " |")
    return "\n".join(lines)


def item_row(item: Item, there: set[str]) -> str:
    """A line of the table of the paper's figures."""
    links = [f"[{name}](#{name})" if name in there else f"{name} (not run yet)" for name in item.experiments]
    where = "; ".join(part for part in (", ".join(links), item.note) if part)
    return f"| {item.name} | {item.shows} | {where} |"


def section(manifest: dict[str, Any]) -> str:
    """An experiment: its question, how it was made, its first figures and its tables."""
    name = manifest["experiment"]
    made = (
        f"{manifest['source']}. Preset {manifest['preset']}, {manifest['started'][:10]}, {manifest['device']['name']},"
        f" {took(manifest)}; model {manifest['model']['hash'][:12]}; {manifest['rows']} rows in"
        f" [results.parquet]({name}/results.parquet)."
    )
    parts = [f"## {name}", f"**{manifest['question']}**", made]
    for figure in manifest["figures"][:SHOWN]:
        parts.append(f"![{figure['title']}]({name}/{figure['file']})\n\n*{figure['title']}.* {figure['caption']}")
    rest = [f"[{figure['title']}]({name}/{figure['file']})" for figure in manifest["figures"][SHOWN:]]
    if rest:
        parts.append("More: " + ", ".join(rest) + ".")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
