"""Conformance of modules: whether blocks and what is in them are what a record says, by plain torch hooks on the modules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dit_lens.architectures.anatomy import anatomy
from dit_lens.architectures.arguments import latents_of, other_than
from dit_lens.architectures.discovery import ASIDE, adapts
from dit_lens.architectures.watching import Call, is_stream, lists, watched
from dit_lens.check_report import Finding
from dit_lens.errors import listed
from dit_lens.one_call import OneCall, Place
from dit_lens.sites import BLOCK_SITES
from dit_lens.taps import to_host

KINDS = ("attn", "cross_attn", "mlp")
ADDED = 0.5
"""What is added to one token of what a module is given."""


class Modules:
    """The checks of the modules in the blocks of one denoiser."""

    def __init__(self, once: OneCall) -> None:
        self.once = once

    def order(self) -> Finding:
        """Every block runs once, in the order of the numbers."""
        ran: list[int] = []
        handles = [
            block.module.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
            for number, block in enumerate(self.once.blocks)
        ]
        with torch.no_grad(), _removed(handles):
            self.once.denoiser(**self.once.given)
        numbers = list(range(len(self.once.blocks)))
        if ran == numbers:
            return True, f"{len(numbers)} blocks"
        place = next((i for i, (one, other) in enumerate(zip(ran, numbers, strict=False)) if one != other), len(ran))
        return False, f"{len(ran)} runs of {len(numbers)} blocks, another than its number says at run {place}"

    def shown(self) -> Finding:
        """What is shown at a site that a module returns is among the tokens that it returned, as a hook of torch's sees it."""
        places = [place for place in self.once.sampled() if self._returned(place)]
        found: dict[tuple[int, str], list[list[Tensor]]] = {}
        handles = []
        for block, module in dict.fromkeys((place[0], self.once.site(place).module) for place in places):
            own = self.once.blocks[block].module.get_submodule(module)
            handles.append(own.register_forward_hook(partial(_keep, found.setdefault((block, module), []))))
        with _removed(handles):
            seen = self.once.seen("hooks", places)[0]
        wrong = [place for place in places if not self._among(seen.get(place), place, found)]
        return not wrong, f"{len(places)} places" if not wrong else f"another at {_named(wrong[0])} and {len(wrong) - 1} more"

    def _returned(self, place: Place) -> bool:
        site = self.once.site(place)
        return site.port == "output" and site.measures == "value" and site.columns is None

    def _among(self, shown: Tensor | None, place: Place, found: Mapping[tuple[int, str], list[list[Tensor]]]) -> bool:
        site = self.once.site(place)
        outputs = found.get((place[0], site.module), [])
        if shown is None or len(outputs) != site.calls:
            return False
        leaves = [leaf for leaf in outputs[site.call] if leaf.ndim > 2]
        whole = [site.as_tokens(leaf, len(shown)) for leaf in leaves]
        return any(lies_in(shown.flatten(2), tokens) for tokens in whole if tokens.ndim == 3)

    def kinds(self) -> Finding:
        """When one token of what a module is given changes, attention tells others of it, and neither an MLP nor cross-attention.

        A convolution in an MLP tells its neighbours; an MLP must leave some token as it was. Cross-attention reads another
        sequence too, and an MLP none.
        """
        asked = self._asked()
        verdicts: dict[tuple[str, str], bool | None] = {}
        handles = []
        for block, name, module in asked:
            path = self.once.blocks[block].path

            def again(own: Any, args: Any, kwargs: Any, output: Any, key: tuple[str, str] = (name, f"{path}.{module}")) -> None:
                heard = _heard(own, args, kwargs, output)
                if heard is not None:
                    verdicts[key] = _fits(key[0], heard, _reads_another(own, args, kwargs, output))

            handles.append(self.once.blocks[block].module.get_submodule(module).register_forward_hook(again, with_kwargs=True))
        with torch.no_grad(), _removed(handles):
            self.once.denoiser(**self.once.given)
        wrong = [f"{path} as {name}" for (name, path), fits in verdicts.items() if fits is False]
        if wrong:
            return False, f"not so: {listed(wrong)}"
        if not verdicts:
            return None, "no module that is given as many tokens as it returns"
        others = f" of {len(asked)}, the others are given something else than tokens" if len(verdicts) < len(asked) else ""
        return True, f"{len(verdicts)} modules{others}"

    def _asked(self) -> list[tuple[int, str, str]]:
        """(block, site, module) of the attentions and MLPs in the first block of each kind."""
        firsts = self.once.kinds()
        places = [place for place in self.once.places if place[0] in firsts and self._returned(place)]
        kinds = ((place[0], _kind(place[1]), self.once.site(place).module) for place in places)
        return list(dict.fromkeys(one for one in kinds if one[1] in KINDS))

    def complete(self) -> Finding:
        """No attention and no MLP was seen that no site stands for, and no list of blocks that carry the latents is left out."""
        missed = {f"{block.stack.path}: {name}" for block in self.once.blocks for name in block.stack.missed}
        missed |= {f"the blocks in {path}" for path in self._left_out()} | set(self._not_offered())
        offered = list(dict.fromkeys(site for _, site, _ in self.once.places))
        return not missed, f"missed {listed(sorted(missed))}" if missed else listed(offered)

    def _not_offered(self) -> Iterator[str]:
        """What is seen in the first block of each kind by watching it, and the record does not offer."""
        once = self.once
        lengths = once.digests("hooks", [(i, "resid", stream) for i, stream in once.stream_places])
        tokens = {stream: shape[1] for (_, _, stream), (shape, _) in lengths.items()}
        given: dict[int, dict[str, Any]] = {}
        handles = [
            once.blocks[number].module.register_forward_pre_hook(partial(_keep_given, given, number), with_kwargs=True)
            for number in once.kinds()
        ]
        with torch.no_grad(), _removed(handles):
            once.denoiser(**once.given)
        for number, arguments in given.items():
            block = once.blocks[number]
            call = Call(block.stack.path, block.module, arguments, ())
            seen = anatomy(replace(block.stack, sites=BLOCK_SITES), call, tokens)
            offered = {(_kind(site), stream) for site, stream in block.stack.offered}
            for site in seen.sites:
                for stream in block.stack.streams:
                    if _kind(site.name) in KINDS and site.stream in (None, stream) and (_kind(site.name), stream) not in offered:
                        yield f"{site.name} of {stream} in {block.stack.path}"

    def _left_out(self) -> Iterator[str]:
        """Lists in no stack, of attending modules that carry as many tokens as the latents have, and change with these."""
        once, kept = self.once, {block.stack.path for block in self.once.blocks}
        others = [path for path in lists(once.denoiser) if path not in kept and not any(part in path for part in ASIDE)]
        if not others:
            return
        tokens = once.architecture.layout(once.denoiser, once.given).tokens
        name = latents_of(once.denoiser, once.given)
        moved = {**once.given, name: other_than(once.given[name])}
        before, after = (watched(once.denoiser, given) for given in (once.given, moved))
        for path in others:
            members = [call for call in before if call.path == path]
            if not members or adapts(path, members, before):
                continue
            pairs = [(one, other) for one, other in zip(before, after, strict=True) if one.path == path and one.attends]
            if any(_carries(a, b, tokens) for one, other in pairs for a, b in zip(one.returned, other.returned, strict=True)):
                yield path


