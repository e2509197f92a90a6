"""Planted models do what they say, and every entry of the table of tools holds, checked without the library's edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from playback import BRANCHES, FRAME_TOKENS, Change, Moment, Played, attributed, play, prepared
from sklearn.linear_model import RidgeClassifier
from torch import Tensor

import dit_lens as dl
from dit_lens.plants import KINDS, TABLE, TOOLS, Pair, Planted, Truth, planted
from dit_lens.plants.table import Place

EVERY = (*KINDS, "none")
SEEDS = (0, 1)


@cache
def model_of(kind: str, seed: int) -> Planted:
    """A model, built once; those of odd seeds are smaller."""
    return planted(kind, seed=seed, blocks=5 - seed % 2, steps=5 - seed % 2)


def effect(model: Planted, pair: Pair, clean: Tensor, edited: Tensor) -> Tensor:
    """How far each row went from the clean answer to the donor's: 0 not at all, 1 all the way."""
    return (model.answer(clean) - model.answer(edited)) / (2 * pair.clean.answer)


def given(played: Played, site: str, place: int, row: int = 0) -> Callable[[Tensor, Moment], Tensor]:
    """What a run that was kept had at a site."""
    return lambda value, moment: played.sites[site, place, *moment][row]


def in_frame(played: Played, frame: int, place: int) -> Callable[[Tensor, Moment], Tensor]:
    """The stream with the tokens of one frame from a run that was kept."""
    tokens = slice(0, FRAME_TOKENS) if frame == 0 else slice(-FRAME_TOKENS, None)

    def make(value: Tensor, moment: Moment) -> Tensor:
        value = value.clone()
        value[tokens] = played.sites["resid", place, *moment][0, tokens]
        return value

    return make


def one_head(played: Played, place: int, head: int) -> Callable[[Tensor, Moment], Tensor]:
    """All heads with one of them from a run that was kept."""

    def make(value: Tensor, moment: Moment) -> Tensor:
        value = value.clone()
        value[:, head * 16 : head * 16 + 16] = played.sites["heads", place, *moment][0][:, head * 16 : head * 16 + 16]
        return value

    return make


def edits(model: Planted, donor: Played, pool: Played) -> list[tuple[str, Place, Change]]:
    """Every edit of every tool, as changes of the playback; a tool that draws stands there with all that it can draw."""
    made: list[tuple[str, Place, Change]] = []
    for block in range(model.blocks):
        made += [
            (site, block, Change(site, block, given(donor, site, block)))
            for site in ("resid", "update", "attn", "cross_attn", "mlp")
        ]
        made += [("heads", (block, head), Change("heads", block, one_head(donor, block, head))) for head in range(4)]
        made += [
            ("resid_first_frame", block, Change("resid", block, in_frame(donor, 0, block))),
            ("resid_last_frame", block, Change("resid", block, in_frame(donor, -1, block))),
            ("zero", block, Change("update", block, lambda value, moment: torch.zeros_like(value))),
            ("mean", block, Change("update", block, lambda value, moment, b=block: pool.sites["update", b, *moment].mean(0))),
            ("knockout_text", block, Change("cross_heads", block, lambda value, moment: torch.zeros_like(value))),
            ("knockout_first_frame", block, Change("knockout", block, lambda value, moment: value)),
        ]
        made += [("resample", block, Change("update", block, given(pool, "update", block, row))) for row in range(4)]
    block = model.truth.block or 1
    update = given(donor, "update", block)
    made += [("update_by_branch", branch, Change("update", block, update, branches=[branch])) for branch in BRANCHES]
    for step in range(model.steps):
        made += [
            ("update_by_step", step, Change("update", block, update, steps=[step])),
            ("latents", step, Change("latents", step, lambda value, moment: donor.latents[moment[0]][0])),
        ]
    return made


