"""Pairs of samples, and the runs that they are compared by.

A patching experiment asks what of one run decides an outcome, by bringing it into another: into the run of a *clean*
sample comes something of a *donor*, a sample that differs in what the question is about and in as little else as possible.
`run_pairs` runs pairs together, clean ones in one batch and donors in another, with the same seeds row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dit_lens.activations import Activations
from dit_lens.batching import IMAGES, per_prompt
from dit_lens.errors import InputError, listed
from dit_lens.lens import Lens
from dit_lens.run import Run


@runtime_checkable
class HasInputs(Protocol):
    """A sample: it knows the pipeline's keyword arguments for itself."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The keyword arguments of a pipeline call with this sample alone."""
        ...


@dataclass(frozen=True, eq=False)
class Pair:
    """Two samples to compare; each has `inputs`, the pipeline's keyword arguments, as the reasoner's samples do.

    Attributes:
        clean: the sample whose run is edited. donor: the sample whose run gives what is put there.
    """

    clean: Any
    donor: Any


@dataclass(frozen=True, eq=False)
class PairRuns:
    """The runs of some pairs. Rows are pair by pair, and seed by seed within a pair.

    Attributes:
        pairs: the pair of every row. clean, donor: the runs.
        places: the number of the pair of every row, in the whole experiment.
    """

    pairs: tuple[Any, ...]
    clean: Run
    donor: Run
    places: tuple[int, ...]

    @cached_property
    def other(self) -> Run:
        """The donors' run with its rows moved on by one pair: every row gets the donor of another pair, as a control.

        Raises:
            InputError: there is one pair only.
        """
        seeds = self.places.count(self.places[0])
        if seeds == len(self.places):
            raise InputError(
                "the donor of another pair needs two pairs in a batch, and here is one; give more, or a larger batch="
            )
        return rolled(self.donor, seeds)

    def with_donor_activations(self, activations: Activations) -> PairRuns:
        """The same with other activations of the donors."""
        return replace(self, donor=replace(self.donor, activations=activations))


def rolled(run: Run, rows: int) -> Run:
    """A run with its rows moved on: row i holds what row i + `rows` held, from the front again at the end."""

    def moved(values: Sequence[Any]) -> tuple[Any, ...]:
        return (*values[rows:], *values[:rows])

    def turned(tensor: Tensor, axis: int) -> Tensor:
        return tensor.roll(-rows, dims=axis)

    entries = [replace(entry, tensor=turned(entry.tensor, 0)) for entry in run.activations]
    return replace(
        run,
        seeds=moved(run.seeds),
        prompts=moved(run.prompts),
        latents=turned(run.latents, 1),
        outputs={name: turned(output, 1) for name, output in run.outputs.items()},
        video=None if run.video is None else turned(run.video, 0),
        activations=Activations(entries),
        calls={},
    )


def run_pairs(lens: Lens, pairs: Sequence[Any], places: Sequence[int], seeds: Sequence[int], **options: Any) -> PairRuns:
    """Run some pairs, all clean samples in one call and all donors in another.

    Args:
        pairs: each has a `clean` and a `donor` with `inputs`. places: their numbers in the whole experiment.
        seeds: every sample is run with each of them. options: for `Lens.run`.

    Raises:
        InputError: samples whose arguments do not go into one call.
    """
    clean, donor = (
        lens.run(**joined_inputs([getattr(pair, side) for pair in pairs]), seed=list(seeds), **options)
        for side in ("clean", "donor")
    )
    for run, side in ((clean, "clean"), (donor, "donor")):
        if run.batch != len(pairs) * len(seeds):
            raise InputError(
                f"{len(pairs)} pairs with {len(seeds)} seeds gave {run.batch} {side} rows: the inputs of a sample are those of"
                " one prompt and one image"
            )
    if clean.latents.shape != donor.latents.shape or clean.branches != donor.branches:
        raise InputError(
            f"clean latents have shape {tuple(clean.latents.shape)} and the branches {listed(clean.branches)}, the donors'"
            f" {tuple(donor.latents.shape)} and {listed(donor.branches)}: the samples of a pair are to have the same frames,"
            " height, width, number of steps and guidance"
        )
    spread = [(pair, place) for pair, place in zip(pairs, places, strict=True) for _ in seeds]
    return PairRuns(tuple(pair for pair, _ in spread), clean, donor, tuple(place for _, place in spread))


def batches(pairs: int, batch: int) -> list[list[int]]:
    """The numbers of the pairs that run together, the smallest batch first: what it is too small for fails at once.

    Raises:
        InputError: a batch is to hold no pair.
    """
    if batch < 1:
        raise InputError(f"batch={batch} holds no pair; write 1 or more")
    parts = np.array_split(np.arange(pairs), -(-pairs // batch))
    return sorted((part.tolist() for part in parts), key=len)


def joined_inputs(samples: Sequence[Any]) -> dict[str, Any]:
    """Keyword arguments of one pipeline call with all samples.

    Raises:
        InputError: a sample has no `inputs`, or they differ in an argument that a call can have once only.
    """
    strange = [type(sample).__name__ for sample in samples if not isinstance(sample, HasInputs)]
    if strange:
        raise InputError(f"a {strange[0]} is no sample: it has no inputs, the pipeline's keyword arguments")
    every = [dict(sample.inputs) for sample in samples]
    if any(set(inputs) != set(every[0]) for inputs in every):
        names = sorted(set().union(*every) - set.intersection(*map(set, every)))
        raise InputError(f"samples that run together have the same arguments, and only some of these have {listed(names)}")
    if len(every) == 1:
        return every[0]
    joined: dict[str, Any] = {}
    for name in every[0]:
        values = [inputs[name] for inputs in every]
        if per_prompt(name) and any(value is not None for value in values):
            joined[name] = _joined(name, values)
        elif all(_same(value, values[0]) for value in values):
            joined[name] = values[0]
        else:
            shown = listed(dict.fromkeys(map(repr, values)))
            raise InputError(f"samples that run together have one {name}=, and these have {shown}")
    return joined


def _joined(name: str, values: Sequence[Any]) -> Any:
    """What comes once for each prompt, for all samples: rows of one tensor, or a list."""
    if not any(isinstance(value, Tensor) for value in values):
        return [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    # One image has the axes (3, height, width), the embedding of one prompt (tokens, channels); pooled ones and masks have one.
    single = 3 if name in IMAGES else 2 if name.removeprefix("negative_") == "prompt_embeds" else 1
    rows = [value[None] if isinstance(value, Tensor) and value.ndim == single else value for value in values]
    if any(not isinstance(row, Tensor) or row.shape[1:] != rows[0].shape[1:] for row in rows):
        shown = listed(tuple(row.shape[1:]) if isinstance(row, Tensor) else type(row).__name__ for row in rows)
        raise InputError(f"samples that run together have {name}= of one shape, and these have {shown}")
    return torch.cat(rows)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)
