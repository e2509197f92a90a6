"""Train the bundled reasoner: `python -m dit_lens.reasoner.train vae`, then `dit` (again and again until done), then `export`.

State stays in a work folder and is taken up again where it stopped. Several GPUs of one host train together under
`torchrun --nproc-per-node N -m dit_lens.reasoner.train ...`; on one GPU the same commands do the same with smaller batches.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKLWan

from dit_lens.errors import InputError
from dit_lens.reasoner import data, folders, models, train_dit, train_vae
from dit_lens.reasoner.team import Team

RUN = 10_000_000
"""Numbers of puzzles between one run's and those of a run that starts a step later: more than any run draws."""


@dataclass(frozen=True)
class VAE:
    """Train the VAE, or train it further, and check its read-back of every colour."""

    work: Path = Path(".training")
    clips: int = 40_000
    """Clips drawn in all."""
    steps: int = 2_000
    batch: int = 64
    """Clips per step, over all GPUs."""
    rate: float = 2e-3
    seed: int = 0
    minutes: float = 9.0
    """Stop after this long, finished or not."""


@dataclass(frozen=True)
class DiT:
    """Train the denoiser and the text encoder, or go on with it."""

    work: Path = Path(".training")
    start: Path | None = None
    """A pipeline folder to start from, where the work folder has no state (restarts the optimizer)."""
    clips: int = 400_000
    steps: int = 16_000
    """Steps in all, over every run."""
    batch: int = 1024
    rate: float = 1.2e-3
    seed: int = 0
    minutes: float = 9.0
    fit: bool = False
    """Let the learning rate fall within these minutes, however many of the steps they leave room for; no run goes on after it."""


@dataclass(frozen=True)
class Export:
    """Write the averaged weights as a pipeline folder, in bfloat16, with hashes, settings and curves."""

    work: Path = Path(".training")
    to: Path = Path("dit_lens/reasoner/weights")


def note(settings: VAE | DiT, team: Team) -> dict:
    """How something was trained."""
    said = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    device = torch.cuda.get_device_name() if team.device.type == "cuda" else platform.processor()
    return {"settings": said, "devices": f"{team.size} x {device}", "torch": torch.__version__}


def run_vae(settings: VAE, team: Team) -> None:
    # In a shorter clip things move faster, so each length is drawn; held to one length, as the first frames of a causal VAE do
    # not depend on what follows.
    parts = []
    for length, share in data.LENGTHS.items():
        count = round(settings.clips * share) // team.size
        parts.append(data.held(data.draw(count, settings.clips * team.rank, length, team.workers), max(data.LENGTHS)))
    clips = data.Clips(np.concatenate([p.boards for p in parts]), np.concatenate([p.prompts for p in parts]))
    torch.manual_seed(settings.seed)
    record = settings.work / "vae.json"
    before = json.loads(record.read_text())["curves"] if record.is_file() else []
    vae: Any = AutoencoderKLWan.from_pretrained(settings.work / "vae") if before else models.vae()
    vae.to(team.device)
    team.together(list(vae.state_dict().values()))
    curve = train_vae.train(
        vae,
        clips,
        steps=settings.steps,
        batch=settings.batch // team.size,
        rate=settings.rate,
        seed=settings.seed + team.rank,
        minutes=settings.minutes,
        team=team,
    )
    if team.leads:
        # What is shipped is bfloat16, so everything after this uses the rounded weights.
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
        train_vae.normalise(vae, clips)
        unseen = {length: data.draw(350, 10_000_000, length, team.workers).boards for length in data.LENGTHS}
        checked = {length: train_vae.read_back_of_every_colour(vae, boards) for length, boards in unseen.items()}
        vae.save_pretrained(settings.work / "vae")
        (settings.work / "vae.json").write_text(
            json.dumps({**note(settings, team), "read_back": checked, "curves": [*before, curve]})
        )
        print(json.dumps(checked, indent=1))


def run_dit(settings: DiT, team: Team) -> None:
    work = settings.work / "dit"
    if not (settings.work / "vae").is_dir():
        raise InputError(f"there is no trained VAE in {settings.work}; run `python -m dit_lens.reasoner.train vae` first")
    vae: Any = AutoencoderKLWan.from_pretrained(settings.work / "vae")
    vae.to(team.device)
    encoded = {}
    for frames, share in data.LENGTHS.items():
        count = round(settings.clips * share) // team.size
        # Other puzzles for every process, every length and every run.
        first = (list(data.LENGTHS).index(frames) * team.size + team.rank) * settings.clips + RUN * train_dit.steps_done(work)
        encoded[frames] = data.encode(vae, data.draw(count, first, frames, team.workers))
    torch.manual_seed(settings.seed)
    words = models.tokenizer()
    model = train_dit.Model(models.transformer(), models.text_encoder(len(words)), words).to(team.device)
    if settings.start is not None:
        pipeline = models.open_pipeline(settings.start)
        model.transformer.load_state_dict(pipeline.transformer.state_dict())
        model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    team.together(list(model.state_dict().values()))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=team.device.type == "cuda"
    )
    state = train_dit.State(model, {k: v.clone() for k, v in model.state_dict().items()}, optimizer, 0, [])
    if train_dit.steps_done(work):
        state.load(work)
        if team.leads:
            print(f"goes on at step {state.step} of {settings.steps}")
    if team.device.type == "cuda":
        model.transformer.compile_repeated_blocks()
    train_dit.train(
        state,
        encoded,
        steps=settings.steps,
        batch=settings.batch // team.size,
        rate=settings.rate,
        seed=settings.seed + 1000 * team.rank,
        minutes=settings.minutes,
        fit=settings.fit,
        team=team,
    )
    if team.leads:
        state.save(work)
        (settings.work / "dit.json").write_text(json.dumps({**note(settings, team), "curve": state.curve}))
        loss = f"{state.curve[-1]['loss']:.4f}" if state.curve else "not yet averaged"
        print(f"step {state.step} of {settings.steps}, loss {loss}")


def run_export(settings: Export) -> None:
    pipeline = models.untrained()
    vae: Any = AutoencoderKLWan.from_pretrained(settings.work / "vae")
    pipeline.vae.load_state_dict(vae.state_dict())
    pipeline.vae.register_to_config(latents_mean=vae.config["latents_mean"], latents_std=vae.config["latents_std"])
    state = train_dit.load_ema(settings.work / "dit")
    pipeline.transformer.load_state_dict(state["transformer"])
    pipeline.text_encoder.load_state_dict(state["text_encoder"])
    records = {part: json.loads((settings.work / f"{part}.json").read_text()) for part in ("vae", "dit")}
    models.save_pipeline(pipeline, settings.to, records)
    print(f"wrote {settings.to}: {folders.megabytes(settings.to):.1f} MB")


def main() -> None:
    settings = tyro.extras.subcommand_cli_from_dict({"vae": VAE, "dit": DiT, "export": Export}, description=__doc__)
    if isinstance(settings, Export):
        return run_export(settings)
    team = Team()
    settings.work.mkdir(parents=True, exist_ok=True)
    run_vae(settings, team) if isinstance(settings, VAE) else run_dit(settings, team)
    team.leave()


if __name__ == "__main__":
    main()
