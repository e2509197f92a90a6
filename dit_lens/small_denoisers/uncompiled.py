"""Attention with a mask of blocks, without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention.flex_attention import flex_attention


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, nothing is compiled; and torch's warning, once a process, that this is slow has been given, unseen."""
    tokens = torch.zeros(1, 1, 1, 16)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flex_attention(tokens, tokens, tokens)
        yield
