"""Norms, distances and deviations where they vanish: what is smooth of them, and a word where nothing is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep
from imstep.complexstep import ComplexStepError

F64 = torch.float64
ORIGIN, EYE = torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)
CENTRED = EYE - 1 / 3
QUARTERS = torch.eye(4, dtype=F64)


def matern(r: Tensor) -> Tensor:
    return (1 + r + r * r / 3) * torch.exp(-r)


def twice(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: f(t) * f(t)


# The function, where, and its Hessian there.
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {
    "norm ** 2": (lambda t: t.norm() ** 2, ORIGIN, 2 * EYE),
    "norm.square": (lambda t: torch.norm(t).square(), ORIGIN, 2 * EYE),
    "norm * norm": (twice(lambda t: t.norm()), ORIGIN, 2 * EYE),
    "norm by itself": (lambda t: (lambda n: n * n)(t.norm()), ORIGIN, 2 * EYE),
    "norm as a dot": (lambda t: (lambda n: n @ n)(t.unsqueeze(1).norm(dim=1)), ORIGIN, 2 * EYE),
    "a scaled one": (lambda t: (t.norm() / 2).pow(2), ORIGIN, EYE / 2),
    "Gaussian": (lambda t: torch.exp(-(t.norm() ** 2) / 2), ORIGIN, -EYE),
    "cosine": (lambda t: t.norm().cos(), ORIGIN, -EYE),
    "sinc": (lambda t: torch.sinc(t.norm()), ORIGIN, -math.pi**2 / 3 * EYE),
    "Matern": (lambda t: matern(5**0.5 * t.norm() / 1.3), ORIGIN, -5 / 3 / 1.69 * EYE),
    "softened": (lambda t: (1 + t.norm() ** 2).sqrt(), ORIGIN, EYE),
    "huber": (lambda t: F.huber_loss(t.norm(), ORIGIN[0]), ORIGIN, EYE),
    "mse": (lambda t: F.mse_loss(t.norm(), ORIGIN[0]), ORIGIN, 2 * EYE),
    "vector_norm": (lambda t: torch.linalg.vector_norm(t) ** 2, ORIGIN, 2 * EYE),
    "vector_norm along": (lambda t: (torch.linalg.vector_norm(t.view(3, 1), dim=1) ** 2).sum(), ORIGIN, 2 * EYE),
    "vector_norm kept": (lambda t: (t.view(1, 3).norm(dim=1, keepdim=True) ** 2).sum(), ORIGIN, 2 * EYE),
    "linalg.norm": (lambda t: torch.linalg.norm(t, 2) ** 2, ORIGIN, 2 * EYE),
    "matrix_norm": (lambda t: torch.linalg.matrix_norm(t.view(1, 3)) ** 2, ORIGIN, 2 * EYE),
    "Frobenius": (lambda t: torch.norm(t.view(3, 1), p="fro", dim=(0, 1)) ** 2, ORIGIN, 2 * EYE),
    "p = 4": (lambda t: torch.linalg.vector_norm(t, 4) ** 4, ORIGIN, 0 * EYE),
    "dist": (lambda t: torch.dist(t, ORIGIN + 1) ** 2, ORIGIN + 1, 2 * EYE),
    "pairwise_distance": (lambda t: (F.pairwise_distance(t[None], ORIGIN[None], eps=0.0) ** 2).sum(), ORIGIN, 2 * EYE),
    "cdist": (lambda t: (torch.cdist(ORIGIN[None], t[None]) ** 2).sum(), ORIGIN, 2 * EYE),
    "cdist of numbers": (lambda t: (torch.cdist(t[:, None], ORIGIN[:1, None], p=1.0) ** 2).sum(), ORIGIN, 2 * EYE),
    "cdist by products": (
        lambda t: (torch.cdist(t[None], ORIGIN[None] + 1, compute_mode="use_mm_for_euclid_dist") ** 2).sum(),
        ORIGIN + 1,
        2 * EYE,
    ),
    "pdist": (lambda t: (F.pdist(torch.stack([t, ORIGIN])) ** 2).sum(), ORIGIN, 2 * EYE),
    "std": (lambda t: t.std() ** 2, ORIGIN + 0.1, CENTRED),
    "std along": (lambda t: (t.view(1, 3).std(1, correction=0) ** 2).sum(), ORIGIN, CENTRED * 2 / 3),
    "std_mean": (lambda t: torch.std_mean(t)[0] ** 2, ORIGIN, CENTRED),
    "var": (lambda t: t.var(), ORIGIN + 1, CENTRED),
    "abs": (lambda t: (t.abs() ** 2).sum(), ORIGIN, 2 * EYE),
    "log cosh": (lambda t: (t.abs() + F.softplus(-2 * t.abs())).sum(), ORIGIN, EYE),
    "complex abs": (lambda t: (torch.view_as_complex(t.view(2, 2)).abs() ** 2).sum(), QUARTERS[0] * 0, 2 * QUARTERS),
    "spectrum": (lambda t: (torch.fft.fft(t).abs() ** 2).sum(), ORIGIN, 6 * EYE),
    "complex norm": (lambda t: torch.view_as_complex(t.view(2, 2)).norm() ** 2, QUARTERS[0] * 0, 2 * QUARTERS),
    "of many": (lambda t: t[:2].norm() ** 2 + t[2:].norm() ** 2, ORIGIN, 2 * EYE),
    "of norms": (lambda t: torch.stack([t[:2].norm(), t[2:].norm()]).norm() ** 2, ORIGIN, 2 * EYE),
    "of a list": (lambda t: torch.stack(torch._foreach_norm([t[:2], t[2:]])).norm() ** 2, ORIGIN, 2 * EYE),
    "of normalised": (lambda t: (F.normalize(t, dim=0) * 1e-12).square().sum(), ORIGIN, 2 * EYE),
    "pooled": (lambda t: (F.lp_pool1d(t[None], 2, 3) ** 2).sum(), ORIGIN, 2 * EYE),
    "pooled in windows": (
        lambda t: (F.lp_pool2d(t.view(1, 1, 2, 2), 2.0, (2, 1), stride=(1, 1)) ** 2).sum(),
        QUARTERS[0] * 0,
        2 * QUARTERS,
    ),
    "pooled sums": (lambda t: F.lp_pool1d(t[None], 1, 3).square().sum(), ORIGIN, 2 * torch.ones_like(EYE)),
    "norm of one": (lambda t: (t[:, None].norm(1, dim=1) ** 2).sum(), ORIGIN, 2 * EYE),
    "distances to itself": (lambda t: torch.cdist(t[:, None], t[:, None]).sum(), torch.arange(3.0).double(), 0 * EYE),
}


def by_hvp(f: Callable[[Tensor], Tensor], x: Tensor, h: float | None = None) -> Tensor:
    return torch.stack([imstep.hvp(f, x, e, h=h) for e in torch.eye(x.numel(), dtype=F64)])


def by_record(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return imstep.Hessian(lambda: f(x), [x]).to_dense()


def by_own_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()

    def closure() -> Tensor:
        x.grad = None
        loss = f(x)
        loss.backward()
        return loss

    return imstep.Hessian(closure, [x]).to_dense()


WAYS = {"hvp": by_hvp, "finite": lambda f, x: by_hvp(f, x, 1e-30), "record": by_record, "backward": by_own_backward}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_of_roots(name: str, way: str) -> None:
    f, x, expected = SMOOTH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = WAYS[way](f, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_blocks_and_penalties_on_zero_parameters() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(8, 3, dtype=F64)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[2].weight)
    data = lambda: model(x).square().mean()
    by_norms = imstep.Hessian(lambda: data() + sum(p.norm() ** 2 for p in model.parameters()), model)
    by_squares = imstep.Hessian(lambda: data() + sum(p.square().sum() for p in model.parameters()), model)
    V = torch.randn(by_norms.size, 5, dtype=F64)
    torch.testing.assert_close(by_norms @ V, by_squares @ V, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist"])
def test_kernel_with_inducing_points_on_data(mode: str) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(6, 2, dtype=F64).round(decimals=1), torch.randn(3, dtype=F64)
    z, scale = x[:3].clone().requires_grad_(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    loss = lambda squares: (torch.exp(-0.5 * squares / scale.exp() ** 2) @ weights).square().sum()
    found = imstep.Hessian(lambda: loss(torch.cdist(x, z, compute_mode=mode) ** 2), [z, scale]).to_dense()
    expected = imstep.Hessian(lambda: loss((x[:, None] - z).square().sum(-1)), [z, scale]).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


HIGHER = {
    "norm": (lambda t: t[2].exp() * t[:2].norm() ** 2, lambda t: t[2].exp() * t[:2].square().sum()),
    "Gaussian": (
        lambda t: torch.exp(-(t[:2].norm() ** 2)) * t[2].sin(),
        lambda t: torch.exp(-t[:2].square().sum()) * t[2].sin(),
    ),
    "std": (lambda t: t[2].exp() * t[:2].std() ** 2, lambda t: t[2].exp() * t[:2].var()),
    "cdist": (
        lambda t: (torch.cdist(t[None, :2], t.new_zeros(1, 2)) ** 2 * t[2].exp()).sum(),
        lambda t: t[2].exp() * t[:2].square().sum(),
    ),
}


@pytest.mark.parametrize("name", HIGHER)
def test_third_derivatives(name: str) -> None:
    f, plain = HIGHER[name]
    x = torch.tensor([0.0, 0.0, 0.4], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, 3, generator=generator, dtype=F64)
    for first, second in ((v, w), (EYE[0], EYE[2]), (EYE[2], EYE[0]), (EYE[0], EYE[0]), (EYE[0], EYE[1])):
        at = x.clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(plain, at, create_graph=True)
        (expected,) = torch.autograd.grad(first @ hessian @ second, at)
        torch.testing.assert_close(imstep.third_derivative(f, x, first, second), expected, rtol=1e-10, atol=1e-12)
    forward = imstep.jvp(lambda at: imstep.jvp(f, (at,), (v,))[1], (x,), (w,))[1]
    torch.testing.assert_close(forward, v @ torch.autograd.functional.hessian(plain, x) @ w, rtol=1e-10, atol=1e-12)


MAGNITUDES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "squared": (lambda t: t.abs() ** 2, lambda t: t**2),
    "by itself": (lambda t: t.abs() * t.abs(), lambda t: t**2),
    "cosine": (lambda t: t.abs().cos(), lambda t: t.cos()),
    "of a magnitude": (lambda t: t.sinh().abs().abs() ** 4, lambda t: t.sinh() ** 4),
    "norm of one": (lambda t: t[:, None].norm(1, dim=1) ** 2, lambda t: t**2),
    "log cosh": (lambda t: t.abs() + F.softplus(-2 * t.abs()), lambda t: torch.log(2 * t.cosh())),
    "odd": (lambda t: t.abs() * t.detach() + t.abs(), lambda t: 0 * t),  # as PyTorch has it
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_third_derivatives_of_magnitudes(name: str) -> None:
    """In any nesting, since |x| is x or -x."""
    f, plain = (lambda t, g=g: (g(t[:2]) * t[2].exp()).sum() for g in MAGNITUDES[name])
    x = torch.tensor([0.0, 0.0, 0.4], dtype=F64)
    v, w, u = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for first, second in ((v, w), (EYE[0], EYE[0]), (EYE[0], EYE[2]), (EYE[2], EYE[0])):
        at = x.clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(plain, at, create_graph=True)
        (expected,) = torch.autograd.grad(first @ hessian @ second, at)
        torch.testing.assert_close(imstep.third_derivative(f, x, first, second), expected, rtol=1e-10, atol=1e-12)
        found = along(along(along(f, first), second), u)(x)
        torch.testing.assert_close(found, expected @ u, rtol=1e-10, atol=1e-12)


def along(f: Callable[[Tensor], Tensor], v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: imstep.jvp(f, (t,), (v,))[1]


def test_random_numbers_are_the_same_on_both_branches() -> None:
    f = lambda t: (F.dropout(t, 0.5).abs() ** 2).sum() * t[2].exp()
    torch.manual_seed(1)
    once = imstep.third_derivative(f, ORIGIN, EYE[0] + EYE[1], EYE[2])
    after = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(imstep.third_derivative(f, ORIGIN, EYE[0] + EYE[1], EYE[2]), once)
    torch.manual_seed(1)
    f(ORIGIN)
    assert torch.equal(torch.rand(3), after)
    assert set(once[:2].tolist()) <= {0.0, 8.0}  # 2 (1 / 0.5)², or dropped


def test_three_nested_directions_of_a_norm_are_refused() -> None:
    f = lambda t: t[2].exp() * t[:2].norm() ** 2
    nested = lambda a, b, c: along(along(along(f, a), b), c)(ORIGIN)
    for directions in ((EYE[0], EYE[1], EYE[2] + EYE[0]), (EYE[2], EYE[0], EYE[0])):
        with pytest.raises(ComplexStepError, match="third_derivative"):
            nested(*directions)
    torch.testing.assert_close(nested(EYE[0], EYE[2], EYE[0]), torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(nested(EYE[2], EYE[2], EYE[2]), torch.tensor(0.0, dtype=F64))


def test_polar_at_a_radius_of_zero() -> None:
    """PyTorch's own gradient by the radius is 0 there."""
    for angle in (0.0, 0.5, 2.0):
        x = torch.tensor([0.0, angle], dtype=F64)
        f = lambda t: torch.polar(t[0], t[1]).real
        expected = torch.tensor([[0.0, -math.sin(angle)], [-math.sin(angle), 0.0]], dtype=F64)
        torch.testing.assert_close(by_hvp(f, x), expected)
        torch.testing.assert_close(imstep.jvp(f, (x,), (EYE[0, :2],))[1], torch.tensor(math.cos(angle), dtype=F64))


