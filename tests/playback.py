"""A second way to run and edit a planted model: torch hooks and an Euler loop of its own, without the library's edits.

Many edits are played at once, one in each row of a batch that starts from the same sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.plants import Planted, Sample
from dit_lens.plants.mechanisms import conditions
from dit_lens.plants.model import GUIDANCE, schedule
from dit_lens.plants.stream import HEADS

BRANCHES = ("cond", "uncond")
FRAME_TOKENS = 4
TOKENS = 12
Moment = tuple[int, str]


@dataclass
class Change:
    """One edit: what `make` returns takes the place of a site's tensor (tokens, channels), or of the latents."""

    site: str
    place: int
    make: Callable[[Tensor, Moment], Tensor]
    steps: Sequence[int] | None = None
    branches: Sequence[str] = BRANCHES

    def holds(self, moment: Moment) -> bool:
        """Whether it is made at a step and branch."""
        return (self.steps is None or moment[0] in self.steps) and moment[1] in self.branches


@dataclass
class Played:
    """What happened: the final latents, those that each step took, the sites by (site, block, step, branch), velocities."""

    final: Tensor
    latents: list[Tensor] = field(default_factory=list)
    sites: dict[tuple[str, int, int, str], Tensor] = field(default_factory=dict)
    velocities: dict[Moment, Tensor] = field(default_factory=dict)


