"""Sweeps: what is reused changes no bit, what is counted is what ran, and every number has the right labels."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BLOCKS, shown, tiny_pipeline
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from matplotlib.backends.backend_agg import FigureCanvasAgg
from samples import LATENTS, VELOCITY, VIDEO, X0_HAT, counting, projected, some_pairs
from torch import Tensor

import dit_lens as dl

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@dataclass(frozen=True)
class Double(dl.Edit):
    """A user's own edit."""

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        return 2 * activation


def patch(cell: dl.Selector, runs: dl.PairRuns) -> dl.Edit:
    return dl.Patch(cell, runs.donor)


def other(cell: dl.Selector, runs: dl.PairRuns) -> dl.Edit:
    return dl.Patch(cell, runs.other)


EDITS: dict[str, Any] = {
    "other": other,
    "zero": lambda cell, runs: dl.Zero(replace(cell, site="heads", head=1)),
    "skip": lambda cell, runs: dl.Skip(cell),
    "knockout": lambda cell, runs: dl.KnockoutAttention.causal_frames(replace(cell, site="attn")),
    "latents": lambda cell, runs: dl.ReplaceLatents(cell.step, runs.donor),
    "own, at the last step too": lambda cell, runs: [Double(cell), dl.Zero(dl.at(block=1, site="mlp", step=3))],
    "two": lambda cell, runs: [dl.ReplaceLatents(2, noise=3), Double(cell)],
}
QUICK = {name: EDITS[name] for name in ("skip", "knockout", "latents")}

PIPES: dict[str, Any] = {
    "one expert": lambda: tiny_pipeline(),
    "two experts": lambda: tiny_pipeline(WanPipeline, 2),
    "UniPC": lambda: tiny_pipeline(
        WanImageToVideoPipeline,
        2,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
}


def swept(lens: dl.Lens, outcomes: Any, over: dl.Selector, edit: Any = patch, count: int = 2, **options: Any) -> dl.Sweep:
    return dl.sweep(lens, some_pairs(lens.pipe, count), edit, over, outcomes, progress=False, **options)


def assert_equal(one: dl.Sweep, other: dl.Sweep) -> None:
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)


@pytest.mark.parametrize("kind", PIPES)
def test_what_is_reused_changes_no_bit_of_final_latents(kind: str, engine: str) -> None:
    lens = dl.wrap(PIPES[kind](), engine)
    both, one = dl.at(block=2, step=2), dl.at(block=2, step=2, branch="uncond")
    for over, outcomes in [(both, LATENTS), (one, [LATENTS, VELOCITY])] if engine == "hooks" else [(both, LATENTS)]:
        options = {"controls": EDITS if engine == "hooks" and over is both else QUICK, "seeds": [3]}
        tables = [swept(lens, outcomes, over, reuse=reuse, **options) for reuse in (True, False)]
        assert_equal(*tables)
        changed = tables[0].table.query("outcome == 'latents'").groupby("edit")["effect"]
        assert (changed.apply(lambda found: found.abs().max()) > 1e-4).all(), "every edit does something"


@pytest.mark.parametrize("kind", PIPES)
def test_what_is_reused_changes_no_bit_of_the_same_step(kind: str, engine: str) -> None:
    lens = dl.wrap(PIPES[kind](), engine)
    hooks = engine == "hooks"
    over = dl.at(
        block=[0, 2] if kind == "one expert" and hooks else 2,
        step=[0, 2] if kind == "two experts" else 2,
        branch="cond",
        site=["update", "q"],
    )
    edits: dict[str, Any] = {
        "zero": lambda cell, runs: dl.Zero(cell),
        "latents": lambda cell, runs: dl.ReplaceLatents(cell.step, runs.donor),
        "elsewhere": lambda cell, runs: dl.Zero(dl.at(block=0, step=0, site="mlp")),
    }
    assert_equal(*(swept(lens, [VELOCITY, X0_HAT], over, controls=edits, reuse=reuse) for reuse in (True, False)))


