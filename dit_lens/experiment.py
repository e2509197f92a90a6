"""An experiment: a protocol that measures in small units, keeps each, and can be stopped at any moment.

`Experiment` is a record: a name, the figure of the paper that it reproduces, presets of settings, and one function
``run(context)`` that returns a tidy table. The `Context` gives that function the lens, the settings, and the one habit that
makes long work bearable: `Context.units` takes named jobs, skips those whose results lie on disk already, computes the
others under a progress bar, and stores each the moment it is done. The folder of the stored parts carries the fingerprint
of model, scheduler, settings and code, so that nothing stale is ever taken up.

Figures and tables are collected while the experiment runs and written together at its end, the manifest last: a folder with
a manifest is a finished experiment.
"""

import inspect
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

from dit_lens import files, provenance, reasoner
from dit_lens.claims import Claim, committed, judged
from dit_lens.clean import CleanRuns
from dit_lens.encoded import encoded_once
from dit_lens.errors import InputError
from dit_lens.run import Run

ENTRY_POINTS = "dit_lens.experiments"
CLEAN = "clean-runs"
"""The folder of the runs that all experiments share, beside theirs."""
DPI, SHOWN_DPI = 130, 84
"""Dots per inch of a figure's file, and how many of the page's pixels an inch of it takes."""
CLOCK_COLUMNS = ["step", "sigma", "timestep", "expert"]


@dataclass(frozen=True)
class Experiment:
    """A protocol. ``presets`` maps a name to an instance of one frozen dataclass of settings; ``run`` takes a `Context` and
    returns the results, one row per measurement; ``claims`` are judged by these. ``after`` names experiments whose work it
    takes up where they ran before it, into the same folder. ``minutes``: about what its full preset takes on a data-centre
    GPU, two others beside it, 0 where that is not known: side by side, the longest begin first."""

    name: str
    title: str
    source: str
    question: str
    presets: Mapping[str, Any]
    run: Callable[["Context"], pd.DataFrame]
    claims: Sequence[Claim] = ()
    after: Sequence[str] = ()
    minutes: float = 0.0

    def preset(self, name: str) -> Any:
        """The settings of a preset. InputError where there is none of that name."""
        if name not in self.presets:
            raise InputError(f"no preset {name!r} of {self.name}: write one of {', '.join(self.presets)}")
        return self.presets[name]


@dataclass(frozen=True)
class Part:
    """What one unit of work leaves: a table, arrays by name, and the seconds that it took."""

    table: pd.DataFrame
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0


