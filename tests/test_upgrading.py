"""Canaries say what broke, the page of upgrading lists them all, and the scheduled job runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_canary
import test_canary_diffusers
import yaml
from canaries import FACTS, fact

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def row(name: str) -> str:
    """The row of the page for a fact."""
    told = FACTS[name]
    return f"| {told.statement} | {', '.join(f'`{path}`' for path in told.used_in)} | `{name}` |"


def test_every_canary_is_a_fact_on_the_page_and_the_page_has_no_other() -> None:
    tests = [name for module in (test_canary, test_canary_diffusers) for name in vars(module) if name.startswith("test_")]
    assert set(tests) <= set(FACTS), "tests without a fact"
    assert [line for line in PAGE.splitlines() if line.endswith("` |")] == [row(name) for name in tests]


def test_what_a_fact_names_is_there() -> None:
    for name, told in FACTS.items():
        for path in told.used_in:
            assert (ROOT / "dit_lens" / path).is_file(), (name, path)


def test_a_canary_says_which_fact_broke_who_needs_it_and_where_to_look() -> None:
    known = dict(FACTS)
    try:

        @fact("two is even", used_in="noise.py schedule.py", look_at="arithmetic")
        def test_of_two() -> None:
            raise KeyError("three")

    finally:
        FACTS.clear()
        FACTS.update(known)
    with pytest.raises(AssertionError) as raised:
        test_of_two()
    said = str(raised.value)
    assert "no longer true: two is even" in said
    assert "dit_lens/noise.py, dit_lens/schedule.py" in said
    assert re.search(r"nnsight \d+\.\d+.*, diffusers \d+\.\d+.*, torch \d+\.\d+", said)
    assert re.search(r"look at: +arithmetic\n +what came: +KeyError: 'three'", said)


def test_the_canaries_import_nothing_of_dit_lens() -> None:
    for name in ("canaries.py", "test_canary.py", "test_canary_diffusers.py"):
        assert not re.search(r"^\s*(from|import) (dit_lens|conftest)", (ROOT / "tests" / name).read_text("utf-8"), flags=re.M), (
            name
        )


def test_the_scheduled_job_calls_make_and_is_given_nothing() -> None:
    text = (ROOT / ".github" / "workflows" / "canary.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)
    assert len(job[True]["schedule"]) == 1  # YAML 1.1 reads `on` as a truth value
    assert len(job[True]["schedule"][0]["cron"].split()) == 5
    assert job["permissions"] == {"contents": "read"}
    assert "secrets" not in text
    steps = job["jobs"]["canary"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make canary"]
    assert re.search(r"^canary:", MAKEFILE, flags=re.M)


def test_make_canary_runs_what_there_is_on_the_newest_of_what_is_bounded() -> None:
    bounded = re.findall(r'^    "(\w+)>=[\d.]+,<', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    newest = re.search(r"^LATEST := (.*)$", MAKEFILE, flags=re.M)
    assert newest is not None
    assert {*bounded, "transformers", "accelerate", "torch"} == set(newest[1].split())
    engine = re.search(r"^ENGINE := \$\(addprefix tests/test_,(.*?)\)$", MAKEFILE, flags=re.M | re.S)
    assert engine is not None
    for name in engine[1].replace("\\", " ").split():
        assert (ROOT / "tests" / f"test_{name}").is_file(), name
