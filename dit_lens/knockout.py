"""Attention knockout: some tokens are kept from attending to others.

A mask makes torch compute attention with another kernel, which rounds differently even where everything is allowed. So a
knockout is compared with a *baseline* of its own, the same edit with the mask that allows all pairs, and not with a run
that is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_lens.architectures import Layout
from dit_lens.edits import Edit, Moment
from dit_lens.errors import InputError
from dit_lens.schedule import Forecast
from dit_lens.selection import Cell, Selector

SITES = ("attn", "cross_attn")
"""Where attention can be knocked out: in the attention of visual tokens to each other, and to the text."""


@dataclass(frozen=True, eq=False)
class KnockoutAttention(Edit):
    """Keep the tokens of `queries` from attending to those of `keys`.

    A query that is left without any key gets exactly zero from the attention, before its output projection. Several
    knockouts at one cell cut all that any of them cuts. In joint attention `queries` and `keys` are visual tokens; the text's
    tokens hear as before, and are heard as before but with `of_text`.

    Attributes:
        at: blocks, steps and branches, with site `attn` or `cross_attn`; without head, frames and tokens.
        queries: a mask of booleans on the layout, of shape (height, width) or (frames, height, width); all when left out.
        keys: as `queries` at `attn`; at `cross_attn` a mask of shape (text tokens,). All when left out.
        baseline: cut nothing, and compute as if: what the edit is to be compared with.
        pairs: a function (layout, number of keys) -> (queries, keys) booleans that says which pairs are cut, in place of
            `queries` and `keys`.
        of_text: whether the keys are the text's, as they always are at `cross_attn`: so in joint attention.
    """

    queries: Any = None
    keys: Any = None
    baseline: bool = False
    pairs: Callable[[Layout, int], Tensor] | None = None
    of_text: bool = False

    @staticmethod
    def causal_frames(at: Selector, baseline: bool = False) -> KnockoutAttention:
        """No latent frame attends to a later one."""
        return KnockoutAttention(at, pairs=_later_frames, baseline=baseline)

    @staticmethod
    def text(at: Selector, tokens: Any = None, baseline: bool = False) -> KnockoutAttention:
        """No visual token attends to the text, or to those of its tokens that a mask names.

        Write `cross_attn` where there is one, and `attn` where pictures and words attend jointly.
        """
        return KnockoutAttention(at, keys=tokens, baseline=baseline, of_text=True)

    @staticmethod
    def first_frame(at: Selector, baseline: bool = False) -> KnockoutAttention:
        """No other latent frame attends to the first one."""
        return KnockoutAttention(at, pairs=_first_frame, baseline=baseline)

    def compared(self) -> KnockoutAttention:
        """The baseline of this knockout."""
        return replace(self, baseline=True)

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """The selection is of attention modules."""
        if not self.at.whole or any(cell.site not in SITES for cell in cells):
            raise InputError(
                f"{self} cuts attention: name site='attn' or site='cross_attn' in dl.at(...), and say which tokens with"
                " queries= and keys=, not with head, frames or tokens"
            )
        if self.pairs in (_later_frames, _first_frame) and any(cell.site != "attn" for cell in cells):
            raise InputError(f"{self}: latent frames attend to each other at site='attn'; write that")
        if self.pairs is not None and (self.queries is not None or self.keys is not None):
            raise InputError(f"{self} has pairs=, which is in place of queries= and keys=; leave these out")

    def check_shape(self, moment: Moment) -> None:
        """The masks fit the layout and the text."""
        keys = moment.text_tokens if self.reads_text(moment.cell.site) else moment.layout.tokens
        if keys is not None:
            self.allowed(moment.layout, keys, moment.cell.site)

    def reads_text(self, site: str) -> bool:
        """Whether what it cuts at a site are tokens of the text."""
        return self.of_text or site == "cross_attn"

    def allowed(self, layout: Layout, keys: int, site: str) -> Tensor:
        """Which keys each query may attend to.

        Args:
            layout: of the visual tokens. keys: how many tokens are attended to. site: `attn` or `cross_attn`.

        Returns:
            Booleans of shape (queries, keys).

        Raises:
            InputError: a mask does not fit.
        """
        if self.pairs is not None:
            cut = self.pairs(layout, keys)
            if cut.dtype != torch.bool or cut.shape != (layout.tokens, keys):
                raise InputError(
                    f"{self}: pairs gave {cut.dtype} of shape {tuple(cut.shape)}; return booleans of shape (queries, keys) ="
                    f" ({layout.tokens}, {keys})"
                )
        else:
            queries = self._on_layout("queries", self.queries, layout)
            seen = self._on_text(keys) if self.reads_text(site) else self._on_layout("keys", self.keys, layout)
            cut = queries[:, None] & seen
        return torch.ones_like(cut) if self.baseline else ~cut

    def _on_layout(self, name: str, mask: Any, layout: Layout) -> Tensor:
        """A mask as booleans of shape (tokens,)."""
        if mask is None:
            return torch.ones(layout.tokens, dtype=torch.bool)
        chosen = torch.as_tensor(mask).cpu()
        if chosen.dtype != torch.bool or chosen.shape not in (layout.shape, layout.shape[1:]):
            raise InputError(
                f"{self}: {name}= is a mask of {chosen.dtype} and shape {tuple(chosen.shape)}; write booleans on the layout,"
                f" of shape {layout.shape[1:]} or {layout.shape}"
            )
        return chosen.expand(layout.shape).flatten()

    def _on_text(self, keys: int) -> Tensor:
        """The mask of text tokens as booleans of shape (keys,)."""
        if self.keys is None:
            return torch.ones(keys, dtype=torch.bool)
        chosen = torch.as_tensor(self.keys).cpu()
        if chosen.dtype != torch.bool or chosen.shape != (keys,):
            raise InputError(
                f"{self}: keys= is a mask of {chosen.dtype} and shape {tuple(chosen.shape)}; write booleans of shape ({keys},),"
                " one for each text token that the denoiser reads"
            )
        return chosen


def _frames(layout: Layout) -> Tensor:
    """The latent frame of every visual token."""
    return torch.arange(layout.frames).repeat_interleave(layout.height * layout.width)


def _later_frames(layout: Layout, keys: int) -> Tensor:
    frames = _frames(layout)
    return frames[:, None] < frames


def _first_frame(layout: Layout, keys: int) -> Tensor:
    frames = _frames(layout)
    return (frames[:, None] > 0) & (frames == 0)
