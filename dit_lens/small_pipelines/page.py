"""The page of the docs that says what the lens sees of every small pipeline, written from what it saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_lens.errors import InputError
from dit_lens.lens import Lens, wrap
from dit_lens.run import Run
from dit_lens.selection import at
from dit_lens.small_pipelines.record import SmallPipeline

EVERYTHING = at(site="all", stream="all")

WORDS = """Every pipeline here is one of diffusers' own classes with random weights (`dit_lens.small_pipelines`), run for three
steps. *Works* means: every site of every block is recorded on both engines under its expert, step, branch, block, stream and
place; the run has the bits of the pipeline alone; its trajectory is what the scheduler received; edits act where they are to
and nowhere else; timesteps, noise levels and x0-hat are right with every scheduler that is named. *Refused* means that the run
ends in an error of one line, which is given. Every row is held by a test (`tests/test_lens_on_pipelines.py`), in which the
denoiser stamps its tokens and hooks that know nothing of the lens see the rest."""


@dataclass(frozen=True)
class Row:
    """What the lens sees of one pipeline, and whether that is what is stated of it."""

    small: SmallPipeline
    pipeline: str
    denoiser: str
    guidance: str = ""
    experts: str = ""
    layout: str = ""
    streams: str = ""
    sites: str = ""
    verdict: str = ""


def inputs_of(small: SmallPipeline) -> dict[str, Any]:
    """The arguments of a run by a lens, which decides itself what comes out."""
    return {name: value for name, value in small.inputs.items() if name != "output_type"}


def looked_at(small: SmallPipeline) -> Row:
    """A pipeline with everything recorded."""
    lens = wrap(small.build(), engine="hooks")
    try:
        run = lens.run(**inputs_of(small), decode=False, record=EVERYTHING)
    except InputError as error:
        return refused(small, lens, error)
    return seen(small, lens, run)


def seen(small: SmallPipeline, lens: Lens, run: Run) -> Row:
    """The row of a pipeline that was run with everything recorded."""
    forecast = lens.forecast(**inputs_of(small))
    plain = lens.plain(**small.inputs, return_dict=False)[0]
    # The pipeline of DiT returns pictures, whatever it is asked for.
    same = small.name == "dit" or torch.equal(run.latents[-1], torch.as_tensor(plain))
    experts = tuple(dict.fromkeys(run.experts))
    stated = (run.branches, experts, run.layout.shape, run.sign) == (small.branches, small.experts, small.layout, small.sign)
    calls = "one call" if forecast.batched or len(run.branches) == 1 else "a call each"
    return Row(
        small,
        *_classes(small, lens),
        guidance=f"{', '.join(run.branches)}: {calls}",
        experts=", ".join(experts),
        layout=" x ".join(map(str, run.layout.shape)),
        streams=", ".join(lens.architecture.streams),
        sites=", ".join(dict.fromkeys(site.name for site in lens.architecture.sites)),
        verdict="works" if same and stated else "wrong",
    )


def refused(small: SmallPipeline, lens: Lens, error: InputError) -> Row:
    """The row of a pipeline whose run is refused."""
    return Row(small, *_classes(small, lens), verdict=f"refused: {error}")


def page(rows: Sequence[Row]) -> str:
    """The whole page, as Markdown."""
    works = [row for row in rows if not row.verdict.startswith("refused")]
    others = [row for row in rows if row.verdict.startswith("refused")]
    head = ["name", "pipeline", "denoiser", "guidance", "experts", "layout", "streams", "schedulers", "verdict"]
    table = (
        [
            f"`{row.small.name}`", row.pipeline, row.denoiser, row.guidance, row.experts, row.layout, row.streams,
            _schedulers(row), row.verdict,
        ]
        for row in works
    )  # fmt: skip
    count = sum(row.verdict == "works" for row in rows)
    parts = [
        "# Pipelines",
        "<!-- Written by `python -m dit_lens.small_pipelines`. Run it again; do not change this page. -->",
        " ".join(WORDS.split("\n")),
        f"Of {len(rows)} pipelines {count} work and {len(others)} are refused. The layout is that of this small run, in latent"
        " frames, rows and columns of tokens.",
        "## What works",
        _table(head, table),
        "## Sites",
        _table(["name", "sites"], ([f"`{row.small.name}`", row.sites] for row in works)),
        "## What is refused",
        _table(
            ["name", "pipeline", "denoiser", "verdict"],
            ([f"`{row.small.name}`", row.pipeline, row.denoiser, row.verdict] for row in others),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _classes(small: SmallPipeline, lens: Lens) -> tuple[str, str]:
    """The class of a pipeline, and of its denoiser."""
    return type(lens.pipe).__name__, type(getattr(lens.pipe, small.experts[0])).__name__


def _schedulers(row: Row) -> str:
    return ", ".join(name.removesuffix("Scheduler") for name in row.small.schedulers)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