class Context:
    """What an experiment is handed: the lens, its settings, and a place where work survives an interruption."""

    def __init__(
        self,
        lens: Any,
        settings: Any,
        folder: Path,
        name: str,
        fingerprint: str,
        arguments: Mapping[str, Any],
    ):
        self.lens = lens
        self.settings = settings
        self.folder = folder
        self.name = name
        self.arguments = dict(arguments)
        self.parts = folder / "parts" / fingerprint
        self.counts = {"units": 0, "reused": 0}
        self.seconds = 0.0
        self.files: dict[str, bytes] = {}
        self.shown: dict[str, list[dict[str, Any]]] = {"figures": [], "films": [], "tables": []}

    def inputs(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The pipeline's arguments for these samples, with what was overridden for this model."""
        return {**reasoner.inputs(samples), **self.arguments}

    def clean(self, samples: Sequence[Any], seeds: Sequence[int] = (0,), batch: int | None = None) -> Run:
        """Unedited runs of these samples and seeds, prompt-major; all experiments of a folder share them."""
        return self._clean_runs.runs(samples, seeds, batch)

    def observed(self, samples: Sequence[Any], record: Any, seeds: Sequence[int] = (0,), lens: Any = None) -> Run:
        """The clean runs with records, made of the recorded calls only; see `CleanRuns.observed`."""
        return self._clean_runs.observed(samples, record, seeds, lens)

    @cached_property
    def _clean_runs(self) -> CleanRuns:
        return CleanRuns(self.lens, self.folder.parent / CLEAN, self.arguments)

    def steps(self, inputs: Mapping[str, Any], places: Sequence[float] | None = None) -> list[int]:
        """The steps of a pipeline call at the ``places`` of the settings, or at others; 0 is the first and 1 the last.

        Places, and not steps, so that one preset serves any schedule.
        """
        places = list(self.settings.places if places is None else places)
        outside = [place for place in places if not 0 <= place <= 1]
        if outside:
            raise InputError(f"places {outside} lie outside the schedule; write numbers from 0, the first step, to 1, the last")
        count = len(self.lens.forecast(**inputs).timesteps)
        return sorted({round(place * (count - 1)) for place in places})

    def clock(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Step, sigma, timestep and expert of the steps at the places of the settings."""
        ahead = self.lens.forecast(**inputs)
        return [
            {"step": i, "sigma": ahead.sigmas[i], "timestep": ahead.timesteps[i], "expert": ahead.experts[i]}
            for i in self.steps(inputs)
        ]

    def has(self, stage: str, keys: Sequence[str]) -> bool:
        """Whether every one of these units of a stage is stored."""
        return all(self._path(stage, key).exists() for key in keys)

    def units(self, stage: str, jobs: Mapping[str, Callable[[], Part]]) -> dict[str, Part]:
        """The parts of all jobs, in their order: stored ones as they lie on disk, the others computed and stored.

        Interrupted at any moment, the next start with the same fingerprint goes on after the last finished unit.
        """
        missing = [key for key in jobs if not self.has(stage, [key])]
        reused = len(jobs) - len(missing)
        self.counts["units"] += len(jobs)
        self.counts["reused"] += reused
        if reused:
            tqdm.write(f"{self.name}, {stage}: reused {reused} of {len(jobs)} units", file=sys.stderr)
        title = f"{self.name}, {stage}"
        with tqdm(total=len(jobs), initial=reused, desc=title, unit="unit", disable=not missing) as bar:
            for key in missing:
                started = time.perf_counter()
                part = jobs[key]()
                self._store(self._path(stage, key), part, time.perf_counter() - started)
                bar.update()
        return {key: self._stored(self._path(stage, key)) for key in jobs}

    def discard(self, stage: str) -> None:
        """Removes the parts of a stage whose bulk is no longer needed (activations, once they are probed), and its folders."""
        for path in self.parts.glob(f"{stage}--*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def scratch(self, stage: str, key: str) -> Path:
        """A folder of a stage for what is no part (a store of activations); it is there until `discard`."""
        return self.parts / f"{stage}--{key}"

    def figure(self, name: str, figure: Figure, title: str, caption: str, wide: bool = True) -> None:
        """A figure for the folder and the report. ``caption`` says what is shown, N and the interval; one that is not
        ``wide`` stands beside another on the page."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI, bbox_inches="tight", metadata={"Title": title})
        self.files[f"{name}.png"] = picture.getvalue()
        # Shown at one scale whatever their size, figures have letters of one size.
        width = round(Image.open(picture).width * SHOWN_DPI / DPI)
        self.shown["figures"].append({"file": f"{name}.png", "title": title, "caption": caption, "width": width, "wide": wide})

    def film(self, name: str, clips: np.ndarray, labels: Sequence[str], title: str, caption: str) -> None:
        """Clips to be watched in the report, as one PNG sheet: rows are clips (with labels), columns their frames.

        ``clips`` is uint8 with axes (clips, frames, height, width, 3).
        """
        rows, frames, height, width, _ = clips.shape
        sheet = clips.transpose(0, 2, 1, 3, 4).reshape(rows * height, frames * width, 3)
        picture = io.BytesIO()
        Image.fromarray(sheet).save(picture, format="PNG", optimize=True)
        self.files[f"{name}.png"] = picture.getvalue()
        size = {"frames": frames, "height": height, "width": width}
        self.shown["films"].append({"file": f"{name}.png", "title": title, "caption": caption, "labels": list(labels), **size})

    def table(self, title: str, table: pd.DataFrame, caption: str) -> None:
        """A small table of numbers for the manifest and the report."""
        content = json.loads(table.to_json(orient="split", index=False, double_precision=6))
        self.shown["tables"].append({"title": title, "caption": caption, **content})

    def _path(self, stage: str, key: str) -> Path:
        return self.parts / f"{stage}--{key}.parquet"

    def _store(self, path: Path, part: Part, seconds: float) -> None:
        # The arrays first: a part counts as stored once its table is there.
        if part.arrays:
            arrays = {name: np.ascontiguousarray(array) for name, array in part.arrays.items()}
            files.write_bytes(path.with_suffix(".safetensors"), save(arrays))
        part.table.attrs |= {"seconds": seconds, "by": self.name}
        files.write_bytes(path, _parquet(part.table))

    def _stored(self, path: Path) -> Part:
        table = pd.read_parquet(path)
        seconds = table.attrs.pop("seconds")
        # What experiments share is the time of the one that made it.
        if table.attrs.pop("by", self.name) == self.name:
            self.seconds += seconds
        arrays = path.with_suffix(".safetensors")
        return Part(table, load_file(arrays) if arrays.exists() else {}, seconds)


def experiments() -> dict[str, Experiment]:
    """Every installed experiment by name, in the order of their sources, found through the group `ENTRY_POINTS`."""
    found = [point.load() for point in entry_points(group=ENTRY_POINTS)]
    return {experiment.name: experiment for experiment in sorted(found, key=lambda experiment: experiment.source)}


def run_experiment(
    experiment: Experiment,
    lens: Any,
    out: Path,
    *,
    preset: str,
    settings: Any = None,
    arguments: Mapping[str, Any] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs an experiment into ``out/<name>/`` and returns its manifest.

    ``settings`` replaces those of the preset (whose name the manifest still carries, as the base); ``arguments`` are
    pipeline arguments that override those of the samples. InputError where the folder cannot be written.
    """
    settings = experiment.preset(preset) if settings is None else settings
    folder = out / experiment.name
    files.check_writable(folder)
    started, clock = datetime.now(UTC), time.perf_counter()
    fingerprint = provenance.fingerprint(
        lens, asdict(settings), arguments or {}, Path(inspect.getfile(inspect.unwrap(experiment.run)))
    )
    before = None
    with suppress(json.JSONDecodeError):  # one that is damaged is made again, as one that is missing
        before = read_manifest(folder)
    spent = before["compute_seconds"] if before and before["fingerprint"] == fingerprint else None
    if spent is not None:
        tqdm.write(f"{experiment.name}: finished before with the same fingerprint {fingerprint}", file=sys.stderr)
    context = Context(lens, settings, folder, experiment.name, fingerprint, arguments or {})
    with encoded_once(lens.pipe):
        results = experiment.run(context)
    verdicts = verdicts_of(experiment, results)
    manifest = {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "question": experiment.question,
        "preset": preset,
        "settings": asdict(settings),
        "arguments": dict(arguments or {}),
        "command": command,
        "model": provenance.model_facts(lens),
        "scheduler": provenance.scheduler_facts(lens),
        "steps_measured": _steps_measured(results),
        "versions": provenance.versions(),
        "device": provenance.device_facts(lens),
        "fingerprint": fingerprint,
        "rows": len(results),
        "units": context.counts,
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
        # Of a finished run whose discarded parts are gone, the manifest still knows the time.
        "compute_seconds": max(round(context.seconds, 1), spent or 0),
        "claims": verdicts,
        **context.shown,
    }
    if verdicts:
        context.files["claims.json"] = (json.dumps(verdicts, indent=1) + "\n").encode()
    context.files["results.parquet"] = _parquet(results)
    for stale in _listed(before) - set(context.files):
        (folder / stale).unlink(missing_ok=True)
    for name, data in context.files.items():
        files.write_bytes(folder / name, data)
    written = json.dumps(manifest, indent=1, default=str)
    files.write_text(folder / "manifest.json", written + "\n")
    return json.loads(written)


def verdicts_of(experiment: Experiment, results: pd.DataFrame) -> list[dict[str, Any]]:
    """What becomes of an experiment's claims, as `claims.json` holds it: beside each the verdict of the committed full run."""
    before = committed(Path(inspect.getfile(inspect.unwrap(experiment.run))).parent) if experiment.claims else {}
    found = [asdict(judged(claim, results)) for claim in experiment.claims]
    # A number that is not defined is null in JSON.
    whole = json.loads(json.dumps(found), parse_constant=lambda _: None)
    return [{**one, "committed": before.get(one["claim"])} for one in whole]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished experiment in ``folder``, or None."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def _listed(manifest: dict[str, Any] | None) -> set[str]:
    """The files that a manifest shows."""
    return {entry["file"] for kind in ("figures", "films") for entry in (manifest or {}).get(kind, [])}


def _steps_measured(results: pd.DataFrame) -> list[dict[str, Any]]:
    """The schedule as far as the results touch it: step, sigma, timestep and expert."""
    columns = [name for name in CLOCK_COLUMNS if name in results]
    rows = results[columns].dropna().drop_duplicates().sort_values(columns)
    return json.loads(rows.to_json(orient="records", double_precision=6))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()
