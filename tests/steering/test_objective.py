"""Equations (1) to (5) against loops that follow them line by line, and against section 1.2's expansion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stride_captum.steering.objective import combined, fidelity, linearity, stability, subset_responses
from stride_captum.subsets import members, random_subsets, sketch, sketch_projection

K, N_BATCH, N_CLASSES, RANK, N_TRAIN = 3, 7, 4, 5, 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, shift = normal(K, N_BATCH, N_CLASSES), normal(K, N_BATCH, N_CLASSES, seed=1)
    labels = torch.arange(K * N_BATCH).reshape(K, N_BATCH) % N_CLASSES
    mask = torch.arange(N_BATCH) < torch.tensor([[7], [4], [1]])
    return logits, shift, labels, mask


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def test_fidelity_is_equation_1(batch):
    logits, shift, labels, mask = batch
    for used in (None, mask):
        slow = []
        for k in range(K):
            members_of_k = [i for i in range(N_BATCH) if used is None or used[k, i]]
            total = 0.0
            for i in members_of_k:
                q = softmax([float(z + s) for z, s in zip(logits[k, i], shift[k, i], strict=True)])
                total += -math.log(q[int(labels[k, i])])
            slow.append(total / len(members_of_k))
        torch.testing.assert_close(fidelity(logits, shift, labels, used), torch.tensor(slow).double())


def test_stability_is_equation_2(batch):
    logits, shift, _, mask = batch
    for used in (None, mask):
        slow = []
        for k in range(K):
            outside = [i for i in range(N_BATCH) if used is None or used[k, i]]
            total = 0.0
            for i in outside:
                p = softmax(logits[k, i].tolist())
                q = softmax([float(z + s) for z, s in zip(logits[k, i], shift[k, i], strict=True)])
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            slow.append(total / len(outside))
        torch.testing.assert_close(stability(logits, shift, used), torch.tensor(slow).double())


def test_subset_responses_are_equation_3(batch):
    _, shift, _, mask = batch
    slow = [
        sum(max(shift[k, i].tolist()) for i in range(N_BATCH) if mask[k, i]) / int(mask[k].sum())
        for k in range(K)
    ]
    torch.testing.assert_close(subset_responses(shift, mask), torch.tensor(slow).double())


def projected_residual(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Equation (4) as printed, with an explicit inverse."""
    inverse = torch.linalg.inv(x.T @ x + gamma * torch.eye(x.shape[1], dtype=x.dtype))
    return ((x @ (inverse @ x.T @ y)) - y).square().sum()


@pytest.mark.parametrize("width", [3, 64])
def test_linearity_by_example_is_equation_4_with_indicator_rows(width):
    membership = random_subsets(N_TRAIN, K, 6, seed=3)
    projection = sketch_projection(N_TRAIN, width)
    rows = torch.tensor([members(membership, k).tolist() for k in range(K)])
    y = normal(K, 6)
    slow = []
    for k in range(K):
        indicators = torch.zeros(6, N_TRAIN, dtype=torch.float64)
        for i, example in enumerate(members(membership, k)):
            indicators[i, example] = 1
        slow.append(projected_residual(indicators @ projection, y[k], 0.7))
    torch.testing.assert_close(linearity(y, projection[rows], 0.7), torch.stack(slow))


@pytest.mark.parametrize("width", [4, 64])
def test_linearity_by_subset_is_equation_4_with_the_sketch_of_the_membership(width):
    membership = random_subsets(N_TRAIN, 9, 6, seed=3)
    x = torch.from_numpy(membership.toarray()) @ sketch_projection(N_TRAIN, width)
    y = normal(9)
    torch.testing.assert_close(
        linearity(y, sketch(membership, N_TRAIN, width), 0.7), projected_residual(x, y, 0.7)
    )


def test_linearity_ignores_rows_of_zeros_and_vanishes_on_the_sketch_s_range():
    x, y = normal(8, 3), normal(8)
    padded_x, padded_y = torch.cat([x, torch.zeros(4, 3).double()]), torch.cat([y, torch.zeros(4).double()])
    torch.testing.assert_close(linearity(y, x, 0.5), linearity(padded_y, padded_x, 0.5))
    in_range = x @ normal(3)
    assert linearity(in_range, x, 1e-9) < 1e-15 * in_range.square().sum()
    assert linearity(y, x, 1e-9) > 0.1


