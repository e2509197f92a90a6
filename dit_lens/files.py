"""Writing files so that a reader finds the old content or the new one, never half of either.

Every write goes to a hidden file in the same folder and is then renamed over the target, which the operating system does in
one stroke. What the operating system refuses (a read-only folder, a full disk) becomes one `InputError` that names the
folder, and the hidden file is gone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_lens.errors import InputError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, making its folder where that is missing. InputError where it cannot."""
    with _refusals(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            hidden.write_bytes(data)
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8."""
    write_bytes(path, text.encode())


def check_writable(folder: Path) -> None:
    """InputError unless files can be made in ``folder``, or in the nearest folder above it that exists.

    Makes nothing that stays: it is asked before long work begins, and a refusal must leave no trace.
    """
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    with _refusals(folder):
        if not nearest.is_dir():
            raise NotADirectoryError(0, f"{nearest} is a file")
        trial = nearest / f".dit_lens.{os.getpid()}.partial"
        try:
            trial.write_bytes(b"can this be written?")
        finally:
            trial.unlink(missing_ok=True)


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one line for the person who named the folder."""
    try:
        yield
    except OSError as refusal:
        reason = refusal.strerror or str(refusal)
        raise InputError(f"cannot write in {folder}: {reason}; name another folder, as in --out DIR") from refusal
