"""The page of committed results: it says what lies in the folders, and every item of the paper has its place."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import dit_lens as dl
from dit_lens.claims import COMMITTED
from dit_lens.experiment import experiments, read_manifest
from experiments import page, paper, second

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


def test_committed_results_are_of_the_presets_as_they_are() -> None:
    for name, experiment in experiments().items():
        full, manifest = json.loads(json.dumps(asdict(experiment.preset("full")))), read_manifest(ROOT / "figures" / name)
        assert manifest
        # How many processes read probes is a matter of the machine.
        assert manifest["settings"] | {"workers": 0} == full | {"workers": 0}, f"{name}: run its full preset again"


def test_what_experiments_say_that_they_take_is_what_the_committed_ones_took() -> None:
    for name, experiment in experiments().items():
        manifest = read_manifest(ROOT / "figures" / name)
        assert manifest
        if manifest["units"]["reused"] == manifest["units"]["units"]:
            continue  # its runs were made by another
        assert experiment.minutes / 2 - 0.5 <= manifest["wall_seconds"] / 60 <= 2 * experiment.minutes, name


def reasoner(outcome: str, verdict: str) -> list[dict[str, Any]]:
    """The verdicts of a model on two claims, one of which it is asked about."""
    found = {"criterion": "share > 0.5", "estimate": 0.7, "low": 0.6, "high": 0.8, "threshold": 0.5, "outcome": outcome}
    return [{"claim": "C1", "verdict": verdict, "found": [found]}, {"claim": "C2", "verdict": "refuted", "found": []}]


@pytest.mark.parametrize(
    ("outcome", "verdict", "said"),
    [
        (
            "holds",
            "supported",
            ("**1 of 1 claims**", "0 are contrary", "1 come out alike and 0 opposite", "| **supported** |  |"),
        ),
        (
            "open",
            "inconclusive",
            ("**0 of 1 claims**", "0 are contrary", "0 come out alike and 0 opposite", "share > 0.5: holds, open"),
        ),
        (
            "fails",
            "refuted",
            ("**0 of 1 claims**", "1 are contrary", "0 come out alike and 1 opposite", "share > 0.5: holds, fails"),
        ),
    ],
)
def test_a_second_reasoner_is_set_beside_the_first(outcome: str, verdict: str, said: tuple[str, ...]) -> None:
    curve = [{"step": 7000, "loss": 0.0151, "rate": 0.0, "seconds": 660.0}]
    training = {"dit": {"settings": {"batch": 512}, "devices": "1 x GPU", "curve": curve}}
    held_out = {"tasks": {"maze": {"right": {"estimate": 0.95, "low": 0.9, "high": 0.98}}}}
    manifest = {
        "experiment": "step-lens",
        "source": "Fig. 1",
        "compute_seconds": 61.0,
        "units": {"units": 3, "reused": 0},
        "claims": reasoner(outcome, verdict)[:1],
    }
    written = second.section(reasoner("holds", "supported"), held_out, second.Second([manifest], training, held_out))
    for words in (*said, "7,000 steps of 512 clips in 11.0 minutes on 1 x GPU, loss 0.0151", "| C2 | refuted | not measured |"):
        assert words in written
    assert "| maze | 0.95 [0.9, 0.98] | 0.95 [0.9, 0.98] |" in written


def test_the_second_reasoners_results_are_of_its_weights() -> None:
    home = ROOT / "figures" / second.NAME
    found = second.read(ROOT / "figures")
    assert found is not None
    assert {manifest["model"]["hash"] for manifest in found.manifests} == {dl.load(home / second.WEIGHTS).hash}
    assert found.held_out["model"] in {manifest["model"]["hash"] for manifest in found.manifests}
    assert {manifest["preset"] for manifest in found.manifests} == {"full"}
    for manifest in found.manifests:
        first = read_manifest(ROOT / "figures" / manifest["experiment"])
        assert first
        assert {**manifest["settings"], "batch": 0} == {**first["settings"], "batch": 0}


def test_criteria_are_paired_by_their_names() -> None:
    first, other = reasoner("holds", "supported"), {one["claim"]: one for one in reasoner("fails", "refuted")}
    table = second.criteria(first, other)
    assert table[["claim", "first_outcome", "second_outcome"]].to_numpy().tolist() == [["C1", "holds", "fails"]]
    assert table["first_low"].item() == pytest.approx(0.1)
    figure = second.forest(table)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "C1: share > 0.5"


def test_the_readme_says_how_far_the_second_reasoner_agrees() -> None:
    said = [re.findall(r"(\d+ of \d+ claims)", (ROOT / name).read_text()) for name in ("README.md", "figures/README.md")]
    assert said[0] == said[1]
    assert len(said[0]) == 1
