"""Selecting cells: what each form of a value selects, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_lens.architectures import Layout
from dit_lens.errors import InputError
from dit_lens.schedule import Forecast
from dit_lens.selection import Cell, Extent, Selector, at

SIGMAS = (1.0, 0.9, 0.6, 0.3)
EXTENT = Extent(
    blocks={"transformer": 4, "transformer_2": 4},
    forecast=Forecast(
        timesteps=tuple(1000 * sigma for sigma in SIGMAS),
        sigmas=SIGMAS,
        experts=("transformer", "transformer", "transformer_2", "transformer_2"),
        branches=("cond", "uncond"),
    ),
    branches=("cond", "uncond"),
    streams=("visual",),
)


def values(axis: str, **selection: Any) -> list[Any]:
    """The values of one axis over the selected cells."""
    return sorted({getattr(cell, axis) for cell in at(**selection).cells(EXTENT)})


def test_an_axis_that_is_not_named_is_all_of_it() -> None:
    cells = at().cells(EXTENT)
    assert len(cells) == 4 * 4 * 2
    assert cells[0] == Cell("transformer", 0, "cond", 0, "resid", "visual")
    assert (cells[0].sigma, cells[0].timestep, cells[0].depth) == (1.0, 1000.0, 0.0)
    assert cells == sorted(cells, key=lambda cell: (cell.step, cell.branch, cell.block))
    assert at(block="all", step="all", branch="all", site="resid").cells(EXTENT) == cells
    assert {cell.site for cell in at(site="all").cells(EXTENT)} == {"resid", "update"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, [2]),
        (-1, [3]),
        ([0, 2, -1], [0, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (range(2), [0, 1]),
        (np.int64(1), [1]),
        (np.array([1, 3]), [1, 3]),
    ],
)
def test_blocks_and_steps(value: Any, expected: list[int]) -> None:
    assert values("block", block=value) == expected
    assert values("step", step=value) == expected


def test_continuous_axes_take_ranges_numbers_and_lists() -> None:
    assert values("block", depth=(0.25, 0.75)) == [1, 2]
    assert values("block", depth=0.5) == [2]
    assert values("sigma", sigma=(0.3, 0.9)) == [0.3, 0.6]
    assert values("step", sigma=[1, 0.6]) == [0, 2]
    assert values("block", depth=(0.0, 0.6), block=[1, 3]) == [1]


def test_names() -> None:
    assert values("branch", branch="uncond") == ["uncond"]
    assert values("step", expert="transformer_2") == [2, 3]
    assert values("site", site=["update"]) == ["update"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"block": 4}, r"at\(block=4\): block 4 is out of range: there are 4 blocks, write 0 to 3"),
        ({"step": [0, 7, -5]}, r"step 7, -5 is out of range: there are 4 steps, write 0 to 3"),
        ({"block": (0, 2)}, r"block=\(0, 2\) is no int, list, slice or 'all'"),
        ({"block": [0.5]}, r"block=\[0.5\] is no int"),
        ({"block": "first"}, r"block='first' is no int"),
        ({"step": slice(4, 9)}, r"selects none of the 4 steps"),
        ({"block": []}, r"selects none of the 4 blocks"),
        ({"branch": "conditional"}, r"there is no branch 'conditional'; write one of cond, uncond"),
        ({"branch": 0}, r"branch=0 is no name, list of names or 'all'; there is cond, uncond"),
        ({"site": "heads"}, r"there is no site 'heads'; write one of resid, update"),
        ({"stream": "text"}, r"there is no stream 'text'; write one of visual"),
        ({"expert": "transformer_3"}, r"write one of transformer, transformer_2"),
        ({"head": 1}, r"head= belongs to no site of this model"),
        ({"sigma": (1.5, 2.0)}, r"sigma=\(1.5, 2.0\) matches nothing; there is 1, 0.9, 0.6, 0.3"),
        ({"depth": 0.3}, r"depth=0.3 matches nothing; there is 0, 0.25, 0.5, 0.75"),
        ({"depth": "deep"}, r"depth='deep' is no number, list, \(low, high\) or 'all'"),
        ({"step": 0, "expert": "transformer_2"}, r"selects nothing: .* transformer at 0 to 1, transformer_2 at 2 to 3"),
        ({"block": 0, "depth": 0.5}, r"at\(block=0, depth=0.5\) selects nothing"),
    ],
)
def test_what_does_not_exist_is_an_error_that_says_what_does(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Selector(**selection).cells(EXTENT)
    assert "\n" not in str(error.value)


def test_a_branch_that_does_not_run_selects_nothing() -> None:
    forecast = Forecast((1000.0,), (1.0,), ("transformer",), ("cond",))
    with pytest.raises(InputError, match=r"at\(branch='uncond'\) selects nothing: this run has the branches cond"):
        at(branch="uncond").cells(Extent({"transformer": 4}, forecast, ("cond", "uncond"), ("visual",)))


def test_frames_and_tokens_take_from_the_layout() -> None:
    visual = torch.arange(2 * 3 * 2 * 2 * 5).view(2, 3, 2, 2, 5)
    board = torch.tensor([[True, False], [False, True]])
    assert torch.equal(at(frames=1).take_tokens(visual), visual[:, 1:2])
    assert torch.equal(at(frames=slice(-2, None)).take_tokens(visual), visual[:, 1:])
    places = at(tokens=board).take_tokens(visual)
    assert torch.equal(places, visual[:, :, board].flatten(1, 2))
    assert torch.equal(at(frames=[2], tokens=board).take_tokens(visual), visual[:, 2, board])
    volume = torch.zeros(3, 2, 2, dtype=torch.bool)
    volume[1, 0, 1] = volume[2, 1, 1] = True
    assert torch.equal(at(tokens=volume.numpy()).take_tokens(visual), visual[:, volume])
    assert torch.equal(at(frames=[1], tokens=volume).take_tokens(visual), visual[:, 1, 0, 1][:, None])


def test_frames_and_tokens_must_fit_the_layout() -> None:
    layout = Layout(3, 2, 2)
    at(frames=2, tokens=torch.ones(2, 2, dtype=torch.bool)).check_tokens(layout)
    with pytest.raises(InputError, match="frames 3 is out of range: there are 3 latent frames, write 0 to 2"):
        at(frames=3).check_tokens(layout)
    with pytest.raises(InputError, match=r"token mask has shape \(4, 4\).* is \(3, 2, 2\); write a mask of shape"):
        at(tokens=np.ones((4, 4), dtype=bool)).check_tokens(layout)
    with pytest.raises(InputError, match="selects no token"):
        at(tokens=np.zeros((2, 2), dtype=bool)).check_tokens(layout)
    with pytest.raises(InputError, match=r"mask of booleans on the layout, and this one holds torch.int64"):
        at(tokens=[[0, 1], [2, 3]])
