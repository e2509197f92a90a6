"""The lens on every small pipeline: labels, trajectories, edits and schedules are what the pipeline does, seen without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lens_stamps import Label, Stamper, fingerprint, parts, stamp, tokens
from stamps import Watched, all_knowing, watching
from torch import Tensor

import dit_lens as dl
from dit_lens.architectures import record
from dit_lens.small_pipelines import PIPELINES, SmallPipeline, pipeline
from dit_lens.small_pipelines.page import looked_at, page, seen

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi asks for float32 there
]

PAGE = Path(__file__).parent.parent / "docs" / "pipelines.md"
ENGINES = ("hooks", "nnsight")
EVERYTHING = dl.at(site="all", stream="all")
STREAMS = dl.at(stream="all")
REFUSED = {
    "stable-diffusion-3-skip-layers": "step 1 calls the denoiser more often than StableDiffusion3Pipeline has branches",
    "lumina-2-truncated": "step 1 calls cond, and a step before it cond, uncond: a run whose guidance changes on the way",
    "z-image": "the ZImageTransformer2DModel have extra tokens in the sequences of samples that come as a list",
}
"""What a lens says of the pipelines whose runs it cannot label."""
ONE_SAMPLE = ("wan-vace",)
"""Take one prompt, and no list of them."""

SMALL = [small for small in PIPELINES.values() if small.name not in REFUSED]
every = pytest.mark.parametrize("small", SMALL, ids=[small.name for small in SMALL])
both_engines = pytest.mark.parametrize("engine", ENGINES)


def inputs_of(small: SmallPipeline, samples: int = 1) -> dict[str, Any]:
    """Arguments of a run; of two samples, whose prompts differ."""
    given = {name: value for name, value in small.inputs.items() if name != "output_type"}
    if samples == 2:
        given |= {"class_labels": [7, 8]} if "class_labels" in given else {"prompt": ["left ball rolls", "left cube rolls"]}
    return given


@dataclass
class Runs:
    """A pipeline, and what it and two lenses on it made of the same arguments.

    Attributes:
        plain: what the pipeline returned. bare: with nothing recorded. whole: with everything recorded, by engine.
        seen, returned: what the first of these did and what its modules returned, watched by hooks of the tests' own.
        before, after: what the pipeline was before the first run and is after all of them.
    """

    small: SmallPipeline
    pipe: Any
    stamper: Stamper
    lenses: dict[str, dl.Lens]
    plain: Any
    bare: dl.Run
    before: list[Any]
    whole: dict[str, dl.Run] = field(default_factory=dict)
    seen: Watched = field(default_factory=Watched)
    returned: Mapping[Label, Tensor] = field(default_factory=dict)


@cache
def runs(name: str) -> Runs:
    """Everything that several tests look at, once."""
    small = PIPELINES[name]
    pipe, given = pipeline(name), inputs_of(small)
    stamper = Stamper(pipe, small)
    first = dl.wrap(pipe, engine=ENGINES[0])
    plain = first.plain(**small.inputs, return_dict=False)[0]
    before = fingerprint(pipe)
    with pytest.MonkeyPatch.context() as patch:  # both lenses have what the first one finds
        patch.setattr(record, "_registered", [first.discover(**given)])
        lenses = {ENGINES[0]: first, ENGINES[1]: dl.wrap(pipe, engine=ENGINES[1])}
    found = Runs(small, pipe, stamper, lenses, plain, first.run(**given, decode=False), before)
    for engine, lens in lenses.items():
        lens.forecast(**given)
        stamper.begin()
        with watching(pipe, small.experts) as seen:
            found.whole[engine] = lens.run(**given, decode=False, record=EVERYTHING)
        if engine == "hooks":
            found.seen, found.returned = seen, dict(stamper.returned)
    return found


def same(ours: dl.Run, theirs: dl.Run) -> None:
    """Assert that two runs are bit by bit the same, in all that they recorded and in their trajectories."""
    assert [entry.cell for entry in ours.activations] == [entry.cell for entry in theirs.activations]
    for one, other in zip(ours.activations, theirs.activations, strict=True):
        assert torch.equal(one.tensor, other.tensor), one.cell
    assert torch.equal(ours.latents, theirs.latents)
    assert set(ours.outputs) == set(theirs.outputs)
    assert all(torch.equal(ours.outputs[branch], theirs.outputs[branch]) for branch in ours.outputs)


@every
def test_recording_changes_no_bit(small: SmallPipeline) -> None:
    found = runs(small.name)
    for run in (found.bare, *found.whole.values()):
        if small.name == "dit":  # returns pictures, whatever it is asked for
            assert torch.equal(run.latents[-1], found.seen.made[-1][:1])
        else:
            assert torch.equal(run.latents[-1], torch.as_tensor(found.plain))
    if small.name == "dit":
        shown = found.lenses["hooks"].run(**inputs_of(small)).video
        assert shown is not None
        assert torch.equal(shown[:, 0], torch.as_tensor(found.plain))
    same(found.whole["hooks"], found.whole["nnsight"])
    assert found.whole["hooks"].activations
    assert fingerprint(found.pipe) == found.before


@both_engines
@every
def test_every_token_is_labelled_as_it_was_stamped(small: SmallPipeline, engine: str) -> None:
    found = runs(small.name)
    given = inputs_of(small, samples=1 if small.name in ONE_SAMPLE else 2)
    lens, stamper = found.lenses[engine], found.stamper
    lens.forecast(**given)
    stamper.begin(on=True)
    try:
        run = lens.run(**given, decode=False, record=STREAMS, seed=3)
    finally:
        stamper.on = False
    assert run.batch == (1 if small.name in ONE_SAMPLE else 2)
    assert run.layout.shape == small.layout
    assert run.branches == small.branches
    cells = run.activations.cells
    assert len(cells) == len(set(cells)) == len(stamper.stamped)
    assert {(c.expert, c.step, c.branch, c.block, c.site, c.stream) for c in cells} == set(stamper.stamped)
    forecast = lens.forecast(**given)
    slope, start = small.told
    for entry in run.activations:
        cell, seen = entry.cell, entry.tensor.flatten(1, 3)
        told = slope * cell.timestep + start
        expected = stamp(small, cell.expert, told, cell.branch, cell.block, cell.stream, seen, torch.arange(run.batch))
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5, msg=lambda text, cell=cell: f"{cell}: {text}")
        assert entry.tensor.shape[1:4] == (small.layout if cell.stream == "visual" else (1, 1, seen.shape[1]))
        assert cell.timestep == forecast.timesteps[cell.step] == run.timesteps[cell.step]
        assert cell.sigma == forecast.sigmas[cell.step] == pytest.approx(run.sigmas[cell.step].item())
        assert cell.expert == forecast.experts[cell.step] == run.experts[cell.step]


@every
def test_modules_are_seen_under_their_labels(small: SmallPipeline) -> None:
    """What attentions and MLPs returned, by torch hooks of the test's own; no two are alike, but before a prompt was read."""
    found = runs(small.name)
    alike: dict[bytes, list[Label]] = {}
    for label, tensor in found.returned.items():
        alike.setdefault(tensor.numpy().tobytes(), []).append(label)
    for labels in alike.values():
        differing = [len(set(values)) > 1 for values in zip(*labels, strict=True)]
        unread = labels[0][3:5] == (0, "attn") and differing == [False, False, True, False, False, False]
        assert len(labels) == 1 or unread, labels
    assert alike
    by_label = {
        (e.cell.expert, e.cell.step, e.cell.branch, e.cell.block, e.cell.site, e.cell.stream): e.tensor
        for e in found.whole["hooks"].activations
    }
    missing = set(found.returned) - set(by_label)
    assert not missing, missing
    for label, returned in found.returned.items():
        assert torch.equal(by_label[label].flatten(1, 3), tokens(returned)), label


