"""Attention computed again, against the whole softmax written out."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_lens import attention
from dit_lens.attention import attention_weights, frame_weights, masked_attention, token_weights
from dit_lens.errors import InputError

BATCH, TOKENS, HEADS, CHANNELS = 2, 12, 3, 4


def parts(seed: int, keys: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; queries are large, so that weights are far from even."""
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(BATCH, TOKENS, HEADS, CHANNELS, generator=generator)
    key, value = torch.randn(2, BATCH, keys, HEADS, CHANNELS, generator=generator)
    return query, key, value


def written_out(query: Tensor, key: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The weights, (batch, heads, queries, keys), in double precision."""
    scores = torch.einsum("bqhc,bkhc->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    if allowed is not None:
        powers = powers * allowed
    return powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, TOKENS + 1), st.integers(1, 9), st.integers(2, 4))
def test_a_mask_leaves_what_it_allows(seed: int, chunk: int, keys: int, axes: int) -> None:
    query, key, value = parts(seed, keys)
    sizes = (BATCH, HEADS, TOKENS, keys) if axes == 4 else (BATCH, TOKENS, keys)[3 - axes :]
    allowed = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = masked_attention(query, key, value, allowed, chunk)
    weights = written_out(query, key, allowed if axes != 3 else allowed[:, None])
    assert torch.allclose(found, torch.einsum("bhqk,bkhc->bqhc", weights, value.double()).float(), atol=1e-5)
    blind = (~allowed.any(-1) if axes != 3 else ~allowed.any(-1)[:, None]).expand(BATCH, HEADS, TOKENS)
    assert (found.transpose(1, 2)[blind] == 0).all()


def test_keys_that_are_not_allowed_have_no_part_in_it() -> None:
    query, key, value = parts(0)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    allowed[:, 5:8] = False
    before = masked_attention(query, key, value, allowed)
    key[:, 5:8], value[:, 5:8] = 100.0, 100.0
    assert torch.equal(masked_attention(query, key, value, allowed), before)
    rest = [index for index in range(TOKENS) if not 5 <= index < 8]
    everything = torch.ones(TOKENS, len(rest), dtype=torch.bool)
    assert torch.allclose(masked_attention(query, key[:, rest], value[:, rest], everything), before, atol=1e-5)


def test_a_query_without_keys_gives_zeros_and_finite_gradients() -> None:
    query, key, value = tensors = [tensor.requires_grad_() for tensor in parts(1)]
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    allowed[3] = False
    found = masked_attention(query, key, value, allowed)
    assert not found[:, 3].any()
    found.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)
    assert query.grad is not None
    assert not query.grad[:, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_stays_and_chunks_change_little(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tensor.to(dtype) for tensor in parts(2))
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    whole = masked_attention(query, key, value, allowed)
    assert whole.dtype == dtype
    monkeypatch.setattr(attention, "MASKED", 5 * TOKENS)
    assert torch.allclose(masked_attention(query, key, value, allowed), whole, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    "shape", [(TOKENS,), (TOKENS, 5), (5, TOKENS, TOKENS), (1, 2, TOKENS, TOKENS), (1, 1, 1, TOKENS, TOKENS)]
)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    masked: Any = unwrap(masked_attention)  # below the checker of the tests, which knows the shapes too
    with pytest.raises(InputError, match=r"does not fit attention of 2 x 3 heads from 12 queries to 12 keys; write \(queries"):
        masked(*parts(0), torch.ones(shape, dtype=torch.bool))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, TOKENS + 1), st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=5))
def test_weights_are_the_softmax(seed: int, chunk: int, chosen: list[int]) -> None:
    query, key, _ = parts(seed, keys=7)
    expected = written_out(query, key).float()
    assert torch.allclose(attention_weights(query, key, chunk=chunk), expected, atol=1e-6)
    rows = attention_weights(query, key, torch.tensor(chosen), chunk)
    assert torch.allclose(rows, expected[:, :, chosen], atol=1e-6)
    assert torch.allclose(token_weights(query, key, torch.tensor(chosen), chunk), rows.mean(2), atol=1e-6)
    assert torch.allclose(token_weights(query, key, chunk=chunk), expected.mean(2), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, TOKENS + 1))
def test_frame_weights_are_means_of_sums(seed: int, frames: int, chunk: int) -> None:
    query, key, _ = parts(seed)
    found = frame_weights(query, key, frames, chunk)
    size = TOKENS // frames
    expected = written_out(query, key).unflatten(3, (frames, size)).sum(4).unflatten(2, (frames, size)).mean(3).float()
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)


def test_few_weights_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = parts(3)
    before = frame_weights(query, key, 3)
    monkeypatch.setattr(attention, "WEIGHTS", 5 * BATCH * HEADS * TOKENS)
    assert [part.shape[2] for part in attention._weights(query, key, None)] == [5, 5, 2]
    assert torch.allclose(frame_weights(query, key, 3), before, atol=1e-6)
