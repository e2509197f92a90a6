"""Finding the record of a pipeline, or of a denoiser alone, that nobody wrote one for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dit_lens.architectures.anatomy import anatomy
from dit_lens.architectures.arguments import Undecided
from dit_lens.architectures.discovery import discover
from dit_lens.architectures.guidance import first_call
from dit_lens.architectures.record import EXPERTS, Architecture
from dit_lens.architectures.stack import Stack
from dit_lens.architectures.watching import Call, watched
from dit_lens.errors import listed


def find(pipe: Any, inputs: Mapping[str, Any]) -> Architecture:
    """The record of a pipeline, from the first call of its denoiser in a run with these arguments.

    Raises:
        Undecided: what was seen allows no answer, or its experts are of different classes.
    """
    name = type(pipe).__name__
    denoisers = {expert: getattr(pipe, expert) for expert in EXPERTS if isinstance(getattr(pipe, expert, None), nn.Module)}
    if not denoisers:
        raise Undecided(f"a {name} has no {listed(EXPERTS)}; describe it with dl.register(Architecture(...))")
    if not hasattr(pipe, "scheduler"):
        raise Undecided(
            f"a {name} has no scheduler, so that its steps and branches cannot be watched; describe them with"
            " dl.register(Architecture(..., guidance=dl.Guidance(...), loop=dl.Loop(...)))"
        )
    classes = {type(module).__name__ for module in denoisers.values()}
    if len(classes) > 1:
        raise Undecided(
            f"the experts of a {name} are {listed(sorted(classes))}; describe them with dl.register(Architecture(...))"
        )
    arguments = first_call(pipe, denoisers, inputs)
    return replace(find_in(next(iter(denoisers.values())), arguments), name=name, pipelines=(name,))


def find_in(denoiser: nn.Module, arguments: Mapping[str, Any]) -> Architecture:
    """The record of a denoiser, from the arguments of one call, by name.

    Raises:
        Undecided: what was seen allows no answer.
    """
    found = discover(denoiser, arguments)
    name = type(denoiser).__name__
    if found.patches is None:
        raise Undecided(
            f"the visual tokens of a {name} lie in no order of its latents that could be found; describe it with"
            " dl.register(Architecture(...))"
        )
    calls = watched(denoiser, arguments)
    stacks = []
    for stack in found.stacks:
        mine = [call for call in calls if call.path == stack.path]
        stacks.append(_with_sites(stack, mine, found.tokens))
    words = "one token covers {} of {}, in their order".format(
        " x ".join(map(str, found.patches.size)), listed(_AXES[axis] for axis in found.patches.axes if axis != "c")
    )
    record = Architecture(
        name, tuple(stacks), denoiser=name, latents=found.latents, patches=found.patches, guidance=None, token_rule=words
    )
    # Samples that come as a list are padded, each as its own length asks for, and text as it was here may be a picture's padding.
    padded = isinstance(arguments[found.latents], list | tuple) and any(stack.joined for stack in stacks)
    return replace(record, only=record.layout(denoiser, arguments)) if padded else record


def _with_sites(stack: Stack, calls: Sequence[Call], tokens: Mapping[str, int]) -> Stack:
    """The stack with what is in its blocks, of which these are calls; blocks that are built alike are looked into once."""
    known: dict[Any, Stack] = {}
    found = []
    for number, call in enumerate(calls):
        record = dict(stack.variants).get(number, stack)
        parts = tuple((name, type(module).__name__) for name, module in call.block.named_modules())
        if (parts, record.streams) not in known:
            inside = anatomy(record, call, tokens)
            known[parts, record.streams] = replace(
                record, sites=inside.sites, heads=inside.heads, missed=inside.missed, variants=()
            )
        found.append(known[parts, record.streams])
    # The record of the list is that of most of its blocks.
    usual = max(found, key=found.count)
    return replace(usual, variants=tuple((number, one) for number, one in enumerate(found) if one != usual))


_AXES = {"f": "latent frames", "h": "latent rows", "w": "latent columns", "t": "tokens as they come"}
