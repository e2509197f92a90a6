"""A causal video DiT that is not diffusers': model, sampling loop, and the record that opens it to dit_lens.

Tokens of a frame attend to their own frame and to those before it, never to later ones, and every frame has a noise level of its
own. The loop makes frames one after the other: frame f begins `lag` calls after frame f - 1, so that with a lag of
`num_inference_steps` each frame is clean before the next begins (autoregressive), with a smaller one they overlap, and with 0 all
fall together. The frames after those at work are noise, and the mask keeps them from being heard.

What the words mean here: a *step* is one call of the model, on the way of one frame or of several; a run has
`num_inference_steps + lag * (frames - 1)` of them. Its *sigma* is the mean of the frames' levels, the share of noise that the
clip has left. x0-hat takes the level of each frame. There is one *branch*. *frames* are all frames of the clip at every step, at
work or not: what is read of a frame that waits is about noise.
"""

import itertools
import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional

import dit_lens as dl

WIDTH, HEADS, PATCH, CHANNELS = 64, 4, 2, 3


class CausalAttention(nn.Module):
    """Self-attention in which a token hears its own frame and earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        number = torch.arange(frames, device=x.device).repeat_interleave(x.shape[1] // frames)
        heard = number[:, None] >= number
        return self.out(functional.scaled_dot_product_attention(query, key, value, attn_mask=heard).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP; shift, scale and gate are of each frame, by its noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = CausalAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        frames = condition.shape[1]
        each = self.modulation(condition).repeat_interleave(x.shape[1] // frames, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = each.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, frames)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class CausalVideoDiT(nn.Module):
    """(noisy clips, their class, a noise level for every frame) -> velocity."""

    def __init__(self, frames: int = 4, size: int = 8, classes: int = 10, blocks: int = 4) -> None:
        super().__init__()
        self.frames, self.size = frames, size
        self.patches = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.1 * torch.randn((size // PATCH) ** 2, WIDTH))
        self.moments = nn.Parameter(0.1 * torch.randn(frames, 1, WIDTH))
        self.labels = nn.Embedding(classes, WIDTH)
        self.times = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(self, clips: Tensor, classes: Tensor, levels: Tensor) -> Tensor:
        condition = functional.silu(self.times(waves(levels)) + self.labels(classes)[:, None])
        each = self.patches(clips.transpose(1, 2).flatten(0, 1)).flatten(2).mT.unflatten(0, (len(clips), -1))
        tokens = (each + self.places + self.moments).flatten(1, 2)
        for block in self.blocks:
            tokens = block(tokens, condition)
        rows = self.head(self.norm(tokens)).unflatten(1, (self.frames, self.size // PATCH, -1))
        return functional.pixel_shuffle(rows.permute(0, 1, 4, 2, 3), PATCH).transpose(1, 2)


def waves(levels: Tensor) -> Tensor:
    """Noise levels as sines and cosines of WIDTH / 2 frequencies."""
    angles = 1000 * levels[..., None].float() * torch.exp(-math.log(10000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FrameByFrameSampler:
    """Euler steps, each frame on a way of its own; class labels in, clips (batch, channels, frames, height, width) out."""

    def __init__(self, model: CausalVideoDiT) -> None:
        self.model = model

    def levels(self, steps: int, lag: int) -> Tensor:
        """The noise level of every frame at every call, and at the end: (calls + 1, frames)."""
        calls = torch.arange(steps + lag * (self.model.frames - 1) + 1)
        done = (calls[:, None] - lag * torch.arange(self.model.frames)).clamp(0, steps)
        return 1 - done / steps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 5,
        lag: int = 5,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        model, shape = self.model, (CHANNELS, self.model.frames, self.model.size, self.model.size)
        generators = generator if isinstance(generator, list) else [generator] * len(class_labels)
        x = torch.stack([torch.randn(shape, generator=one) for one in generators])
        labels, levels = torch.tensor(class_labels), self.levels(num_inference_steps, lag)
        for now, after in itertools.pairwise(levels):
            velocity = model(x, labels, now.expand(len(x), -1))
            x += (after - now)[:, None, None] * velocity
        return x


RECORD = dl.Architecture(
    name="causal video DiT",
    pipelines=("FrameByFrameSampler",),
    denoiser="CausalVideoDiT",
    experts=("model",),
    stacks=(
        dl.Stack(
            "blocks",
            parameters=("x",),
            width=WIDTH,
            heads=HEADS,
            sites=(
                # No attention weights are recomputed where a mask decides who hears whom: no `qk`.
                *(site for site in dl.attention_sites("attn", "out") if site.name != "qk"),
                dl.Site("attn", "attn"),
                dl.Site("mlp", "mlp"),
                *dl.BLOCK_SITES,
            ),
        ),
    ),
    latents="clips",
    patches=dl.Patches("cfhw", (1, PATCH, PATCH)),
    guidance=dl.Guidance("none", ("cond",)),
    loop=dl.Loop("levels", lambda level: dl.NoiseState(level, 1 - level, level, "flow_prediction"), of_frames=statistics.fmean),
    token_rule=f"one token covers {PATCH} x {PATCH} pixels of a frame, rows before columns",
)
dl.register(RECORD)


if __name__ == "__main__":
    lens = dl.wrap(FrameByFrameSampler(CausalVideoDiT()))
    print(lens.describe())
    run = lens.run(class_labels=[3], num_inference_steps=5, lag=2, record=dl.at(block=-1))
    print([f"{sigma:.2f}" for sigma in run.sigmas.tolist()], run.activation(block=3, step=0).shape)
