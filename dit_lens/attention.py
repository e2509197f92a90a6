"""Scaled dot-product attention, computed again: with a mask, or as the weights that no attention kernel returns.

Queries, keys and values are (batch, tokens, heads, channels), as at the sites `q`, `k` and `v`. Everything runs over a few
queries at a time, since all weights of one call can take more memory than the model; the results of a query do not depend
on the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.errors import InputError

WEIGHTS = 2**26
"""How many weights (batch x heads x queries x keys) are computed at a time."""
MASKED = 2**25
"""How many entries of a mask (queries x keys) are given to torch at a time."""


def masked_attention(
    query: Float[Tensor, "batch queries heads channels"],
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads values"],
    allowed: Bool[Tensor, "... queries keys"],
    chunk: int | None = None,
) -> Float[Tensor, "batch queries heads values"]:
    """softmax(q k^T / sqrt(channels)) v over the allowed keys of each query, in the precision of the queries.

    A mask makes torch choose another kernel, which rounds differently even when it allows everything: compare with the
    mask that is all true, and not with the model's own call.

    Args:
        allowed: which key a query may see: (queries, keys), the same (batch or 1, queries, keys), or (batch or 1, heads
            or 1, queries, keys). A query without any gives exactly 0.
        chunk: how many queries at a time; by default as many as `MASKED` holds.

    Raises:
        InputError: the mask does not fit.
    """
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    mask = {2: allowed[None, None], 3: allowed[:, None] if allowed.ndim == 3 else allowed}.get(allowed.ndim, allowed)
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.shape[2:] != (queries, keys):
        raise InputError(
            f"a mask of shape {tuple(allowed.shape)} does not fit attention of {batch} x {heads} heads from {queries}"
            f" queries to {keys} keys; write (queries, keys), (batch, queries, keys) or (batch, heads, queries, keys)"
        )
    key, value, mask = key.transpose(1, 2), value.transpose(1, 2), mask.to(query.device)
    size = chunk or max(1, MASKED // keys)
    parts = []
    for rows, seen in zip(query.transpose(1, 2).split(size, dim=2), mask.split(size, dim=2), strict=True):
        # A softmax over nothing is not a number, and so are its gradients: such a query sees everything, and counts for nothing.
        blind = ~seen.any(dim=-1, keepdim=True)
        parts.append(scaled_dot_product_attention(rows, key, value, attn_mask=seen | blind).masked_fill(blind, 0))
    return torch.cat(parts, dim=2).transpose(1, 2)


def attention_weights(
    query: Float[Tensor, "batch queries heads channels"],
    key: Float[Tensor, "batch keys heads channels"],
    queries: Int[Tensor, " chosen"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch heads chosen keys"]:
    """softmax(q k^T / sqrt(channels)) in float32.

    Args:
        queries: the numbers of the query tokens whose weights to return; all of them when left out.
        chunk: how many queries at a time; by default as many as `WEIGHTS` holds.
    """
    return torch.cat(list(_weights(_chosen(query, queries), key, chunk)), dim=2)


def frame_weights(
    query: Float[Tensor, "batch tokens heads channels"],
    key: Float[Tensor, "batch tokens heads channels"],
    frames: int,
    chunk: int | None = None,
) -> Float[Tensor, "batch heads frames frames"]:
    """What share of their attention the tokens of one frame give to those of another: mean over the one, sum over the other.

    Args:
        frames: how many frames the tokens are, one after the other. chunk: as `attention_weights`.

    Returns:
        float32, (query frame, key frame) last; each row sums to 1.
    """
    shares = [part.unflatten(-1, (frames, -1)).sum(dim=-1) for part in _weights(query, key, chunk)]
    return torch.cat(shares, dim=2).unflatten(2, (frames, -1)).mean(dim=3)


def token_weights(
    query: Float[Tensor, "batch tokens heads channels"],
    key: Float[Tensor, "batch keys heads channels"],
    queries: Int[Tensor, " chosen"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch heads keys"]:
    """The mean weight that the chosen queries give to each key; float32, sums to 1. Arguments as `attention_weights`."""
    chosen = _chosen(query, queries)
    total = torch.zeros((), device=query.device)
    for part in _weights(chosen, key, chunk):
        total = total + part.sum(dim=2)
    return total / chosen.shape[1]


def _chosen(query: Tensor, queries: Tensor | None) -> Tensor:
    return query if queries is None else query.index_select(1, queries.to(query.device))


def _weights(query: Tensor, key: Tensor, chunk: int | None) -> Iterator[Tensor]:
    """The weights of a few queries at a time: float32, (batch, heads, some queries, keys)."""
    batch, count, heads, channels = query.shape
    # Tensors without storage tell shapes only, for which one step is enough.
    whole = count if query.is_meta else max(1, WEIGHTS // (batch * heads * key.shape[1]))
    columns = key.float().permute(0, 2, 3, 1)
    for rows in query.split(chunk or whole, dim=1):
        yield ((rows.float() * channels**-0.5).transpose(1, 2) @ columns).softmax(dim=-1)
