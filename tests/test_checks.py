"""The checks pass on a true lens and fail on a false one."""

from typing import Any

import pytest
import torch

import dit_lens as dl
from dit_lens.checks import check


@pytest.mark.parametrize("name", ["nnsight", "hooks"])
def test_pass_on_a_tiny_pipeline(image_pipe: Any, name: Any) -> None:
    found = check(dl.wrap(image_pipe, engine=name), {"height": 16, "width": 16, "num_frames": 5})
    assert [one.name for one in found if not one.passed] == []
    assert len(found) == 7
    assert "3 blocks" not in found[0].found


def test_fail_where_recording_changes_the_run(image_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = dl.wrap(image_pipe)
    run = lens.run

    def meddling(*given: Any, **named: Any) -> Any:
        found = run(*given, **named)
        if named.get("record"):
            found.latents[-1] += torch.ones(()) * 1e-3
        return found

    monkeypatch.setattr(lens, "run", meddling)
    found = check(lens, {"height": 16, "width": 16, "num_frames": 5})
    failed = [one for one in found if not one.passed]
    assert [one.name for one in failed] == ["recording every site of every block leaves it as it is"]
    assert "differs by up to 0.001" in failed[0].found
