"""Complex parameters: everything as for the same model with a pair of real numbers for each complex one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal, relative_error
from torch import Tensor, nn

import imstep
from imstep.curvature import Gaussian, ParameterVector, ResidualJacobian
from imstep.optim import Hutchinson, Kronecker, NoPreconditioning, Nystrom, Recycling, SquaredGradients

C128 = torch.complex128


class SpectralConv1d(nn.Module):
    """Multiplies the lowest modes by complex weights (Li et al., arXiv 2010.08895), in the usual way of writing it."""

    def __init__(self, channels: int, modes: int, paired: bool) -> None:
        super().__init__()
        weight = torch.view_as_complex(normal(channels, channels, modes, 2, seed=3)) / channels
        self.modes, self.paired = modes, paired
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if paired else weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.paired else self.weight
        x_ft = torch.fft.rfft(x)
        out = torch.zeros(x_ft.shape, dtype=x_ft.dtype)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", x_ft[:, :, : self.modes], weight)
        return torch.fft.irfft(out, n=x.size(-1))


class SpectralConv2d(nn.Module):
    """As above in two dimensions, with the two blocks of modes that a real transform has."""

    def __init__(self, channels: int, modes: int, paired: bool) -> None:
        super().__init__()
        self.modes, self.paired = modes, paired
        for name, seed in (("upper", 4), ("lower", 5)):
            weight = torch.view_as_complex(normal(channels, channels, modes, modes, 2, seed=seed)) / channels
            self.register_parameter(name, nn.Parameter(torch.view_as_real(weight).clone() if paired else weight))

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = (torch.view_as_complex(w) if self.paired else w for w in (self.upper, self.lower))
        m, x_ft = self.modes, torch.fft.rfft2(x)
        out = torch.zeros_like(x_ft)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, :m, :m], upper)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, -m:, :m], lower)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class Operator1d(nn.Module):
    """A small Fourier neural operator with real and complex weights."""

    def __init__(self, paired: bool) -> None:
        super().__init__()
        self.lift, self.skip, self.project = (
            nn.Conv1d(*sizes, dtype=F64) for sizes in ((1, 3, 1), (3, 3, 1), (3, 1, 1))
        )
        self.spectral = SpectralConv1d(3, 3, paired)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        return self.project(F.gelu(self.spectral(x) + self.skip(x)))


class Operator2d(Operator1d):
    def __init__(self, paired: bool) -> None:
        super().__init__(paired)
        self.lift, self.skip, self.project = (
            nn.Conv2d(*sizes, dtype=F64) for sizes in ((1, 2, 1), (2, 2, 1), (2, 1, 1))
        )
        self.spectral = SpectralConv2d(2, 2, paired)


class Mixed(nn.Module):
    """Real and complex weights that meet in one operator, conjugates, and a real parameter between complex ones."""

    def __init__(self, paired: bool) -> None:
        super().__init__()
        self.paired = paired
        self.gain = nn.Parameter(normal(3))
        for name, shape, seed in (("a", (3, 4), 1), ("b", (3,), 2)):
            z = torch.view_as_complex(normal(*shape, 2, seed=seed))
            self.register_parameter(name, nn.Parameter(torch.view_as_real(z).clone() if paired else z))
        self.scale = nn.Parameter(normal(1, seed=6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (torch.view_as_complex(w) if self.paired else w for w in (self.a, self.b))
        z = F.linear(x.to(C128), a, b) * self.gain + self.scale
        z = torch.tanh(z) * b.conj() + z.imag
        return torch.cat([z.real, z.abs(), (z @ a).imag.sin()], -1)


MODELS: dict[str, tuple[Callable[[bool], nn.Module], Tensor]] = {
    "1d": (Operator1d, normal(3, 1, 8)),
    "2d": (Operator2d, normal(2, 1, 6, 6)),
    "mixed": (Mixed, normal(4, 4)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build(False)
    torch.manual_seed(0)
    paired = build(True)
    target = torch.rand(model(x).shape, dtype=F64)
    assert sum(p.is_complex() for p in model.parameters()) > 0
    return model, paired, x, target


def hessian(model: nn.Module, x: Tensor, target: Tensor, budget: int | None = None) -> imstep.Hessian:
    return imstep.Hessian(lambda: F.mse_loss(model(x), target) + model(x).pow(3).mean(), model, budget)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", MODELS)
def test_hessian(name: str, budget: int | None) -> None:
    model, paired, x, target = pair(name)
    ours, expected = hessian(model, x, target, budget), hessian(paired, x, target)
    assert ours.shape == expected.shape
    assert relative_error(ours.gradient, expected.gradient) < 1e-14
    v = normal(ours.shape[1], 3)
    assert relative_error(ours @ v, expected @ v) < 1e-13
    assert relative_error(ours @ v[:, 0], expected @ v[:, 0]) < 1e-13
    f = lambda *weights: functional(paired, weights, x, target)
    _, reference = torch.autograd.functional.hvp(f, parts(paired), split(paired, v))
    assert relative_error(ours @ v[:, 0], torch.cat([t.reshape(-1) for t in reference])) < 1e-11


def parts(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p.detach().clone() for p in model.parameters())


def split(model: nn.Module, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(ParameterVector(model).unflatten(v[:, 0]))


def functional(model: nn.Module, weights: tuple[Tensor, ...], x: Tensor, target: Tensor) -> Tensor:
    named = dict(zip((n for n, _ in model.named_parameters()), weights, strict=True))
    z = torch.func.functional_call(model, named, (x,))
    return F.mse_loss(z, target) + z.pow(3).mean()


OPERATORS: dict[str, Callable[..., imstep.Hessian]] = {
    "GaussNewton": lambda model, x, y, budget: imstep.GaussNewton(lambda: (model(x), y), model, F.mse_loss, budget),
    "Fisher": lambda model, x, y, budget: imstep.Fisher(lambda: (model(x), y), model, Gaussian(), None, budget),
    "Jacobian": lambda model, x, y, budget: imstep.Jacobian(lambda: model(x), model, budget),
    "over batches": lambda model, x, y, budget: imstep.Hessian.over(
        x.split(1), lambda part: model(part).pow(2).mean(), model, memory_budget=budget
    ),
}


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators(kind: str, name: str, budget: int | None) -> None:
    model, paired, x, target = pair(name)
    ours, expected = OPERATORS[kind](model, x, target, budget), OPERATORS[kind](paired, x, target, budget)
    v, u = normal(ours.shape[1], 3), normal(ours.shape[0], 3, seed=1)
    assert relative_error(ours @ v, expected @ v) < 1e-13
    assert relative_error(ours.T @ u, expected.T @ u) < 1e-13


@pytest.mark.parametrize("name", MODELS)
def test_blocks(name: str) -> None:
    model, paired, x, target = pair(name)
    ours, expected = hessian(model, x, target), hessian(paired, x, target)
    chosen = [list(m.parameters())[::-1][:3] for m in (model, paired)]
    assert relative_error(ours.block(chosen[0]).to_dense(), expected.block(chosen[1]).to_dense()) < 1e-13
    assert relative_error(ours.block(chosen[0], model).to_dense(), expected.block(chosen[1], paired).to_dense()) < 1e-13


def test_functions_of_complex_tensors() -> None:
    x, v = (torch.view_as_complex(normal(3, 2, seed=seed)) for seed in (0, 1))
    f = lambda z: ((z * z.exp()).sin() * z.conj()).real.sum() + z.abs().pow(3).sum()
    g = lambda r: f(torch.view_as_complex(r))
    x2, v2 = torch.view_as_real(x), torch.view_as_real(v)
    _, expected = torch.autograd.functional.hvp(g, x2, v2)
    assert relative_error(torch.view_as_real(imstep.hvp(f, x, v)), expected) < 1e-13
    assert relative_error(torch.view_as_real(imstep.hvp(f, x, v, h=1e-30)), expected) < 1e-13
    third = torch.autograd.functional.jvp(lambda r: torch.tensordot(torch.func.hessian(g)(r), v2, 2), x2, v2)[1]
    assert relative_error(torch.view_as_real(imstep.third_derivative(f, x, v)), third) < 1e-11
    _, pushed = imstep.jvp(lambda z: z * z.conj().exp(), (x,), (v,))
    assert relative_error(pushed, v * x.conj().exp() + x * v.conj() * x.conj().exp()) < 1e-14
    with pytest.raises(TypeError, match="real direction"):
        imstep.hvp(lambda t: t.pow(3).sum(), x.real, v)


def test_vector_goes_there_and_back() -> None:
    z, r = nn.Parameter(torch.tensor([[1 + 2j, 3 + 4j]])), nn.Parameter(torch.tensor([5.0]))
    vector = ParameterVector([r, z])
    assert vector.get().tolist() == [5, 1, 2, 3, 4]
    assert vector.get().dtype == torch.float32
    back = vector.unflatten(vector.get())
    assert back[0].equal(r)
    assert back[1].equal(z)
    assert vector.flatten([None, z.detach().conj()]).tolist() == [0, 1, -2, 3, -4]
    vector.move(vector.snapshot(), torch.tensor([1.0, 2, 3, 4, 5]), 0.5)
    assert z.tolist() == [[2 + 3.5j, 5 + 6.5j]]
    assert ParameterVector([nn.Parameter(torch.zeros(2, dtype=torch.complex128)), r]).dtype == F64


@pytest.mark.parametrize("budget", [None, 0])
def test_conjugated_and_negated_leaves(budget: int | None) -> None:
    """A parameter may itself be a lazy conjugate, or the imaginary part of one, which is lazily negated."""
    memory = torch.view_as_complex(normal(3, 2))
    a, b = nn.Parameter(memory.clone().conj()), nn.Parameter(memory.clone().conj().imag)
    assert a.is_conj()
    assert b.is_neg()
    c, d = nn.Parameter(torch.view_as_real(a.detach().resolve_conj()).clone()), nn.Parameter(b.detach().clone())

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return ((z * t.exp()).sin() * z.conj()).real.pow(2).sum() + z.conj().imag.tanh().sum() * t.sum()

    ours = imstep.Hessian(lambda: loss(a, b), [b, a], budget)
    expected = imstep.Hessian(lambda: loss(torch.view_as_complex(c), d), [d, c])
    assert relative_error(ours.to_dense(), expected.to_dense()) < 1e-14
    one_by_one = torch.stack([ours @ v for v in torch.eye(9, dtype=F64)])
    assert relative_error(one_by_one, expected.to_dense()) < 1e-14
    assert relative_error(ours.gradient, expected.gradient) < 1e-14
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        ours @ normal(9)


PRECONDITIONINGS = [Recycling(), Kronecker(), Hutchinson(), SquaredGradients(), Nystrom(2), NoPreconditioning()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=lambda p: type(p).__name__)
def test_newton_krylov_takes_the_same_steps(preconditioning: object, name: str) -> None:
    model, paired, x, target = pair(name)
    losses = []
    for m in (model, paired):
        optimizer = imstep.NewtonKrylov(m.parameters(), preconditioning=preconditioning)
        losses.append([float(optimizer.step(lambda m=m: F.mse_loss(m(x), target))) for _ in range(4)])
        assert optimizer.last_step.accepted
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-6)
    assert losses[0][-1] < losses[0][0]
    for p, q in zip(model.parameters(), paired.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert relative_error(torch.view_as_real(p.grad) if p.is_complex() else p.grad, q.grad) < 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_least_squares_takes_the_same_steps(name: str) -> None:
    model, paired, x, target = pair(name)
    losses = []
    for m in (model, paired):
        optimizer = imstep.LeastSquares(m.parameters())
        losses.append([float(optimizer.step(lambda m=m: F.mse_loss(m(x), target))) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < 0.5 * losses[0][0]


def complex_normal(*shape: int, seed: int) -> Tensor:
    return torch.view_as_complex(normal(*shape, 2, seed=seed))


X = complex_normal(11, 2, seed=20)

ROWS: dict[str, Callable[..., Tensor]] = {
    "layers": lambda w, v: F.linear(torch.tanh(F.linear(X, w)), v[None], v[:1]).real,
    "both parts": lambda w, v: torch.view_as_real(F.linear(X, w) @ v),
    "modulus": lambda w, v: (w @ X.mT + v[:, None]).abs().prod(0) - 1,
    "conjugates": lambda w, v: ((X @ w.mH) @ v).imag,
    "factors": lambda w, v: (X[:, :1] * v).exp().sum(1).real + (X @ (w[0] * w[1])).imag,
    "quotients": lambda w, v: (v / (3 + X[:, :1]) + X[:, :1] / (3 + v)).sum(1).real,
    "differences": lambda w, v: (X[:, :1] - v).square().sum(1).imag,
    "parts of a weight": lambda w, v: (X.real @ w.real.mT - X.imag @ w.imag.mT).tanh().sum(1),
    "made of parts": lambda w, v: ((X @ torch.complex(w.real, w.imag).mT).sin() @ torch.polar(v.real**2, v.imag)).real,
    "convolution": lambda w, v: F.conv1d(X[:, None], w[:, None], padding=1).tanh().real.sum((1, 2)) + (X @ v[:2]).imag,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["complex", "pairs", "real"])
def test_rows_take_no_pass_for_each_residual(name: str, kind: str) -> None:
    """Of complex parameters, of pairs of real ones seen as complex, and of real ones that meet complex numbers."""
    weights = [complex_normal(4, 2, seed=21), complex_normal(4, seed=22)]
    if kind == "pairs":
        params = [nn.Parameter(torch.view_as_real(w).clone()) for w in weights]
        seen = lambda: map(torch.view_as_complex, params)
    else:
        params = [nn.Parameter(w if kind == "complex" else w.real.clone()) for w in weights]
        seen = lambda: (p.to(C128) for p in params)
    residuals = lambda: ROWS[name](*seen())
    J = ResidualJacobian(lambda: residuals().square().sum() / 2, params)
    rows = [torch.autograd.grad(r, params, retain_graph=True, allow_unused=True) for r in residuals().reshape(-1)]
    as_row = lambda p, g: torch.zeros_like(p) if g is None else g.resolve_conj()
    reals = lambda t: (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
    expected = torch.stack([torch.cat([reals(as_row(p, g)) for p, g in zip(params, row, strict=True)]) for row in rows])
    assert J.explicit == ()
    assert J.backward_passes <= 9
    assert relative_error(J.to_dense(), expected) < 1e-14
    assert relative_error(J.gram().dense(), expected @ expected.mT) < 1e-14


def test_minimize_names_the_way_out() -> None:
    x0, target = torch.zeros(2, dtype=C128), torch.tensor([1 + 2j, -1j], dtype=C128)
    f = lambda z: (z - target).abs().pow(4).sum() + (z.exp() - target.exp()).abs().square().sum()
    with pytest.raises(TypeError, match="view_as_real"):
        imstep.minimize(f, x0)
    found = imstep.minimize(lambda r: f(torch.view_as_complex(r)), torch.view_as_real(x0))
    torch.testing.assert_close(torch.view_as_complex(found.x), target, rtol=0, atol=1e-5)


def test_saved_run_goes_on_alike() -> None:
    model, _, x, target = pair("mixed")
    other = MODELS["mixed"][0](False)
    closure = lambda m: lambda: F.mse_loss(m(x), target)
    optimizer, resumed = (imstep.NewtonKrylov(m.parameters()) for m in (model, other))
    for _ in range(2):
        optimizer.step(closure(model))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        assert optimizer.step(closure(model)).equal(resumed.step(closure(other)))


def test_blocks_of_products_with_complex_parameters_do_not_warn() -> None:
    w = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.complex128))
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    H = imstep.Hessian(lambda: (x @ w).tanh().abs().square().sum(), [w])
    V = torch.randn(H.size, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = H @ V
    torch.testing.assert_close(block, torch.stack([H @ v for v in V.T], dim=1))
