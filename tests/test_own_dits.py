"""DiTs that are not diffusers', with loops of their own: the examples of docs/own, held to what is known without a lens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from own import BLOCKS, FOLDER, OWN, WORDS, Call, Own, module, watched
from torch import Tensor, nn

import dit_lens as dl
from dit_lens.architectures import record
from dit_lens.architectures.discovery import Undecided
from dit_lens.architectures.finding import find_in
from dit_lens.conformance import Conformance

LINES = 40


@pytest.fixture(params=list(OWN))
def own(request: pytest.FixtureRequest) -> Own:
    """Each example in turn."""
    return OWN[request.param]


def steps_of(own: Own, calls: list[Call]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """(latents, output) of every step by branch, as the examples say: in one call, cond first; or in two, cond first."""
    if own.file == "class_conditional":
        pairs = [zip(call.given["x"].chunk(2), call.said[:, :3].chunk(2), strict=True) for call in calls]
        return [dict(zip(own.branches, pair, strict=True)) for pair in pairs]
    latents = "latents" if own.file == "mmdit" else "clips"
    each = [(call.given[latents], call.said) for call in calls]
    size = len(own.branches)
    return [dict(zip(own.branches, each[place : place + size], strict=True)) for place in range(0, len(each), size)]


def test_a_run_is_the_loop_itself(own: Own, engine: str) -> None:
    pipe = own.pipe()
    calls, made = watched(own, pipe, own.inputs, seed=3)
    steps = steps_of(own, calls)
    for asked in ((), dl.at(site="all", stream="all")):
        run = dl.wrap(pipe, engine).run(**own.inputs, seed=3, record=asked)
        assert torch.equal(run.latents[-1], made)
        assert run.branches == own.branches
        assert run.steps == len(steps)
        for number, step in enumerate(steps):
            for branch, (latents, output) in step.items():
                assert torch.equal(run.latents[number], latents)
                assert torch.equal(run.velocity(number, branch), output)
    assert torch.equal(dl.wrap(pipe).plain(**own.inputs, seed=3), made)


def test_a_step_that_is_the_last_leaves_what_the_next_one_takes(own: Own) -> None:
    lens = dl.wrap(own.pipe(), "hooks")
    whole, part = lens.run(**own.inputs), lens.run(**own.inputs, until=1, decode=False)
    assert torch.equal(part.latents, whole.latents[:3])


def test_the_record_is_short(own: Own) -> None:
    """The record, and what stands in the file for nothing else: all that follows the sampler."""
    source = (FOLDER / f"{own.file}.py").read_text(encoding="utf-8")
    nodes = ast.parse(source).body
    last = max(place for place, node in enumerate(nodes) if isinstance(node, ast.ClassDef))
    rest = [node for node in nodes[last + 1 :] if not isinstance(node, ast.If)]
    assert ["RECORD" in ast.dump(node) for node in rest[-2:]] == [True, True]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in rest) <= LINES


def test_the_record_is_true(own: Own) -> None:
    """Every site on both engines, as reading and as edit, skips, sums, heads, attention and layout: the checks of conformance."""
    pipe = own.pipe()
    given = watched(own, pipe, own.inputs)[0][1].given
    checks = Conformance(own.denoiser(pipe), module(own.file).RECORD, given).checks()
    assert [check for check in checks if check.passed is False] == []
    idle = [check.name for check in checks if check.passed is None]
    masked = [] if own.file == "class_conditional" else ["attention computed from q, k and v is the model's own"]
    assert idle == ["contributions add up to the update", *masked]  # the records name no contributions


@cache
def stamped(name: str, engine: str) -> dl.Run:
    """A run of a model whose blocks add nothing and whose tokens say what its denoiser was given."""
    own = OWN[name]
    pipe = own.make(module(own.file))
    if name == "mmdit":
        # The vector of a word is its number.
        vectors = pipe.text_encoder.vectors
        vectors.weight.data = torch.arange(len(vectors.weight)).float()[:, None].expand_as(vectors.weight).clone()
    denoiser, seen = own.denoiser(pipe), list[Call]()
    names = list(denoiser.forward.__annotations__)

    def write(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(Call(dict(zip(names, args, strict=False)), args[0]))

    def stamp(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        streams = []
        for number, tokens in enumerate(args[: len(own.streams)]):
            marked = torch.zeros_like(tokens)
            time, condition = stamps(own, seen[-1])
            marked[..., 0] = time.repeat_interleave(tokens.shape[1] // time.shape[1], dim=1)
            marked[..., 1] = condition[:, None]
            marked[..., 2] = number
            marked[..., 3] = torch.arange(tokens.shape[1])
            streams.append(marked)
        return (*streams, *args[len(own.streams) :])

    denoiser.register_forward_pre_hook(write)
    denoiser.blocks[0].register_forward_pre_hook(stamp)
    return dl.wrap(pipe, engine).run(**own.inputs, record=dl.at(stream="all"))


def stamps(own: Own, call: Call) -> tuple[Tensor, Tensor]:
    """(rows, 1 or frames) timesteps and (rows,) what is asked for, as the denoiser is given them."""
    names = {"class_conditional": ("t", "y"), "mmdit": ("time", "text"), "causal_video": ("levels", "classes")}
    time, asked = (call.given[name].float() for name in names[own.file])
    return time.reshape(len(asked), -1), asked[:, -2, 0] if asked.ndim > 1 else asked


def test_cells_are_where_the_denoiser_says_that_they_are(own: Own, engine: str) -> None:
    run = stamped(own.file, engine)
    asked = {"class_conditional": (3, 10), "mmdit": (WORDS.index("blue"), len(WORDS)), "causal_video": (3,)}[own.file]
    assert len(run.activations) == run.steps * len(own.branches) * BLOCKS * len(own.streams)
    for entry in run.activations:
        cell, tokens = entry.cell, entry.tensor[0]
        assert tokens[..., 1].unique().tolist() == [asked[own.branches.index(cell.branch)]]
        assert tokens[..., 2].unique().tolist() == [own.streams.index(cell.stream)]
        assert torch.equal(tokens[..., 3].flatten(), torch.arange(tokens[..., 3].numel(), dtype=torch.float32))
        each = tokens[..., 0].flatten(1)[:, 0]
        assert each.double().mean().item() == pytest.approx(cell.timestep, abs=1e-6)
        assert cell.timestep == run.timesteps[cell.step]
        assert cell.expert == module(own.file).RECORD.experts[0]


def test_every_frame_keeps_its_own_noise_level() -> None:
    """Three frames, three calls each, each one call later than the frame before: what a reader counts by hand."""
    run = stamped("causal_video", "hooks")
    thirds = [[3, 3, 3], [2, 3, 3], [1, 2, 3], [0, 1, 2], [0, 0, 1]]
    for step, levels in enumerate(thirds):
        found = run.activation(block=1, step=step)[0, :, 0, 0, 0]
        assert found.tolist() == pytest.approx([level / 3 for level in levels])
    assert run.sigmas.tolist() == pytest.approx([sum(levels) / 9 for levels in thirds])


def knowing(own: Own, pipe: Any, answer: Tensor) -> None:
    """Let the denoiser say what is right for an answer that it knows; a variance is nonsense."""
    own_module = module(own.file)

    def forward(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        if own.file == "class_conditional":
            signal = own_module.SIGNAL[t].float().view(-1, 1, 1, 1)
            noise = (x - signal.sqrt() * answer) / (1 - signal).sqrt()
            return torch.cat([noise, torch.full_like(noise, 7)], dim=1)
        level = t[:, None, :, None, None] if t.ndim == 2 else t.view(-1, 1, 1, 1)
        return torch.where(level > 0, (x - answer) / level.clamp(min=1e-9), torch.full_like(x, 7))

    def call(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return forward(x, y if own.file == "class_conditional" else z)

    own.denoiser(pipe).forward = call


def test_x0_hat_is_the_answer_that_the_denoiser_knows(own: Own) -> None:
    """At every step, of every branch and guided; in every frame, at work, done or waiting."""
    pipe = own.pipe()
    shape = watched(own, pipe, own.inputs)[1].shape[1:]
    answer = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    knowing(own, pipe, answer)
    run = dl.wrap(pipe, "hooks").run(**own.inputs, keep_calls=True)
    for step in range(run.steps):
        for branch in ("guided", *own.branches):
            assert torch.allclose(run.x0_hat(step, branch)[0], answer, atol=2e-3), (step, branch)
    assert torch.allclose(run.latents[-1][0], answer, atol=2e-3)


def edits(lens: dl.Lens, own: Own, site: str, stream: str, donor: dl.Run, pool: dl.Run) -> list[Any]:
    """Every kind of edit, each at a step of its own."""
    at = dl.at(site=site, stream=stream, block=0, branch="cond")
    width = donor.activation(block=0, step=0, site=site, stream=stream).shape[-1]
    kinds = [
        dl.Patch(replace(at, step=0), donor),
        dl.Steer(replace(at, step=1), torch.linspace(-1, 1, width), scale=2.0),
        dl.AddNoise(replace(at, step=2), dose=0.5),
        dl.Mean(replace(at, step=3), pool),
        dl.Resample(replace(at, step=4), pool, seed=0),
        dl.Zero(dl.at(site=site, stream=stream, block=1, step=0, branch=own.branches[-1])),
        dl.Average(dl.at(site=site, stream=stream, block=1, step=1, branch=own.branches[-1])),
    ]
    if site == "update":
        kinds.append(dl.PatchUpdate(dl.at(site=site, stream=stream, block=1, step=2, branch="cond"), donor))
    return kinds


def offered(own: Own) -> Iterator[tuple[str, str]]:
    for name, stream in module(own.file).RECORD.stacks[0].offered:
        if name != "qk":
            yield name, stream


def test_every_edit_at_every_site_does_the_same_on_both_engines(own: Own) -> None:
    pipe = own.pipe()
    lenses = {engine: dl.wrap(pipe, engine) for engine in ("nnsight", "hooks")}
    everything = dl.at(site=[name for name, _ in offered(own)], stream="all", branch="cond")
    plain = lenses["hooks"].run(**own.inputs, seed=[0, 1])
    donor = lenses["hooks"].run(**{**own.inputs, **own.other}, seed=[0, 1], record=everything)
    for site, stream in offered(own):
        asked = edits(lenses["hooks"], own, site, stream, donor, donor)
        runs = [lens.run(**own.inputs, seed=[0, 1], edits=asked) for lens in lenses.values()]
        assert torch.equal(runs[0].latents, runs[1].latents), (site, stream)
        assert all(run.fired == dict.fromkeys(range(len(asked)), 1) for run in runs)
        assert not torch.equal(runs[0].latents[-1], plain.latents[-1]), (site, stream)


@pytest.mark.parametrize("name", ["class_conditional", "mmdit"])
def test_a_skip_and_a_knockout_do_the_same_on_both_engines(name: str) -> None:
    pipe, own = OWN[name].pipe(), OWN[name]
    mask = torch.tensor([[True, False], [False, False]])
    asked: list[Any] = [dl.KnockoutAttention(dl.at(site="attn", block=1, step=0), mask, ~mask), dl.Skip(dl.at(block=0, step=1))]
    runs = [dl.wrap(pipe, engine).run(**own.inputs, edits=asked) for engine in ("nnsight", "hooks")]
    assert torch.equal(runs[0].latents, runs[1].latents)
    assert not torch.equal(runs[0].latents[1], dl.wrap(pipe, "hooks").run(**own.inputs).latents[1])


QUERIES = torch.tensor([[True, False], [False, False]])
JOINT = dl.at(site="attn", block=0, step=0, branch="cond")


@pytest.mark.parametrize(
    ("cut", "queries", "keys"),
    [
        (dl.KnockoutAttention(JOINT, QUERIES, ~QUERIES), [4], [5, 6, 7]),
        (dl.KnockoutAttention.text(JOINT), [4, 5, 6, 7], [0, 1, 2, 3]),
        (dl.KnockoutAttention.text(JOINT, tokens=[False, True, False, False]), [4, 5, 6, 7], [1]),
    ],
    ids=["visual tokens from each other", "text", "a word"],
)
def test_a_knockout_in_joint_attention_cuts_what_it_names(cut: dl.KnockoutAttention, queries: list[int], keys: list[int]) -> None:
    """The oracle computes attention anew, with a mask of all pairs; the text comes first."""
    own = OWN["mmdit"]
    seen = dl.at(site=["q", "k", "v", "heads"], stream="all", block=0, step=0, branch="cond")
    run = dl.wrap(own.pipe(), "hooks").run(**own.inputs, edits=cut, record=seen)
    parts = {
        site: torch.cat([run.activation(0, 0, site=site, stream=stream).flatten(1, 3) for stream in ("text", "visual")], dim=1)
        for site in ("q", "k", "v", "heads")
    }
    allowed = torch.ones(8, 8, dtype=torch.bool)
    allowed[torch.tensor(queries)[:, None], torch.tensor(keys)] = False
    scores = torch.einsum("bqhc,bkhc->bhqk", parts["q"], parts["k"]) / 4
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    assert torch.allclose(torch.einsum("bhqk,bkhc->bqhc", weights, parts["v"]), parts["heads"], atol=1e-5)


def test_no_frame_hears_a_later_one() -> None:
    """What is changed in the last frame leaves the others; what is changed in the first one reaches all."""
    lens = dl.wrap(OWN["causal_video"].pipe(), "hooks")
    plain = lens.run(**OWN["causal_video"].inputs)
    for frame in (0, 2):
        noise = dl.AddNoise(dl.at(block=0, step=2, frames=[frame]), dose=1.0)
        changed = lens.run(**OWN["causal_video"].inputs, edits=noise)
        moved = (changed.latents[-1] != plain.latents[-1]).any(dim=4).any(dim=3).any(dim=1)
        assert moved[0].tolist() == [place >= frame for place in range(3)]


@dataclass(frozen=True)
class Given(dl.Edit):
    """Something else in the place of what was there."""

    instead: Any = None

    def apply(self, activation: Tensor, moment: dl.Moment) -> Tensor:
        return self.instead.view(activation.shape)


def test_sweep_replay_and_attribution(own: Own, tmp_path: Path) -> None:
    pipe = own.pipe()
    lens = dl.wrap(pipe, "hooks")

    @dataclass(frozen=True)
    class Sample:
        inputs: dict[str, Any]

    changes = [own.other, {name: value for name, value in own.inputs.items() if name in own.other}]
    pairs = [dl.Pair(Sample({**own.inputs, **one}), Sample({**own.inputs, **other})) for one, other in (changes, changes[::-1])]
    last = dl.Outcome("mean", lambda latents, _: latents.flatten(1).mean(dim=1), of="latents")
    over = dl.at(block="all", step=[0, 2], branch="cond", stream=list(own.streams))
    table = dl.sweep(lens, pairs, lambda cell, pair: dl.Patch(cell, pair.donor), over, last, progress=False).table
    assert len(table) == BLOCKS * 2 * 2 * len(own.streams)
    for row in table.to_dict("records"):
        # Each number is that of a run made by hand.
        pair = pairs[row["sample"]]
        at = dl.at(block=row["block"], step=row["step"], branch="cond", stream=row["stream"])
        donor = lens.run(**pair.donor.inputs, record=at)
        patched = lens.run(**pair.clean.inputs, edits=dl.Patch(at, donor))
        assert row["value"] == pytest.approx(patched.latents[-1].mean().item(), rel=1e-4, abs=1e-4)
    run = lens.run(**own.inputs, keep_calls=True)
    for (step, branch), call in run.calls.items():
        replay = lens.replay(call)
        assert torch.equal(replay.velocity, run.velocity(step, branch))
        assert torch.equal(replay.x0_hat, run.x0_hat(step, branch))
        seen = lens.replay(call, record=dl.at(stream="all", branch=branch)).activations
        streams = {stream: seen.one(block=0, stream=stream) for stream in own.streams}
        assert torch.equal(lens.replay(call, resume=dl.Resume(1, streams)).velocity, replay.velocity)
        turned = {stream: tokens.flip(-2) for stream, tokens in streams.items()}
        edit = [Given(dl.at(block=0, stream=stream, branch=branch, step=step), turned[stream]) for stream in own.streams]
        resumed = lens.replay(call, resume=dl.Resume(1, turned))
        assert torch.equal(resumed.velocity, lens.replay(call, edits=edit).velocity)
        assert not torch.equal(resumed.velocity, replay.velocity)
    bet = dl.Outcome("bet", lambda x0_hat, _: x0_hat.flatten(1).mean(dim=1), of="x0_hat")
    found = dl.attribute(lens, pairs, dl.at(block="all", site="mlp", step=1, branch="cond"), bet, progress=False)
    assert found.sign.estimate > 0.5
    run.save(tmp_path)
    loaded = dl.Run.load(tmp_path)
    assert torch.equal(loaded.x0_hat(2), run.x0_hat(2))
    assert loaded.weights == run.weights


def test_several_prompts_and_seeds_are_rows_of_their_own(own: Own) -> None:
    lens = dl.wrap(own.pipe(), "hooks")
    name = next(iter(own.other))
    one, other = own.inputs[name], own.other[name]
    both = [one, other] if isinstance(one, str) else [*one, *other]
    run = lens.run(**{**own.inputs, name: both}, seed=[4, 5])
    assert run.seeds == (4, 5, 4, 5)
    alone = lens.run(**{**own.inputs, name: other}, seed=5)
    assert torch.allclose(run.latents[-1][3], alone.latents[-1][0], atol=1e-4)


def test_describe_says_what_the_record_does(own: Own) -> None:
    text = str(dl.wrap(own.pipe()).describe())
    assert f"{BLOCKS} blocks (Block, width 64)" in text
    assert "a loop of its own" in text
    assert ", ".join(own.branches[:1]) in text


def test_without_a_record_stacks_and_sites_are_found_and_the_loop_is_refused(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, mine = own.pipe(), module(own.file).RECORD
    given = watched(own, pipe, own.inputs)[0][1].given
    found = find_in(own.denoiser(pipe), given)
    assert found.latents == mine.latents
    assert found.patches == mine.patches
    assert [(one.path, set(one.streams)) for one in found.stacks] == [(one.path, set(one.streams)) for one in mine.stacks]
    for block in range(BLOCKS):
        theirs = dict(found.stacks[0].variants).get(block, found.stacks[0])
        # The text of a last block is heard by nobody; all else is as the record says.
        ours = {(s.name, t) for s, t in ((mine.stacks[0].site(*place), place[1]) for place in mine.stacks[0].offered)}
        offered = set(theirs.offered) - {("qk", stream) for stream in own.streams}
        assert offered == ours - {("qk", stream) for stream in own.streams}
    monkeypatch.setattr(record, "_registered", [one for one in record._registered if one.name != mine.name])
    what = (
        "has no transformer, transformer_2; describe it" if own.file == "causal_video" else "has no scheduler, so that its steps"
    )
    with pytest.raises(Undecided, match=what):
        dl.wrap(pipe).run(**own.inputs)


def test_what_a_loop_cannot_offer_is_refused(own: Own) -> None:
    lens = dl.wrap(own.pipe(), "hooks")
    run = lens.run(**own.inputs)
    with pytest.raises(dl.InputError, match=r"latents of a \w+ cannot be replaced: its loop has no scheduler to ask"):
        lens.run(**own.inputs, edits=dl.ReplaceLatents(1, noise=0))
    with pytest.raises(dl.InputError, match=r"a \w+ has no vae to decode with"):
        lens.decode(run.x0_hat(0))
    assert run.video is None
