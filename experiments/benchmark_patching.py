"""How much work a sweep saves: `python -m experiments.benchmark_patching` writes `figures/benchmarks/<machine>.json`.

The whole grid of blocks and steps is patched twice on the same machine, one after the other: by `dl.sweep`, and as one would
write it by hand, with a run for every cell, that goes to the end for the final video and stops after the edited step for what is
measured there. Both are timed, their block forwards counted by hooks, and their results compared. Attribution patching
is run on the same grid with every site of a block, and compared with real patches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import provenance, reasoner
from dit_lens.files import write_text
from dit_lens.pairs import PairRuns, run_pairs

Kind = Literal["video", "velocity", "x0_hat"]


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    machine: str
    """What the file is called."""
    out: Path = Path("figures/benchmarks")
    task: str = "circle"
    pairs: int = 32
    blocks: tuple[int, ...] = ()
    """All when left out."""
    steps: tuple[int, ...] = ()
    kinds: tuple[Kind, ...] = ("velocity", "x0_hat", "video")
    attribution: bool = True
    """Whether to measure attribution too."""
    attribution_steps: tuple[int, ...] = (0, 2, 5, 10, 15)
    checked: int = 70
    """Cells that attribution is compared at."""


def measures(kind: Kind) -> dl.Outcome:
    """A cheap outcome: the mean of what is measured, so that the time is that of making it."""

    def mean(shown: Tensor, pairs: Sequence[Any]) -> Tensor:
        return shown.flatten(1).mean(dim=1, dtype=torch.float64)

    return dl.Outcome(kind, mean, of=kind, decoded=kind == "x0_hat")


def towards_the_donor(lens: dl.Lens, pairs: Sequence[Any]) -> dl.Outcome:
    """How far x0-hat has gone from the clean answer's latents (0) to the donor's (1): linear, so it has a gradient."""
    ends = {id(pair): latents(lens, pair) for pair in pairs}

    def share(x0_hat: Tensor, rows: Sequence[Any]) -> Tensor:
        clean, donor = (torch.stack([ends[id(pair)][side] for pair in rows]).to(x0_hat) for side in (0, 1))
        way = donor - clean
        return ((x0_hat - clean) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1)

    return dl.Outcome("towards the donor's answer", share, of="x0_hat")


@torch.no_grad()
def latents(lens: dl.Lens, pair: Any) -> Tensor:
    """The latents of the true videos of a pair, scaled as the denoiser sees them: (2, channels, frames, height, width)."""
    vae = lens.pipe.vae
    videos = torch.stack([torch.from_numpy(sample.video()) for sample in pair]).permute(0, 4, 1, 2, 3)
    encoded = vae.encode(2 * videos.to(vae.device, vae.dtype) - 1).latent_dist.mode().cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (encoded - mean) / std


@contextmanager
def counted(lens: dl.Lens) -> Iterator[Callable[[], tuple[int, float]]]:
    """Block forwards and seconds since the beginning of the context."""
    count, begun = [0], time.perf_counter()
    denoisers = lens.architecture.denoisers(lens.pipe)
    blocks = [block for denoiser in denoisers.values() for block in lens.architecture.block_list(denoiser)]
    # The attention runs when the block does, and not when it is bypassed.
    attentions = [block.get_submodule("attn1") for block in blocks]
    hooks = [attention.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1)) for attention in attentions]
    try:
        yield lambda: (count[0], time.perf_counter() - begun)
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(lens: dl.Lens, kind: Kind, runs: PairRuns, over: dl.Selector, inputs: dict[str, Any]) -> list[Tensor]:
    """One run for every cell; the outcome of each."""
    found = []
    outcome = measures(kind)
    for cell in tqdm(over.cells(lens.extent(**inputs)), desc=f"{kind}, by hand"):
        at = dl.at(block=cell.block, step=cell.step, branch=cell.branch)
        patch = dl.Patch(at, runs.donor)
        if kind == "video":
            shown = lens.run(**inputs, seed=0, edits=[patch]).video
        else:
            run = lens.run(**inputs, seed=0, edits=[patch], until=cell.step, decode=False)
            velocity = run.velocity(cell.step, cell.branch)
            shown = velocity if kind == "velocity" else lens.decode(run.x0_hat(cell.step, cell.branch))
        assert shown is not None  # the video is there, as it was decoded
        found.append(torch.as_tensor(outcome(shown, runs.pairs)))
    return found


def compared(lens: dl.Lens, kind: Kind, pairs: Sequence[Any], settings: Settings) -> dict[str, Any]:
    """Both ways, timed and counted."""
    over = dl.at(block=list(settings.blocks) or "all", step=list(settings.steps) or "all", branch="cond")
    with counted(lens) as spent:
        sweep = dl.sweep(
            lens, pairs, lambda cell, pair: dl.Patch(cell, pair.donor), over, measures(kind), batch=len(pairs), progress=False
        )
        reused = spent()
    inputs = reasoner.inputs([pair.clean for pair in pairs])
    with counted(lens) as spent:
        runs = run_pairs(lens, pairs, list(range(len(pairs))), [0], record=over, decode=kind == "video", limit_bytes=10**11)
        results = by_hand(lens, kind, runs, over, inputs)
        naive = spent()
    # Both go through the steps first and the blocks of each, so the rows agree.
    table = torch.tensor(sweep.table["value"].to_numpy()).view(len(results), -1)
    return {
        "cells": len(results),
        "rows": len(pairs),
        "block_forwards": {"by_hand": naive[0], "sweep": reused[0], "ratio": naive[0] / reused[0]},
        "seconds": {"by_hand": naive[1], "sweep": reused[1], "ratio": naive[1] / reused[1]},
        "foreseen_ratio": sweep.cost.without_reuse / sweep.cost.block_forwards if sweep.cost else None,
        "largest_difference": float((table - torch.stack(results)).abs().max()),
    }


def attributed(lens: dl.Lens, pairs: Sequence[Any], settings: Settings) -> dict[str, Any]:
    """Attribution of every block and site at some steps."""
    sites = ["resid", "update", "attn", "cross_attn", "mlp"]
    over = dl.at(block=list(settings.blocks) or "all", step=list(settings.attribution_steps), branch="cond", site=sites)
    begun = time.perf_counter()
    found = dl.attribute(
        lens, pairs, over, towards_the_donor(lens, pairs), batch=len(pairs), check=settings.checked, progress=False
    )
    return {
        "text": str(found),
        "spearman": asdict(found.spearman),
        "sign": asdict(found.sign),
        "top": asdict(found.top),
        "by_site": found.agreement("site").to_dict("records"),
        "calls": {"attribution": found.calls, "patching": found.calls_patching, "ratio": found.calls_patching / found.calls},
        "seconds_with_the_check": time.perf_counter() - begun,
        "sites": sites,
        "steps": list(settings.attribution_steps),
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    lens = dl.load("reasoner", engine="hooks")
    pairs = reasoner.pairs(settings.task, settings.pairs)
    # The first calls of a process take longer, on either side.
    small = replace(settings, blocks=(0, 1), steps=(0, 1))
    for kind in settings.kinds:
        compared(lens, kind, pairs, small)
    path = settings.out / f"{settings.machine}.json"
    facts = {
        "model": provenance.model_facts(lens)["hash"],
        "versions": provenance.versions(),
        "device": provenance.device_facts(lens),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("out", "kinds", "attribution")},
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attribution": lambda: attributed(lens, pairs, settings),
        **{kind: lambda kind=kind: compared(lens, kind, pairs, settings) for kind in settings.kinds},
    }
    for name in parts if settings.attribution else settings.kinds:
        found = parts[name]()
        print(name, json.dumps(found, indent=1), flush=True)
        # What was measured before stays, where it is of the same model, machine and settings.
        results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        before = results.get("patching", {})
        written = json.loads(json.dumps(facts, default=str))
        same = all(before.get(key) == value for key, value in written.items())
        results["patching"] = {**(before if same else written), name: found}
        settings.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
