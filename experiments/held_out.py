"""Held-out accuracy of the bundled reasoner: `python -m experiments.held_out` writes `held_out.json` beside the weights.

For every task: the share of held-out samples that the model solves at its default settings, over several seeds, with an
interval over samples; the same for the untrained model; how many of the samples are distinct puzzles up to symmetry; and, for
samples with several legal answers, how often each of them is drawn over many seeds, as a share of its fair share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from tqdm.auto import tqdm

import dit_lens as dl
from dit_lens import provenance, reasoner
from dit_lens.files import write_text
from dit_lens.reasoner import models
from dit_lens.statistics import in_words, mean_interval, summarise


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    model: str = "reasoner"
    out: Path = reasoner.folder() / "held_out.json"
    samples: int = 200
    seeds: int = 3
    untrained_samples: int = 50
    """Samples a task for the untrained model, one seed each."""
    answered: int = 24
    """Samples with several legal answers, a task, for the shares of the answers."""
    answer_seeds: int = 32
    batch: int = 8
    """Rows per pipeline call."""


def judged(lens: dl.Lens, samples: Sequence[Any], seeds: Sequence[int], batch: int, title: str) -> pd.DataFrame:
    """A row per sample and seed: what the model's video did."""
    rows = []
    together = max(1, batch // len(seeds))
    for first in tqdm(range(0, len(samples), together), desc=title, unit="call"):
        group = samples[first : first + together]
        video = lens.run(**reasoner.inputs(group), seed=list(seeds)).video
        assert video is not None  # it is, unless decode=False
        repeated = [s for s in group for _ in seeds]
        for row, (sample, score) in enumerate(zip(repeated, samples[0].task.scores(video.numpy(), repeated), strict=True)):
            rows.append({"sample": sample.index, "seed": seeds[row % len(seeds)], **asdict(score)})
    return pd.DataFrame(rows)


def with_several(task: Any, count: int) -> list[Any]:
    """The first held-out samples that have several legal answers; none for a task that has no such samples."""
    found, index = [], 0
    while len(found) < count and index < 20 * count:
        sample = task.sample("test", index)
        found += [sample] if len(sample.answers) > 1 else []
        index += 1
    return found


def answer_shares(lens: dl.Lens, task: Any, settings: Settings) -> dict[str, Any] | None:
    """How often each legal answer is drawn, over its fair share (1 / the number of legal answers) of all seeds."""
    samples = with_several(task, settings.answered)
    if not samples:
        return None
    found = judged(lens, samples, range(settings.answer_seeds), settings.batch, f"{task.name}, answers")
    shares = []
    for sample in samples:
        drawn = Counter(found.loc[(found["sample"] == sample.index) & found["right"], "which"])
        shares += [drawn[i] / settings.answer_seeds * len(sample.answers) for i in range(len(sample.answers))]
    return {
        "samples": len(samples),
        "seeds": settings.answer_seeds,
        "answers": len(shares),
        "never_drawn": int(np.sum(np.array(shares) == 0)),
        "below_a_third": int(np.sum(np.array(shares) < 1 / 3)),
        "lowest": min(shares),
        "quantiles": dict(zip(("5 %", "25 %", "50 %"), np.quantile(shares, (0.05, 0.25, 0.5)).round(3).tolist(), strict=True)),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Everything that `held_out.json` holds."""
    lens = dl.load(settings.model, engine="hooks")
    untrained = dl.wrap(models.untrained().to(lens.pipe.device), engine="hooks")
    results: dict[str, Any] = {}
    for name in reasoner.tasks():
        task = reasoner.task(name)
        samples = [task.sample("test", i) for i in range(settings.samples)]
        found = judged(lens, samples, range(settings.seeds), settings.batch, name)
        control = judged(untrained, samples[: settings.untrained_samples], [0], settings.batch, f"{name}, untrained")
        result = {
            "right": asdict(mean_interval(found["right"], found["sample"])),
            "by_seed": found.groupby("seed")["right"].mean().to_dict(),
            "untrained": asdict(mean_interval(control["right"], control["sample"])),
            "distinct": len({task.canonical(s.puzzle) for s in samples}) / len(samples),
            "wrong": Counter(found.loc[~found["right"], "reason"]),
            "answers": answer_shares(lens, task, settings),
        }
        if name.startswith("maze"):
            found["rooms"] = found["sample"].map({s.index: s.puzzle.rooms for s in samples})
            found["size"] = np.where(found["rooms"] <= 5, "up to 5x5", "6x6 and 7x7")
            result["by_size"] = summarise(found, "right", ["size"]).set_index("size").to_dict("index")
        results[name] = result
        tqdm.write(f"{name}: {in_words(summarise(found.assign(task=name), 'right', ['task']), 3)}")
    return {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("out", "model")},
        "call": {k: v for k, v in samples[0].inputs.items() if k not in ("image", "prompt")},
        "model": provenance.model_facts(lens)["hash"],
        "versions": provenance.versions(),
        "device": provenance.device_facts(lens),
        "tasks": results,
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    write_text(settings.out, json.dumps(measure(settings), indent=1) + "\n")


if __name__ == "__main__":
    main()
