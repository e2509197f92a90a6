"""From one call with several prompts and seeds to the arguments of one pipeline call.

A call with P prompts (or images) and S seeds runs P * S rows, prompt by prompt: row p * S + s has prompt p and seed s.
Each row has a CPU generator of its own, so that a row's noise does not depend on what runs beside it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_lens.errors import InputError, listed
from dit_lens.taps import replaced_attribute

IMAGES = ("image", "last_image")
LABELS = "class_labels"
TEXT = re.compile(r"(negative_)?prompt(_\d+)?|\w*prompt\w*_(embeds|mask)(_\w+)?")
"""Arguments that are a text for each prompt, or what an encoder made of it."""
SEVERAL = re.compile(r"num_\w+_per_prompt")
"""Arguments that would give one prompt several rows; a list of seeds does, and says which row has which seed."""


@dataclass(frozen=True)
class Call:
    """One pipeline call: its arguments without `output_type`, and what its rows are.

    `groups` numbers the prompt of each row: rows with the same number differ in their seed only.
    """

    arguments: dict[str, Any]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    different_images: bool
    groups: tuple[int, ...]

    def context(self, pipe: Any) -> AbstractContextManager[None]:
        """A context in which the pipeline can run these rows (see `encode_each_row_once`)."""
        return encode_each_row_once(pipe) if self.different_images else nullcontext()


Seeds = int | Sequence[int] | Sequence[Sequence[int]]
"""One seed, seeds for every prompt, or a list of seeds for each prompt."""


def prepare(pipe: Any, seed: Seeds, inputs: dict[str, Any], reserved: Sequence[str] = ()) -> Call:
    """Arguments for one pipeline call with a row for every prompt and seed.

    Args:
        pipe: the pipeline that will be called.
        seed: one seed, or S of them; or for each prompt a list of S of its own.
        inputs: the pipeline's own keyword arguments. `prompt` may be a list of P, and so may `class_labels`; `image` and
            `last_image` a PIL image, a list of P, or a (3, H, W) or (P, 3, H, W) tensor in [0, 1].
        reserved: arguments that the caller decides on.

    Raises:
        InputError: an argument that the pipeline lacks or that is not to be given, or lengths that do not agree.
    """
    _check_names(pipe, inputs, reserved)
    seeds = _seeds(seed)
    arguments = dict(inputs)
    for name in set(IMAGES) & set(arguments):
        arguments[name] = _images(pipe, name, arguments)
    counts = {name: _count(arguments[name]) for name in arguments if per_prompt(name)}
    several = {name: count for name, count in counts.items() if count is not None and count > 1}
    prompts = max(several.values(), default=1)
    if set(several.values()) - {prompts}:
        raise InputError(f"lengths that differ: {listed(f'{name} {count}' for name, count in several.items())}")
    different_images = bool(set(several) & set(IMAGES))
    if different_images:
        for name in (name for name in IMAGES if isinstance(arguments.get(name), Image.Image)):
            arguments[name], counts[name] = _as_tensor(pipe, [arguments[name]], arguments), 1
    for name, value in arguments.items():
        if name in counts and (name not in IMAGES or different_images):
            arguments[name] = _spread(name, value, counts[name], prompts, len(seeds[0]))
    if different_images and getattr(pipe, "image_encoder", None) is not None:
        raise InputError("a pipeline with an image_encoder repeats one image for all rows; run its images one by one")
    if len(seeds) > 1 and len(seeds) != prompts:
        raise InputError(f"seed= holds lists for {len(seeds)} prompts, and there are {prompts}; write one list for each")
    rows = tuple(one for its in (seeds if len(seeds) > 1 else seeds * prompts) for one in its)
    generators = [torch.Generator("cpu").manual_seed(row) for row in rows]
    # Not every pipeline takes a list; of one row, both draw the same.
    arguments["generator"] = generators if len(rows) > 1 else generators[0]
    prompt = arguments.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else list(prompt or [""] * len(rows))
    groups = tuple(index for index in range(prompts) for _ in seeds[0])
    return Call(arguments, rows, tuple(texts), different_images, groups)


@contextmanager
def beginning(pipe: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with which a pipeline is begun, to watch it: those of a run from one seed, without a generator."""
    call = prepare(pipe, 0, dict(inputs))
    with call.context(pipe):
        yield {name: value for name, value in call.arguments.items() if name != "generator"}


ENCODED_PIXELS = 2**26
"""How many pixels (rows x frames x height x width) an accelerator encodes at a time."""


