"""Attribution: the estimate is the derivative of a patch, exact where all is linear, and its agreement is counted right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BLOCKS, tiny_pipeline
from diffusers import WanPipeline
from samples import LATENTS, VELOCITY, X0_HAT, counting, projected, some_pairs
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.attribution import _agreement
from dit_lens.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SITES = ["resid", "update", "attn", "cross_attn", "mlp", "heads", "q", "k", "v"]


@dataclass(frozen=True, eq=False)
class Towards(dl.Patch):
    """Go a small share of the way to the donor's activation."""

    share: float = 0.0

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        return activation + self.share * (super().apply(activation.clone(), moment) - activation)


def attributed(
    lens: dl.Lens, over: dl.Selector, outcome: dl.Outcome = VELOCITY, count: int = 2, **options: Any
) -> dl.Attribution:
    return dl.attribute(lens, some_pairs(lens.pipe, count), over, outcome, progress=False, **options)


def by_cell(table: pd.DataFrame, axes: tuple[str, ...]) -> pd.DataFrame:
    return table.set_index([*axes, "sample", "seed"]).sort_index()


@pytest.mark.parametrize("experts", [1, 2])
def test_the_estimate_is_the_derivative_of_the_patch(experts: int) -> None:
    pipe = tiny_pipeline(WanPipeline, experts)
    lens, share = dl.wrap(pipe, "hooks"), 0.2
    over = dl.at(block=[0, 2], step=2, branch="cond", site=SITES)
    outcome = X0_HAT if experts == 1 else VELOCITY
    found = attributed(lens, over, outcome, check=2, seeds=[3, 4])
    swept = dl.sweep(
        lens, some_pairs(pipe), lambda cell, runs: Towards(cell, runs.donor, share), over, outcome, seeds=[3, 4],
        controls={"back": lambda cell, runs: Towards(cell, runs.donor, -share)}, progress=False,
    ).table  # fmt: skip
    up, down = (by_cell(swept[swept["edit"] == name], found.axes)["value"] for name in ("edit", "back"))
    slope = (up - down) / (2 * share)
    estimate = by_cell(found.table, found.axes)["estimate"]
    scale = slope.abs().groupby("site").transform("max")
    assert (scale > 1e-3).all()
    # Rounding of the outcome in float32, divided by the step, is about 1e-5.
    assert ((estimate - slope).abs() <= 0.01 * scale + 3e-5).all(), pd.concat([estimate, slope], axis=1)


def test_the_estimate_is_exact_where_all_that_follows_is_linear(image_pipe: Any, engine: str) -> None:
    image_pipe.transformer.norm_out = nn.Identity()
    over = dl.at(block=[1, 2], step=1, branch="cond", site=["resid", "update", "mlp"])
    found = attributed(dl.wrap(image_pipe, engine), over, check=6)
    last = found.table[found.table["block"] == BLOCKS - 1]
    assert len(last) == 6
    np.testing.assert_allclose(last["estimate"], last["patched"], rtol=1e-3, atol=1e-4 * last["patched"].abs().max())
    resid = last[last["site"] == "resid"]
    np.testing.assert_allclose(resid["effect"], resid["patched"] / (resid["donor"] - resid["clean"]), rtol=1e-3)


def test_both_engines_estimate_the_same_at_every_site(image_pipe: Any) -> None:
    over = dl.at(block=[0, 2], step=1, branch="cond", site=SITES)
    one, other = (attributed(dl.wrap(image_pipe, engine), over, X0_HAT, check=2).table for engine in ("nnsight", "hooks"))
    pd.testing.assert_frame_equal(one, other, rtol=1e-5)


