"""Metrics: known answers, and what must hold of any input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dit_lens import metrics


def test_motion_map_is_the_mean_change_of_a_square() -> None:
    video = torch.zeros(1, 3, 64, 64, 3)
    video[0, 1, :4, 4:8] = 0.5  # one square, in one of two later frames
    found = metrics.motion_map(video)
    assert found.shape == (1, 16, 16)
    assert found[0, 0, 1] == pytest.approx(0.25)
    assert found.sum() == pytest.approx(0.25)


def test_motion_map_reads_other_sizes_on_the_same_board() -> None:
    small = torch.rand(2, 3, 64, 64, 3)
    large = small.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(metrics.motion_map(large), metrics.motion_map(small))


def test_a_still_video_moves_nowhere() -> None:
    assert not metrics.motion_map(torch.rand(1, 1, 64, 64, 3).expand(1, 5, 64, 64, 3)).any()


def test_map_cosine_is_one_for_scaled_maps_and_zero_for_disjoint_or_empty_ones() -> None:
    one, other = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    one[0, 0], other[0, 1] = 2.0, 1.0
    assert metrics.map_cosine(one, 3 * one) == pytest.approx(1)
    assert metrics.map_cosine(one, other) == 0
    assert metrics.map_cosine(one, torch.zeros(1, 4, 4)) == 0


@pytest.mark.parametrize(
    ("evidence", "bits"), [([1.0, 0.0], 0.0), ([0.5, 0.5], 1.0), ([0.3, 0.3, 0.3, 0.3], 2.0), ([0.2, 0.6], 0.8112781)]
)
def test_answer_entropy_in_bits(evidence: list[float], bits: float) -> None:
    assert metrics.answer_entropy(np.array(evidence)) == pytest.approx(bits)


def test_entropy_is_undefined_for_one_answer_and_where_nothing_is_drawn() -> None:
    assert np.isnan(metrics.answer_entropy(np.array([1.0])))
    assert np.isnan(metrics.answer_entropy(np.array([0.04, 0.05])))


@given(arrays(float, st.integers(2, 6), elements=st.floats(0.1, 1)))
def test_entropy_lies_between_zero_and_that_of_equal_answers(evidence: np.ndarray) -> None:
    bits = metrics.answer_entropy(evidence)
    assert -1e-9 <= bits <= np.log2(len(evidence)) + 1e-9
    assert bits == pytest.approx(metrics.answer_entropy(evidence[::-1] / 1.0))


def test_answers_alive_counts_from_the_level_on() -> None:
    assert metrics.answers_alive(np.array([0.25, 0.24, 0.9])) == 2
    assert metrics.answers_alive(np.array([0.25, 0.24, 0.9]), level=0.5) == 1


def test_mask_fractions_of_tokens() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[0, 0] = mask[2:4, 2:4] = True
    found = metrics.mask_fractions(mask, (8, 8))
    assert (found[0, 0], found[1, 1], found.sum()) == (0.25, 1.0, 1.25)
    # A layout that divides no board: the area is kept all the same.
    assert metrics.mask_fractions(mask, (5, 3)).shape == (5, 3)


def test_equal_energy_has_the_share_of_the_area() -> None:
    fractions = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    share = metrics.region_share(np.ones((2, 5, 8, 8)), fractions)
    assert share == pytest.approx(np.full(2, fractions.mean()))


def test_energy_inside_only_has_share_one() -> None:
    inside = np.zeros((8, 8))
    inside[2, 3] = 1
    energy = np.zeros((5, 8, 8))
    energy[:, 2, 3] = 7
    assert metrics.region_share(energy, inside) == pytest.approx(1)


def test_resized_keeps_the_mean_and_leaves_the_right_size_alone() -> None:
    video = torch.rand(2, 3, 32, 48, 3)
    small = metrics.resized(video, 16, 16)
    assert small.shape == (2, 3, 16, 16, 3)
    torch.testing.assert_close(small.mean((2, 3)), video.mean((2, 3)))
    assert metrics.resized(small, 16, 16) is small


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 40, 6), (3, 6, 40)])
def test_cka_against_the_formula_of_centred_kernels(shape: tuple[int, int, int]) -> None:
    one, other = features(*shape), features(*shape, seed=1) + 0.5 * features(*shape)
    centre = np.eye(shape[1]) - 1 / shape[1]
    for row, found in enumerate(metrics.linear_cka(one, other, rows=2)):
        x, y = (features[row].double().numpy() for features in (one, other))
        kernels = [centre @ z @ z.T @ centre for z in (x, y)]
        hsic = [np.trace(a @ b) for a, b in ((kernels[0], kernels[1]), (kernels[0], kernels[0]), (kernels[1], kernels[1]))]
        assert found == pytest.approx(hsic[0] / np.sqrt(hsic[1] * hsic[2]), rel=1e-10)


def test_cka_of_equal_features_is_one_and_of_unrelated_ones_nearly_zero() -> None:
    one, other = features(2, 4000, 8), features(2, 4000, 8, seed=1)
    assert metrics.linear_cka(one, one).numpy() == pytest.approx(1, abs=1e-12)
    assert (metrics.linear_cka(one, other) < 0.01).all()
    assert torch.isnan(metrics.linear_cka(one, torch.ones_like(one))).all()


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_cka_knows_no_rotation_no_scale_no_shift_and_no_order(seed: int, scale: float) -> None:
    one, other = features(2, 12, 5, seed=seed), features(2, 12, 4, seed=seed + 1)
    turned = scale * one.double() @ torch.linalg.qr(features(5, 5, seed=seed + 2).double())[0] + 3.0
    before = metrics.linear_cka(one, other)
    assert ((before > 0) & (before <= 1 + 1e-12)).all()
    assert metrics.linear_cka(turned, other).numpy() == pytest.approx(before.numpy(), rel=1e-5)
    assert metrics.linear_cka(other, one).numpy() == pytest.approx(before.numpy(), rel=1e-9)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert metrics.linear_cka(one[:, order], other[:, order]).numpy() == pytest.approx(before.numpy(), rel=1e-9)


def test_chances_that_draws_differ() -> None:
    assert metrics.draws_differ(np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])).tolist() == [0.5, 0, 0.375]
    assert metrics.pairs_differ(np.eye(2)[[0, 0, 1, 1]]) == pytest.approx(4 / 6)
    assert metrics.pairs_differ(np.array([[0.5, 0.5], [0.5, 0.5]])) == pytest.approx(0.5)
    assert metrics.pairs_differ(np.array([[1.0, 0.0], [np.nan, np.nan], [1.0, 0.0]])) == 0
    assert np.isnan(metrics.pairs_differ(np.eye(2)[:1]))
    # Without bias, however few draws there are; the entropy of a few draws is not.
    random = np.random.default_rng(0)
    shares = np.array([0.6, 0.3, 0.1])
    few = [metrics.pairs_differ(np.eye(3)[random.choice(3, 3, p=shares)]) for _ in range(4000)]
    assert np.mean(few) == pytest.approx(metrics.draws_differ(shares), abs=0.02)


def test_shares_and_their_distance() -> None:
    assert metrics.answer_shares(np.array([0.2, 0.6])).tolist() == pytest.approx([0.25, 0.75])
    assert np.isnan(metrics.answer_shares(np.array([0.02, 0.03]))).all()
    assert metrics.total_variation(np.array([1.0, 0.0]), np.array([0.25, 0.75])) == pytest.approx(0.75)


def test_settled_is_the_first_step_after_which_nothing_changes() -> None:
    agrees = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 0]], dtype=bool)
    assert metrics.settled(agrees).tolist() == [2, 2, 0, 3]


def test_bias_and_spread_have_no_bias() -> None:
    random = np.random.default_rng(0)
    found = np.array([metrics.bias_and_spread(random.normal(0.3, 2, size=(4, 50)), np.zeros(50)) for _ in range(400)])
    assert found.mean(axis=0) == pytest.approx([0.09, 4.0], rel=0.15)


def test_new_content_by_parts_of_the_clip() -> None:
    final = np.zeros((7, 2, 3), dtype=np.uint8)
    for frame in range(1, 7):
        final[frame:].flat[frame - 1 :: 6] = frame  # one more square from each frame on
    nothing, half = np.zeros_like(final), final.copy()
    half[4:] = 0
    found = metrics.new_content(np.stack([nothing, half, final]), final)
    assert found.tolist() == [[0, 0, 0], [1, 0.5, 0], [1, 1, 1]]
    assert np.isnan(metrics.new_content(final[None], np.repeat(final[:1], 7, axis=0))).all()


def test_correlation_of_rows() -> None:
    random = torch.Generator().manual_seed(0)
    one = torch.randn(3, 4, 5, generator=random)
    other = torch.stack([2 * one[0] + 7, -one[1], torch.randn(4, 5, generator=random)])
    found = metrics.row_correlation(one, other)
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(one, other, strict=True)]
    assert found.tolist() == pytest.approx(expected)
    assert found[:2].tolist() == pytest.approx([1, -1])
