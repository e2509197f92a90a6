"""The table of classes: complete, as it would be made now, and not blind to what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

from dit_lens.architectures.finding import find_in
from dit_lens.conformance import Conformance
from dit_lens.coverage.page import line, page
from dit_lens.coverage.rows import Row, classes, row
from dit_lens.coverage.truth import Compared, compared
from dit_lens.small_denoisers import DENOISERS, Blocks

PAGE = (Path(__file__).parent.parent / "docs" / "coverage.md").read_text(encoding="utf-8")
SAMPLE = {
    "FluxTransformer2DModel": "fused projections",
    "CogVideoXTransformer3DModel": "picture before text",
    "AuraFlowTransformer2DModel": "two streams, then one sequence",
    "Lumina2Transformer2DModel": "a list for the picture before",
    "NucleusMoEImageTransformer2DModel": "experts",
    "StableAudioDiTModel": "sound",
    "SanaTransformer2DModel": "linear attention, and an MLP of pictures",
    "LatteTransformer3DModel": "refused",
}


def rows() -> dict[str, str]:
    """The rows of the page, by class."""
    table = [text for text in PAGE.splitlines() if text.startswith("| ")][1:]
    found = {text.split(" | ")[0].removeprefix("| "): text for text in table}
    assert len(found) == len(table), "a class stands twice"
    return found


def test_every_class_of_the_installed_diffusers_is_there_once() -> None:
    assert list(rows()) == classes()
    assert f"of diffusers {diffusers.__version__}," in PAGE


def test_none_is_wrong_and_few_are_refused() -> None:
    verdicts = [text.split(" | ")[1] for text in rows().values()]
    assert set(verdicts) == {"covered", "refused", "no DiT"}
    assert verdicts.count("refused") <= 7
    assert "WRONG" not in PAGE
    assert "| NO |" not in PAGE
    for text in rows().values():
        if "| covered |" in text:
            sites = text.split(" | ")[4].split(", ")
            assert {"attn", "mlp", "resid", "update"} <= set(sites), text


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_made_now_is_that_of_the_page(name: str) -> None:
    assert line(row(name)) == rows()[name]


def test_a_class_that_nobody_looked_at_and_one_that_is_wrong_make_the_command_fail() -> None:
    new = row("Tomorrow3DModel")
    assert new.verdict == "not looked at"
    assert new.silently_wrong
    wrong = Row("Yesterday", "covered", equal=True, wrong=("the layout is another",))
    assert wrong.silently_wrong
    assert "WRONG: the layout is another" in page([new, wrong], "0")
    assert not row("DreamLiteTransformer2DModel").silently_wrong


@pytest.fixture(scope="module")
def conformance() -> Conformance:
    denoiser, arguments = DENOISERS["CogVideoXTransformer3DModel"].build()
    return Conformance(denoiser, find_in(denoiser, arguments), arguments)


def against(conformance: Conformance, **changes: Any) -> Compared:
    """The comparison with a truth that is changed, of the blocks where they have such a field."""
    small = DENOISERS["CogVideoXTransformer3DModel"]
    own = {name: changes.pop(name) for name in list(changes) if name in Blocks.__dataclass_fields__ and name != "blocks"}
    blocks = tuple(replace(one, **own) for one in small.blocks)
    return compared(replace(small, blocks=blocks, **changes), conformance.once)


def test_what_was_found_is_held_against_the_truth(conformance: Conformance) -> None:
    modules = dict(DENOISERS["CogVideoXTransformer3DModel"].blocks[0].modules)
    assert against(conformance) == Compared((), ())
    said = {
        "blocks are transformer_blocks.0, transformer_blocks.1, and transformer_blocks.0, ": {"count": 2},
        "has text, visual, and visual, text were found": {"streams": ("text", "visual")},
        "has visual, text, and visual, text were found": {"joined": True},
        "has 30 text tokens, and 7 were found": {"tokens": {**DENOISERS["CogVideoXTransformer3DModel"].tokens, "text": 30}},
        "the layout is (3, 2, 4), and (3, 4, 2) was found": {"layout": (3, 2, 4)},
        "mlp of visual in transformer_blocks is what norm1 returns": {"modules": {**modules, ("mlp", "visual"): "norm1"}},
        "has no mlp, and one was found": {"modules": {key: path for key, path in modules.items() if key[0] != "mlp"}},
    }
    for words, changes in said.items():
        found = against(conformance, **changes)
        assert found.missed == ()
        assert found.wrong
        assert all(words in one for one in found.wrong), found.wrong
    absent = against(conformance, modules={**modules, ("cross_attn", "text"): "attn1"})
    assert absent == Compared(("cross_attn of text in transformer_blocks",), ())
