"""x0-hat against a denoiser that knows the answer, for every scheduler family."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import arguments, tiny_pipeline
from torch import Tensor

import dit_lens as dl
from dit_lens import noise
from dit_lens.errors import InputError
from dit_lens.noise import NoiseState, forget_history, noise_state, x0_hat, x0_weights

pytestmark = [
    # Raised inside diffusers, where schedulers hand torch tensors to numpy.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]>=t0:UserWarning"),  # torchsde, of rounding
]

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


def upward_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Mochi's timesteps count the clean sample in thousandths."""
    return timestep / 1000, 1 - timestep / 1000


def edm_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """A quarter of the logarithm of the noise (Karras et al. 2022, table 1)."""
    return 1.0, math.exp(4 * timestep)


def cosine_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """An angle, as a share of the right one."""
    return 1.0, math.tan(timestep * math.pi / 2)


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


PRECONDITIONED = {"EDMEuler": edm_level, "EDMDPMSolverMultistep": edm_level, "CosineDPMSolverMultistep": cosine_level}
DATA = 0.6
"""The standard deviation of the data that a denoiser of Karras et al. was made for."""


def output_of(prediction: str, level: tuple[float, float], sample: Tensor, clean: Tensor, data: float = 1.0) -> Tensor:
    """What a denoiser that knows the clean sample returns; v is defined for clean samples of deviation 1."""
    signal, noise = level
    if prediction == "flow_prediction":
        return (sample - clean) / noise
    if prediction == "inverted_flow_prediction":
        return (clean - sample) / noise
    if prediction == "sample":
        return clean
    epsilon = (sample - signal * clean) / noise
    if prediction == "epsilon":
        return epsilon
    size = math.hypot(signal * data, noise)
    v = (signal * data * epsilon - noise * clean / data) / size
    return -v if prediction == "negative_v_prediction" else v


def settings() -> list[Any]:
    """(scheduler, what its denoiser predicts, its noise levels by timestep), with a readable name."""
    cases: list[tuple[str, dict[str, Any], str, Level]] = [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
        ("FlowMatchLCMScheduler", {"shift": 3.0}, "flow_prediction", flow_level),
        ("LTXEulerAncestralRFScheduler", {"eta": 0.5}, "flow_prediction", flow_level),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "shift": 3.0}, "inverted_flow_prediction", upward_level),
        ("FlowMatchLCMScheduler", {"invert_sigmas": True, "shift": 3.0}, "inverted_flow_prediction", upward_level),
    ]
    for name, level in PRECONDITIONED.items():
        for named, prediction in (("v_prediction", "v_prediction"), ("epsilon", "negative_v_prediction")):
            spread = {"sigma_min": 0.3, "sigma_max": 80.0, "sigma_data": DATA}
            cases += [(f"{name}Scheduler", {**spread, "prediction_type": named}, prediction, level)]
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
    if name.startswith("Cosine"):
        pytest.importorskip("torchsde", reason="diffusers has this scheduler only with torchsde")
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    signal, spread = level(scheduler, float(scheduler.timesteps[0]))
    sample = signal * clean + spread * noise
    extra = {} if "generator" not in scheduler.step.__code__.co_varnames else {"generator": generator}
    previous, steps = None, 0
    for index, timestep in enumerate(scheduler.timesteps):
        signal, spread = level(scheduler, float(timestep))
        state = noise_state(scheduler, float(timestep))
        assert (state.signal, state.noise) == pytest.approx((signal, spread), rel=1e-3, abs=1e-6)
        assert state.sigma == (state.noise if "flow" in prediction else pytest.approx(spread / signal, rel=1e-3))
        output = output_of(prediction, (signal, spread), sample, clean, config.get("sigma_data", 1.0))
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


def test_settings_that_a_scheduler_does_not_know_are_not_read() -> None:
    """`from_config` keeps what it finds in the configuration of another scheduler."""
    heun: Any = diffusers.FlowMatchHeunDiscreteScheduler.from_config({"invert_sigmas": True})
    flow: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config({"prediction_type": "epsilon"})
    for scheduler, left in ((heun, "invert_sigmas"), (flow, "prediction_type")):
        assert scheduler.config[left]
        scheduler.set_timesteps(STEPS)
        timestep = float(scheduler.timesteps[1])
        state = noise_state(scheduler, timestep, 1)
        assert (state.sigma, state.noise, state.prediction) == (pytest.approx(timestep / 1000), state.sigma, "flow_prediction")


def test_upside_down_sigmas_in_a_run() -> None:
    """The noise level falls as in any run, and the last x0-hat of a deterministic sampler is what it ends with."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = tiny_pipeline(scheduler=scheduler)
    replaced = dl.ReplaceLatents(step=2, noise=7, how="sigma_matched")
    run = dl.wrap(pipe, engine="hooks").run(**arguments(pipe), decode=False, edits=replaced)
    assert run.sigmas.tolist() == pytest.approx([1 - timestep / 1000 for timestep in run.timesteps], abs=1e-6)
    assert run.sigmas.diff().max() < 0
    torch.testing.assert_close(run.x0_hat(-1), run.latents[-1], rtol=1e-5, atol=1e-5)
    noise = (run.latents[2] - (1 - run.sigmas[2]) * run.x0_hat(1)) / run.sigmas[2]
    assert noise.std().item() == pytest.approx(1, abs=0.2)


def test_a_multistep_solver_of_the_preconditioned_forgets_too() -> None:
    fresh, used = (diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.3) for _ in range(2))
    outputs = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in (fresh, used):
        scheduler.set_timesteps(STEPS)
    sample = outputs[0]
    for index in range(2):
        sample = used.step(outputs[index], used.timesteps[index], sample, return_dict=False)[0]
    forget_history(used)
    fresh.set_begin_index(2)
    following = [one.step(outputs[2], one.timesteps[2], outputs[0], return_dict=False)[0] for one in (fresh, used)]
    assert torch.equal(*following)


def test_an_unknown_scheduler_is_named() -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(InputError, match=r"IPNDMScheduler are not known; known: .*FlowMatchEuler"):
        noise_state(scheduler, float(scheduler.timesteps[0]))


def test_the_page_lists_the_schedulers_of_diffusers_that_are_refused() -> None:
    root = Path(diffusers.schedulers.__file__).parent
    classes = re.findall(
        r"^class (\w+Scheduler)\(.*ConfigMixin", "\n".join(map(Path.read_text, root.rglob("*.py"))), flags=re.MULTILINE
    )
    known = {*noise.FLOW_MATCH, *noise.MULTISTEP, *noise.EXPLODING, *noise.PRECONDITIONED, *noise.BY_TIMESTEP}
    assert known <= set(classes)
    page = re.search(r"are refused: ([\w,\s]+)\.", noise.__doc__ or "")
    assert page is not None
    listed = re.split(r",\s+", page[1])
    assert listed == sorted(name.removesuffix("Scheduler") for name in set(classes) - known)


def test_there_is_no_x0_where_nothing_of_it_is_left() -> None:
    assert x0_weights(NoiseState(math.inf, 0.0, 1.0, "epsilon")) is None
    assert x0_weights(NoiseState(math.inf, 0.0, 1.0, "v_prediction")) == (0.0, -1.0)
    with pytest.raises(InputError, match="'score' output is not known"):
        x0_weights(NoiseState(1.0, 0.5, 0.5, "score"))
