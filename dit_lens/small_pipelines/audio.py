"""A small pipeline of sound: Stable Audio."""

from __future__ import annotations

from diffusers import AutoencoderOobleck, StableAudioDiTModel, StableAudioPipeline, StableAudioProjectionModel

from dit_lens.plants.parts import TEXT_DIMENSION
from dit_lens.small_pipelines import schedules, texts
from dit_lens.small_pipelines.making import alive, made
from dit_lens.small_pipelines.record import SmallPipeline
from dit_lens.small_pipelines.vaes import CHANNELS

LENGTH = 6
"""Latents, and tokens, of a sound."""
DIMENSION = 16


def stable_audio() -> StableAudioPipeline:
    """A token a latent, after one that holds timestep and duration; the scheduler scales what the denoiser takes and returns."""
    transformer = alive(
        StableAudioDiTModel,
        sample_size=LENGTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=DIMENSION,
        cross_attention_input_dim=DIMENSION,
        global_states_input_dim=2 * DIMENSION,
        time_proj_dim=8,
    )
    vae = made(
        AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        sampling_rate=16,
    )
    return made(
        StableAudioPipeline,
        vae=vae,
        text_encoder=texts.t5(),
        projection_model=made(
            StableAudioProjectionModel, text_encoder_dim=TEXT_DIMENSION, conditioning_dim=DIMENSION, min_value=0, max_value=8
        ),
        tokenizer=texts.tokenizer(),
        transformer=transformer,
        scheduler=schedules.edm_dpm(),
    )


ALL = (
    SmallPipeline(
        name="stable-audio",
        make=stable_audio,
        inputs={**texts.PROMPTS, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"},
        guidance="batched",
        branches=("uncond", "cond"),
        prediction="v_prediction",
        schedulers={"EDMDPMSolverMultistepScheduler": schedules.edm_dpm},
        layout=(LENGTH, 1, 1),
    ),
)
