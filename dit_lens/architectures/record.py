"""What has to be known about a diffusion transformer before it can be read block by block.

Diffusers gives every family its own class, so the differences are written down once, as small frozen records: where the
blocks are, which token streams a block takes and returns and in which order, how guidance calls the denoiser, and how
tokens map onto the latent video. Everything above this module speaks of experts, blocks, streams and layouts only.

The words: an *expert* is a denoiser of the pipeline (`transformer`, and `transformer_2` where low noise has its own);
a *stream* is a sequence of tokens that blocks read and write; the *layout* is the (frames, height, width) order of the
visual tokens, in latent frames and token rows and columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_lens.errors import InputError, listed
from dit_lens.sites import BLOCK_SITES, Gate, Site, attention_sites

EXPERTS = ("transformer", "transformer_2")
"""Names under which diffusers pipelines hold their denoisers, in the order in which noise falls."""


@dataclass(frozen=True)
class Layout:
    """The order of the visual tokens: latent `frames`, then token rows (`height`), then token columns (`width`)."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of visual tokens of one sample."""
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return (self.frames, self.height, self.width)


@dataclass(frozen=True)
class Architecture:
    """One family of diffusion transformers.

    Attributes:
        name: what the family is called.
        pipelines: class names of the diffusers pipelines that this record was tested with.
        denoiser: class name of the transformer.
        blocks: attributes of the transformer that hold its blocks, in execution order.
        streams: the token streams that a block returns, in the order in which it returns them.
        parameters: the parameters of the block's `forward` that bring these streams in, same order.
        sites: the tensors of a block that can be read, in the order in which it computes them.
        further_keys: attribute of an attention module that is None unless the module makes a call to further keys, as to
            those of a picture, before its own; empty where there are none.
        branches: the guidance branches in the order in which one step calls them.
        guidance: `sequential` when every branch is a call of its own.
        guided_above: guidance runs when `guidance_scale` is greater than this.
        token_rule: how tokens cover the latent video, in words.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    blocks: tuple[str, ...]
    streams: tuple[str, ...] = ("visual",)
    parameters: tuple[str, ...] = ("hidden_states",)
    sites: tuple[Site, ...] = BLOCK_SITES
    further_keys: str = ""
    branches: tuple[str, ...] = ("cond", "uncond")
    guidance: str = "sequential"
    guided_above: float = 1.0
    token_rule: str = "one token covers patch_size = (frames, rows, columns) of the latent video, rows before columns"

    def denoisers(self, pipe: Any) -> dict[str, nn.Module]:
        """The pipeline's experts by name, in execution order."""
        found = {name: getattr(pipe, name, None) for name in EXPERTS}
        return {name: module for name, module in found.items() if module is not None}

    def block_list(self, denoiser: nn.Module) -> list[nn.Module]:
        """Every block of one expert, in execution order."""
        return [block for path in self.blocks for block in denoiser.get_submodule(path).children()]

    def block_paths(self, denoiser: nn.Module) -> list[str]:
        """The dotted path of every block inside its expert, in execution order."""
        return [f"{path}.{name}" for path in self.blocks for name, _ in denoiser.get_submodule(path).named_children()]

    def layout(self, denoiser: nn.Module, latent_shape: Sequence[int]) -> Layout:
        """The token layout for a denoiser input of shape (batch, channels, frames, height, width)."""
        config: Any = denoiser.config
        sizes = (length // patch for length, patch in zip(latent_shape[-3:], config.patch_size, strict=True))
        return Layout(*sizes)

    def width(self, denoiser: nn.Module) -> int:
        """Number of channels of a visual token."""
        config: Any = denoiser.config
        return config.num_attention_heads * config.attention_head_dim

    def heads(self, denoiser: nn.Module) -> int:
        """Number of attention heads; none where no site has rows per head."""
        config: Any = denoiser.config
        return config.num_attention_heads if any(site.per_head for site in self.sites) else 0

    def site(self, name: str, stream: str = "visual") -> Site:
        """The record of a site.

        Raises:
            InputError: this architecture has no such site in this stream.
        """
        for site in self.sites:
            if site.name == name and stream in self.streams and site.stream in (None, stream):
                return site
        raise InputError(
            f"{self.name} has no site {name!r} in the stream {stream!r}; there is"
            f" {listed(dict.fromkeys(site.name for site in self.sites))} in {listed(self.streams)}"
        )

    def attention_calls(self, module: nn.Module) -> int:
        """How many calls of scaled dot-product attention a module makes; the last one is its own."""
        return 1 if getattr(module, self.further_keys, None) is None else 2

    def expert_at(self, pipe: Any, timestep: float) -> str:
        """Name of the expert that the pipeline calls at this timestep."""
        experts = list(self.denoisers(pipe))
        boundary = pipe.config.get("boundary_ratio")
        if boundary is None:
            return experts[0]
        return EXPERTS[0] if timestep >= boundary * pipe.scheduler.config.num_train_timesteps else EXPERTS[1]

    def branches_at(self, guidance_scale: float) -> tuple[str, ...]:
        """The branches that a run with this guidance scale calls."""
        return self.branches if guidance_scale > self.guided_above else self.branches[:1]

    def arguments(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a block call by the names of its parameters.

        Some denoisers call their blocks by position and some by keyword, so the arguments are bound to the signature
        of the class's own `forward` (the instance's may be wrapped).
        """
        return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments

    def streams_in(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The streams that a block call takes, by name."""
        bound = self.arguments(block, args, kwargs)
        return {stream: bound[parameter] for stream, parameter in zip(self.streams, self.parameters, strict=True)}

    def streams_out(self, output: Any) -> dict[str, Tensor]:
        """The streams that a block call returned, by name."""
        returned = output if isinstance(output, tuple) else (output,)
        return dict(zip(self.streams, returned, strict=True))

    def returned(self, streams: Mapping[str, Tensor]) -> Any:
        """What a block call returns whose streams are these."""
        first, *rest = (streams[name] for name in self.streams)
        return (first, *rest) if rest else first

    def replaced(self, output: Any, streams: Mapping[str, Tensor]) -> Any:
        """A block's return value with some of its streams replaced, in the structure in which it came."""
        merged = tuple({**self.streams_out(output), **streams}.values())
        return merged if isinstance(output, tuple) else merged[0]


WAN = Architecture(
    name="Wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    denoiser="WanTransformer3DModel",
    blocks=("blocks",),
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
    further_keys="add_k_proj",
)

_registered: list[Architecture] = [WAN]


def register(architecture: Architecture) -> None:
    """Add a record; a later one goes before an earlier one for the same pipeline."""
    _registered.insert(0, architecture)


def lookup(pipe: Any) -> Architecture:
    """The record for a pipeline, found by its class name or that of a parent class.

    Raises:
        InputError: no record names this pipeline, or its denoiser is of another class than the record's.
    """
    names = [parent.__name__ for parent in type(pipe).__mro__]
    for architecture in _registered:
        if not any(name in architecture.pipelines for name in names):
            continue
        for expert, denoiser in architecture.denoisers(pipe).items():
            if architecture.denoiser not in [parent.__name__ for parent in type(denoiser).__mro__]:
                raise InputError(
                    f"{expert} is a {type(denoiser).__name__}, but {architecture.name} pipelines have a"
                    f" {architecture.denoiser}; describe yours with dl.register(Architecture(...))"
                )
        if not architecture.denoisers(pipe):
            raise InputError(f"the {names[0]} has no denoiser: {listed(EXPERTS)} are all None")
        return architecture
    known = sorted({name for architecture in _registered for name in architecture.pipelines})
    raise InputError(
        f"{names[0]} is not a pipeline that dit_lens knows ({listed(known)}); describe it with dl.register(Architecture(...))"
    )
