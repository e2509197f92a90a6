"""Facts about the libraries underneath, and the smallest models that show them.

Nothing of dit_lens is imported here, nor any of these libraries before a test does: where a release takes a name away, the
fact that needs it has to be able to say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("nnsight", "diffusers", "transformers", "accelerate", "torch")


@dataclass(frozen=True)
class Fact:
    """What dit_lens relies on: the statement, the modules that rely on it, and what to look at when it is no longer true."""

    statement: str
    used_in: tuple[str, ...]
    look_at: str


FACTS: dict[str, Fact] = {}
"""Every fact, by the name of its test."""


def versions() -> str:
    """The installed releases."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "(missing)"

    return ", ".join(f"{name} {of(name)}" for name in LIBRARIES)


def what_came(error: Exception) -> str:
    """An error in words; of one that carries the traceback of another in its message, the end of that."""
    text = str(error).strip()
    return text.splitlines()[-1] if text.startswith("Traceback") else f"{type(error).__name__}: {text}"


def fact(statement: str, used_in: str, look_at: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test the canary of a fact: however it fails, it says which fact broke, who needs it, and where to look.

    Args:
        statement: the fact, as one sentence without its full stop.
        used_in: files of dit_lens, separated by spaces.
        look_at: what to look at.
    """

    def canary(test: Callable[..., None]) -> Callable[..., None]:
        told = Fact(statement, tuple(used_in.split()), look_at)
        FACTS[test.__name__] = told

        @functools.wraps(test)
        def checked(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(
                    f"no longer true: {statement}\n"
                    f"  installed:  {versions()}\n"
                    f"  relied on:  {', '.join(f'dit_lens/{name}' for name in told.used_in)}\n"
                    f"  look at:    {look_at}\n"
                    f"  what came:  {what_came(error)}"
                ) from error

        return checked

    return canary


class Chain(nn.Module):
    """Three blocks, one after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


STARTS = torch.arange(3.0)[:, None, None].expand(3, 1, 4)
"""What a chain is called with, call by call."""


def outputs(chain: Chain) -> list[list[Tensor]]:
    """What each block of a chain returns, call by call."""
    found = []
    with torch.no_grad():
        for x in STARTS:
            found.append([x := block(x) for block in chain.blocks])
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that tensors are equal, one by one."""
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def traced(model: nn.Module, function: Callable[[], Any], *workers: Callable[[Any, Any], None]) -> None:
    """Run a function in an nnsight trace as dit_lens does, with an invoke without input for each worker.

    Args:
        model: what is wrapped. function: what runs it.
        workers: called with the tracer and the wrapped model.
    """
    import nnsight

    root: Any = nnsight.NNsight(nn.ModuleDict({"transformer": model}))
    wrapped = root.get("transformer")
    # nnsight compiles the body of this block anew, so it holds calls only.
    with root.trace(fn=function) as tracer:
        for worker in workers:
            with tracer.invoke():
                worker(tracer, wrapped)


def each_visit(tracer: Any, visit: Callable[[], None]) -> None:
    """Visit a place at every execution until the run is over; where the error that ends it lives is a fact of its own."""
    for _ in tracer.iter[:]:
        try:
            visit()
        except Exception as error:
            if type(error).__name__ == "OutOfOrderError":
                return
            raise


def wan(**settings: Any) -> Any:
    """A Wan transformer of two blocks of width 16, without weights from anywhere."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**sizes, **settings}).eval()


WAN_CALL = {
    "hidden_states": torch.linspace(-1, 1, 128).view(1, 4, 2, 4, 4),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.linspace(-1, 1, 24).view(1, 3, 8),
}
"""Arguments of a call of that transformer: two frames of 2 x 2 tokens, three tokens of text."""
TOKENS = 8


def video_pipeline(name: str = "WanPipeline", **components: Any) -> Any:
    """A Wan pipeline that takes embeddings for a prompt and returns latents; an image pipeline has a VAE too."""
    import diffusers

    if name == "WanImageToVideoPipeline":
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        components = {"vae": vae.eval(), "image_encoder": None, "image_processor": None, **components}
    absent = {"tokenizer": None, "text_encoder": None, "vae": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    components = {**absent, "scheduler": scheduler, "transformer": wan(), **components}
    pipe = getattr(diffusers, name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STEPS = 3
VIDEO_CALL: dict[str, Any] = {
    "prompt_embeds": WAN_CALL["encoder_hidden_states"],
    "negative_prompt_embeds": -WAN_CALL["encoder_hidden_states"],
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "output_type": "latent",
}
"""Arguments of a run of that pipeline with guidance."""
