"""The random-weight control: the same model in everything but what it has learned."""

from typing import Any

import pytest
import torch
from conftest import arguments, tiny_pipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

import dit_lens as dl
from dit_lens.controls import random_weights


@pytest.mark.parametrize(("kind", "experts"), [("image", 1), ("text", 2)])
def test_only_the_denoisers_are_new(kind: str, experts: int) -> None:
    pipe = tiny_pipeline(WanPipeline, experts=2) if kind == "text" else tiny_pipeline()
    other = random_weights(pipe)
    assert other.vae is pipe.vae
    assert other.text_encoder is pipe.text_encoder
    for name in ("transformer", "transformer_2")[:experts]:
        old, new = getattr(pipe, name), getattr(other, name)
        assert old is not new
        assert old.config == new.config
        assert not new.training
        assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert other.config.get("boundary_ratio") == pipe.config.get("boundary_ratio")


def test_is_drawn_from_its_seed_and_leaves_the_global_one_alone(image_pipe: Any) -> None:
    before = torch.get_rng_state()
    one, same, other = random_weights(image_pipe), random_weights(image_pipe), random_weights(image_pipe, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(pipe.transformer.blocks[0].attn1.to_q.parameters()) for pipe in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_keeps_the_precision_of_every_weight(image_pipe: Any) -> None:
    image_pipe.transformer.blocks.to(torch.bfloat16)
    other = random_weights(image_pipe)
    kinds = [[p.dtype for p in pipe.transformer.parameters()] for pipe in (image_pipe, other)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds[0])) == 2


def test_runs(image_pipe: Any) -> None:
    run = dl.wrap(random_weights(image_pipe)).run(**arguments(image_pipe), decode=False)
    assert torch.isfinite(run.latents).all()
