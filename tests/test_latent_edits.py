"""Edits of latents: what each way of replacing keeps, and what it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import arguments
from diffusers import UniPCMultistepScheduler
from test_edits import OTHER, run, same

import dit_lens as dl


@pytest.fixture
def lens(image_pipe: Any) -> dl.Lens:
    return dl.wrap(image_pipe, engine="hooks")


@pytest.mark.parametrize("step", [0, 2])
def test_a_donors_latents_bring_its_whole_future(lens: dl.Lens, step: int) -> None:
    donor, clean = run(lens, seed=9), run(lens, seed=3)
    replaced = run(lens, dl.ReplaceLatents(step, donor=donor), seed=3)
    assert torch.equal(replaced.latents[step:], donor.latents[step:])
    assert torch.equal(replaced.latents[:step], clean.latents[:step])
    assert replaced.fired == {0: 1}
    several = run(lens, dl.ReplaceLatents(step, donor=donor), seed=[3, 4])
    assert torch.equal(several.latents[step, 0], donor.latents[step, 0])
    assert torch.equal(several.latents[step, 1], donor.latents[step, 0])
    assert same(run(lens, dl.ReplaceLatents("all", donor=donor), seed=9), donor)


def test_noise_follows_from_its_seeds_alone(lens: dl.Lens) -> None:
    clean = run(lens, seed=[3, 4])
    whole, frame = (run(lens, dl.ReplaceLatents(1, noise=7, frames=frames), seed=[3, 4]) for frames in (None, 1))
    assert torch.equal(whole.latents[0], clean.latents[0])
    assert torch.equal(frame.latents[1, :, :, 0], clean.latents[1, :, :, 0])
    assert torch.equal(frame.latents[1, :, :, 1], whole.latents[1, :, :, 1])
    assert torch.equal(run(lens, dl.ReplaceLatents(1, noise=7), seed=4).latents[1, 0], whole.latents[1, 1])
    assert abs(whole.latents[1].std() - 1) < 0.15
    assert not torch.equal(whole.latents[1, 0], whole.latents[1, 1])
    assert not torch.equal(run(lens, dl.ReplaceLatents(1, noise=8), seed=4).latents[1, 0], whole.latents[1, 1])


def test_sigma_matched_noise_keeps_the_video_and_the_noise_level(lens: dl.Lens) -> None:
    clean = run(lens)
    pure = run(lens, dl.ReplaceLatents(2, noise=7)).latents[2]
    matched = run(lens, dl.ReplaceLatents(2, noise=7, how="sigma_matched"))
    sigma = clean.sigmas[2]
    assert torch.allclose(matched.latents[2], (1 - sigma) * clean.x0_hat(1) + sigma * pure, atol=1e-5)
    named = run(lens, dl.ReplaceLatents(2, donor=clean, noise=7, how="sigma_matched"))
    assert torch.allclose(named.latents[2], matched.latents[2], atol=1e-6), "a run's own video is its last bet"


def test_a_donors_video_can_be_put_into_a_runs_own_noise(lens: dl.Lens) -> None:
    clean, donor = run(lens), run(lens, seed=9, **OTHER)
    itself = run(lens, dl.ReplaceLatents(2, donor=clean, how="sigma_matched"))
    assert torch.allclose(itself.latents, clean.latents, atol=1e-5)
    other = run(lens, dl.ReplaceLatents(2, donor=donor, how="sigma_matched"))
    sigma = clean.sigmas[2]
    noise = (clean.latents[2] - (1 - sigma) * clean.x0_hat(1)) / sigma
    assert torch.allclose(other.latents[2], (1 - sigma) * donor.x0_hat(1) + sigma * noise, atol=1e-5)
    first = run(lens, dl.ReplaceLatents(0, donor=donor, how="sigma_matched"))
    assert torch.equal(first.latents, clean.latents), "there is no video in pure noise"


@pytest.mark.parametrize("frames", [None, 1])
@pytest.mark.parametrize("by", ["noise", "donor"])
def test_a_dose_is_the_same_in_one_frame_and_in_all(lens: dl.Lens, frames: Any, by: str) -> None:
    clean = run(lens, seed=[3, 4])
    source: dict[str, Any] = {"noise": 7} if by == "noise" else {"donor": run(lens, seed=9, **OTHER)}
    dosed = run(lens, dl.ReplaceLatents(1, how="dose_matched", dose=0.2, frames=frames, **source), seed=[3, 4])
    change = (dosed.latents[1] - clean.latents[1]).flatten(1).norm(dim=1) / clean.latents[1].flatten(1).norm(dim=1)
    assert torch.allclose(change, torch.tensor(0.2), atol=1e-5)
    assert torch.equal(dosed.latents[1, :, :, 0], clean.latents[1, :, :, 0]) == (frames == 1)
    nothing = run(lens, dl.ReplaceLatents(1, how="dose_matched", dose=0.0, frames=frames, **source), seed=[3, 4])
    assert same(nothing, clean)


def test_mixing_keeps_the_rest_of_the_energy(lens: dl.Lens) -> None:
    clean, pure = run(lens), run(lens, dl.ReplaceLatents(1, noise=7))
    mixed = run(lens, dl.ReplaceLatents(1, noise=7, how="mixed", dose=0.6))
    assert torch.allclose(mixed.latents[1], 0.8 * clean.latents[1] + 0.6 * pure.latents[1], atol=1e-6)
    assert same(run(lens, dl.ReplaceLatents(1, noise=7, how="mixed", dose=1.0)), pure)
    assert same(run(lens, dl.ReplaceLatents(1, noise=7, how="mixed", dose=0.0)), clean)


def test_a_part_of_the_noise_can_be_drawn_again(lens: dl.Lens) -> None:
    clean = run(lens)
    whole = run(lens, dl.ReplaceLatents(2, noise=7, how="sigma_matched"))
    assert same(run(lens, dl.ReplaceLatents(2, noise=7, how="sigma_matched", dose=1.0)), whole)
    part = run(lens, dl.ReplaceLatents(2, noise=7, how="sigma_matched", dose=0.6)).latents[2]
    signal = (1 - clean.sigmas[2]) * clean.x0_hat(1)
    expected = signal + 0.8 * (clean.latents[2] - signal) + 0.6 * (whole.latents[2] - signal)
    assert torch.allclose(part, expected, atol=1e-5)


def test_rows_of_a_run_are_edited_by_themselves(lens: dl.Lens) -> None:
    clean = run(lens, seed=[3, 4])
    edits = [dl.ReplaceLatents(1, noise=[7, 8], frames=frame, rows=[row]) for row, frame in enumerate((0, 1))]
    edited = run(lens, *edits, seed=[3, 4])
    for row, frame in enumerate((0, 1)):
        kept = 1 - frame
        assert torch.equal(edited.latents[1, row, :, kept], clean.latents[1, row, :, kept])
        alone = run(lens, dl.ReplaceLatents(1, noise=7 + row), seed=3 + row).latents[1, 0]
        assert torch.equal(edited.latents[1, row, :, frame], alone[:, frame]), "each row has noise of its own seed"
    whole = [dl.ReplaceLatents(1, noise=7, rows=[row]) for row in (0, 1)]
    assert same(run(lens, *whole, seed=[3, 4]), run(lens, dl.ReplaceLatents(1, noise=7), seed=[3, 4]))


def test_they_compose_and_both_engines_agree(any_pipe: Any) -> None:
    def edits() -> list[Any]:
        return [
            dl.ReplaceLatents([1, 2], noise=7, frames=0),
            dl.ReplaceLatents(slice(0, 3), noise=2, frames=1, how="sigma_matched"),
            dl.ReplaceLatents("all", noise=1, how="dose_matched", dose=0.1),
            dl.ReplaceLatents("all", noise=[4], how="mixed", dose=0.1, rows=[0]),
            dl.Zero(dl.at(block=0, step=2)),
        ]

    ours, theirs = (run(dl.wrap(any_pipe, engine=engine), *edits()) for engine in ("nnsight", "hooks"))
    assert same(ours, theirs)
    assert ours.fired == theirs.fired == {0: 2, 1: 3, 2: 4, 3: 4, 4: 2}
    assert "prepare_latents" not in vars(any_pipe)


def test_other_schedulers_mix_by_their_own_factors(image_pipe: Any) -> None:
    image_pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    lens = dl.wrap(image_pipe, engine="hooks")
    clean = run(lens)
    pure = run(lens, dl.ReplaceLatents(2, noise=7)).latents[2]
    matched = run(lens, dl.ReplaceLatents(2, noise=7, how="sigma_matched"))
    sigma = clean.sigmas[2]
    assert torch.allclose(matched.latents[2], (1 - sigma) * clean.x0_hat(1) + sigma * pure, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"ReplaceLatents\(step=1, how='replace'\) needs what to put there: write donor=run, or noise=seed"),
        ({"noise": 1, "dose": 0.2}, "dose= belongs to how='dose_matched'"),
        ({"noise": 1, "how": "dose_matched"}, "dose= belongs to how='dose_matched', in units of the latents' own norm"),
        ({"noise": 1, "how": "mixed"}, "to how='mixed'"),
        ({"noise": 1, "how": "mixed", "dose": 1.2}, r"dose=1.2 is no share of the noise; write a number from 0 to 1"),
    ],
)
def test_what_is_not_said_or_said_twice(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        dl.ReplaceLatents(1, **settings)


def test_what_does_not_fit_is_refused(lens: dl.Lens) -> None:
    donor = run(lens)
    with pytest.raises(dl.InputError, match="has a donor and noise; write one of them, or how='sigma_matched'"):
        dl.ReplaceLatents(1, donor=donor, noise=1)
    short = run(lens, num_inference_steps=3)
    wide = run(lens, width=32)
    two = run(lens, seed=[1, 2])
    stopped = run(lens, callback_on_step_end=_stop_after_first)
    for edit, message in (
        (dl.ReplaceLatents(4, noise=1), "step 4 is out of range: there are 4 steps"),
        (dl.ReplaceLatents(1, noise=1, frames=2), "frames 2 is out of range: there are 2 latent frames, write 0 to 1"),
        (dl.ReplaceLatents(0, donor=short), "the donor ran 3 steps of a FlowMatchEuler.*, and this run has 4"),
        (dl.ReplaceLatents(0, donor=wide), r"latents have shape \(1, 4, 2, 4, 8\), and those of this run \(1, 4, 2, 4, 4\)"),
        (dl.ReplaceLatents(0, donor=two), "with one row or as many"),
        (dl.ReplaceLatents(0, noise=1, rows=[1]), r"rows=\[1 rows\].*: this run has 1 rows; write some of 0 to 0"),
        (dl.ReplaceLatents(0, noise=[1, 2]), r"noise=\[2 seeds\].*: this run has 1 rows; write one seed, or 1 of them"),
        (dl.ReplaceLatents(2, donor=stopped), "the donor stopped after step 0; choose earlier steps"),
    ):
        with pytest.raises(dl.InputError, match=message):
            run(lens, edit)
    twice = [dl.ReplaceLatents(1, noise=1), dl.ReplaceLatents([0, 1], donor=donor, frames=0)]
    with pytest.raises(dl.InputError, match=r"edits\[1\], .* would undo edits\[0\], .*: both replace latent frame 0 at step 1"):
        run(lens, *twice)
    with pytest.raises(dl.InputError, match=r"edits\[0\], ReplaceLatents\(step=3, .* never fired: the run ended before"):
        run(lens, dl.ReplaceLatents(3, noise=1), callback_on_step_end=_stop_after_first)
    assert "prepare_latents" not in vars(lens.pipe)
    assert same(run(lens, **{"seed": 3}), donor)


def _stop_after_first(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = True
    return values


def test_arguments_are_those_of_the_pipeline(lens: dl.Lens) -> None:
    """A run that gives its own latents is edited as any other."""
    own = torch.ones(1, 4, 2, 4, 4)
    edited = lens.run(**arguments(lens.pipe), latents=own, decode=False, edits=dl.ReplaceLatents(0, noise=1, frames=0))
    assert torch.equal(edited.latents[0, :, :, 1], own[:, :, 1])
    assert not torch.equal(edited.latents[0, :, :, 0], own[:, :, 0])
