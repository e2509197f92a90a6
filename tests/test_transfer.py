"""Transfer: a direction that stays is read wherever it is, and one that turns is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from planted_targets import FEATURE, HERE, stored

import dit_lens as dl
from dit_lens.plants import planted_feature
from dit_lens.plants.features import READABLE
from probes.linear import split_groups
from probes.ridge import Question, read_all
from probes.transfer import TESTED, TRAINED, heatmap, scored, transfer

CLIPS = 40


@pytest.mark.parametrize("kind", ["written", "moved"])
def test_a_probe_reads_where_the_feature_has_the_direction_that_it_was_trained_on(kind: str, tmp_path: Path) -> None:
    model = planted_feature(kind, seed=4, block=1, second=3 if kind == "moved" else None)
    samples = model.samples(CLIPS, seed=1)
    store = stored(tmp_path, model, samples, dl.at(**HERE, frames=0))
    table = transfer(store, samples, FEATURE, step=0, progress=False)
    assert len(table) == model.blocks**2
    # 0: not there. 1: along the first direction. 2: along another.
    ways = [0, 1, 1, 2, 2] if kind == "moved" else [0, 1, 1, 1, 1]
    for row in table.to_dict("records"):
        same = ways[row[TRAINED]] == ways[row[TESTED]] != 0
        assert row["own"] > 0.95 if ways[row[TESTED]] else row["own"] < READABLE
        assert row["trained_own"] > 0.95 if ways[row[TRAINED]] else row["trained_own"] < READABLE
        if not ways[row[TRAINED]]:
            continue  # a direction of noise has some share of any other one, and reads a loud feature in one sense or the other
        assert row["estimate"] > 0.95 if same else row["estimate"] < READABLE, row
        assert row["control"] < READABLE
        assert row["low"] <= row["estimate"] <= row["high"]
        assert row["selectivity"] == pytest.approx(row["estimate"] - row["control"])
        assert row["selectivity_low"] <= row["selectivity"] <= row["selectivity_high"]
    assert (table["clusters"] == CLIPS / 2).all()
    figure = heatmap(table)
    FigureCanvasAgg(figure).draw()
    texts = " ".join(text.get_text() for axis in figure.axes for text in (axis.title, axis.yaxis.label, axis.xaxis.label))
    assert "N = 20 test groups" in texts
    assert "control task" in texts
    assert "width of its 95 %" in texts


def test_on_the_diagonal_it_is_the_cells_own_probe(tmp_path: Path) -> None:
    model = planted_feature("written", seed=5)
    samples = model.samples(16, seed=2)
    store = stored(tmp_path, model, samples, dl.at(**HERE, block=[0, 3]))
    table = transfer(store, samples, FEATURE, step=0, progress=False)
    features, _ = store.stack(block=3, step=0)
    rows = np.repeat([sample.group for sample in samples], 16)
    _, test = split_groups(rows)
    labels = np.concatenate([sample.feature.ravel() for sample in samples])
    question = Question("feature", "binary", labels)
    (own,) = read_all(features[:, 0].flatten(0, 2).numpy(), [question], rows, test)
    here = table[(table[TRAINED] == 3) & (table[TESTED] == 3)].iloc[0]
    for name in ("estimate", "low", "high", "clusters", "measurements"):
        assert here[name] == pytest.approx(getattr(own.score, name), abs=1e-9)


def test_over_steps_a_direction_that_stays_is_read_at_all_of_them(tmp_path: Path) -> None:
    model = planted_feature("written", seed=6, block=1)
    samples = model.samples(24, seed=3)
    store = stored(tmp_path, model, samples, dl.at(block=2, branch="cond", step=[0, 2, 4], frames=0), until=None)
    table = transfer(store, samples, FEATURE, over="step", block=2, progress=False)
    assert set(zip(table[TRAINED], table[TESTED], strict=True)) == {(a, b) for a in (0, 2, 4) for b in (0, 2, 4)}
    assert (table["estimate"] > 0.95).all()
    assert (table["trained_sigma"].groupby(table[TRAINED]).nunique() == 1).all()
    assert table["tested_sigma"].iloc[:3].is_monotonic_decreasing
    FigureCanvasAgg(heatmap(table)).draw()


def test_scores_of_numbers_and_classes_know_no_offset() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 5)
    test, values = groups < 12, rng.normal(size=150)
    number = Question("n", "number", np.where(rng.random(150) < 0.8, values, np.nan))
    guesses = values[:, None] + 0.1 * rng.normal(size=(150, 1))
    one, other = scored(number, guesses, groups, test), scored(number, guesses + 100, groups, test)
    assert one.estimate > 0.95
    assert other.estimate == pytest.approx(one.estimate)
    assert scored(number, -guesses, groups, test).estimate < 0
    kinds = np.digitize(values, [-0.5, 0.5])
    columns = np.stack([np.where(kinds == kind, 1.0, -1.0) for kind in range(3)], axis=1)
    assert scored(Question("c", "classes", kinds), columns + np.array([5, 0, -3]), groups, test).estimate == 1


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = planted_feature("written", seed=5)
    samples = model.samples(10, seed=2)
    store = stored(tmp_path, model, samples, dl.at(**HERE, block=[0, 3], frames=0))
    more = model.samples(12, seed=2)
    for arguments, message in (
        ({"over": "block", "block": 1}, "block= is what the probes are carried over"),
        ({"over": "head"}, "over blocks or over steps"),
        ({"over": "step", "block": 3}, "the store holds step 0 there"),
        ({"samples": more, "step": 0}, "the store lacks 2 of 12 samples, as 10"),
        ({"target": replace(FEATURE, labels=lambda sample, drawn: np.ones((4, 4))), "step": 0}, "leaves nothing to learn"),
    ):
        with pytest.raises(dl.InputError, match=message):
            transfer(store, **{"samples": samples, "target": FEATURE, "progress": False, **arguments})
