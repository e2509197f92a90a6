"""Rows: where one call of a denoiser holds the rows of several branches, each visitor is shown those of one at a time.

Below the lens nobody knows of batched guidance: engines show a whole call, and what visits sees one branch, as if it had a
call of its own. What a visitor replaces goes back into its rows; the other rows keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.schedule import Clock
from dit_lens.taps import Attention, Bypass, Tap


def by_branch(
    clock: Clock, taps: Sequence[Tap], bypasses: Sequence[Bypass], attentions: Sequence[Attention]
) -> tuple[list[Tap], list[Bypass], list[Attention]]:
    """The same taps, bypasses and attentions, asked branch by branch."""
    return (
        [replace(tap, visit=partial(_visit, clock, tap.visit)) for tap in taps],
        [replace(bypass, instead=partial(_instead, clock, bypass.instead)) for bypass in bypasses],
        [replace(attention, attend=partial(_attend, clock, attention.attend)) for attention in attentions],
    )


def _visit(clock: Clock, visit: Callable[[Tensor], Tensor | None], tensor: Tensor) -> Tensor | None:
    if len(clock.shared) == 1:
        return visit(tensor)
    parts = list(tensor.chunk(len(clock.shared)))
    replaced = False
    for place, branch in enumerate(clock.shared):
        with clock.within(branch):
            given = visit(parts[place])
        if given is not None:
            parts[place], replaced = given.to(tensor), True
    return torch.cat(parts) if replaced else None


def _instead(
    clock: Clock, instead: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor] | None], streams: Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    if len(clock.shared) == 1:
        return instead(streams)
    answers = []
    for place, branch in enumerate(clock.shared):
        with clock.within(branch):
            answers.append(instead({name: tensor.chunk(len(clock.shared))[place] for name, tensor in streams.items()}))
    given = [answer for answer in answers if answer is not None]
    if not given:
        return None
    if len(given) < len(answers):
        raise RuntimeError("a block cannot run for the rows of one branch and not for those of another in the same call")
    return {name: torch.cat([answer[name] for answer in given]) for name in given[0]}


def _attend(
    clock: Clock, attend: Callable[[Tensor, Tensor, Tensor], Tensor | None], query: Tensor, key: Tensor, value: Tensor
) -> Tensor | None:
    if len(clock.shared) == 1:
        return attend(query, key, value)
    parts = list(zip(*(tensor.chunk(len(clock.shared)) for tensor in (query, key, value)), strict=True))
    answers = []
    for branch, part in zip(clock.shared, parts, strict=True):
        with clock.within(branch):
            answers.append(attend(*part))
    if all(answer is None for answer in answers):
        return None
    plain = (
        scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in part)).transpose(1, 2) if answer is None else answer
        for part, answer in zip(parts, answers, strict=True)
    )
    return torch.cat([answer.to(query) for answer in plain])
