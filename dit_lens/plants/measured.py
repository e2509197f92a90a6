"""What the tools found on many planted models, and the file that keeps it.

found = measured("copy", seed=3)           # all tools of the table on one model
found.misses("resid")                      # {}: where a tool does not report what the table says
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dit_lens.errors import InputError
from dit_lens.files import write_text
from dit_lens.plants.build import KINDS, planted
from dit_lens.plants.model import GUIDANCE, schedule
from dit_lens.plants.readings import misses, says
from dit_lens.plants.stream import HEADS
from dit_lens.plants.table import TABLE, Place, Truth, Verdict
from dit_lens.plants.tools import measure_all, share_of_nothing

DIGITS = 4
"""How many digits of an effect are kept: the last bits are not the same on every machine."""
SEEDS = 6
PLAIN = 20
"""How many models of each kind, and how many without a plant."""


@dataclass(frozen=True)
class Measured:
    """What the tools found on one model.

    Attributes:
        truth: what was planted. seed, blocks: of the model. sigmas: of its steps, then 0.
        found: by tool, the effect at every place, in the order of `Entry.expected`.
        share: without a plant, the largest effect of `resid` in the unit of `dl.sweep`, the share of the way from clean to
            donor; None where these are the same bits.
    """

    truth: Truth
    seed: int
    blocks: int
    sigmas: tuple[float, ...]
    found: Mapping[str, tuple[float, ...]]
    share: float | None = None

    @property
    def name(self) -> str:
        """The model in messages."""
        return f"{self.truth.kind}, seed {self.seed}"

    def expected(self, tool: str) -> dict[Place, float]:
        """What the table says."""
        return TABLE[self.truth.kind][tool].expected(self.truth, self.blocks, HEADS, self.sigmas, GUIDANCE)

    def effects(self, tool: str) -> dict[Place, float]:
        """What was found, by place."""
        return dict(zip(self.expected(tool), self.found[tool], strict=True))

    def misses(self, tool: str) -> dict[Place, float]:
        """Where what was found is not what the table says, and by how much."""
        return misses(tool, self.expected(tool), self.effects(tool))

    def says(self, tool: str) -> Verdict:
        """What the tool says, in a word."""
        return says(tool, self.truth, self.effects(tool))


def measured(kind: str, seed: int, tools: Sequence[str] | None = None) -> Measured:
    """Run all tools on one model; every third is larger, with five blocks and steps in place of four and three."""
    large = seed % 3 == 0
    model = planted(kind, seed=seed, blocks=5 if large else 4, steps=5 if large else 3)
    effects = measure_all(model) if tools is None else measure_all(model, tools)
    for tool, found in effects.items():
        if list(found) != list(model.expected(tool)):
            raise InputError(f"{tool} found something at {list(found)}, and the table has {list(model.expected(tool))}")
    rounded = {tool: tuple(round(size, DIGITS) for size in found.values()) for tool, found in effects.items()}
    sigmas = tuple(round(sigma, 6) for sigma in schedule(model.pipe, model.steps)[1])
    share = share_of_nothing(model) if kind == "none" else None
    return Measured(model.truth, seed, model.blocks, sigmas, rounded, None if share is None else round(share, DIGITS))


def every_model(seeds: int = SEEDS, plain: int = PLAIN) -> list[tuple[str, int]]:
    """Kind and seed of the models that the docs are about."""
    return [(kind, seed) for kind in KINDS for seed in range(seeds)] + [("none", seed) for seed in range(plain)]


def write(path: Path, models: Iterable[Measured]) -> None:
    """Keep what was found, one model a line."""
    lines = [json.dumps(asdict(model), separators=(",", ":")) for model in models]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read(path: Path) -> list[Measured]:
    """What `write` wrote."""
    return [
        Measured(
            truth=Truth(**{**model["truth"], "branches": tuple(model["truth"]["branches"])}),
            sigmas=tuple(model["sigmas"]),
            found={tool: tuple(sizes) for tool, sizes in model["found"].items()},
            **{name: model[name] for name in ("seed", "blocks", "share")},
        )
        for model in json.loads(path.read_text(encoding="utf-8"))
    ]
