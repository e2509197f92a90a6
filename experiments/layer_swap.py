"""Layer swap: does one block hold the answer? (paper 2603.16870, section 5.2, Fig. 6b)

Two samples differ in a single thing that decides the answer: which object the prompt names (`circle`), who moves
(`tictactoe`), where the goal is (`maze`). While the clean sample runs, the visual tokens of one block become those that the
donor has there, with the same seed. The outcome is whose answer the video then shows: the donor's (*flipped*), its own
(*kept*), or nobody's (*destroyed*); the answer counts, not whether the rest of the board is tidy (a goal that is drawn where the
first frame has it does not hide where the route leads). Beside the final video stands the x0-hat of the swapped step and
branch, which no later step has repaired.

"Replacing the representation of a block" has two readings. *Whole stream*: all that the donor has after the block takes the
place of what is there, and later blocks go on from it. *Update*: only what the block adds to the stream is the donor's.

All tokens, the `cond` branch and one step are swapped unless said otherwise. Variants: answer tokens only (where the first
frames differ, or where answers of one sample paint and those of the other do not; in all latent frames), object tokens only
(these, and the objects that either prompt names, or all marks of a game), every guidance branch (the unconditional one sees a
difference in mazes only), and every step and branch. Controls: as many other tokens as the objects have, the donor of another
pair, the clean sample with another seed, and the pair's donor with its tokens shuffled (one permutation for all).

Clean samples are held out. A donor is held out where a counterpart of its clean sample is, and a puzzle of the training split
otherwise; results and captions say how many are. Pairs whose clean samples are one puzzle up to symmetry (there are few held-out
positions of tic-tac-toe in which either player can win) are no samples of their own: intervals are over puzzles.

Thinned in the full preset: the curve at the first step has all blocks and 100 pairs of every task; variants, controls and later
steps have some depths, and one pair of each puzzle, up to 50 of every task, in batches of all tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import reasoner
from dit_lens.experiment import CLOCK_COLUMNS, Context, Experiment, Part
from dit_lens.pairs import batches
from dit_lens.selection import at
from experiments import layer_swap_figures as figures
from experiments.layer_swap_claims import CLAIMS
from experiments.swapping import ALL_STEPS, FINAL, READINGS, SHUFFLED, SWAP, VARIANTS, X0_HAT, Bench


@dataclass(frozen=True)
class Settings:
    """``pairs`` of each task at the first step, at the blocks at ``depths`` (block / number of blocks, 1 is the last; all blocks
    where there are none); up to ``mapped`` of each, of different puzzles, for the ``variants`` at ``variant_depths``, and for the
    ``places`` of the schedule at ``map_depths``; ``batch`` is pairs per pipeline call."""

    tasks: tuple[str, ...] = ("circle", "maze")
    pairs: int = 1
    mapped: int = 1
    depths: tuple[float, ...] = (0, 0.5, 1)
    variants: tuple[str, ...] = (SHUFFLED,)
    variant_depths: tuple[float, ...] = (0.5,)
    places: tuple[float, ...] = (0,)
    map_depths: tuple[float, ...] = (0, 0.5, 1)
    batch: int = 8


def measure(context: Context, bench: Bench, variant: str, step: int, depths: Sequence[float], pictured: bool = False) -> Part:
    """One variant at one step: a row per pair, reading, block and readout. The ``pictured`` last frames are those of the first
    pair: uint8 (reading, readout, block, H, W, 3), and the two runs that it is made of, (H, W, 3)."""
    tables, pictures = [], []
    cells = at(block=bench.blocks(depths), step=step, branch="cond").cells(bench.extent)
    for cell in cells:
        given = bench.given(variant, step, cell.block)
        for site, reading in READINGS.items():
            run = bench.swapped(variant, step, cell.block, site, given)
            # Where every step is swapped, the last x0-hat is the final video.
            seen: dict[str, Any] = {FINAL: run.video} | (
                {X0_HAT: context.lens.decode(run.x0_hat(step, "cond"))} if variant != ALL_STEPS else {}
            )
            clock = {name: getattr(cell, name) for name in (*CLOCK_COLUMNS, "block", "depth")}
            here = {**clock, "band": bench.band(cell.block), "variant": variant, "reading": reading}
            here |= {"tokens": bench.share(variant)}
            tables += [bench.outcomes(video).assign(**here, readout=readout) for readout, video in seen.items()]
            pictures.append([figures.last_frame(video) for video in seen.values()])
    if not pictured:
        return Part(pd.concat(tables, ignore_index=True))
    swapped = np.stack(pictures).reshape(len(cells), len(READINGS), -1, *pictures[0][0].shape).transpose(1, 2, 0, 3, 4, 5)
    runs = {"clean": figures.last_frame(bench.clean.video), "donor": figures.last_frame(bench.donor.video)}
    return Part(pd.concat(tables, ignore_index=True), {"swapped": np.ascontiguousarray(swapped), **runs})


def run(context: Context) -> pd.DataFrame:
    settings = context.settings
    pairs = {name: reasoner.pairs(name, max(settings.pairs, settings.mapped)) for name in settings.tasks}
    jobs, pictured = {}, {}
    for name in settings.tasks:
        for call, chunk in enumerate(chunks(pairs[name][: settings.pairs], settings.batch)):
            bench = Bench(context, chunk)
            jobs[f"first-{name}-{call}"] = partial(measure, context, bench, SWAP, 0, settings.depths, call == 0)
            pictured |= {f"first-{name}-0": chunk[0]} if call == 0 else {}
    some = [pair for name in settings.tasks for pair in of_different_puzzles(pairs[name])[: settings.mapped]]
    later = [step for step in context.steps(context.inputs([some[0].clean])) if step] if some else []
    for call, chunk in enumerate(chunks(some, settings.batch)):
        bench = Bench(context, chunk)
        for variant in settings.variants:
            jobs[f"{variant.replace(' ', '-')}-{call}"] = partial(measure, context, bench, variant, 0, settings.variant_depths)
        for step in later:
            jobs[f"step-{step:03d}-{call}"] = partial(measure, context, bench, SWAP, step, settings.map_depths)
    parts = context.units("swaps", jobs)
    results = pd.concat([part.table for part in parts.values()], ignore_index=True)
    figures.first_step(context, results)
    figures.fates(context, results)
    figures.step_map(context, results)
    figures.numbers(context, results)
    for key, pair in pictured.items():
        figures.examples(context, pair, parts[key].arrays, parts[key].table)
    return results


def of_different_puzzles(pairs: Sequence[Any]) -> list[Any]:
    """The first pair of every puzzle up to symmetry."""
    first: dict[str, Any] = {}
    for pair in pairs:
        first.setdefault(pair.clean.group, pair)
    return list(first.values())


def chunks(pairs: Sequence[Any], batch: int) -> list[list[Any]]:
    """The pairs that run together."""
    return [[pairs[place] for place in part] for part in batches(len(pairs), batch)] if pairs else []


EXPERIMENT = Experiment(
    name="layer-swap",
    title="Layer swap",
    source="Fig. 6b and section 5.2 of arXiv 2603.16870",
    question="Does swapping one block's representation at the first step flip the answer, and is it that block alone?",
    presets={
        "quick": Settings(),
        "full": Settings(
            tasks=("circle", "maze", "tictactoe"),
            pairs=100,
            mapped=50,
            depths=(),
            variants=VARIANTS,
            variant_depths=(0.5, 1),
            places=(0, 0.1, 0.4),
            map_depths=(0, 0.5, 1),
            batch=150,
        ),
    },
    run=run,
    claims=CLAIMS,
    minutes=5,
)
