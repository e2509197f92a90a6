"""What was found in a small denoiser, held against what is stated of it: what is not offered, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dit_lens.architectures import Block
from dit_lens.conformance_modules import lies_in
from dit_lens.errors import listed
from dit_lens.one_call import OneCall
from dit_lens.sites import Site
from dit_lens.small_denoisers import Blocks, SmallDenoiser
from dit_lens.taps import to_host

SITES = ("attn", "cross_attn", "mlp")
"""The sites of which the truth names the modules."""
FORMS = ("tokens", "heads", "grid", "picture")


@dataclass(frozen=True)
class Compared:
    """What a block has and no site stands for, and where what was found is not what is stated."""

    missed: tuple[str, ...]
    wrong: tuple[str, ...]


def compared(small: SmallDenoiser, once: OneCall) -> Compared:
    """The comparison of what was found, which reads a call of the denoiser, with the truth."""
    stated = _stated(small)
    paths, found = [path for path, _ in stated], [block.path for block in once.blocks]
    if paths != found:
        return Compared((), (f"blocks are {listed(paths)}, and {listed(found)} were found",))
    missed: dict[str, None] = {}
    wrong = dict.fromkeys(_layout(small, once))
    returned, seen, taken = _returned(once, stated), once.seen("hooks", once.places)[0], once.taken(range(len(once.blocks)))
    for number, ((path, blocks), block) in enumerate(zip(stated, once.blocks, strict=True)):
        streams = _names(small, blocks.streams)
        kept = tuple(stream for stream in streams if stream in block.stack.streams or not block.stack.nothing)
        if kept != block.stack.streams or (blocks.joined and len(streams) > 1) != block.stack.joined:
            wrong[f"{path} has {listed(streams)}, and {listed(block.stack.streams)} were found"] = None
            continue
        tokens = dict(zip(_names(small, tuple(small.tokens)), small.tokens.values(), strict=True))
        for stream in kept:
            length = seen[number, "resid", stream].shape[1]
            if length != tokens[stream]:
                wrong[f"{blocks.path} has {tokens[stream]} {stream} tokens, and {length} were found"] = None
        for (site, name), module in blocks.modules.items():
            stream = _names(small, (name,))[0]
            unwritten = stream in kept and torch.equal(seen[number, "resid", stream], taken[number][stream])
            if stream not in kept or unwritten or (module and (number, module) not in returned):
                continue
            mine = [one for one in _offered(block, stream) if _kind(one) == site]
            if not mine:
                missed[f"{site} of {stream} in {blocks.path}"] = None
            elif module and not any(
                _is_of(seen[number, one.name, stream], returned[number, module], len(once.plain)) for one in mine
            ):
                where = listed(one.module for one in mine)
                wrong[f"{site} of {stream} in {blocks.path} is what {module} returns, and {where} was found"] = None
        sites = {site for site, _ in blocks.modules}
        more = {_kind(one) for stream in kept for one in _offered(block, stream)} - sites
        wrong |= {f"{blocks.path} has no {kind}, and one was found": None for kind in sorted(more)}
    return Compared(tuple(missed), tuple(wrong))


def _stated(small: SmallDenoiser) -> list[tuple[str, Blocks]]:
    """Every block that is to run, in order, by its path; where a list is named again, it goes on where it stopped."""
    begun: dict[str, int] = {}
    found = []
    for blocks in small.blocks:
        start = begun.get(blocks.path, 0)
        found += [(f"{blocks.path}.{index}", blocks) for index in range(start, start + blocks.count)]
        begun[blocks.path] = start + blocks.count
    return found


def _names(small: SmallDenoiser, streams: Sequence[str]) -> tuple[str, ...]:
    """Streams by the lens's names: the one that is denoised is visual, also where it is sound alone."""
    alone = "visual" not in small.tokens
    return tuple("visual" if alone and stream == "audio" else stream for stream in streams)


def _layout(small: SmallDenoiser, once: OneCall) -> Iterator[str]:
    """Whether the layout is as stated; tokens of which a call does not say how they lie are in one line."""
    found = once.architecture.layout(once.denoiser, once.given)
    patches = once.architecture.patches
    line = patches is not None and patches.packed and max(found.shape) == found.tokens
    if found.shape != small.layout and not (line and found.tokens == torch.Size(small.layout).numel()):
        yield f"the layout is {small.layout}, and {found.shape} was found"


def _returned(once: OneCall, stated: Sequence[tuple[str, Blocks]]) -> dict[tuple[int, str], list[Tensor]]:
    """What the stated modules return, by block and path, as hooks of torch's see it."""
    returned: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for number, ((_, blocks), block) in enumerate(zip(stated, once.blocks, strict=True)):
        modules = dict(block.module.named_modules())
        for path in {path for path in blocks.modules.values() if path in modules and path}:

            def keep(_: Any, __: Any, output: Any, key: tuple[int, str] = (number, path)) -> None:
                returned.setdefault(key, []).extend(to_host(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

            handles.append(modules[path].register_forward_hook(keep))
    try:
        once.seen("hooks", [])
    finally:
        for handle in handles:
            handle.remove()
    return returned


def _offered(block: Block, stream: str) -> list[Site]:
    """The sites of a block for attention and MLPs, in a stream."""
    return [site for site in block.stack.sites if site.stream in (None, stream) and _kind(site) in SITES]


def _kind(site: Site) -> str:
    """The name of a site without its number."""
    return re.sub(r"_\d+$", "", site.name)


def _is_of(shown: Tensor, leaves: Sequence[Tensor], rows: int) -> bool:
    """Whether a tensor's tokens are among those that a module returned, in any of the forms in which it can return them."""
    for leaf in leaves:
        for form in FORMS:
            if leaf.ndim == {"tokens": 3, "grid": 5}.get(form, 4):
                whole = Site("", form=form).as_tokens(leaf, rows if leaf.shape[0] % rows == 0 else 0)
                if lies_in(shown.flatten(2), whole):
                    return True
    return False
