"""Training: a few steps on little data, and a run that is taken up again goes on with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens.reasoner import data, models, train, train_dit, train_vae
from dit_lens.reasoner.board import Colour
from dit_lens.reasoner.settings import SHIFT
from dit_lens.reasoner.team import Team


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Team:
    """A team of one, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Team()


def test_alone_a_team_is_one(team: Team) -> None:
    assert (team.size, team.rank, team.leads, team.device.type) == (1, 0, True, "cpu")
    gradients = [torch.ones(3)]
    team.average(gradients)
    team.together(gradients)
    assert torch.equal(gradients[0], torch.ones(3))
    assert 0 <= team.stopwatch()() < 1
    team.leave()


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=20))
def test_sigmas_are_shifted_as_the_scheduler_shifts_them(sigmas: list[float]) -> None:
    plain, shifted = FlowMatchEulerDiscreteScheduler(shift=1.0), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    plain.set_timesteps(sigmas=sigmas)
    shifted.set_timesteps(sigmas=sigmas)
    # Both end in the scheduler's own zero.
    assert torch.allclose(train_dit.shifted(torch.as_tensor(plain.sigmas)), torch.as_tensor(shifted.sigmas), atol=1e-6)


def test_the_rate_warms_up_stays_and_falls() -> None:
    rates = np.array([train_dit.rate_at(step, step / 2000, 1e-3) for step in range(2000)])
    assert rates.max() == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-3 / 300)
    assert (np.diff(rates[:300]) > 0).all()
    assert (rates[300:1000] == rates.max()).all()
    assert (np.diff(rates[1001:]) <= 0).all()
    assert rates[1500] == pytest.approx(5e-4)
    assert 0 < rates[-1] <= 1.1e-5


