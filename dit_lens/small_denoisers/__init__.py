"""Small denoisers: every diffusion transformer of the installed diffusers with random weights, and the truth about each.

`denoiser("FluxTransformer2DModel")` gives one of a width of some thirty with the arguments of a call, and
`DENOISERS["FluxTransformer2DModel"]` says what is true of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_lens.errors import InputError
from dit_lens.small_denoisers import (
    chunked,
    cogs,
    crossed,
    experts,
    flux,
    hunyuan,
    joint,
    kandinsky,
    ltx,
    lumina,
    older,
    proteins,
    reading,
    refined,
    sana,
    sequences,
    sounds,
    videos,
    wan,
    wan_kin,
)
from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_denoisers.refused import NO_DIT

__all__ = ["DENOISERS", "NO_DIT", "Blocks", "SmallDenoiser", "denoiser"]

_families = (
    *(flux, joint, cogs, hunyuan, refined, sequences, kandinsky, experts),
    *(wan, wan_kin, chunked, videos, ltx, crossed, lumina, sana, reading, sounds, older, proteins),
)
DENOISERS: dict[str, SmallDenoiser] = {small.name: small for family in _families for small in family.ALL}
"""Every small denoiser, by the name of its class."""


def denoiser(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of that class and the arguments of a call, drawn from the seed; torch's own generators stay as they were."""
    if name not in DENOISERS:
        raise InputError(f"no small denoiser is called {name!r}; there are {', '.join(DENOISERS)}")
    return DENOISERS[name].build(seed)
