"""Levers: directions that a probe found, ready to be erased or added, beside levers that have nothing to do with the label.

    found = levers_at(lens, samples, dl.at(block=3, step=0, branch="cond", frames=-1), target)
    found["ridge"].direction                  # along the probe's weights; its scale is the distance of the classes along it
    found["leace"].eraser                     # what takes away all that a linear probe could read

`mass-mean` is the difference of the class means, `ridge` the direction that a ridge probe reads along, `leace` no direction to
add but the least change after which no linear probe reads the label (see `dl.Eraser`). The others are controls: `shuffled` is
`mass-mean` and `leace` of the labels of other samples, `random` a direction drawn at random. As these are added with the
length of `mass-mean`, what is left of a lever's effect beside theirs is its direction's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.pairs import joined_inputs
from dit_lens.statistics import Interval
from probes.controls import shuffled
from probes.linear import check_split, split_groups
from probes.ridge import Question, read_all
from probes.targets import Drawn, Target

RANDOM, SHUFFLED = "random", "shuffled"
CONTROLS = (RANDOM, SHUFFLED)
DRAWS = 4
"""How many random directions. One of them has a cosine of about 1 / sqrt(channels) with any direction that matters."""
HELD_OUT = 0.25
"""Share of the groups on which the ridge probe is scored; it is fitted to the others."""


@dataclass(frozen=True, eq=False)
class Lever:
    """What can be erased or added at a cell.

    Attributes:
        name: how it was found. eraser: takes it away. direction: to add, one step of which is the distance of the classes
            along it; None where there is none.
        score: how well a probe reads along it on held-out rows, of `ridge` only.
    """

    name: str
    eraser: dl.Eraser
    direction: dl.Direction | None = None
    score: Interval | None = None

    @property
    def is_control(self) -> bool:
        """Whether it has nothing to do with the label."""
        return self.name.split()[0] in CONTROLS


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of the tokens that a selector takes, of some samples: sample by sample, in the selector's order.

    Attributes:
        question: their labels. samples, groups: of each. places: which token of the layout each is.
    """

    question: Question
    samples: Shaped[np.ndarray, " rows"]
    groups: Shaped[np.ndarray, " rows"]
    places: Shaped[np.ndarray, " rows"]


def tokens_of(
    selector: dl.Selector, layout: dl.Layout, samples: Sequence[Any], target: Target, drawn: Mapping[int, Drawn] | None = None
) -> Tokens:
    """The labels of the selected tokens. A target's labels are on the layout of a frame, and hold in every selected frame.

    Raises:
        InputError: labels that do not fit the layout, a target that asks what was drawn where that is not given, or two samples
            that are one puzzle and say to be of two groups.
    """
    check_split(samples, [sample.group for sample in samples])
    places = selector.places(layout.shape).flatten().numpy()
    labels = []
    for sample in samples:
        try:
            # Models without boards draw nothing that could be asked for.
            grid = np.asarray(target.labels(sample, drawn[sample.index] if drawn else None), dtype=float)  # pyright: ignore
        except AttributeError as error:
            raise InputError(f"the target {target.name} asks what the model drew ({error}); give drawn=") from error
        if grid.shape not in (layout.shape, layout.shape[1:]):
            raise InputError(f"labels of {target.name} have shape {grid.shape} and do not fit the layout {layout.shape}")
        labels.append(np.broadcast_to(grid, layout.shape).ravel()[places])
    question = Question(target.name, target.kind, np.concatenate(labels))
    numbers, groups = (np.repeat([getattr(s, name) for s in samples], len(places)) for name in ("index", "group"))
    return Tokens(question, numbers, groups, np.tile(places, len(samples)))


