"""The one error for input that cannot be used.

Every message is one line that says what was wrong, what was there instead, and what to write. The command line
prints it and exits with code 2; in Python it is an ordinary `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Raised for input that cannot be used: a name, a range, a folder, a selection that matches nothing."""


def listed(names: Iterable[object]) -> str:
    """The names as a message shows them: `cond, uncond`, or `nothing` when there is none."""
    return ", ".join(str(name) for name in names) or "nothing"
