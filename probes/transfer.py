"""Transfer: probes trained at one cell and tested at all others, over the blocks or over the steps.

    table = transfer(store, samples, target, over="block", step=0, branch="cond")
    heatmap(table)

That a label is read at two blocks does not say that it is the same thing there. If a probe of one reads at the other, the label
lies along the same direction; if each reads at its own place only, something was written anew or turned on the way.

The split is the same at all cells, by group, so no probe is tested on a sample that any probe was trained on. What is carried
over is the direction: the area under the ROC curve does not know the offset of a stream, and guesses of a number are moved to
the mean that they have on the training rows of the tested cell. A number's guesses keep their scale, so its R2 may fall below 0.

A probe that reads nothing where it was trained has a direction all the same, of noise, and where the label is loud that may
read it by accident, in one sense or the other. So the rows of such cells say nothing; `trained_own` tells them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import plots
from dit_lens.errors import InputError, listed
from dit_lens.statistics import NO_DRAWS, Resampled, macro_auc_resampled, r2_resampled
from probes.controls import CONTROL, control_task
from probes.levers import Tokens, tokens_of
from probes.linear import split_groups
from probes.ridge import Question, read_all
from probes.targets import Drawn, Target

TRAINED, TESTED = "trained", "tested"
FIXED = ("step", "branch", "block", "site", "stream")


def transfer(
    store: dl.Store,
    samples: Sequence[Any],
    target: Target,
    over: Literal["block", "step"] = "block",
    *,
    drawn: Mapping[int, Drawn] | None = None,
    test_share: float = 0.5,
    seed: int = 0,
    progress: bool = True,
    **cell: Any,
) -> pd.DataFrame:
    """Train a ridge probe at every block (or step) that the store holds, and test each at all of them.

    Args:
        samples: those that were observed, with `index` and `group`; the store's rows have the labels `sample` and `group`.
        target: what is read, in its frame (or in the one that was recorded). drawn: what the model drew, by sample, if the
            target asks for that.
        cell: what stays: step (over blocks) or block (over steps), branch, and anything else that `Store.stack` takes.

    Returns:
        A row for each pair: `trained` and `tested` (with `trained_sigma` and `tested_sigma` over steps), the `cell` that stayed,
        `target`, `kind`; the score with `low`, `high`, `clusters` and `measurements`; `own`, the score of the tested cell's
        own probe, and `trained_own`, of the trained one at home; `control`, that of a control task trained and tested at the
        same places; and `selectivity`, with `selectivity_low` and `selectivity_high`.

    Raises:
        InputError: less than two cells, cells of other samples than these, or labels that leave nothing to learn.
    """
    if over not in ("block", "step"):
        raise InputError(f"a probe is carried over blocks or over steps, and not over={over!r}")
    if over in cell:
        raise InputError(
            f"{over}= is what the probes are carried over, leave it out; name the {'step' if over == 'block' else 'block'}"
        )
    wanted: dict[str, Any] = {"branch": "cond", "site": "resid", "stream": "visual", **cell, "sample": [s.index for s in samples]}
    if hasattr(samples[0], "task"):
        wanted.setdefault("task", samples[0].task.name)
    held = pd.concat([pd.DataFrame([asdict(entry.cell)]) for entry in store.select(**wanted)])
    places = held.drop_duplicates(over).sort_values(over)[[over, "sigma"]]
    if len(places) < 2:
        raise InputError(
            f"the store holds {over} {listed(places[over])} there, and a probe is carried to another one; record more"
        )
    reading = _Reading(store, samples, target, over, wanted, drawn, test_share, seed)
    bar = tqdm(total=2 * len(places), desc=f"transfer of {target.name}", unit="cell", disable=not progress)
    probes = {}
    for place in places[over]:
        probes[place] = reading.trained(place)
        bar.update()
    rows = []
    for place in places[over]:
        rows += reading.tested(place, probes)
        bar.update()
    bar.close()
    table = pd.DataFrame(rows).assign(target=target.name, kind=target.kind, **{k: v for k, v in wanted.items() if k in FIXED})
    own = table[table[TRAINED] == table[TESTED]].set_index(TESTED)["estimate"]
    table["own"], table["trained_own"] = (own.reindex(table[side]).to_numpy() for side in (TESTED, TRAINED))
    if over == "step":
        sigmas = places.set_index(over)["sigma"]
        for side in (TRAINED, TESTED):
            table[f"{side}_sigma"] = sigmas.reindex(table[side]).to_numpy()
    return table.sort_values([TRAINED, TESTED], ignore_index=True).assign(over=over)


class _Reading:
    """Reads one cell at a time, so that no two of them are in memory together."""

    def __init__(
        self,
        store: dl.Store,
        samples: Sequence[Any],
        target: Target,
        over: str,
        wanted: Mapping[str, Any],
        drawn: Mapping[int, Drawn] | None,
        test_share: float,
        seed: int,
    ) -> None:
        self.store, self.over, self.wanted, self.target, self.drawn = store, over, wanted, target, drawn
        self.samples = {sample.index: sample for sample in samples}
        self.share, self.seed = test_share, seed
        self.tokens: Tokens | None = None

    def trained(self, place: int) -> list[Float[np.ndarray, "columns channels"]]:
        """Weights of the probes of the target and of its control task."""
        features, tokens = self._cell(place)
        readings = read_all(features, self.questions, tokens.groups, self.test)
        if not len(readings[0].weights):
            raise InputError(f"the target {self.target.name} leaves nothing to learn from {len(self.samples)} samples")
        return [reading.weights for reading in readings]

    def tested(self, place: int, probes: Mapping[int, Sequence[np.ndarray]]) -> list[dict[str, Any]]:
        """The scores of all probes at one cell."""
        features, tokens = self._cell(place)
        rows = []
        for trained, weights in probes.items():
            asked = self.questions[0].asked & self.test
            # A control task may have labels of one class only, where there are few places.
            true, control = (
                scored(question, features @ one.T, tokens.groups, self.test)
                if len(one)
                else Resampled(np.nan, NO_DRAWS, len(np.unique(tokens.groups[asked])), int(asked.sum()))
                for question, one in zip(self.questions, weights, strict=True)
            )
            gap = true.less(control).interval()
            less = {"selectivity": gap.estimate, "selectivity_low": gap.low, "selectivity_high": gap.high}
            rows.append({TRAINED: trained, TESTED: place, **asdict(true.interval()), CONTROL: control.estimate, **less})
        return rows

    def _cell(self, place: int) -> tuple[Float[np.ndarray, "rows channels"], Tokens]:
        stack, rows = self.store.stack(**{**self.wanted, self.over: place})
        frame = self.target.frame
        if stack.ndim != 5:
            raise InputError(f"transfer takes whole latent frames, and the store holds {tuple(stack.shape[1:])} a sample")
        count = stack.shape[1]
        # As in `read_map`: where one frame was recorded, it is that one; none is the middle one.
        stack = stack[:, 0 if count == 1 else count // 2 if frame is None else frame]
        if self.tokens is None:
            there = [self.samples[number] for number in rows["sample"]]
            missing = sorted(set(self.samples) - set(rows["sample"]))
            if missing:
                raise InputError(f"the store lacks {len(missing)} of {len(self.samples)} samples, as {missing[0]}: observe them")
            self.tokens = tokens_of(dl.at(), dl.Layout(1, *stack.shape[1:3]), there, self.target, self.drawn)
            question = self.tokens.question
            self.questions = [question, control_task(question, self.tokens.places, self.seed)]
            _, self.test = split_groups(self.tokens.groups, self.share, self.seed)
            self.order = rows["sample"].tolist()
        if rows["sample"].tolist() != self.order:
            raise InputError(
                f"the samples at {self.over}={place} are not those at the first one: observe all of them at all cells"
            )
        return stack.float().flatten(0, 2).numpy().astype(np.float64), self.tokens


def scored(
    question: Question,
    guesses: Float[np.ndarray, "rows columns"],
    groups: Shaped[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
) -> Resampled:
    """The score of guesses on the test rows that are asked; guesses of numbers are moved to the mean of the training labels."""
    values, train, held = np.asarray(question.values, dtype=float), question.asked & ~test, question.asked & test
    if question.kind == "number":
        moved = guesses[held, 0] - guesses[train, 0].mean() + values[train].mean()
        return r2_resampled(moved, values[held], groups[held])
    truth = (values[held] > 0)[:, None] if question.kind == "binary" else values[held][:, None] == np.unique(values[train])
    return macro_auc_resampled(guesses[held], truth, groups[held])


def heatmap(table: pd.DataFrame) -> Figure:
    """What `transfer` found: trained at upwards, tested at to the right; below, how wide the intervals are, and the control task.

    There is a panel for each target, so tables may be joined.
    """
    over, kinds = str(table["over"].iloc[0]), set(table["kind"])
    shown = table.assign(across=table[TESTED], width=table["high"] - table["low"])
    if over == "step":
        shown["across"] = [f"{step} | {sigma:.2f}" for step, sigma in zip(table[TESTED], table["tested_sigma"], strict=True)]
    few, many = table["clusters"].min(), table["clusters"].max()
    control = table.groupby("target", sort=False)[CONTROL].agg(["min", "max"])
    number = kinds == {"number"}
    return plots.heat_maps(
        shown,
        panel="target",
        x="across",
        y=TRAINED,
        value="estimate",
        x_label=f"tested at {over}{' | sigma' if over == 'step' else ''}",
        y_label=f"trained at {over}",
        value_label=f"held-out {'R2' if number else 'ROC AUC'}\nN = {few if few == many else f'{few} to {many}'} test groups",
        limits=(0.0, 1.0),
        titles={
            name: f"{name}\ncontrol task: {low:.2f} to {high:.2f}"
            for name, low, high in zip(control.index, control["min"], control["max"], strict=True)
        },
        spread="width",
        spread_label=f"width of its 95 %\ninterval over groups, at most {shown['width'].max():.2f}",
    )
