"""Probes of frames and clips: features from what was recorded, labels of whole frames and clips, and what was planted found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_targets import faithful

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.activations import Entry
from dit_lens.reasoner.board import Colour
from probes import logistic
from probes.clip_targets import CLIP_TARGETS, ClipTarget, clip_questions, clip_targets
from probes.clips import WORDING, read_clips, read_frames
from probes.features import each_sample, each_unit, one_head, pooled_clip, pooled_frames, tokens
from probes.maps import LATENTS, PLACE, PROBE

BY_NAME = {target.name: target for target in CLIP_TARGETS}
FRAMES, SIDE, HEADS, WIDTH = 5, 2, 3, 4
SEEING = {"clip": 1, "frame": 2}
"""The head in which a label was planted: of the clip (in one token of one frame), or of each frame (in all of its tokens)."""


def samples(name: str, count: int = 24) -> list[Any]:
    return [reasoner.task(name).sample("test", index) for index in range(count)]


def planted(found: list[Any], clip: ClipTarget, frame: ClipTarget, seed: int) -> dl.Run:
    """A run without a pipeline that draws the true videos; its heads hold noise, and two of them what is asked."""
    rng = np.random.default_rng(seed)
    whole = np.array([clip.labels(sample, faithful(sample)) for sample in found], dtype=float)
    each = np.array([frame.labels(sample, faithful(sample)) for sample in found], dtype=float)
    heads = 0.3 * rng.normal(size=(len(found), FRAMES, SIDE, SIDE, HEADS, WIDTH))
    heads[:, 3, 0, 1, SEEING["clip"], 2] += FRAMES * SIDE**2 * np.nan_to_num(whole)
    heads[..., SEEING["frame"], 0] += np.nan_to_num(each)[:, :, None, None]
    cells = [dl.Cell("transformer", 0, "cond", 0, site, sigma=1.0, timestep=1000.0, depth=0.0) for site in ("heads", "resid")]
    stack = torch.tensor(heads, dtype=torch.float32)
    plain = torch.tensor(rng.normal(size=(len(found), FRAMES, WIDTH)), dtype=torch.float32)
    latents = torch.tensor(rng.normal(size=(2, len(found), 4, FRAMES, 16, 16)), dtype=torch.float32)
    return dl.Run(
        seeds=tuple(sample.index for sample in found),
        prompts=tuple(sample.prompt for sample in found),
        layout=dl.Layout(FRAMES, SIDE, SIDE),
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=(1000.0,),
        sigmas=torch.tensor([1.0]),
        experts=("transformer",),
        branches=("cond",),
        latents=latents,
        outputs={"guided": latents[:1].clone(), "cond": latents[:1].clone()},
        weights=((1.0, -1.0),),
        video=torch.tensor(np.stack([sample.video() for sample in found])),
        activations=dl.Activations([Entry(cells[0], 0, "full", stack), Entry(cells[1], 1, "frame_mean", plain)]),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dl.Store:
    """Two runs of bounce: a number of the clip and the ball's row are planted."""
    found, kept = samples("bounce"), dl.Store(tmp_path_factory.mktemp("clips"))
    for seed, part in enumerate((found[:10], found[10:])):
        labels = {"task": "bounce", "sample": [s.index for s in part], "group": [s.group for s in part]}
        kept.append(planted(part, HEIGHT, BY_NAME["ball's row"], seed), "planted", **labels)
    return kept


HEIGHT = ClipTarget(
    "height", "perceptual", "number", ("bounce",), "of the box", "clip", lambda s, drawn: float(s.puzzle.bottom - s.puzzle.top)
)
LATE = ClipTarget("late", "perceptual", "binary", ("bounce",), "frame", "frame", lambda s, drawn: np.arange(FRAMES) > 2)


def test_what_was_planted_is_found_where_it_is_and_nowhere_else(store: dl.Store) -> None:
    found = samples("bounce")
    for unit, read, target in (("clip", read_clips, HEIGHT), ("frame", read_frames, BY_NAME["ball's row"])):
        pooled = pooled_clip if unit == "clip" else pooled_frames
        for head in range(HEADS):
            table = (
                read(store, found, one_head(head, pooled), [target], site="heads", progress=False)
                .set_index("reader")
                .to_dict("index")
            )
            seen = table[PROBE]
            assert (seen["site"], seen["block"], seen["sigma"], seen["content"]) == ("heads", 0, 1.0, target.content)
            if head == SEEING[unit]:
                assert seen["estimate"] > 0.95
                assert seen["selectivity"] > 0.5
                assert seen["shuffled"] < 0.5
            else:
                assert seen["estimate"] < 0.3
        rows = FRAMES - 1 if unit == "frame" else 1
        assert seen["measurements"] == 12 * rows
        assert seen["clusters"] == 12
        assert table[LATENTS]["estimate"] < 0.3
        assert np.isnan([table[reader]["block"] for reader in (LATENTS, PLACE if unit == "frame" else WORDING)]).all()


def test_the_number_of_a_frame_is_no_selectivity(store: dl.Store) -> None:
    table = read_frames(store, samples("bounce"), asked=[LATE], site="heads", progress=False).set_index("reader").to_dict("index")
    assert (table[PLACE]["estimate"], table[PLACE]["shuffled"]) == (1, 1)
    assert set(table) == {PROBE, PLACE, LATENTS}


