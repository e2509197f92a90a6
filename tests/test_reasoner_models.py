"""The reasoner's parts before training: their sizes, their words, and what training feeds them is what the pipeline does."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import nn

from dit_lens.reasoner import data, models
from dit_lens.reasoner.settings import CALL
from dit_lens.reasoner.tasks import TASKS
from dit_lens.reasoner.train_dit import Model


@pytest.fixture(scope="module")
def pipe() -> WanImageToVideoPipeline:
    """The whole pipeline with random weights, its latents off centre."""
    pipe = models.untrained()
    pipe.vae.register_to_config(latents_mean=[0.1 * i for i in range(8)], latents_std=[1 + 0.2 * i for i in range(8)])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(pipe: WanImageToVideoPipeline) -> Model:
    """Its denoiser and text encoder as they are trained."""
    return Model(pipe.transformer, pipe.text_encoder, pipe.tokenizer).eval()


def test_the_parts_are_wans_own_and_fit_together(pipe: WanImageToVideoPipeline) -> None:
    assert pipe.vae_scale_factor_spatial == pipe.vae_scale_factor_temporal == 4
    assert pipe.transformer.config.text_dim == pipe.text_encoder.config.d_model
    assert pipe.transformer.config.in_channels == 2 * pipe.vae.config.z_dim + 4
    parts = (pipe.transformer, pipe.text_encoder, pipe.vae)
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 24e6, "as bfloat16"


def test_a_seed_makes_the_same_weights_and_leaves_torchs_own_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (models.untrained(seed).transformer.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_prompt_is_read_whole_and_any_text_can_be() -> None:
    words = models.tokenizer()
    for prompt in (prompt for task in TASKS.values() for prompt in task.prompts()):
        numbers = words(prompt).input_ids
        assert words.unk_token_id not in numbers
        assert numbers[-1] == words.eos_token_id
        assert len(numbers) <= CALL["max_sequence_length"]
        assert words.decode(numbers, skip_special_tokens=True) == prompt
    assert words.unk_token_id not in words(string.printable.strip()).input_ids
    assert words.unk_token_id in words("↯").input_ids
    assert words("").input_ids == [words.eos_token_id]
    assert models.tokenizer().get_vocab() == words.get_vocab(), "trained the same way every time"


@torch.no_grad()
def test_prompts_are_embedded_as_the_pipeline_embeds_them(pipe: WanImageToVideoPipeline, model: Model) -> None:
    said = [0, 1, 50, 100, len(data.prompts()) - 1]
    prompts = [data.prompts()[number] for number in said]
    embedded = model.embed()
    assert embedded.shape == (len(data.prompts()), 64, 128)
    expected, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=64, device=torch.device("cpu")
    )
    assert torch.allclose(embedded[said], expected, atol=1e-5)
    assert embedded[said].abs().sum() > 0
    _, nothing = pipe.encode_prompt(prompts[1], negative_prompt="", max_sequence_length=64, device=torch.device("cpu"))
    assert nothing is not None
    assert torch.allclose(embedded[:1], nothing, atol=1e-5), "a dropped prompt is the empty one, as in guidance"


@torch.no_grad()
def test_training_calls_the_denoiser_as_the_pipeline_does(pipe: WanImageToVideoPipeline, model: Model) -> None:
    sample = TASKS["circle"].sample("train", 0, 5)
    calls: list[dict[str, Any]] = []

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    inputs = {**sample.inputs, "num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    handle = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        pipe(**inputs)
        conditional, unconditional = calls[2:4]  # of the second step, where sigma is not 1
        said = data.prompts().index(sample.prompt)
        clips = data.Clips(sample.boards[None], torch.tensor([said]).numpy())
        conditions = data.encode(pipe.vae, clips).conditions
        for call, number in ((conditional, said), (unconditional, 0)):
            sigma = call["timestep"].float() / 1000
            assert 0 < sigma.item() < 1
            model(call["hidden_states"][:, :8], sigma, conditions.float(), torch.tensor([number]))
            trained = calls[-1]
            assert torch.equal(trained["hidden_states"][:, :12], call["hidden_states"][:, :12]), "latents and mask channels"
            assert torch.allclose(trained["hidden_states"][:, 12:], call["hidden_states"][:, 12:], rtol=0.01, atol=0.01)
            assert torch.allclose(trained["timestep"], call["timestep"].float())
            assert torch.allclose(trained["encoder_hidden_states"], call["encoder_hidden_states"], atol=1e-5)
        first = conditional["hidden_states"][0, 8:12]
        assert (first[:, 0] == 1).all()
        assert not first[:, 1:].any()
    finally:
        handle.remove()