def state(seed: int) -> train_dit.State:
    """A small denoiser and the real text encoder, before the first step."""
    torch.manual_seed(seed)
    words = models.tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=20,
        out_channels=8,
        text_dim=128,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    model = train_dit.Model(transformer, models.text_encoder(len(words)), words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    return train_dit.State(model, {k: v.clone() for k, v in model.state_dict().items()}, optimizer, 0, [])


def latents() -> dict[int, data.Encoded]:
    """Latents of clips of two lengths."""
    torch.manual_seed(0)
    return {
        frames: data.Encoded(
            torch.randn(6, 8, (frames + 3) // 4, 8, 8).bfloat16(),
            torch.randn(6, 8, (frames + 3) // 4, 8, 8).bfloat16(),
            torch.arange(6),
        )
        for frames in (5, 9)
    }


@pytest.fixture
def go_on(team: Team) -> Callable[[train_dit.State, int], None]:
    """Training up to a step."""

    def run(of: train_dit.State, steps: int) -> None:
        train_dit.train(of, latents(), steps=steps, batch=2, rate=1e-2, seed=0, minutes=1, team=team)

    return run


def everything(of: train_dit.State) -> dict[str, torch.Tensor]:
    """All that a step depends on."""
    found = {f"weights {k}": v for k, v in of.model.state_dict().items()} | {f"ema {k}": v for k, v in of.ema.items()}
    for name, parameter in of.model.named_parameters():
        found |= {f"{moment} {name}": value for moment, value in of.optimizer.state[parameter].items()}
    return {name: value.clone() for name, value in found.items()}


def test_a_run_that_is_taken_up_goes_on_with_the_same_bits(go_on: Callable[[train_dit.State, int], None], tmp_path: Path) -> None:
    one = state(0)
    before = {k: v.clone() for k, v in one.model.state_dict().items()}
    go_on(one, 2)
    trained = one.model.state_dict()
    for part in ("transformer.blocks.0.attn1.to_q.weight", "text_encoder.encoder.block.0.layer.0.SelfAttention.q.weight"):
        assert not torch.equal(trained[part], before[part])
        # The average lies between where the weights began and where they are.
        assert not torch.equal(one.ema[part], before[part])
        assert not torch.equal(one.ema[part], trained[part])
    assert one.step == 2
    assert [point["step"] for point in one.curve] == [2]
    assert np.isfinite(one.curve[0]["loss"])

    assert train_dit.steps_done(tmp_path / "dit") == 0
    one.save(tmp_path / "dit")
    assert train_dit.steps_done(tmp_path / "dit") == 2
    other = state(1)
    other.load(tmp_path / "dit")
    assert other.step == 2
    assert other.curve == one.curve
    saved = everything(one)
    assert set(everything(other)) == set(saved)
    assert all(torch.equal(value, saved[name]) for name, value in everything(other).items())

    go_on(one, 4)
    go_on(other, 4)
    after = everything(one)
    assert one.step == other.step == 4
    assert all(torch.equal(value, after[name]) for name, value in everything(other).items())
    assert not all(torch.equal(value, saved[name]) for name, value in after.items())
    assert one.curve[-1]["loss"] == other.curve[-1]["loss"]
    averaged = train_dit.load_ema(tmp_path / "dit")
    for part, tensors in averaged.items():
        assert tensors
        assert all(torch.equal(value, saved[f"ema {part}.{name}"]) for name, value in tensors.items())


def test_training_stops_by_the_clock(team: Team) -> None:
    begun = state(0)
    train_dit.train(begun, latents(), steps=5, batch=2, rate=1e-2, seed=0, minutes=0, team=team)
    assert begun.step == 0


class Clocked(Team):
    """A team of one on whose clock every look takes six seconds."""

    looks = 0

    def stopwatch(self) -> Callable[[], float]:
        def spent() -> float:
            self.looks += 1
            return 6.0 * self.looks

        return spent


def test_the_rate_can_fall_within_the_minutes(team: Team) -> None:
    begun = state(0)
    train_dit.train(begun, latents(), steps=100_000, batch=2, rate=1e-2, seed=0, minutes=0.125, team=Clocked(), fit=True)
    # One look at 6 of 7.5 seconds, then ten steps; the next is beyond.
    assert begun.step == 10
    assert begun.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 10 / 300 * 2 * (1 - 6 / 7.5))


@pytest.fixture(scope="module")
def clips() -> data.Clips:
    """Short clips of every task."""
    return data.draw(30, first=0, frames=5, workers=1)


def test_the_vae_learns(clips: data.Clips, team: Team) -> None:
    torch.manual_seed(0)
    vae = tiny_vae()
    boards = torch.from_numpy(clips.boards)
    weights = train_vae.colour_weights(clips.boards)

    def loss() -> float:
        with torch.no_grad():
            return train_vae.losses(vae, boards, torch.zeros(len(boards), 4, 2, 16, 16), weights)[0].item()

    before = loss()
    curve = train_vae.train(vae, clips, steps=40, batch=5, rate=0.02, seed=0, minutes=9, team=team)
    assert [point["step"] for point in curve] == [0, 25, 39]
    assert all(np.isfinite(list(point.values())).all() for point in curve)
    assert loss() < 0.8 * before


def test_rare_colours_weigh_more(clips: data.Clips) -> None:
    weights = train_vae.colour_weights(clips.boards)
    counts = np.bincount(clips.boards.ravel(), minlength=len(Colour))
    assert weights.mean().item() == pytest.approx(1)
    assert weights.argsort().tolist() == np.argsort(-counts, kind="stable").tolist() or len(set(counts)) < len(counts)
    assert weights.argmin().item() == counts.argmax() == Colour.BLACK


def test_true_pixels_are_read_back(clips: data.Clips) -> None:
    logits = train_vae.read_back(data.pixels(torch.from_numpy(clips.boards[:4])))
    assert np.array_equal(logits.argmax(1).numpy(), clips.boards[:4])


def test_normalised_latents_have_mean_zero_and_spread_one(clips: data.Clips) -> None:
    torch.manual_seed(0)
    vae = tiny_vae()
    train_vae.normalise(vae, clips)
    encoded = data.encode(vae, clips).latents.float()
    assert torch.allclose(encoded.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=0.02)
    assert torch.allclose(encoded.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=0.02)


def test_the_bundled_vae_reads_back_every_colour() -> None:
    vae = AutoencoderKLWan.from_pretrained(dl.reasoner.folder() / "vae", torch_dtype=torch.float32)
    boards = data.draw(10, first=0, frames=17, workers=1).boards
    found = train_vae.read_back_of_every_colour(vae, boards)
    assert set(found["colours"]) == {Colour(c).name.lower() for c in np.unique(boards)}
    assert min(found["colours"].values()) > 0.99
    assert found["squares"] > 0.999
    assert 0 <= found["clips"] <= 1


def test_training_the_denoiser_needs_a_vae(tmp_path: Path, team: Team) -> None:
    with pytest.raises(dl.InputError, match=r"no trained VAE in .*; run `python -m dit_lens.reasoner.train vae` first"):
        train.run_dit(train.DiT(work=tmp_path), team)


def test_what_is_exported_are_the_averaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = models.untrained(1)
    pipe.vae.save_pretrained(tmp_path / "vae")
    model = train_dit.Model(pipe.transformer, pipe.text_encoder, pipe.tokenizer)
    ema = {name: value + 1 for name, value in model.state_dict().items()}
    train_dit.State(model, ema, torch.optim.AdamW(model.parameters()), 0, []).save(tmp_path / "dit")
    for part in ("vae", "dit"):
        (tmp_path / f"{part}.json").write_text(json.dumps({"part": part}))
    train.run_export(train.Export(work=tmp_path, to=tmp_path / "out"))
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'out'}: ")
    opened = models.open_pipeline(tmp_path / "out")
    weight = opened.transformer.blocks[3].attn1.to_q.weight
    assert torch.allclose(weight, pipe.transformer.blocks[3].attn1.to_q.weight + 1, atol=0.01)
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == {"vae": {"part": "vae"}, "dit": {"part": "dit"}}
