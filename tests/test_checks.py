"""The checks of a pipeline pass on a true lens, and each of them fails on one that is false in its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import WanPipeline
from test_conformance import NAMES

import dit_lens as dl
from dit_lens import lens as lenses
from dit_lens import schedule
from dit_lens.activations import Activations
from dit_lens.architectures import WAN
from dit_lens.check_report import CheckReport
from dit_lens.checks import Checks
from dit_lens.first_inputs import CHOSEN, first_inputs
from dit_lens.small_pipelines import PIPELINES, pipeline

SMALL: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2}
SMALL |= {"prompt": "walk the red maze", "negative_prompt": "nothing green"}
RUNS = {
    "bare": "recording nothing leaves the pipeline as it is",
    "recorded": "recording every site of every block leaves it as it is",
    "labels": "every block, site, step and branch is recorded once, under its timestep",
    "branches": "a prompt reaches its own branch",
    "engines of runs": "nnsight and plain hooks record the same",
    "x0": "a denoiser that answers with an x0-hat leads there",
    "result": "the result is the pipeline's own",
    "decoding": "decoding the last latents gives the result",
}
SHORT = {long: key for key, long in (RUNS | NAMES).items()}


def failed(report: CheckReport) -> set[str]:
    """The checks that fail, by their short names; of every expert."""
    return {SHORT[check.name.removeprefix("transformer_2: ").removeprefix("transformer: ")] for check in report.failed}


def of_runs(lens: dl.Lens, inputs: dict[str, Any]) -> CheckReport:
    """The checks of whole runs alone."""
    return CheckReport(tuple(Checks(lens, inputs).of_runs()))


def given(name: str) -> dict[str, Any]:
    """The arguments of a small pipeline."""
    return {key: value for key, value in PIPELINES[name].inputs.items() if key != "output_type"}


def test_pass_on_two_experts_each_by_itself(text_pipe: Any) -> None:
    """One expert, from an image and on nnsight, is in test_cli.py."""
    report = dl.wrap(text_pipe, engine="hooks").check(**SMALL)
    assert report.passed, report
    assert all(check.passed for check in report.checks)
    names = [f"{expert}: {name}" for expert in ("transformer", "transformer_2") for name in NAMES.values()]
    assert [check.name for check in report.checks] == [*RUNS.values(), *names]


@pytest.mark.parametrize("name", ["dit"])
def test_an_architecture_seen_for_the_first_time_passes_by_watching_alone(name: str) -> None:
    report = dl.wrap(pipeline(name), engine="hooks").check(**given(name))
    assert report.passed, report
    assert {SHORT[check.name] for check in report.checks if check.passed is None} == {"decoding", "contributions"}


def test_frames_that_hold_an_image_are_none_of_the_schedulers() -> None:
    report = dl.wrap(pipeline("wan-5b-image"), engine="hooks").check(**given("wan-5b-image"))
    assert report.passed, report
    assert "but in the frames 0, which hold an image" in next(
        check.found for check in report.checks if "nothing leaves" in check.name
    )


def test_what_cannot_be_labelled_or_told_is_refused() -> None:
    with pytest.raises(dl.InputError, match="guidance changes on the way"):
        dl.wrap(pipeline("lumina-2-truncated")).check(**given("lumina-2-truncated"))


@pytest.mark.parametrize("name", ["dit", "chroma"])
def test_branches_in_the_other_order_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie in one batch, and where they are called one after the other without a name."""
    outline = lenses.outline

    def turned(*given: Any) -> Any:
        seen = outline(*given)
        return replace(seen, guidance=replace(seen.guidance, branches=seen.guidance.branches[::-1]))

    monkeypatch.setattr(lenses, "outline", turned)
    report = of_runs(dl.wrap(pipeline(name), engine="hooks"), given(name))
    assert failed(report) == {"branches"}
    assert "another prompt changes uncond" in report.failed[0].found


Meddle = Callable[[Any, dl.Run], dl.Run]


def without_one(lens: Any, run: dl.Run) -> dl.Run:
    return replace(run, activations=Activations(list(run.activations)[:-1])) if len(run.activations) else run


def later(lens: Any, run: dl.Run) -> dl.Run:
    return replace(run, timesteps=(*run.timesteps[1:], 0.0))