def test_the_same_bits_on_both_engines(image_pipe: Any) -> None:
    over = dl.at(block=[0, 2], step=[1, 3], branch="cond", site=["resid", "v"], head=None)
    lenses = [dl.wrap(image_pipe, engine) for engine in ("nnsight", "hooks")]
    assert_equal(*(swept(lens, [VELOCITY, X0_HAT], over) for lens in lenses))


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    ("over", "outcomes"),
    [
        (dl.at(block=[1, 2], step=[0, 3], branch=["cond", "uncond"], site="heads"), [VELOCITY]),
        (dl.at(block=[1, 2], step=[0, 3], branch="cond", site="heads"), [VELOCITY, LATENTS]),
        (dl.at(block=[1, 2], step=[1, 2]), [LATENTS]),
        (dl.at(block=2), [LATENTS]),
    ],
    ids=["both branches", "one branch", "without a branch", "all steps"],
)
def test_what_is_counted_is_what_runs(over: dl.Selector, outcomes: list[dl.Outcome], reuse: bool) -> None:
    pipe = PIPES["two experts"]()
    lens, controls = dl.wrap(pipe, "hooks"), {"double": lambda cell, runs: Double(cell)}
    with counting(pipe) as ran:
        found = swept(lens, outcomes, over, lambda cell, runs: dl.Zero(cell), controls=controls, reuse=reuse)
    cost = found.cost
    assert cost is not None
    assert cost.block_forwards == ran()
    places = {(cell.step, cell.branch) for cell in over.cells(lens.extent(**some_pairs(pipe)[0].clean.inputs))}
    assert reuse or cost.block_forwards == cost.without_reuse + BLOCKS * len(places), "the donors' activations"
    assert (cost.cells, cost.edits, cost.rows) == (len(found.table) // 4 // len(outcomes), 2, 2)
    assert "block forwards" in str(cost)


def test_a_full_grid_takes_half_the_blocks_of_whole_runs_and_same_step_far_fewer() -> None:
    lens = dl.wrap(tiny_pipeline(), "hooks")
    late, early = (swept(lens, one, dl.at(block="all", step="all", branch="cond"), patch).cost for one in (LATENTS, VELOCITY))
    assert late is not None
    assert early is not None
    # 4 steps of 2 branches of 3 blocks; each cell: its block and those after it, then all later steps.
    cells = [(BLOCKS - block) + 2 * BLOCKS * (3 - step) for block in range(BLOCKS) for step in range(4)]
    rest = 2 * 24 + 4 * (BLOCKS + BLOCKS)
    assert late.block_forwards == sum(cells) + rest
    assert late.without_reuse == 24 * 12 + 48
    assert early.block_forwards == 4 * (3 + 2 + 1) + rest
    assert early.without_reuse == 3 * (6 + 12 + 18 + 24) + 48


def test_an_outcome_of_the_same_step_is_that_of_a_whole_edited_run(text_pipe: Any, engine: str) -> None:
    lens, pairs = dl.wrap(text_pipe, engine), some_pairs(text_pipe)
    over = dl.at(block=2, step=2, branch="uncond", site="update", frames=[1])
    decoded = dl.Outcome("decoded", projected, of="x0_hat", decoded=True)
    found = swept(lens, [VELOCITY, X0_HAT, decoded], over, seeds=[5], batch=1)
    groups: Any = found.table.groupby(["sample", "step", "block"])
    for (sample, step, block), rows in groups:
        cell = dl.at(block=block, step=step, branch="uncond", site="update", frames=1)
        donor = lens.run(**pairs[sample].donor.inputs, seed=5, record=replace(cell, frames=None), decode=False)
        clean = lens.run(**pairs[sample].clean.inputs, seed=5, decode=False)
        edited = lens.run(**pairs[sample].clean.inputs, seed=5, edits=dl.Patch(cell, donor), until=step, decode=False)
        for run, column in ((edited, "value"), (clean, "clean"), (donor, "donor")):
            numbers = rows.set_index("outcome")[column]
            x0_hat = run.x0_hat(step, "uncond")
            assert numbers["velocity"] == projected(run.velocity(step, "uncond"), ()).item()
            assert numbers["x0_hat"] == projected(x0_hat, ()).item()
            assert numbers["decoded"] == projected(lens.decode(x0_hat), ()).item()


def test_outcomes_of_the_end_are_those_of_a_whole_edited_run(image_pipe: Any) -> None:
    lens, pairs = dl.wrap(image_pipe, "hooks"), some_pairs(image_pipe)
    seen: list[tuple[int, ...]] = []

    def video(shown: Tensor, pairs: Any) -> np.ndarray:
        seen.append(tuple(shown.shape))
        return projected(shown, pairs).numpy()

    found = swept(lens, [dl.Outcome("video", video), LATENTS], dl.at(block=1, step=2, branch="cond"), batch=1)
    assert set(seen) == {(1, 5, 16, 16, 3)}
    groups: Any = found.table.groupby("sample")
    for sample, rows in groups:
        cell = dl.at(block=1, step=2, branch="cond")
        donor = lens.run(**pairs[sample].donor.inputs, record=cell)
        edited = lens.run(**pairs[sample].clean.inputs, edits=dl.Patch(cell, donor))
        numbers = rows.set_index("outcome")
        assert numbers.loc["video", "value"] == projected(shown(edited), ()).item()
        assert numbers.loc["latents", "value"] == projected(edited.latents[-1], ()).item()
        assert numbers.loc["video", "donor"] == projected(shown(donor), ()).item()


def test_the_other_donor_is_that_of_another_pair(image_pipe: Any) -> None:
    lens, pairs = dl.wrap(image_pipe, "hooks"), some_pairs(image_pipe, 3)
    cell = dl.at(block=1, step=1, branch="cond")
    found = swept(lens, VELOCITY, cell, controls={"other": other}, count=3, seeds=[5, 6], batch=3)
    values = found.table.set_index(["edit", "sample", "seed"])["value"]
    for seed in (5, 6):
        donor = lens.run(**pairs[1].donor.inputs, seed=seed, record=cell, decode=False)
        edited = lens.run(**pairs[0].clean.inputs, seed=seed, edits=dl.Patch(cell, donor), until=1, decode=False)
        expected = projected(edited.velocity(1, "cond"), ()).item()
        assert values["other", 0, seed] == pytest.approx(expected, rel=1e-5)
        assert values["edit", 0, seed] != pytest.approx(expected, rel=1e-3)


def test_a_batch_with_one_pair_has_no_other_donor_and_says_so_first(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    for count, batch in ((1, 4), (3, 2), (3, 1)):
        with counting(image_pipe) as ran, pytest.raises(dl.InputError, match="two pairs in a batch, and here is one"):
            swept(lens, VELOCITY, dl.at(block=1, step=1, branch="cond"), other, count=count, batch=batch)
        assert ran() == 2 * 24 + BLOCKS + BLOCKS, "nothing but the first, smallest batch has run"


def test_batches_of_any_size_give_the_same_table(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    tables = [
        swept(lens, [LATENTS, VELOCITY], dl.at(block=[0, 1], step=2, branch="cond"), count=3, batch=b).table for b in (1, 2)
    ]
    keys = ["block", "sample", "outcome"]
    whole = tables[0].sort_values(keys, ignore_index=True)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table.sort_values(keys, ignore_index=True), whole, rtol=1e-3)


def test_the_table_is_tidy_and_labelled(text_pipe: Any) -> None:
    lens = dl.wrap(text_pipe, "hooks")
    found = swept(
        lens, [VELOCITY, LATENTS], dl.at(depth=(0.3, 1), step="all", branch="cond"), seeds=[7, 8], controls={"other": other}
    )
    table, forecast = found.to_pandas(), lens.forecast(**some_pairs(text_pipe)[0].clean.inputs)
    assert found.axes == ("step", "branch", "block", "site", "stream")
    assert list(table) == [
        *found.axes, *("expert", "sigma", "timestep", "depth", "edit"), *("sample", "seed", "outcome"),
        *("value", "clean", "donor", "effect"),
    ]  # fmt: skip
    assert len(table) == 4 * 2 * 2 * 2 * 2 * 2
    assert not table.duplicated(["step", "block", "edit", "sample", "seed", "outcome"]).any()
    assert set(forecast.experts) == {"transformer", "transformer_2"}
    for row in table.itertuples():
        step: Any = row.step
        assert (row.expert, row.sigma, row.timestep) == (forecast.experts[step], forecast.sigmas[step], forecast.timesteps[step])
        assert row.depth == row.block / BLOCKS  # pyright: ignore
    assert set(table["block"]) == {1, 2}
    assert ((table["value"] - table["clean"]) / (table["donor"] - table["clean"])).equals(table["effect"])
    assert table.groupby(["sample", "seed", "outcome", "step"])[["clean", "donor"]].nunique().eq(1).all(axis=None)
    table["value"] = 0
    assert found.table["value"].ne(0).any(), "to_pandas gives a copy"


def test_intervals_are_over_pairs(image_pipe: Any) -> None:
    found = swept(
        dl.wrap(image_pipe, "hooks"), [VELOCITY, X0_HAT], dl.at(block=[0, 1], step=1, branch="cond"), count=3, seeds=[1, 2]
    )
    summary = found.summary("velocity")
    assert list(summary["clusters"]) == [3, 3]
    assert list(summary["measurements"]) == [6, 6]
    rows = found.table.query("outcome == 'velocity' and block == 1")
    assert summary["mean"][1] == pytest.approx(rows["effect"].mean())
    by_pair = rows.groupby("sample")["effect"].mean()
    rounding = 1e-9
    assert by_pair.min() - rounding <= summary["low"][1] <= summary["mean"][1] <= summary["high"][1] <= by_pair.max() + rounding
    assert found.summary("velocity", "clean")["mean"][0] == pytest.approx(rows["clean"].mean())


def test_where_clean_and_donor_agree_there_is_no_effect_to_speak_of(image_pipe: Any) -> None:
    one = some_pairs(image_pipe)[0].clean
    lens = dl.wrap(image_pipe, "hooks")
    found = dl.sweep(lens, [dl.Pair(one, one)], patch, dl.at(block=1, step=1, branch="cond"), VELOCITY, progress=False)
    assert found.table["effect"].isna().all()
    assert (found.table["value"] == found.table["clean"]).all(), "a run patched with itself"
    assert found.summary().empty
    with pytest.raises(dl.InputError, match="no effect to show"):
        found.heatmap()


def test_activations_of_a_step_are_let_go_before_those_of_the_next(image_pipe: Any) -> None:
    held: dict[int, list[Any]] = {}

    def watching(cell: dl.Selector, runs: dl.PairRuns) -> dl.Edit:
        assert not any(one() is not None for step, kept in held.items() if step != cell.step for one in kept)
        held.setdefault(cell.step, []).extend(weakref.ref(entry.tensor) for entry in runs.donor.activations)
        return dl.Patch(cell, runs.donor)

    swept(dl.wrap(image_pipe, "hooks"), VELOCITY, dl.at(block="all", step=[0, 1, 2], branch="cond"), watching)
    assert len(held) == 3
    assert not any(one() is not None for kept in held.values() for one in kept)


def test_a_sweep_that_would_hold_too_much_is_refused(image_pipe: Any) -> None:
    lens, over = dl.wrap(image_pipe, "hooks"), dl.at(block=[1, 2], step=1, branch="cond", site=["q", "update"])
    cost = swept(lens, VELOCITY, over).cost
    assert cost is not None
    # Two donors of each site and a stream before each of the two blocks: (rows, tokens, channels) in float32.
    assert cost.held_bytes - 6 * 2 * 8 * 16 * 4 == _bytes_of_calls(lens)
    with pytest.raises(dl.InputError, match=r"would hold .* name step= and branch="):
        swept(lens, VELOCITY, over, limit_bytes=cost.held_bytes - 1)


def _bytes_of_calls(lens: dl.Lens) -> int:
    """Latents of every step with those of the image; texts of two branches; timesteps: for clean runs and donors."""
    pairs = some_pairs(lens.pipe)
    prompts = [pair.clean.inputs["prompt"] for pair in pairs]
    run = lens.run(**{**pairs[0].clean.inputs, "prompt": prompts}, keep_calls=True, decode=False)
    calls = run.calls.values()
    tensors = [one for call in calls for one in call.kwargs.values() if isinstance(one, torch.Tensor)]
    found = {one.data_ptr(): one.nbytes for one in tensors}
    return 2 * sum(found.values())


def test_heat_maps_show_means_and_how_wide_their_intervals_are(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    found = swept(lens, [VELOCITY, X0_HAT], dl.at(block="all", step=[0, 2], branch="cond"), controls={"other": other}, count=3)
    figure = found.heatmap("velocity")
    FigureCanvasAgg(figure).draw()
    summary = found.summary("velocity")
    panels = figure.axes[:4]
    assert [axis.get_title() for axis in panels] == ["edit", "other", "", ""]
    for axis, column in ((panels[0], summary["mean"]), (panels[2], summary["high"] - summary["low"])):
        (image,) = axis.get_images()
        expected = column[summary["edit"] == "edit"].to_numpy().reshape(2, BLOCKS).T
        assert np.allclose(np.asarray(image.get_array()), expected)
    assert [label.get_text() for label in panels[2].get_xticklabels()] == [
        f"{step} | {sigma:.2f}" for step, sigma in dict(zip(summary["step"], summary["sigma"], strict=True)).items()
    ]
    assert figure.axes[4].get_ylabel() == "effect of velocity\nmean, N = 3 pairs"
    widest = (summary["high"] - summary["low"]).max()
    assert f"at most {widest:.2f}" in figure.axes[5].get_ylabel()
    heads = swept(lens, VELOCITY, dl.at(block="all", step=1, branch="cond", site="heads", head="all"), count=3)
    FigureCanvasAgg(heads.heatmap()).draw()
    by_head = swept(lens, LATENTS, dl.at(block=[0, 2], site="heads", head="all")).heatmap()
    assert [label.get_text() for label in by_head.axes[1].get_xticklabels()] == ["0", "1"]


def test_a_table_can_be_saved(image_pipe: Any, tmp_path: Any) -> None:
    found = swept(dl.wrap(image_pipe, "hooks"), VELOCITY, dl.at(block=1, step=1, branch="cond"))
    found.save(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), found.table)


def test_the_cost_is_said_before_and_the_model_is_left_alone(image_pipe: Any, capsys: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine)
    before = lens.hash
    inputs = some_pairs(image_pipe)[0].clean.inputs
    plain = lens.run(**inputs, decode=False)
    dl.sweep(lens, some_pairs(image_pipe), EDITS["skip"], dl.at(block=1, step=1, branch="cond"), LATENTS)
    assert "1 cells x 1 edits x 2 rows" in capsys.readouterr().err
    assert dl.wrap(image_pipe).hash == before
    assert torch.equal(lens.run(**inputs, decode=False).latents, plain.latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "a sweep needs pairs, outcomes and seeds: there are 0, 1 and 1"),
        ({"outcomes": []}, "there are 2, 0 and 1"),
        ({"seeds": []}, "there are 2, 1 and 0"),
        ({"batch": 0}, "batch=0 holds no pair"),
        ({"outcomes": [VELOCITY, VELOCITY]}, "outcomes with the same name"),
        ({"controls": {"edit": other}}, "a control cannot have the name 'edit'"),
        ({"over": dl.at(block=1, step=1)}, "is in 2 calls .* name step= and branch="),
        ({"over": dl.at(block=1, branch="cond")}, "is in 4 calls"),
        ({"over": dl.at(block=7, step=1, branch="cond")}, "block 7 is out of range"),
        ({"over": dl.at(block=1, step=1, branch="cond", frames=slice(0, 1))}, "frames=\\[0, 1, 2\\]"),
        ({"over": dl.at(block=1, step=1, branch="cond", frames=[5])}, "frames 5 is out of range"),
        ({"outcomes": dl.Outcome("all", lambda shown, pairs: shown, of="velocity")}, "gave shape .* for 2 rows"),
        ({"outcomes": dl.Outcome("one", lambda shown, pairs: 1.0, of="velocity")}, "gave shape \\(\\) for 2 rows"),
        ({"edit": lambda cell, runs: "zero"}, "edits= takes edits"),
        ({"edit": lambda cell, runs: dl.Zero(dl.at(block=1, step=3))}, "never fired"),
    ],
)
def test_what_cannot_be_swept_is_an_error(image_pipe: Any, changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"edit": patch, "over": dl.at(block=1, step=1, branch="cond"), "outcomes": VELOCITY}
    asked |= {"pairs": some_pairs(image_pipe), "progress": False, **changes}
    with pytest.raises(dl.InputError, match=message):
        dl.sweep(dl.wrap(image_pipe, "hooks"), **asked)


