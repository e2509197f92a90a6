"""The checks of a denoiser pass on a true record with true engines, and each fails on one that is wrong in its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from dit_lens.architectures import WAN, Architecture, Patches, Stack
from dit_lens.architectures.finding import find_in
from dit_lens.check_report import Check, CheckReport, asked
from dit_lens.conformance import Conformance
from dit_lens.hooks import HookEngine
from dit_lens.sites import Gate, Site
from dit_lens.small_denoisers import denoiser
from dit_lens.taps import Attention, Bypass, Engine, Tap

WAN_CLASS, DUAL, JOINED = "WanTransformer3DModel", "CogVideoXTransformer3DModel", "AuraFlowTransformer2DModel"
NAMES = {
    "untouched": "recording every site leaves the output as it is",
    "engines": "both engines show the same at every site",
    "order": "blocks run once, in their order",
    "shown": "what is shown is what plain hooks see",
    "kinds": "attention mixes tokens, an MLP does not",
    "complete": "attention and MLPs all have their sites",
    "made of": "every stream is made of what it is named for",
    "layout": "a mark in the latents reaches the token that the layout says",
    "handed on": "what a block returns is what the next one takes",
    "updates": "the update is what the block added to its stream",
    "contributions": "contributions add up to the update",
    "edits": "an edit at every site counts, and is the same on both engines",
    "skips": "a skipped block hands on its streams",
    "heads": "heads add up to the attention's output",
    "inside": "q and v make what the attention returns",
    "attention": "attention computed from q, k and v is the model's own",
}


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Each denoiser once."""
    return denoiser(name)


@cache
def truth(name: str) -> Architecture:
    """What is found of it; Wan's has contributions too."""
    return replace(WAN, experts=("transformer",)) if name == WAN_CLASS else find_in(*built(name))


