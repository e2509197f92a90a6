"""Branches: on a model whose posterior is known they draw from it, their mean is x0-hat, and other ways do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import arguments
from diffusers import UniPCMultistepScheduler
from torch import Tensor

import dit_lens as dl
from dit_lens import metrics, reasoner
from dit_lens.architectures import Layout
from dit_lens.blends import Blends
from dit_lens.branching import UNGUIDED, branches, endings_table, with_distances
from dit_lens.errors import InputError
from dit_lens.latent_edits import Passage, ReplaceLatents
from dit_lens.noise import NoiseState
from dit_lens.reasoner import board

MODES, WIDTH = torch.tensor([[1.5, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.5, 0.0], [0.0, -1.5, 0.5, -1.0]]), 0.1
STEPS = 30


def sigmas() -> list[float]:
    """A schedule as the reasoner's, and its end."""
    times = torch.linspace(1, 1e-3, STEPS, dtype=torch.float64)
    return [*(3 * times / (1 + 2 * times)).tolist(), 0.0]


def posterior(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """x0-hat and the modes' probabilities at x = (1 - sigma) x0 + sigma noise, x0 a mixture of three narrow Gaussians."""
    signal = 1 - sigma
    variance = (signal * WIDTH) ** 2 + sigma**2
    away = x[:, None] - signal * MODES
    chance = torch.softmax(-(away**2).sum(-1) / 2 / variance, dim=1)
    within = MODES + signal * WIDTH**2 / variance * away
    return (chance[..., None] * within).sum(1), chance


def drawn(x: Tensor, start: int, count: int, how: Any, everywhere: bool) -> Tensor:
    """Endings of a state: Euler steps of the exact velocity, with a `ReplaceLatents` at every later step or the next."""
    levels = sigmas()
    edit = ReplaceLatents(1, noise=5, how=how)
    states = x.expand(count, -1)
    for step in range(start, STEPS):
        sigma, lower = levels[step], levels[step + 1]
        hat, _ = posterior(states, sigma)
        taken, states = states, states + (lower - sigma) * (states - hat) / sigma
        if step + 1 < STEPS and (everywhere or step == start):
            at, before = (NoiseState(level, 1 - level, level, "flow_prediction") for level in (lower, sigma))
            as_latents = [tensor[:, :, None, None, None] for tensor in (states, hat, taken)]
            passage = Passage(
                step + 1, at, as_latents[0], tuple(range(count)), lambda bet=as_latents[1]: bet, before, as_latents[2]
            )
            states = edit.apply(passage)[:, :, 0, 0, 0]
    return states


def near(endings: Tensor) -> Tensor:
    """The share of endings at each mode."""
    nearest = ((endings[:, None] - MODES) ** 2).sum(-1).argmin(1)
    return torch.bincount(nearest, minlength=3) / len(endings)


@pytest.fixture(scope="module")
def states() -> list[tuple[int, Tensor]]:
    """Undecided states of exact runs, at three noise levels."""
    random, found = torch.Generator().manual_seed(1), []
    for start in (0, 6, 12):
        sigma = sigmas()[start]
        while True:
            x = (1 - sigma) * MODES[len(found)] + sigma * torch.randn(4, generator=random)
            if posterior(x[None], sigma)[1].max() < 0.75:
                break
        found.append((start, x))
    return found


def test_endings_of_the_ancestral_way_are_draws_from_the_posterior(states: list[tuple[int, Tensor]]) -> None:
    for start, x in states:
        hat, chance = posterior(x[None], sigmas()[start])
        endings = drawn(x, start, 1000, "ancestral", everywhere=True)
        assert float((near(endings) - chance[0]).abs().sum() / 2) < 0.05
        bias, spread = metrics.bias_and_spread(endings.numpy(), hat[0].numpy())
        assert abs(bias) < 0.02 * spread, "their mean is x0-hat"
        # Each ending is a clean sample: as far from its mode as the modes are wide.
        apart = ((endings[:, None] - MODES) ** 2).sum(-1).min(1).values
        assert float(apart.mean()) < 3 * 4 * WIDTH**2


def test_other_ways_are_no_draws_from_it(states: list[tuple[int, Tensor]]) -> None:
    """Fresh noise on x0-hat, once or at every step (as diffusers' stochastic sampling), treats the mean as a sample."""
    start, x = states[2]
    hat, chance = posterior(x[None], sigmas()[start])
    for everywhere in (False, True):
        endings = drawn(x, start, 600, "sigma_matched", everywhere)
        bias, spread = metrics.bias_and_spread(endings.numpy(), hat[0].numpy())
        off = float((near(endings) - chance[0]).abs().sum() / 2)
        assert off > 0.06 or bias > 0.03 * spread


@pytest.fixture
def lens(image_pipe: Any) -> dl.Lens:
    return dl.wrap(image_pipe, engine="hooks")


def clean(lens: dl.Lens, prompts: list[str] | None = None, **changes: Any) -> tuple[dl.Run, dict[str, Any]]:
    inputs = arguments(lens.pipe, **({"prompt": prompts} if prompts else {}), **changes)
    return lens.run(**inputs, seed=3), inputs


def test_branches_leave_from_the_state_and_go_their_own_ways(lens: dl.Lens) -> None:
    run, inputs = clean(lens, ["walk the maze", "draw the circle"])
    found = branches(lens, run, 1, 3, **inputs)
    assert found.batch == 6
    assert found.prompts[:3] == ("walk the maze",) * 3
    for row in range(6):
        assert torch.equal(found.latents[1, row], run.latents[1, row // 3])
        assert torch.equal(found.x0_hat(1)[row], run.x0_hat(1)[row // 3])
    final = found.latents[-1]
    assert len({tuple(row.flatten().tolist()[:3]) for row in final}) == 6
    # Their noise follows from their names and not from what runs beside them.
    named = branches(lens, run.rows([1]), 1, 3, names=[1], **{**inputs, "prompt": "draw the circle"})
    torch.testing.assert_close(named.latents, found.latents[:, 3:], rtol=1e-4, atol=1e-4)


def test_an_ancestral_step_mixes_predicted_and_fresh_noise(lens: dl.Lens) -> None:
    run, inputs = clean(lens)
    sigma, lower = (float(value) for value in run.sigmas[1:3])
    many = branches(lens, run, 1, 200, decode=False, **inputs).latents[2]
    predicted = (run.latents[1] - (1 - sigma) * run.x0_hat(1)) / sigma
    kept = (1 - sigma) * lower / ((1 - lower) * sigma)
    noise = (many - (1 - lower) * run.x0_hat(1)) / lower
    assert float((noise.mean(0) - kept * predicted[0]).abs().mean()) < 0.1
    assert float((noise - kept * predicted).std()) == pytest.approx((1 - kept**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("scheduler", [None, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)])
def test_without_guidance_they_start_from_the_guided_state(lens: dl.Lens, scheduler: Any) -> None:
    if scheduler is not None:
        lens.pipe.scheduler = scheduler
    run, inputs = clean(lens)
    found = branches(lens, run, 2, 2, **{**inputs, **UNGUIDED})
    assert found.branches == ("cond",)
    assert torch.equal(found.latents[2], run.latents[2].expand_as(found.latents[2]))
    assert torch.allclose(found.x0_hat(2), run.x0_hat(2, "cond").expand_as(found.x0_hat(2)), atol=1e-5)


def test_the_other_ways_change_the_next_step_alone(lens: dl.Lens) -> None:
    run, inputs = clean(lens)
    sigma = float(run.sigmas[2])
    renoised = branches(lens, run, 1, 150, "renoised", decode=False, **inputs)
    noise = (renoised.latents[2] - (1 - sigma) * run.x0_hat(1)) / sigma
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    replaced = branches(lens, run, 1, 150, "replaced", decode=False, **inputs)
    assert float(replaced.latents[2].std()) == pytest.approx(1, abs=0.02)
    assert torch.allclose(replaced.latents[2], noise, atol=1e-4), "the same noise, with and without the video"


def test_there_is_nothing_to_branch_from_at_the_end(lens: dl.Lens) -> None:
    run, inputs = clean(lens)
    with pytest.raises(InputError, match="a run of 4 steps after step 0 to 2, and not 3"):
        branches(lens, run, 3, 2, **inputs)
    with pytest.raises(InputError, match="no way 'sideways'; write ancestral, renoised, replaced"):
        branches(lens, run, 1, 2, "sideways", **inputs)


def test_refused_ancestral_steps(lens: dl.Lens) -> None:
    run, inputs = clean(lens)
    with pytest.raises(InputError, match="before step 0 there is no x0-hat to go on from; choose steps from 1"):
        lens.run(**inputs, edits=dl.ReplaceLatents("all", noise=1, how="ancestral"))
    with pytest.raises(InputError, match="takes no donor; write noise=seed"):
        dl.ReplaceLatents(1, donor=run, how="ancestral")


def answered(sample: Any, *weights: float) -> Tensor:
    """A blend of the true videos of a sample's answers."""
    clips = [board.paint(sample.task.draw(sample.puzzle, answer, 17)) / 255 for answer in sample.answers]
    return torch.from_numpy(sum(w * clip for w, clip in zip(weights, clips, strict=True))).float()


def as_run(videos: Tensor) -> dl.Run:
    """A run of one step with these videos, which are its latents too."""
    one: dict[str, Any] = {"seeds": (0,) * len(videos), "prompts": ("",) * len(videos), "layout": Layout(5, 8, 8)}
    one |= {"timesteps": (1000.0,), "sigmas": torch.ones(1), "experts": ("transformer",), "branches": (), "weights": (None,)}
    return dl.Run(**one, scheduler="none", latents=torch.stack([as_latents(videos)] * 2), outputs={}, video=videos)


def as_latents(videos: Tensor) -> Tensor:
    """A codec without loss and far from linear: of a blend in latents, the picture shows the stronger part."""
    return (videos.movedim(-1, 1) - 0.5).sign() * (2 * videos.movedim(-1, 1) - 1).abs() ** 0.2


def as_video(latents: Tensor) -> Tensor:
    """The other way round."""
    return ((latents.sign() * latents.abs() ** 5 + 1) / 2).movedim(1, -1).float()


def test_endings_beside_what_x0_hat_shows() -> None:
    samples = [s for s in reasoner.task("maze-loops").first(8, several=True) if len(s.answers) == 2][:3]
    even = torch.stack([answered(sample, 0.5, 0.5) for sample in samples])
    one, other = (torch.stack([answered(sample, *w) for sample in samples]) for w in ((1, 0), (0, 1)))

    def table(hats: Tensor, *endings: Tensor) -> pd.DataFrame:
        """Endings of each sample, with videos in the place of latents."""
        lens = SimpleNamespace(decode=as_video, encode=as_latents)
        blends = Blends(lens, one)
        return endings_table(
            lens, samples, as_latents(hats), as_run(torch.stack(endings, dim=1).flatten(0, 1)), as_run(one), blends
        )

    live = table(even, one, other, one, other)
    assert live[["held_0", "held_1", "end_0", "end_1", "blend_true", "blend_held"]].to_numpy() == pytest.approx(
        np.tile([0.5] * 6, (3, 1)), abs=0.03
    )
    assert live["differ"].to_numpy() == pytest.approx(2 / 3, abs=0.03)  # four of six pairs
    assert live["changed"].tolist() == live["lost"].tolist() == [0.5] * 3
    assert live["accepted"].tolist() == [1] * 3
    # A blur over a choice that was made: all endings are one answer.
    assert (live["spread"] > 0).all()
    assert (live["bias"].abs() <= live["spread"] / 4 + 1e-7).all(), "their mean is x0-hat to the last"
    made = table(even, one, one, one, one)
    assert (made["bias"] > 0).all()
    assert made["spread"].to_numpy() == pytest.approx(0)
    assert made["differ"].to_numpy() == pytest.approx(0, abs=0.03)
    assert made["held_differ"].to_numpy() == pytest.approx(0.5, abs=0.03)
    empty = table(even, *[one[:, :1].expand_as(one)] * 4)
    assert empty["drawn"].tolist() == empty["accepted"].tolist() == [0] * 3
    assert empty["lost"].tolist() == [1] * 3
    assert empty[["differ", "changed", "end_0"]].isna().all(axis=None)
    named = {"step": 1, "way": "ancestral", "branch": "cond", "seed": 0}
    found = with_distances(pd.concat([live, made.assign(seed=1), empty.assign(seed=2)]).assign(**{"seed": 0, **named}))
    assert found["distance"].to_numpy()[:6] == pytest.approx([0] * 3 + [0.5] * 3, abs=0.05)
    assert found["distance"][6:].isna().all()
    assert found["apart"][3:6].to_numpy() == pytest.approx(0.5, abs=0.06)
    assert found["apart"][:3].to_numpy() == pytest.approx(-1 / 6, abs=0.05)  # four draws meet a fair coin better than chance
    assert found["floor"][:6].between(0.12, 0.25).all()  # of four draws of a fair coin: 3/16


def test_shuffled_distances_are_to_another_samples_endings() -> None:
    table = pd.DataFrame(
        {
            **{"task": "t", "sample": [0, 1, 2], "answers": [2, 2, 3], "step": 1, "way": "w", "branch": "b", "seed": 0},
            **{"endings": 4, "held_0": [1.0, 0.0, 1.0], "held_1": [0.0, 1.0, 0.0], "held_2": [np.nan, np.nan, 0.0]},
            **{"end_0": [1.0, 0.0, 1.0], "end_1": [0.0, 1.0, 0.0], "end_2": [np.nan, np.nan, 0.0]},
            "differ": 0.0,
        }
    )
    found = with_distances(table)
    assert found["distance"].tolist() == [0, 0, 0]
    assert found["shuffled"].tolist()[:2] == [1, 1]
    assert found["apart"].tolist() == [0, 0, 0]
    assert found["apart_shuffled"].tolist()[:2] == [2, 2]
    assert np.isnan(found["shuffled"][2]), "there is no other sample with three answers"
    assert found["floor"].tolist() == [0, 0, 0]


def test_few_endings_do_not_make_the_squared_distance_larger() -> None:
    random = np.random.default_rng(0)
    shares = random.dirichlet([1, 1], size=3000)
    draws = np.stack([np.eye(2)[random.choice(2, 3, p=share)] for share in shares])
    differ = [metrics.pairs_differ(each) for each in draws]
    table = pd.DataFrame(
        {"held_0": shares[:, 0], "held_1": shares[:, 1], "end_0": draws.mean(1)[:, 0], "end_1": draws.mean(1)[:, 1]}
    )
    table = table.assign(task="t", sample=range(3000), answers=2, step=1, way="w", branch="b", seed=0, endings=3, differ=differ)
    found = with_distances(table)
    assert found["apart"].mean() == pytest.approx(0, abs=0.015)
    assert found["apart_shuffled"].mean() == pytest.approx(4 / 12, abs=0.03)  # 2 E[(u - v)^2], u and v uniform
    assert found["distance"].mean() == pytest.approx(found["floor"].mean(), abs=0.01)
