"""Side by side: as many at a time as were asked for, in an order that holds, and nothing new after a failure."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
import pytest

from dit_lens.cli import RunOptions, _longest_first, _parsed, _words
from dit_lens.experiment import Experiment
from dit_lens.side_by_side import Ended, Job, side_by_side

MEET = "import sys; open(sys.argv[1], sys.argv[2]).close()"
"""Opens a pipe, which waits for somebody at its other end."""
THERE = "import os, sys; sys.exit(not all(map(os.path.exists, sys.argv[2:])) or open(sys.argv[1], 'w').close())"
"""Makes a file if others are there already."""


def job(folder: Path, name: str, code: str, *words: str, after: tuple[str, ...] = ()) -> Job:
    return Job(name, (sys.executable, "-S", "-c", code, *words), folder / "logs" / f"{name}.txt", after)


def run(jobs: list[Job], count: int) -> tuple[list[str], list[Ended]]:
    """The names in the order in which they ended, and those that failed."""
    order: list[str] = []
    return order, side_by_side(jobs, count, lambda one: order.append(one.job.name))


def test_two_run_at_the_same_time(tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    order, failed = run([job(tmp_path, "reads", MEET, pipe, "r"), job(tmp_path, "writes", MEET, pipe, "w")], 2)
    assert set(order) == {"reads", "writes"}
    assert not failed


@pytest.mark.parametrize("count", [1, 3])
def test_what_comes_after_waits(tmp_path: Path, count: int) -> None:
    files = {name: str(tmp_path / name) for name in "abc"}
    jobs = [
        job(tmp_path, "c", THERE, files["c"], files["a"], files["b"], after=("a", "b", "not among them")),
        job(tmp_path, "b", THERE, files["b"], files["a"], after=("a",)),
        job(tmp_path, "a", THERE, files["a"]),
    ]
    order, failed = run(jobs, count)
    assert order == ["a", "b", "c"]
    assert not failed


def test_after_a_failure_nothing_starts_and_its_last_line_is_told(tmp_path: Path) -> None:
    wrong = job(tmp_path, "wrong", "import sys; print('fine'); print('no such puzzle', file=sys.stderr); sys.exit(2)")
    order, failed = run([wrong, job(tmp_path, "never", THERE, str(tmp_path / "never"))], 1)
    assert order == ["wrong"]
    assert [(one.code, one.last_line) for one in failed] == [(2, "no such puzzle")]
    assert not (tmp_path / "never").exists()
    assert wrong.log.read_text().splitlines()[-1] == "no such puzzle"


def test_jobs_that_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        run([job(tmp_path, "a", "", after=("b",)), job(tmp_path, "b", "", after=("a",))], 2)


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(),
        RunOptions(model="a folder", engine="hooks", tf32=False, height=32, guidance_scale=3.5, preset="full", out=Path("o u t")),
    ],
)
def test_options_survive_being_written_down(options: RunOptions) -> None:
    assert _parsed(RunOptions, _words(options), "run") == options


def test_the_longest_begins_first_and_before_it_what_it_waits_for() -> None:
    def experiment(name: str, minutes: float, *after: str) -> Experiment:
        return Experiment(name, name, "", "", {}, lambda _: pd.DataFrame(), after=after, minutes=minutes)

    short, long = experiment("short", 2), experiment("long", 6)
    first, second = experiment("first", 3), experiment("second", 4, "first")
    assert [one.name for one in _longest_first([short, second, long, first])] == ["first", "long", "second", "short"]
    assert [one.name for one in _longest_first([first, second])] == ["first", "second"]
    assert [one.name for one in _longest_first([short, first])] == ["first", "short"]
