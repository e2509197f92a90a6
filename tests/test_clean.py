"""Clean runs: made once, as the lens makes them, in the order asked for, and never those of another schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_lens as dl
from dit_lens import controls, reasoner
from dit_lens.clean import CleanRuns
from dit_lens.errors import InputError

SHORT = {"num_inference_steps": 2, "num_frames": 5}


@pytest.fixture(scope="module")
def lens() -> Any:
    return dl.load("reasoner", engine="hooks")


@pytest.fixture(scope="module")
def clean(lens: Any, tmp_path_factory: pytest.TempPathFactory) -> CleanRuns:
    return CleanRuns(lens, tmp_path_factory.mktemp("clean"), SHORT)


def samples(*numbers: int) -> list[Any]:
    return [reasoner.task("circle").sample("test", number) for number in numbers]


def test_runs_are_those_of_the_lens_and_are_made_once(lens: Any, clean: CleanRuns) -> None:
    found = clean.runs(samples(0, 1), [0, 1], progress=False)
    direct = lens.run(**{**reasoner.inputs(samples(0, 1)), **SHORT}, seed=[0, 1])
    torch.testing.assert_close(found.latents, direct.latents, rtol=0, atol=0)
    torch.testing.assert_close(found.video, direct.video, rtol=0, atol=0)
    assert found.seeds == direct.seeds
    assert found.prompts == direct.prompts
    made = len(clean.store)
    again = clean.runs(samples(1, 0), [1], progress=False)
    assert len(clean.store) == made
    torch.testing.assert_close(again.latents, direct.latents[:, [3, 1]], rtol=0, atol=0)
    assert again.seeds == (1, 1)


def test_only_what_is_missing_is_made(clean: CleanRuns) -> None:
    clean.runs(samples(0, 1), [0, 1], progress=False)
    before = len(clean.store.rows)
    clean.runs(samples(1, 2), [0], progress=False)
    assert len(clean.store.rows) == before + 1


def test_a_sample_asked_for_twice_is_given_twice(clean: CleanRuns) -> None:
    found = clean.runs(samples(2, 2), [0], progress=False)
    assert found.batch == 2
    assert torch.equal(found.latents[:, 0], found.latents[:, 1])


def test_other_arguments_have_other_runs(lens: Any, clean: CleanRuns) -> None:
    other = CleanRuns(lens, clean.store.folder.parent, {**SHORT, "guidance_scale": 1.0})
    assert other.store.folder != clean.store.folder


def test_refuses_seeds_that_repeat(clean: CleanRuns) -> None:
    with pytest.raises(InputError, match=r"seeds that differ"):
        clean.runs(samples(0), [1, 1])


def test_rows_and_joins_of_runs(clean: CleanRuns) -> None:
    run = clean.runs(samples(0, 1), [0, 1], progress=False)
    parts = [run.rows([place]) for place in range(run.batch)]
    whole = dl.Run.joined(parts)
    assert torch.equal(whole.latents, run.latents)
    assert torch.equal(whole.x0_hat(1), run.x0_hat(1))
    with pytest.raises(InputError, match="this run has 4"):
        run.rows([4])
    with pytest.raises(InputError, match="no runs"):
        dl.Run.joined([])


def test_records_are_those_of_a_whole_run_though_few_calls_are_made(lens: Any, clean: CleanRuns) -> None:
    record = dl.at(block=[0, 5], step=1, branch="cond")
    whole = lens.run(**{**reasoner.inputs(samples(0, 1)), **SHORT}, seed=[0, 1], record=record)
    blocks = lens.architecture.block_list(lens.architecture.denoisers(lens.pipe)["transformer"])
    calls: list[None] = []
    hook = blocks[0].attn1.register_forward_hook(lambda *_: calls.append(None))
    found = clean.observed(samples(0, 1), record, [0, 1])
    hook.remove()
    assert len(calls) == 1
    for block in (0, 5):
        assert torch.equal(found.activation(block=block), whole.activation(block=block))
    assert torch.equal(found.latents, whole.latents)


def test_another_model_sees_the_same_latents(lens: Any, clean: CleanRuns) -> None:
    other = dl.wrap(controls.random_weights(lens.pipe), engine="hooks")
    record = dl.at(block=0, step=[0, 1], branch="cond")
    run = clean.runs(samples(0), [0], progress=False)
    found = clean.observed(samples(0), record, [0], lens=other)
    own = other.run(**{**reasoner.inputs(samples(0)), **SHORT}, seed=[0], record=record, decode=False)
    assert torch.equal(found.latents[:2], run.latents[:2])
    # At the first step all see the same noise; later the other model alone would be elsewhere.
    assert torch.allclose(found.activation(block=0, step=0), own.activation(block=0, step=0), atol=1e-5)
    assert not torch.allclose(found.activation(block=0, step=1), own.activation(block=0, step=1), atol=1e-2)


def test_a_pair_has_two_runs(lens: Any, clean: CleanRuns) -> None:
    pair = reasoner.pairs("circle", 1)[0]
    found = clean.runs(list(pair), [0], progress=False)
    direct = lens.run(**{**reasoner.inputs([pair.donor]), **SHORT}, seed=0)
    assert found.prompts == (pair.clean.prompt, pair.donor.prompt)
    torch.testing.assert_close(found.latents[:, [1]], direct.latents, rtol=0, atol=1e-4)
    assert not torch.allclose(found.latents[:, 0], found.latents[:, 1], atol=1e-2)