def formed(answer: Tensor, sample: Tensor) -> Tensor:
    """A branch of the denoiser's answer as latents: without a variance, which is the second half of its channels."""
    return answer[:, : sample.shape[1]] if answer.ndim == sample.ndim else answer.view_as(sample)


@every
def test_the_trajectory_is_that_of_the_pipeline(small: SmallPipeline) -> None:
    found = runs(small.name)
    run, seen = found.whole["hooks"], found.seen
    assert run.steps == len(seen.received) == small.inputs["num_inference_steps"]
    assert run.timesteps == tuple(timestep for _, timestep in seen.received)
    assert run.experts == tuple(calls[0].expert for calls in seen.steps)
    assert run.sign == small.sign
    assert run.held == ((0,) if small.name == "wan-5b-image" else ())
    for step, (received, _) in enumerate(seen.received):
        sample = seen.samples[step][: run.batch]
        taken = seen.steps[step][0].latents[: run.batch]
        expected = torch.cat([taken[:, :, :1], sample[:, :, 1:]], dim=2) if run.held else sample
        assert torch.equal(run.latents[step], expected)
        assert torch.equal(run.velocity(step), received[: run.batch])
        for branch, answer in seen.answers(small, step).items():
            assert torch.equal(run.velocity(step, branch), formed(answer, sample))