def test_polar_at_a_negative_radius() -> None:
    """PyTorch's own gradient by the radius has the wrong sign there."""
    written = lambda t: torch.complex(t[0] * torch.cos(t[1]), t[0] * torch.sin(t[1]))
    losses = [lambda t, f=f: (f(t) - 1 - 0.2j).abs().square() for f in (lambda t: torch.polar(t[0], t[1]), written)]
    x = torch.tensor([-1.3, 0.3], dtype=F64)
    torch.testing.assert_close(by_hvp(losses[0], x), by_hvp(losses[1], x))
    w = x.clone().requires_grad_()
    hessians = [imstep.Hessian(lambda f=f: f(w), [w]) for f in losses]
    torch.testing.assert_close(hessians[0].gradient, hessians[1].gradient)
    assert imstep.minimize(losses[0], x, method="least-squares").fun < 1e-20


# What has no second derivative: the function, where, and the operator that is named.
EDGES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "norm": (lambda t: t.norm(), ORIGIN, "linalg_vector_norm"),
    "with another": (lambda t: t[0] * t[1:].norm(), ORIGIN, "linalg_vector_norm"),
    "product of two": (lambda t: t[:1].norm() * t[1:].norm(), ORIGIN, "linalg_vector_norm"),
    "sum of two, squared": (lambda t: (t[:1].norm() + t[1:].norm()) ** 2, ORIGIN, "linalg_vector_norm"),
    "p = 3, squared": (lambda t: t.norm(3) ** 2, ORIGIN, "linalg_vector_norm"),
    "p = 1, squared": (lambda t: t.norm(1) ** 2, ORIGIN, "linalg_vector_norm"),
    "dist": (lambda t: torch.dist(t, ORIGIN), ORIGIN, "dist"),
    "cdist": (lambda t: torch.cdist(t[None], ORIGIN[None]).sum(), ORIGIN, "cdist"),
    "pairwise_distance": (lambda t: F.pairwise_distance(t, ORIGIN, eps=0.0), ORIGIN, "norm"),
    "std": (lambda t: t.std(), ORIGIN + 1, "std"),
    "complex abs": (lambda t: torch.complex(t, t).abs().sum(), ORIGIN, "abs"),
    "dist, p = 1, squared": (lambda t: torch.dist(t, ORIGIN, 1) ** 2, ORIGIN, "vector_norm"),
    "cdist, p = 1, squared": (lambda t: (torch.cdist(t[None], ORIGIN[None], p=1) ** 2).sum(), ORIGIN, "cdist"),
    "cdist, p = 3, squared": (lambda t: (torch.cdist(t[None], ORIGIN[None], p=3) ** 2).sum(), ORIGIN, "cdist"),
    "cdist, p = inf, squared": (lambda t: (torch.cdist(t[None], ORIGIN[None], p=math.inf) ** 2).sum(), ORIGIN, "cdist"),
    "pdist, p = 1, squared": (lambda t: (F.pdist(torch.stack([t, ORIGIN]), p=1) ** 2).sum(), ORIGIN, "pdist"),
    "pooled": (lambda t: F.lp_pool1d(t[None], 2, 3).sum(), ORIGIN, "vector_norm"),
    "pooled cubes, squared": (lambda t: (F.lp_pool1d(t[None], 3, 3) ** 2).sum(), ORIGIN, "vector_norm"),
}


