"""Constant sparse matrices: against dense ones, and double backward of those."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import imstep

_draw = torch.Generator().manual_seed(0)
A = torch.randn(6, 5, generator=_draw, dtype=torch.float64)
A = A * (torch.rand(6, 5, generator=_draw) > 0.5)
W, V = (torch.randn(5, 3, generator=_draw, dtype=torch.float64) for _ in range(2))

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")


def _sparse(a: Tensor, layout: torch.layout) -> Tensor:
    return a.to_sparse(layout=layout)


# The product of a with what is made of the parameters.
PRODUCTS = {
    "matrix": lambda a, h: a @ h,
    "matrix from the right": lambda a, h: h.t() @ a.t(),
    "vector": lambda a, h: a @ h[:, 0],
    "linear": lambda a, h: nn.functional.linear(h.t(), a),
    "added": lambda a, h: torch.addmm(h[0].sum().expand(6, 3), a, h, beta=2.0, alpha=3.0),
    "sum": lambda a, h: a.to_dense().sum() * h,
}
SPARSE_ONLY = {
    "sparse.mm": (lambda a, h: torch.sparse.mm(a, h), PRODUCTS["matrix"]),
    "sparse.addmm": (
        lambda a, h: torch.sparse.addmm(h[0].sum() * torch.ones(6, 3).double(), a, h, beta=2.0, alpha=3.0),
        PRODUCTS["added"],
    ),
}
CASES = {name: (f, f) for name, f in PRODUCTS.items()} | SPARSE_ONLY


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_with_a_constant(name, layout):
    f, dense = CASES[name]
    a = _sparse(A, layout)
    loss = lambda w, product, a: product(a, torch.tanh(w)).pow(3).sum()
    expected = torch.autograd.functional.hvp(lambda w: loss(w, dense, A), W, V)[1]
    found = imstep.hvp(lambda w: loss(w, f, a), W, V)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    p = W.clone().requires_grad_()
    H = imstep.Hessian(lambda: loss(p, f, a), [p])
    directions = torch.stack([V.flatten(), 2 * V.flatten(), V.flatten() ** 2], 1)
    torch.testing.assert_close(H @ V.flatten(), expected.flatten(), rtol=1e-12, atol=1e-12)
    reference = imstep.Hessian(lambda: loss(p, dense, A), [p]) @ directions
    torch.testing.assert_close(H @ directions, reference, rtol=1e-12, atol=1e-12)


def test_batches_of_matrices():
    a, w = torch.stack([A, 2 * A]), W.expand(2, 5, 3).clone()
    f = lambda a: lambda w: torch.bmm(a, torch.tanh(w)).pow(3).sum()
    directions = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = w.clone().requires_grad_()
    found = imstep.Hessian(lambda: f(a.to_sparse())(p), [p]) @ directions
    expected = [torch.autograd.functional.hvp(f(a), w, d.reshape(w.shape))[1].flatten() for d in directions.t()]
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("optimizer", [imstep.NewtonKrylov, imstep.LeastSquares])
def test_steps_are_those_with_a_dense_matrix(optimizer, layout):
    found = []
    for a in (A, _sparse(A, layout)):
        p = W.clone().requires_grad_()
        steps = optimizer([p])
        found.append([steps.step(lambda a=a, p=p: ((a @ torch.tanh(p)) - 1).square().mean()).item() for _ in range(5)])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-6, atol=1e-15)


def test_a_matrix_may_become_sparse_between_steps():
    p, at = W.clone().requires_grad_(), [A]
    steps = imstep.NewtonKrylov([p])
    for step in range(8):
        at[0] = A if step < 5 else _sparse(A, torch.sparse_csr)
        steps.step(lambda: (torch.tanh(p).t() @ at[0].t() - 1).square().mean())
    assert p.grad is None or p.grad.isfinite().all()


def test_memory_counts_indices_and_values():
    """Also where a budget holds."""
    p = torch.ones(5, dtype=torch.float64, requires_grad=True)
    a = torch.ones(1000, 5, dtype=torch.float64).to_sparse()
    loss = lambda: (a @ p).exp().sum()
    held = 5000 * 3 * 8  # two indices and a value
    assert imstep.Hessian(loss, [p]).nbytes > held
    assert imstep.Hessian(loss, [p], memory_budget=held).nbytes < held


@pytest.mark.parametrize(
    "f",
    [
        lambda w: (A.to_sparse() * w.sum()) @ w,
        lambda w: (A.to_sparse() / w.exp().sum()) @ w,
        lambda w: torch.smm(A.to_sparse(), w).to_dense(),
    ],
    ids=["multiplied", "divided", "smm"],
)
def test_sparse_results_are_refused(f):
    p = W.clone().requires_grad_()
    loss = lambda w: f(w).square().sum()
    for call in (
        lambda: imstep.jvp(loss, (W,), (V,)),
        lambda: imstep.hvp(loss, W, V),
        lambda: imstep.Hessian(lambda: loss(p), [p]),
    ):
        with pytest.raises(imstep.UnsupportedOperatorError, match="carries no imaginary part"):
            call()
