"""Residuals of losses in all forms that squares are written in, against the residuals themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import normal, relative_error
from torch import Tensor, nn

from imstep.curvature import NoResidualsError, ResidualJacobian

SCALE = normal(6, seed=5).abs() + 0.5
TRAINED = SCALE.clone().requires_grad_()  # by another optimizer
KEPT = torch.tensor([0, 1, 0, 1])

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "norm": (lambda r: r.norm() ** 2, lambda r: r),
    "norm of a matrix": (lambda r: torch.linalg.matrix_norm(r).square(), lambda r: r),
    "norm times itself": (lambda r: (lambda n: n * n)(torch.linalg.vector_norm(r)), lambda r: r),
    "norms of rows": (lambda r: (SCALE * torch.linalg.vector_norm(r, dim=1) ** 2).sum(),
                      lambda r: SCALE.sqrt()[:, None] * r),
    "norms, kept": (lambda r: r.norm(dim=-1, keepdim=True).square().mean(), lambda r: r / 6**0.5),
    "norms of columns": (lambda r: r.norm(dim=0).square().sum(), lambda r: r),
    "norms, weighed": (lambda r: (r.norm(dim=1) * SCALE).square().sum(), lambda r: SCALE[:, None] * r),
    "relative": (lambda r: (-r.norm() / SCALE.norm()) ** 2, lambda r: r / SCALE.norm()),
    "several multiples": (lambda r: (r.norm() * SCALE).square().sum(), lambda r: SCALE * r.norm()),
    "sum of norms": (lambda r: r.norm(dim=1).sum() ** 2, lambda r: r.norm(dim=1).sum()),
    "one norm": (lambda r: r.norm(p=1) ** 2, lambda r: r.abs().sum()),
    "distance": (lambda r: 3 * torch.dist(r, torch.ones_like(r)) ** 2, lambda r: 3**0.5 * (r - 1)),
    "distances of pairs": (lambda r: F.pairwise_distance(r, SCALE[:, None]).square().sum(),
                           lambda r: r - SCALE[:, None] + 1e-6),
    "root mean square": (lambda r: r.square().mean().sqrt() ** 2, lambda r: r / 12**0.5),
    "roots": (lambda r: (SCALE * (r[:, 0] ** 2 + 4 * r[:, 1] ** 2).sqrt()).square().sum(),
              lambda r: torch.cat([SCALE * r[:, 0], 2 * SCALE * r[:, 1]])),
    "power of one half": (lambda r: (r.square().sum(1) ** 0.5).square().sum(), lambda r: r),
    "root of a mean squared error": (lambda r: 5 * F.mse_loss(r, torch.zeros_like(r)).sqrt().square(),
                                     lambda r: (5 / 12) ** 0.5 * r),
    "roots in roots": (lambda r: ((r.norm(dim=1) ** 2).sum().sqrt() / 3) ** 2, lambda r: r / 3),
    "root beside its square": (lambda r: (lambda s: s + s.sqrt() ** 2)(r.square().sum()), lambda r: torch.cat([r, r])),
    "root of another sum": (lambda r: r.exp().sum().sqrt() ** 2, lambda r: r.exp().sum().sqrt()),
    "absolute values": (lambda r: (2 * r.abs()).square().sum(), lambda r: 2 * r),
    "inner product": (lambda r: (lambda z: z @ z)(r.reshape(-1)), lambda r: r),
    "row times column": (lambda r: (lambda z: z.T @ z)(r.reshape(-1, 1)), lambda r: r),
    "row times its transpose": (lambda r: (lambda z: (z @ z.mT).squeeze())(r.reshape(1, -1)), lambda r: r),
    "rows times columns": (lambda r: torch.bmm(r[:, None], r[:, :, None]).sum(), lambda r: r),
    "by einsum": (lambda r: torch.einsum("ij,ij->", r, r), lambda r: r),
    "inner product of views": (lambda r: torch.inner(r.flatten(), r.flatten()), lambda r: r),
    "contraction": (lambda r: torch.tensordot(r, r, 2), lambda r: r),
    "products of columns": (lambda r: (r[:, 0] * r[:, 0] + r[:, 1] * r[:, 1]).sum(), lambda r: r),
    "products of copies": (lambda r: (r.T.flatten() * r.T.flatten() + r.abs().T.flatten() * r.abs().T.flatten()).sum(),
                           lambda r: 2**0.5 * r),
    "products of entries": (lambda r: (r[KEPT] * r[KEPT]).sum(), lambda r: r[KEPT]),
    "quadrature": (lambda r: (r.square() @ torch.ones(2).double()) @ SCALE, lambda r: SCALE.sqrt()[:, None] * r),
    "quadrature by einsum": (lambda r: torch.einsum("ij,i->", r**2, SCALE), lambda r: SCALE.sqrt()[:, None] * r),
    "weights first": (lambda r: (SCALE @ r.square()).sum(), lambda r: SCALE.sqrt()[:, None] * r),
    "the worst": (lambda r: r.square().sum(1).topk(3)[0].sum() + r.square().sum(1).sort()[0][3:].sum(),
                  lambda r: 2**0.5 * r[r.square().sum(1).argsort()[3:]]),
    "cumulated": (lambda r: r.square().sum(1).cumsum(0).sum(),
                  lambda r: torch.arange(6, 0, -1).double().sqrt()[:, None] * r),
    "groups": (lambda r: torch.zeros(2).double().index_add(0, KEPT, r[:4].square().sum(1)) @ SCALE[:2],
               lambda r: SCALE[:2][KEPT].sqrt()[:, None] * r[:4]),
    "gathered": (lambda r: r.square().gather(0, KEPT[:, None]).sum(), lambda r: r[KEPT, 0]),
    "written twice": (lambda r: ((r - 1) * (r - 1)).sum() + torch.dot(3 - r[:, 0], 3 - r[:, 0]),
                      lambda r: torch.cat([(r - 1).flatten(), r[:, 0] - 3])),
    "written twice, weighed": (lambda r: (SCALE * (r[:, 0] - 1) * (r[:, 0] - 1)).sum()
                               + (lambda z: ((z - 2).T @ (z - 2)).squeeze())(r.reshape(-1, 1)),
                               lambda r: torch.cat([SCALE.sqrt() * (r[:, 0] - 1), (r - 2).flatten()])),
    "differences of both, twice": (lambda r: ((r[:, 0] - 2 * r[:, 0].detach()) * (r[:, 0] - 2 * r[:, 0].detach())).sum()
                                   + ((r[:, 0] - r[:, 1]) * (r[:, 0] - r[:, 1])).mean(),
                                   lambda r: torch.cat([r[:, 0] - 2 * r[:, 0].detach(), (r[:, 0] - r[:, 1]) / 6**0.5])),
    "times numbers": (lambda r: (0.5 * r * r + r * (r / 3) - r * -r).sum(),
                      lambda r: torch.cat([r / 2**0.5, r / 3**0.5, r])),
    "times weights": (lambda r: (SCALE[:, None] * r * r).sum(), lambda r: SCALE.sqrt()[:, None] * r),
    "weights between": (lambda r: (r[:, 0] * SCALE * r[:, 0]).mean(), lambda r: (SCALE / 6).sqrt() * r[:, 0]),
    "half an inner product": (lambda r: (lambda z: 0.5 * z @ z)(r.reshape(-1)), lambda r: r / 2**0.5),
    "inner product with weights": (lambda r: torch.dot(r[:, 0] * SCALE, r[:, 0]), lambda r: SCALE.sqrt() * r[:, 0]),
    "row times weighed column": (lambda r: r[:, :1].T @ (SCALE[:, None] * r[:, :1]), lambda r: SCALE.sqrt() * r[:, 0]),
    "half a row times its column": (lambda r: (lambda z: 0.5 * z.T @ z)(r.reshape(-1, 1)), lambda r: r / 2**0.5),
    "a column and weights by einsum": (lambda r: torch.einsum("ni,ni,n->", r[:, :1], r[:, :1], SCALE),
                                       lambda r: SCALE.sqrt() * r[:, 0]),
    "relative root of weighed products": (lambda r: ((SCALE[:, None] * r * r).sum() / 7).sqrt() ** 2,
                                          lambda r: (SCALE / 7).sqrt()[:, None] * r),
    "complex modulus": (lambda r: torch.view_as_complex(r).abs().square().mean(), lambda r: r / 6**0.5),
    "complex norm": (lambda r: (torch.fft.fft(r, dim=0).norm() ** 2) / 6, lambda r: r),
    "complex norms": (lambda r: torch.view_as_complex(r).norm(dim=0) ** 2, lambda r: r),
    "times its conjugate": (lambda r: (lambda z: (z * z.conj()).real.sum())(torch.view_as_complex(r)), lambda r: r),
    "its conjugate times": (lambda r: (lambda z: (SCALE * (z.conj() * z)).real.sum())(torch.view_as_complex(r) * 2j),
                            lambda r: 2 * SCALE.sqrt()[:, None] * r),
    "complex inner product": (lambda r: (lambda z: torch.vdot(z, z).real)(torch.view_as_complex(r)), lambda r: r),
    "trained weights": (lambda r: (TRAINED[:, None] * r * r).sum() + torch.dot(r[:, 0], TRAINED * r[:, 0])
                        + (r[:, 1] / TRAINED * r[:, 1]).sum(),
                        lambda r: torch.cat([(SCALE.sqrt()[:, None] * r).flatten(), SCALE.sqrt() * r[:, 0],
                                             r[:, 1] / SCALE.sqrt()])),
    "over trained norms": (lambda r: (r.norm() / TRAINED.norm()) ** 2 + (r.norm(dim=1) * TRAINED).square().sum(),
                           lambda r: torch.cat([r / SCALE.norm(), SCALE[:, None] * r])),
    "trained targets, twice": (lambda r: ((r[:, 0] - TRAINED) * (r[:, 0] - TRAINED)).sum(), lambda r: r[:, 0] - SCALE),
    "a function, twice": (lambda r: ((2 * r.sin() - 1) * (2 * r.sin() - 1)).sum() + r.norm() * r.norm()
                          + ((r.tanh() @ r.mT - SCALE) * (r.tanh() @ r.mT - SCALE)).sum(),
                          lambda r: torch.cat([t.flatten() for t in (2 * r.sin() - 1, r, r.tanh() @ r.mT - SCALE)])),
    "trace": (lambda r: torch.trace(r @ r.mT) + (r.mT @ r).trace(), lambda r: torch.cat([r, r])),
    "diagonal": (lambda r: (SCALE * (r @ r.mT).diagonal()).sum() + (r.mT @ r).diag()[0],
                 lambda r: torch.cat([(SCALE.sqrt()[:, None] * r).flatten(), r[:, 0]])),
    "contraction of vectors": (lambda r: torch.tensordot(r[:, 0], r[:, 0], dims=1), lambda r: r[:, 0]),
    "inner products with the conjugate": (
        lambda r: (lambda z: (z @ z.conj() + z.conj() @ z).real + (z[:, None].mH @ z[:, None]).real.squeeze()
                   + torch.einsum("i,i->", z, z.conj()).real)(torch.view_as_complex(r)), lambda r: 2 * r),
    "variance": (lambda r: r.var() + (SCALE[:2] * r.var(0, unbiased=False)).sum() + r.var(-1, keepdim=True).mean(),
                 lambda r: torch.cat([(r - r.mean()) / 11**0.5, SCALE[:2].sqrt() * (r - r.mean(0)) / 6**0.5,
                                      (r - r.mean(1, keepdim=True)) / 6**0.5])),
    "standard deviation": (lambda r: 2 * r.std() ** 2 + (r.std(0) * SCALE[:2]).square().sum(),
                           lambda r: torch.cat([(r - r.mean()) * (2 / 11) ** 0.5,
                                                SCALE[:2] * (r - r.mean(0)) / 5**0.5])),
    "complex variance": (lambda r: torch.view_as_complex(r).var(), lambda r: (r - r.mean(0)) / 5**0.5),
    "even powers": (lambda r: (r**4).mean() + r.pow(6).sum(), lambda r: torch.cat([r**2 / 12**0.5, r**3])),
    "hypotenuse": (lambda r: (SCALE * torch.hypot(r[:, 0], r[:, 1])).square().sum(), lambda r: SCALE[:, None] * r),
    "distances of all pairs": (lambda r: (torch.cdist(r, r[:2] * 2) ** 2).mean(),
                               lambda r: (r[:, None] - 2 * r[:2]) / 12**0.5),
    "written into a tensor": (lambda r: (lambda t: (t.__setitem__(0, r.square().sum()),
                                                    t[1].add_(r[:, 0].square().sum()), t.sum())[-1])(
                                  torch.zeros(2).double()), lambda r: torch.cat([r.flatten(), r[:, 0]])),
    "put": (lambda r: torch.zeros(6).double().index_put((KEPT,), r[:4, 0] ** 2, accumulate=True).sum()
            + (r**2).take(KEPT).sum(), lambda r: torch.cat([r[:4, 0], r.flatten()[KEPT]])),
    "between": (lambda r: torch.lerp(r[:, 0].square().mean(), r[:, 1].square().mean(), 0.3),
                lambda r: torch.cat([(0.7 / 6) ** 0.5 * r[:, 0], (0.3 / 6) ** 0.5 * r[:, 1]])),
    "added products": (lambda r: torch.addcmul(r.square().mean(), r**2, SCALE[:, None], value=2).sum(),
                       lambda r: torch.cat([r, (2 * SCALE).sqrt()[:, None] * r])),
    "cut off": (lambda r: r.square().clamp(max=1e3).mean() + torch.nan_to_num(r**2).mean(), lambda r: r / 6**0.5),
    "one step apart": (lambda r: torch.trapezoid(r[:, 0] ** 2, dx=0.1),
                       lambda r: r[:, 0] * SCALE.new_tensor([0.05, 0.1, 0.1, 0.1, 0.1, 0.05]).sqrt()),
}  # fmt: skip


def network() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = normal(6, 3), normal(6, 2, seed=1)
    return model, lambda: model(x) - y


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_its_residuals(name: str) -> None:
    (loss_of, residuals_of), (model, output) = FORMS[name], network()
    rows = [torch.autograd.grad(r, model.parameters(), retain_graph=True) for r in residuals_of(output()).reshape(-1)]
    expected = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    J = ResidualJacobian(lambda: loss_of(output()), model)
    rho, matrix = J.residuals / 2**0.5, J.to_dense() / 2**0.5
    assert relative_error(matrix.T @ matrix, expected.T @ expected) < 1e-12
    assert relative_error(rho @ rho, loss_of(output()).reshape(()).detach()) < 1e-12
    gradient = torch.autograd.grad(loss_of(output()).sum(), model.parameters())
    assert relative_error(2 * matrix.T @ rho, torch.cat([g.reshape(-1) for g in gradient])) < 1e-12


@pytest.mark.parametrize("name", ["norm", "norms of rows", "absolute values", "complex modulus", "distance"])
def test_residuals_of_zero_keep_their_rows(name: str) -> None:
    loss_of, residuals_of = FORMS[name]
    w = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))
    J = ResidualJacobian(lambda: loss_of(w), [w]).to_dense() / 2**0.5
    expected = torch.autograd.functional.jacobian(residuals_of, w).reshape(-1, 12)
    torch.testing.assert_close(J.T @ J, expected.T @ expected)


@pytest.mark.parametrize(
    "root", [lambda r: r.square().mean().sqrt(), lambda r: 2 * r.norm() + 1, lambda r: r.square().sum().log()]
)
def test_the_root_of_a_sum_of_squares_is_told(root: Callable[[Tensor], Tensor]) -> None:
    model, output = network()
    with pytest.raises(NoResidualsError, match="Return the sum of squares itself"):
        ResidualJacobian(lambda: root(output()), model)


@pytest.mark.parametrize("square", [lambda z: (z**2).real.sum(), lambda z: (z * z).real.sum()])
def test_the_square_of_a_complex_number_is_no_residual(square: Callable[[Tensor], Tensor]) -> None:
    w = nn.Parameter(normal(6, 2))
    with pytest.raises(NoResidualsError, match="not recognised"):
        ResidualJacobian(lambda: square(torch.view_as_complex(w)), [w])


@pytest.mark.parametrize(
    "product",
    [
        lambda r: (r[:, 0] * r[:, 1]).sum(),
        lambda r: (r[:3, 0] * r[3:, 0]).sum(),
        lambda r: (r[:2] * r[:2].T).sum(),
        lambda r: (r[KEPT] * r[KEPT.flip(0)]).sum(),
        lambda r: (r[:, 0, None] * r[None, :, 0]).sum(),
        lambda r: torch.inner(r.flatten(), r.T.flatten()),
        lambda r: torch.einsum("ij,ik,kj->", r, torch.eye(6).double(), r),
        lambda r: torch.bmm(r[:, None], r.flip(1)[:, :, None]).sum(),
        lambda r: torch.dot(r[:, 0], r[:, 1]),
        lambda r: (r * -r).sum(),
        lambda r: ((r - 1) * (r - 2)).sum(),
        lambda r: (SCALE * (r[:, 0] - 1) * (r[:, 0] - 2)).sum(),
        lambda r: ((r - 1) * (r + 1)).sum(),
        lambda r: ((r[:, 0] - r[:, 1]) * (r[:, 1] - r[:, 0])).sum(),
        lambda r: ((r - 1).abs() * (r - (2 * r - 1).detach()).abs()).sum(),
        lambda r: (r[:, 0] * SCALE * r[:, 1]).sum(),
        lambda r: (r[:, 0] * (SCALE[:, None] * r[:, 0])).sum(),
        lambda r: torch.dot(r[:, 0], SCALE * r[:, 0].flip(0)),
        lambda r: torch.dot(2 * r[:, 0], r[:, 0].contiguous().as_strided((6,), (0,))),
        lambda r: torch.dot(r.flatten(), (2 * r).T.flatten()),
        lambda r: ((r - 1).tanh() * (r - 2).tanh()).sum(),
        lambda r: ((r - 100).relu() * (r - 101).relu()).sum(),
        lambda r: torch.cat([r, r[:1] * 0 + 1]).prod(),
        lambda r: ((r - 1).sin() * (r - 2).sin()).sum(),
        lambda r: (r @ r[:2].mT).diagonal(1).sum() + (r @ r.mT).diagonal(1).sum(),
        lambda r: torch.trace(r[:2] @ r[:2]),
    ],
)
def test_products_of_two_are_no_squares(product: Callable[[Tensor], Tensor]) -> None:
    model, output = network()
    with pytest.raises(NoResidualsError, match="not recognised"):
        ResidualJacobian(lambda: product(output()), model)


@pytest.mark.parametrize("write", [lambda t, r: t[0].mul_(r.mean()), lambda t, r: t[0].pow_(2)])
def test_what_is_written_over_is_no_square(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, output = network()

    def loss() -> Tensor:
        r, sums = output(), torch.zeros(2).double()
        sums[0] = r.square().sum()
        write(sums, r)
        return sums.sum()

    with pytest.raises(NoResidualsError, match="CopySlices"):
        ResidualJacobian(loss, model)


def test_functions_of_points_are_constants() -> None:
    model, points = network()[0], normal(6, 3).requires_grad_()
    source = lambda: points.prod(1, keepdim=True)
    loss = lambda: (lambda r: (points[:, :1] ** 2 * r * r).sum() + (r.norm() / source().norm()) ** 2)(
        model(points) - source()
    )
    plain = lambda: (lambda r: torch.cat([points[:, :1] * r, r / source().norm()]))(model(points) - source())
    J, same = ResidualJacobian(loss, model), ResidualJacobian(lambda: plain().square().sum(), model)
    torch.testing.assert_close(J.gram().dense().trace(), same.gram().dense().trace())
    torch.testing.assert_close(J.T @ J.residuals, same.T @ same.residuals)


def test_weights_among_the_parameters_are_told() -> None:
    (model, output), s = network(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    with pytest.raises(NoResidualsError, match="step it by an optimizer of its own"):
        ResidualJacobian(lambda: (-s).exp() * output().square().mean() + s, [*model.parameters(), s])


def test_components_are_parted_where_einsum_lays_them_out_flat() -> None:
    model, output = network()
    plain = ResidualJacobian(lambda: output().square().sum(), model)
    J = ResidualJacobian(lambda: (lambda r: torch.einsum("ij,ij->", r, r))(output()), model)
    assert J.backward_passes == plain.backward_passes


def test_columns_of_what_is_computed_after_the_loss() -> None:
    t, w = torch.linspace(0, 1, 20).double(), nn.Parameter(normal(3))
    r = lambda: (w[0] * (w[1] * t).exp() + w[2]).cumsum(0)
    rows = [torch.autograd.grad(one, w, retain_graph=True)[0] for one in r() - r().mean()]
    matrix, expected = ResidualJacobian(lambda: r().var(), [w]).to_dense(), torch.stack(rows)
    assert relative_error(matrix.T @ matrix, expected.T @ expected * 2 / 19) < 1e-12


def test_a_quadratic_form_is_told() -> None:
    model, output = network()
    with pytest.raises(NoResidualsError, match=r"return \(L.T @ r\).square"):
        ResidualJacobian(lambda: (lambda r: r @ torch.eye(6).double() @ r)(output()[:, 0]), model)
