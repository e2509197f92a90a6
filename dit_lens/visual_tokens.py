"""How many visual tokens a denoiser call has, and rows: that tells streams of one sequence apart, and frames in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dit_lens.architectures import Architecture


class VisualTokens:
    """The count for the call of one denoiser that is under way.

    Attributes:
        count: of one sample, and rows: of the batch; 0 before the first call.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self.count = self.rows = 0

    def begin(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        arguments = self._architecture.arguments(denoiser, args, kwargs)
        self.count = self._architecture.layout(denoiser, arguments).tokens
        self.rows = len(self._architecture.taken(arguments))


@contextmanager
def counting(architecture: Architecture, denoisers: Mapping[str, nn.Module]) -> Iterator[dict[str, VisualTokens]]:
    """The counts of every expert, kept up to date as long as the context lasts; where nothing is joined nobody counts."""
    counts = {expert: VisualTokens(architecture) for expert in denoisers}
    with ExitStack() as hooks:
        sites = architecture.sites
        if any(stack.joined for stack in architecture.stacks) or any(site.within or site.form == "picture" for site in sites):
            for expert, denoiser in denoisers.items():
                hook = denoiser.register_forward_pre_hook(counts[expert].begin, with_kwargs=True)
                hooks.callback(hook.remove)
        yield counts