@dataclass(frozen=True)
class Turned(dl.Edit):
    """Channels, one further."""

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        return activation.roll(1, dims=-1)


PLACES = (*((site, "visual") for site in ("resid", "update", "attn", "mlp", "heads")), ("resid", "text"))
"""(site, stream)."""


@every
def test_an_edit_changes_its_branch_from_its_step_on(small: SmallPipeline) -> None:
    """Each on plain hooks; all of them together give the same bits on both engines."""
    found = runs(small.name)
    branch, step = small.branches[-1], 1
    edits: list[dl.Edit] = []
    for site, stream in PLACES:
        there = [cell for cell in found.whole["hooks"].activations.cells if (cell.site, cell.stream) == (site, stream)]
        blocks = sorted({cell.block for cell in there})
        if blocks:
            # A text is heard in later blocks only.
            block = blocks[len(blocks) // 2] if stream == "visual" else blocks[0]
            edits.append(Turned(dl.at(block=block, step=step, branch=branch, site=site, stream=stream)))
            only_there(found, edits[-1], edited(found, "hooks", edits[-1]), block)
    assert len(edits) >= 4
    both = [edited(found, engine, edits) for engine in ENGINES]
    same(*both)
    assert both[0].fired == dict.fromkeys(range(len(edits)), 1)
    assert fingerprint(found.pipe) == found.before


def edited(found: Runs, engine: str, edits: Any) -> dl.Run:
    """A run until the step of the edits."""
    return found.lenses[engine].run(**inputs_of(found.small), decode=False, until=1, edits=edits, record=STREAMS)


def only_there(found: Runs, edit: dl.Edit, run: dl.Run, block: int) -> None:
    """Assert that an edit at step 1 changed that and nothing else: not the step before, the blocks before, the other branch."""
    clean, branch, stream = found.whole["hooks"], edit.at.branch, edit.at.stream
    assert run.fired == {0: 1}
    assert torch.equal(run.latents[:2], clean.latents[:2])
    assert not torch.equal(run.latents[2], clean.latents[2])
    for other in found.small.branches:
        assert torch.equal(run.velocity(0, other), clean.velocity(0, other))
        assert torch.equal(run.velocity(1, other), clean.velocity(1, other)) == (other != branch)
    for entry in run.activations:
        cell, before = entry.cell, clean.activations.one(**coordinates(entry.cell))
        untouched = cell.step < 1 or cell.branch != branch or cell.block < block
        if untouched or cell.stream == stream:
            assert torch.equal(entry.tensor, before) == untouched, (edit, cell)


def coordinates(cell: dl.Cell) -> dict[str, Any]:
    """Of a cell, to ask for it."""
    return {name: getattr(cell, name) for name in ("expert", "step", "branch", "block", "site", "stream")}


SCHEDULERS = [(small, name) for small in SMALL for name in small.schedulers]


def level(pipe: Any, step: int) -> float:
    """The noise level of a step, from the scheduler's own tables."""
    scheduler = pipe.scheduler
    if not hasattr(scheduler, "sigmas") or not scheduler.config.get("use_flow_sigmas", True):
        kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return ((1 - kept) / kept) ** 0.5 if kept else math.inf
    sigma = float(scheduler.sigmas[step])
    return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma


@pytest.mark.parametrize(("small", "name"), SCHEDULERS, ids=[f"{small.name}-{name}" for small, name in SCHEDULERS])
def test_steps_levels_and_bets_are_right_with_every_scheduler(small: SmallPipeline, name: str) -> None:
    """The denoiser knows the answer, which every branch then bets on at every step."""
    found = runs(small.name)
    pipe, lens, given = found.pipe, found.lenses["hooks"], inputs_of(small)
    own, pipe.scheduler = pipe.scheduler, small.schedulers[name]()
    try:
        forecast = lens.forecast(**given)
        target = torch.randn(found.bare.latents.shape[2:], generator=torch.Generator().manual_seed(2))
        with watching(pipe, small.experts) as seen:
            hook = all_knowing(pipe, small, target, seen)
            handles = [getattr(pipe, one).register_forward_hook(hook, with_kwargs=True, prepend=True) for one in small.experts]
            run = lens.run(**given, decode=False, record=dl.at(block=0))
            for handle in handles:
                handle.remove()
        levels = [level(pipe, step) for step in range(run.steps)]
    finally:
        pipe.scheduler = own
    assert run.scheduler == name
    assert forecast.timesteps == run.timesteps == tuple(timestep for _, timestep in seen.received)
    assert list(forecast.sigmas) == pytest.approx(levels, rel=1e-5)
    assert run.sigmas.tolist() == pytest.approx(levels, rel=1e-5)
    assert {(cell.step, cell.sigma) for cell in run.activations.cells} == set(enumerate(forecast.sigmas))
    for step in range(run.steps):
        for branch in ("guided", *small.branches):
            bet = run.x0_hat(step, branch)[0]
            if run.held:  # where the pipeline shows an image, that is what is bet on
                assert torch.equal(bet[:, 0], run.latents[-1, 0, :, 0])
            free = slice(len(run.held), None)
            torch.testing.assert_close(bet[:, free], target[:, free], rtol=2e-3, atol=2e-3)


@every
def test_calls_are_made_again_and_answers_stand_for_them(small: SmallPipeline) -> None:
    found = runs(small.name)
    lens, whole = found.lenses["hooks"], found.whole["hooks"]
    run = lens.run(**inputs_of(small), decode=False, keep_calls=True, until=1)
    assert set(run.calls) == {(step, branch) for step in (0, 1) for branch in small.branches}
    for branch in small.branches:
        again = lens.replay(run.calls[1, branch], record=STREAMS)
        assert torch.equal(again.velocity, whole.velocity(1, branch))
        assert torch.equal(again.x0_hat, whole.x0_hat(1, branch))
        assert again.activations
        for entry in again.activations:
            assert torch.equal(entry.tensor, whole.activations.one(**coordinates(entry.cell))), entry.cell
    stored = {place: answer for place, answer in whole.answers().items() if place[0] == 1}
    assert torch.equal(lens.run(**inputs_of(small), decode=False, answers=stored).latents, whole.latents)


@every
def test_a_description_names_experts_streams_and_sites(small: SmallPipeline) -> None:
    found = runs(small.name)
    rows = dict(found.lenses["hooks"].describe().rows)
    cells = found.whole["hooks"].activations.cells
    assert rows["pipeline"] == type(found.pipe).__name__
    assert set(rows["streams"].split(", ")) == {cell.stream for cell in cells}
    assert set(rows["sites"].split(", ")) == {cell.site for cell in cells}
    for expert in small.experts:
        count = len(parts(getattr(found.pipe, expert)))
        assert rows[expert].startswith(f"{count} blocks")
        assert {cell.block for cell in cells if cell.expert == expert} == set(range(count))


def test_latents_are_decoded_as_the_pipeline_does_it_or_not_at_all(tmp_path: Path) -> None:
    """The last latents hold the image where the pipeline shows it, also in a run that was written and read."""
    lens = runs("wan-5b-image").lenses["hooks"]
    run = lens.run(**inputs_of(PIPELINES["wan-5b-image"]))
    run.save(tmp_path)
    read = dl.Run.load(tmp_path)
    assert run.video is not None
    assert torch.equal(lens.decode(read.latents[-1]), run.video)
    assert read.held == (0,)
    assert torch.equal(read.x0_hat(1)[:, :, 0], run.latents[-1][:, :, 0])
    assert torch.equal(dl.Run.joined([read, read]).x0_hat(1)[:1], run.x0_hat(1))
    lens = runs("mochi").lenses["hooks"]
    run = lens.run(**inputs_of(PIPELINES["mochi"]))
    assert run.video is not None
    torch.testing.assert_close(lens.decode(run.latents[-1]), run.video, rtol=1e-4, atol=1e-4)
    for name in ("flux", "qwen-image", "cogvideox", "stable-audio"):
        with pytest.raises(dl.InputError, match="cannot be decoded alone, only those of videos that the VAE scales by its"):
            runs(name).lenses["hooks"].decode(runs(name).bare.latents[-1])


@every
def test_several_samples_are_the_pipelines_own(small: SmallPipeline) -> None:
    """Two prompts with two seeds each: the bits of the pipeline with these generators, prompt by prompt."""
    found = runs(small.name)
    given, lens = inputs_of(small, samples=2), found.lenses["nnsight"]
    if small.name in ONE_SAMPLE:
        with pytest.raises(ValueError, match="Passing a list of prompts is not yet supported"):
            lens.run(**given, decode=False)
        return
    run = lens.run(**given, seed=[3, 4], record=dl.at(block=0, site="attn"), decode=small.name == "dit")
    plain = torch.as_tensor(lens.plain(**{**small.inputs, **given}, seed=[3, 4], return_dict=False)[0])
    result = run.latents[-1] if run.video is None else run.video[:, 0]
    assert torch.equal(result, plain)
    assert run.seeds == (3, 4, 3, 4)
    assert run.batch == len(run.prompts) == 4
    assert torch.equal(run.latents[0, :2], run.latents[0, 2:]), "the same seed draws the same noise"
    assert not torch.equal(run.latents[0, 0], run.latents[0, 1])
    assert not torch.equal(run.velocity(0, "cond")[:2], run.velocity(0, "cond")[2:]), "another prompt"
    if "uncond" in small.branches:
        torch.testing.assert_close(run.velocity(0, "uncond")[:2], run.velocity(0, "uncond")[2:], rtol=1e-4, atol=1e-5)


def test_a_forecast_follows_the_noise_levels_that_are_asked_for() -> None:
    found = runs("stable-diffusion-3")
    for levels in ([1.0, 0.5, 0.2], [1.0, 0.7, 0.4]):
        given = {**inputs_of(found.small), "sigmas": levels}
        forecast = found.lenses["hooks"].forecast(**given)
        run = found.lenses["hooks"].run(**given, decode=False, record=dl.at(block=0, site="attn"))
        expected = [3 * level / (1 + 2 * level) for level in levels]  # the scheduler's shift is 3
        assert list(forecast.sigmas) == pytest.approx(expected)
        assert run.sigmas.tolist() == pytest.approx(expected)


@both_engines
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_labelled_is_refused(name: str, engine: str) -> None:
    pipe, given = pipeline(name), inputs_of(PIPELINES[name])
    lens = dl.wrap(pipe, engine=engine)
    lens.plain(**PIPELINES[name].inputs)
    before = fingerprint(pipe)
    for wanted in ((), STREAMS):
        with pytest.raises(dl.InputError, match=REFUSED[name]) as caught:
            lens.run(**given, decode=False, record=wanted)
        assert "\n" not in str(caught.value)
    assert fingerprint(pipe) == before


def test_z_image_at_a_size_without_padding_is_read_at_that_size_only() -> None:
    """How many tokens are padding depends on the size: what is text at one size may be a picture's padding at another."""
    usual = inputs_of(PIPELINES["z-image"])
    given = {**usual, "height": 16, "width": 32}
    lens = dl.wrap(pipeline("z-image"))
    run = lens.run(**given, decode=False, record=dl.at(step=0, stream=["visual", "text"]))
    assert {cell.stream for cell in run.activations.cells} == {"visual", "text"}
    with pytest.raises(dl.InputError, match="hold for that only, as how many tokens are padding depends on the size"):
        lens.run(**usual, decode=False)


def test_a_video_of_several_segments_is_refused() -> None:
    """Animate goes through its schedule once for each."""
    found = runs("wan-animate")
    given = inputs_of(found.small)
    longer = {name: given[name] + given[name][:8] for name in ("pose_video", "face_video")}
    with pytest.raises(dl.InputError, match=r"more steps than its scheduler has timesteps .* give arguments for one segment"):
        found.lenses["hooks"].run(**{**given, **longer}, decode=False)
    assert fingerprint(found.pipe) == found.before


def test_the_page_says_what_the_lens_sees() -> None:
    rows = []
    for small in PIPELINES.values():
        found = None if small.name in REFUSED else runs(small.name)
        rows.append(looked_at(small) if found is None else seen(small, found.lenses["hooks"], found.whole["hooks"]))
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(rows), "docs/pipelines.md is stale: run python -m dit_lens.small_pipelines"
    assert [row.small.name for row in rows if row.verdict == "works"] == [small.name for small in SMALL]
