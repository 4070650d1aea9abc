"""Grouped matrix products, against products group by group in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has none")

FORMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[int] | None]] = {
    "rows": ((24, 8), (3, 8, 16), [4, 4, 24]),
    "columns": ((3, 16, 8), (8, 24), [8, 16, 24]),
    "inner": ((16, 24), (24, 8), [8, 8, 24]),
    "batches": ((3, 16, 8), (3, 8, 16), None),
    "rows of no group": ((24, 8), (3, 8, 16), [4, 12, 20]),
}


def by_groups(a: Tensor, b: Tensor, ends: list[int] | None) -> Tensor:
    if ends is None:
        return a @ b
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, s] @ b[s] for s in spans])
    if a.dim() == 2:
        return torch.cat([a[s] @ b[g] for g, s in enumerate(spans)])
    return torch.cat([a[g] @ b[:, s] for g, s in enumerate(spans)], -1)


def grouped(a: Tensor, b: Tensor, ends: list[int] | None) -> Tensor:
    if ends is None:
        return F.grouped_mm(a, b)
    y = F.grouped_mm(a, b, offs=torch.tensor(ends, dtype=torch.int32))
    return y[: ends[-1]] if a.dim() < b.dim() else y


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((ours.detach().double() - expected.detach()).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_products(form: str, dtype: torch.dtype, tolerance: float) -> None:
    *shapes, ends = FORMS[form]
    exact = [(normal(shape, seed) / 3).to(dtype).double().requires_grad_() for seed, shape in enumerate(shapes)]
    a, b = (nn.Parameter(t.detach().to(dtype)) for t in exact)
    loss = lambda a, b, product: product(a, b, ends).tanh().float().pow(2).sum()
    v = [torch.stack([normal(shape, 5 + k) for k in range(3)]).to(dtype).double() for shape in shapes]
    value = (by_groups(*exact, ends).tanh() ** 2).sum()
    gradients = torch.autograd.grad(value, exact, create_graph=True)
    expected = [
        torch.cat([p.reshape(-1) for p in torch.autograd.grad(gradients, exact, u, retain_graph=True)])
        for u in zip(*v, strict=True)
    ]
    H = imstep.Hessian(lambda: loss(a, b, grouped), [a, b])
    V = torch.cat([t.flatten(1) for t in v], 1).float()
    for u, product in zip(V, expected, strict=True):
        close(H @ u, product, tolerance)
    close(H @ V.T, torch.stack(expected, 1), tolerance)
    _, pushed = imstep.jvp(lambda a, b: grouped(a, b, ends), (a, b), tuple(t[0].to(dtype) for t in v))
    expected = torch.func.jvp(lambda a, b: by_groups(a, b, ends), tuple(exact), tuple(t[0] for t in v))[1]
    close(pushed, expected, tolerance)


class Mixture(nn.Module):
    """Two linear layers for each expert; tokens sorted by expert, with their weights, as transformers does it."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(normal((experts, width, 16), 1).float() / 3)
        self.down = nn.Parameter(normal((experts, 16, width), 2).float() / 3)

    def forward(self, x: Tensor, product=F.grouped_mm) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        order = chosen.reshape(-1).argsort(stable=True)
        ends = torch.bincount(chosen.reshape(-1), minlength=len(self.up)).cumsum(0, dtype=torch.int32)
        tokens = x.repeat_interleave(2, 0)[order]
        z = product(F.silu(product(tokens, self.up, offs=ends)), self.down, offs=ends)
        return torch.zeros_like(x).index_add(0, order // 2, z * weights.reshape(-1, 1)[order])


@pytest.mark.parametrize("make", [imstep.NewtonKrylov, imstep.NewtonKrylov.for_batches])
def test_mixture_of_experts(make) -> None:
    torch.manual_seed(0)
    model, x = Mixture(), normal((12, 8), 3).float()
    loop = lambda a, b, offs: by_groups(a, b, offs.tolist())
    closures = [lambda p=p: F.mse_loss(model(x, p), x.sin()) for p in (F.grouped_mm, loop)]
    products = [imstep.Hessian(closure, model) for closure in closures]
    v = normal((products[0].shape[1],), 4).float()
    close(products[0] @ v, (products[1] @ v).double(), 1e-5)
    optimizer = make(model.parameters())
    losses = [float(optimizer.step(closures[0])) for _ in range(5)]
    assert losses[-1] < losses[0]
