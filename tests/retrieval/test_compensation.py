import math

import pytest
import torch

from mas_embed import UserError
from mas_embed.retrieval.compensation import (
    COMPENSATIONS,
    DriftCompensation,
    ProcrustesCompensation,
    RidgeCompensation,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed=1):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def drifted_by_loops(gallery, old, new, sigma):
    """The formula of the paper, computed weight by weight."""
    moved = []
    for row in gallery.tolist():
        total, drift = 0.0, [0.0] * len(row)
        for before, after in zip(old.tolist(), new.tolist(), strict=True):
            weight = math.exp(-sum((b - r) ** 2 for b, r in zip(before, row, strict=True)) / (2 * sigma**2))
            total += weight
            drift = [d + weight * (a - b) for d, a, b in zip(drift, after, before, strict=True)]
        moved.append([r + d / total for r, d in zip(row, drift, strict=True)])
    return torch.tensor(moved, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_drift_equals_the_loops(sigma):
    old, new, gallery = random(40, 3), random(40, 3, seed=1), random(25, 3, seed=2)
    expected = drifted_by_loops(gallery, old, new, sigma)
    result = DriftCompensation(sigma).fit(old, new).transform(gallery)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_drift_of_two_items_by_hand():
    old, new = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])  # drifts 1 and 3
    near, far = 1.0, math.exp(-(2**2) / 2)
    result = DriftCompensation(sigma=1.0).fit(old, new).transform(torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(result, torch.tensor([[(near + 3 * far) / (near + far)], [1.0 + 2.0]]))


def test_far_vectors_take_the_drift_of_the_nearest_item():
    old, new = torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [3.0]])
    result = DriftCompensation().fit(old, new).transform(torch.tensor([[1e6]], dtype=torch.float64))
    assert result.item() == 1e6 + 2.0


def test_drift_does_not_depend_on_the_block_size(monkeypatch):
    old, new, gallery = random(40, 3), random(40, 3, seed=1), random(25, 3, seed=2)
    whole = DriftCompensation().fit(old, new).transform(gallery)
    monkeypatch.setattr("mas_embed.retrieval.compensation.BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(DriftCompensation().fit(old, new).transform(gallery), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", [ProcrustesCompensation(), RidgeCompensation(1e-9)], ids=["procrustes", "ridge"])
def test_a_rotated_space_is_restored(estimator):
    turn, old, gallery = rotation(6), random(50, 6), random(30, 6, seed=2)
    result = estimator.fit(old, old @ turn).transform(gallery)
    torch.testing.assert_close(result, gallery @ turn, rtol=0, atol=1e-6)


def test_ridge_restores_an_affine_map():
    matrix, offset, old, gallery = random(4, 4, seed=3), random(4, seed=4), random(50, 4), random(9, 4, seed=2)
    result = RidgeCompensation(1e-10).fit(old, old @ matrix + offset).transform(gallery)
    torch.testing.assert_close(result, gallery @ matrix + offset, rtol=0, atol=1e-6)


def test_ridge_minimises_the_documented_objective():
    old, new, strength = random(20, 3), random(20, 3, seed=1), 0.1
    mean, drift = old.mean(0), (new - old).mean(0)
    scale = ((old - mean) ** 2).sum() / 3
    slope = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    loss = (((old - mean) @ slope - (new - old - drift)) ** 2).sum() + strength * scale * (slope**2).sum()
    fitted = (
        RidgeCompensation(strength).fit(old, new).transform(mean + torch.eye(3)) - torch.eye(3) - mean - drift
    ).detach()
    (gradient,) = torch.autograd.grad(loss, slope)
    assert gradient.abs().max() > 1  # zero is not the minimum
    slope.data = fitted
    loss = (((old - mean) @ slope - (new - old - drift)) ** 2).sum() + strength * scale * (slope**2).sum()
    assert torch.autograd.grad(loss, slope)[0].abs().max() < 1e-10


def test_procrustes_is_orthogonal_and_beats_other_rotations():
    old, new = random(20, 3), random(20, 3, seed=1)
    turn = ProcrustesCompensation().fit(old, new).transform(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    best = (old @ turn - new).square().sum()
    for seed in range(50):
        other = turn if seed == 0 else rotation(3, seed=seed)
        assert (old @ other - new).square().sum() >= best


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_directions_without_data_stay_as_they_are(name):
    """The fitted items span the first two of four dimensions, and rotate in them."""
    old = torch.nn.functional.pad(random(30, 2), (0, 2))
    new = torch.nn.functional.pad(old[:, :2] @ rotation(2), (0, 2))
    moved = COMPENSATIONS[name]().fit(old, new).transform(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(moved[2:, 2:], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_without_drift_the_gallery_and_its_dtype_do_not_change(name, dtype):
    old, gallery = random(30, 5).to(dtype), random(10, 5, seed=1).to(dtype)
    result = COMPENSATIONS[name]().fit(old, old).transform(gallery)
    assert result.dtype == dtype
    torch.testing.assert_close(result, gallery)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_a_single_item_is_enough(name):
    result = COMPENSATIONS[name]().fit(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).transform(torch.eye(2))
    assert result.isfinite().all()
    torch.testing.assert_close(result[0], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_bad_input_is_one_sentence(name):
    estimator = COMPENSATIONS[name]()
    with pytest.raises(UserError, match=r"must be fitted before it transforms: call fit\(old, new\)"):
        estimator.transform(torch.ones(1, 2))
    with pytest.raises(UserError, match=r"the same items, of equal size, got \[3, 2\] and \[4, 2\]"):
        estimator.fit(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(UserError, match="new contain NaN"):
        estimator.fit(torch.ones(3, 2), torch.full((3, 2), torch.nan))
    with pytest.raises(UserError, match="old must hold at least one embedding"):
        estimator.fit(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(UserError, match="the gallery has 3 dimensions, but the compensation was fitted on 2"):
        estimator.fit(torch.ones(3, 2), torch.ones(3, 2)).transform(torch.ones(1, 3))
    for gallery, got in ((torch.ones(1, 2).long(), "torch.int64"), ([[1.0, 2.0]], "list"), (None, "NoneType")):
        with pytest.raises(UserError, match=f"the gallery must be a floating-point tensor, .* got {got}"):
            estimator.transform(gallery)


def test_bad_options_are_one_sentence():
    for value in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(UserError, match="sigma must be a finite number, got"):
            DriftCompensation(value)
        with pytest.raises(UserError, match="regularisation must be a finite number, got"):
            RidgeCompensation(value)
    with pytest.raises(UserError, match="sigma must be positive, got 0"):
        DriftCompensation(0)
    with pytest.raises(UserError, match="regularisation must be positive, got -1"):
        RidgeCompensation(-1)
