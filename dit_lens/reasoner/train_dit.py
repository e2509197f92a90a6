"""Training of the denoiser and the text encoder: flow matching on latents that were encoded once.

Wan's own conventions: sigma runs from 1 (noise) to 0, x = (1 - sigma) x0 + sigma noise, the target is noise - x0, and the
timestep is 1000 sigma. Sigmas are drawn uniformly and shifted as in sampling. One prompt in ten is replaced by the empty one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dit_lens.reasoner.data import LENGTHS, Encoded, prompts
from dit_lens.reasoner.settings import CALL, SHIFT
from dit_lens.reasoner.team import Team

DROPPED = 0.1
"""Share of prompts replaced by the empty one."""
EMA = 0.9995


class Model(nn.Module):
    """Denoiser and text encoder as one module: numbers of prompts in, velocities out."""

    tokens: Tensor
    mask: Tensor

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel, words: PreTrainedTokenizerFast):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        tokens = words(prompts(), padding=True, return_tensors="pt")
        self.register_buffer("tokens", tokens.input_ids, persistent=False)
        self.register_buffer("mask", tokens.attention_mask, persistent=False)

    def embed(self) -> Float[Tensor, "prompts 64 dimension"]:
        """Every prompt's embedding as the pipeline makes it: what is beyond a prompt's end is zero."""
        states = self.text_encoder(self.tokens, self.mask).last_hidden_state * self.mask.unsqueeze(-1)
        return nn.functional.pad(states, (0, 0, 0, CALL["max_sequence_length"] - states.shape[1]))

    def forward(
        self,
        noisy: Float[Tensor, "batch channels frames height width"],
        sigma: Float[Tensor, " batch"],
        conditions: Float[Tensor, "batch channels frames height width"],
        said: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        first = torch.zeros_like(conditions[:, :4])
        first[:, :, 0] = 1
        return self.transformer(
            hidden_states=torch.cat([noisy, first, conditions], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=self.embed()[said],
            return_dict=False,
        )[0]


@dataclass
class State:
    """What resuming needs, kept as safetensors beside a JSON of numbers."""

    model: Model
    ema: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int
    curve: list[dict[str, float]]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weights/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam/{moment}/{name}": v for moment, v in moments.items()}
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "curve": self.curve}))

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors", device=str(self.model.transformer.device))

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(under("weights/"))
        averaged = under("ema/")
        self.ema = {name: averaged[name] for name in self.model.state_dict()}
        for name, parameter in self.model.named_parameters():
            moments = {m: v[name] for m in ("step", "exp_avg", "exp_avg_sq") if name in (v := under(f"adam/{m}/"))}
            if moments:
                # The fused optimizer keeps its step count on the parameter's device.
                self.optimizer.state[parameter] = moments
        numbers = json.loads((folder / "state.json").read_text())
        self.step, self.curve = numbers["step"], numbers["curve"]


def steps_done(folder: Path) -> int:
    """Steps of the state in a folder; 0 if there is none."""
    path = folder / "state.json"
    return json.loads(path.read_text())["step"] if path.is_file() else 0


def rate_at(step: int, done: float, peak: float, warm_up: int = 300) -> float:
    """Learning rate: a linear warm-up, a plateau, and a linear tail over the second half. `done`: the share of training done."""
    tail = min(1.0, 2 * (1 - done))
    return peak * min(1.0, (step + 1) / warm_up) * max(tail, 0.01)


def shifted(uniform: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Sigmas as the scheduler shifts them."""
    return SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def train(
    state: State,
    data: dict[int, Encoded],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    minutes: float,
    team: Team,
    fit: bool = False,
) -> None:
    """Train until `steps` in all or for `minutes`, whichever comes first. `data` holds clips by their number of frames.

    With `fit`, the learning rate falls to its end within the minutes if the steps do not come to theirs before.
    """
    model, optimizer = state.model, state.optimizer
    device = model.transformer.device
    generator = torch.Generator(device).manual_seed(seed + state.step)
    feeds = {n: iter(each.batches(batch, torch.Generator().manual_seed(seed + state.step))) for n, each in data.items()}
    # The same on every process, so that none waits for a longer clip.
    lengths = torch.Generator().manual_seed(state.step)
    shares = torch.tensor([LENGTHS[n] for n in feeds])
    parameters = [p for p in model.parameters() if p.requires_grad]
    spent, before = team.stopwatch(), state.curve[-1]["seconds"] if state.curve else 0.0
    losses: list[Tensor] = []
    seconds = 0.0
    bar = tqdm(initial=state.step, total=steps, desc="DiT", disable=not team.leads, mininterval=5)
    while state.step < steps:
        if state.step % 10 == 0 and (seconds := spent()) > 60 * minutes:
            break
        frames = list(feeds)[int(torch.multinomial(shares, 1, generator=lengths))]
        latents, conditions, said = next(feeds[frames])
        latents, conditions = latents.float(), conditions.float()
        sigma = shifted(torch.rand(len(said), device=device, generator=generator))
        noise = torch.randn(latents.shape, device=device, generator=generator)
        said = said.masked_fill(torch.rand(len(said), device=device, generator=generator) < DROPPED, 0)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model((1 - level) * latents + level * noise, sigma, conditions, said)
        loss = nn.functional.mse_loss(velocity.float(), noise - latents)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(state.step, max(state.step / steps, seconds / (60 * minutes) if fit else 0), rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        team.average([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.ema.values()), [p.data for p in model.state_dict().values()], 1 - decay)
        losses.append(loss.detach())
        state.step += 1
        bar.update()
        if state.step % 50 == 0 or state.step == steps:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            point = {"step": state.step, "loss": mean, "rate": optimizer.param_groups[0]["lr"], "seconds": before + spent()}
            state.curve.append(point)
            bar.set_postfix(loss=f"{mean:.4f}")
    bar.close()


def load_ema(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The averaged weights of a state, by component."""
    tensors = {k.removeprefix("ema/"): v for k, v in load_file(folder / "state.safetensors").items() if k.startswith("ema/")}
    return {
        part: {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        for part in ("transformer", "text_encoder")
    }
