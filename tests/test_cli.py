"""The command line: what each command does, and one line and exit code 2 for what cannot be done."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_pipeline
from toy import Toy

from dit_lens import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy as the only experiment."""
    toy = Toy()
    monkeypatch.setattr(cli, "experiments", lambda: {"toy": toy.experiment()})
    return toy


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("dit-lens: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_without_a_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("step-lens", "token-energy", "probe-map", "quick, full"))


def test_reproduce_runs_everything_and_writes_the_report(
    toy: Toy, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", "--model", str(model), "--out", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "toy"]
    assert "dit-lens reproduce --model" in (tmp_path / "out" / "toy" / "manifest.json").read_text()
    assert cli.main(["reproduce", "--model", str(model), "--out", str(tmp_path / "out")]) == 0
    assert toy.computed == [0, 1, 2, 3]


def test_run_takes_settings_as_options(toy: Toy, model: Path, tmp_path: Path) -> None:
    arguments = ["run", "toy", "--model", str(model), "--out", str(tmp_path), "--count", "2"]
    assert cli.main(arguments) == 0
    assert toy.computed == [0, 1]
    assert cli.main([*arguments[:-2], "--preset", "full"]) == 0
    assert toy.computed == [0, 1, 0, 1, 2, 3, 4, 5]


def test_help_of_an_experiment_shows_its_settings(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "toy", "--help"])
    assert not end.value.code
    assert "--count" in capsys.readouterr().out


def test_interrupted_work_goes_on(toy: Toy, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.stop_after = 1
    arguments = ["run", "toy", "--model", str(model), "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    toy.stop_after = None
    assert cli.main(arguments) == 0
    assert toy.computed == [0, 1, 2, 3]


def test_describe_and_check(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", str(model)]) == 0
    assert "3 blocks" in capsys.readouterr().out
    sizes = ("--height", "16", "--width", "16", "--num-frames", "5")
    assert cli.main(["check", str(model), *sizes, "--prompt", "walk the red maze"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == 24
    assert all(line.startswith("pass") for line in lines)
    assert summary == "24 of 24 checks passed"


def test_a_failed_check_ends_with_one(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dit_lens import lens
    from dit_lens.check_report import Check, CheckReport

    monkeypatch.setattr(lens, "check", lambda *_: CheckReport((Check("sees", True, "all"), Check("knows", False, "nothing"))))
    assert cli.main(["check", str(model)]) == 1
    shown = capsys.readouterr()
    assert "FAIL  knows  nothing" in shown.out
    assert "thirty to a hundred calls" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lst"], "no command 'lst'; there are reproduce, run, list, describe, check, report; did you mean list?"),
        (["run", "step-lense"], "no experiment 'step-lense'"),
        (["reproduce", "--only", "nothing"], "no experiment 'nothing'; there are step-lens, noise, propagation, "),
        (["reproduce", "--preset", "slow"], "no preset 'slow' of step-lens: write one of quick, full"),
        (["run", "step-lens", "--preset", "slow"], "no preset 'slow'"),
        (["run", "step-lens", "--samplse", "3"], "Unrecognized options: --samplse"),
        (["run", "step-lens", "--samples", "three"], "--samples"),
        (["reproduce", "--jobs", "0"], "--jobs 0: write 1 or more"),
        (["reproduce", "--engine", "steam"], "'nnsight', 'hooks'"),
        (["reproduce", "--model", "/no/such/folder"], "no folder /no/such/folder"),
        (["describe", "/no/such/folder"], "no folder /no/such/folder"),
        (["describe", "reasoner", "--device", "abacus"], "abacus"),
        (["report", "/no/such/folder"], "no folder /no/such/folder"),
        (["report"], "write: dit-lens report DIR"),
        (["check", "reasoner", "--image", "/no/such/picture.png"], "no picture /no/such/picture.png"),
        (["list", "all"], "write: dit-lens list"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_a_folder_that_is_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model_index.json" in refused(capsys, "check", str(tmp_path))


def test_a_damaged_weight_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    shard = next((tmp_path / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    capsys.readouterr()
    assert "is damaged" in refused(capsys, "describe", str(tmp_path))


@pytest.mark.parametrize("command", [["reproduce"], ["run", "toy"]])
def test_an_unwritable_folder_is_refused_before_the_model_is_loaded(
    command: list[str], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli.ModelOptions, "load", load)
    (tmp_path / "file").write_text("")
    assert "cannot write in" in refused(capsys, *command, "--out", str(tmp_path / "file" / "out"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_result_that_no_report_can_show_is_named_before_anything_is_run(
    toy: Toy, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{")
    assert "other is not a whole result" in refused(capsys, "reproduce", "--model", str(model), "--out", str(tmp_path))
    assert toy.computed == []
    # What is to be made again may be damaged.
    other.rename(tmp_path / "toy")
    assert cli.main(["reproduce", "--model", str(model), "--out", str(tmp_path)]) == 0


def test_an_unknown_task_leaves_nothing_behind(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    said = refused(capsys, "run", "step-lens", "--model", str(model), "--out", str(out), "--tasks", "mazes")
    assert "unknown task 'mazes'" in said
    assert not out.exists()


def test_a_disk_that_fills_up_is_one_line(
    toy: Toy, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["run", "toy", "--model", str(model), "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
