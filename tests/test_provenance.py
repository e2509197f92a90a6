"""Provenance: what shaped a measurement counts, wherever it stands, and what only draws it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_lens.provenance import code_hash


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
    hashed = code_hash.__wrapped__  # what is read once in a process, read again
    before = hashed(package / "noise.py")
    with (package / f"{name}.py").open("a") as file:
        file.write("changed = True\n")
    assert (hashed(package / "noise.py") != before) == counts