def _keep(kept: list[list[Tensor]], module: nn.Module, args: Any, output: Any) -> None:
    kept.append([to_host(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])


def _keep_given(kept: dict[int, dict[str, Any]], number: int, block: nn.Module, args: Any, kwargs: Any) -> None:
    bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    kept[number] = {name: value.clone() if isinstance(value, Tensor) else value for name, value in bound.items()}


def _carries(one: Any, other: Any, tokens: int) -> bool:
    return is_stream(one) and one.shape[1] >= tokens and (one.shape != other.shape or not torch.equal(one, other))


def lies_in(shown: Tensor, whole: Tensor) -> bool:
    """Whether tokens lie one after the other in a sequence, bit by bit."""
    length, spare = shown.shape[1], whole.shape[1] - shown.shape[1]
    fits = shown.shape[0] == whole.shape[0] and shown.shape[2] == whole.shape[2]
    return fits and any(torch.equal(shown, whole[:, start : start + length]) for start in range(spare + 1))


def _heard(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
    """Which tokens of a module's output are others when the first one that it is given is; None where that is not seen."""
    clean = next((leaf for leaf in tree_leaves(output) if is_stream(leaf)), None)
    if clean is None or clean.shape[1] < 2:
        return None
    given = [leaf for leaf in tree_leaves((args, kwargs)) if is_stream(leaf) and leaf.shape[:2] == clean.shape[:2]]
    if not given:
        return None
    changed = given[0].clone()
    changed[:, :1] += ADDED

    # Self-attention may be given its tokens twice, once to take the keys from.
    def new(leaf: Any) -> Any:
        return changed if leaf is given[0] else leaf

    args, kwargs = tree_map(new, (args, kwargs))
    after = next(leaf for leaf in tree_leaves(type(module).forward(module, *args, **kwargs)) if is_stream(leaf))
    return (clean != after).any(dim=-1).any(dim=0)


def _is_sequence(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 2


def _reads_another(module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a module's output changes with a sequence that it is given beside the tokens that it returns."""
    clean = next(leaf for leaf in tree_leaves(output) if is_stream(leaf))
    args, kwargs = tree_map(
        lambda leaf: leaf.flip(-1) + ADDED if _is_sequence(leaf) and leaf.shape[:2] != clean.shape[:2] else leaf, (args, kwargs)
    )
    after = next(leaf for leaf in tree_leaves(type(module).forward(module, *args, **kwargs)) if is_stream(leaf))
    return not torch.equal(clean, after)


def _fits(name: str, heard: Tensor, reads_another: bool) -> bool:
    """Whether these tokens are those that hear of the first in a module of this kind."""
    if name == "attn":
        return bool(heard[1:].any())
    alone = bool(heard[0]) and not bool(heard[1:].any() if name == "cross_attn" else heard.all())
    return alone and reads_another == (name == "cross_attn")


def _kind(name: str) -> str:
    """The name of a site without its number."""
    return re.sub(r"_\d+$", "", name)


def _named(place: Place) -> str:
    return f"{place[1]} of {place[2]} in block {place[0]}"


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    """Take hooks off afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
