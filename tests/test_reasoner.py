"""The bundled reasoner, end to end: it solves held-out puzzles, it reads its prompt, and a run leaves its bits alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shown

import dit_lens as dl
from dit_lens import reasoner
from dit_lens.reasoner.tasks import Sample


@pytest.fixture(scope="module")
def lens() -> dl.Lens:
    """The reasoner."""
    return dl.load("reasoner", device="cpu")


def test_it_solves_held_out_mazes(lens: dl.Lens) -> None:
    task = reasoner.task("maze")
    samples = [sample for sample in (task.sample("test", index) for index in range(12)) if sample.puzzle.rooms <= 5][:2]
    assert {sample.split for sample in samples} == {"test"}
    run = lens.run(**reasoner.inputs(samples), seed=0)
    for score, sample in zip(task.scores(shown(run).numpy(), samples), samples, strict=True):
        assert score.right, score.reason
        assert score.answer == sample.answers[0]


def test_the_prompt_decides_what_is_circled(lens: dl.Lens) -> None:
    sample = reasoner.task("circle").sample("test", 0)
    kind = next(item for item in sample.puzzle.items if item not in (None, sample.puzzle.target))
    puzzle = replace(sample.puzzle, target=kind)
    prompt = sample.task.wordings[0].format(colour=kind[0], shape=kind[1])
    other = Sample(sample.task, "test", 0, puzzle, prompt, 0, answers=sample.task.solve(puzzle))
    assert np.array_equal(sample.boards[0], other.boards[0])
    run = lens.run(**reasoner.inputs([sample, other]), seed=0)
    scores = sample.task.scores(shown(run).numpy(), [sample, other])
    assert [score.answer for score in scores] == [sample.answers[0], other.answers[0]]
    assert [score.right for score in scores] == [True, True]
    assert not scores[0].answer & scores[1].answer  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


@pytest.mark.parametrize("record", [(), (dl.at(block=[0, 13], step=1, branch="cond"),)], ids=["nothing", "two blocks"])
def test_a_run_is_bit_identical_to_the_plain_pipeline(lens: dl.Lens, record: tuple[dl.Selector, ...]) -> None:
    inputs = {**reasoner.task("bounce").sample("test", 1, 9).inputs, "num_inference_steps": 2}
    run = lens.run(**inputs, seed=4, record=record)
    assert torch.equal(shown(run), lens.plain(**inputs, seed=4, output_type="pt").frames.movedim(2, -1))
    assert run.layout.shape == (3, 8, 8)
    if record:
        assert run.activation(block=13, step=1, branch="cond").shape == (1, 3, 8, 8, 192)


def test_what_is_committed_about_it_is_about_these_weights(lens: dl.Lens) -> None:
    path = reasoner.folder() / "held_out.json"
    if not path.is_file():
        pytest.skip("these weights are not measured yet: python -m experiments.held_out")
    held_out = json.loads(path.read_text())
    assert held_out["model"] == lens.hash
    assert set(held_out["tasks"]) == set(reasoner.tasks())
    least = {"maze": 0.75, "maze-loops": 0.75}
    for name, found in held_out["tasks"].items():
        assert found["right"]["estimate"] >= least.get(name, 0.85), name
        assert found["right"]["measurements"] >= 600
        assert found["untrained"]["estimate"] <= 0.02
    assert held_out["tasks"]["maze"]["by_size"]["up to 5x5"]["mean"] >= 0.9
