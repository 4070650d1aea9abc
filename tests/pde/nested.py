"""Derivatives with respect to points by nested reverse mode, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep import pde


def reference(field, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, all first and all pure second derivatives by reverse mode, component by component."""
    x = points.detach().requires_grad_()
    u = _real(field(x))
    parts = u.reshape(len(x), -1)
    first, second = (x.new_zeros(len(x), parts.shape[1], x.shape[1]) for _ in range(2))
    for j in range(parts.shape[1]):
        (slope,) = torch.autograd.grad(parts[:, j].sum(), x, create_graph=True, materialize_grads=True)
        first[:, j] = slope.detach()
        for i in range(x.shape[1]):
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True, materialize_grads=True)
                second[:, j, i] = bend[:, i]
    shape = (*u.shape, x.shape[1])
    return u.detach(), first.reshape(shape), second.reshape(shape)


def points(count: int = 7, dimension: int = 3) -> Tensor:
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agrees(field, plain=None, count: int = 7) -> None:
    """Whether all derivatives of a field are those of ``plain``, or else its own."""
    x = points(count)
    plain = field if plain is None else plain
    u, first, second = reference(plain, x)
    got = pde.expand(field, x, second=[2, 0], laplacian=[0, 2])
    close = lambda a, b: torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-11)
    close(_real(got.value), u)
    close(_real(got.first, -2), first)
    close(_real(got.second, -2), second[..., [2, 0]])
    close(_real(got.laplacian), second[..., 0] + second[..., 2])
    close(_real(pde.laplacian(field, x)), second.sum(-1))
    close(_real(pde.gradient(field, x), -2), first)


def _real(t: Tensor, at: int = -1) -> Tensor:
    """Real and imaginary parts side by side as axis ``at``, if there are any."""
    return torch.view_as_real(t).movedim(-1, at) if t.is_complex() else t
