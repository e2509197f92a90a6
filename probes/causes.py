"""From reading to cause: what becomes of later readings, and of the video, when what a probe reads is erased or added.

    at = dl.at(block=3, step=0, branch="cond", frames=-1)
    found = effects(lens, samples, at, target, levers_at(lens, others, at, target), outcomes)
    found.summary()                           # clean and edited outcomes, for every lever beside its controls
    found.readings                            # what a new probe reads after the erasing, at this block and all later ones

That a probe reads a label does not say that the model does. If it does, two things follow: without the label's direction
the video changes, and with more of it the video changes the other way. Both are measured, against a random direction of the same
length and against what labels of other samples lead to. And a label that was erased may come back, written afresh by a later
block, so a probe is trained anew at every later block: where it reads the label as before, the erasing says little. The first of
these readings, at the edited cell, says how well the erasing went: an eraser that was fitted to few samples leaves some.

Every sample has noise of its own, so that probes can be trained on what ran; intervals are over groups of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens.activations import Activations
from dit_lens.bench import SAME_STEP
from dit_lens.errors import InputError, listed
from dit_lens.pairs import joined_inputs
from dit_lens.statistics import summarise
from probes.controls import read_with_controls
from probes.levers import Lever, Tokens, seeds_of, tokens_of
from probes.linear import split_groups
from probes.targets import Drawn, Target

CLEAN, ERASE, ADD = "none", "erase", "add"
WHAT = ["edit", "dose", "lever", "is_control"]
CELL = ["expert", "step", "branch", "block", "site", "sigma", "depth"]


@dataclass(frozen=True, eq=False)
class Erase(dl.Edit):
    """Take from an activation what an eraser takes.

    Attributes:
        eraser: fitted to rows of the selected cell.
    """

    eraser: dl.Eraser

    def check_shape(self, moment: dl.Moment) -> None:
        """The eraser is of this width."""
        if tuple(moment.shape[-len(self.eraser.shape) :]) != self.eraser.shape:
            raise InputError(f"{self}: the eraser is of rows {self.eraser.shape}, and the activation has shape {moment.shape}")

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        """What is left."""
        return self.eraser(activation)


@dataclass(frozen=True, eq=False)
class Effects:
    """What erasing and adding did.

    Attributes:
        outcomes: a row for each edit, sample and outcome: the edited cell; `edit` (erase or add), `dose` (in class
            distances; not a number for erasing), `lever`, `is_control` (whether the lever is one); `sample`, `group`,
            `seed`, `outcome`; its `value`, what it is in the `clean` run, and `change`, the difference.
        readings: a row for each erasing, and for none, and each block that was read: `edit`, `lever`, `is_control`, `block`,
            and the columns of `read_with_controls`.
    """

    outcomes: pd.DataFrame
    readings: pd.DataFrame = field(repr=False)

    def summary(self, value: str = "change") -> pd.DataFrame:
        """Mean of `change`, `value` or `clean` for every edit and outcome, with an interval over groups of samples.

        Random levers count together, as one.
        """
        named = self.outcomes.assign(lever=self.outcomes["lever"].str.replace(r" \d+$", "", regex=True))
        return summarise(named, value, [*WHAT, "outcome"], cluster="group")


def effects(
    lens: dl.Lens,
    samples: Sequence[Any],
    at: dl.Selector,
    target: Target,
    levers: Mapping[str, Lever],
    outcomes: dl.Outcome | Sequence[dl.Outcome] = (),
    *,
    doses: Sequence[float] = (1.0, -1.0),
    reread: Sequence[int] | None = None,
    drawn: Mapping[int, Drawn] | None = None,
    batch: int = 16,
    test_share: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Effects:
    """Erase and add every lever at a cell, and measure outcomes and later readings.

    All tokens that `at` selects are edited, also those of which the target asks nothing.

    Args:
        samples: other ones than those that the levers were found with. Each has noise of its own.
        at: the cell, and which tokens of it. Steps and branches that are not named are edited together; outcomes of the same
            step need one of each. Readings are of its first step and branch.
        target: what is read again. levers: see `levers_at`; any mapping, so that you can leave out or add.
        outcomes: what to measure; their second argument holds a `dl.Pair` for every row, both of whose samples are the row's.
        doses: how much is added, in distances of the classes.
        reread: blocks to read after erasing, by default the edited one and all later ones; none where it is empty.
        drawn: what the model drew, by sample, if the target asks for that. batch: samples that run together.
        test_share, seed: of the split of the readings.

    Raises:
        InputError: nothing to measure, cells of several blocks, outcomes that do not fit them, or an edit that fails.
    """
    measured = [outcomes] if isinstance(outcomes, dl.Outcome) else list(outcomes)
    if not samples or not levers:
        raise InputError(f"effects need samples and levers, and there are {len(samples)} and {len(levers)}")
    trial = _Trial(lens, samples, at, target, measured, reread, drawn, batch, test_share, seed)
    edits = [({"edit": ERASE, "dose": np.nan}, lever, Erase(at, lever.eraser)) for lever in levers.values()]
    for lever in levers.values():
        if lever.direction is not None and measured:
            edits += [({"edit": ADD, "dose": dose}, lever, dl.Steer(at, lever.direction, dose)) for dose in doses]
    rows, readings = [], list(trial.read({"edit": CLEAN, "lever": CLEAN, "is_control": False}, trial.clean_features))
    for how, lever, edit in tqdm(edits, desc="from reading to cause", unit="edit", disable=not progress):
        what = {**how, "lever": lever.name, "is_control": lever.is_control}
        values, features = trial.edited(edit, reads=how["edit"] == ERASE)
        rows += [row | what for row in trial.rows(values)]
        if features:
            readings += trial.read({name: what[name] for name in ("edit", "lever", "is_control")}, features)
    return Effects(pd.DataFrame(rows), pd.concat(readings, ignore_index=True) if readings else pd.DataFrame())


Values = dict[str, np.ndarray]
Features = dict[int, np.ndarray]
"""By block: (rows, channels)."""


class _Trial:
    """The samples' clean runs, and what edits are tried on."""

    def __init__(
        self,
        lens: dl.Lens,
        samples: Sequence[Any],
        at: dl.Selector,
        target: Target,
        outcomes: Sequence[dl.Outcome],
        reread: Sequence[int] | None,
        drawn: Mapping[int, Drawn] | None,
        batch: int,
        test_share: float,
        seed: int,
    ) -> None:
        self.lens, self.samples, self.outcomes, self.seed = lens, samples, outcomes, seed
        self.parts = [samples[first : first + batch] for first in range(0, len(samples), batch)]
        extent = lens.extent(**joined_inputs(samples[:1]))
        self.cells = at.cells(extent)
        blocks, places = {cell.block for cell in self.cells}, {(cell.step, cell.branch) for cell in self.cells}
        if len(blocks) > 1:
            raise InputError(f"{at} selects the blocks {listed(sorted(blocks))}, and a direction is of one: name block=")
        self.cell = self.cells[0]
        self.place = (self.cell.step, self.cell.branch)
        same_step = [outcome.name for outcome in outcomes if outcome.of in SAME_STEP]
        if same_step and len(places) > 1:
            raise InputError(f"{at} is in {len(places)} calls, and {same_step[0]!r} is of one: name step= and branch=")
        # Outcomes of the end, or edits of several calls, take whole runs.
        self.late = len(same_step) < len(outcomes) or len(places) > 1
        every = range(self.cell.block, extent.blocks[self.cell.expert])
        self.blocks = list(every if reread is None else reread)
        if not self.blocks and not outcomes:
            raise InputError("there is nothing to measure: name outcomes, or blocks to read again")
        if set(self.blocks) - set(every):
            raise InputError(f"reread={self.blocks}: what is edited after block {self.cell.block} is in none before it")
        place = {"step": self.cell.step, "branch": self.cell.branch, "expert": self.cell.expert}
        self.record = [dl.at(block=self.blocks, frames=at.frames, tokens=at.tokens, **place)] if self.blocks else []
        self.runs: list[dl.Run] = []
        self.clean_values, self.clean_features = self._measured([], reads=True)
        if self.blocks:
            self.tokens: Tokens = tokens_of(at, self.runs[0].layout, samples, target, drawn)
            _, self.test = split_groups(self.tokens.groups, test_share, seed)

    def edited(self, edit: dl.Edit, reads: bool) -> tuple[Values, Features]:
        """Every outcome of every sample, and with `reads` the features of the blocks that are read."""
        return self._measured([edit], reads)

    def _measured(self, edits: Sequence[dl.Edit], reads: bool) -> tuple[Values, Features]:
        values: dict[str, list[np.ndarray]] = {outcome.name: [] for outcome in self.outcomes}
        features: dict[int, list[np.ndarray]] = {block: [] for block in self.blocks if reads}
        if edits and not self.outcomes and not features:
            return {}, {}
        for number, part in enumerate(self.parts):
            run = self._run(number, edits, self.record if reads else [])
            for block, rows in features.items():
                rows.append(run.activations.one(block=block).flatten(0, -2).float().numpy())
            if isinstance(run, dl.Run) and not edits:
                # What every edit is compared with; activations are large, and read once.
                calls = {} if self.late else {self.place: run.calls[self.place]}
                self.runs.append(replace(run, activations=Activations(), video=None, calls=calls))
            pairs = [dl.Pair(sample, sample) for sample in part]
            for outcome in self.outcomes:
                values[outcome.name].append(outcome(self._shown(outcome, run), pairs))
        return (
            {name: np.concatenate(found) for name, found in values.items()},
            {block: np.concatenate(rows) for block, rows in features.items()},
        )

    def _run(self, number: int, edits: Sequence[dl.Edit], record: Sequence[dl.Selector]) -> dl.Run | dl.Replay:
        """A batch of samples with edits; of an edited run as little as possible: where one call is enough, that call alone."""
        if edits and not self.late:
            again = self.lens.replay(self.runs[number].calls[self.place], record=record, edits=edits)
            return replace(again, velocity=again.velocity.cpu())
        part = self.parts[number]
        return self.lens.run(
            **joined_inputs(part),
            seed=seeds_of(part),
            record=record,
            edits=edits,
            answers=self._known(number) if edits else None,
            decode=any(outcome.of == "video" for outcome in self.outcomes),
            until=None if self.late else self.cell.step,
            keep_calls=not self.late,
        )

    def _known(self, number: int) -> dict[tuple[int, str], Tensor]:
        """What of a clean run the edit does not touch: all steps before it, and at its first step the other branches."""
        clean, first = self.runs[number], self.cell.step
        touched = {cell.branch for cell in self.cells if cell.step == first}
        here = {(first, branch): clean.velocity(first, branch) for branch in clean.branches if branch not in touched}
        return {**(clean.answers(before=first) if first else {}), **here}

    def _shown(self, outcome: dl.Outcome, run: dl.Run | dl.Replay) -> Tensor:
        """What an outcome measures."""
        if isinstance(run, dl.Replay):
            shown = run.velocity if outcome.of == "velocity" else run.x0_hat
        elif outcome.of == "video":
            assert run.video is not None  # it was decoded, as an outcome asks for it
            shown = run.video
        elif outcome.of == "latents":
            shown = run.latents[-1]
        else:
            shown = (run.velocity if outcome.of == "velocity" else run.x0_hat)(*self.place)
        return self.lens.decode(shown) if outcome.decoded else shown

    def rows(self, values: Values) -> Iterator[dict[str, Any]]:
        """A row of the table for each outcome and sample."""
        place = {name: value for name, value in asdict(self.cell).items() if name in CELL}
        for name, found in values.items():
            for sample, clean, value in zip(self.samples, self.clean_values[name], found, strict=True):
                labels = {"sample": sample.index, "group": sample.group, "seed": seeds_of([sample])[0][0], "outcome": name}
                yield {**place, **labels, "clean": clean, "value": value, "change": value - clean}

    def read(self, what: Mapping[str, Any], features: Features) -> Iterator[pd.DataFrame]:
        """A probe trained on these features, at every block that is read."""
        for block, rows in features.items():
            asked, tokens = [self.tokens.question], self.tokens
            table = read_with_controls(rows, asked, tokens.groups, self.test, tokens.samples, tokens.places, self.seed)
            yield table.assign(**what, block=block)
