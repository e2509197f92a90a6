"""How noisy a sample is at each step, and what clean sample a denoiser's output implies there.

Schedulers differ in how they mix a clean sample with noise and in what they take a denoiser's output to be: a velocity,
the noise, or the clean sample itself. `noise_state` says both for one point of a schedule. In every family the clean
sample that an output implies is a weighted sum of the noisy sample and the output, x0-hat = a * sample + b * output;
`x0_weights` gives (a, b). The formulas are those of each scheduler's own `step` and `convert_model_output`, without the
clipping that some of them add.

Schedulers of diffusers that are in none of the families below are refused: Amused, BlockRefinement, CMStochasticIterative,
ConsistencyDecoder, DDIMInverse, DDPMWuerstchen, DPMSolverMultistepInverse, DPMSolverSDE, DiscreteDDIM, EntropyBound,
FlowMapEulerDiscrete, Helios, HeliosDMD, IPNDM, KarrasVe, MiniMaxH3, Piflow, RFD4Proteina, RePaint, SCM, ScoreSdeVe, ScoreSdeVp,
UnCLIP, VQDiffusion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.errors import InputError, listed

FLOW_MATCH = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
MULTISTEP = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
BY_TIMESTEP = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Scheduler families, by how a noisy sample is made of a clean one and noise (see `NoiseState`)."""


@dataclass(frozen=True)
class NoiseState:
    """Noise at one point of a schedule: sample = signal * x0 + noise * epsilon.

    Attributes:
        sigma: the noise level: in flow matching the share of noise in [0, 1], elsewhere the ratio of noise to signal.
        signal: factor of the clean sample. noise: factor of the Gaussian noise.
        prediction: what the denoiser's output is: flow_prediction (noise - x0), inverted_flow_prediction (x0 - noise),
            epsilon, v_prediction, negative_v_prediction (-v) or sample.
        data: the standard deviation of the clean samples that v is defined with.
    """

    sigma: float
    signal: float
    noise: float
    prediction: str
    data: float = 1.0


def noise_state(scheduler: Any, timestep: float, index: int | None = None) -> NoiseState:
    """The noise state before `scheduler.step` is called with this timestep.

    Args:
        scheduler: a diffusers scheduler with its timesteps set.
        timestep: the timestep that the denoiser is called with.
        index: position in `scheduler.sigmas`; where the scheduler stands when left out.

    Raises:
        InputError: the scheduler is of a family that is not known here.
    """
    names = {parent.__name__ for parent in type(scheduler).__mro__}
    prediction = _setting(scheduler, "prediction_type", "flow_prediction")
    if names & set(BY_TIMESTEP):
        alpha = float(scheduler.alphas_cumprod[int(timestep)])
        sigma = math.sqrt((1 - alpha) / alpha) if alpha else math.inf
        return NoiseState(sigma, math.sqrt(alpha), math.sqrt(1 - alpha), prediction)
    if not names & {*FLOW_MATCH, *MULTISTEP, *EXPLODING, *PRECONDITIONED}:
        known = sorted({*FLOW_MATCH, *MULTISTEP, *EXPLODING, *PRECONDITIONED, *BY_TIMESTEP})
        raise InputError(f"the noise levels of a {type(scheduler).__name__} are not known; known: {listed(known)}")
    if index is None:
        index = _index(scheduler, timestep)
    sigma = float(scheduler.sigmas[index])
    if hasattr(scheduler, "sigmas_interpol") and index % 2:
        # KDPM2 calls the model between two noise levels at every other step; its ancestral form stores them one ahead.
        sigma = float(scheduler.sigmas_interpol[index - ("KDPM2AncestralDiscreteScheduler" in names)])
    if names & set(PRECONDITIONED):
        # Karras et al. 2022, table 1, where a network answers -v; diffusers calls that epsilon, and v v_prediction.
        prediction = "negative_v_prediction" if prediction == "epsilon" else prediction
        return NoiseState(sigma, 1.0, sigma, prediction, float(scheduler.config["sigma_data"]))
    if _setting(scheduler, "invert_sigmas", False):
        # The table holds the share of the clean sample there, and the velocity leads to it.
        return NoiseState(1 - sigma, sigma, 1 - sigma, "inverted_flow_prediction")
    if names & set(FLOW_MATCH) or _setting(scheduler, "use_flow_sigmas", False):
        return NoiseState(sigma, 1 - sigma, sigma, prediction)
    if names & set(EXPLODING):
        return NoiseState(sigma, 1.0, sigma, prediction)
    signal = 1 / math.sqrt(sigma**2 + 1)
    return NoiseState(sigma, signal, sigma * signal, prediction)