@contextmanager
def encode_each_row_once(pipe: Any):
    """Let `vae.encode` give one row at a time while a pipeline prepares a batch of different images.

    Diffusers' WanImageToVideoPipeline, given a list of N generators, encodes its whole video condition N times and
    joins the results. That is right for one image (N calls, one row each) and gives N * N rows for N images. In this
    context the i-th call returns row i only, so that the joined condition has N rows. An image that stands in several
    rows (one for each seed) is encoded once. On the CPU every image is encoded alone, exactly as in a run of its own;
    on an accelerator, which would spend its time on launching kernels, as many at once as `ENCODED_PIXELS` holds.
    The instance's own method is back when the context ends.
    """
    encode = pipe.vae.encode
    rows: Iterator[Any] | None = None

    def encoded_rows(x: Tensor, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # A row counts as new where it differs from the one before it: rows come image by image.
        new = [0, *(1 + (x[1:] != x[:-1]).flatten(1).any(dim=1).nonzero().flatten()).tolist()]
        repeats = [b - a for a, b in itertools.pairwise([*new, len(x)])]
        size = 1 if x.device.type == "cpu" else max(1, ENCODED_PIXELS // x[0, 0].numel())
        for first in range(0, len(new), size):
            output = encode(x[new[first : first + size]], *args, **kwargs)
            distribution = output.latent_dist
            for parameters, count in zip(distribution.parameters, repeats[first : first + size], strict=True):
                row = type(output)(latent_dist=type(distribution)(parameters[None]))
                yield from itertools.repeat(row, count)

    def encode_next(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows = encoded_rows(x, *args, **kwargs) if rows is None else rows
        return next(rows)

    with replaced_attribute(pipe.vae, "encode", encode_next):
        yield


def _check_names(pipe: Any, inputs: dict[str, Any], reserved: Sequence[str]) -> None:
    instead = {
        "generator": "seed=",
        "output_type": "decode=",
        "return_dict": "the Run that comes back",
    }
    for name in inputs:
        repeated = SEVERAL.fullmatch(name) is not None
        if name in reserved or repeated:
            other = "a list of seeds" if repeated else instead.get(name, "something else")
            raise InputError(f"{name}= is not for you to give here; use {other}")
    parameters = [name for name in inspect.signature(type(pipe).__call__).parameters if name != "self"]
    unknown = [name for name in inputs if name not in parameters]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no {listed(unknown)}; it takes {listed(parameters)}")


def _seeds(seed: Seeds) -> list[list[int]]:
    """The seeds of every prompt in one list, or a list for each."""
    given: list[Any] = [seed] if isinstance(seed, int | np.integer) else list(seed)
    nested = bool(given) and all(isinstance(one, list | tuple | range) for one in given)
    lists: list[list[Any]] = [list(one) for one in given] if nested else [given]
    whole = all(isinstance(one, int | np.integer) for its in lists for one in its)
    if not whole or not lists[0] or len({len(its) for its in lists}) > 1:
        raise InputError(f"seed={seed!r} is no int, no list of ints, and no list of ints for each prompt, of one length")
    return [[int(one) for one in its] for its in lists]


def per_prompt(name: str) -> bool:
    """Whether a pipeline argument may come once for each prompt."""
    return name in (*IMAGES, LABELS) or TEXT.fullmatch(name) is not None


def _count(value: Any) -> int | None:
    """How many prompts a value holds; None for a single one for all rows."""
    if isinstance(value, Tensor):
        return value.shape[0]
    return len(value) if isinstance(value, list | tuple) else None


def _images(pipe: Any, name: str, arguments: dict[str, Any]) -> Any:
    """A single PIL image as it came; tensors and lists as (P, 3, H, W) in [0, 1]."""
    images = arguments[name]
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise InputError(f"{name} has shape {tuple(images.shape)}; write (3, H, W) or (P, 3, H, W) in [0, 1]")
        if images.min() < 0 or images.max() > 1:
            raise InputError(f"{name} has values from {images.min():.3g} to {images.max():.3g}; scale them to [0, 1]")
        return images if images.ndim == 4 else images[None]
    if images is None or isinstance(images, Image.Image):
        return images
    if not isinstance(images, list | tuple) or not all(isinstance(image, Image.Image) for image in images):
        raise InputError(f"{name} is a {type(images).__name__}; write a PIL image, a list of them, or a tensor")
    return images[0] if len(images) == 1 else _as_tensor(pipe, images, arguments)


def _as_tensor(pipe: Any, images: Sequence[Image.Image], arguments: dict[str, Any]) -> Tensor:
    """PIL images as (P, 3, H, W) in [0, 1], as the pipeline's own preprocessing makes them; it goes on from there."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    height, width = (arguments.get(side, defaults[side].default) for side in ("height", "width"))
    processor = pipe.video_processor
    resized = [processor.resize(image.convert("RGB"), height, width) for image in images]
    return processor.numpy_to_pt(processor.pil_to_numpy(resized))


def _spread(name: str, value: Any, count: int | None, prompts: int, seeds: int) -> Any:
    """A per-prompt argument with one entry for every row; what is one for all rows the pipeline repeats itself."""
    if count is None:
        # Some pipelines repeat a negative prompt beside a list of prompts, and some refuse it.
        return [value] * (prompts * seeds) if isinstance(value, str) and prompts * seeds > 1 else value
    repeats = seeds if count == prompts else prompts * seeds
    if isinstance(value, Tensor):
        return value.repeat_interleave(repeats, dim=0)
    return [one for one in value for _ in range(repeats)]
