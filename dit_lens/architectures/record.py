"""What has to be known about a diffusion transformer before it can be read block by block.

Diffusers gives every family its own class, so the differences are written down, as small frozen records: where the blocks are,
which token streams a block takes and returns and in which order, how guidance calls the denoiser, and how tokens map onto the
latents. Everything above this module speaks of experts, blocks, streams and layouts only. A family without a record is watched
(see `finding`), and the record follows from that.

The words: an *expert* is a denoiser of the pipeline (`transformer`, and `transformer_2` where low noise has its own);
a *stream* is a sequence of tokens that blocks read and write; the *layout* is the (frames, height, width) order of the
visual tokens, in latent frames and token rows and columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_lens.architectures.layout import Layout, Patches
from dit_lens.architectures.stack import Block, Stack
from dit_lens.errors import InputError, listed
from dit_lens.sites import BLOCK_SITES, Gate, Site, attention_sites

EXPERTS = ("transformer", "transformer_2")
"""Names under which diffusers pipelines hold their denoisers, in the order in which noise falls."""


@dataclass(frozen=True)
class Guidance:
    """How the branches are called.

    Attributes:
        kind: `sequential`, a call each; `batched`, one call with the rows of each; `none`, one branch.
        branches: in the order of their calls, or of their rows.
    """

    kind: Literal["sequential", "batched", "none"] = "sequential"
    branches: tuple[str, ...] = ("cond", "uncond")

    @property
    def batched(self) -> bool:
        """Whether one call holds the rows of several branches."""
        return self.kind == "batched"


@dataclass(frozen=True)
class Loop:
    """A sampling loop without a scheduler of diffusers', of which nothing is known but what its denoiser is given.

    Attributes:
        timestep: the parameter of the denoiser's `forward` that has the timestep: one for all, one for every row, or (rows,
            frames) or (rows, tokens), where frames have timesteps of their own.
        noise: from a timestep to the `dit_lens.NoiseState` there: how sample and noise mix, and what the output is.
        of_frames: from the timesteps of the frames of a call to the one that its step is known by.
    """

    timestep: str
    noise: Callable[[float], Any]
    of_frames: Callable[[Sequence[float]], float] = max


@dataclass(frozen=True)
class Architecture:
    """One family of diffusion transformers.

    Attributes:
        name: what the family is called.
        stacks: its blocks, in execution order.
        pipelines: class names of the pipelines that the record is for.
        denoiser: class name of the transformer; any where it is empty.
        experts: attributes of the pipeline that hold its denoisers, in the order in which noise falls.
        latents, text: parameters of the denoiser's `forward` that take the latents and the text.
        patches: how tokens cover the latents; by the configuration's `patch_size` when left out.
        further_keys: attribute of an attention module that is None unless the module makes a call to further keys, as to
            those of a picture, before its own; empty where there are none.
        guidance: how the branches are called; watched in the first step of a run when left out.
        guided_above: guidance runs when `guidance_scale` is greater than this.
        loop: the sampling loop, where it has no scheduler of diffusers'; `guidance` is then to be given.
        token_rule: how tokens cover the latents, in words.
        only: the one layout that it holds for, where padding that depends on the sizes cannot be told from text in others.
    """

    name: str
    stacks: tuple[Stack, ...]
    pipelines: tuple[str, ...] = ()
    denoiser: str = ""
    experts: tuple[str, ...] = EXPERTS
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
    patches: Patches | None = None
    further_keys: str = ""
    guidance: Guidance | None = None
    guided_above: float = 1.0
    loop: Loop | None = None
    token_rule: str = "one token covers patch_size = (frames, rows, columns) of the latent video, rows before columns"
    only: Layout | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of all stacks."""
        return tuple(dict.fromkeys(stream for stack in self.stacks for stream in stack.streams))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of all stacks, each in the order in which its block computes them."""
        every = [one for stack in self.stacks for one in (stack, *(variant for _, variant in stack.variants))]
        return tuple(dict.fromkeys(site for stack in every for site in stack.sites))

    def denoisers(self, pipe: Any) -> dict[str, nn.Module]:
        """The pipeline's experts by name, in execution order."""
        found = {name: getattr(pipe, name, None) for name in self.experts}
        return {name: module for name, module in found.items() if module is not None}

    def blocks(self, denoiser: nn.Module) -> list[Block]:
        """Every block of one expert, in execution order."""
        found = []
        for stack in self.stacks:
            variants = dict(stack.variants)
            for number, (name, module) in enumerate(denoiser.get_submodule(stack.path).named_children()):
                found.append(Block(f"{stack.path}.{name}", module, variants.get(number, stack)))
        return found

    def block_list(self, denoiser: nn.Module) -> list[nn.Module]:
        """The modules of all blocks, in execution order."""
        return [block.module for block in self.blocks(denoiser)]

    def arguments(self, denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a denoiser call by the names of its parameters."""
        return inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments

    def taken(self, arguments: Mapping[str, Any]) -> Tensor:
        """The latents in the arguments of a denoiser call, (batch, channels, *space); lists of samples as one tensor."""
        latents = arguments[self.latents]
        return latents if isinstance(latents, Tensor) else torch.stack(list(latents))

    def layout(self, denoiser: nn.Module, arguments: Mapping[str, Any]) -> Layout:
        """The layout of the visual tokens in a call with these arguments.

        Raises:
            InputError: the record was found by watching a call of another layout, and holds for no other.
        """
        patches = self.patches
        if patches is None:
            config: Any = denoiser.config
            patches = Patches("cfhw", tuple(config.patch_size))
        layout = patches.layout(self.taken(arguments).shape, arguments)
        if self.only not in (None, layout):
            raise InputError(
                f"the blocks of a {self.denoiser} were found with {self.only} and hold for that only, as how many tokens are"
                f" padding depends on the size; this call has {layout}: make another lens for it"
            )
        return layout

    def width(self, denoiser: nn.Module, stack: Stack | None = None) -> int:
        """Number of channels of a visual token."""
        known = (stack or self.stacks[0]).width
        if known:
            return known
        config = _configuration(denoiser, "width")
        return config.num_attention_heads * config.attention_head_dim

    def heads(self, denoiser: nn.Module, stack: Stack | None = None) -> int:
        """Number of attention heads; none where no site has rows per head."""
        stack = stack or self.stacks[0]
        if not any(site.per_head for site in stack.sites):
            return 0
        return stack.heads or _configuration(denoiser, "heads").num_attention_heads

    def attention_calls(self, module: nn.Module) -> int:
        """How many calls of scaled dot-product attention a module makes; the last one is its own."""
        return 1 if getattr(module, self.further_keys, None) is None else 2

    def expert_at(self, pipe: Any, timestep: float) -> str:
        """Name of the expert that the pipeline calls at this timestep."""
        experts = list(self.denoisers(pipe))
        boundary = pipe.config.get("boundary_ratio") if len(experts) > 1 else None
        if boundary is None:
            return experts[0]
        return experts[0] if timestep >= boundary * pipe.scheduler.config.num_train_timesteps else experts[1]

    def guidance_at(self, guidance_scale: float) -> Guidance:
        """How a run with this guidance scale calls its branches."""
        guidance = self.guidance or Guidance()
        if guidance.kind == "none":
            return guidance
        return guidance if guidance_scale > self.guided_above else Guidance("none", guidance.branches[:1])


def _configuration(denoiser: nn.Module, asked: str) -> Any:
    """The denoiser's configuration, as diffusers has it.

    Raises:
        InputError: it says nothing of attention heads.
    """
    config = getattr(denoiser, "config", None)
    if not hasattr(config, "num_attention_heads") or not hasattr(config, "attention_head_dim"):
        raise InputError(
            f"a {type(denoiser).__name__} has no configuration that says its {asked}; write dl.Stack(..., {asked}=...)"
        )
    return config


WAN = Architecture(
    name="Wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    denoiser="WanTransformer3DModel",
    stacks=(
        Stack(
            "blocks",
            sites=(
                *attention_sites("attn1", projection="to_out.0"),
                Site("attn", "attn1"),
                Site("attn_contribution", "attn1", measures="contribution", gate=Gate(2)),
                Site("cross_attn", "attn2"),
                Site("cross_attn_contribution", "attn2", measures="contribution"),
                Site("mlp", "ffn"),
                Site("mlp_contribution", "ffn", measures="contribution", gate=Gate(5)),
                *BLOCK_SITES,
            ),
        ),
    ),
    further_keys="add_k_proj",
    guidance=Guidance("sequential", ("cond", "uncond")),
)

_registered: list[Architecture] = [WAN]


def register(architecture: Architecture) -> None:
    """Add a record; a later one goes before an earlier one for the same pipeline."""
    _registered.insert(0, architecture)


def lookup(pipe: Any) -> Architecture | None:
    """The record for a pipeline, found by its class name or that of a parent class; None where there is none.

    Raises:
        InputError: the pipeline's denoiser is of another class than the record's, or it has none.
    """
    names = [parent.__name__ for parent in type(pipe).__mro__]
    for architecture in _registered:
        if not any(name in architecture.pipelines for name in names):
            continue
        for expert, denoiser in architecture.denoisers(pipe).items():
            if architecture.denoiser not in ("", *(parent.__name__ for parent in type(denoiser).__mro__)):
                raise InputError(
                    f"{expert} is a {type(denoiser).__name__}, but {architecture.name} pipelines have a"
                    f" {architecture.denoiser}; describe yours with dl.register(Architecture(...))"
                )
        if not architecture.denoisers(pipe):
            raise InputError(f"the {names[0]} has no denoiser: {listed(architecture.experts)} are all None")
        return architecture
    return None
