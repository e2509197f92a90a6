"""The page of committed results: it says what lies in the folders, and every item of the paper has its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dit_lens.claims import COMMITTED
from dit_lens.experiment import experiments, read_manifest
from experiments import page, paper

ROOT = Path(__file__).parent.parent


def test_committed_page_and_verdicts_are_those_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {ROOT / "figures" / "README.md": "", ROOT / "experiments" / COMMITTED: ""}
    monkeypatch.setattr(page, "write_text", lambda path, text: written.__setitem__(path, text))
    page.main()
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name} is stale: run python -m experiments.page"


def test_every_item_of_the_paper_has_a_counterpart_or_a_reason() -> None:
    known = set(experiments())
    for item in paper.ITEMS:
        assert item.experiments or item.note, item.name
        assert set(item.experiments) <= known, f"{item.name} names an experiment that is not there"


def test_every_claim_of_a_committed_experiment_has_a_verdict() -> None:
    committed = {one["claim"]: one for one in json.loads((ROOT / "experiments" / COMMITTED).read_text())}
    for name, experiment in experiments().items():
        manifest = read_manifest(ROOT / "figures" / name)
        # A result that is older than the claims says nothing about them.
        for claim in experiment.claims if manifest and manifest.get("claims") else ():
            assert committed[claim.name]["statement"] == claim.statement
            assert committed[claim.name]["verdict"] != "not tested"


def test_the_readme_gives_the_committed_verdicts() -> None:
    committed = {one["claim"]: one["verdict"] for one in json.loads((ROOT / "experiments" / COMMITTED).read_text())}
    said = dict(re.findall(r"\((\w+)\) \| \*\*(\w+)\*\* \|", (ROOT / "README.md").read_text()))
    assert len(said) >= 7
    assert said == {name: committed[name] for name in said}
