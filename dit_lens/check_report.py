"""What checks found: each passed, failed, or could not be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Finding = tuple[bool | None, str]
"""Whether a check passed, None where it could not be made, and what was found."""


@dataclass(frozen=True)
class Check:
    """A check, whether it passed, and what was found; `passed` is None where it could not be made, and `found` says why."""

    name: str
    passed: bool | None
    found: str

    @property
    def word(self) -> str:
        """The result in a word."""
        return {True: "pass", False: "FAIL", None: "none"}[self.passed]


@dataclass(frozen=True)
class CheckReport:
    """The checks of one model, in the order in which they were made; print it to see a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether none failed, and at least one could be made."""
        return not self.failed and any(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def summary(self) -> str:
        """How many passed of those that could be made."""
        made = [check for check in self.checks if check.passed is not None]
        unmade = len(self.checks) - len(made)
        more = f", and {unmade} could not be made" if unmade else ""
        return f"{len(made) - len(self.failed)} of {len(made)} checks passed{more}"

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{check.word}  {check.name:<{width}}  {check.found}" for check in self.checks]
        return "\n".join([*lines, self.summary])


def asked(questions: Mapping[str, Callable[[], Finding]]) -> list[Check]:
    """The answers to questions by their names; one that raises has not passed."""
    found = []
    for name, ask in questions.items():
        try:
            passed, what = ask()
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else ""
            passed, what = False, f"{type(error).__name__}: {first}"
        found.append(Check(name, passed, what))
    return found
