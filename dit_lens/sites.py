"""Sites: which tensors of a block can be read and replaced, and where in the block each of them is.

A site is a small record, so that an architecture can name its own. It says which module of the block to stop at, at
which *port* of it, and how to come from what passes there to the tensor that a researcher means:

| port | what passes |
|---|---|
| `output` | what the module returns |
| `input` | its first argument |
| `attention` | the queries, keys and values that the attention module hands to scaled dot-product attention |

A tensor of a site has shape (batch, tokens, channels), or (batch, tokens, heads, channels) where it has rows per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Gate:
    """The factor by which a block multiplies a module's output, where it is a chunk of (table + modulation).

    Attributes:
        index, chunks: which chunk, of how many. table: the block's parameter. modulation: the argument of its `forward`,
            of shape (batch, chunks, channels) or (batch, tokens, chunks, channels).
        depends: what the factor depends on, in words.
    """

    index: int
    chunks: int = 6
    table: str = "scale_shift_table"
    modulation: str = "temb"
    depends: str = "timestep"

    def of(self, block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The factor in one call of a block: float32, of shape (batch, 1 or tokens, channels)."""
        modulation: Tensor = arguments[self.modulation].float()
        factor = (getattr(block, self.table) + modulation).chunk(self.chunks, dim=-2)[self.index]
        return factor.squeeze(2) if factor.ndim == 4 else factor


@dataclass(frozen=True)
class Site:
    """One tensor of a block.

    Attributes:
        name: what users call it.
        module: path of the module to stop at, inside the block; empty for the block itself.
        port: `output`, `input` or `attention`.
        item: which of the tensors that pass there, where there are several.
        within: the streams whose tokens lie one after the other in that tensor; none where it holds those of one stream, or of
            all that the block itself has joined.
        call, calls: which of how many calls of the module in one of the block.
        form: of the tensor: `tokens`, (batch, tokens, channels); `heads`, (batch, tokens, heads, channels of one), side by side;
            `grid`, (batch, frames, rows, columns, channels);
            `picture`, (batch or batch x frames, channels, rows, columns), whose tokens are its frames, rows and columns.
        columns: of a projection that takes in the outputs of several modules side by side, those of this one (first, last + 1);
            the site is what the projection makes of them, without its bias.
        stream: the token stream that the tensor belongs to; None where the block has one such tensor for every stream.
        per_head: whether it has one row per attention head.
        measures: `value`, what passes; `pair`, the queries and keys side by side, from which weights are recomputed, and
            read-only; `change`, what passes minus the stream that the block took; `contribution`, what passes times the
            gate, which is what the block adds to its stream, and read-only. The last two in float32.
        gate: the factor of a contribution; none where the block adds the output as it is.
    """

    name: str
    module: str = ""
    port: Literal["output", "input", "attention"] = "output"
    item: int = 0
    call: int = 0
    calls: int = 1
    within: tuple[str, ...] = ()
    form: Literal["tokens", "heads", "grid", "picture"] = "tokens"
    columns: tuple[int, int] | None = None
    stream: str | None = None
    per_head: bool = False
    measures: Literal["value", "pair", "change", "contribution"] = "value"
    gate: Gate | None = None

    def as_tokens(self, tensor: Tensor, batch: int = 0) -> Tensor:
        """What passes, as (batch, tokens, channels); the batch is to be given where frames stand in it."""
        if self.form == "picture":
            tokens = tensor.flatten(2).mT
            return tokens.unflatten(0, (batch, -1)).flatten(1, 2) if batch else tokens
        if self.form == "grid":
            return tensor.flatten(1, 3)
        return tensor.flatten(2) if self.form == "heads" else tensor

    def as_passing(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens in the form in which the tensor passes, with the shape of another that did."""
        if self.form == "picture":
            return tokens.unflatten(1, (-1, like.shape[2] * like.shape[3])).flatten(0, 1).mT.reshape(like.shape)
        return tokens.reshape(like.shape)

    @property
    def read_only(self) -> bool:
        """Whether it can be read only."""
        return self.measures in ("contribution", "pair")

    @property
    def replaceable(self) -> str:
        """What to replace in place of a site that is read-only, in words."""
        return "'q' or 'k'" if self.measures == "pair" else repr(self.name.removesuffix("_contribution"))

    @property
    def side_by_side(self) -> int:
        """How many tensors as wide as the stream stand side by side in it."""
        return 2 if self.measures == "pair" else 1

    @property
    def in_float32(self) -> bool:
        """Whether the tensor is in float32 whatever the model's precision."""
        return self.measures in ("change", "contribution")


BLOCK_SITES = (Site("resid"), Site("update", measures="change"))
"""What every block has: the stream after it, and that minus the stream before it."""


def attention_sites(module: str, projection: str) -> tuple[Site, ...]:
    """The sites inside an attention module of one stream: q, k, v, and the heads that its output projection takes in.

    `qk` holds the queries and keys of one call side by side, (batch, tokens, heads, 2 * channels).
    """
    names = enumerate(("q", "k", "v"))
    inside = tuple(Site(name, module, "attention", item, per_head=True) for item, name in names)
    pair = Site("qk", module, "attention", per_head=True, measures="pair")
    return (*inside, pair, Site("heads", f"{module}.{projection}", "input", per_head=True))