def test_pairs_of_another_schedule_than_the_first_are_an_error(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    for changes in ({"num_inference_steps": 5}, {"guidance_scale": 1.0}):
        pairs = [some_pairs(image_pipe)[0], some_pairs(image_pipe, 2, **changes)[1]]
        with pytest.raises(dl.InputError, match=r"pairs 1 to 1 ran .* the same schedule and guidance"):
            dl.sweep(lens, pairs, patch, dl.at(block=1, step=1, branch="cond"), VELOCITY, batch=1, progress=False)


def test_what_was_not_measured_cannot_be_shown(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    found = swept(lens, [VELOCITY, X0_HAT], dl.at(step=1, branch="cond"))
    with pytest.raises(dl.InputError, match="there are 2 outcomes; name one of velocity, x0_hat"):
        found.summary()
    with pytest.raises(dl.InputError, match="no outcome 'flip'; write one of velocity, x0_hat"):
        found.summary("flip")
    with pytest.raises(dl.InputError, match="no column 'mean'"):
        found.summary("velocity", "mean")
    with pytest.raises(dl.InputError, match="a heat map needs blocks, and this sweep named step, branch"):
        found.heatmap("velocity")
    with pytest.raises(dl.InputError, match="decoded= is for of='x0_hat'"):
        dl.Outcome("flip", projected, decoded=True)
    assert VIDEO.of == "video"


@pytest.mark.parametrize("kind", ["text", "copy", "mlp"])
def test_patches_name_the_planted_block(kind: Any) -> None:
    model = dl.planted(kind, seed=1, blocks=4, steps=4)
    answer = dl.Outcome("answer", lambda shown, pairs: model.answer(shown, of="velocity"), of="velocity")
    over = dl.at(block="all", step=1, branch="cond", site="update")
    found = dl.sweep(model.lens("hooks"), model.pairs(3), patch, over, answer, controls={"other": other}, progress=False)
    means = found.summary().set_index(["edit", "block"])["mean"]
    for block in range(model.blocks):
        assert means["edit", block] == pytest.approx(float(block == model.truth.block), abs=0.15)
