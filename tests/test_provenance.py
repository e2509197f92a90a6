"""Provenance: what says where a result came from says the same in every process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_lens import provenance, reasoner
from dit_lens.reasoner import vbvr


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


def test_a_folder_counts_by_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "mazes"
    (sample,) = vbvr.write([reasoner.task("maze").sample("test", 0)], folder)
    settings = {"tasks": ("maze", str(folder)), "samples": 1}
    before = provenance.folder_hashes(settings)
    assert list(before) == [str(folder)]
    (sample / "notes.txt").write_text("nobody reads this")
    assert provenance.folder_hashes(settings) == before
    (sample / "prompt.txt").write_text("another")
    assert provenance.folder_hashes(settings) != before
    assert provenance.folder_hashes({"tasks": ("maze",), "branch": "cond"}) == {}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An experiment that imports a helper, which imports another, and figures."""
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "noise.py").write_text("from protocols import noise_figures as figures\nfrom protocols.helping import help\n")
    (folder / "helping.py").write_text("from protocols import deeper\n")
    for name in ("deeper", "noise_figures", "other"):
        (folder / f"{name}.py").write_text("number = 1\n")
    return folder


@pytest.mark.parametrize(
    ("name", "counts"), [("noise", True), ("helping", True), ("deeper", True), ("noise_figures", False), ("other", False)]
)
def test_the_code_that_measures_counts(package: Path, name: str, counts: bool) -> None:
    hashed = provenance.code_hash.__wrapped__  # what is read once in a process, read again
    before = hashed(package / "noise.py")
    with (package / f"{name}.py").open("a") as file:
        file.write("changed = True\n")
    assert (hashed(package / "noise.py") != before) == counts
