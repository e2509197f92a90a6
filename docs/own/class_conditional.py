"""A class-conditional DiT that is not diffusers': model, sampling loop, and the record that opens it to dit_lens.

The layout of the first diffusion transformers: patches of an image are tokens; class and timestep reach every block as shift,
scale and gate (adaLN, whose gates start at zero); an additional class stands for no class; the model says the noise and a
variance, in twice the channels. The loop is DDIM, and asks for [cond; uncond] in one call of the model.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import dit_lens as dl

WIDTH, HEADS, PATCH, CHANNELS = 64, 4, 2, 3


class Attention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = zeroed(nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ClassConditionalDiT(nn.Module):
    """(images, timesteps, classes) -> the noise in them, and a variance, side by side in the channels."""

    def __init__(self, size: int = 16, classes: int = 10, blocks: int = 4) -> None:
        super().__init__()
        self.size, self.classes = size, classes
        self.patches = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.1 * torch.randn((size // PATCH) ** 2, WIDTH))
        self.labels = nn.Embedding(classes + 1, WIDTH)  # the last one is no class
        self.times = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = zeroed(nn.Linear(WIDTH, 2 * CHANNELS * PATCH**2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = functional.silu(self.times(waves(t)) + self.labels(y))
        tokens = self.patches(x).flatten(2).mT + self.places
        for block in self.blocks:
            tokens = block(tokens, condition)
        rows = self.head(self.norm(tokens)).mT
        return functional.pixel_shuffle(rows.unflatten(2, (self.size // PATCH, -1)), PATCH)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that starts at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def waves(t: Tensor) -> Tensor:
    """Timesteps as sines and cosines of WIDTH / 2 frequencies."""
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


SIGNAL = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
"""How much of a clean image's variance is left at each timestep."""


class ClassConditionalSampler:
    """DDIM from noise to images; class labels in, images in [-1, 1] out."""

    def __init__(self, transformer: ClassConditionalDiT) -> None:
        self.transformer = transformer

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        model, count = self.transformer, len(class_labels)
        generators = generator if isinstance(generator, list) else [generator] * count
        x = torch.stack([torch.randn(CHANNELS, model.size, model.size, generator=one) for one in generators])
        timesteps = torch.linspace(999, 0, num_inference_steps).round().long().tolist()
        labels = torch.tensor(class_labels)
        nothing = torch.full_like(labels, model.classes)
        for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            if guidance_scale > 1:
                both = model(torch.cat([x, x]), torch.full((2 * count,), now), torch.cat([labels, nothing]))
                cond, uncond = both[:, :CHANNELS].chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
            else:
                noise = model(x, torch.full((count,), now), labels)[:, :CHANNELS]
            signal, left = float(SIGNAL[now]), 1.0 if after is None else float(SIGNAL[after])
            clean = (x - math.sqrt(1 - signal) * noise) / math.sqrt(signal)
            x = math.sqrt(left) * clean + math.sqrt(1 - left) * noise
        return x


def noise_at(timestep: float) -> dl.NoiseState:
    """How clean image and noise are mixed at a timestep, and what the model says there."""
    signal = float(SIGNAL[int(timestep)])
    return dl.NoiseState(math.sqrt((1 - signal) / signal), math.sqrt(signal), math.sqrt(1 - signal), "epsilon")


RECORD = dl.Architecture(
    name="class-conditional DiT",
    pipelines=("ClassConditionalSampler",),
    denoiser="ClassConditionalDiT",
    stacks=(
        dl.Stack(
            "blocks",
            parameters=("x",),
            width=WIDTH,
            heads=HEADS,
            sites=(*dl.attention_sites("attn", "out"), dl.Site("attn", "attn"), dl.Site("mlp", "mlp"), *dl.BLOCK_SITES),
        ),
    ),
    latents="x",
    patches=dl.Patches("chw", (PATCH, PATCH)),
    guidance=dl.Guidance("batched", ("cond", "uncond")),
    loop=dl.Loop("t", noise_at),
    token_rule=f"one token covers {PATCH} x {PATCH} pixels, rows before columns",
)
dl.register(RECORD)


if __name__ == "__main__":
    lens = dl.wrap(ClassConditionalSampler(ClassConditionalDiT()))
    print(lens.describe())
    run = lens.run(class_labels=[3], num_inference_steps=8, guidance_scale=3.0, record=dl.at(site="update", branch="cond"))
    print(run.activations.stack(step=0, site="update").shape, run.x0_hat(step=0).shape)
