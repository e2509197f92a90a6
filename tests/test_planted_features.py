"""Planted features are where they are said to be, and probes with controls report them rightly in every case."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

import dit_lens as dl
from dit_lens.plants import FEATURES, FeatureTruth, PlantedFeature, planted_feature
from dit_lens.plants.features import READABLE, finding, reading_rows
from probes.controls import control_task, read_with_controls
from probes.linear import fit_and_score, split_groups
from probes.ridge import Question, read_all

SEEDS = range(4)
CLIPS = 64
HERE = {"step": 0, "branch": "cond"}


@cache
def model_of(kind: str, seed: int) -> PlantedFeature:
    """A model, built once; those of odd seeds have a feature of the clip, the others one of every token."""
    return planted_feature(kind, seed=seed, per="clip" if seed % 2 else "token")


@cache
def read(kind: str, seed: int) -> pd.DataFrame:
    """What probes find after every block of a model: a linear one with its controls, and a small network."""
    model = model_of(kind, seed)
    samples = model.samples(CLIPS, seed=100 + seed)
    record = dl.at(**HERE, frames=0)
    run = model.lens("hooks").run(**model.inputs(samples), seed=model.seeds(samples), until=0, decode=False, record=record)
    rows = reading_rows(samples)
    groups, (_, test) = rows["groups"], split_groups(rows["groups"])
    found = []
    for block in range(model.blocks):
        features = run.activation(block=block, **HERE).flatten(0, 3).numpy()
        question = Question("feature", "binary", rows["labels"])
        row = read_with_controls(features, [question], groups, test, rows["samples"], rows["places"]).iloc[0].to_dict()
        network = {"nonlinear": row["estimate"], "nonlinear_selectivity": row["selectivity"]}
        if row["estimate"] < READABLE:  # what a linear probe reads a network reads too, and training one takes longest
            area = fit_and_score(features, rows["labels"], groups, probe="nonlinear").estimate
            network = {"nonlinear": area, "nonlinear_selectivity": 0.0}
            if area >= READABLE:
                control = control_task(question, rows["places"]).values > 0
                network["nonlinear_selectivity"] -= fit_and_score(features, control, groups, probe="nonlinear").estimate - area
        found.append(row | network | {"block": block, "expected": model.truth.expected(block)})
    table = pd.DataFrame(found)
    scores = [table[name] for name in ("estimate", "selectivity", "nonlinear", "nonlinear_selectivity")]
    return table.assign(found=[finding(*values) for values in zip(*scores, strict=True)])


@pytest.mark.parametrize("kind", ["written", "erased", "nonlinear", "absent"])
@pytest.mark.parametrize("seed", SEEDS)
def test_probes_report_presence_absence_and_nonlinearity_rightly(kind: str, seed: int) -> None:
    table = read(kind, seed)
    assert table["found"].tolist() == table["expected"].tolist()
    there = table[table["expected"] == "linear"]
    assert (there["low"] > 0.95).all()
    assert (there["selectivity"] > 0.25).all()
    assert (table.loc[table["expected"] == "nonlinear", "nonlinear"] > 0.9).all()
    assert (table[["control", "shuffled"]] < READABLE).all().all()


def test_what_is_not_there_and_what_has_nothing_to_do_with_it_is_at_chance() -> None:
    """On average over the seeds, whose areas by chance have a standard deviation of 0.1: three times 0.1 / sqrt(4)."""
    tables = pd.concat([read(kind, seed).assign(kind=kind, seed=seed) for kind, seed in product(("erased", "absent"), SEEDS)])
    nonlinear = pd.concat([read("nonlinear", seed).assign(kind="nonlinear", seed=seed) for seed in SEEDS])
    nothing = tables[tables["expected"] == "absent"]
    for table, scores in ((nothing, ["estimate", "nonlinear", "control", "shuffled"]), (nonlinear, ["estimate"])):
        means = table.groupby(["kind", "seed"])[scores].mean().groupby("kind").mean()
        assert ((means - 0.5).abs() < 3 * 0.1 / len(SEEDS) ** 0.5).all().all(), means


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("per", ["token", "clip"])
def test_where_a_feature_is_absent_the_stream_does_not_depend_on_it(kind: str, per: str) -> None:
    """Stronger than any probe: a pair differs in the feature of all tokens and in nothing else, and its streams are the same.

    Or differ by less than a hundredth of the spread of each channel, which would raise an area under the ROC curve by 0.003.
    """
    model = planted_feature(kind, seed=7, per=per)
    pairs = model.pairs(3, seed=1)
    runs = [
        model.lens("hooks").run(**model.inputs(side), seed=model.seeds(side), until=0, decode=False, record=dl.at(step=0))
        for side in ([pair.clean for pair in pairs], [pair.donor for pair in pairs])
    ]
    assert torch.equal(runs[0].latents[0], runs[1].latents[0])
    for block in range(model.blocks):
        clean, donor = (run.activation(block=block, **HERE)[:, 0] for run in runs)
        off, spread = (clean - donor).abs().amax(dim=(0, 1, 2)), torch.cat([clean, donor]).std(dim=(0, 1, 2))
        if model.truth.expected(block) == "absent":
            assert (off <= 1e-2 * spread).all(), (block, off, spread)
        else:
            assert off.max() > 0.5, block
        other = [run.activation(block=block, step=0, branch="uncond") for run in runs]
        assert torch.equal(*other), "the word is in one branch only"
    if kind == "absent":
        assert torch.equal(runs[0].activation(block=4, **HERE), runs[1].activation(block=4, **HERE))


@pytest.mark.parametrize("seed", range(2))
def test_a_moved_feature_has_another_direction_from_there_on(seed: int) -> None:
    model = model_of("moved", seed)
    samples = model.samples(16)
    record = dl.at(**HERE, frames=0)
    run = model.lens("hooks").run(**model.inputs(samples), seed=model.seeds(samples), until=0, decode=False, record=record)
    labels = reading_rows(samples)["labels"]
    ways = [dl.difference_of_means(run.activation(block=b, **HERE).flatten(0, 3), labels) for b in range(model.blocks)]
    begin, moved = model.truth.block, model.truth.second
    assert begin is not None
    assert moved is not None
    for block in range(begin, model.blocks):
        with_first = float(dl.cosine(ways[block], ways[begin]))
        assert with_first > 0.6 if block < moved else with_first < 0.4, (block, with_first)


@pytest.mark.parametrize("use", ["reads", "ignores"])
@pytest.mark.parametrize("per", ["token", "clip"])
def test_the_answer_of_a_model_that_has_one_is_the_feature(use: str, per: str) -> None:
    model = planted_feature("written", seed=3, use=use, per=per)
    truth, pairs = model.truth, model.pairs(4)
    assert truth.block is not None
    assert truth.reader is not None
    assert truth.block < truth.reader
    for side in ([pair.clean for pair in pairs], [pair.donor for pair in pairs]):
        run = model.lens("hooks").run(**model.inputs(side), seed=model.seeds(side), decode=False)
        agreement = model.agreement(run.latents[-1], side)
        assert ((agreement > 0.7) & (agreement < 1.3)).all(), agreement
    for pair in pairs:
        assert np.array_equal(pair.clean.feature, ~pair.donor.feature)
        assert (len(np.unique(pair.clean.feature)) == 1) == (per == "clip")


def test_a_feature_that_nobody_speaks_of_is_not_in_the_latents() -> None:
    model = model_of("written", 0)
    samples = model.samples(32)
    run = model.lens("hooks").run(**model.inputs(samples), seed=model.seeds(samples), decode=False)
    assert model.agreement(run.latents[-1], samples).abs().mean() < 0.2
    rows = reading_rows(samples)
    _, test = split_groups(rows["groups"])
    shown = run.latents[-1][:, :, 0].unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).numpy()
    (reading,) = read_all(shown, [Question("it", "binary", rows["labels"])], rows["groups"], test)
    assert reading.score.estimate < READABLE


def test_a_seed_fixes_the_weights_and_places_are_as_given() -> None:
    before = torch.get_rng_state()
    one, again, other = (planted_feature("erased", seed=seed).lens().hash for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert planted_feature("moved", block=0, second=5, blocks=6).truth == FeatureTruth("moved", 0, 5)
    assert planted_feature("written", block=3, use="reads").truth == FeatureTruth("written", 3, use="reads", reader=4)
    truths = {planted_feature("erased", seed=seed, blocks=6).truth for seed in range(6)}
    assert all(0 < (one.block or 0) < (one.second or 0) < 6 for one in truths)
    assert len(truths) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hidden"}, "no kind 'hidden'.*written.*absent"),
        ({"kind": "absent", "block": 1}, "no block to choose"),
        ({"kind": "written", "second": 2}, "no second to choose"),
        ({"kind": "erased", "block": 4}, "block=4 and second=None are not in 5 blocks"),
        ({"kind": "erased", "use": "reads"}, "use='reads' of a feature that is erased"),
        ({"kind": "written", "blocks": 3}, "blocks=3"),
        ({"kind": "written", "per": "frame"}, "per='frame'"),
    ],
)
def test_a_place_that_is_not_there_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        planted_feature(**arguments)


def test_findings_need_selectivity() -> None:
    assert finding(0.95, 0.4, 1.0, 0.5) == "linear"
    assert finding(0.95, 0.05, 0.95, 0.05) == "absent", "memory of places"
    assert finding(0.5, 0.0, 0.9, 0.4) == "nonlinear"
    assert finding(0.7, 0.2, 0.7, 0.2) == "absent"
