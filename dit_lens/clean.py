"""Clean runs that are made once: whoever needs an unedited run of a sample and a seed takes it from here.

    clean = CleanRuns(lens, "out/clean-runs")
    run = clean.runs(samples, seeds=[0, 1])        # rows sample by sample, as lens.run(..., seed=[0, 1]) makes them

Most experiments compare with the same unedited runs. They lie in one `Store`, row by row named by task, sample and seed,
in a folder for each model, schedule, device and version, so that nothing stale is taken up; what is missing is made, in batches.
The trajectory and the video are kept, activations are not. Batches differ from the ones in which an edited run is made, so
rows agree with `lens.run` within rounding and not to the bit; an edited run that begins with a clean run's own answers
(`lens.run(answers=run.answers(before=step))`) has the clean run's bits up to there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dit_lens import provenance, reasoner
from dit_lens.errors import InputError
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.lens import Lens
from dit_lens.record import Record, as_records
from dit_lens.run import Run
from dit_lens.selection import Selector
from dit_lens.store import Store

ROWS, ROWS_ACCELERATED = 8, 128
"""Rows of a pipeline call, on a CPU and on an accelerator."""
KEY = ["task", "split", "sample", "shown", "seed"]
"""What names a run. `shown` is what the model is given: the donor of a pair has the number of its clean sample."""


class CleanRuns:
    """A store of unedited runs.

    Args:
        lens: what makes those that are missing. folder: holds a store for each model, schedule, device and version.
        arguments: pipeline arguments that override those of the samples.
        inputs: samples to pipeline arguments; the reasoner's own when left out.
    """

    def __init__(
        self,
        lens: Lens,
        folder: str | Path,
        arguments: Mapping[str, Any] | None = None,
        inputs: Callable[[Sequence[Any]], dict[str, Any]] = reasoner.inputs,
    ) -> None:
        self.lens = lens
        self.arguments = dict(arguments or {})
        self.inputs = inputs
        facts = {
            "model": lens.hash,
            "scheduler": provenance.scheduler_facts(lens),
            "arguments": self.arguments,
            "device": lens.pipe.device.type,
            "versions": provenance.versions(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self.store = Store(Path(folder) / digest[:16])

    def runs(self, samples: Sequence[Any], seeds: Sequence[int] = (0,), batch: int | None = None, progress: bool = True) -> Run:
        """The runs of these samples with each of these seeds, as one: prompt-major, with videos and without activations.

        Args:
            samples: of one task or of several. batch: rows of a pipeline call for what is missing.

        Raises:
            InputError: no samples or seeds, or a seed that is given twice.
        """
        if not samples or not seeds or len(set(seeds)) < len(seeds):
            raise InputError(
                f"clean runs need samples, and seeds that differ; got {len(samples)} samples and seeds {list(seeds)}"
            )
        there = self._places()
        lacking: dict[tuple[int, ...], list[Any]] = {}
        for sample in {_key(sample): sample for sample in samples}.values():
            missing = tuple(seed for seed in seeds if (*_key(sample), seed) not in there)
            if missing:
                lacking.setdefault(missing, []).append(sample)
        rows = batch or (ROWS if self.lens.pipe.device.type == "cpu" else ROWS_ACCELERATED)
        total = sum(len(missing) * len(group) for missing, group in lacking.items())
        with tqdm(total=total, desc="clean runs", unit="run", disable=not (progress and total)) as bar:
            for missing, group in lacking.items():
                each = max(1, rows // len(missing))
                for first in range(0, len(group), each):
                    self._make(group[first : first + each], missing)
                    bar.update(len(group[first : first + each]) * len(missing))
        return self._joined([(*_key(sample), seed) for sample in samples for seed in seeds])

    def observed(
        self,
        samples: Sequence[Any],
        record: Selector | Record | Iterable[Selector | Record],
        seeds: Sequence[int] = (0,),
        lens: Lens | None = None,
    ) -> Run:
        """The runs with records: of the denoiser's calls only those are made in which something is recorded, all others answer
        as they did.

        Args:
            record: as for `Lens.run`. lens: another model of the same kind (an untrained one, as a control) that is shown the
                latents of these runs; its own answers are not followed.

        Returns:
            The run, without a video. Its trajectory is that of the clean runs.
        """
        clean, seen = self.runs(samples, seeds), lens or self.lens
        inputs, records = {**self.inputs(samples), **self.arguments}, as_records(record)
        extent = seen.extent(**inputs)
        calls = {(cell.step, cell.branch) for one in records for cell in one.selector.cells(extent)}
        answers = {place: answer for place, answer in clean.answers().items() if place not in calls}
        # Another model's answers lead elsewhere: every step takes the latents of the clean run again.
        edits = [ReplaceLatents("all", donor=clean)] if lens is not None else []
        return seen.run(**inputs, seed=list(seeds), record=records, edits=edits, answers=answers, decode=False)

    def _make(self, samples: Sequence[Any], seeds: Sequence[int]) -> None:
        run = self.lens.run(**{**self.inputs(samples), **self.arguments}, seed=list(seeds))
        rows = [sample for sample in samples for _ in seeds]
        labels = {name: [_key(sample)[place] for sample in rows] for place, name in enumerate(KEY[:-1])}
        self.store.append(run, self.lens.hash, **labels)

    def _places(self) -> dict[tuple[Any, ...], tuple[int, int]]:
        """Run and row of everything that is stored, by task, split, sample and seed."""
        rows = self.store.rows
        if rows.empty:
            return {}
        keys = rows[KEY].itertuples(index=False, name=None)
        return dict(zip(keys, rows[["run", "row"]].itertuples(index=False, name=None), strict=True))

    def _joined(self, wanted: Sequence[tuple[Any, ...]]) -> Run:
        there = self._places()
        places = [there[key] for key in wanted]
        by_run: dict[int, list[int]] = {}
        for number, row in places:
            by_run.setdefault(number, []).append(row)
        # Each stored run is read once; rows are put back into the order asked for.
        parts = {number: self.store.run(number).rows(rows) for number, rows in by_run.items()}
        whole = Run.joined(list(parts.values()))
        found = [(number, row) for number, rows in by_run.items() for row in rows]
        order: dict[tuple[int, int], int] = {place: index for index, place in enumerate(found)}
        return whole.rows([order[place] for place in places])


def _key(sample: Any) -> tuple[str, str, int, str]:
    given = sample.inputs["image"].tobytes() + sample.prompt.encode()
    return sample.task.name, sample.split, sample.index, hashlib.sha256(given).hexdigest()[:16]