@dataclass(frozen=True)
class Meddling:
    """An engine that does as another one does, after something was done to what it is asked for, or to what comes of it."""

    engine: Engine
    taps: Callable[[Sequence[Tap]], Sequence[Tap]] = lambda taps: taps
    bypasses: Callable[[Sequence[Bypass]], Sequence[Bypass]] = lambda bypasses: bypasses
    attentions: Callable[[Sequence[Attention]], Sequence[Attention]] = lambda attentions: attentions
    output: Callable[[Any], Any] = lambda output: output

    def call(
        self,
        function: Callable[[], Any],
        taps: Sequence[Tap],
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Any:
        """As `Engine.call`."""
        found = self.engine.call(function, self.taps(taps), self.bypasses(bypasses), self.attentions(attentions))
        return self.output(found) if taps else found


def engines(architecture: Architecture, name: str, which: Sequence[str] = ("hooks", "nnsight"), **ways: Any) -> dict[str, Engine]:
    """Two engines, those named meddling; both are of plain hooks, which take less time."""
    pipe = SimpleNamespace(transformer=built(name)[0])
    found: dict[str, Engine] = {key: HookEngine(pipe, architecture) for key in ("hooks", "nnsight")}
    return {key: Meddling(engine, **ways) if key in which else engine for key, engine in found.items()}


def failed(name: str, architecture: Architecture | None = None, **ways: Any) -> set[str]:
    """The checks that fail, by their short names."""
    architecture = architecture or truth(name)
    model, arguments = built(name)
    both = engines(architecture, name, **ways) if ways.pop("quick", True) else None
    checks = Conformance(model, architecture, arguments, both).checks()
    assert [check.name for check in checks] == list(NAMES.values())
    short = {long: key for key, long in NAMES.items()}
    return {short[check.name] for check in checks if check.passed is False}


@pytest.mark.parametrize("name", [WAN_CLASS, DUAL, JOINED])
def test_a_true_record_passes(name: str) -> None:
    assert failed(name, quick=False) == set()


def stacked(name: str, change: Callable[[Stack], Stack]) -> Architecture:
    """The true record with its stacks changed."""
    record = truth(name)
    return replace(record, stacks=tuple(change(stack) for stack in record.stacks))


def sited(change: Callable[[Site], Site | None]) -> Architecture:
    """Wan's record with its sites changed, or some left out."""

    def changed(stack: Stack) -> Stack:
        return replace(stack, sites=tuple(new for site in stack.sites if (new := change(site)) is not None))

    return stacked(WAN_CLASS, changed)


def moved(name: str, **new: Any) -> Architecture:
    """Wan's record with the site of that name elsewhere."""
    return sited(lambda site: replace(site, **new) if site.name == name else site)


RECORDS = {
    "streams in the other order": (DUAL, lambda: stacked(DUAL, lambda one: replace(one, streams=one.streams[::-1])), {"made of"}),
    "returned in the other order": (
        DUAL,
        lambda: stacked(DUAL, lambda one: replace(one, places=(1, 0))),
        {"untouched", "engines", "updates", "handed on", "edits", "skips"},
    ),
    "one sequence in the other order": (
        JOINED,
        lambda: replace(
            truth(JOINED),
            stacks=(truth(JOINED).stacks[0], replace(truth(JOINED).stacks[1], streams=("visual", "text"))),
        ),
        {"handed on"},
    ),
    "lists in the other order": (
        JOINED,
        lambda: replace(truth(JOINED), stacks=truth(JOINED).stacks[::-1]),
        {"order", "made of", "handed on"},
    ),
    "a list left out": (JOINED, lambda: replace(truth(JOINED), stacks=truth(JOINED).stacks[:1]), {"complete"}),
    "the MLP at an attention": (WAN_CLASS, lambda: moved("mlp", module="attn1"), {"kinds"}),
    "the attention at the cross-attention": (WAN_CLASS, lambda: moved("attn", module="attn2"), {"kinds", "heads"}),
    "the cross-attention at the MLP": (WAN_CLASS, lambda: moved("cross_attn", module="ffn"), {"kinds"}),
    "the queries of another attention": (WAN_CLASS, lambda: moved("q", module="attn2"), {"inside"}),
    "heads at another projection": (WAN_CLASS, lambda: moved("heads", module="attn2.to_out.0"), {"heads"}),
    "too many heads": (WAN_CLASS, lambda: stacked(WAN_CLASS, lambda one: replace(one, heads=4)), {"heads"}),
    "no MLP": (WAN_CLASS, lambda: sited(lambda site: None if site.name == "mlp" else site), {"complete"}),
    "another gate": (WAN_CLASS, lambda: moved("mlp_contribution", gate=Gate(4)), {"contributions"}),
    "columns before rows": (WAN_CLASS, lambda: replace(truth(WAN_CLASS), patches=Patches("cfwh", (1, 2, 2))), {"layout"}),
    "smaller patches": (WAN_CLASS, lambda: replace(truth(WAN_CLASS), patches=Patches("cfhw", (1, 1, 2))), {"layout", "made of"}),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_wrong_record_fails_the_check_that_is_for_it(case: str) -> None:
    name, record, expected = RECORDS[case]
    assert failed(name, record()) == expected


def one_later(taps: Sequence[Tap]) -> list[Tap]:
    """Those of each block at the next one."""
    return [replace(tap, block=min(tap.block + 1, 2)) for tap in taps]


def nothing_replaced(taps: Sequence[Tap]) -> list[Tap]:
    """Visited, and what they return forgotten."""

    def only_visit(tap: Tap) -> Tap:
        def visit(tensor: Tensor) -> None:
            tap.visit(tensor)

        return replace(tap, visit=visit)

    return [only_visit(tap) for tap in taps]


def nothing_handed_on(bypasses: Sequence[Bypass]) -> list[Bypass]:
    """Asked, and the answer forgotten."""

    def only_ask(bypass: Bypass) -> Bypass:
        def instead(streams: Mapping[str, Tensor]) -> None:
            bypass.instead(streams)

        return replace(bypass, instead=instead)

    return [only_ask(bypass) for bypass in bypasses]


def other_queries(attentions: Sequence[Attention]) -> list[Attention]:
    """Asked for something else than the model computes."""

    def doubled(one: Attention) -> Attention:
        return replace(one, attend=lambda query, key, value: one.attend(2 * query, key, value))

    return [doubled(one) for one in attentions]


def update_as_resid(taps: Sequence[Tap]) -> list[Tap]:
    """The stream for what was added to it."""
    return [replace(tap, visit=lambda tensor, tap=tap: tap.visit(2 * tensor)) if tap.site == "update" else tap for tap in taps]


ENGINES = {
    "one block later": ({"taps": one_later}, {"shown", "handed on", "updates", "skips", "heads"}),
    "one block later, on one engine": ({"taps": one_later, "which": ["nnsight"]}, {"engines", "edits", "skips"}),
    "the output is another": ({"output": lambda output: output + 1e-3}, {"untouched"}),
    "edits are forgotten": ({"taps": nothing_replaced}, {"edits", "inside"}),
    "skips are forgotten": ({"bypasses": nothing_handed_on}, {"skips"}),
    "attention is asked for something else": ({"attentions": other_queries}, {"attention"}),
    "attention is not asked for": ({"attentions": lambda attentions: []}, {"attention"}),
    "updates are twice as large": ({"taps": update_as_resid}, {"updates", "contributions"}),
}


@pytest.mark.parametrize("case", ENGINES)
def test_a_wrong_engine_fails_the_check_that_is_for_it(case: str) -> None:
    ways, expected = ENGINES[case]
    assert failed(WAN_CLASS, **ways) == expected


def test_every_check_fails_somewhere() -> None:
    cases = [expected for _, _, expected in RECORDS.values()] + [expected for _, expected in ENGINES.values()]
    assert set().union(*cases) == set(NAMES)


def test_a_report_says_what_passed_and_what_could_not_be_made() -> None:
    def breaks() -> Any:
        raise ValueError("two\nlines")

    checks = asked({"one": lambda: (True, "yes"), "another": lambda: (None, "no heads"), "last": breaks})
    report = CheckReport(tuple(checks))
    assert not report.passed
    assert report.failed == (Check("last", False, "ValueError: two"),)
    assert str(report).splitlines() == [
        "pass  one      yes",
        "none  another  no heads",
        "FAIL  last     ValueError: two",
        "1 of 2 checks passed, and 1 could not be made",
    ]
    assert CheckReport(tuple(checks[:2])).passed
    assert not CheckReport(tuple(checks[1:2])).passed, "nothing was checked"
