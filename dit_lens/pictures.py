"""What a pipeline shows at its end, as one kind of tensor: videos, and images as videos of one frame."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.taps import to_host


def shown(output: Any) -> Float[Tensor, "batch video_frames video_height video_width 3"] | None:
    """The videos or images in what a pipeline returned, in [0, 1], on the CPU; None where it is a sound.

    Args:
        output: with `frames` as (batch, frames, 3, height, width), or `images` as (batch, 3, height, width); or the same as
            arrays with the channels last.
    """
    if hasattr(output, "frames"):
        return _channels_last(output.frames, 5)
    return _channels_last(output.images, 4)[:, None] if hasattr(output, "images") else None


def _channels_last(found: Any, axes: int) -> Tensor:
    if not isinstance(found, Tensor):
        return torch.as_tensor(found).float()
    return to_host(found.movedim(axes - 3, -1))
