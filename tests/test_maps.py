"""Maps of targets: what was planted is found where it is, leaks and bad labels are refused, workers change nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_maps import noise, planted_store

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.reasoner.tasks.maze import Maze
from probes.baselines import LATENTS, PLACE, SITUATION, TIMESTEP
from probes.closer import KINDS, Closer
from probes.levers import tokens_of
from probes.linear import check_split
from probes.maps import PROBE, read_map
from probes.targets import Drawn, Target, targets

ROUTE = next(target for target in targets("maze") if target.name == "route")


@cache
def mazes() -> list[Any]:
    return [reasoner.task("maze").sample("test", index) for index in range(32)]


def route(sample: Any) -> np.ndarray:
    return np.where(sample.puzzle.route_tokens.any(axis=0), 1.0, -1.0)


def stream(sample: Any, block: int, step: int) -> np.ndarray:
    """The route is absent after block 0, there after block 1, erased after block 2, and a product of two signs after 3."""
    found = noise(sample, block, step)
    if block == 1:
        found[0, ..., 3] += 6 * route(sample)
    if block == 3:
        signs = np.sign(np.random.default_rng(sample.index).normal(size=(8, 8)))
        found = 0.3 * found[..., :4]
        found = np.concatenate([found, (2 * signs)[None, ..., None], (2 * signs * route(sample))[None, ..., None]], axis=-1)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dl.Store:
    return planted_store(tmp_path_factory.mktemp("store"), mazes(), stream, blocks=4)


@pytest.fixture(scope="module")
def table(store: dl.Store) -> pd.DataFrame:
    return read_map(store, mazes(), [ROUTE], closer=Closer(("route",), (0,), samples=32), progress=False)


def label(name: str, values: Any, task: str = "maze") -> Target:
    """A target whose labels are what a function of the sample says."""
    return Target(name, "perceptual", "binary", (task,), "as told", lambda sample, drawn: values(sample))


def test_presence_absence_erasure_and_nonlinearity_are_told_apart(table: pd.DataFrame) -> None:
    probed: Any = table[table["reader"] == PROBE].set_index("block")
    absent, present, erased, product = (probed.loc[block] for block in range(4))
    assert present["estimate"] > 0.99
    assert present["selectivity"] > 0.3
    assert present["nonlinear"] > 0.99
    # What a network remembers of places is no selectivity.
    assert all(present[f"{kind} selectivity"] > 0.2 for kind in KINDS)
    assert present["compression"] > 3
    for block in (absent, erased):
        assert block["low"] < 0.5 < block["high"]
        assert abs(block["selectivity"]) < 0.15
        assert abs(block["nonlinear"] - 0.5) < 0.15
        assert abs(block["nonlinear selectivity"]) < 0.25
        assert block["compression"] < 1.05
    assert abs(product["estimate"] - 0.5) < 0.15
    assert abs(product["logistic"] - 0.5) < 0.15
    assert product["nonlinear"] > 0.95
    assert product["nonlinear selectivity"] > 0.2 > abs(product["logistic selectivity"])
    assert (probed["shuffled"] < 0.65).all()


def test_baselines_see_no_activation(table: pd.DataFrame) -> None:
    blind: Any = table[table["reader"] != PROBE].set_index("reader")
    assert set(blind.index) == {PLACE, SITUATION, LATENTS, TIMESTEP}
    assert blind["block"].isna().all()
    assert (blind["sigma"] == 1).all()
    assert blind.loc[TIMESTEP, "estimate"] == 0.5
    assert abs(blind.loc[LATENTS, "estimate"] - 0.5) < 0.15
    # Dead ends lie on no route: who knows the open sides and distances guesses much of it.
    assert blind.loc[SITUATION, "estimate"] > blind.loc[PLACE, "estimate"] + 0.1
    assert blind.loc[PLACE, "control"] == 1


def test_every_target_is_read_at_every_cell(tmp_path: Path) -> None:
    few = mazes()[:12]
    made = planted_store(tmp_path, few, lambda *cell: noise(*cell), blocks=2, steps=2)
    table = read_map(made, few, progress=False)
    names = [target.name for target in targets("maze")]
    assert [len(table[table["reader"] == reader]) for reader in (PROBE, PLACE, LATENTS)] == [4 * 7, 2 * 7, 2 * 7]
    assert list(dict.fromkeys(table["target"])) == names
    assert set(table["content"]) == {"perceptual", "reasoning", "consolidation"}
    assert dict(zip(table["step"], table["sigma"], strict=True)) == {0: 1.0, 1: 0.6}
    assert table.loc[table["target"] != "next move", ["estimate", "control", "shuffled", "selectivity"]].notna().all().all()


def test_what_a_trained_model_drew_can_be_asked_of_another(store: dl.Store, tmp_path: Path) -> None:
    """The labels are those that are handed over, not those of the runs that are read."""
    few = mazes()[:12]
    drawn = [Drawn(sample.boards[0], None) for sample in few]
    painted = next(target for target in targets("maze") if target.name == "painted")
    assert (painted.labels(few[0], drawn[0]) == 0).all()
    with pytest.raises(dl.InputError, match="'painted' of maze has only the label 0 in all 6 training samples, as"):
        read_map(store, few, [painted], drawn=drawn, progress=False)
    table = read_map(store, few, drawn=drawn, baselines=False, progress=False)
    assert set(table["reader"]) == {PROBE}
    assert table.loc[table["target"] == "painted", "estimate"].isna().all()


def test_workers_change_nothing(store: dl.Store, table: pd.DataFrame) -> None:
    closer = Closer(("route",), (0,), samples=32)
    pd.testing.assert_frame_equal(read_map(store, mazes(), [ROUTE], closer=closer, workers=2, progress=False), table)


def turned(sample: Any, index: int) -> Any:
    """The same maze, a quarter of a turn on, as another sample."""
    maze = sample.puzzle
    # The outer wall of a maze of seven rooms lies one square off the middle; what lies outside is not part of it.
    inside = slice(maze.origin, maze.origin + 2 * maze.rooms + 1)
    last = 2 * maze.rooms
    opened = maze.open.copy()
    opened[inside, inside] = np.rot90(maze.open[inside, inside])

    def place(square: tuple[int, int]) -> tuple[int, int]:
        row, column = square[0] - maze.origin, square[1] - maze.origin
        return last - column + maze.origin, row + maze.origin

    other = Maze(maze.rooms, opened, place(maze.start), place(maze.goal))
    return replace(sample, index=index, puzzle=other, answers=sample.task.solve(other))


def reworded(sample: Any, index: int) -> Any:
    """The same maze with another prompt."""
    prompt = next(prompt for prompt in sample.task.prompts() if prompt != sample.prompt)
    return replace(sample, index=index, prompt=prompt)


@pytest.mark.parametrize("other", [turned, reworded], ids=["turned", "reworded"])
def test_a_planted_leak_is_refused(other: Any, tmp_path: Path) -> None:
    """A copy whose group has another name would be in training when its original is tested on."""
    few = mazes()[:12]
    copy = other(few[3], 100)
    assert copy.group == few[3].group
    made = planted_store(tmp_path, [*few, copy], lambda *cell: noise(*cell), blocks=1)
    named = [sample.group for sample in few]
    honest = read_map(made, [*few, copy], [ROUTE], progress=False)
    assert honest.loc[0, "clusters"] == 6
    with pytest.raises(
        dl.InputError, match=r"samples 3 and 100 of maze are one puzzle up to symmetry.*: split by `Sample.group`"
    ):
        read_map(made, [*few, copy], [ROUTE], groups=[*named, "mine"], progress=False)
    # The sample itself may lie about its group.
    vars(copy)["group"] = "another"
    with pytest.raises(dl.InputError, match="samples 3 and 100 of maze are one puzzle"):
        read_map(made, [*few, copy], [ROUTE], progress=False)
    # What is carried over to other cells, and what is erased or added, splits by the same labels of tokens.
    with pytest.raises(dl.InputError, match="samples 3 and 100 of maze are one puzzle"):
        tokens_of(dl.at(), dl.Layout(1, 8, 8), [*few, copy], ROUTE)


def test_frames_of_one_clip_are_never_divided() -> None:
    """Rows of two frames of each clip, of which the second ones are to be tested on."""
    rows = [sample for sample in mazes()[:4] for _ in range(2)]
    with pytest.raises(dl.InputError, match=r"samples 0 and 0 of maze are one puzzle .* different parts, False and True"):
        check_split(rows, np.array([False, True] * 4))
    check_split(rows, np.repeat([False, True, True, False], 2))
    check_split(rows, [sample.group for sample in rows])


def test_coarser_groups_are_taken(store: dl.Store) -> None:
    """Names that join puzzles are fine, and are what is counted."""
    coarse = [sample.group[0] for sample in mazes()]
    table = read_map(store, mazes(), [ROUTE], groups=coarse, baselines=False, progress=False)
    assert (table["clusters"] == -(-len(set(coarse)) // 2)).all()
    assert len(set(coarse)) < len({sample.group for sample in mazes()})


def test_bad_labels_are_named(store: dl.Store) -> None:
    wide = label("wide", lambda sample: np.zeros((16, 16)) if sample.index == 5 else np.zeros((8, 8)))
    endless = label("endless", lambda sample: np.full((8, 8), np.inf))
    nothing = label("nothing", lambda sample: np.full((8, 8), np.nan))
    same = label("same", lambda sample: np.ones((8, 8)))
    late = label("late", lambda sample: np.full((8, 8), np.nan if sample.index else 1.0))
    for target, said in (
        (wide, r"'wide' gives sample 5 of maze labels of shape \(16, 16\), and the tokens are 8 x 8: write one label for each"),
        (endless, "'endless' gives sample 0 of maze infinite labels: write nan where a token is not asked"),
        (nothing, "'nothing' of maze is nan for every token of all 32 samples, as 0: label some"),
        (same, r"'same' of maze has only the label 1 in all 16 training samples, as \d+: add samples that differ, or leave"),
        (late, r"'late' of maze has (no label|only the label 1) in all 16 training samples"),
    ):
        with pytest.raises(dl.InputError, match=said):
            read_map(store, mazes(), [ROUTE, target], progress=False)


def test_too_few_groups_are_said(store: dl.Store) -> None:
    half = label("half", lambda sample: np.indices((8, 8))[0] > 3)
    with pytest.raises(dl.InputError, match="takes 4 folds of whole groups, and 3 groups are for training: observe more samples"):
        read_map(store, mazes()[:6], [half], progress=False)


def test_a_store_that_does_not_fit_is_said(store: dl.Store, tmp_path: Path) -> None:
    more = reasoner.task("maze").sample("test", 99)
    with pytest.raises(dl.InputError, match="the store lacks 1 of 33 samples of maze, as 99"):
        read_map(store, [*mazes(), more], progress=False)
    with pytest.raises(dl.InputError, match="samples of one task, and these are of"):
        read_map(store, [mazes()[0], reasoner.task("circle").sample("test", 0)], progress=False)
    with pytest.raises(dl.InputError, match="the store lacks 2 of 2 samples of maze, as 0: observe them"):
        read_map(dl.Store(tmp_path / "empty"), mazes()[:2], progress=False)
    other = planted_store(tmp_path / "wide", mazes()[:10], lambda *cell: noise(*cell)[:, :4], blocks=1)
    with pytest.raises(dl.InputError, match=r"whole frames of 8 x 8 tokens, and the store holds \(1, 4, 8, 8\)"):
        read_map(other, mazes()[:10], progress=False)
    planted_store(tmp_path / "uneven", mazes()[:10], lambda *cell: noise(*cell), blocks=1)
    uneven = planted_store(tmp_path / "uneven", mazes()[4:6], lambda *cell: noise(*cell), blocks=1)
    with pytest.raises(dl.InputError, match="block 0 at step 0 is stored 2 times of sample 4: observe all samples once"):
        read_map(uneven, mazes()[:10], progress=False)


def test_activations_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    few = mazes()[:10]
    planted_store(tmp_path, few, stream, blocks=2, model="first")
    both = planted_store(tmp_path, few, lambda *cell: noise(*cell), blocks=2, model="second")
    with pytest.raises(dl.InputError, match="maze of 2 models, as sample 0 of first and sample 0 of second: write model="):
        read_map(both, few, [ROUTE], progress=False)
    found = {
        model: read_map(both, few, [ROUTE], model=model, baselines=False, progress=False).set_index("block")["estimate"]
        for model in ("first", "second")
    }
    assert found["first"][1] > 0.99
    assert found["second"][1] < 0.8
