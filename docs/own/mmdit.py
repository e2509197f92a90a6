"""An MMDiT that is not diffusers': model, sampling loop, and the record that opens it to dit_lens.

Two streams, the text and the image, have weights of their own and meet in one joint attention. The text is a few words, the image
is made along straight lines from noise (rectified flow): x = (1 - t) x0 + t noise, and the model says the velocity noise - x0.
Guidance calls the model twice in a step, first with the prompt and then without.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import dit_lens as dl

WIDTH, HEADS, PATCH, CHANNELS = 64, 4, 2, 3


class JointAttention(nn.Module):
    """Every token of both streams attends to all tokens of both, the text's before the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.text_qkv, self.text_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.image_qkv, self.image_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([self.text_qkv(text), self.image_qkv(image)], dim=1).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in joint)
        found = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        words = text.shape[1]
        return self.image_out(found[:, words:]), self.text_out(found[:, :words])


class Stream(nn.Module):
    """What a block has for one stream beside the attention: norms, MLP and modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)


class Block(nn.Module):
    """Joint attention, then an MLP for each stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = JointAttention()
        self.image, self.text = Stream(), Stream()

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        mine, its = self.image, self.text
        shift, scale, gate, *after = mine.modulation(condition)[:, None].chunk(6, dim=-1)
        text_shift, text_scale, text_gate, *text_after = its.modulation(condition)[:, None].chunk(6, dim=-1)
        seen, heard = self.attn(mine.norm1(image) * (1 + scale) + shift, its.norm1(text) * (1 + text_scale) + text_shift)
        image, text = image + gate * seen, text + text_gate * heard
        shift, scale, gate = after
        image = image + gate * mine.mlp(mine.norm2(image) * (1 + scale) + shift)
        shift, scale, gate = text_after
        return image, text + gate * its.mlp(its.norm2(text) * (1 + scale) + shift)


class MMDiT(nn.Module):
    """(noisy images, prompts as vectors, times from 0 to 1) -> velocity."""

    def __init__(self, size: int = 12, length: int = 4, blocks: int = 4) -> None:
        super().__init__()
        self.size = size
        self.patches = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(torch.randn((size // PATCH) ** 2, WIDTH))
        self.order = nn.Parameter(torch.randn(length, WIDTH))
        self.times = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(self, latents: Tensor, text: Tensor, time: Tensor) -> Tensor:
        text = text + self.order
        condition = functional.silu(self.times(waves(time)))
        image = self.patches(latents).flatten(2).mT + self.places
        for block in self.blocks:
            image, text = block(image, text, condition)
        rows = self.head(self.norm(image)).mT
        return functional.pixel_shuffle(rows.unflatten(2, (self.size // PATCH, -1)), PATCH)


def waves(time: Tensor) -> Tensor:
    """Times as sines and cosines of WIDTH / 2 frequencies."""
    angles = 1000 * time[:, None].float() * torch.exp(-math.log(10000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Words(nn.Module):
    """The text encoder: a vector for every word, and one for no word."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        self.number = {word: number for number, word in enumerate([*vocabulary, "-"])}
        self.vectors = nn.Embedding(len(self.number), WIDTH)

    def forward(self, prompts: list[str]) -> Tensor:
        return self.vectors(torch.tensor([[self.number[word] for word in prompt.split()] for prompt in prompts]))


class RectifiedFlowSampler:
    """Euler steps from noise to images; prompts of equal length in, images in [-1, 1] out."""

    def __init__(self, transformer: MMDiT, text_encoder: Words) -> None:
        self.transformer, self.text_encoder = transformer, text_encoder

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        model, prompts = self.transformer, [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator] * len(prompts)
        x = torch.stack([torch.randn(CHANNELS, model.size, model.size, generator=one) for one in generators])
        text = self.text_encoder(prompts)
        nothing = self.text_encoder([" ".join("-" for _ in words.split()) for words in prompts])
        times = torch.linspace(1, 0, num_inference_steps + 1)
        for now, after in itertools.pairwise(times):
            velocity = model(x, text, now.expand(len(x)))
            if guidance_scale > 1:
                uncond = model(x, nothing, now.expand(len(x)))
                velocity = uncond + guidance_scale * (velocity - uncond)
            x = x + (after - now) * velocity
        return x


def joint(name: str, item: int) -> tuple[dl.Site, ...]:
    """Queries, keys or values: one sequence of text and image, of which each stream has its part."""
    streams = ("text", "visual")
    return tuple(dl.Site(name, "attn", "attention", item, within=streams, stream=one, per_head=True) for one in streams)


RECORD = dl.Architecture(
    name="MMDiT",
    pipelines=("RectifiedFlowSampler",),
    denoiser="MMDiT",
    stacks=(
        dl.Stack(
            "blocks",
            streams=("visual", "text"),
            parameters=("image", "text"),
            width=WIDTH,
            heads=HEADS,
            sites=(
                *(site for item, name in enumerate(("q", "k", "v")) for site in joint(name, item)),
                dl.Site("heads", "attn.image_out", "input", stream="visual", per_head=True),
                dl.Site("heads", "attn.text_out", "input", stream="text", per_head=True),
                dl.Site("attn", "attn", item=0, stream="visual"),
                dl.Site("attn", "attn", item=1, stream="text"),
                dl.Site("mlp", "image.mlp", stream="visual"),
                dl.Site("mlp", "text.mlp", stream="text"),
                *dl.BLOCK_SITES,
            ),
        ),
    ),
    latents="latents",
    text="text",
    patches=dl.Patches("chw", (PATCH, PATCH)),
    guidance=dl.Guidance("sequential", ("cond", "uncond")),
    loop=dl.Loop("time", lambda time: dl.NoiseState(time, 1 - time, time, "flow_prediction")),
    token_rule=f"one token covers {PATCH} x {PATCH} pixels, rows before columns",
)
dl.register(RECORD)


if __name__ == "__main__":
    lens = dl.wrap(RectifiedFlowSampler(MMDiT(), Words(["red", "blue"])))
    print(lens.describe())
    run = lens.run(prompt="red red blue red", guidance_scale=2.0, record=dl.at(site="attn", stream="text", step=0))
    print(run.activation(block=0, branch="uncond", site="attn", stream="text").shape, run.branches)
