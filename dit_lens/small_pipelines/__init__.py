"""Small pipelines: diffusers' own classes with random weights, built in memory, that run on a CPU in about a second.

`pipeline("flux")` is a FluxPipeline of a few thousand parameters, and `PIPELINES["flux"]` says how to call it and what is true
of it. Its videos and images mean nothing; its mechanics are those of the large one.
"""

from __future__ import annotations

from typing import Any

from dit_lens.errors import InputError
from dit_lens.small_pipelines import audio, crossed, images, unusual, videos, wan
from dit_lens.small_pipelines.record import SmallPipeline

__all__ = ["PIPELINES", "SmallPipeline", "pipeline"]

PIPELINES: dict[str, SmallPipeline] = {
    small.name: small for small in (*wan.ALL, *videos.ALL, *images.ALL, *crossed.ALL, *unusual.ALL, *audio.ALL)
}
"""Every small pipeline, by name."""


def pipeline(name: str, seed: int = 0) -> Any:
    """The pipeline of that name, with weights drawn from the seed; torch's own generators stay as they were."""
    if name not in PIPELINES:
        raise InputError(f"no small pipeline is called {name!r}; there are {', '.join(PIPELINES)}")
    return PIPELINES[name].build(seed)
