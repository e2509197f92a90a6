"""One page that shows what was measured: every finished experiment of a folder in one self-contained HTML file.

The page is made from what lies in the folder and nothing else: manifests say how a result was made, PNG files show it,
`results.parquet` can be saved from the page. Everything is embedded, so that the file can be mailed or archived.
"""

import base64
import json
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dit_lens import files
from dit_lens.claims import FAMILY, as_table
from dit_lens.errors import InputError
from dit_lens.experiment import read_manifest

NAME = "report.html"


def write_report(out: Path) -> Path:
    """Writes ``out/report.html`` from every experiment finished in ``out``, and returns its path.

    InputError where there is no such experiment, where a manifest or a file it names cannot be read, or where the page
    cannot be written.
    """
    if not out.is_dir():
        raise InputError(f"no folder {out}: write the --out folder of a run")
    sections = [section for folder in sorted(out.iterdir()) if (section := _section(folder))]
    if not sections:
        raise InputError(f"no finished experiment in {out}: run one with dit-lens run EXPERIMENT --out {out}")
    environment = Environment(
        loader=PackageLoader("dit_lens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, cell=cell)
    sections.sort(key=lambda section: section["source"])
    page = environment.get_template("report.html.jinja").render(
        sections=sections,
        header=_header(sections),
        # Films come first: what the model does is to be seen before it is measured.
        films=[film for section in sections for film in section["films"]],
        verdicts=_verdicts(sections),
        family=FAMILY,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    files.write_text(out / NAME, page)
    return out / NAME


def check_results(out: Path, but: Collection[str] = ()) -> None:
    """InputError where a finished experiment in ``out`` cannot be read, so that no report can be written, except those named.

    It is asked before long work begins, which would end without a report.
    """
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        if folder.name not in but:
            _section(folder)


def duration(seconds: float) -> str:
    """Seconds in words: "7.3 s", "4 min 05 s", "2 h 03 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def took(manifest: dict[str, Any]) -> str:
    """How long an experiment computed, and how much it took up that another one or an earlier start had made."""
    units = manifest["units"]
    taken = f", {units['reused']} of {units['units']} units taken up" if units["reused"] else ""
    return "everything taken up" if units["reused"] == units["units"] > 0 else duration(manifest["compute_seconds"]) + taken


def cell(value: Any) -> str:
    """One cell of a table of numbers: three significant digits for fractions, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _section(folder: Path) -> dict[str, Any] | None:
    """The manifest of one experiment with its files as data URIs; None where the folder holds no finished one."""
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        for entry in (*manifest["figures"], *manifest["films"]):
            entry["uri"] = _data_uri(folder / entry["file"], "image/png")
        results = folder / "results.parquet"
        manifest["results_uri"] = _data_uri(results, "application/vnd.apache.parquet")
        manifest["results_name"] = f"{manifest['experiment']}-results.parquet"
        manifest["settings_text"] = json.dumps(manifest["settings"], indent=1)
        return manifest
    except (OSError, json.JSONDecodeError, KeyError) as problem:
        raise InputError(f"{folder} is not a whole result ({problem!r}): run its experiment again") from problem


def _verdicts(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every claim that the experiments tested, with the experiment that did."""
    rows = []
    for section in sections:
        table = as_table(section.get("claims", [])).to_dict("records")
        rows += [{**row, "experiment": section["experiment"]} for row in table]
    return rows


def _header(sections: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the head of the page says: one line per fact, several values where the experiments differ."""

    def every(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return [
        ("Model", every([f"{s['model']['name']} ({s['model']['hash'][:12]})" for s in sections])),
        ("Preset", every([s["preset"] for s in sections])),
        ("Measured", every([s["started"][:10] for s in sections])),
        ("Device", every([f"{s['device']['type']} ({s['device']['name']})" for s in sections])),
        ("Computing time", duration(sum(s["compute_seconds"] for s in sections))),
    ]


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
