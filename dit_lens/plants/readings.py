"""How effects are read: which of them count, what a tool says by them, and whether it says what the table does.

What counts, and how far a size may be off, is fixed here for all models, and not fitted to any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from dit_lens.plants.table import TOOLS, Place, Truth, Verdict

ALARM = 0.05
"""An effect counts where it is larger than this."""
PROBE_ALARM = 0.6
"""The same for the probe, whose effect is 2 x (area under the ROC curve) - 1: an area of 0.8."""
SCALE_ERROR = 0.1
"""How far an effect may be off besides, as a share of what it is to be."""
DRAWS = 128
"""How often `resample` draws. What it finds is a mean over draws, off by up to three standard errors."""
ALARM_RATE = 0.05
"""The share of models without a plant on which a tool may find something, at any place: what every tool states."""


def alarm(tool: str) -> float:
    """What an effect has to be larger than to count."""
    return PROBE_ALARM if tool == "probe" else ALARM


def allowed(tool: str, expected: float) -> float:
    """How far a measured effect may be from the one expected."""
    if tool == "probe":
        return SCALE_ERROR if expected else PROBE_ALARM
    # Half of the draws move the answer by twice the expected effect, and the others by nothing.
    drawn = 3 * abs(expected) / DRAWS**0.5 if tool == "resample" else 0.0
    return ALARM + SCALE_ERROR * abs(expected) + drawn


def misses(tool: str, expected: Mapping[Place, float], found: Mapping[Place, float]) -> dict[Place, float]:
    """The places where a measured effect is further from the expected one than is allowed, and by how much it is off."""
    off = {place: found[place] - size for place, size in expected.items()}
    return {place: error for place, error in off.items() if not abs(error) <= allowed(tool, expected[place])}


def planted_places(truth: Truth, axis: str) -> set[Place]:
    """Where the plant is on an axis; nothing where it is everywhere on it, or the model has none."""
    places: Mapping[str, set[Place | None]] = {
        "block": {truth.block, truth.second},
        "head": {None if truth.block is None or truth.head is None else (truth.block, truth.head)},
        "step": {truth.step},
        "branch": set(truth.branches) if len(truth.branches) == 1 else set(),
    }
    return {place for place in places[axis] if place is not None}


def verdict(truth: Truth, effects: Mapping[Place, float], axis: str, above: float = ALARM) -> Verdict:
    """What a tool says by the effects that it found, in the words of `table`, given what is true.

    Args:
        truth: of the model. effects: at every place of the axis, in order. axis: block, head, step or branch.
        above: what an effect has to be larger than to count.
    """
    places = list(effects)
    hit = [place for place in places if abs(effects[place]) > above]
    if not hit:
        return "silent" if truth.kind == "none" else "blind"
    planted = planted_places(truth, axis)
    if truth.kind == "none":
        return "misled"
    if planted and set(hit) <= planted:
        return "names"
    first, last = places.index(hit[0]), places.index(hit[-1])
    # Latents carry what a step did from the next step on, so a boundary may lie on either side of the plant.
    upwards = last == len(places) - 1 and bool({places[first], places[max(first - 1, 0)] if axis == "step" else None} & planted)
    downwards = first == 0 and last + 1 < len(places) and places[last + 1] in planted
    if len(hit) == last - first + 1 < len(places) and axis in ("block", "step") and (upwards or downwards):
        return "boundary"
    # Where every step has its share, no step is a wrong one, and the share of a small stride may not count.
    whole = len(hit) == len(places) or (axis == "step" and not planted)
    return "everywhere" if whole else "misled"


def says(tool: str, truth: Truth, effects: Mapping[Place, float]) -> Verdict:
    """`verdict` for one of the tools of the table."""
    return verdict(truth, effects, TOOLS[tool].axis, alarm(tool))