def test_parts_of_a_site_add_up_to_it(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    call = {"step": 1, "branch": "cond"}
    whole = attributed(lens, dl.at(block=[1, 2], site="heads", **call), check=2).table
    heads = attributed(lens, dl.at(block=[1, 2], site="heads", head="all", **call), check=2).table
    frames = attributed(lens, dl.at(block=[1, 2], site="heads", frames=[0, 1], **call), check=2).table
    masks = [torch.tensor([[True, False], [False, False]]), torch.tensor([[False, True], [True, True]])]
    tokens = pd.concat([attributed(lens, dl.at(block=[1, 2], site="heads", tokens=one, **call), check=2).table for one in masks])
    keys = ["block", "sample"]
    expected = whole.set_index(keys)["estimate"].sort_index()
    for parts in (heads, frames, tokens):
        pd.testing.assert_series_equal(parts.groupby(keys)["estimate"].sum(), expected, rtol=1e-3, atol=1e-5)
    assert set(heads["head"]) == {0, 1}
    assert set(frames["frames"]) == {0, 1}


def test_calls_and_labels_and_what_was_patched(text_pipe: Any) -> None:
    over = dl.at(block="all", step="all", branch=["cond", "uncond"], site="update")
    lens = dl.wrap(text_pipe, "hooks")
    found = attributed(lens, over, count=3, check=5, batch=2, seeds=[1, 2])
    cells = 4 * 2 * BLOCKS
    assert len(found.table) == cells * 3 * 2
    assert not found.table.duplicated([*found.axes, "sample", "seed"]).any()
    assert (found.calls, found.calls_patching) == (3 * 8, cells)
    patched = found.table.dropna(subset=["patched"])
    assert len(patched) == 5 * 3 * 2
    assert patched.groupby(["step", "branch", "block"]).ngroups == 5
    forecast = lens.forecast(**some_pairs(text_pipe)[0].clean.inputs)
    labels = found.table[["step", "expert", "sigma", "timestep"]].drop_duplicates()
    expected = zip(range(4), forecast.experts, forecast.sigmas, forecast.timesteps, strict=True)
    assert list(labels.itertuples(index=False, name=None)) == list(expected)
    assert found.sign.clusters == found.spearman.clusters == 3
    assert "attribution of 24 cells in 24 calls" in str(found)
    summary = found.summary("estimate")
    assert len(summary) == cells
    assert set(summary["clusters"]) == {3}
    by_step = found.agreement("step")
    assert by_step["cells"].sum() == len(patched)
    assert by_step["step"].tolist() == sorted(patched["step"].unique())
    with pytest.raises(InputError, match=r"no axis 'head'; write one of .*step"):
        found.agreement("head")
    assert {"expert", "sigma", "depth"} <= set(summary)


def test_estimates_take_three_passes_of_a_call_whatever_the_number_of_cells(image_pipe: Any) -> None:
    over = dl.at(block="all", step=1, branch="cond", site=SITES)
    with counting(image_pipe) as ran:
        found = attributed(dl.wrap(image_pipe, "hooks"), over, check=2)
    patches = (BLOCKS - 0) + (BLOCKS - 2)  # of the first cell and the last, each from its own block on
    assert ran() == (2 * 24 + 2 * BLOCKS) + (2 * 24 + BLOCKS + BLOCKS) + patches
    assert (found.calls, found.calls_patching) == (3, len(SITES) * BLOCKS)


def test_nothing_of_a_graph_stays_in_the_model(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine)
    before = lens.hash
    attributed(lens, dl.at(block=[1, 2], step=1, branch="cond"), check=2)
    assert all(one.grad is None and one.requires_grad for one in image_pipe.transformer.parameters())
    assert dl.wrap(image_pipe).hash == before


def test_agreement_of_a_case_worked_out_by_hand() -> None:
    cases = {  # (sample, seed): estimates and patches of four cells
        (0, 0): ([1, 2, 3, 4], [10, 20, 30, 40]),  # rho 1, all signs equal
        (0, 1): ([1, 2, 3, 4], [40, 30, 20, 10]),  # rho -1, all signs equal
        (1, 0): ([-1, 2, 3, 4], [2, 1, 4, 3]),  # rho 1 - 6 * 4 / (4 * 15) = 0.6; three signs of four
        (2, 0): ([5, 5, 5, 5], [1, 2, -3, -4]),  # nothing to rank; two signs of four
    }
    rows = [
        {"sample": sample, "seed": seed, "estimate": float(one), "patched": float(two)}
        for (sample, seed), (estimates, patches) in cases.items()
        for one, two in zip(estimates, patches, strict=True)
    ]
    spearman, sign, top = _agreement(pd.DataFrame(rows))
    assert spearman.estimate == pytest.approx((1 - 1 + 0.6) / 3)
    assert (spearman.clusters, spearman.measurements) == (2, 3)
    assert (spearman.low, spearman.high) == pytest.approx((0.0, 0.6))
    assert sign.estimate == pytest.approx(13 / 16)
    assert (sign.clusters, sign.measurements) == (3, 16)
    assert top.estimate == pytest.approx(1 / 4)  # one of four cells is the largest tenth: found in the first case only
    assert (top.clusters, top.measurements) == (3, 4)
    nothing, _, _ = _agreement(pd.DataFrame(rows[-4:]))
    assert nothing.clusters == 0
    assert np.isnan(nothing.estimate)


@pytest.mark.parametrize("kind", ["text", "copy", "mlp", "distractor"])
def test_the_planted_block_is_named(kind: Any, engine: str) -> None:
    model = dl.planted(kind, seed=1, blocks=4, steps=4)
    answer = dl.Outcome("answer", lambda shown, pairs: model.answer(shown, of="velocity"), of="velocity")
    over = dl.at(block="all", step=1, branch="cond", site="update")
    found = dl.attribute(model.lens(engine), model.pairs(3), over, answer, check=4, progress=False)
    rows: Any = found.summary().itertuples()
    for row in rows:
        assert row.mean == pytest.approx(float(row.block == model.truth.block), abs=0.15), row
    for row in found.table.dropna().itertuples():
        assert row.estimate == pytest.approx(row.patched, abs=0.15), row


def test_a_saturated_plant_is_not_seen_and_the_agreement_says_so() -> None:
    model = dl.planted("redundant", seed=1, blocks=4, steps=4)
    answer = dl.Outcome("answer", lambda shown, pairs: model.answer(shown, of="velocity"), of="velocity")
    over = dl.at(block="all", step=1, branch="cond", site="update")
    found = dl.attribute(model.lens("hooks"), model.pairs(3), over, answer, check=4, progress=False)
    planted = found.table[found.table["block"].isin([model.truth.block, model.truth.second])]
    assert planted["effect"].abs().max() < 0.15
    assert ((planted["patched"] / (planted["donor"] - planted["clean"]) - 0.5).abs() < 0.15).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcome": LATENTS}, "attribution needs one of='velocity' or of='x0_hat'"),
        ({"outcome": dl.Outcome("seen", projected, of="x0_hat", decoded=True)}, "not decoded"),
        (
            {"outcome": dl.Outcome("array", lambda shown, p: projected(shown.detach(), p).numpy(), of="velocity")},
            "with a gradient",
        ),
        ({"outcome": dl.Outcome("cut", lambda shown, p: projected(shown.detach(), p), of="velocity")}, "with a gradient"),
        ({"outcome": dl.Outcome("one", lambda shown, p: shown.sum(), of="velocity")}, "return one number per row"),
        ({"over": dl.at(block=[0, 1], step=1)}, "name step= and branch="),
        ({"over": dl.at(block=1, step=1, branch="cond")}, "check=32 of 1 cells"),
        ({"over": dl.at(step=[0, 1], branch="cond")}, "patches several blocks together"),
        ({"check": 1}, "check=1 of 2 cells"),
        ({"pairs": []}, "there are 0 and 1"),
        ({"seeds": []}, "there are 2 and 0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_what_cannot_be_attributed_is_an_error(image_pipe: Any, changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"over": dl.at(block=[0, 1], step=1, branch="cond"), "outcome": VELOCITY}
    asked |= {"pairs": some_pairs(image_pipe), "progress": False, **changes}
    with pytest.raises(dl.InputError, match=message):
        dl.attribute(dl.wrap(image_pipe, "hooks"), **asked)
