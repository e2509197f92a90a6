"""Several prompts, images and seeds in one call: row by row what single calls give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import arguments, picture, shown, tiny_pipeline
from torch import Tensor, nn

import dit_lens as dl

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
PROMPTS = ["walk the maze", "draw", "circle the red maze"]


class FirstInput:
    """Remembers what the denoiser received first: noise, then the image condition, along the channels."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._handle = denoiser.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.tensors: list[Tensor] = []
        self.fresh = True

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.fresh:
            self.tensors.append(kwargs["hidden_states"].clone())
            self.fresh = False

    def remove(self) -> None:
        self._handle.remove()


def test_different_images_in_a_batch_are_the_single_runs(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    pictures = [picture(color) for color in COLORS]
    first = FirstInput(image_pipe.transformer)
    both = arguments(image_pipe, prompt=PROMPTS, image=pictures)
    batch = lens.run(**both, seed=[3, 4], record=dl.at(block=1, step=[0, 3]))
    assert "encode" not in vars(image_pipe.vae)
    assert batch.batch == 6
    assert batch.seeds == (3, 4) * 3
    assert batch.prompts == tuple(prompt for prompt in PROMPTS for _ in range(2))
    for row in range(6):
        first.fresh = True
        single = arguments(image_pipe, prompt=PROMPTS[row // 2], image=pictures[row // 2])
        run = lens.run(**single, seed=[3, 4][row % 2], record=dl.at(block=1, step=[0, 3]))
        assert torch.equal(first.tensors[-1][0], first.tensors[0][row]), "noise and encoded image, exactly"
        assert torch.equal(batch.latents[0, row], run.latents[0, 0])
        assert torch.allclose(batch.latents[:, row], run.latents[:, 0], atol=1e-4)
        assert torch.allclose(shown(batch)[row], shown(run)[0], atol=1e-4)
        for entry in run.activations:
            of_batch = batch.activation(block=1, step=entry.cell.step, branch=entry.cell.branch)
            assert torch.allclose(of_batch[row], entry.tensor[0], atol=1e-4)
    first.remove()


def test_the_encode_wrapper_goes_also_when_a_run_fails(image_pipe: Any) -> None:
    def fail(x: Tensor, *_: Any) -> Tensor:
        raise ZeroDivisionError("on purpose")

    lens = dl.wrap(image_pipe, engine="hooks")
    both = arguments(image_pipe, prompt=PROMPTS[:2], image=[picture(color) for color in COLORS[:2]])
    with pytest.raises(ZeroDivisionError):
        lens.run(**both, record=dl.Record(dl.at(), fail))
    assert "encode" not in vars(image_pipe.vae)
    image_pipe.vae.encode, encode = fail, image_pipe.vae.encode
    with pytest.raises(ZeroDivisionError):
        lens.run(**both)
    assert image_pipe.vae.encode is fail
    image_pipe.vae.encode = encode


def test_images_come_as_pictures_lists_or_tensors(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    pictures = [picture(color) for color in COLORS[:2]]
    tensors = torch.stack([torch.from_numpy(np.array(one, dtype=np.float32) / 255) for one in pictures])
    tensors = tensors.movedim(-1, 1)

    def latents(image: Any) -> Tensor:
        return lens.run(**arguments(image_pipe, image=image), decode=False).latents

    one = latents(pictures[0])
    assert torch.equal(latents([pictures[0]]), one)
    assert torch.equal(latents(tensors[0]), one)
    assert torch.equal(latents(tensors[:1]), one)
    several = latents(pictures)
    assert several.shape[1] == 2
    assert torch.equal(latents(tensors), several)
    large = latents([picture(color, size=32) for color in COLORS[:2]])
    assert torch.allclose(large[:, 0], latents(picture(COLORS[0], size=32))[:, 0], atol=1e-5)


def test_one_image_for_several_prompts_and_seeds(image_pipe: Any) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    run = lens.run(**arguments(image_pipe, prompt=PROMPTS[:2]), seed=[1, 2], decode=False)
    assert run.batch == 4
    assert torch.equal(run.latents[0, 0], run.latents[0, 2]), "the same seed draws the same noise"
    plain = lens.plain(**arguments(image_pipe, prompt=PROMPTS[:2]), seed=[1, 2], output_type="latent")
    assert torch.equal(plain.frames, run.latents[-1])


def test_a_last_image_is_batched_like_the_first() -> None:
    pipe = tiny_pipeline()
    lens = dl.wrap(pipe, engine="hooks")
    pictures = [picture(color) for color in COLORS]
    batch = lens.run(**arguments(pipe, image=pictures[0], last_image=pictures[1:]), decode=False)
    single = lens.run(**arguments(pipe, image=pictures[0], last_image=pictures[2]), decode=False)
    assert torch.allclose(batch.latents[:, 1], single.latents[:, 0], atol=1e-4)


def test_lists_of_negative_prompts_and_embeddings(text_pipe: Any) -> None:
    lens = dl.wrap(text_pipe, engine="hooks")
    expected = lens.run(**arguments(text_pipe, prompt=PROMPTS[:2], negative_prompt="red"), seed=[1, 2], decode=False)
    listed = arguments(text_pipe, prompt=PROMPTS[:2], negative_prompt=["red", "red"])
    assert torch.equal(lens.run(**listed, seed=[1, 2], decode=False).latents, expected.latents)
    embeds, negative = text_pipe.encode_prompt(PROMPTS[:2], ["red", "red"], max_sequence_length=16)
    embedded = arguments(text_pipe, prompt=None, negative_prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    run = lens.run(**embedded, seed=[1, 2], decode=False)
    assert torch.allclose(run.latents, expected.latents, atol=1e-5)
    assert run.prompts == ("",) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPTS, "image": [picture(color) for color in COLORS[:2]]}, "lengths that differ: .*prompt 3"),
        ({"image": torch.zeros(1, 16, 16)}, r"image has shape \(1, 16, 16\); write \(3, H, W\) or \(P, 3, H, W\)"),
        ({"image": torch.zeros(3, 16, 16) - 1}, r"image has values from -1 to -1; scale them to \[0, 1\]"),
        ({"image": "maze.png"}, "image is a str; write a PIL image, a list of them, or a tensor"),
        ({"sampler": "euler"}, "WanImageToVideoPipeline takes no sampler; it takes image, prompt"),
        ({"generator": None}, "generator= is not for you to give here; use seed="),
        ({"num_videos_per_prompt": 2}, "use a list of seeds"),
        ({"num_images_per_prompt": 1}, "use a list of seeds"),
        ({"output_type": "np"}, "use decode="),
        ({"return_dict": False}, "return_dict= is not for you to give"),
        ({"seed": []}, r"seed=\[\] is no int, no list of ints"),
    ],
)
def test_what_does_not_fit_is_said(image_pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe, **changes))


def test_each_prompt_can_have_seeds_of_its_own(text_pipe: Any) -> None:
    lens = dl.wrap(text_pipe, engine="hooks")
    inputs = arguments(text_pipe, prompt=["walk the maze", "draw red"])
    together = lens.run(**inputs, seed=[[3, 5], [5, 8]], decode=False)
    assert together.seeds == (3, 5, 5, 8)
    same = lens.run(**inputs, seed=[3, 5, 8], decode=False)
    for row, other in enumerate([0, 1, 4, 5]):
        assert torch.equal(together.latents[0, row], same.latents[0, other])
    for wrong, message in (
        ([[1], [2], [3]], "lists for 3 prompts, and there are 2"),
        ([[1], [2, 3]], "of one length"),
        ([[1], 2], "no list of ints"),
        ([[], []], "no list of ints"),
    ):
        with pytest.raises(dl.InputError, match=message):
            lens.run(**inputs, seed=wrong)  # pyright: ignore[reportArgumentType]
