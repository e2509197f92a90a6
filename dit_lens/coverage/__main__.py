"""`python -m dit_lens.coverage`: make the table of all transformer classes of the installed diffusers."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import diffusers
import torch
import tyro
from tqdm.auto import tqdm

from dit_lens.coverage.page import line, page
from dit_lens.coverage.rows import classes, row
from dit_lens.errors import InputError
from dit_lens.files import check_writable, write_text


@dataclass(frozen=True)
class Options:
    """Find and check every transformer class of the installed diffusers, and write the page with the table.

    Attributes:
        out: the folder that `coverage.md` goes to. processes: how many run at a time.
    """

    out: Path = Path("docs")
    processes: int = 2


def main(options: Options) -> int:
    """The exit code: 1 where something was found that is not so."""
    check_writable(options.out)
    begun, names = time.monotonic(), classes()
    with ProcessPoolExecutor(options.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = list(tqdm(pool.map(row, names), total=len(names), unit="class"))
    write_text(options.out / "coverage.md", page(rows, diffusers.__version__))
    for one in rows:
        if one.silently_wrong or one.verdict == "failed":
            print(line(one), file=sys.stderr)
    print(f"{len(rows)} classes in {time.monotonic() - begun:.0f} s: {options.out / 'coverage.md'}")
    return int(any(one.silently_wrong for one in rows))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(main(tyro.cli(Options)))
    except InputError as error:
        sys.exit(f"dit_lens.coverage: {error}")
