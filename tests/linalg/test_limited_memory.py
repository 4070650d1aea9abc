"""Preconditioners that learn from an earlier solve."""

import pytest
import torch

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    IdentityOperator,
    LimitedMemoryPreconditioner,
    RelativeResidual,
    conjugate_gradient,
)

F64 = torch.float64


def bfgs(base, pairs, damping):
    """The BFGS formula on dense matrices, one pair after the other."""
    matrix, identity = base, torch.eye(len(base), dtype=F64)
    for p, image in pairs:
        y = image + damping * p
        v = identity - torch.outer(y, p) / (p @ y)
        matrix = v.T @ matrix @ v + torch.outer(p, p) / (p @ y)
    return matrix


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_it_is_the_bfgs_formula(with_spectrum, normal, damping):
    matrix, _ = with_spectrum(torch.logspace(-1, 1, 8, dtype=F64))
    base = DiagonalOperator(1 + normal(8).abs())
    pairs = [(p, matrix @ p) for p in (normal(8, seed=s) for s in range(4))]
    made = LimitedMemoryPreconditioner(base, pairs, damping)
    torch.testing.assert_close(made.to_dense(), bfgs(base.to_dense(), pairs, damping))
    p, image = pairs[-1]
    torch.testing.assert_close(made @ (image + damping * p), p)


def test_all_directions_of_a_solve_give_the_inverse(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-0.5, 0.5, 8, dtype=F64))
    operator = DenseOperator(matrix)
    result = conjugate_gradient(operator, normal(8), stopping=[RelativeResidual(1e-13)], keep_pairs=8)
    made = LimitedMemoryPreconditioner(IdentityOperator.like(operator), result.pairs)
    assert len(made) == 8
    torch.testing.assert_close(made.to_dense(), torch.linalg.inv(matrix), rtol=1e-6, atol=1e-8)


def test_the_next_solve_is_shorter_and_finds_the_same(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-3, 1, 60, dtype=F64))
    operator, rule = DenseOperator(matrix), [RelativeResidual(1e-9)]
    first = conjugate_gradient(operator, normal(60), stopping=rule, keep_pairs=60)
    nearby, rhs = DenseOperator(matrix + 1e-4 * torch.eye(60, dtype=F64)), normal(60, seed=5)
    made = LimitedMemoryPreconditioner(IdentityOperator.like(operator), first.pairs)
    plain = conjugate_gradient(nearby, rhs, stopping=rule)
    learnt = conjugate_gradient(nearby, rhs, stopping=rule, preconditioner=made)
    assert learnt.products < plain.products / 2
    torch.testing.assert_close(learnt.solution, plain.solution, rtol=1e-4, atol=1e-5)


def test_pairs_are_the_last_directions(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-1, 1, 20, dtype=F64))
    result = conjugate_gradient(DenseOperator(matrix), normal(20), keep_pairs=3)
    assert len(result.pairs) == 3
    for p, image in result.pairs:
        torch.testing.assert_close(image, matrix @ p)
    assert conjugate_gradient(DenseOperator(matrix), normal(20)).pairs == ()


def test_pairs_that_prove_nothing_are_left_out():
    base = IdentityOperator(3, dtype=F64)
    e = torch.eye(3, dtype=F64)
    bad = [(e[0], -e[0]), (e[1], 1e-9 * e[1] + e[2]), (e[2], torch.full((3,), torch.nan, dtype=F64))]
    made = LimitedMemoryPreconditioner(base, bad)
    assert len(made) == 0
    torch.testing.assert_close(made.to_dense(), torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match="damping"):
        LimitedMemoryPreconditioner(base, [], damping=-1.0)
