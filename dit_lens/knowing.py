"""A denoiser that knows the answer: whatever it is shown, it says what has a given x0-hat.

How sample and output make x0-hat is taken from a run of the same schedule. If that is so, any scheduler is led to the answer: the
scheduler's own arithmetic says whether it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_lens.calls import in_form_of
from dit_lens.run import Run
from dit_lens.taps import replaced_attribute, to_host


@contextmanager
def knowing(pipe: Any, denoisers: Mapping[str, nn.Module], run: Run, aim: Tensor) -> Iterator[None]:
    """Let the denoisers of a pipeline answer so, in a run with the arguments and seeds of one that there is.

    Args:
        aim: the answer, (batch, ...) as the scheduler's latents.
    """
    made: list[Tensor] = [run.latents[0]]
    plain = pipe.scheduler.step

    # Pipelines look at its signature.
    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        made.append(to_host(output[0] if isinstance(output, tuple) else output.prev_sample)[: len(aim)])
        return output

    def answer(module: nn.Module, args: Any, output: Any) -> None:
        weights = run.weights[len(made) - 1]
        assert weights is not None
        of_sample, of_output = weights
        assert not isinstance(of_sample, tuple), "a scheduler has one noise level for all frames"
        assert not isinstance(of_output, tuple)
        # A step without noise says nothing of the output, and moves nothing.
        right = run.sign * (aim - of_sample * made[-1].float()) / of_output if abs(of_output) > 1e-9 else torch.zeros_like(aim)
        _write(output if isinstance(output, Tensor) else output[0], right)

    with ExitStack() as attached:
        attached.enter_context(replaced_attribute(pipe.scheduler, "step", step))
        for denoiser in denoisers.values():
            attached.callback(denoiser.register_forward_hook(answer, prepend=True).remove)
        yield


def _write(told: Any, right: Tensor) -> None:
    """Write an answer into what a denoiser returned: a tensor, or one for each sample. The rows of every branch get the same."""
    whole = torch.stack(list(told)) if not isinstance(told, Tensor) else told
    rows = right.repeat(len(whole) // len(right), *[1] * (right.ndim - 1)).to(whole)
    form = in_form_of(right, whole)
    # Beside the mean there may be a variance, in the other half of the channels.
    part = whole if form.numel() == whole.numel() else whole[:, : whole.shape[1] // 2]
    part.copy_(rows.reshape(part.shape))
    if whole is not told:
        for one, new in zip(told, whole, strict=True):
            one.copy_(new)