@pytest.mark.parametrize("way", ["hvp", "record", "backward"])
@pytest.mark.parametrize("name", EDGES)
def test_edges_are_named(name: str, way: str) -> None:
    f, x, operator = EDGES[name]
    with pytest.warns(imstep.NotDifferentiableWarning, match=operator) as caught:
        WAYS[way](f, x)
    assert all("add a small number under" in str(w.message) and w.filename == __file__ for w in caught)


def test_edges_of_directional_derivatives() -> None:
    ones = torch.ones(3, dtype=F64)
    with pytest.warns(imstep.NotDifferentiableWarning, match="linalg_vector_norm"):
        imstep.jvp(lambda t: t.norm(), (ORIGIN,), (ones,))
    with pytest.warns(imstep.NotDifferentiableWarning, match="std"):
        imstep.jvp(lambda t: t.std(), (ones,), (ORIGIN + EYE[0],))
    p = ORIGIN.clone().requires_grad_()
    with pytest.warns(imstep.NotDifferentiableWarning, match="linalg_vector_norm"):
        imstep.Jacobian(lambda: torch.stack([p.norm(), p.sum()]), [p])


QUIET: dict[str, Callable[[Tensor], Tensor]] = {
    "of an even function": lambda t: t.norm() ** 2,
    "of what does not move": lambda t: (t - t).norm() + t.sum(),
    "cut off below": lambda t: F.normalize(t, dim=0).sum(),
    "absolute values": lambda t: t.abs().sum() + t.norm(1) + t.relu().sum() + F.l1_loss(t, ORIGIN),
    "of no part in the result": lambda t: (t.norm(), t.sum())[1],
    "multiplied by zero": lambda t: 0.0 * t.norm() + t.sum(),
    "distances by sums": lambda t: (torch.cdist(t[None], ORIGIN[None], p=1) + torch.dist(t, ORIGIN, 1)).sum(),
    "distances by the largest": lambda t: torch.cdist(t[None], ORIGIN[None], p=math.inf).sum(),
    "distances to itself": lambda t: (torch.cdist(t[:, None], t[:, None], p=1) ** 2).sum(),
    "pooled dead units": lambda t: F.lp_pool1d((t - 1).relu()[None], 3, 3).sum() + t.sum(),
    "cosine similarity": lambda t: F.cosine_similarity(t, ORIGIN + 1, dim=0),
}


