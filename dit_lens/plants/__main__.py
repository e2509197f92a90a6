"""`python -m dit_lens.plants`: run every tool of the table on planted models, and write the page about it.

Writes `tools.json`, what was found, and `tools.md`, the page, into a folder.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

from dit_lens.errors import InputError
from dit_lens.files import check_writable, write_text
from dit_lens.plants.measured import PLAIN, SEEDS, every_model, measured, read, write
from dit_lens.plants.page import page


@dataclass(frozen=True)
class Options:
    """Run every tool of the table on planted models, and write the page about it.

    Attributes:
        out: the folder. seeds: models of each kind. plain: models without a plant. processes: how many run at a time.
        keep: write the page from the numbers that are there, and run nothing.
    """

    out: Path = Path("docs")
    seeds: int = SEEDS
    plain: int = PLAIN
    processes: int = 1
    keep: bool = False


def main(options: Options) -> int:
    """The exit code: 1 where a tool does not report what the table says."""
    check_writable(options.out)
    numbers = options.out / "tools.json"
    if not options.keep:
        models = every_model(options.seeds, options.plain)
        with ProcessPoolExecutor(options.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            found = list(tqdm(pool.map(measured, *zip(*models, strict=True)), total=len(models), unit="model"))
        write(numbers, found)
    found = read(numbers)
    write_text(options.out / "tools.md", page(found))
    return int(any(model.misses(tool) for model in found for tool in model.found))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(main(tyro.cli(Options)))
    except InputError as error:
        sys.exit(f"dit_lens.plants: {error}")
