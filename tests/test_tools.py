"""The library's own tools report on planted models what the table says, and the page of the docs says what they report.

All 62 models take minutes (`make plants`); here are a few tools on one model of most kinds, and what the whole run left in docs/.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from scipy.stats import binomtest

import dit_lens as dl
from dit_lens.plants import KINDS, TABLE, TOOLS, Trial, Truth, measure, planted, verdict
from dit_lens.plants.measured import Measured, every_model, measured, read, write
from dit_lens.plants.page import alarmed, page
from dit_lens.plants.readings import ALARM, ALARM_RATE, PROBE_ALARM, allowed, misses, says

DOCS = Path(__file__).parent.parent / "docs"


@cache
def kept() -> dict[tuple[str, int], Measured]:
    """What `make plants` left, by kind and seed."""
    return {(model.truth.kind, model.seed): model for model in read(DOCS / "tools.json")}


TELLING = {
    "mlp": ("mlp", "resid_first_frame", "mean", "attribution"),
    "step": ("attn", "resid_last_frame", "knockout_first_frame", "latents", "update_by_step"),
    "redundant": ("resid", "update", "zero", "resample", "skip", "attribution"),
    "distractor": ("update", "cross_attn", "probe"),
    "branch": ("knockout_text", "update_by_branch"),
    "none": ("resid", "heads", "probe", "update_by_step"),
}
"""Every tool once or more, each where it has something to say; the rest is in docs/."""


@pytest.mark.parametrize("kind", TELLING)
def test_tools_report_what_the_table_says_and_what_the_docs_say(kind: str) -> None:
    assert {tool for tools in TELLING.values() for tool in tools} == set(TOOLS)
    found = measured(kind, seed=1, tools=TELLING[kind])
    before = kept()[kind, 1]
    assert (found.truth, found.blocks, found.sigmas) == (before.truth, before.blocks, before.sigmas)
    assert set(found.found) == set(TELLING[kind])
    for tool in found.found:
        assert found.misses(tool) == {}, tool
        assert found.effects(tool) == pytest.approx(before.effects(tool), abs=0.02), tool


def test_the_docs_are_about_all_models_and_every_entry_holds() -> None:
    assert set(kept()) == set(every_model())
    assert len(KINDS) == 7
    assert len([kind for kind, _ in kept() if kind != "none"]) >= 42
    for model in kept().values():
        assert set(model.found) == set(TOOLS), model.name
        assert {tool: model.misses(tool) for tool in TOOLS if model.misses(tool)} == {}, model.name


def test_tools_say_in_a_word_what_the_table_says() -> None:
    for model in kept().values():
        for tool in TOOLS:
            word = TABLE[model.truth.kind][tool].verdict
            late = (model.truth.distractor or 0) > (model.truth.block or 0)
            if model.truth.kind == "distractor" and tool == "probe" and late:
                word = "boundary"  # behind the plant a distractor has nothing to mislead about
            assert model.says(tool) == word, (model.name, tool)
            assert says(tool, model.truth, model.expected(tool)) == word, (model.name, tool)


def test_false_alarms_stay_within_what_the_tools_state() -> None:
    plain = [model for model in kept().values() if model.truth.kind == "none"]
    assert len(plain) >= 20
    for tool in TOOLS:
        count = sum(alarmed(model, tool) for model in plain)
        assert binomtest(count, len(plain)).proportion_ci(method="exact").low <= ALARM_RATE, tool
        assert count <= ALARM_RATE * len(plain), tool


def test_the_page_is_what_the_table_and_the_numbers_make_of_it() -> None:
    assert (DOCS / "tools.md").read_text(encoding="utf-8") == page(read(DOCS / "tools.json")), "run make plants"


def test_a_miss_is_found_counted_and_told() -> None:
    good = kept()["copy", 1]
    places = list(good.expected("update"))
    wrong = tuple(size + 0.5 * (place == places[0]) for place, size in good.effects("update").items())
    bad = replace(good, found={**good.found, "update": wrong})
    assert good.misses("update") == {}
    assert bad.misses("update") == {places[0]: pytest.approx(0.5, abs=ALARM)}
    assert alarmed(bad, "update")
    assert not alarmed(good, "update")
    told = page([bad, kept()["none", 0]])
    assert "* copy, seed 1, `update`: at 0, found 0.5" in told
    assert "names (0 of 1)" in told
    assert "1 of 1 |" in next(line for line in told.split("## False alarms")[1].splitlines() if line.startswith("| `update`"))
    assert misses("update", {0: 0.0}, {0: float("nan")}), "what is not a number does not hold"


def test_what_is_allowed_grows_with_the_effect_and_with_drawing() -> None:
    assert allowed("update", 0.0) == ALARM < allowed("update", 0.5) < allowed("update", -2.0)
    assert allowed("resample", 0.0) == ALARM
    assert allowed("resample", 0.5) > allowed("mean", 0.5)
    assert allowed("probe", 1.0) < allowed("probe", 0.0) == PROBE_ALARM


@pytest.mark.parametrize(
    ("truth", "axis", "effects", "word"),
    [
        (Truth("any", block=2), "block", [0, 0, 1, 0], "names"),
        (Truth("any", block=2), "block", [0, 0, -0.3, 0], "names"),
        (Truth("any", block=2), "block", [0, 0, 1, 1], "boundary"),
        (Truth("any", block=2), "block", [1, 1, 0, 0], "boundary"),
        (Truth("any", block=2), "block", [0, 1, 1, 1], "misled"),
        (Truth("any", block=2), "block", [0, 1, 0, 0], "misled"),
        (Truth("any", block=2), "block", [0, 0, 1, 0.1], "boundary"),
        (Truth("any", block=1), "block", [0, 1, 0, 1], "misled"),
        (Truth("any", block=2), "block", [1, 1, 1, 1], "everywhere"),
        (Truth("any", block=2), "block", [0, 0, ALARM, 0], "blind"),
        (Truth("any", block=0, second=2), "block", [1, 0, 1, 0], "names"),
        (Truth("any", block=1, step=1), "step", [0, 0, 1, 1], "boundary"),
        (Truth("any", block=1), "step", [0, 0.1, 0.4, 0.7], "everywhere"),
        (Truth("any", branches=("uncond",)), "branch", [0, 1], "misled"),
        (Truth("none"), "block", [0, 0, 0, 0], "silent"),
        (Truth("none"), "block", [0, 0, 1, 0], "misled"),
    ],
)
def test_a_verdict_follows_from_effects_and_truth(truth: Truth, axis: str, effects: list[float], word: str) -> None:
    names = ("uncond", "cond") if axis == "branch" else range(len(effects))
    if axis == "branch":
        effects = effects[::-1]
        assert verdict(truth, dict(zip(names, effects, strict=True)), axis) == "names"
        effects = effects[::-1]
    assert verdict(truth, dict(zip(names, effects, strict=True)), axis) == word


def test_a_tool_of_your_own_is_a_function_of_a_trial() -> None:
    model = planted("mlp", seed=1, blocks=4, steps=3)

    def silenced(trial: Trial) -> dict:
        return trial.effects(dl.at(block="all", site="mlp"), lambda cell, runs: dl.Zero(cell))

    found = measure(model, silenced)
    assert found == pytest.approx(model.expected("zero"), abs=ALARM)
    assert verdict(model.truth, found, "block") == "names"
    assert found == pytest.approx(measure(model, silenced, engine="nnsight"))
    with pytest.raises(dl.InputError, match=r"no tool 'patch'.*resid"):
        measure(model, "patch")


def test_what_was_measured_comes_back_from_its_file(tmp_path: Path) -> None:
    models = [kept()["step", 0], *(kept()["none", seed] for seed in range(4))]
    write(tmp_path / "tools.json", models)
    assert read(tmp_path / "tools.json") == models
    assert (DOCS / "tools.json").stat().st_size < 200_000
