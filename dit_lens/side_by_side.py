"""Commands side by side, each a process of its own: while one waits for the processor, another uses the accelerator.

A call of the bundled reasoner's denoiser with 100 rows keeps an H100 busy for 18 of the 30 ms that it takes, and scoring and
drawing leave it idle; two or three experiments at a time fill it. What they write does not depend on it: each has a folder of
its own, and the runs that they share are kept in stores that several processes can write to.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: of the job. command: its words. log: the file that gets all that it prints.
        after: names of jobs that must have ended before it starts, where they are among those that run.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A job that ended: its exit code, and the last line that it printed."""

    job: Job
    code: int
    last_line: str


def side_by_side(jobs: Sequence[Job], count: int, ended: Callable[[Ended], None]) -> list[Ended]:
    """Run jobs, at most so many at a time, and in their order where nothing speaks against it.

    After the first that fails no other is started, and those under way go on to their end.

    Args:
        ended: is told of each as it ends.

    Returns:
        Those that failed.
    """
    waiting, failed = list(jobs), []
    running: dict[Future[Ended], Job] = {}
    with ThreadPoolExecutor(count) as pool:
        while running or (waiting and not failed):
            unfinished = {job.name for job in (*waiting, *running.values())}
            ready = [job for job in waiting if not unfinished & set(job.after)] if not failed else []
            for job in ready[: count - len(running)]:
                waiting.remove(job)
                running[pool.submit(_run, job, count)] = job
            if not running:
                raise ValueError(f"jobs that wait for each other: {', '.join(job.name for job in waiting)}")
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                result = future.result()
                failed += [result] if result.code else []
                ended(result)
    return failed


def _run(job: Job, count: int) -> Ended:
    """Run one job to its end."""
    # Every process would take all cores for itself, and they would wait for each other.
    cores = max(1, (os.cpu_count() or 1) // count)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as log:
        code = subprocess.run(
            job.command, stdout=log, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": str(cores), **os.environ}, check=False
        ).returncode
    said = job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip()
    return Ended(job, code, said.split("\n")[-1])