def test_linearity_keeps_its_digits_in_float32_with_a_tiny_ridge():
    x, y = normal(5, 64), normal(5)
    exact = linearity(y, x, 1e-3)
    torch.testing.assert_close(linearity(y.float(), x.float(), 1e-3).double(), exact, rtol=1e-3, atol=0)


def test_combined_is_equation_5():
    fid, stab, lin = normal(K), normal(K, seed=1), normal(K, seed=2)
    slow = sum(0.5 * fid[k] + 2 * stab[k] + 10 * lin[k] for k in range(K))
    total = combined(fid, stab, lin, fidelity_weight=0.5, stability_weight=2, linearity_weight=10)
    torch.testing.assert_close(total, slow)
    torch.testing.assert_close(combined(fid, stab), (fid + stab).sum())


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    phi, logits = normal(N_TRAIN, RANK), normal(N_TRAIN, N_CLASSES, seed=1)
    return phi, logits, logits.softmax(-1), torch.arange(N_TRAIN) % N_CLASSES


def test_gradient_of_fidelity_at_zero_is_minus_the_mean_of_phi_times_residual():
    phi, logits, p, labels = problem()
    a = torch.zeros(RANK, N_CLASSES, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fidelity(logits, phi @ a, labels), a)
    expected = torch.zeros_like(gradient)
    for i in range(N_TRAIN):
        residual = torch.eye(N_CLASSES, dtype=torch.float64)[labels[i]] - p[i]
        expected -= torch.outer(phi[i], residual) / N_TRAIN
    torch.testing.assert_close(gradient, expected)


def fisher(phi: Tensor, p: Tensor) -> Tensor:
    """`E[phi phi^T (x) (diag p - p p^T)]`, `(r C, r C)`."""
    blocks = [
        torch.kron(torch.outer(f, f), torch.diag(q) - torch.outer(q, q)) for f, q in zip(phi, p, strict=True)
    ]
    return torch.stack(blocks).mean(0)


def test_stability_at_zero_has_no_value_no_gradient_and_the_fisher_as_hessian():
    phi, logits, p, _ = problem()
    zero = torch.zeros(RANK * N_CLASSES, dtype=torch.float64)

    def loss(flat: Tensor) -> Tensor:
        return stability(logits, phi @ flat.reshape(RANK, N_CLASSES))

    assert float(loss(zero)) == 0
    torch.testing.assert_close(torch.autograd.functional.jacobian(loss, zero), zero)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, zero), fisher(phi, p))


@pytest.mark.slow
def test_the_minimiser_divided_by_the_fidelity_weight_tends_to_the_closed_form():
    phi, logits, p, labels = problem()
    chosen, damping = torch.tensor([0, 3, 4, 11]), 0.1
    residuals = torch.eye(N_CLASSES, dtype=torch.float64)[labels] - p
    right = (phi[chosen].T @ residuals[chosen] / len(chosen)).flatten()
    penalty = damping * torch.eye(RANK * N_CLASSES, dtype=torch.float64)
    closed_form = torch.linalg.solve(fisher(phi, p) + penalty, right)

    def minimizer(weight: float) -> Tensor:
        def objective(flat: Tensor) -> Tensor:
            shift = phi @ flat.reshape(RANK, N_CLASSES)
            fid = fidelity(logits[chosen], shift[chosen], labels[chosen])
            fit = combined(fid, stability(logits, shift), fidelity_weight=weight)
            return fit + 0.5 * damping * flat.square().sum()

        flat = torch.zeros(RANK * N_CLASSES, dtype=torch.float64)
        for _ in range(20):
            gradient = torch.autograd.functional.jacobian(objective, flat)
            flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(objective, flat), gradient)
        return flat

    gaps = [float((minimizer(w) / w - closed_form).norm() / closed_form.norm()) for w in (0.1, 0.01, 0.001)]
    assert gaps[2] < 5e-3
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.3)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.3)
