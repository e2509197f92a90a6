"""The layer lens: the head on any block's stream, plain and tuned, on models whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH, arguments, picture
from torch import Tensor, nn

import dit_lens as dl


class AffineBlock(nn.Module):
    """A block that takes every token through one affine map."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        self.offset = torch.randn(WIDTH, generator=generator)

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return hidden_states @ self.matrix + self.offset


@pytest.fixture
def affine_pipe(image_pipe: Any) -> Any:
    """A pipeline of which only the first block is a transformer block."""
    for index in range(1, BLOCKS):
        image_pipe.transformer.blocks[index] = AffineBlock(index)
    return image_pipe


def test_later_blocks_have_no_part_in_it(any_pipe: Any, engine: str) -> None:
    lens = dl.wrap(any_pipe, engine=engine)
    run = lens.run(**arguments(any_pipe), seed=[1, 2], record=dl.at(), keep_calls=True, decode=False)
    for place in [(0, "cond"), (3, "uncond")]:
        call = run.calls[place]
        denoiser = getattr(any_pipe, call.expert)
        for block in range(BLOCKS):
            seen = dl.layer_lens(lens, call, block)
            skips = [later.register_forward_hook(lambda m, args, out: args[0]) for later in denoiser.blocks[block + 1 :]]
            with torch.no_grad():
                expected = denoiser(**call.kwargs)[0]
            for skip in skips:
                skip.remove()
            assert torch.equal(seen.velocity, expected)
            stored = dl.layer_lens(lens, call, block, stream=run.activation(block, *place))
            assert torch.equal(stored.velocity, expected)
            weights = run.weights[place[0]]
            assert weights is not None
            assert torch.allclose(seen.x0_hat, weights[0] * run.latents[place[0]] + weights[1] * expected)
        assert torch.equal(dl.layer_lens(lens, call, -1).velocity, run.velocity(*place))
        assert not torch.equal(dl.layer_lens(lens, call, 0).velocity, run.velocity(*place))


def test_the_tuned_form_finds_what_affine_blocks_do(affine_pipe: Any, engine: str) -> None:
    lens = dl.wrap(affine_pipe, engine=engine)
    inputs = arguments(affine_pipe)
    fitted = lens.run(**inputs, seed=range(4), record=dl.at(), decode=False)
    tuned = dl.fit_tuned_lens(lens, fitted, ridge=1e-9)
    other = {**inputs, "prompt": "draw the red circle", "image": picture((20, 30, 200))}
    run = lens.run(**other, seed=9, record=dl.at(), keep_calls=True, decode=False)
    matrices = [block.matrix for block in affine_pipe.transformer.blocks[1:]]
    assert torch.allclose(tuned.map_at("transformer", 0).weight, matrices[0] @ matrices[1], atol=1e-3)
    assert torch.allclose(tuned.map_at("transformer", 1).weight, matrices[1], atol=1e-3)
    assert all(share > 0.9999 for share in tuned.explained(lens, run).values())
    for (step, branch), call in run.calls.items():
        for block in range(BLOCKS):
            seen = dl.layer_lens(lens, call, block, tuned=tuned).velocity
            assert torch.allclose(seen, run.velocity(step, branch), atol=1e-3)
            stored = dl.layer_lens(lens, call, block, tuned=tuned, stream=run.activation(block, step, branch)).velocity
            assert torch.allclose(seen, stored, atol=1e-5)
        plain = dl.layer_lens(lens, call, 0).velocity
        assert not torch.allclose(plain, run.velocity(step, branch), atol=1e-1)


def test_much_ridge_leaves_the_plain_form_and_a_mean(affine_pipe: Any) -> None:
    lens = dl.wrap(affine_pipe, engine="hooks")
    run = lens.run(**arguments(affine_pipe), record=dl.at(), decode=False)
    tuned = dl.fit_tuned_lens(lens, [run, run], ridge=1e9)
    added = torch.cat([run.activation(2, s, b) - run.activation(0, s, b) for s in range(run.steps) for b in run.branches])
    assert torch.allclose(tuned.map_at("transformer", 0).weight, torch.eye(WIDTH), atol=1e-6)
    assert torch.allclose(tuned.map_at("transformer", 0).bias, added.flatten(0, 3).mean(0), atol=1e-4)
    shares = tuned.explained(lens, run)
    last, first = (
        torch.cat([run.activation(block, s, b) for s in range(run.steps) for b in run.branches]).flatten(0, 3) for block in (2, 0)
    )
    missed = last - first - (last - first).mean(0)
    expected = 1 - missed.square().sum() / (last - last.mean(0)).square().sum()
    assert shares["transformer", 0] == pytest.approx(float(expected), abs=1e-4)


def test_what_the_layer_lens_cannot_do_is_refused(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    run = lens.run(**arguments(image_pipe), record=dl.at(block=[1, 2]), keep_calls=True, decode=False)
    call = run.calls[0, "cond"]
    with pytest.raises(dl.InputError, match="block 3 is out of range: transformer has 3 blocks, write 0 to 2"):
        dl.layer_lens(lens, call, 3)
    with pytest.raises(dl.InputError, match="no map for block 0 of transformer; it has block 1 of transformer"):
        dl.layer_lens(lens, call, 0, tuned=dl.fit_tuned_lens(lens, run))
    with pytest.raises(dl.InputError, match="no pair of streams to fit on"):
        dl.fit_tuned_lens(lens, lens.run(**arguments(image_pipe), record=dl.at(block=1), decode=False))
    with pytest.raises(dl.InputError, match="write a number above zero"):
        dl.fit_tuned_lens(lens, run, ridge=0.0)
