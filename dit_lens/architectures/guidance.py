"""Guidance: in which calls of the denoiser, or in which of their rows, each branch is, found by changing the prompt.

Some pipelines call the denoiser once per branch, some once with the rows of all branches, one branch after the other, and the
order differs. What a call is given for the conditional branch changes with the prompt, and for the unconditional one it does not:
that is watched in the first step, of which nothing else is run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dit_lens.architectures.arguments import Undecided, is_movable
from dit_lens.architectures.record import Guidance

CONDITIONS = ("prompt", "prompt_2", "prompt_3", "class_labels")
"""Pipeline arguments that say what is asked for; beside those that end in `prompt_embeds` and are not negative."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What the beginning of a run shows: how its branches are called, and its scheduler with the steps that were set."""

    guidance: Guidance
    scheduler: Any


def outline(pipe: Any, denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> Outline:
    """The outline of a run with these arguments; as for `discover_guidance`."""
    guidance = discover_guidance(pipe, denoisers, inputs)
    # The last of the two beginnings left the scheduler before its first step.
    return Outline(guidance, copy.deepcopy(pipe.scheduler))


def settings_of(value: Any) -> Any:
    """What of an argument the outline of a run depends on: numbers and choices as they are, of anything else its kind."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value)
    if isinstance(value, (bool, int, float)) or numbers or value is None:
        return repr(value)
    return (type(value).__name__, getattr(value, "shape", None) or (len(value) if isinstance(value, (list, tuple)) else None))


class _FirstStepDone(Exception):
    """Raised in the scheduler's place, as what follows the first step shows nothing more."""


def discover_guidance(pipe: Any, denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any], seed: int = 0) -> Guidance:
    """How a pipeline calls its branches with these arguments. It is begun twice, and left at its first scheduler step.

    Args:
        denoisers: the pipeline's experts. inputs: arguments of the pipeline, without a generator.

    Raises:
        Undecided: nothing in them says what is asked for, or what was seen is neither of the kinds.
    """
    another = asking_for_another(inputs)
    with torch.no_grad():
        clean, asked = (_first_step(pipe, denoisers, given, seed) for given in (inputs, another))
    if not clean or len(clean) != len(asked):
        raise Undecided(f"the first step of a {type(pipe).__name__} calls its denoiser {len(clean)} times, and then {len(asked)}")
    rows = [_changed(one, other) for one, other in zip(clean, asked, strict=True)]
    if len(rows) > 1:
        found = [bool(changed.any()) for changed in rows]
        if any(changed.any() and not changed.all() for changed in rows) or sum(found) != 1 or len(found) > 2:
            raise Undecided(
                f"a {type(pipe).__name__} calls its denoiser {len(rows)} times a step, and {sum(found)} hear the prompt"
            )
        return Guidance("sequential", tuple("cond" if heard else "uncond" for heard in found))
    runs = [bool(heard) for heard, _ in groupby(rows[0].tolist())]
    if runs == [True]:
        return Guidance("none", ("cond",))
    if len(runs) == 2 and 2 * int(rows[0].sum()) == len(rows[0]):
        return Guidance("batched", tuple("cond" if heard else "uncond" for heard in runs))
    raise Undecided(f"of the {len(rows[0])} rows of a {type(pipe).__name__}'s call, {int(rows[0].sum())} hear the prompt")


def first_call(pipe: Any, denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first call of a denoiser in a run with these arguments, by name."""
    with torch.no_grad():
        calls = _first_step(pipe, denoisers, inputs, seed=0)
    if not calls:
        raise Undecided(f"a {type(pipe).__name__} calls none of {', '.join(denoisers)} before its scheduler's first step")
    return {name: value for name, value in calls[0].items() if name != "self"}


def _first_step(pipe: Any, denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """What the denoisers are given in the first step, call by call."""
    calls: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    with _watching(pipe, denoisers, calls), suppress(_FirstStepDone):
        pipe(**inputs, generator=generator)
    return calls


@contextmanager
def _watching(pipe: Any, denoisers: Mapping[str, nn.Module], calls: list[dict[str, Any]]) -> Iterator[None]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments))

    def step(*args: Any, **kwargs: Any) -> Any:
        raise _FirstStepDone

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in denoisers.values()]
    # Pipelines look at the parameters of this method.
    step.__signature__ = inspect.signature(pipe.scheduler.step)  # pyright: ignore[reportFunctionMemberAccess]
    own = {name: value for name, value in vars(pipe.scheduler).items() if name == "step"}
    vars(pipe.scheduler)["step"] = step
    try:
        yield
    finally:
        del vars(pipe.scheduler)["step"]
        vars(pipe.scheduler).update(own)
        for handle in handles:
            handle.remove()
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()


def asking_for_another(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, asking for something else."""
    changed = {
        name: _another(value)
        for name, value in inputs.items()
        if value is not None and (name in CONDITIONS or (name.endswith("prompt_embeds") and "negative" not in name))
    }
    if not changed:
        raise Undecided(f"nothing in {', '.join(inputs)} says what is asked for: give a prompt, prompt_embeds or class_labels")
    return {**inputs, **changed}


def _another(value: Any) -> Any:
    """Another prompt as long, another class, other embeddings."""
    if isinstance(value, (list, tuple)):
        return type(value)(_another(one) for one in value)
    if isinstance(value, str):
        turned = (" ".join(reversed(value.split())), value[::-1], f"not {value}")
        return next(text for text in turned if text != value)
    if isinstance(value, int):
        return value + 1 if value == 0 else value - 1
    return value + 1


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
    """The rows of a call that are given something else."""
    pairs = [(value, other.get(name)) for name, value in one.items() if _rows(value)]
    # The first of them that can be latents has a row for each sample and branch; others may be tables for all.
    count = next(len(value) for value, _ in pairs if is_movable(value))
    found = torch.zeros(count, dtype=torch.bool)
    for value, there in pairs:
        if len(value) == count and there is not None and len(there) == count:
            for row, (here, elsewhere) in enumerate(zip(value, there, strict=True)):
                # Prompts of two lengths are padded to that of the longer one.
                common = tuple(slice(min(sizes)) for sizes in zip(here.shape, elsewhere.shape, strict=True))
                found[row] |= not torch.equal(here[common], elsewhere[common])
    return found


def _rows(value: Any) -> bool:
    """Whether an argument has rows: a tensor with axes, or a list of tensors."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(one, Tensor) for one in value)
    return isinstance(value, Tensor) and value.ndim > 0