def test_any_reducer_and_any_probe_will_do(store: dl.Store) -> None:
    found = samples("bounce")
    wide = replace(HEIGHT, name="high", kind="binary", labels=lambda s, drawn: s.puzzle.bottom - s.puzzle.top > 8)
    table = read_clips(store, found, asked=[wide], read=logistic.read_all, site="heads", progress=False).set_index("reader")
    assert table.to_dict("index")[PROBE]["estimate"] > 0.85
    assert set(table.index) == {PROBE, WORDING, LATENTS}
    for features, read, target in ((each_sample, read_clips, HEIGHT), (each_unit, read_frames, LATE)):
        reduced = read(store, found, features, [target], reduce="frame_mean", progress=False)
        assert set(reduced["site"].dropna()) == {"resid"}
    with pytest.raises(dl.InputError, match="pooled_frames needs whole frames"):
        read_clips(store, found, asked=[HEIGHT], progress=False)


def test_features_are_those_of_their_units() -> None:
    stack = np.random.default_rng(0).normal(size=(2, FRAMES, SIDE, SIDE, HEADS, WIDTH))
    joined = stack.reshape(*stack.shape[:4], -1)
    assert np.array_equal(tokens()(stack), joined[:, -1].reshape(2, 4, -1))
    assert np.array_equal(tokens(None)(joined), joined[:, 2].reshape(2, 4, -1))
    assert np.allclose(pooled_frames(stack)[1, 3], joined[1, 3].mean(axis=(0, 1)))
    assert np.allclose(pooled_clip(stack)[1, 0], joined[1].mean(axis=(0, 1, 2)))
    assert np.allclose(one_head(-1, tokens(0))(stack), stack[:, 0, ..., -1, :].reshape(2, 4, -1))
    assert each_sample(stack).shape == (2, 1, stack[0].size)
    assert each_unit(stack[:, :, 0, 0, 0]).shape == (2, FRAMES, WIDTH)
    with pytest.raises(dl.InputError, match=r"one_head\(3\): there is 3 heads"):
        one_head(3)(stack)
    with pytest.raises(dl.InputError, match=r"one_head\(0\): there is no axis of heads in \(2, 5, 2, 2, 12\)"):
        one_head(0)(joined)
    with pytest.raises(dl.InputError, match=r"tokens\(5\) of 5 recorded frames: write one from 0 to 4"):
        tokens(5)(stack)
    with pytest.raises(dl.InputError, match="there is one row per sample"):
        each_unit(stack[:, 0, 0, 0, 0])


def test_labels_of_frames_are_what_the_true_video_shows() -> None:
    for sample in samples("bounce", 6):
        row, column = (BY_NAME[f"ball's {axis}"].labels(sample, faithful(sample)) for axis in ("row", "column"))
        assert np.isnan([row[0], column[0]]).all()  # pyright: ignore[reportIndexIssue]
        flight = sample.puzzle.flight()
        assert list(zip(row[1:], column[1:], strict=True)) == [flight[4], flight[8], flight[12], flight[16]]  # pyright: ignore[reportIndexIssue]
    for sample in samples("permanence", 12):
        behind = np.asarray(BY_NAME["behind screen"].labels(sample, faithful(sample)))
        if not sample.puzzle.hides:
            assert np.isnan(behind).all()
            continue
        assert np.isnan(behind[0])
        assert (behind[2], behind[4]) == (1, 0)
        thing = sample.boards[4][sample.masks["target"]]
        assert behind[1] == ((thing == Colour.GREY).mean() >= 0.5)


def test_every_task_has_targets_to_tell_apart() -> None:
    for name in reasoner.tasks():
        found = samples(name, 16)
        drawn = [replace(faithful(s), which=s.shown if s.index % 2 else None) for s in found]
        for unit, units in (("clip", 1), ("frame", FRAMES)):
            for target in clip_targets(name, unit):  # pyright: ignore[reportArgumentType]
                (question,) = clip_questions([target], found, drawn, units)
                assert len(np.unique(np.asarray(question.values)[question.asked])) >= 2, (name, target.name)
        assert {"solved"} <= {target.name for target in clip_targets(name, "clip")}
    maze = samples("maze-loops", 1)[0]
    assert BY_NAME["route length"].labels(maze, faithful(maze)) == sum(y % 2 and x % 2 for y, x in maze.answers[0]) - 1
    several = next(s for s in samples("tictactoe") if len(s.answers) > 1)
    assert np.isnan(BY_NAME["winning cell"].labels(several, faithful(several)))


def test_what_does_not_fit_is_said(store: dl.Store, tmp_path: Path) -> None:
    found = samples("bounce")
    with pytest.raises(dl.InputError, match="the store lacks 1 of 25 samples of bounce, as 99"):
        read_clips(store, [*found, reasoner.task("bounce").sample("test", 99)], progress=False)
    with pytest.raises(dl.InputError, match="'late' is not asked of a clip"):
        read_clips(store, found, asked=[LATE], progress=False)
    clips, circle = dl.Store(tmp_path / "circle"), samples("circle", 2)
    labels = {"task": "circle", "sample": [0, 1], "group": [s.group for s in circle]}
    clips.append(planted(circle, BY_NAME["named colour"], LATE, 0), "planted", **labels)
    with pytest.raises(dl.InputError, match="circle has no target of a frame: write one"):
        read_frames(clips, circle, progress=False)
    with pytest.raises(dl.InputError, match=r"'late' has labels of shape \(5,\) for sample 0 of bounce, and its features 1 rows"):
        read_frames(store, found, pooled_clip, [LATE], site="heads", progress=False)
    with pytest.raises(dl.InputError, match=r"the store holds nothing of bounce at \{'site': 'q'\}"):
        read_clips(store, found, site="q", progress=False)
    with pytest.raises(dl.InputError, match=r"return \(samples, units, channels\)"):
        read_clips(store, found, lambda stack: stack[:, 0, 0, 0, 0], site="heads", progress=False)
