"""Pairs: what runs together has one row for each sample and seed, and every row knows its pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import picture, shown
from samples import Sample, sample, some_pairs

import dit_lens as dl
from dit_lens.pairs import batches, joined_inputs, rolled, run_pairs


def test_rows_are_pair_by_pair_and_seed_by_seed(image_pipe: Any) -> None:
    lens, pairs = dl.wrap(image_pipe, "hooks"), some_pairs(image_pipe, 3)
    runs = run_pairs(lens, pairs, [4, 5, 6], [8, 9], decode=False)
    assert runs.places == (4, 4, 5, 5, 6, 6)
    assert runs.pairs == tuple(pair for pair in pairs for _ in range(2))
    assert runs.clean.seeds == runs.donor.seeds == (8, 9) * 3
    for row, (pair, seed) in enumerate(zip(runs.pairs, runs.clean.seeds, strict=True)):
        for side in ("clean", "donor"):
            alone = lens.run(**getattr(pair, side).inputs, seed=seed, decode=False)
            torch.testing.assert_close(getattr(runs, side).latents[:, row], alone.latents[:, 0], rtol=1e-3, atol=1e-4)


def test_the_other_donors_are_those_of_the_next_pair_with_the_same_seed(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, "hooks")
    runs = run_pairs(lens, some_pairs(image_pipe, 3), [0, 1, 2], [8, 9], record=dl.at(block=1, step=[0, 1]))
    donor, other, rows = runs.donor, runs.other, [2, 3, 4, 5, 0, 1]
    assert torch.equal(other.latents, donor.latents[:, rows])
    assert all(torch.equal(other.outputs[name], output[:, rows]) for name, output in donor.outputs.items())
    assert torch.equal(shown(other), shown(donor)[rows])
    assert other.seeds == donor.seeds
    assert other.prompts == tuple(donor.prompts[row] for row in rows)
    assert len(other.activations) == len(donor.activations) == 4
    for one, moved in zip(donor.activations, other.activations, strict=True):
        assert moved.cell == one.cell
        assert torch.equal(moved.tensor, one.tensor[rows])
    assert not other.calls, "these are of other rows"
    assert runs.other is other, "turned once"
    assert torch.equal(rolled(other, 4).latents, donor.latents)
    held = runs.with_donor_activations(dl.Activations([]))
    assert len(held.donor.activations) == len(held.other.activations) == 0


def test_one_pair_has_no_other_donor(image_pipe: Any) -> None:
    runs = run_pairs(dl.wrap(image_pipe, "hooks"), some_pairs(image_pipe, 1), [0], [8, 9], decode=False)
    with pytest.raises(dl.InputError, match="needs two pairs in a batch, and here is one"):
        _ = runs.other


def test_arguments_of_single_samples_become_those_of_one_call() -> None:
    image = torch.rand(3, 4, 4)
    own = {"height": 4, "negative_prompt": "nothing", "last_image": None}
    one = Sample({**own, "prompt": "a", "image": image, "prompt_embeds": torch.zeros(1, 5, 2)})
    two = Sample({**own, "prompt": ["b"], "image": image[None], "prompt_embeds": torch.ones(5, 2)})
    for number, each in enumerate((one, two)):  # of one prompt already, as pipelines take them
        each.inputs.update(class_labels=[number], pooled_prompt_embeds=torch.ones(1, 3), prompt_attention_mask=torch.ones(1, 5))
    joined = joined_inputs([one, two])
    assert joined["prompt"] == ["a", "b"]
    assert joined["negative_prompt"] == ["nothing", "nothing"]
    assert joined["last_image"] is None
    assert joined["height"] == 4
    assert torch.equal(joined["image"], torch.stack([image, image]))
    assert joined["prompt_embeds"].shape == (2, 5, 2)
    assert joined["pooled_prompt_embeds"].shape == (2, 3)
    assert joined["prompt_attention_mask"].shape == (2, 5)
    assert joined["class_labels"] == [0, 1]
    assert joined_inputs([one]) == one.inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (({"prompt": "a", "height": 16}, {"prompt": "b", "height": 32}), "have one height=, and these have 16, 32"),
        (({"prompt": "a", "height": 16}, {"prompt": "b"}), "only some of these have height"),
        (
            ({"image": torch.zeros(3, 4, 4)}, {"image": torch.zeros(3, 8, 8)}),
            "image= of one shape, .* \\(3, 4, 4\\), \\(3, 8, 8\\)",
        ),
        (({"image": torch.zeros(3, 4, 4)}, {"image": picture((1, 2, 3))}), "image= of one shape, .*, Image"),
    ],
)
def test_samples_that_cannot_run_together_are_an_error(inputs: Any, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        joined_inputs([Sample(one) for one in inputs])


def test_what_has_no_inputs_is_no_sample() -> None:
    with pytest.raises(dl.InputError, match="a str is no sample"):
        joined_inputs(["walk"])


@pytest.mark.parametrize(
    ("clean", "donor", "message"),
    [
        ({}, {"num_inference_steps": 3}, "same frames, height, width, number of steps and guidance"),
        ({}, {"num_frames": 9}, "same frames"),
        ({}, {"guidance_scale": 1.0}, "branches cond, uncond, the donors' .* and cond:"),
        ({"prompt": ["walk", "draw"]}, {}, "1 pairs with 1 seeds gave 2 clean rows"),
    ],
)
def test_samples_that_do_not_make_a_pair_are_an_error(image_pipe: Any, clean: Any, donor: Any, message: str) -> None:
    one, two = sample(image_pipe, 0), sample(image_pipe, 1)
    pair = dl.Pair(Sample({**one.inputs, **clean}), Sample({**two.inputs, **donor}))
    with pytest.raises(dl.InputError, match=message):
        run_pairs(dl.wrap(image_pipe, "hooks"), [pair], [0], [0], decode=False)


def test_batches_hold_every_pair_once_the_smallest_first() -> None:
    for pairs in range(1, 12):
        for batch in range(1, 6):
            parts = batches(pairs, batch)
            assert sorted(place for part in parts for place in part) == list(range(pairs))
            assert 1 <= len(parts[0]) <= len(parts[-1]) <= batch
            assert len(parts[-1]) - len(parts[0]) <= 1
    with pytest.raises(dl.InputError, match="batch=0 holds no pair"):
        batches(3, 0)
