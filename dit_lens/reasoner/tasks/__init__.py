"""The tasks of the bundled reasoner, by name."""

from __future__ import annotations

from dit_lens.errors import InputError
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Split, Task
from dit_lens.reasoner.tasks.bounce import BounceTask
from dit_lens.reasoner.tasks.circle import CircleTask
from dit_lens.reasoner.tasks.maze import MazeLoopsTask, MazeTask
from dit_lens.reasoner.tasks.pattern import PatternTask
from dit_lens.reasoner.tasks.permanence import PermanenceTask
from dit_lens.reasoner.tasks.tictactoe import TicTacToeTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (MazeTask(), MazeLoopsTask(), CircleTask(), TicTacToeTask(), PermanenceTask(), PatternTask(), BounceTask())
}


def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(TASKS)


def task(name: str) -> Task:
    """The task with a name.

    Raises:
        InputError: there is no such task.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; there are {', '.join(TASKS)}, or write a folder in VBVR-Bench layout")
    return TASKS[name]


__all__ = ["TASKS", "Answer", "Sample", "Score", "Split", "Task", "task", "tasks"]
