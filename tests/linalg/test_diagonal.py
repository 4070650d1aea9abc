"""Hutchinson's diagonal and diagonal preconditioners."""

import itertools
import math

import pytest
import torch
from linalg_cases import Counted

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    RelativeResidual,
    conjugate_gradient,
    diagonal_preconditioner,
    hutchinson_diagonal,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_diagonal_matrix_needs_one_probe(normal):
    operator = Counted(torch.diag(normal(10)))
    estimate = hutchinson_diagonal(operator, 1, generator=seeded())
    torch.testing.assert_close(estimate.mean, normal(10))
    assert estimate.products == operator.products == 1
    assert estimate.standard_error.isnan().all()
    assert hutchinson_diagonal(operator, 3, generator=seeded()).standard_error.max() < 1e-7


def test_the_estimate_is_the_mean_over_its_own_signs(with_spectrum):
    matrix, _ = with_spectrum([3.0, -1.0, 0.5])
    estimate = hutchinson_diagonal(DenseOperator(matrix), 11, generator=seeded(), block=11)
    signs = 2.0 * torch.randint(2, (3, 11), generator=seeded()) - 1
    samples = signs * (matrix @ signs.double())
    torch.testing.assert_close(estimate.mean, samples.mean(dim=1))
    torch.testing.assert_close(estimate.standard_error, samples.std(dim=1) / math.sqrt(11))


def test_mean_and_variance_are_those_of_theory(with_spectrum):
    """Over all sign vectors the mean is the diagonal; over many estimates the spread is √(Σ_{j≠i} aᵢⱼ² / k)."""
    matrix, _ = with_spectrum(torch.linspace(-1.0, 4.0, 8))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=F64).T
    torch.testing.assert_close((signs * (matrix @ signs)).mean(dim=1), matrix.diag())
    expected = ((matrix**2).sum(dim=1) - matrix.diag() ** 2).sqrt() / math.sqrt(20)
    estimates = [hutchinson_diagonal(DenseOperator(matrix), 20, generator=seeded(s)) for s in range(400)]
    means = torch.stack([estimate.mean for estimate in estimates])
    torch.testing.assert_close(means.std(dim=0), expected, rtol=0.2, atol=0)
    assert ((means.mean(dim=0) - matrix.diag()).abs() < 5 * expected / math.sqrt(400)).all()
    reported = torch.stack([estimate.standard_error for estimate in estimates]).mean(dim=0)
    torch.testing.assert_close(reported, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_blocks_and_seeds(with_spectrum, dtype):
    matrix, _ = with_spectrum(torch.linspace(-1.0, 4.0, 8))
    operator = Counted(matrix.to(dtype))
    first, same = (hutchinson_diagonal(operator, 10, generator=seeded(3), block=4) for _ in range(2))
    assert first.mean.equal(same.mean)
    assert first.mean.dtype is dtype
    assert operator.products == 20
    assert not hutchinson_diagonal(operator, 10, generator=seeded(4), block=4).mean.equal(first.mean)


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_the_preconditioner_is_its_formula(normal, power):
    d = normal(50)
    P = diagonal_preconditioner(d, damping=0.2, power=power, floor=0.1)
    sizes = torch.maximum(d.abs(), 0.1 * d.abs().mean())
    torch.testing.assert_close(P.diagonal, 1 / (sizes + 0.2) ** power)
    assert (diagonal_preconditioner(torch.zeros(3)) @ torch.ones(3)).equal(torch.ones(3))


@pytest.mark.parametrize("power", [0.75, 1.0])
def test_solutions_agree_and_come_faster(with_spectrum, normal, power):
    sizes = torch.logspace(-2, 2, 80, dtype=F64)
    matrix = sizes[:, None] * with_spectrum(torch.linspace(1.0, 4.0, 80))[0] * sizes
    estimate = hutchinson_diagonal(DenseOperator(matrix), 20, generator=seeded())
    P = diagonal_preconditioner(estimate.mean, damping=1e-4, power=power, floor=1e-9)
    plain, faster = (
        conjugate_gradient(
            DenseOperator(matrix), normal(80), damping=1e-4, preconditioner=p, stopping=[RelativeResidual(1e-8)]
        )
        for p in (None, P)
    )
    expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(80, dtype=F64), normal(80))
    assert faster.status is KrylovStatus.CONVERGED
    torch.testing.assert_close(faster.solution, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.solution, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert faster.products < plain.products / 3


@pytest.mark.parametrize(
    "call",
    [
        lambda A, g: hutchinson_diagonal(A, 0, generator=g),
        lambda A, g: hutchinson_diagonal(A, 1, generator=g, block=0),
        lambda A, g: diagonal_preconditioner(torch.ones(3), damping=-1.0),
        lambda A, g: diagonal_preconditioner(torch.ones(3), power=0.0),
        lambda A, g: diagonal_preconditioner(torch.ones(3), power=1.5),
        lambda A, g: diagonal_preconditioner(torch.ones(3), floor=0.0),
        lambda A, g: diagonal_preconditioner(torch.ones(3, 3)),
    ],
)
def test_misuse_is_explained(call):
    with pytest.raises(ValueError, match="got"):
        call(DiagonalOperator(torch.ones(3)), seeded())
