"""What the documents show is run: the code of the README and of docs/, and the cells of the notebooks."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from dit_lens.architectures import record
from dit_lens.plants import TABLE, TOOLS
from dit_lens.reasoner.settings import CALL

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("docs/where_is_the_answer_decided.ipynb", "docs/probe_a_new_architecture.ipynb")
MARKDOWN = ("README.md", "docs/interventions.md", "docs/real-pipelines.md", "docs/probe_a_new_architecture.md")


def python_blocks(text: str) -> list[str]:
    """The python code blocks of a Markdown document."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def cells(notebook: str) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    every = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == "code"]


def run_in_order(name: str, blocks: list[str]) -> dict[str, Any]:
    """Run blocks of code one after another, as one module would."""
    assert blocks
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What documents write goes to a folder of its own, and what they draw to no window."""
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")


@pytest.mark.parametrize("document", MARKDOWN)
def test_the_code_of_a_document_runs(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CALL, "num_inference_steps", 3)
    run_in_order(document, python_blocks((ROOT / document).read_text(encoding="utf-8")))


@pytest.mark.parametrize(("notebook", "few"), list(zip(NOTEBOOKS, [{"pairs": 2, "fresh": 2}, {"pairs": 4}], strict=True)))
def test_a_notebook_runs(notebook: str, few: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_LENS_QUICK", "1")
    scope = run_in_order(notebook, ["".join(cell["source"]) for cell in cells(notebook)])
    assert {name: len(scope[name]) for name in few} == few


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_was_run_in_order_and_is_small(notebook: str) -> None:
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
    assert all(len(picture) < 200_000 for picture in pictures)  # base64: 150 kB of picture
    assert (ROOT / notebook).stat().st_size < 600_000
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("document", [*MARKDOWN, "docs/pipelines.md", "CHANGELOG.md", *NOTEBOOKS])
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (path.parent / target).exists(), target


def test_the_table_of_tools_is_that_of_the_planted_models() -> None:
    lines = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8").splitlines()
    for tool in TOOLS:
        verdicts = " | ".join(TABLE[kind][tool].verdict for kind in TABLE)
        assert f"| `{tool}` | {verdicts} |" in lines
    assert f"| tool | {' | '.join(f'`{kind}`' for kind in TABLE)} |" in lines


def test_the_example_files_run_by_themselves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_registered", [*record._registered])
    for path in sorted((ROOT / "docs" / "own").glob("*.py")):
        runpy.run_path(str(path), run_name="__main__")
        assert "a loop of its own" in capsys.readouterr().out


def test_the_readme_says_what_the_benchmarks_measured() -> None:
    measured = {path.stem: json.loads(path.read_text()) for path in (ROOT / "figures" / "benchmarks").glob("*.json")}
    patching, probes = measured["h200"]["patching"], measured["cpu-2-cores"]["probes"]["ridge"]["total"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"a grid of {patching['video']['cells']} cells takes {patching['video']['seconds']['ratio']:.1f} times less" in text
    assert f"{patching['velocity']['seconds']['ratio']:.0f} times less for the velocity" in text
    assert f"{probes['probes']:,} probes {probes['seconds']['ratio']:.0f} times less" in text
