"""`python -m dit_lens.small_pipelines`: run every small pipeline with a lens on it, and write the page about it.

Writes `pipelines.md` into a folder.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm.auto import tqdm

from dit_lens.errors import InputError
from dit_lens.files import check_writable, write_text
from dit_lens.small_pipelines import PIPELINES
from dit_lens.small_pipelines.page import looked_at, page


@dataclass(frozen=True)
class Options:
    """Run every small pipeline with a lens on it, and write the page about it.

    Attributes:
        out: the folder.
    """

    out: Path = Path("docs")


def main(options: Options) -> int:
    """The exit code: 1 where the lens sees something else than is stated of a pipeline."""
    check_writable(options.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, about numpy and about float32 on a CPU
        rows = [looked_at(small) for small in tqdm(PIPELINES.values(), unit="pipeline")]
    write_text(options.out / "pipelines.md", page(rows))
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(main(tyro.cli(Options)))
    except InputError as error:
        sys.exit(f"dit_lens.small_pipelines: {error}")