@pytest.mark.parametrize("name", QUIET)
def test_no_false_alarm(name: str) -> None:
    f = QUIET[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imstep.jvp(f, (ORIGIN,), (EYE[0],))
        imstep.hvp(f, ORIGIN, EYE[0])
        by_record(f, ORIGIN)


# --- jumps ------------------------------------------------------------------------------------------------------------

PAIR, ONES = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
pair = lambda t: torch.complex(t[0], t[1])

# What has no derivative of any order at the origin, and the operator that is named.
JUMPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "atan2": (lambda t: torch.atan2(t[0], t[1]), "atan2"),
    "atan2, squared": (lambda t: torch.atan2(t[0], t[1]) ** 2, "atan2"),
    "angle": (lambda t: pair(t).angle(), "angle"),
    "phases of a spectrum": (lambda t: torch.fft.fft(t).angle().square().sum(), "angle"),
    "sign": (lambda t: torch.view_as_real(pair(t).sgn()).sum(), "sgn"),
    "beside a smooth root": (lambda t: torch.atan2(t[0], t[1]) + t.norm() ** 2, "atan2"),
}

# What does not depend on the jump, or not along any direction.
WITHOUT_JUMP: dict[str, Callable[[Tensor], Tensor]] = {
    "selected": lambda t: torch.where(t[0] ** 2 + t[1] ** 2 > 0, torch.atan2(t[0], t[1]), 0.0) + t.sum() ** 2,
    "detached": lambda t: (torch.atan2(t[0], t[1]).detach() + 1) * t.sum() ** 2,
    "at rest": lambda t: torch.atan2(t[0] * 0, t[1] * 0) + t.sum() ** 2,
    "unused": lambda t: (pair(t).angle(), t.sum() ** 2)[1],
    "elsewhere": lambda t: torch.atan2(t[0], t[1] + 1),
    "of real numbers": lambda t: (t.sgn() * t + t.angle() * t).sum(),
    "of a smooth root's gradient": lambda t: (pair(t).abs() ** 2).sum(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_named(name: str, way: str) -> None:
    f, operator = JUMPS[name]
    with pytest.warns(imstep.NotDifferentiableWarning, match=f"{operator}.*torch.where"):
        WAYS[way](f, PAIR)
    with pytest.warns(imstep.NotDifferentiableWarning, match=operator) as caught:
        imstep.jvp(f, (PAIR,), (ONES,))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", WITHOUT_JUMP)
def test_no_jump_no_word(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imstep.jvp(WITHOUT_JUMP[name], (PAIR,), (ONES,))
        for of in (by_hvp, by_record, by_own_backward):
            of(WITHOUT_JUMP[name], PAIR)


def test_a_jump_shows_in_the_report() -> None:
    p = PAIR.clone().requires_grad_()
    with pytest.warns(imstep.NotDifferentiableWarning):
        H = imstep.Hessian(lambda: torch.atan2(p[0], p[1]) + p.norm() ** 2, [p])
    assert {use.operator for use in H.explain().uses if use.treatment == "no derivative"} == {"aten.atan2.default"}
    torch.testing.assert_close(H.to_dense(), 2 * torch.eye(2, dtype=F64))


def test_an_edge_shows_in_the_report_and_is_told_once() -> None:
    p = ORIGIN.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = imstep.Hessian(lambda: p.norm() + (2 * p).norm(), [p])
        H @ torch.ones(3, dtype=F64)
        H @ torch.ones(3, dtype=F64)
    assert [w.category for w in caught] == [imstep.NotDifferentiableWarning]
    marks = {use.operator for use in H.explain().uses if use.treatment == "no derivative"}
    assert marks == {"aten.linalg_vector_norm.default"}
    smooth = imstep.Hessian(lambda: p.norm() ** 2, [p]).explain()
    assert all(use.treatment != "no derivative" for use in smooth.uses)


def test_a_step_with_a_penalty_on_a_zero_bias() -> None:
    p = ORIGIN.clone().requires_grad_()
    optimizer = imstep.NewtonKrylov([p])
    for _ in range(3):
        optimizer.step(lambda: p.norm() ** 2 + (p - 1).square().sum())
    torch.testing.assert_close(p.detach(), ORIGIN + 0.5, rtol=1e-6, atol=1e-6)
