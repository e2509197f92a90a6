"""The lens itself: decoding, describing, and what importing the library costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import arguments, shown

import dit_lens as dl
from dit_lens.architectures import WAN


def test_the_first_tensors_are_the_generators_own(image_pipe: Any) -> None:
    run = dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe), seed=[7, 8], decode=False)
    for row, seed in enumerate((7, 8)):
        noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(run.latents[0, row], noise[0])


def test_decoding_is_the_pipelines_own(any_pipe: Any) -> None:
    lens = dl.wrap(any_pipe, engine="hooks")
    run = lens.run(**arguments(any_pipe), seed=[1, 2])
    assert torch.equal(lens.decode(run.latents[-1]), shown(run))
    undecoded = lens.run(**arguments(any_pipe), seed=[1, 2], decode=False)
    assert undecoded.video is None
    assert torch.equal(undecoded.latents, run.latents)
    everything = lens.decode(run.latents, rows=3)
    assert everything.shape == (5, 2, 5, 16, 16, 3)
    assert torch.allclose(everything[-1], shown(run), atol=1e-5)
    assert torch.equal(lens.decode(run.latents[-1, 0]), lens.decode(run.latents[-1, :1])[0])


def test_progress_shows_the_pipelines_bar_or_none(image_pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    lens = dl.wrap(image_pipe, engine="hooks")
    lens.run(**arguments(image_pipe))
    lens.plain(**arguments(image_pipe))
    assert capfd.readouterr().err == ""
    lens.run(**arguments(image_pipe), progress=True)
    assert "4/4" in capfd.readouterr().err
    image_pipe.set_progress_bar_config(desc="own", disable=False)
    lens.run(**arguments(image_pipe), progress=True)
    assert "own" in capfd.readouterr().err
    assert image_pipe._progress_bar_config == {"desc": "own", "disable": False}


def test_describe_is_a_table_of_what_there_is(any_pipe: Any) -> None:
    lens = dl.wrap(any_pipe)
    table = dict(lens.describe().rows)
    assert table["pipeline"] == type(any_pipe).__name__
    assert table["transformer"].startswith("3 blocks (WanTransformerBlock, width 16)")
    assert ("switch" in table) == ("transformer_2" in table) == (any_pipe.transformer_2 is not None)
    assert table["sites"] == ", ".join(site.name for site in WAN.sites)
    assert table["heads"] == "2, at q, k, v, qk, heads"
    assert table["read-only"].startswith("qk, attn_contribution (gated by the timestep), cross_attn_contribution (no gate)")
    assert table["guidance"] == "sequential: cond, then uncond, when guidance_scale > 1"
    assert table["schedule"] == "FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=1000)"
    assert str(lens.describe()).count("\n") == len(table) - 1
    assert repr(lens) == f"Lens({type(any_pipe).__name__!r}, {type(any_pipe).__name__}, engine='nnsight')"


def test_skipped_blocks_are_not_recorded_as_if_they_ran(image_pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    lens = dl.wrap(image_pipe, engine="hooks")
    call = lens.run(**arguments(image_pipe), keep_calls=True, decode=False).calls[0, "cond"]
    image_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(dl.InputError, match=r"transformer skips blocks .*; call pipe.transformer.disable_cache"):
        lens.run(**arguments(image_pipe), record=dl.at())
    with pytest.raises(dl.InputError, match=r"transformer skips blocks .*; call pipe.transformer.disable_cache"):
        lens.replay(call)
    image_pipe.transformer.disable_cache()
    lens.run(**arguments(image_pipe), record=dl.at())


def test_importing_the_library_imports_no_engine() -> None:
    """nnsight and diffusers take seconds, and are not needed to look at a saved run."""
    heavy = "('nnsight', 'diffusers', 'transformers', 'sklearn', 'matplotlib')"
    code = f"import sys, dit_lens; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_public_names_exist() -> None:
    for name in set(dl.__all__) - {"reasoner"}:
        assert getattr(dl, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'oracle'"):
        _ = dl.oracle  # type: ignore[attr-defined]