def levers(features: Float[np.ndarray, "rows channels"], tokens: Tokens, draws: int = DRAWS, seed: int = 0) -> dict[str, Lever]:
    """The levers of a binary label, by name.

    Args:
        features: of one cell, a row for each of the tokens. draws: how many random directions. seed: of the controls.

    Raises:
        InputError: labels that are not binary, or of one class, or too few groups for a ridge probe.
    """
    question = tokens.question
    if question.kind != "binary":
        raise InputError(f"a lever is of a binary target, and {question.name} is of kind {question.kind}")
    asked = question.asked
    features, labels, groups = features[asked].astype(np.float64), question.values[asked] > 0, tokens.groups[asked]
    mean = features.mean(axis=0)
    means = dl.difference_of_means(features, labels)
    found = {"mass-mean": Lever("mass-mean", projection(means, mean), means)}
    _, test = split_groups(groups, HELD_OUT, seed)
    (reading,) = read_all(features, [replace(question, values=labels)], groups, test)
    if not len(reading.weights):
        raise InputError(
            f"a ridge probe of {question.name} needs more groups, of both classes, than these {len(np.unique(groups))}"
        )
    ridge = along(reading.weights[0], features, labels)
    found["ridge"] = Lever("ridge", projection(ridge, mean), ridge, reading.score)
    found["leace"] = Lever("leace", dl.Eraser.fit(features, labels))
    others = shuffled(question, tokens.samples, tokens.places, seed).values[asked] > 0
    mixed = replace(dl.difference_of_means(features, others), scale=means.scale)
    found[SHUFFLED] = Lever(SHUFFLED, dl.Eraser.fit(features, others), mixed)
    for number, drawn in enumerate(dl.random_directions(means, draws, seed)):
        name = f"{RANDOM} {number}"
        found[name] = Lever(name, projection(drawn, mean), drawn)
    return found


def along(
    weights: Float[np.ndarray, " channels"], features: Float[np.ndarray, "rows channels"], labels: Bool[np.ndarray, " rows"]
) -> dl.Direction:
    """The direction of a probe's weights, with the distance of the class means along it as its scale."""
    vector = weights / np.linalg.norm(weights)
    scale = float((features[labels].mean(axis=0) - features[~labels].mean(axis=0)) @ vector)
    return dl.Direction(torch.from_numpy(vector).float(), scale, source="ridge probe")


def projection(direction: dl.Direction, mean: Float[np.ndarray, " channels"]) -> dl.Eraser:
    """What sets activations to their mean along a direction, and leaves them otherwise as they are."""
    vector = direction.vector.double().flatten()
    return whole(dl.Eraser(torch.from_numpy(mean), vector[:, None], vector[None], tuple(direction.vector.shape)))


def whole(eraser: dl.Eraser) -> dl.Eraser:
    """The eraser without what in it is rounding.

    A channel that is always 0 comes out of an eraser's fit with a share of 1e-17, so that what is taken elsewhere would be
    added there: nothing to a model, but all to a probe, which gives every channel the same spread before it reads.
    """
    smallest = torch.finfo(torch.float32).eps * eraser.left.abs().max()
    return replace(eraser, left=torch.where(eraser.left.abs() > smallest, eraser.left, 0.0))


def levers_at(
    lens: dl.Lens,
    samples: Sequence[Any],
    at: dl.Selector,
    target: Target,
    *,
    drawn: Mapping[int, Drawn] | None = None,
    draws: int = DRAWS,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Lever]:
    """Run samples up to a cell, and find the levers of a target there. Effects are to be measured on other samples.

    Args:
        samples: with `inputs`, `index` and `group`; each has noise of its own, by its `seed`, or its number where it has none.
        at: one cell, and which tokens of it. target: a binary one. drawn: what the model drew, by sample, if it asks for that.

    Raises:
        InputError: more than one cell, or as `levers`.
    """
    cells = at.cells(lens.extent(**joined_inputs(samples[:1])))
    if len(cells) > 1:
        raise InputError(f"{at} selects {len(cells)} cells, and a lever is found at one: name block=, step= and branch=")
    rows, layout = [], None
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        run = lens.run(**joined_inputs(part), seed=seeds_of(part), record=at, until=cells[0].step, decode=False)
        (entry,) = run.activations
        rows.append(entry.tensor.flatten(0, -2).float().numpy())
        layout = run.layout
    assert layout is not None  # there was a sample, or a cell could not have been found
    return levers(np.concatenate(rows), tokens_of(at, layout, samples, target, drawn), draws, seed)


def seeds_of(samples: Sequence[Any]) -> list[list[int]]:
    """The `seed=` of a call in which every sample has noise of its own: its seed, or its number where it has none."""
    return [[getattr(sample, "seed", sample.index)] for sample in samples]
