"""Making diffusers' and transformers' objects from small sizes; their own annotations promise less than they take."""

from __future__ import annotations

from typing import Any

import torch


def made(kind: Any, **settings: Any) -> Any:
    """An object of that class; a module is made ready for inference."""
    built = kind(**settings)
    return built.eval() if isinstance(built, torch.nn.Module) else built


@torch.no_grad()
def alive(kind: Any, scale: float = 0.1, **settings: Any) -> Any:
    """A denoiser of that class in which parameters that start as all zeros, or as all ones, are drawn around these.

    A gate or an output projection that starts at zero would make its block a block that does nothing; norms that all
    start at one could be taken for each other unnoticed.
    """
    built = made(kind, **settings)
    for parameter in built.parameters():
        if not parameter.any() or bool((parameter == 1).all()):
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return built
