"""x0-hat against a denoiser that knows the answer, for every scheduler family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_lens.errors import InputError
from dit_lens.noise import NoiseState, noise_state, x0_hat, x0_weights

# Raised inside diffusers, where schedulers hand torch tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (2, 4, 2, 3, 3)
STEPS = 6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
MULTISTEP = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
BY_TIMESTEP = ("DDIM", "DDPM", "CogVideoXDDIM", "CogVideoXDPM", "PNDM", "LCM", "TCD")
EXPLODING = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
EXPLODING += ("LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")

Level = Callable[[Any, float], tuple[float, float]]


def flow_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Flow matching counts its timesteps in thousandths of sigma."""
    return 1 - timestep / 1000, timestep / 1000


def preserving_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Signal and noise of a process that keeps the variance, from the table of its betas."""
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2
    alpha = float(torch.cumprod(1 - betas, 0)[int(timestep)])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def snr_shifted_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """The same for CogVideoX, whose table is shifted and rescaled; taken from the scheduler."""
    alpha = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def exploding_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Noise to signal of the same betas; between two timesteps it is interpolated in its logarithm."""
    signals = np.array([preserving_level(scheduler, step) for step in range(1000)])
    ratio = np.log(signals[:, 1] / signals[:, 0])
    return 1.0, math.exp(np.interp(timestep, np.arange(1000), ratio))


def output_of(prediction: str, level: tuple[float, float], sample: Tensor, clean: Tensor) -> Tensor:
    """What a denoiser that knows the clean sample returns."""
    signal, noise = level
    if prediction == "flow_prediction":
        return (sample - clean) / noise
    if prediction == "sample":
        return clean
    epsilon = (sample - signal * clean) / noise
    if prediction == "epsilon":
        return epsilon
    size = math.hypot(signal, noise)
    return (signal * epsilon - noise * clean) / size


def settings() -> list[Any]:
    """(scheduler, what its denoiser predicts, its noise levels by timestep), with a readable name."""
    cases: list[tuple[str, dict[str, Any], str, Level]] = [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
        ("FlowMatchLCMScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
    ]
    for name in MULTISTEP:
        spacing = {**BETAS, "prediction_type": "epsilon"}
        cases += [(name, {**spacing, "prediction_type": p}, p, preserving_level) for p in PREDICTIONS]
    for name in BY_TIMESTEP:
        level = snr_shifted_level if name.startswith("CogVideoX") else preserving_level
        extra = {} if name.startswith(("CogVideoX", "PNDM")) else {"clip_sample": False}
        kinds = PREDICTIONS[:2] if name == "PNDM" else PREDICTIONS
        cases += [(f"{name}Scheduler", {**BETAS, **extra, "prediction_type": p}, p, level) for p in kinds]
    for name in EXPLODING:
        spacing = {**BETAS, "timestep_spacing": "trailing"}
        cases += [(f"{name}Scheduler", {**spacing, "prediction_type": p}, p, exploding_level) for p in PREDICTIONS[:2]]
    return [pytest.param(*case, id=f"{case[0].removesuffix('Scheduler')}-{case[2]}") for case in cases]


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize(("name", "config", "prediction", "level"), settings())
def test_x0_hat_is_what_an_oracle_denoiser_knows(name: str, config: dict[str, Any], prediction: str, level: Level) -> None:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    signal, spread = level(scheduler, float(scheduler.timesteps[0]))
    sample = signal * clean + spread * noise
    extra = {} if "generator" not in scheduler.step.__code__.co_varnames else {"generator": generator}
    previous, steps = None, 0
    for index, timestep in enumerate(scheduler.timesteps):
        output = output_of(prediction, level(scheduler, float(timestep)), sample, clean)
        found = x0_hat(scheduler, output, float(timestep), sample)
        assert (found - clean).abs().max() < 1e-5, (index, timestep)
        scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
        sample, previous = advance(scheduler, output, index, sample, previous, extra)
        steps += 1
    assert steps >= STEPS


def advance(
    scheduler: Any, output: Tensor, index: int, sample: Tensor, previous: Tensor | None, extra: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """One scheduler step; CogVideoXDPM wants the clean sample of the step before, and returns it."""
    timestep = scheduler.timesteps[index]
    if type(scheduler).__name__ != "CogVideoXDPMScheduler":
        return scheduler.step(output, timestep, sample, return_dict=False, **extra)[0], None
    back = scheduler.timesteps[index - 1] if index else None
    following, clean = scheduler.step(output, previous, timestep, back, sample, return_dict=False, **extra)[:2]
    return following, clean


@pytest.mark.parametrize("name", MULTISTEP)
def test_x0_hat_with_flow_sigmas(name: str) -> None:
    """Their timesteps are rounded, so the oracle takes its noise levels from the formula of the shifted schedule."""
    config = {**FLOW, "tau_func": lambda t: 0} if name == "SASolverScheduler" else FLOW
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = noise
    for index, timestep in enumerate(scheduler.timesteps):
        # UniPC counts down from 1 towards 1/1000, the others from 999/1000 towards 0.
        share = 1 - 0.999 * index / STEPS if name.startswith("UniPC") else 0.999 * (1 - index / STEPS)
        sigma = 3 * share / (1 + 2 * share)
        output = output_of("flow_prediction", (1 - sigma, sigma), sample, clean)
        assert (x0_hat(scheduler, output, float(timestep), sample) - clean).abs().max() < 1e-5
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]


def test_an_unknown_scheduler_is_named() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(InputError, match=r"EDMEulerScheduler are not known; known: .*FlowMatchEuler"):
        noise_state(scheduler, float(scheduler.timesteps[0]))


def test_there_is_no_x0_where_nothing_of_it_is_left() -> None:
    assert x0_weights(NoiseState(math.inf, 0.0, 1.0, "epsilon")) is None
    assert x0_weights(NoiseState(math.inf, 0.0, 1.0, "v_prediction")) == (0.0, -1.0)
    with pytest.raises(InputError, match="'score' output is not known"):
        x0_weights(NoiseState(1.0, 0.5, 0.5, "score"))