def changed_by_recording(lens: Any, run: dl.Run) -> dl.Run:
    return replace(run, latents=run.latents + 1e-3) if len(run.activations) else run


def changed(lens: Any, run: dl.Run) -> dl.Run:
    return run if len(run.activations) else replace(run, latents=run.latents.roll(1, dims=-1))


def changed_on_one_engine(lens: Any, run: dl.Run) -> dl.Run:
    if lens.engine == "hooks":
        return run
    return replace(run, activations=Activations([replace(entry, tensor=entry.tensor + 1) for entry in run.activations]))


def another_video(lens: Any, run: dl.Run) -> dl.Run:
    return run if run.video is None else replace(run, video=1 - run.video)


RUNS_MEDDLED: dict[str, tuple[Meddle, set[str]]] = {
    "a cell is missing": (without_one, {"labels", "branches"}),
    "steps are told one late": (later, {"labels"}),
    "recording changes the run": (changed_by_recording, {"recorded"}),
    "the lens changes the run": (changed, {"bare", "x0"}),
    "engines differ": (changed_on_one_engine, {"engines of runs"}),
    "another result": (another_video, {"result", "decoding"}),
}


@pytest.mark.parametrize("case", RUNS_MEDDLED)
def test_a_false_run_fails_the_check_that_is_for_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meddle, expected = RUNS_MEDDLED[case]
    run = dl.Lens.run
    monkeypatch.setattr(dl.Lens, "run", lambda lens, **named: meddle(lens, run(lens, **named)))
    engine = "nnsight" if case == "engines differ" else "hooks"
    assert failed(of_runs(dl.wrap(tiny_pipeline(WanPipeline), engine=engine), SMALL)) == expected


def test_another_decoder_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = dl.Lens.decode
    monkeypatch.setattr(dl.Lens, "decode", lambda lens, latents: decode(lens, latents).flip(1))
    assert failed(of_runs(dl.wrap(tiny_pipeline(WanPipeline), engine="hooks"), SMALL)) == {"decoding"}


def test_wrong_weights_of_x0_hat_lead_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "x0_weights", lambda state: (1.0, -0.8 * state.noise))
    assert failed(of_runs(dl.wrap(tiny_pipeline(WanPipeline), engine="hooks"), SMALL)) == {"x0"}


def test_experts_in_the_other_order_fail(text_pipe: Any) -> None:
    lens = dl.wrap(text_pipe, engine="hooks")
    lens._architecture = replace(WAN, experts=("transformer_2", "transformer"))
    # Selections name blocks of an expert that does not run then.
    assert failed(of_runs(lens, SMALL)) == {"labels", "recorded", "branches", "engines of runs"}


def test_a_wrong_site_fails_in_the_checks_of_its_expert(text_pipe: Any) -> None:
    lens = dl.wrap(text_pipe, engine="hooks")
    (stack,) = WAN.stacks
    sites = tuple(replace(site, module="attn1") if site.name == "mlp" else site for site in stack.sites)
    lens._architecture = replace(WAN, stacks=(replace(stack, sites=sites),))
    report = CheckReport(tuple(Checks(lens, SMALL).conformance("transformer_2")))
    assert failed(report) == {"kinds"}


def test_inputs_are_chosen_from_what_a_pipeline_takes(image_pipe: Any, text_pipe: Any) -> None:
    assert first_inputs(text_pipe) == {key: CHOSEN[key] for key in ("prompt", "negative_prompt", "num_inference_steps")}
    assert first_inputs(image_pipe)["image"].size == (256, 256)
    assert set(first_inputs(pipeline("dit"))) == {"class_labels", "num_inference_steps"}
    own = {"prompt_embeds": torch.zeros(1, 4, 8), "num_inference_steps": 2}
    assert set(first_inputs(text_pipe, own)) == {"prompt_embeds", "num_inference_steps", "negative_prompt"}
    assert first_inputs(text_pipe, own)["num_inference_steps"] == 2

    class Needing:
        def __call__(self, prompt: str, mask: Any) -> None: ...

    with pytest.raises(dl.InputError, match=r"a Needing needs mask: give it, as in lens.check\(mask=...\)"):
        first_inputs(Needing())