def readable(model: Planted, count: int = 48) -> list[float]:
    """Whether a linear probe reads the answer from the stream of its frame after each block: 1 yes, 0 no better than chance."""
    samples = [pair.clean for pair in model.pairs(count, seed=7)]
    truth = model.truth
    where = (truth.step or 0, truth.branches[0])
    played = play(model, samples, keep=True, until=where[0])
    tokens = slice(0, FRAME_TOKENS) if truth.frame == 0 else slice(-FRAME_TOKENS, None)
    asked = np.array([sample.answer for sample in samples])
    order = np.random.default_rng(0).permutation(count)
    train, test = order[: count // 2], order[count // 2 :]
    found = []
    for block in range(model.blocks):
        features = played.sites["resid", block, *where][:, tokens].mean(1).numpy()
        probe = RidgeClassifier().fit(features[train], asked[train])
        found.append(2 * probe.score(features[test], asked[test]) - 1)
    return found


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_entry_of_the_table_holds(kind: str, seed: int) -> None:
    model = model_of(kind, seed)
    pair, *others = model.pairs(5, seed=seed)
    clean, donor = (play(model, [sample], keep=True) for sample in (pair.clean, pair.donor))
    pool = play(model, [other.clean for other in others], keep=True)
    made = edits(model, donor, pool)
    edited = play(model, [pair.clean], [[change] for _, _, change in made])
    effects = effect(model, pair, clean.final, edited.final).tolist()
    seen: dict[str, dict[Place, list[float]]] = {tool: {} for tool in TOOLS}
    for (tool, place, _), size in zip(made, effects, strict=True):
        seen[tool].setdefault(place, []).append(size)
    seen["skip"] = seen["zero"]  # a skipped block adds nothing
    predicted = attributed(model, pair.clean, clean, donor)
    seen["attribution"] = {block: [-moved / (2 * pair.clean.answer)] for block, moved in enumerate(predicted)}
    for tool in set(TOOLS) - {"probe"}:
        expected = model.expected(tool)
        assert set(seen[tool]) == set(expected), tool
        for place, sizes in seen[tool].items():
            near = 0.05 if expected[place] == 0 else 0.15 * max(1, abs(expected[place]))
            assert abs(np.mean(sizes) - expected[place]) < near, (tool, place, sizes, expected[place])


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_probe_reads_what_the_table_says(kind: str, seed: int) -> None:
    model = model_of(kind, seed)
    expected = model.expected("probe")
    for block, accuracy in enumerate(readable(model)):
        assert accuracy > 0.9 if expected[block] else abs(accuracy) < 0.6, (block, accuracy, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_clean_and_donor_give_different_and_right_answers(kind: str, seed: int) -> None:
    model = model_of(kind, seed)
    lens = model.lens("hooks")
    for pair in model.pairs(2, seed=seed):
        assert pair.clean.seed == pair.donor.seed
        assert pair.clean.answer == -pair.donor.answer
        for sample in (pair.clean, pair.donor):
            run = lens.run(**sample.inputs, seed=sample.seed, decode=False)
            assert model.decided(run.latents[-1]).item() == sample.answer
            assert 0.7 < model.answer(run.latents[-1]).item() * sample.answer < 1.3
            step = model.truth.step or 0
            shown = model.answer(run.velocity(step), of="velocity")
            assert 0.7 < shown.item() * sample.answer < 1.3


@pytest.mark.parametrize("seed", range(4))
def test_a_model_without_a_plant_answers_nothing_whatever_it_is_asked(seed: int) -> None:
    model = planted("none", seed=seed)
    lens = model.lens("hooks")
    for pair in model.pairs(2, seed=seed):
        clean, donor = (lens.run(**one.inputs, seed=one.seed, decode=False).latents[-1] for one in (pair.clean, pair.donor))
        assert model.decided(clean).item() == model.decided(donor).item() == 0
        assert abs((model.answer(clean) - model.answer(donor)).item()) < 1e-3
        assert pair.clean.inputs["prompt"] != pair.donor.inputs["prompt"]
        assert not torch.equal(pair.clean.inputs["image"], pair.donor.inputs["image"])


@pytest.mark.parametrize("kind", ["text", "step", "branch"])
def test_the_playback_does_what_the_pipeline_does(kind: str) -> None:
    model = model_of(kind, 1)
    sample = model.pairs(1)[0].donor
    run = model.lens("hooks").run(**sample.inputs, seed=sample.seed, decode=False)
    torch.testing.assert_close(play(model, [sample]).final, run.latents[-1], rtol=1e-4, atol=1e-4)


def test_both_engines_run_a_planted_model_and_its_inputs_go_through_the_pipeline_itself() -> None:
    model = model_of("copy", 0)
    sample = model.pairs(1)[0].clean
    runs = [
        model.lens(engine).run(**sample.inputs, seed=sample.seed, decode=False, record=dl.at(block=0, step=0))
        for engine in ("nnsight", "hooks")
    ]
    generator = [torch.Generator().manual_seed(sample.seed)]
    plain = model.pipe(**sample.inputs, generator=generator, output_type="latent").frames  # pyright: ignore
    assert torch.equal(runs[0].latents[-1], plain)
    assert torch.equal(runs[1].latents[-1], plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_redundant_answer_is_lost_only_with_both_of_its_blocks(seed: int) -> None:
    model = model_of("redundant", seed)
    pair = model.pairs(1, seed=seed)[0]
    places = (model.truth.block or 0, model.truth.second or 0)
    gone = [Change("update", place, lambda value, moment: torch.zeros_like(value)) for place in places]
    clean = play(model, [pair.clean])
    effects = effect(model, pair, clean.final, play(model, [pair.clean], [[gone[0]], [gone[1]], gone]).final)
    assert effects[:2].abs().max() < 0.05
    assert abs(effects[2] - 0.5) < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_a_distractor_writes_the_largest_update_and_its_loss_changes_nothing(seed: int) -> None:
    model = model_of("distractor", seed)
    pair = model.pairs(1, seed=seed)[0]
    clean, donor = (play(model, [sample], keep=True) for sample in (pair.clean, pair.donor))
    norms = [clean.sites["update", block, 0, "cond"].norm(dim=-1).mean().item() for block in range(model.blocks)]
    loudest = int(np.argmax(norms))
    assert loudest == model.truth.distractor != model.truth.block
    assert norms[loudest] > 3 * norms[model.truth.block or 0]
    changed = clean.sites["update", loudest, 0, "cond"] - donor.sites["update", loudest, 0, "cond"]
    assert changed.norm(dim=-1).mean() > norms[loudest], "it follows the answer"
    gone = Change("update", loudest, lambda value, moment: torch.zeros_like(value))
    assert effect(model, pair, clean.final, play(model, [pair.clean], [[gone]]).final).abs().max() < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_model_is_shown_matters_at_the_step_that_fixes_the_answer_and_at_no_other(seed: int) -> None:
    model = model_of("step", seed)
    pair = model.pairs(1, seed=seed)[0]
    clean = play(model, [pair.clean]).final
    donor = play(model, [pair.donor])
    condition = prepared(model, [pair.donor])["condition"]
    for step in range(model.steps):
        shown = play(
            model, [pair.clean], swapped=lambda now, inputs, at=step: inputs | ({"condition": condition} if now == at else {})
        )
        size = effect(model, pair, clean, shown.final).item()
        assert abs(size - (step == model.truth.step)) < 0.1, (step, size)
    after = donor.latents[(model.truth.step or 0) + 1]
    assert model.answer(after).item() * pair.donor.answer > 0.7, "the latents keep it"


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_mechanism_lives_in_the_branch_that_was_asked_for(branch: str) -> None:
    model = planted("branch", seed=5, branch=branch)
    assert model.truth.branches == (branch,)
    played = play(model, [pair.clean for pair in model.pairs(2)])
    other = BRANCHES[1 - BRANCHES.index(branch)]
    assert model.answer(played.velocities[0, branch]).abs().min() > 0.2
    assert model.answer(played.velocities[0, other]).abs().max() < 0.1


def test_places_are_as_given_and_otherwise_inside_and_differ_by_seed() -> None:
    model = planted("step", seed=3, block=4, head=2, step=0, blocks=6, steps=4)
    assert model.truth == Truth("step", 4, "attn", head=2, step=0)
    assert len(model.lens().architecture.block_list(model.pipe.transformer)) == 6
    pair = model.pairs(1)[0]
    assert model.decided(play(model, [pair.clean, pair.donor]).final).tolist() == [pair.clean.answer, pair.donor.answer]
    truths = [planted("redundant", seed=seed, blocks=6).truth for seed in range(6)]
    assert all(0 < (one.block or 0) < (one.second or 0) < 5 for one in truths)
    assert len(set(truths)) > 2


def test_a_seed_fixes_the_weights_and_leaves_the_global_random_state_alone() -> None:
    assert dl.planted is planted
    before = torch.get_rng_state()
    one, again, other = (planted("text", seed=seed, block=2).lens().hash for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_can_share_a_call_and_the_answer_has_a_gradient() -> None:
    model = model_of("copy", 1)
    pair = model.pairs(1)[0]
    shared = model.inputs([pair.clean, pair.donor])
    run = model.lens("hooks").run(**shared, seed=pair.clean.seed, decode=False)
    assert model.decided(run.latents[-1]).tolist() == [pair.clean.answer, pair.donor.answer]
    latents = run.latents[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(model.answer(latents).sum(), latents)
    assert gradient[:, 0, -1].min() > 0
    assert gradient[:, 0, :-1].abs().max() == gradient[:, 1:].abs().max() == 0
    assert [pair.clean.answer for pair in model.pairs(4)] == [1, -1, 1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "texts"}, "no kind 'texts'.*text.*none"),
        ({"kind": "text", "head": 1}, "has no head to choose"),
        ({"kind": "none", "block": 1}, "has no block to choose"),
        ({"kind": "copy", "step": 1}, "has no step to choose"),
        ({"kind": "copy", "block": 5}, "block=5 .* write one of 0, 1, 2, 3, 4"),
        ({"kind": "branch", "branch": "guided"}, "branch='guided' .* cond, uncond"),
        ({"kind": "mlp", "blocks": 2}, "blocks=2"),
    ],
)
def test_a_place_that_is_not_there_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        planted(**arguments)


def test_the_table_has_every_tool_for_every_kind_and_its_verdicts_fit_its_effects() -> None:
    assert set(TABLE) == set(EVERY)
    sigmas = [1.0, 0.9, 0.8, 0.5, 0.3, 0.0]
    truth = Truth("any", block=2, component="attn", head=1, step=2, branches=("cond",), second=3, distractor=1)
    for kind, row in TABLE.items():
        assert set(row) == set(TOOLS)
        for tool, entry in row.items():
            effects = entry.expected(truth, 5, 4, sigmas, 3.0)
            hit = [place for place, size in effects.items() if size]
            assert (entry.verdict == "silent") == (kind == "none")
            assert entry.reason
            assert bool(hit) == (entry.verdict not in ("blind", "silent")), (kind, tool)
            if entry.verdict == "names":
                assert hit in ([2], [2, 3], [(2, 1)], ["cond"]), (kind, tool)
            if entry.verdict == "boundary":
                assert 0 < len(hit) < len(effects), (kind, tool)
            if entry.verdict == "everywhere":
                assert len(hit) >= len(effects) - 1, (kind, tool)
    with pytest.raises(dl.InputError, match="no rule"):
        replace(TABLE["text"]["resid"], where="somewhere").expected(truth, 5, 4, sigmas, 3.0)
