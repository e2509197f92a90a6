"""What a small denoiser is, and what is known of it beforehand: its blocks, their streams, and which modules do what in them.

Everything that a record states was read in the source of the class, and tests/test_small_denoisers.py holds the class to it, so
that whatever finds these facts out by watching can be tested against them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Blocks:
    """The blocks of one list, which run one after the other.

    Attributes:
        path: of the list in the denoiser. count: how many blocks run.
        streams: what a block takes and returns, in the order of its return value; where they are joined, of the sequence.
        joined: whether the streams are one sequence.
        modules: by (site, stream), the path in the block of the module whose output is that site, for `attn`, `cross_attn`
            and `mlp`. Where one module computes a site for several streams, it stands at each. "" where the block
            computes it, but no module of its own returns it (one projection for attention and MLP, or lines of code).
            Some blocks of a list may lack a module, as the last one that of a text of which nothing is read anymore. A
            module of several streams may be called for one after the other (CogView 4).
    """

    path: str
    count: int
    streams: tuple[str, ...]
    modules: Mapping[tuple[str, str], str]
    joined: bool = False


@dataclass(frozen=True, eq=False)
class SmallDenoiser:
    """A transformer class of diffusers with random weights, and the truth about it.

    Attributes:
        name: of the class.
        make: makes it, with weights from torch's generator; `build` gives that a seed.
        arguments: makes the arguments of one call with two rows that differ, by name; from torch's generator too.
        blocks: in the order in which they run; one entry for each list, or several where its blocks differ in their streams
            or take turns with those of others. All that carry the visual stream, also before it joins the text.
        tokens: how many tokens each stream has in that call; with those that share its place in a block's return value, as
            registers or tokens of a picture before a text.
        layout: (frames, height, width) of the visual tokens; frames are latent frames, an image is one. Of a sound,
            (length, 1, 1). Where the stream has more tokens than these, they are its last (Framepack).
        aside: paths of lists that run and are no blocks, as refiners of a text.
    """

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    arguments: Callable[[], dict[str, Any]] = field(repr=False)
    blocks: tuple[Blocks, ...]
    tokens: Mapping[str, int]
    layout: tuple[int, int, int]
    aside: tuple[str, ...] = ()

    def build(self, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
        """The denoiser and the arguments of a call, drawn from a seed; torch's own generators stay as they were."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of diffusers to itself, about names that will move
            torch.manual_seed(seed)
            return self.make().eval(), self.arguments()
