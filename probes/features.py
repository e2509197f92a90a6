"""Features: what a probe sees of a recorded activation.

A question is asked of units: the tokens of a board, the latent frames of a clip, or the clip as a whole. Features are a function
from a recorded stack, samples first, to a row of numbers for each unit of each sample, (samples, units, channels); yours may be
too. What was recorded whole is cut and pooled here; what a reducer made during the run is taken as it is.

    pooled_frames(stack)                          (samples, frames, channels): for questions about frames
    one_head(3, pooled_clip)(stack)               of one head, at the sites with rows per head
    each_sample(stack)                            whatever a reducer of yours returned, all of it in one row
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float

from dit_lens.errors import InputError

Stack = Float[np.ndarray, "samples ..."]
"""What was recorded: (samples, frames, height, width, channels), with heads before the channels at the sites that have them
(they are joined), or what a reducer left."""
Units = Float[np.ndarray, "samples units channels"]
Features = Callable[[Stack], Units]


def tokens(frame: int | None = -1) -> Features:
    """The tokens of one of the recorded latent frames, row by row; negative from the end, None for the middle one."""

    def of_frame(stack: Stack) -> Units:
        whole = _whole(stack, "tokens")
        place = whole.shape[1] // 2 if frame is None else frame
        if not -whole.shape[1] <= place < whole.shape[1]:
            raise InputError(f"tokens({frame}) of {whole.shape[1]} recorded frames: write one from 0 to {whole.shape[1] - 1}")
        return rearrange(whole[:, place], "samples y x channels -> samples (y x) channels")

    return of_frame


def pooled_frames(stack: Stack) -> Units:
    """The mean over the tokens of every latent frame."""
    return reduce(_whole(stack, "pooled_frames"), "samples frames y x channels -> samples frames channels", "mean")


def pooled_clip(stack: Stack) -> Units:
    """The mean over all tokens of a clip."""
    return pooled_frames(stack).mean(axis=1, keepdims=True)


def one_head(head: int, then: Features = pooled_clip) -> Features:
    """One head of a site that has rows per head, cut or pooled as `then` says; counted among those that were recorded."""

    def of_head(stack: Stack) -> Units:
        if stack.ndim != 6 or not -stack.shape[-2] <= head < stack.shape[-2]:
            heads = f"{stack.shape[-2]} heads" if stack.ndim == 6 else f"no axis of heads in {stack.shape}"
            raise InputError(
                f"one_head({head}): there is {heads}; record site='heads', 'q', 'k' or 'v', and name one of its heads"
            )
        return then(stack[..., head, :])

    return of_head


def each_sample(stack: Stack) -> Units:
    """All that was recorded of a sample in one row: for questions about clips, from any reducer."""
    return stack.reshape(len(stack), 1, -1)


def each_unit(stack: Stack) -> Units:
    """A row for every entry of the first axis after the samples: the frames that `frame_mean` leaves, the tokens of a mask."""
    if stack.ndim < 3:
        raise InputError(f"each_unit: there is one row per sample in {stack.shape}; write features=each_sample")
    return stack.reshape(*stack.shape[:2], -1)


def _whole(stack: Stack, name: str) -> Float[np.ndarray, "samples frames y x channels"]:
    if stack.ndim not in (5, 6):
        raise InputError(
            f"{name} needs whole frames, (samples, frames, height, width, channels), and there is {stack.shape}: write"
            " features=each_sample or each_unit for what a reducer made"
        )
    return stack.reshape(*stack.shape[:4], -1)
