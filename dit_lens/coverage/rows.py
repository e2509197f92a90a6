"""Rows of the table: what comes of one class."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers.models import transformers
from torch import nn

from dit_lens.architectures.arguments import Undecided
from dit_lens.architectures.finding import find_in
from dit_lens.check_report import CheckReport
from dit_lens.conformance import Conformance
from dit_lens.coverage.truth import compared
from dit_lens.one_call import OneCall
from dit_lens.small_denoisers import DENOISERS, NO_DIT

NOTHING = CheckReport(())


@dataclass(frozen=True)
class Row:
    """What came of one class.

    Attributes:
        name: of the class. verdict: `covered`; `failed`, where a check does; `refused`; `no DiT`; `not looked at`.
        equal: whether every site was read on both engines, with the same bits and none of the output changed.
        blocks: lists of blocks with their streams, in words. sites: that are offered.
        report: of the checks. missed, wrong: see `truth.Compared`. why: it is refused, or no DiT.
    """

    name: str
    verdict: str
    equal: bool = False
    blocks: str = ""
    sites: tuple[str, ...] = ()
    report: CheckReport = NOTHING
    missed: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    why: str = ""

    @property
    def silently_wrong(self) -> bool:
        """Whether what was found is not what is stated, or nobody looked."""
        return bool(self.wrong) or self.verdict == "not looked at"


def classes() -> list[str]:
    """The names of all transformer classes of the installed diffusers."""
    found = set()
    for module in pkgutil.iter_modules(transformers.__path__):
        for name, value in vars(importlib.import_module(f"{transformers.__name__}.{module.name}")).items():
            if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and value.__module__.endswith(module.name):
                found.add(name)
    return sorted(found)


def row(name: str) -> Row:
    """What comes of one class: it is built small, found by watching, checked, and held to the truth."""
    if name in NO_DIT:
        return Row(name, "no DiT", why=NO_DIT[name])
    if name not in DENOISERS:
        return Row(name, "not looked at", why="there is no small denoiser of this class")
    denoiser, arguments = DENOISERS[name].build()
    with _quietly():
        return _looked_at(name, denoiser, arguments)


def _looked_at(name: str, denoiser: nn.Module, arguments: Mapping[str, Any]) -> Row:
    try:
        architecture = find_in(denoiser, arguments)
    except Undecided as refusal:
        return Row(name, "refused", why=str(refusal).partition("; describe")[0].partition("; write")[0])
    conformance = Conformance(denoiser, architecture, arguments)
    report = CheckReport(tuple(conformance.checks()))
    once = conformance.once
    against = compared(DENOISERS[name], once)
    return Row(
        name,
        verdict="covered" if report.passed else "failed",
        equal=all(check.passed for check in report.checks[:2]),
        blocks=_words(once),
        sites=tuple(dict.fromkeys(site for _, site, _ in once.places)),
        report=report,
        missed=(*against.missed, *(f"{block.stack.path}: {name}" for block in once.blocks for name in block.stack.missed)),
        wrong=against.wrong,
    )


def _words(once: OneCall) -> str:
    """Lists of blocks in words: how many, and their streams; with + where they are one sequence."""
    kinds: dict[tuple[str, str], int] = {}
    for block in once.blocks:
        kind = (block.stack.path, (" + " if block.stack.joined else ", ").join(block.stack.streams))
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} `{path}`: {streams}" for (path, streams), count in kinds.items())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of diffusers and torch about what a small denoiser on a CPU is not meant for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
