"""Planted models do what they say, and every entry of the table of tools holds, checked without the library's edits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from playback import BRANCHES, FRAME_TOKENS, Change, Moment, Played, attributed, play
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import dit_lens as dl
from dit_lens.plants import KINDS, TABLE, TOOLS, Pair, Planted, planted
from dit_lens.plants.table import Place

EVERY = (*KINDS, "none")
SEEDS = (0, 1, 2)


def effect(model: Planted, pair: Pair, clean: Tensor, edited: Tensor) -> Tensor:
    """How far each row went from the clean answer to the donor's: 0 not at all, 1 all the way."""
    return (model.answer(clean) - model.answer(edited)) / (2 * pair.clean.answer)


def given(played: Played, site: str, place: int, row: int = 0) -> Callable[[Tensor, Moment], Tensor]:
    """What a run that was kept had at a site."""
    return lambda value, moment: played.sites[site, place, *moment][row]


def in_frame(played: Played, frame: int, place: int) -> Callable[[Tensor, Moment], Tensor]:
    """The stream with the tokens of one frame from a run that was kept."""
    tokens = slice(0, FRAME_TOKENS) if frame == 0 else slice(-FRAME_TOKENS, None)

    def make(value: Tensor, moment: Moment) -> Tensor:
        value = value.clone()
        value[tokens] = played.sites["resid", place, *moment][0, tokens]
        return value

    return make


def one_head(played: Played, place: int, head: int) -> Callable[[Tensor, Moment], Tensor]:
    """All heads with one of them from a run that was kept."""

    def make(value: Tensor, moment: Moment) -> Tensor:
        value = value.clone()
        value[:, head * 16 : head * 16 + 16] = played.sites["heads", place, *moment][0][:, head * 16 : head * 16 + 16]
        return value

    return make


def edits(model: Planted, donor: Played, pool: Played) -> list[tuple[str, Place, Change]]:
    """Every edit of every tool, as changes of the playback; a tool that draws stands there with all that it can draw."""
    made: list[tuple[str, Place, Change]] = []
    for block in range(model.blocks):
        made += [
            (site, block, Change(site, block, given(donor, site, block)))
            for site in ("resid", "update", "attn", "cross_attn", "mlp")
        ]
        made += [("heads", (block, head), Change("heads", block, one_head(donor, block, head))) for head in range(4)]
        made += [
            ("resid_first_frame", block, Change("resid", block, in_frame(donor, 0, block))),
            ("resid_last_frame", block, Change("resid", block, in_frame(donor, -1, block))),
            ("zero", block, Change("update", block, lambda value, moment: torch.zeros_like(value))),
            ("skip", block, Change("update", block, lambda value, moment: torch.zeros_like(value))),
            ("mean", block, Change("update", block, lambda value, moment, b=block: pool.sites["update", b, *moment].mean(0))),
            ("knockout_text", block, Change("cross_heads", block, lambda value, moment: torch.zeros_like(value))),
            ("knockout_first_frame", block, Change("knockout", block, lambda value, moment: value)),
        ]
        made += [("resample", block, Change("update", block, given(pool, "update", block, row))) for row in range(4)]
    block = model.truth.block or 1
    update = given(donor, "update", block)
    made += [("update_by_branch", branch, Change("update", block, update, branches=[branch])) for branch in BRANCHES]
    for step in range(model.steps):
        made += [
            ("update_by_step", step, Change("update", block, update, steps=[step])),
            ("latents", step, Change("latents", step, lambda value, moment: donor.latents[moment[0]][0])),
        ]
    return made


def readable(model: Planted, count: int = 48) -> list[float]:
    """Whether a linear probe reads the answer from the stream of its frame after each block: 1 yes, 0 no better than chance."""
    samples = [pair.clean for pair in model.pairs(count, seed=7)]
    played = play(model, samples, keep=True)
    truth = model.truth
    where = (truth.step or 0, truth.branches[0])
    tokens = slice(0, FRAME_TOKENS) if truth.frame == 0 else slice(-FRAME_TOKENS, None)
    asked = np.array([sample.answer for sample in samples])
    order = np.random.default_rng(0).permutation(count)
    train, test = order[: count // 2], order[count // 2 :]
    found = []
    for block in range(model.blocks):
        features = played.sites["resid", block, *where][:, tokens].mean(1).numpy()
        features = features - features[train].mean(0)
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(features[train], asked[train])
        found.append(2 * probe.score(features[test], asked[test]) - 1)
    return found


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_entry_of_the_table_holds(kind: str, seed: int) -> None:
    model = planted(kind, seed=seed)
    pair, *others = model.pairs(5, seed=seed)
    clean, donor = (play(model, [sample], keep=True) for sample in (pair.clean, pair.donor))
    pool = play(model, [other.clean for other in others], keep=True)
    made = edits(model, donor, pool)
    edited = play(model, [pair.clean], [[change] for _, _, change in made])
    effects = effect(model, pair, clean.final, edited.final).tolist()
    seen: dict[str, dict[Place, list[float]]] = {tool: {} for tool in TOOLS}
    for (tool, place, _), size in zip(made, effects, strict=True):
        seen[tool].setdefault(place, []).append(size)
    predicted = attributed(model, pair.clean, clean, donor)
    seen["attribution"] = {block: [-moved / (2 * pair.clean.answer)] for block, moved in enumerate(predicted)}
    for tool in set(TOOLS) - {"probe"}:
        expected = model.expected(tool)
        assert set(seen[tool]) == set(expected), tool
        for place, sizes in seen[tool].items():
            near = 0.05 if expected[place] == 0 else 0.15 * max(1, abs(expected[place]))
            assert abs(np.mean(sizes) - expected[place]) < near, (tool, place, sizes, expected[place])


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_probe_reads_what_the_table_says(kind: str, seed: int) -> None:
    model = planted(kind, seed=seed)
    expected = model.expected("probe")
    for block, accuracy in enumerate(readable(model)):
        assert accuracy > 0.9 if expected[block] else abs(accuracy) < 0.6, (block, accuracy, expected)