def prepared(model: Planted, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Latents, condition and text embeddings of samples, as their pipeline prepares them."""
    pipe: Any = model.pipe
    shape = (4, 3, 4, 4)
    noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(sample.seed)) for sample in samples]
    images = torch.cat([sample.inputs["image"] for sample in samples])
    texts = ([sample.inputs[name] for sample in samples] for name in ("prompt", "negative_prompt"))
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(*texts, max_sequence_length=8)
    return {"latents": torch.cat(noise), "condition": conditions(pipe.vae, 2 * images - 1, 9), "cond": cond, "uncond": uncond}


def play(
    model: Planted,
    samples: Sequence[Sample],
    changes: Sequence[Sequence[Change]] = (),
    keep: bool = False,
    until: int | None = None,
    swapped: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] = lambda step, inputs: inputs,
) -> Played:
    """Run samples, one a row; or one sample in as many rows as there are lists of changes, each row with its own.

    Args:
        keep: whether to keep every site. until: the step after which to stop.
        swapped: what the model is given at a step, in place of what was prepared.
    """
    denoiser: Any = model.pipe.transformer
    timesteps, sigmas = schedule(model.pipe, model.steps)
    inputs = prepared(model, samples)
    if changes:
        inputs = {name: value.expand(len(changes), *value.shape[1:]) for name, value in inputs.items()}
    played = Played(latents := inputs["latents"])
    hooked = _Hooks(changes, played.sites if keep else None)
    with ExitStack() as attached, torch.no_grad():
        hooked.attach(denoiser, attached)
        for step, timestep in enumerate(timesteps if until is None else timesteps[: until + 1]):
            latents = hooked.changed("latents", step, latents, (step, "cond"))
            played.latents.append(latents)
            given = swapped(step, inputs)
            taken = torch.cat([latents, given["condition"]], dim=1)
            for branch in BRANCHES:
                hooked.moment = (step, branch)
                time = torch.full((len(taken),), timestep)
                played.velocities[step, branch] = denoiser(taken, time, given[branch], return_dict=False)[0]
            guided = _guided(played.velocities, step)
            latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
    played.final = latents
    return played


def _guided(velocities: dict[Moment, Tensor], step: int) -> Tensor:
    cond, uncond = (velocities[step, branch] for branch in BRANCHES)
    return uncond + GUIDANCE * (cond - uncond)


class _Hooks:
    """Hooks on every site that change and keep what passes."""

    def __init__(self, changes: Sequence[Sequence[Change]], kept: dict[tuple[str, int, int, str], Tensor] | None) -> None:
        self.moment: Moment = (0, "cond")
        self._kept = kept
        self._changes: dict[tuple[str, int], list[tuple[int, Change]]] = defaultdict(list)
        for row, mine in enumerate(changes):
            for change in mine:
                self._changes[change.site, change.place].append((row, change))

    def changed(self, site: str, place: int, value: Tensor, moment: Moment) -> Tensor:
        """What takes the place of a tensor with a row for every list of changes."""
        if self._kept is not None:
            self._kept[site, place, *moment] = value
        holding = [(row, change) for row, change in self._changes.get((site, place), ()) if change.holds(moment)]
        value = value.clone() if holding else value
        for row, change in holding:
            value[row] = change.make(value[row], moment)
        return value

    def attach(self, denoiser: Any, attached: ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        for number, block in enumerate(denoiser.blocks):
            for site, path in (("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ffn")):
                hook = self._output(site, number)
                attached.callback(block.get_submodule(path).register_forward_hook(hook).remove)
            for site, path in (("heads", "attn1.to_out.0"), ("cross_heads", "attn2.to_out.0")):
                hook = self._input(site, number)
                attached.callback(block.get_submodule(path).register_forward_pre_hook(hook).remove)
            attached.callback(block.register_forward_hook(self._block(number)).remove)
            knocked = self._knockout(number)
            attached.callback(block.attn1.register_forward_hook(knocked).remove)

    def _output(self, site: str, number: int) -> Any:
        return lambda module, args, output: self.changed(site, number, output, self.moment)

    def _input(self, site: str, number: int) -> Any:
        return lambda module, args: (self.changed(site, number, args[0], self.moment),)

    def _block(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            update = self.changed("update", number, output - args[0], self.moment)
            output = args[0] + update if self._changes.get(("update", number)) else output
            return self.changed("resid", number, output, self.moment)

        return hook

    def _knockout(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if ("knockout", number) not in self._changes:
                return output
            cut = without_first_frame(module, args[0], args[3])
            for row, _ in self._changes["knockout", number]:
                output = torch.cat([output[:row], cut[row : row + 1], output[row + 1 :]])
            return output

        return hook


def without_first_frame(attention: Any, stream: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """A self-attention whose queries of later frames see no key of the first."""
    cosines, sines = (table[..., start::2] for start, table in enumerate(rotary))

    def rotated(tensor: Tensor) -> Tensor:
        even, odd = tensor.unflatten(2, (HEADS, -1)).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2).transpose(1, 2)

    query, key = rotated(attention.norm_q(attention.to_q(stream))), rotated(attention.norm_k(attention.to_k(stream)))
    value = attention.to_v(stream).unflatten(2, (HEADS, -1)).transpose(1, 2)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    allowed[FRAME_TOKENS:, :FRAME_TOKENS] = False
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def attributed(model: Planted, sample: Sample, clean: Played, donor: Played) -> list[float]:
    """By how much the gradient says that each block's update of the donor would move the final answer."""
    denoiser: Any = model.pipe.transformer
    timesteps, sigmas = schedule(model.pipe, model.steps)
    inputs = prepared(model, [sample])
    moved = [0.0] * model.blocks
    for step, timestep in enumerate(timesteps):
        outputs: dict[tuple[int, str], Tensor] = {}
        velocities: dict[Moment, Tensor] = {}
        taken = torch.cat([clean.latents[step], inputs["condition"]], dim=1)
        for branch in BRANCHES:
            with ExitStack() as attached:
                for number, block in enumerate(denoiser.blocks):
                    hook = _keeping(outputs, (number, branch))
                    attached.callback(block.register_forward_hook(hook).remove)
                velocities[step, branch] = denoiser(taken, torch.tensor([timestep]), inputs[branch], return_dict=False)[0]
        change = (sigmas[step + 1] - sigmas[step]) * _guided(velocities, step)
        gradients = torch.autograd.grad(model.answer(change).sum(), list(outputs.values()))
        for (number, branch), gradient in zip(outputs, gradients, strict=True):
            where = ("update", number, step, branch)
            moved[number] += float((gradient * (donor.sites[where] - clean.sites[where])).sum())
    return moved


def _keeping(outputs: dict[tuple[int, str], Tensor], name: tuple[int, str]) -> Any:
    return lambda module, args, output: outputs.update({name: output})
