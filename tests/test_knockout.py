"""Attention knockout: who attends to whom is cut as said, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import WIDTH
from test_edits import run, same

import dit_lens as dl

HEADS = 2
CORNER = torch.tensor([[True, False], [False, False]])
FRAMES = torch.arange(2).repeat_interleave(4)


@pytest.fixture
def lens(image_pipe: Any, engine: str) -> dl.Lens:
    return dl.wrap(image_pipe, engine=engine)


def heads_after(lens: dl.Lens, *knockouts: dl.KnockoutAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the output projection in block 1, and what a naive softmax over the allowed keys gives there."""
    place = dl.at(block=1, step=1, branch="cond", site=["q", "k", "v", "heads"])
    found = run(lens, *knockouts, record=place, seed=[3, 4])
    q, k, v, heads = (found.activation(site=site).flatten(1, 3).transpose(1, 2) for site in ("q", "k", "v", "heads"))
    cut = torch.zeros(8, 8, dtype=torch.bool)
    for knockout in knockouts:
        cut |= ~knockout.allowed(found.layout, 8, "attn")
    scores = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).masked_fill(cut, -torch.inf)
    return heads, torch.softmax(scores, dim=-1).nan_to_num(0) @ v


def test_what_is_left_is_a_softmax_over_the_allowed_keys(lens: dl.Lens) -> None:
    at = dl.at(block=1, site="attn")
    for knockouts in (
        [dl.KnockoutAttention.causal_frames(at)],
        [dl.KnockoutAttention.first_frame(at)],
        [dl.KnockoutAttention(at, queries=CORNER, keys=CORNER.expand(2, -1, -1))],
        [dl.KnockoutAttention(at, queries=CORNER)],
        [dl.KnockoutAttention(at, queries=CORNER), dl.KnockoutAttention.causal_frames(at)],
        [dl.KnockoutAttention(at, pairs=lambda layout, keys: torch.eye(layout.tokens, keys, dtype=torch.bool))],
        [dl.KnockoutAttention.causal_frames(at, baseline=True)],
    ):
        heads, expected = heads_after(lens, *knockouts)
        assert torch.allclose(heads, expected, atol=1e-5)


def test_who_may_attend_to_whom() -> None:
    layout, at = dl.Layout(2, 2, 2), dl.at(site="attn")
    causal = dl.KnockoutAttention.causal_frames(at).allowed(layout, 8, "attn")
    assert torch.equal(causal, FRAMES[:, None] >= FRAMES)
    first = dl.KnockoutAttention.first_frame(at).allowed(layout, 8, "attn")
    assert torch.equal(first, (FRAMES[:, None] == 0) | (FRAMES == 1))
    word = torch.tensor([False, True, False])
    text = dl.KnockoutAttention.text(dl.at(site="cross_attn"), word).allowed(layout, 3, "cross_attn")
    assert torch.equal(text, ~word.expand(8, 3))
    assert dl.KnockoutAttention.first_frame(at).compared().allowed(layout, 8, "attn").all()


def test_text_is_cut_where_it_is_read(lens: dl.Lens) -> None:
    with pytest.raises(dl.InputError, match=r"only visual tokens attend to each other: write site='cross_attn'"):
        run(lens, dl.KnockoutAttention.text(dl.at(site="attn", block=1)))


def test_without_text_the_prompt_has_no_effect(lens: dl.Lens) -> None:
    place = dl.at(block=1, site="cross_attn", step=2, branch="cond")
    everywhere = dl.KnockoutAttention.text(dl.at(site="cross_attn"))
    found = run(lens, everywhere, record=place)
    bias = lens.pipe.transformer.blocks[1].attn2.to_out[0].bias
    assert torch.equal(found.activation(site="cross_attn").flatten(1, 3)[0], bias.detach().expand(8, -1))
    assert found.fired == {0: 3 * 4 * 2}
    assert same(run(lens, everywhere, record=place, prompt="draw the red circle"), found)
    assert not same(run(lens, record=place, prompt="draw the red circle"), run(lens, record=place))


def test_causal_frames_keep_the_future_from_the_past(lens: dl.Lens) -> None:
    future = dl.AddNoise(dl.at(block=0, step=0, frames=1), dose=1.0)
    causal = dl.KnockoutAttention.causal_frames(dl.at(site="attn"))
    record = dl.at(step=0, frames=0, branch="cond")
    assert same(run(lens, causal, record=record, num_inference_steps=1), run(lens, record=record, num_inference_steps=1)) is False
    first, second = (run(lens, *edits, record=record, num_inference_steps=1) for edits in ([causal], [future, causal]))
    for ours, theirs in zip(first.activations, second.activations, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
    assert not torch.equal(first.latents, second.latents)


def test_a_baseline_is_near_the_plain_run_and_cuts_nothing(lens: dl.Lens) -> None:
    knockout = dl.KnockoutAttention(dl.at(block=1, site=["attn", "cross_attn"], step=1))
    baseline = run(lens, knockout.compared())
    assert torch.allclose(baseline.latents, run(lens).latents, atol=1e-5)
    assert baseline.fired == {0: 4}
    assert not torch.allclose(run(lens, knockout).latents, baseline.latents, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dl.KnockoutAttention(dl.at(block=1)), r"KnockoutAttention\(at\(block=1\)\) cuts attention: name site='attn' or"),
        (lambda: dl.KnockoutAttention(dl.at(site="attn", frames=1)), "say which tokens with queries= and keys=, not with"),
        (lambda: dl.KnockoutAttention.causal_frames(dl.at(site="cross_attn")), "attend to each other at site='attn'; write that"),
        (
            lambda: dl.KnockoutAttention(dl.at(site="attn"), queries=torch.ones(2, 2)),
            r"queries= is a mask of torch.float32 and shape \(2, 2\); write booleans on the layout, of shape \(2, 2\) or",
        ),
        (
            lambda: dl.KnockoutAttention.text(dl.at(site="cross_attn"), torch.ones(3, dtype=torch.bool)),
            r"keys= is a mask of torch.bool and shape \(3,\); write booleans of shape \(16,\), one for each text token",
        ),
        (
            lambda: dl.KnockoutAttention(dl.at(site="attn"), pairs=lambda layout, keys: torch.ones(2, 2, dtype=torch.bool)),
            r"pairs gave torch.bool of shape \(2, 2\); return booleans of shape \(queries, keys\) = \(8, 8\)",
        ),
        (
            lambda: dl.KnockoutAttention(dl.at(site="attn"), keys=CORNER, pairs=lambda layout, keys: torch.ones(8, 8)),
            "has pairs=, which is in place of queries= and keys=",
        ),
    ],
)
def test_masks_and_sites_that_do_not_fit_are_refused(image_pipe: Any, make: Any, message: str) -> None:
    ran: list[int] = []
    handle = image_pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(dl.InputError, match=message):
        run(dl.wrap(image_pipe, engine="hooks"), make())
    handle.remove()
    assert not ran
