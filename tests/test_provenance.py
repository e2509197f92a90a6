"""The code that a result depends on: what an experiment imports from beside it counts, what only draws does not."""

from __future__ import annotations

from pathlib import Path

from dit_lens import provenance


def hash_of(folder: Path, name: str = "protocol.py") -> str:
    provenance.code_hash.cache_clear()
    return provenance.code_hash(folder / name)


def test_helpers_of_an_experiment_count_and_figures_do_not(tmp_path: Path) -> None:
    (tmp_path / "protocol.py").write_text("from experiments import figures_of\nfrom experiments.scores import score\n")
    (tmp_path / "scores.py").write_text("from experiments.deeper import unit\nscore = 1\n")
    for name in ("deeper", "figures_of", "unrelated"):
        (tmp_path / f"{name}.py").write_text("unit = 1\n")
    before = hash_of(tmp_path)
    for name in ("figures_of", "unrelated"):
        (tmp_path / f"{name}.py").write_text("unit = 2\n")
        assert hash_of(tmp_path) == before
    for name in ("deeper", "scores"):
        (tmp_path / f"{name}.py").write_text("unit = score = 2\n")
        assert hash_of(tmp_path) != before
        before = hash_of(tmp_path)
    provenance.code_hash.cache_clear()
