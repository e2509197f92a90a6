"""Ports: the places in the modules of a pipeline at which an engine stops.

Several sites can be read at one place (`resid` and `update` are both the output of a block), so an engine attaches one
hook or one worker to a *port*, and the port shows each of its taps the tensor of its site. All that turns what passes
there into the tensor of a site, and a replacement back, is here, so that both engines do the same; so is what
answers the call of an attention at its port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dit_lens.architectures import Architecture
from dit_lens.errors import InputError, listed
from dit_lens.sites import Gate, Site
from dit_lens.taps import Attention, Tap
from dit_lens.visual_tokens import VisualTokens

CALL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
"""The parameters of scaled dot-product attention in their order, in torch and in diffusers' dispatch to it."""

ATTENTION_SITES = ("attn", "cross_attn")
"""The sites whose module is an attention."""


@dataclass(frozen=True)
class Place:
    """Where a port is: the expert, the number of the block, the module in the block, and the kind of port there."""

    expert: str
    block: int
    module: str
    kind: str


class Port:
    """One place in one block, with the taps and attentions on it.

    Attributes:
        expert: the denoiser that holds the block. path: the module's path in it. kind: `output`, `input`, `attention`.
        block: the block. module: the module to stop at, in the block or the block itself.
        calls: how many calls of attention the module makes, where it is one; the last is the one that is shown.
    """

    def __init__(
        self,
        architecture: Architecture,
        denoiser: nn.Module,
        place: Place,
        taps: Sequence[Tap],
        attentions: Sequence[Attention],
        visual: VisualTokens,
    ) -> None:
        block = architecture.blocks(denoiser)[place.block]
        self._stack = block.stack
        self._taps = [(tap, block.stack.site(tap.site, tap.stream)) for tap in taps]
        self._attentions = attentions
        self._heads = architecture.heads(denoiser, block.stack)
        self._visual = visual
        self._arguments: dict[str, Any] = {}
        self._taken = torch.empty(0)
        self._visits = 0
        self.expert = place.expert
        self.kind = place.kind
        self.path = f"{block.path}.{place.module}" if place.module else block.path
        self.block = block.module
        self.module = self.block.get_submodule(place.module)
        self.calls = architecture.attention_calls(self.module)

    def visit(self, value: Any) -> Any:
        """Show what passes here to every tap; what takes its place, or None when no visitor replaced anything.

        Args:
            value: what the module returned, its first argument, or (q, k, v) of shape (batch, tokens, heads, channels).

        Raises:
            InputError: a visitor returned a tensor of another shape, or one for a site that is read-only.
        """
        replaced = False
        call, self._visits = self._visits, self._visits + 1
        for tap, site in self._taps:
            if site.calls > 1 and call != site.call:
                continue
            seen = self._read(value, tap, site)
            given = tap.visit(seen)
            if given is None:
                continue
            where = f"the site {site.name!r} of block {tap.block}"
            if site.read_only:
                raise InputError(f"{where} is read-only; replace {site.replaceable} instead")
            if given.shape != seen.shape:
                raise InputError(f"{where} has shape {tuple(seen.shape)}, and what is to replace it {tuple(given.shape)}")
            value = self._written(value, tap, site, seen, given)
            replaced = True
        return value if replaced else None

    def visit_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], order: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """Show the q, k and v of a call of scaled dot-product attention, to the taps and then to the attentions.

        Args:
            args, kwargs: its arguments, the first three of which are called query, key and value.
            order: brings these into the order (batch, tokens, heads, channels), and back.

        Returns:
            The arguments to call it with, the same objects if no visitor replaced anything; and the output to take in
            place of a call, in the order of the arguments, or None to call.

        Raises:
            InputError: as `visit`; or an attention answered with another shape, beside another one, or to a call that
                is more than a softmax over all keys.
        """
        names = CALL[:3]
        taken = tuple(map(order, (*args[:3], *(kwargs[name] for name in names[len(args) :]))))
        if self._attentions or any(site.measures == "pair" for _, site in self._taps):
            self._check_plain({**dict(zip(CALL, args, strict=False)), **kwargs}, taken[0].shape[-1])
        replacement = self.visit(taken)
        query, key, value = taken if replacement is None else replacement
        output = self._attended(query, key, value)
        if replacement is not None:
            rest = {name: value for name, value in kwargs.items() if name not in names}
            args, kwargs = (*map(order, replacement), *args[3:]), rest
        return args, kwargs, None if output is None else order(output)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """What the attentions answer to a call with these q, k and v; None when they leave it alone."""
        where = f"the attention call of {self.path}"
        shape = (*query.shape[:3], value.shape[-1])
        answer = None
        for attention in self._attentions:
            given = attention.attend(query, key, value)
            if given is None:
                continue
            if given.shape != shape:
                raise InputError(f"{where} returns shape {shape}, and what is to take its place has {tuple(given.shape)}")
            if answer is not None:
                raise InputError(f"{where} was answered twice; give one attention for each module and moment")
            answer = given.to(query)
        return answer

    def _check_plain(self, call: Mapping[str, Any], channels: int) -> None:
        """Refuse a call that is more than softmax(q k^T / sqrt(channels)) v over all keys."""
        allowed = {"attn_mask": (None,), "dropout_p": (None, 0), "is_causal": (None, False), "scale": (None, channels**-0.5)}
        extras = [name for name in CALL[3:] if isinstance(call.get(name), Tensor) or call.get(name) not in allowed[name]]
        if extras:
            raise InputError(
                f"the attention call of {self.path} already has {listed(extras)}, and attention is edited and recomputed"
                " only where every query sees every key; choose another block or site"
            )

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Hold the arguments of the block while it runs, where a site of this port is computed from them.

        A torch hook holds them in both engines: a block that is skipped then leaves nothing of an earlier call behind.
        """
        if not any(site.in_float32 or site.columns or site.calls > 1 for _, site in self._taps):
            yield
            return
        with ExitStack() as hooks:
            hooks.callback(self._forget)
            if any(site.columns for _, site in self._taps):
                hooks.callback(self.module.register_forward_pre_hook(self._take).remove)
            hooks.callback(self.block.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
            hooks.callback(self.block.register_forward_hook(self._forget).remove)
            yield

    def _remember(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._stack.arguments(block, args, kwargs)
        if self._stack.in_place:
            given |= {name: given[name].clone() for name in self._stack.parameters}
        self._arguments = given

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._taken = args[0]

    def _forget(self, *_: object) -> None:
        self._arguments, self._taken, self._visits = {}, torch.empty(0), 0

    def _passing(self, value: Any, tap: Tap, site: Site) -> Tensor:
        """The one tensor that a site is about, among those that pass."""
        if not site.module:
            return self._stack.streams_out(value, self._visual.count)[tap.stream]
        tensor = value[site.item] if isinstance(value, tuple) else value
        tensor = site.as_tokens(tensor, self._visual.rows)
        if site.columns is not None:
            tensor = self._projected(site.columns, tensor)
        return self._stack.apart(tensor, site.within, self._visual.count)[tap.stream] if site.within else tensor

    def _projected(self, columns: tuple[int, int], output: Tensor) -> Tensor:
        """What the projection of this port makes of some columns of what it takes in."""
        weight: Any = self.module.weight
        first, end = columns
        return linear(self._taken[..., first:end], weight[:, first:end]).to(output)

    def _before(self, stream: str) -> Tensor:
        """The stream that the block took, in float32."""
        return self._stack.streams_in(self._arguments, self._visual.count)[stream].float()

    def _gate(self, gate: Gate) -> Tensor:
        """The factor of a contribution in the call under way."""
        return gate.of(self.block, self._arguments)

    def _read(self, value: Any, tap: Tap, site: Site) -> Tensor:
        if site.measures == "pair":
            value = (torch.cat(value[:2], dim=-1),)
        tensor = self._passing(value, tap, site)
        if site.measures == "change":
            return tensor.float() - self._before(tap.stream)
        if site.measures == "contribution":
            return tensor.float() * self._gate(site.gate) if site.gate else tensor.float()
        return tensor.unflatten(-1, (self._heads, -1)) if site.per_head and tensor.ndim == 3 else tensor

    def _written(self, value: Any, tap: Tap, site: Site, seen: Tensor, given: Tensor) -> Any:
        old = self._passing(value, tap, site)
        if site.measures == "change":
            # A difference does not add up to the same bits again, so what did not change stays as it was.
            given = given.to(seen)
            given = (self._before(tap.stream) + given).to(old).where(given != seen, old)
        new = given.reshape(old.shape).to(old)
        if not site.module:
            return self._stack.replaced(value, {tap.stream: new}, self._visual.count)
        whole = value[site.item] if isinstance(value, tuple) else value
        tokens = site.as_tokens(whole, self._visual.rows)
        parts = self._stack.apart(tokens, site.within, self._visual.count) if site.within else {tap.stream: tokens}
        if site.columns is not None:
            # What the other columns and the bias add stays as it was, and so does what did not change.
            rest = parts[tap.stream]
            new = (rest.float() + (new.float() - old.float())).to(rest).where(new != old, rest)
        if site.within:
            new = torch.cat(list({**parts, tap.stream: new}.values()), dim=1)
        new = site.as_passing(new, whole)
        if not isinstance(value, tuple):
            return new
        return (*value[: site.item], new, *value[site.item + 1 :])


def ports(
    architecture: Architecture,
    denoisers: Mapping[str, nn.Module],
    taps: Sequence[Tap],
    attentions: Sequence[Attention],
    visual: Mapping[str, VisualTokens],
) -> list[Port]:
    """The ports at which an engine has to stop for these taps and attentions."""
    blocks = {expert: architecture.blocks(denoiser) for expert, denoiser in denoisers.items()}
    groups: dict[Place, tuple[list[Tap], list[Attention]]] = {}
    for tap in taps:
        site = blocks[tap.expert][tap.block].stack.site(tap.site, tap.stream)
        groups.setdefault(Place(tap.expert, tap.block, site.module, site.port), ([], []))[0].append(tap)
    for attention in attentions:
        if attention.site not in ATTENTION_SITES:
            raise InputError(f"{attention.site!r} is no attention module; write {' or '.join(map(repr, ATTENTION_SITES))}")
        stack = blocks[attention.expert][attention.block].stack
        # Where attention and MLP share a projection, it is not that which attends.
        inside = [site for site in stack.sites if site.name == "q" and attention.site == "attn"]
        module = (inside[0] if inside else stack.site(attention.site)).module
        groups.setdefault(Place(attention.expert, attention.block, module, "attention"), ([], []))[1].append(attention)
    return [Port(architecture, denoisers[place.expert], place, *group, visual[place.expert]) for place, group in groups.items()]
