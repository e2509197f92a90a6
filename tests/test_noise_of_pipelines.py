"""x0-hat at every step of every small pipeline, with every scheduler that it names, from what the scheduler received.

The denoiser knows the answer (`stamps.all_knowing`), so x0-hat is the answer at every step. It learns how the pipeline mixes
sample and noise from the record of the pipeline and the tables of the scheduler, and nothing from `dit_lens.noise`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from stamps import watched
from torch import Tensor

from dit_lens.noise import NoiseState, noise_state, x0_hat
from dit_lens.small_pipelines import PIPELINES, SmallPipeline, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi asks for float32 there
]

Seen = list[tuple[NoiseState, Tensor]]

CASES = [(small, name) for small in PIPELINES.values() for name in small.schedulers]
every = pytest.mark.parametrize(("small", "name"), CASES, ids=[f"{small.name}-{name}" for small, name in CASES])


def betting(scheduler: Any, seen: Seen) -> Callable[..., Any]:
    """The scheduler's `step`, with the noise state and the x0-hat of what it receives written down before."""
    step = scheduler.step

    @wraps(step)
    def betting_step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(step).bind(*args, **kwargs).arguments
        timestep = float(call["timestep"])
        seen.append((noise_state(scheduler, timestep), x0_hat(scheduler, call["model_output"], timestep, call["sample"])))
        return step(*args, **kwargs)

    return betting_step


def run(small: SmallPipeline, name: str) -> tuple[Tensor, Seen]:
    """The answer, and what was seen of each step: the noise state and x0-hat."""
    seen: Seen = []
    pipe = pipeline(small.name)
    pipe.scheduler = small.schedulers[name]()
    shape = watched(small, pipe).made[0].shape[1:]
    target = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    pipe.scheduler.step = betting(pipe.scheduler, seen)
    watched(small, pipe, target)
    return target, seen


@every
def test_x0_hat_is_the_answer_at_every_step(small: SmallPipeline, name: str) -> None:
    target, seen = run(small, name)
    assert len(seen) == small.inputs["num_inference_steps"]
    for _, found in seen:
        if small.name == "wan-5b-image":  # its denoiser is shown the image in the place of the first frame
            found, expected = found[:, :, 1:], target[:, 1:]
        else:
            expected = target
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-3)
    levels = [state.sigma for state, _ in seen]
    assert levels == sorted(set(levels), reverse=True), "noise falls from step to step"
    assert small.prediction != "flow" or all(state.sigma == state.noise == pytest.approx(1 - state.signal) for state, _ in seen)
