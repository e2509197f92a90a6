"""Provenance: what says where a result came from says the same in every process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from dit_lens import provenance


def facts(scheduler: Any) -> dict[str, Any]:
    lens: Any = SimpleNamespace(pipe=SimpleNamespace(scheduler=scheduler))
    return provenance.scheduler_facts(lens)


def test_a_schedulers_facts_do_not_depend_on_the_order_of_a_set() -> None:
    """Diffusers lists which settings were left at their defaults, in the order of a set of words: another in every process."""
    one, other = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.register_to_config(_use_default_values=list(reversed(one.config["_use_default_values"])))
    assert facts(one) == facts(other)
    assert facts(one)["config"]["shift"] == 3.0
    assert facts(one) != facts(FlowMatchEulerDiscreteScheduler(shift=5.0))
