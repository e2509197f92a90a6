"""Schedulers as checkpoints ship them, or as the documentation of their pipeline sets them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)


def setting(kind: Any, **settings: Any) -> Callable[[], Any]:
    """A maker of schedulers of that class."""
    return partial(kind, **settings)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

shifted_flow = setting(FlowMatchEulerDiscreteScheduler, shift=3.0)
"""Wan's alternative, SD3."""
sharp_flow = setting(FlowMatchEulerDiscreteScheduler, shift=7.0)
"""HunyuanVideo."""
lumina_flow = setting(FlowMatchEulerDiscreteScheduler, shift=6.0)
"""Lumina 2."""
sized_flow = setting(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True)
"""Flux: the shift grows with the number of tokens."""
ltx_flow = setting(
    FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05, base_shift=0.95
)
"""LTX, Qwen-Image: so does this one, and the last noise level is not zero."""
upward_flow = setting(FlowMatchEulerDiscreteScheduler, invert_sigmas=True)
"""Mochi: sigmas and timesteps grow from noise to data."""
flow_unipc = setting(UniPCMultistepScheduler, **FLOW)
"""Wan."""
flow_dpm = setting(DPMSolverMultistepScheduler, **FLOW)
"""Sana."""
epsilon_dpm = setting(DPMSolverMultistepScheduler)
"""PixArt, and DiT by its documentation."""
epsilon_ddim = setting(DDIMScheduler, clip_sample=False)
"""DiT."""
epsilon_lcm = setting(LCMScheduler, clip_sample=False)
"""The checkpoint of PixArt for few steps."""
COG = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False}
cog_ddim = setting(CogVideoXDDIMScheduler, **COG)
"""CogVideoX 2B."""
cog_dpm = setting(CogVideoXDPMScheduler, **COG)
"""CogVideoX 5B."""
v_ddpm = setting(
    DDPMScheduler,
    beta_start=0.00085,
    beta_end=0.02,
    beta_schedule="scaled_linear",
    steps_offset=1,
    prediction_type="v_prediction",
    clip_sample=False,
)
"""HunyuanDiT."""
edm_dpm = setting(EDMDPMSolverMultistepScheduler, sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction")
"""Stable Audio, by its signature; CosineDPMSolverMultistepScheduler, its checkpoint's own, needs the package torchsde."""
