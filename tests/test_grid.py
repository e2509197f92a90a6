"""Grids: named axes are enumerated, what is not named stays together, and every label is that of its cells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import dit_lens as dl
from dit_lens.grid import Grid, call_places
from dit_lens.schedule import Forecast
from dit_lens.selection import Extent
from dit_lens.sites import BLOCK_SITES, attention_sites

FORECAST = Forecast((1000.0, 900.0, 500.0), (1.0, 0.9, 0.5), ("transformer", "transformer", "transformer_2"), ("cond", "uncond"))
SITES = (*attention_sites("attn1", "to_out"), *BLOCK_SITES)
EXTENT = Extent({"transformer": 4, "transformer_2": 2}, FORECAST, ("cond", "uncond"), ("visual",), SITES, heads=3)
SAME = Extent({"transformer": 4, "transformer_2": 4}, FORECAST, ("cond", "uncond"), ("visual",), SITES, heads=3)


def labels(over: dl.Selector, *axes: str) -> list[tuple[Any, ...]]:
    return [tuple(point.labels[axis] for axis in axes) for point in Grid(over, EXTENT).points]


def test_named_axes_are_enumerated_in_the_order_of_a_run() -> None:
    over = dl.at(block=[1, 0], step=[0, 2], branch="cond")
    assert Grid(over, EXTENT).axes == ("step", "branch", "block", "site", "stream")
    assert labels(over, "step", "branch", "block") == [(s, "cond", b) for s in (0, 2) for b in (0, 1)]
    assert labels(over, "expert", "sigma", "timestep", "depth") == [
        ("transformer", 1.0, 1000.0, 0.0),
        ("transformer", 1.0, 1000.0, 0.25),
        ("transformer_2", 0.5, 500.0, 0.0),
        ("transformer_2", 0.5, 500.0, 0.5),
    ]
    assert all(len(point.cells) == 1 for point in Grid(over, EXTENT).points)


def test_what_is_not_named_is_edited_together() -> None:
    (point,) = Grid(dl.at(), EXTENT).points
    assert len(point.cells) == 2 * (4 + 4 + 2)
    assert set(point.labels) == {"site", "stream"}, "and nothing is said of what differs"
    (by_block, _) = Grid(dl.at(block=[0, 1]), EXTENT).points
    assert {(cell.step, cell.branch) for cell in by_block.cells} == {(s, b) for s in range(3) for b in ("cond", "uncond")}
    assert "sigma" not in by_block.labels
    assert by_block.selector.cells(EXTENT) == list(by_block.cells)
    assert len(Grid(dl.at(step="all"), EXTENT).points) == 3
    assert len(Grid(dl.at(branch="all", expert="all"), EXTENT).points) == 4


def test_a_depth_is_said_only_where_all_blocks_of_a_point_have_it() -> None:
    over = dl.at(block=[0, 1])
    assert [point.labels["depth"] for point in Grid(over, SAME).points] == [0.0, 0.25]
    first, second = (point.labels["depth"] for point in Grid(over, EXTENT).points)
    assert first == 0.0
    assert math.isnan(second), "block 1 of 4 and block 1 of 2"


def test_ranges_of_depth_and_sigma_name_blocks_and_steps() -> None:
    over = dl.at(depth=(0.5, 1.0), sigma=(0.8, 1.01))
    assert Grid(over, EXTENT).axes == ("step", "block", "site", "stream")
    assert labels(over, "step", "sigma", "block", "depth") == [
        (s, sigma, b, b / 4) for s, sigma in ((0, 1.0), (1, 0.9)) for b in (2, 3)
    ]
    selector = Grid(over, EXTENT).points[0].selector
    assert (selector.step, selector.block, selector.sigma, selector.depth) == (0, 2, None, None)


def test_heads_frames_and_sites_are_enumerated() -> None:
    heads = dl.at(block=1, step=0, branch="cond", site=["q", "heads"], head=[2, -3])
    assert labels(heads, "site", "head") == [(site, head) for site in ("q", "heads") for head in (0, 2)]
    assert len(labels(dl.at(block=1, site="v", head="all"), "head")) == 3
    frames = dl.at(block=1, step=0, branch="cond", frames=[1, 0, 1])
    assert labels(frames, "frames") == [(1,), (0,)]
    for given in (2, np.int64(2), np.array([2]), range(2, 3), {2}):
        (point,) = Grid(dl.at(block=1, step=0, frames=given), EXTENT).points
        assert point.labels["frames"] == point.selector.frames == 2
    with pytest.raises(dl.InputError, match=r"frames=\[0, 1, 2\]"):
        Grid(dl.at(frames="all"), EXTENT)


def test_the_tokens_of_the_selector_stay() -> None:
    mask = np.eye(2, dtype=bool)
    points = Grid(dl.at(block="all", step=0, tokens=mask), EXTENT).points
    assert all(point.selector.tokens is not None and point.selector.tokens.sum() == 2 for point in points)


def test_points_are_grouped_by_the_calls_that_they_touch() -> None:
    grid = Grid(dl.at(block=[0, 1], step=[0, 1]), EXTENT)
    groups = grid.groups()
    assert list(groups) == [((0, "cond"), (0, "uncond")), ((1, "cond"), (1, "uncond"))]
    assert [len(points) for points in groups.values()] == [2, 2]
    assert call_places(grid.points[0].cells) == grid.points[0].calls == ((0, "cond"), (0, "uncond"))
    with pytest.raises(dl.InputError, match=r"is in 2 calls of the denoiser.*name step= and branch="):
        grid.check_single()
    Grid(dl.at(step=[0, 1], branch="cond"), EXTENT).check_single()


def test_a_point_starts_at_its_first_block_in_each_call_of_its_first_step() -> None:
    (point,) = Grid(dl.at(depth=None, step=1, block=None), EXTENT).points
    assert point.starts == {(1, "cond"): 0, (1, "uncond"): 0}
    early, late = Grid(dl.at(block=[2, 3], expert="transformer", branch="cond"), EXTENT).points
    assert (early.starts, late.starts) == ({(0, "cond"): 2}, {(0, "cond"): 3})


def test_a_grid_can_be_thinned() -> None:
    grid = Grid(dl.at(block="all", step=0), EXTENT)
    thin = grid.only([0, 3])
    assert [point.labels["block"] for point in thin.points] == [0, 3]
    assert thin.axes == grid.axes
    assert len(grid.points) == 4


def test_a_selection_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(dl.InputError, match="out of range"):
        Grid(dl.at(block=3), EXTENT)
    with pytest.raises(dl.InputError, match="head= belongs to"):
        Grid(dl.at(head=1), EXTENT)