def _setting(scheduler: Any, name: str, default: Any) -> Any:
    """A setting of the scheduler's configuration; the default where its class knows of no such setting.

    A configuration keeps what `from_config` found in that of another scheduler, and the scheduler never looks at it.
    """
    return scheduler.config.get(name, default) if _knows(type(scheduler), name) else default


@cache
def _knows(kind: type, name: str) -> bool:
    """Whether a class of schedulers takes a setting; remembered, as every step asks, and asking takes a millisecond."""
    return any(name in inspect.signature(parent.__init__).parameters for parent in kind.__mro__)


def _index(scheduler: Any, timestep: float) -> int:
    """Where the scheduler stands; before its first step, where it will start."""
    if scheduler.step_index is not None:
        return scheduler.step_index
    return scheduler.begin_index if scheduler.begin_index is not None else scheduler.index_for_timestep(timestep)


def forget_history(scheduler: Any) -> None:
    """Let a multistep solver begin anew at the step to come, with the order of its first step and nothing to correct.

    Such a solver extrapolates from its last outputs, and the corrector of UniPC and SA goes on from the sample of the step
    before, whatever sample it is given: latents that someone replaced in between would be lost without a word. Solvers of
    one step have no history, and those that take two calls for one (Heun, KDPM2, DPM-Solver singlestep) keep theirs.
    """
    if hasattr(scheduler, "lower_order_nums") and not hasattr(scheduler, "order_list"):
        scheduler.lower_order_nums = 0
        if hasattr(scheduler, "last_sample"):
            scheduler.last_sample = None


def x0_weights(state: NoiseState) -> tuple[float, float] | None:
    """The (a, b) of x0-hat = a * sample + b * output; None where the output says nothing about x0 (no signal left)."""
    if state.prediction in ("sample", "original_sample"):
        return (0.0, 1.0)
    if state.prediction == "flow_prediction":
        return (1.0, -state.noise)
    if state.prediction == "inverted_flow_prediction":
        return (1.0, state.noise)
    if state.prediction == "epsilon":
        return (1 / state.signal, -state.noise / state.signal) if state.signal else None
    if state.prediction in ("v_prediction", "negative_v_prediction"):
        # v is defined for signal^2 + noise^2 = 1; where signal is always 1, the model saw the sample scaled to that.
        scale = state.data**2 / (state.noise**2 + state.data**2) if state.signal == 1 else 1.0
        sign = 1 if state.prediction == "v_prediction" else -1
        return (state.signal * scale, -sign * state.noise * math.sqrt(scale))
    raise InputError(f"x0-hat of a {state.prediction!r} output is not known")


def x0_hat(
    scheduler: Any,
    output: Float[Tensor, "batch channels *space"],
    timestep: float,
    sample: Float[Tensor, "batch channels *space"],
) -> Float[Tensor, "batch channels *space"]:
    """The clean sample that a denoiser's output implies, as latents in float32 or better.

    Call it before `scheduler.step`, which moves the scheduler on.

    Args:
        scheduler: the scheduler, standing at this step. timestep: the one that `step` will be called with.
        output: what the denoiser returned, of one branch or guided. sample: the noisy latents.

    Raises:
        InputError: the scheduler's family or prediction type is not known, or the sample holds no signal at all.
    """
    weights = x0_weights(noise_state(scheduler, timestep))
    if weights is None:
        raise InputError(f"there is no x0-hat at timestep {timestep}: the sample is pure noise, the output epsilon")
    return weighted(weights, sample, output)


def weighted(weights: tuple[float, float], sample: Tensor, output: Tensor, held: Sequence[int] = ()) -> Tensor:
    """a * sample + b * output, in float32 or better; in the frames that are held, the sample, which is clean there."""
    at_least = torch.promote_types(torch.promote_types(sample.dtype, output.dtype), torch.float32)
    found = weights[0] * sample.to(at_least) + weights[1] * output.to(at_least)
    return with_frames(found, sample, held)


def with_frames(latents: Tensor, given: Tensor, frames: Sequence[int]) -> Tensor:
    """Latents of (batch, channels, frames, height, width) with some frames of others in the place of their own."""
    if not frames:
        return latents
    where = torch.tensor(frames, device=latents.device)
    return latents.index_copy(2, where, given.to(latents).index_select(2, where))


def signed(weights: tuple[float, float] | None, sign: int) -> tuple[float, float] | None:
    """The weights of x0-hat for an output that the pipeline multiplies by a sign before the scheduler receives it."""
    return None if weights is None else (weights[0], sign * weights[1])
