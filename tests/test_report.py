"""The report: one page that needs nothing else, shows everything, and can be read by a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_pipeline
from toy import Toy

import dit_lens as dl
from dit_lens.errors import InputError
from dit_lens.experiment import run_experiment
from dit_lens.report import cell, duration, write_report

VOID = {"meta", "img", "input", "link", "br"}


class Reader(HTMLParser):
    """Collects text and addresses, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run_experiment(Toy().experiment(), dl.wrap(tiny_pipeline()), out, preset="quick", command="dit-lens run toy")
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Reader:
    reader = Reader()
    reader.feed(write_report(folder).read_text())
    assert reader.open == []
    return reader


def test_is_self_contained(folder: Path, page: Reader) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    html = (folder / "report.html").read_text()
    assert not re.findall(r"url\((?!data:)", html)
    assert "http://" not in html
    assert "https://" not in html


@pytest.mark.parametrize(
    "part", ["Squares", "Numbers & their <squares>.", "A film", "What are the squares?", "dit-lens run toy", "quick", "WanImage"]
)
def test_says_what_is_shown_and_how_it_was_made(page: Reader, part: str) -> None:
    assert part in page.text


def test_what_the_model_does_is_shown_before_what_was_measured(page: Reader) -> None:
    assert page.text.index("A film") < page.text.index("What are the squares?")


def test_has_contents_results_and_pictures(page: Reader) -> None:
    assert "#toy" in page.addresses
    assert sum(address.startswith("data:image/png") for address in page.addresses) == 1  # the film is a background
    assert sum("parquet" in address for address in page.addresses) == 1


def test_numbers_and_times_read_well() -> None:
    assert [cell(value) for value in (0.123456, 3, "a", None)] == ["0.123", "3", "a", "-"]
    assert [duration(s) for s in (7.26, 245, 7380)] == ["7.3 s", "4 min 05 s", "2 h 03 min"]


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished experiment"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize("damage", ["curve.png", "results.parquet", "manifest.json"])
def test_a_damaged_result_is_named(tmp_path: Path, damage: str) -> None:
    lens: Any = dl.wrap(tiny_pipeline())
    run_experiment(Toy().experiment(), lens, tmp_path, preset="quick")
    target = tmp_path / "toy" / damage
    if damage == "manifest.json":
        target.write_text("{")
    else:
        target.unlink()
    with pytest.raises(InputError, match="not a whole result"):
        write_report(tmp_path)
