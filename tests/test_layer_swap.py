"""The layer swap: what is brought into a run is what was meant, outcomes are read rightly, and the claims follow from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_pipeline
from samples import Sample

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.activations import Entry
from dit_lens.architectures import Layout
from dit_lens.claims import judged
from dit_lens.errors import InputError
from dit_lens.experiment import Context, run_experiment
from dit_lens.reasoner import board
from experiments import layer_swap, swapping
from experiments.swapping import (
    ANSWERS,
    CONTROLS,
    FINAL,
    OBJECT,
    OTHER_SAMPLE,
    OTHER_TOKENS,
    READINGS,
    SHUFFLED,
    SWAP,
    X0_HAT,
    Bench,
    Swap,
    differing,
    objects,
)

SHORT = {"num_inference_steps": 3, "num_frames": 5}
STEP = 1


@pytest.fixture(scope="module")
def lens() -> Any:
    return dl.wrap(tiny_pipeline(), engine="hooks")


@pytest.fixture(scope="module")
def bench(lens: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("swaps") / "layer-swap"
    pairs = [*reasoner.pairs("circle", 2, frames=5), *reasoner.pairs("maze", 1, frames=5)]
    return Bench(Context(lens, layer_swap.Settings(), folder, "layer-swap", "test", SHORT), pairs)


def latents(bench: Bench, variant: str, block: int, site: str, given: dl.Activations | None = None, step: int = STEP) -> Any:
    held = bench.given(variant, step, block) if given is None else given
    return bench.swapped(variant, step, block, site, held).latents[-1]


def test_a_swap_is_what_a_sweep_makes_of_it(lens: Any, bench: Bench) -> None:
    def total(shown: torch.Tensor, pairs: Any) -> torch.Tensor:
        return shown.double().flatten(1).square().sum(1)

    pairs = [dl.Pair(*(Sample({**side.inputs, **SHORT}) for side in pair)) for pair in bench.pairs]
    for site in READINGS:
        over = dl.at(block=[0, 2], step=STEP, branch="cond", site=site)
        swept = dl.sweep(
            lens, pairs, lambda cell, runs: dl.Patch(cell, runs.donor), over, dl.Outcome("total", total, of="latents")
        )
        for block, rows in swept.table.groupby("block"):
            ours = total(latents(bench, SWAP, int(block), site), ())  # pyright: ignore[reportArgumentType]
            assert ours.numpy() == pytest.approx(rows["value"].to_numpy(), rel=1e-6)
            assert (abs(ours.numpy() / rows["clean"].to_numpy() - 1) > 1e-6).all()


def test_the_last_block_of_both_branches_gives_the_velocity_of_the_donor(bench: Bench) -> None:
    # At the first step both start from the same noise, and after the last block nothing but the head is left.
    run = bench.swapped(swapping.EVERY_BRANCH, 0, 2, "resid", bench.given(swapping.EVERY_BRANCH, 0, 2))
    for branch in ("cond", "uncond"):
        torch.testing.assert_close(run.velocity(0, branch), bench.donor.velocity(0, branch), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run.latents[-1], bench.donor.latents[-1], atol=1e-4)  # its own image comes in again


def test_every_step_and_branch_of_the_last_block_makes_it_the_donor(bench: Bench) -> None:
    # Of mazes too, whose unconditional branch sees the goal.
    run = latents(bench, swapping.ALL_STEPS, 2, "resid")
    torch.testing.assert_close(run, bench.donor.latents[-1], atol=1e-4, rtol=1e-4)


def test_a_donor_that_is_the_clean_run_changes_nothing(bench: Bench) -> None:
    same = Bench(bench.context, [reasoner.Pair(pair.clean, pair.clean) for pair in bench.pairs])
    for variant in (SWAP, swapping.EVERY_BRANCH):
        torch.testing.assert_close(latents(same, variant, 1, "update"), bench.clean.latents[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(latents(same, SHUFFLED, 1, "update"), bench.clean.latents[-1], atol=1e-4)
    assert not torch.allclose(latents(same, swapping.OTHER_SEED, 1, "update"), bench.clean.latents[-1], atol=1e-4)


def test_another_sample_is_of_the_same_task_where_there_is_one(bench: Bench) -> None:
    assert bench.others == [1, 0, 0]
    moved, own = (bench.given(variant, STEP, 1).one(site="resid") for variant in (OTHER_SAMPLE, SWAP))
    assert torch.equal(moved, own[[1, 0, 0]])
    with pytest.raises(InputError, match="needs two pairs"):
        Bench(bench.context, bench.pairs[:1]).others  # noqa: B018


def test_only_the_chosen_tokens_take_the_place_and_in_the_order() -> None:
    random = torch.Generator().manual_seed(0)
    own, donor = (torch.randn((2, 3, 2, 2, 5), generator=random) for _ in range(2))
    cell = dl.Cell("transformer", 0, "cond", 1)
    held = dl.Activations([Entry(cell, 0, "full", donor)])
    where = torch.tensor([[[True, False], [False, False]], [[False, False], [True, True]]])
    order = torch.randperm(12, generator=random)
    moment = dl.Moment(cell, (0, 0), (0, 1), Layout(3, 2, 2), (3, 2, 2, 5))
    given = Swap(dl.at(block=1), held, where, order).apply(own.clone(), moment)
    expected = own.clone()
    tokens = donor.reshape(2, 12, 5)
    for row, frame, y, x in np.ndindex(2, 3, 2, 2):
        if where[row, y, x]:
            expected[row, frame, y, x] = tokens[row, order[4 * frame + 2 * y + x]]
    assert torch.equal(given, expected)
    assert torch.equal(Swap(dl.at(block=1), held).apply(own, moment), donor)


def test_answer_tokens_are_where_a_pair_differs_and_object_tokens_are_the_objects_too(bench: Bench) -> None:
    for pair in reasoner.pairs("circle", 4):
        rings = [side.masks["answer"] for side in pair]
        assert (differing(pair) == (rings[0] ^ rings[1])).all()  # the picture is the same, what is circled is not
        assert (objects(pair) == differing(pair) | pair.clean.masks["target"] | pair.donor.masks["target"]).all()
        assert not (objects(pair) & pair.clean.masks["distractor"] & pair.donor.masks["distractor"]).any()
    for pair in reasoner.pairs("maze", 4):
        found = differing(pair)
        assert all(found[side.puzzle.goal] for side in pair)
        assert not found[pair.clean.puzzle.start]
        assert (objects(pair) == found).all()
    for pair in reasoner.pairs("tictactoe", 2):
        board = pair.clean.boards[0]
        assert (objects(pair) & (board != 0) == pair.clean.masks["x"] | pair.clean.masks["o"]).all()
        assert (objects(pair) & (board == 0) == differing(pair)).all()
    counts = {name: where.flatten(1).sum(1) for name, where in bench.tokens.items()}
    assert all(where.shape == (3, 8, 8) for where in bench.tokens.values())
    assert ((counts[ANSWERS] > 0) & (counts[ANSWERS] <= counts[OBJECT]) & (counts[OBJECT] < 64)).all()
    assert torch.equal(counts[OTHER_TOKENS], counts[OBJECT])
    assert not torch.allclose(latents(bench, OBJECT, 1, "resid"), latents(bench, SWAP, 1, "resid"), atol=1e-5)


def test_the_other_tokens_are_no_objects_unless_those_are_most(bench: Bench) -> None:
    most = Bench(bench.context, reasoner.pairs("tictactoe", 2, frames=5))
    for here in (bench, most):
        both = (here.tokens[OBJECT] & here.tokens[OTHER_TOKENS]).flatten(1).sum(1)
        assert torch.equal(both, (2 * here.tokens[OBJECT].flatten(1).sum(1) - 64).clip(0))
        assert here.share(OTHER_TOKENS).tolist() == here.share(OBJECT).tolist()
    assert bench.share(SWAP).tolist() == [1, 1, 1]


def test_mapped_pairs_are_of_different_puzzles() -> None:
    every = reasoner.pairs("tictactoe", 8)
    some = layer_swap.of_different_puzzles(every)
    assert len({pair.clean.group for pair in every}) == len(some) < len(every)
    assert [pair.clean.index for pair in some] == sorted(pair.clean.index for pair in some)
    assert some[0] is every[0]


def test_outcomes_tell_whose_answer_a_video_shows(bench: Bench) -> None:
    def video(side: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(pair, side).video() for pair in bench.pairs]))

    for side, fate in (("clean", "kept"), ("donor", "flipped")):
        found = bench.outcomes(video(side))
        assert found[["flipped", "kept", "destroyed"]].sum(axis=1).eq(1).all()
        assert found[fate].all()
        assert found["flipped_right"].eq(side == "donor").all()
    black = bench.outcomes(torch.zeros_like(video("clean")))
    assert black["destroyed"].all()
    # A route to the donor's goal is its answer, though the goal is still drawn where the clean maze has it.
    untidy = video("donor")
    goal = [4 * place for place in bench.pairs[2].clean.puzzle.goal]
    untidy[2, :, goal[0] : goal[0] + 4, goal[1] : goal[1] + 4] = torch.tensor([0.9, 0, 0])
    assert bench.outcomes(untidy)["flipped"].tolist() == [True, True, True]


def test_the_last_frame_tells_what_the_scorers_of_whole_videos_do(bench: Bench) -> None:
    pairs = [pair for name in ("circle", "maze", "tictactoe") for pair in reasoner.pairs(name, 2, frames=5)]
    here, random = Bench(bench.context, pairs), np.random.default_rng(0)
    # True videos in which up to three squares of every frame are repainted: right, legal and wrong ones.
    for repainted in range(4):
        boards = np.stack([(pair.donor if place % 2 else pair.clean).boards for place, pair in enumerate(pairs)])
        for frame in boards.reshape(-1, 16, 16):
            frame[tuple(random.integers(16, size=(2, repainted)))] = random.integers(9, size=repainted)
        video = board.paint(boards).astype(np.float32) / 255
        found = here.outcomes(torch.from_numpy(video))
        for side, column in (("donor", "flipped"), ("clean", "kept")):
            samples = [getattr(pair, side) for pair in pairs]
            scores = [sample.task.score(clip, sample) for clip, sample in zip(video, samples, strict=True)]
            assert found[column].tolist() == [score.which is not None for score in scores]
            assert side != "donor" or found["flipped_right"].tolist() == [score.right for score in scores]


def test_bands_are_those_of_the_paper_in_its_model() -> None:
    def paper(block: int) -> str:
        blocks = SimpleNamespace(extent=SimpleNamespace(blocks={"a": 40}, forecast=SimpleNamespace(experts=["a"])))
        return Bench.band(blocks, block)  # pyright: ignore[reportArgumentType]

    assert paper(20) == "middle"
    assert [paper(block) for block in (0, 9, 10, 19, 21, 29, 30, 39)] == [*["early"] * 2, *["between"] * 4, *["late"] * 2]


def planted(flip: Any, control: float = 0.0, samples: int = 120) -> pd.DataFrame:
    """Results in which a block of 14 flips the answer with a rate of its own, and controls with another."""
    random = np.random.default_rng(5)
    rows = []
    for block in (0, 3, 5, 7, 9, 11, 13):
        band = "middle" if block == 7 else "early" if block < 3.5 else "late" if block >= 10.5 else "between"
        for variant in (SWAP, *CONTROLS):
            rate = flip(block) if variant == SWAP else control
            for reading in READINGS.values():
                where = {"step": 0, "block": block, "band": band, "variant": variant, "reading": reading}
                for readout in (FINAL, X0_HAT):
                    drawn = random.random(samples) < (rate if readout == FINAL else 1.0)
                    rows += [{**where, "readout": readout, "puzzle": f"maze/{i}", "flipped": f} for i, f in enumerate(drawn)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("flip", "control", "word"),
    [
        (lambda block: 0.95 if block == 7 else 0.02, 0.0, "supported"),
        (lambda block: 0.95 if 5 <= block <= 9 else 0.02, 0.01, "supported"),  # a peak may be broad
        (lambda block: 0.0, 0.0, "refuted"),  # the final video never flips, whatever x0-hat does
        (lambda block: 0.95, 0.0, "refuted"),  # every block flips it: generic patching
        (lambda block: float(block >= 7), 0.0, "refuted"),  # a step
        (lambda block: 0.95 if block == 7 else 0.0, 0.6, "refuted"),  # and so does any donor
        (lambda block: 0.5 if block == 7 else 0.0, 0.0, "inconclusive"),
    ],
)
def test_claims_follow_from_the_flip_rates(flip: Any, control: float, word: str) -> None:
    results = planted(flip, control)
    assert [judged(claim, results).verdict for claim in layer_swap.CLAIMS] == [word, word]


def test_readings_are_judged_by_themselves() -> None:
    results = planted(lambda block: 0.95 if block == 7 else 0.02)
    results.loc[results["reading"] == READINGS["update"], "flipped"] = False
    assert [judged(claim, results).verdict for claim in layer_swap.CLAIMS] == ["supported", "refuted"]


def test_copies_of_a_puzzle_are_one_sample() -> None:
    results = planted(lambda block: 0.95 if block == 7 else 0.02)
    results["puzzle"] = [f"maze/{int(name.split('/')[1]) // 2}" for name in results["puzzle"]]
    found = [judged(claim, results) for claim in layer_swap.CLAIMS]
    assert {one.clusters for verdict in found for one in verdict.found} == {60}
    assert {verdict.verdict for verdict in found} == {"not tested"}


def test_runs_with_two_experts_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lens = dl.wrap(tiny_pipeline(experts=2), engine="hooks")
    settings = layer_swap.Settings(
        tasks=("circle",),
        pairs=1,
        mapped=2,
        variants=(OTHER_SAMPLE, swapping.ALL_STEPS),
        places=(0, 1),
        map_depths=(0.5,),
        batch=2,
    )
    how: Any = {"preset": "quick", "settings": settings, "arguments": {"num_inference_steps": 2, "num_frames": 5}}
    manifest = run_experiment(layer_swap.EXPERIMENT, lens, tmp_path, **how)
    results = pd.read_parquet(tmp_path / "layer-swap" / "results.parquet")
    assert {"step", "sigma", "timestep", "expert", "sample", "seed", "task"} <= set(results.columns)
    assert set(results["expert"]) == {"transformer", "transformer_2"}
    assert [row["step"] for row in manifest["steps_measured"]] == [0, 1]
    assert {claim["verdict"] for claim in manifest["claims"]} == {"not tested"}
    shown = {figure["file"] for figure in manifest["figures"]}
    assert shown == {"first-step.png", "fates.png", "map.png", "pictures-circle.png"}
    again = run_experiment(layer_swap.EXPERIMENT, lens, tmp_path, **how)
    assert again["units"] == {"units": 4, "reused": 4}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "layer-swap" / "results.parquet"), results)
