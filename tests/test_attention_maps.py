"""Maps of attention, against the attention's own output and against the whole softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import arguments, shown, tiny_pipeline
from torch import Tensor

import dit_lens as dl
from dit_lens.architectures import WAN
from dit_lens.hooks import HookEngine
from dit_lens.taps import Tap, replaced_attribute

LAYOUT = (2, 2, 2)
HEADS = 2
GOAL = torch.tensor([[[True, False], [False, False]], [[False, False], [True, True]]])
HERE = {"block": 1, "step": 2, "branch": "cond"}


def weights(run: dl.Run) -> Tensor:
    """The whole softmax of a recorded call, (batch, heads, queries, keys)."""
    query, key = run.activation(site="qk", record=0).flatten(1, 3).transpose(1, 2).chunk(2, dim=-1)
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


def test_maps_are_of_the_attention_that_the_block_computes(image_pipe: Any, engine: str) -> None:
    records = [
        dl.at(**HERE, site=["qk", "q", "k", "v", "heads"]),
        dl.Record(dl.at(**HERE, site="qk"), dl.frame_map),
        dl.Record(dl.at(**HERE, site="qk"), dl.token_map(queries=GOAL)),
        dl.Record(dl.at(**HERE, site="qk", head=1), dl.frame_map),
        dl.Record(dl.at(**HERE, site="qk"), dl.token_map(queries=GOAL[0])),
    ]
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=records)
    site = {name: run.activation(site=name, record=0) for name in ("qk", "q", "k", "v", "heads")}
    assert torch.equal(site["qk"], torch.cat([site["q"], site["k"]], dim=-1))
    whole = weights(run)
    value = site["v"].flatten(1, 3).transpose(1, 2)
    assert torch.allclose((whole @ value).transpose(1, 2), site["heads"].flatten(1, 3), atol=1e-5)
    frames, tokens, one, corner = (run.activation(site="qk", record=index) for index in range(1, 5))
    assert frames.shape == (1, HEADS, 2, 2)
    assert torch.allclose(frames, whole.unflatten(3, (2, 4)).sum(4).unflatten(2, (2, 4)).mean(3), atol=1e-6)
    assert torch.allclose(frames.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.equal(one, frames[:, 1:])
    assert tokens.shape == (1, HEADS, *LAYOUT)
    assert torch.allclose(tokens, whole[:, :, GOAL.flatten()].mean(2).unflatten(-1, LAYOUT), atol=1e-6)
    everywhere = GOAL[:1].expand(2, 2, 2).flatten()
    assert torch.allclose(corner, whole[:, :, everywhere].mean(2).unflatten(-1, LAYOUT), atol=1e-6)


def test_maps_change_nothing_and_both_engines_agree(any_pipe: Any) -> None:
    record = [dl.Record(dl.at(site="qk"), dl.frame_map), dl.Record(dl.at(site="qk"), dl.token_map(GOAL))]
    runs = [dl.wrap(any_pipe, engine=name).run(**arguments(any_pipe), record=record) for name in ("nnsight", "hooks")]
    assert torch.equal(shown(runs[0]), shown(dl.wrap(any_pipe).run(**arguments(any_pipe))))
    assert len(runs[0].activations) == 2 * 3 * 4 * 2
    for ours, theirs in zip(*(run.activations for run in runs), strict=True):
        assert ours.cell == theirs.cell
        assert torch.equal(ours.tensor, theirs.tensor)


@pytest.mark.parametrize("reduce", [dl.full, dl.frame_map, dl.token_map(GOAL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_maps_are_known_before(reduce: Any, dtype: torch.dtype) -> None:
    pipe = tiny_pipeline()
    pipe.transformer.to(dtype)
    lens = dl.wrap(pipe, engine="hooks")
    record = dl.Record(dl.at(site="qk", block=[0, 1]), reduce)
    kept = lens.run(**arguments(pipe), record=record).activations.nbytes
    lens.run(**arguments(pipe), record=record, limit_bytes=kept)
    with pytest.raises(dl.InputError, match="would keep"):
        lens.run(**arguments(pipe), record=record, limit_bytes=kept - 1)


@pytest.mark.parametrize("reduce", [dl.frame_map, dl.token_map(GOAL)])
@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"site": "heads"}, r"is computed from queries and keys, and not at the site 'heads': write site='qk'"),
        ({"site": ["q", "qk"]}, r"not at the site 'q': write site='qk'"),
        ({}, r"not at the site 'resid'"),
        ({"site": "qk", "frames": 0}, r"at\(site='qk', frames=0\): .* needs all tokens, so leave frames= and tokens= out"),
        ({"site": "qk", "tokens": GOAL}, r"needs all tokens, so leave frames= and tokens= out"),
    ],
)
def test_maps_of_anything_else_are_refused_before_a_block_runs(
    image_pipe: Any, reduce: Any, selection: Any, message: str
) -> None:
    ran: list[int] = []
    image_pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(dl.InputError, match=message):
        dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe), record=dl.Record(dl.at(**selection), reduce))
    assert not ran


@pytest.mark.parametrize("mask", [torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2), torch.ones(4, dtype=torch.bool)])
def test_masks_of_queries_are_checked(mask: Tensor) -> None:
    with pytest.raises(dl.InputError, match="a mask of booleans on the layout with at least one token"):
        dl.token_map(mask)


def test_a_mask_of_queries_of_another_layout_is_refused(image_pipe: Any) -> None:
    record = dl.Record(dl.at(site="qk"), dl.token_map(torch.ones(3, 2, dtype=torch.bool)))
    with pytest.raises(
        dl.InputError, match=r"has shape \(3, 2\), .* is \(2, 2, 2\); write a mask of shape \(2, 2\) or \(2, 2, 2\)"
    ):
        dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe), record=record)


def test_queries_and_keys_are_what_replacements_left(image_pipe: Any) -> None:
    seen: list[Tensor] = []
    taps = [Tap("transformer", 1, "k", torch.zeros_like), Tap("transformer", 1, "qk", lambda tensor: seen.append(tensor))]
    with replaced_attribute(image_pipe, "_progress_bar_config", {"disable": True}):
        HookEngine(image_pipe, WAN).call(lambda: image_pipe(**arguments(image_pipe), output_type="latent"), taps)
    assert all(tensor[..., :8].any() and not tensor[..., 8:].any() for tensor in seen)
