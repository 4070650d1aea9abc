"""Rows of Jacobians for the networks that physics-informed training uses, against one backward pass per residual."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_cases import F64, normal, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import imstep
from imstep import pde
from imstep.curvature import ResidualJacobian, known_rows
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector

Terms = list[Tensor]
POINTS = normal(13, 2)


def slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def nested(net: Callable[[Tensor], Tensor]) -> Terms:
    """u_t + u u_x - u_xx, by nested calls of autograd, and values at other points."""
    x = POINTS.clone().requires_grad_()
    u = net(x)
    d = slopes(u, x)
    equation = d[:, 1:] + u * d[:, :1] - slopes(d[:, 0], x)[:, :1]
    return [equation, net(normal(5, 2, seed=9)) - 1]


def sloped(net: Callable[[Tensor], Tensor]) -> Terms:
    """u_t + u u_x, by autograd, and values at other points."""
    x = POINTS.clone().requires_grad_()
    u = net(x)
    d = slopes(u, x)
    return [d[:, 1:] + u * d[:, :1], net(normal(5, 2, seed=9)) - 1]


def forward(net: Callable[[Tensor], Tensor]) -> Terms:
    """The equation of :func:`nested`, by forward propagation."""
    e = pde.expand(net, POINTS, second=[0])
    assert e.second is not None
    equation = e.first[..., 1] + e.value * e.first[..., 0] - e.second[..., 0]
    return [equation, net(normal(5, 2, seed=9)) - 1]


def functional(net: Callable[[Tensor], Tensor]) -> Terms:
    """The equation of :func:`nested`, by functions of one point."""

    def equation(x: Tensor) -> Tensor:
        u, d = net(x)[0], torch.func.jacrev(net)(x)[0]
        return d[1] + u * d[0] - torch.func.hessian(lambda x: net(x)[0])(x)[0, 0]

    return [torch.func.vmap(equation)(POINTS), net(normal(5, 2, seed=9)) - 1]


class Net(nn.Module):
    """Two hidden layers, what a network of each kind is made of."""

    def __init__(self, inputs: int = 2, width: int = 6, outputs: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Sine(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(3 * self.second(torch.sin(3 * self.first(x)))))


class Fourier(Net):
    def __init__(self, trainable: bool) -> None:
        super().__init__(inputs=8)
        B = normal(2, 4, seed=3)
        self.B = nn.Parameter(B) if trainable else B

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.B
        return super().forward(torch.cat([z.cos(), z.sin()], -1))


class Periodic(Net):
    """The period in time is trained; values at the boundary are built in."""

    def __init__(self) -> None:
        super().__init__(inputs=4)
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y, t = x[..., :1], x[..., 1:]
        y_and_t = math.pi * y, self.rate * t
        z = torch.cat([f(a) for a in y_and_t for f in (torch.cos, torch.sin)], -1)
        return torch.sin(math.pi * y) + t * (1 - y**2) * super().forward(z)


class Modified(Net):
    """Two encoders mixed by gates, and residual connections with a trainable share, as in PirateNet."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.lift = nn.Linear(2, 6), nn.Linear(2, 6), nn.Linear(2, 6)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        u, v, h = torch.tanh(self.u(x)), torch.tanh(self.v(x)), torch.tanh(self.lift(x))
        f = torch.tanh(self.second(h))
        g = f * u + (1 - f) * v
        h = self.alpha * g + (1 - self.alpha) * h
        return self.last(h)


class Adaptive(Net):
    """Slopes of activations: one for all, one for each layer, one for each unit."""

    def __init__(self, *shape: int, times: float = 5.0) -> None:
        super().__init__()
        self.a, self.b, self.times = nn.Parameter(0.2 + torch.zeros(shape)), nn.Parameter(torch.ones(1)), times

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.times * self.a * self.first(x))
        return self.last(torch.tanh(self.a * (self.times * self.b.exp()) * self.second(h)))


class Normalised(Net):
    def __init__(self, kind: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.other = kind(6), kind(6)
        for p in (*self.norm.parameters(), *self.other.parameters()):
            nn.init.normal_(p, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.other(self.second(h))))


class Factorised(nn.Module):
    """Random weight factorisation: W = diag(exp s) V."""

    def __init__(self) -> None:
        super().__init__()
        self.V = nn.ParameterList([normal(2, 6), normal(6, 6, seed=1), normal(6, 1, seed=2)])
        self.s = nn.ParameterList([0.3 * normal(6), 0.3 * normal(6, seed=1), 0.3 * normal(1, seed=2)])
        self.b = nn.ParameterList([normal(6), normal(6, seed=1), normal(1, seed=2)])

    def forward(self, x: Tensor) -> Tensor:
        for at, (V, s, b) in enumerate(zip(self.V, self.s, self.b, strict=True)):
            x = x @ (V * s.exp()) + b
            x = torch.tanh(x) if at < 2 else x
        return x


class FactorisedByMatrix(Factorised):
    """The same, with the diagonal written out."""

    def forward(self, x: Tensor) -> Tensor:
        for at, (V, s, b) in enumerate(zip(self.V, self.s, self.b, strict=True)):
            x = x @ (V @ torch.diag(s.exp())) + b
            x = torch.tanh(x) if at < 2 else x
        return x


class Polynomials(nn.Module):
    """A Kolmogorov-Arnold network: polynomials of each input, with coefficients of their own for each output."""

    def __init__(self) -> None:
        super().__init__()
        self.C, self.c = nn.Parameter(normal(2, 5, 4)), nn.Parameter(normal(5, 1, 4, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        for c in (self.C, self.c):
            t = torch.tanh(x)
            x = torch.einsum("...id,iod->...o", torch.stack([torch.ones_like(t), t, t**2, t**3], -1), c) / 3
        return x


class Ensemble(nn.Module):
    """Networks side by side, whose layers are applied by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.w = nn.Parameter(normal(3, 2, 6)), nn.Parameter(normal(3, 6, 1, seed=1))
        self.b, self.c = nn.Parameter(normal(3, 6, seed=2)), nn.Parameter(normal(3, 1, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("...i,eij->...ej", x, self.W) + self.b)
        return (torch.einsum("...ej,ejo->...eo", h, self.w) + self.c).sum(-2)


class Columns(Net):
    """A weight that multiplies columns; sums of positive steps, as of points in order."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.matmul(self.second.weight, torch.tanh(self.first(x))[..., None])[..., 0]
        return self.last(torch.tanh(h + torch.cumsum(self.second.bias.exp(), 0)))


def weight_normed() -> nn.Module:
    net = Net()
    parametrizations.weight_norm(net.first)
    parametrizations.weight_norm(net.second, dim=1)
    return net


def old_weight_normed() -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.second)
    return net


class LowRank(Net):
    """W + A B, on frozen W."""

    def __init__(self) -> None:
        super().__init__()
        self.second.requires_grad_(False)
        self.A, self.B = nn.Parameter(normal(6, 2)), nn.Parameter(normal(2, 6, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        W = self.second.weight + self.A @ self.B
        return self.last(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), W, self.second.bias)))


class Masked(Net):
    """Weights times a constant mask; a positive output scale; a slope chosen from a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = (normal(6, 6, seed=5) > 0).to(normal(1).dtype)
        self.scale, self.c = nn.Parameter(normal(1)), nn.Parameter(normal(3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(torch.tanh(self.c[1] * self.first(x)), self.second.weight * self.mask))
        return nn.functional.softplus(self.scale) * self.last(h) / self.c[2:] + self.c[:1].expand(len(x), 1)


class Einsum(Net):
    """Weights that are applied by einsum, as a vector, and to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.w = nn.Parameter(normal(6, 5)), nn.Parameter(normal(5, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,io->no", torch.tanh(self.first(x)), self.W)
        return (torch.tanh(h) @ self.w)[..., None]


def radial() -> tuple[nn.Module, Callable[[], Terms]]:
    module = nn.Module()
    module.centres, module.widths = nn.Parameter(normal(7, 2)), nn.Parameter(normal(7, seed=1))
    module.c = nn.Parameter(normal(7, seed=2))

    def net(x: Tensor) -> Tensor:
        distance = (x[..., None, :] - module.centres).square().sum(-1)
        return ((-distance * module.widths.exp()).exp() @ module.c)[..., None]

    return module, lambda: nested(net)


def inverse(scale: Callable[[Tensor], Tensor]) -> Callable[[], tuple[nn.Module, Callable[[], Terms]]]:
    """A coefficient of the equation that is trained, and data."""

    def make() -> tuple[nn.Module, Callable[[], Terms]]:
        net = Net()
        net.nu, net.speed = nn.Parameter(torch.tensor([0.3, 0.7])), nn.Parameter(torch.tensor(1.5))

        def terms() -> Terms:
            x = POINTS.clone().requires_grad_()
            u = net(x)
            d = slopes(u, x)
            bent = slopes(d[:, 0], x)[:, :1]
            return [d[:, 1:] + net.speed * u * d[:, :1] - scale(net.nu)[0] * bent + u / scale(net.nu)[1], u - x[:, :1]]

        return net, terms

    return make


def navier_stokes(join: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[], tuple[nn.Module, Callable[[], Terms]]]:
    """Velocity and pressure: three equations at each point."""

    def make() -> tuple[nn.Module, Callable[[], Terms]]:
        net = Net(outputs=3)

        def terms() -> Terms:
            e = pde.expand(net, POINTS, laplacian=[0, 1])
            assert e.laplacian is not None
            (u, v, _), first, bent = e.value.unbind(-1), e.first, e.laplacian
            equations = [
                u * first[:, 0, 0] + v * first[:, 0, 1] + first[:, 2, 0] - 0.01 * bent[:, 0],
                u * first[:, 1, 0] + v * first[:, 1, 1] + first[:, 2, 1] - 0.01 * bent[:, 1],
                first[:, 0, 0] + first[:, 1, 1],
            ]
            return [*join(equations), net(normal(5, 2, seed=9))[:, :2]]

        return net, terms

    return make


def of(make: Callable[[], nn.Module], residuals: Callable[[nn.Module], Terms] = nested) -> Callable[[], object]:
    def build() -> tuple[nn.Module, Callable[[], Terms]]:
        net = make()
        return net, lambda: residuals(net)

    return build


CASES = {
    "sine layers": of(Sine),
    "fixed Fourier features": of(lambda: Fourier(False)),
    "trained Fourier features": of(lambda: Fourier(True)),
    "periodic, hard boundary": of(Periodic),
    "modified, gated": of(Modified),
    "one slope": of(lambda: Adaptive()),
    "slope of one entry": of(lambda: Adaptive(1)),
    "slope a unit": of(lambda: Adaptive(6)),
    "layer norm": of(lambda: Normalised(nn.LayerNorm), sloped),
    "RMS norm": of(lambda: Normalised(nn.RMSNorm)),
    "layer norm, values only": of(lambda: Normalised(nn.LayerNorm), lambda net: [net(POINTS)]),
    "RMS norm, values only": of(lambda: Normalised(nn.RMSNorm), lambda net: [net(POINTS)]),
    "PReLU, values only": of(lambda: Normalised(nn.PReLU), lambda net: [net(POINTS)]),
    "factorised weights": of(Factorised),
    "weight norm": of(weight_normed),
    "weight norm by a hook": of(old_weight_normed),
    "low rank": of(LowRank),
    "masked weights": of(Masked),
    "einsum": of(Einsum),
    "radial basis": radial,
    "coefficients": inverse(lambda nu: nu),
    "positive coefficients": inverse(torch.exp),
    "forward: sine": of(Sine, forward),
    "forward: trained Fourier features": of(lambda: Fourier(True), forward),
    "forward: periodic": of(Periodic, forward),
    "forward: gated": of(Modified, forward),
    "forward: slopes": of(lambda: Adaptive(6), forward),
    "forward: layer norm": of(lambda: Normalised(nn.LayerNorm), forward),
    "forward: factorised": of(Factorised, forward),
    "forward: weight norm": of(weight_normed, forward),
    "factorised by a matrix": of(FactorisedByMatrix),
    "polynomials": of(Polynomials),
    "columns": of(Columns),
    "ensemble": of(Ensemble),
    "forward: factorised by a matrix": of(FactorisedByMatrix, forward),
    "forward: polynomials": of(Polynomials, forward),
    "forward: columns": of(Columns, forward),
    "forward: ensemble": of(Ensemble, forward),
    "functional: polynomials": of(Polynomials, functional),
    "functional: columns": of(Columns, functional),
    "functional: ensemble": of(Ensemble, functional),
    "Navier-Stokes, three terms": navier_stokes(list),
    "Navier-Stokes, one column an equation": navier_stokes(lambda r: [torch.stack(r, 1)]),
    "Navier-Stokes, one row an equation": navier_stokes(lambda r: [torch.stack(r)]),
    "Navier-Stokes, end to end": navier_stokes(lambda r: [torch.cat(r)]),
    "Navier-Stokes, columns end to end": navier_stokes(lambda r: [torch.cat([e[:, None] for e in r])]),
}


def dense(terms: Terms, params: list[nn.Parameter]) -> Tensor:
    """∂ρ/∂w row by row, for the loss Σ mean z²."""
    rows = []
    for z in terms:
        for r in ((2 / z.numel()) ** 0.5 * z).reshape(-1):
            gradients = torch.autograd.grad(r, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


def built(name: str, dtype: torch.dtype = F64) -> tuple[list[nn.Parameter], Callable[[], Terms]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, terms = CASES[name]()  # type: ignore[misc]
    params = [p for p in module.to(dtype).parameters() if p.requires_grad]
    return params, terms


@pytest.mark.parametrize("name", CASES)
def test_jacobian(name: str) -> None:
    params, terms = built(name)
    expected = dense(terms(), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = ResidualJacobian(lambda: sum((z.square().mean() for z in terms()), torch.zeros((), dtype=F64)), params)
    values = torch.cat([((2 / z.numel()) ** 0.5 * z).reshape(-1) for z in terms()]).detach()
    order = torch.cdist(values[:, None], J.residuals[:, None]).argmin(1)
    torch.testing.assert_close(J.residuals[order], values)
    assert J.explicit == ()
    assert relative_error(J.to_dense()[order], expected) < 1e-12
    assert relative_error(J.gram().dense()[order][:, order], expected @ expected.mT) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accurate as the dtype, by the same ways."""
    here = sys.modules[__name__]
    double = normal
    monkeypatch.setattr(here, "normal", lambda *shape, seed=0: double(*shape, seed=seed).float())
    monkeypatch.setattr(here, "POINTS", POINTS.float())
    params, terms = built(name, torch.float32)
    expected = dense(terms(), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = ResidualJacobian(lambda: sum((z.square().mean() for z in terms()), torch.zeros(())), params)
    values = torch.cat([((2 / z.numel()) ** 0.5 * z).reshape(-1) for z in terms()]).detach()
    order = torch.cdist(values[:, None].double(), J.residuals[:, None]).argmin(1)
    assert J.explicit == ()
    assert relative_error(J.to_dense()[order], expected.double()) < 1e-4


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.end = layer, nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x)[0][:, -1])


class Twice(nn.Module):
    """The last output of a recurrent layer that goes over its own outputs again."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.end = layer, nn.Linear(layer.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        return self.end(self.layer(y, state)[0][:, -1])


class Grid(nn.Module):
    """Features between the corners of a table, by bilinear interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.end = nn.Parameter(normal(4, 4, 3)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().floor().clamp(-2, 0).long()
        near = lambda i, j: self.table[at[:, 0] + i, at[:, 1] + j]  # also from the end
        s, t = (x - at).split(1, 1)
        low, high = (near(i, 0) * (1 - t) + near(i, 1) * t for i in (0, 1))
        return self.end(low * (1 - s) + high * s)


class Squared(nn.Module):
    """A function of two arguments at twice the same."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x, x)


def signals(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(width, 1))


SERIES, PICTURES, WORDS = normal(9, 4, 7), normal(6, 4, 6, 6), torch.arange(30).view(10, 3) % 7
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "batch norm, evaluating": (lambda: signals(nn.BatchNorm1d(4), width=28).eval(), SERIES),
    "batch norm of pictures, evaluating": (lambda: signals(nn.BatchNorm2d(4), width=144).eval(), PICTURES),
    "group norm": (lambda: signals(nn.GroupNorm(2, 4), width=144), PICTURES),
    "instance norm": (lambda: signals(nn.InstanceNorm2d(4, affine=True), width=144), PICTURES),
    "convolution": (lambda: signals(nn.Conv1d(4, 5, 3, padding=1, dilation=2), width=25), SERIES),
    "convolution with groups": (lambda: signals(nn.Conv2d(4, 6, 3, groups=2), width=96), PICTURES),
    "depthwise convolution": (lambda: signals(nn.Conv1d(4, 4, 3, groups=4, stride=2), width=12), SERIES),
    "convolution in space": (lambda: signals(nn.Conv3d(1, 2, (3, 2, 1)), width=120), PICTURES[:, None]),
    "transposed convolution": (lambda: signals(nn.ConvTranspose1d(4, 2, 3, groups=2), width=18), SERIES),
    "transposed convolution with strides": (
        lambda: signals(nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), width=288),
        PICTURES,
    ),
    "table": (lambda: signals(nn.Embedding(7, 4, padding_idx=2), width=12), WORDS),
    "table between points": (Grid, POINTS),
    "bilinear": (lambda: signals(Squared(nn.Bilinear(4, 4, 3)), width=3), SERIES[..., 0]),
    "recurrent layer": (lambda: Last(nn.RNN(7, 5, batch_first=True)), SERIES),
    "recurrent layer, relu": (lambda: Last(nn.RNN(7, 5, nonlinearity="relu", batch_first=True)), SERIES),
    "LSTM": (lambda: Last(nn.LSTM(7, 5, 2, batch_first=True, bidirectional=True)), SERIES),
    "GRU": (lambda: Last(nn.GRU(7, 5, batch_first=True)), SERIES),
    "GRU, both ways": (lambda: Last(nn.GRU(7, 5, 2, batch_first=True, bidirectional=True)), SERIES),
    "GRU, twice": (lambda: Twice(nn.GRU(7, 7, batch_first=True)), SERIES),
    "GRU without biases": (lambda: Last(nn.GRU(7, 5, batch_first=True, bias=False)), SERIES),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Of their values, none takes a backward pass for each residual."""
    make, x = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(F64)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += normal(*buffer.shape, seed=3).square()
    terms = lambda: [model(x) - 1]
    J = ResidualJacobian(lambda: terms()[0].square().mean(), model)
    assert J.explicit == ()
    assert J.backward_passes <= 4
    matrix = J.to_dense()
    assert relative_error(matrix, dense(terms(), list(model.parameters()))) < 1e-12
    assert not matrix.requires_grad


@pytest.mark.parametrize("frozen", ["ih", "weight_ih bias"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_whose_inputs_are_constants(kind: type[nn.RNNBase], frozen: str) -> None:
    """Rows of what is left are told as well."""
    model = Last(kind(7, 5, 1, batch_first=True, bidirectional=True)).to(F64)
    for name, p in model.layer.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen.split()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    terms = lambda: [model(SERIES) - 1]
    J = ResidualJacobian(lambda: terms()[0].square().mean(), parameters)
    assert J.explicit == ()
    assert J.backward_passes <= 4
    assert relative_error(J.to_dense(), dense(terms(), parameters)) < 1e-12


@pytest.mark.parametrize("name", ["bilinear", "table between points"])
def test_slopes_of_layers(name: str) -> None:
    make, x = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(F64)

    def terms() -> Terms:
        points = x.clone().requires_grad_()
        return [slopes(model(points), points).sum(1) - 1]

    J = ResidualJacobian(lambda: terms()[0].square().mean(), model)
    assert J.explicit == ()
    assert relative_error(J.to_dense(), dense(terms(), list(model.parameters()))) < 1e-12


@pytest.mark.parametrize("settings", [{"scale_grad_by_freq": True}, {"padding_idx": 0, "scale_grad_by_freq": True}])
def test_a_table_whose_gradient_is_scaled(settings: dict[str, Any]) -> None:
    """What autograd passes back is no derivative."""
    model = signals(nn.Embedding(7, 4, **settings), width=12).to(F64)
    loss = lambda: (model(WORDS) - 1).square().mean()
    for curvature in (ResidualJacobian, imstep.Hessian):
        with pytest.raises(imstep.UnsupportedOperatorError, match="scale_grad_by_freq"):
            curvature(loss, model)
    table, bag = torch.ones(7, 4, dtype=F64), nn.EmbeddingBag(7, 4, mode="sum", **settings).to(F64)
    look_up = lambda w: nn.functional.embedding(WORDS, w, **settings)
    with pytest.raises(imstep.UnsupportedOperatorError, match="scale_grad_by_freq"):
        imstep.hvp(lambda w: look_up(w).square().sum(), table, table)
    with pytest.raises(imstep.UnsupportedOperatorError, match="scale_grad_by_freq"):
        imstep.LeastSquares(bag.parameters()).step(lambda: bag(WORDS).square().sum())


class Operator(nn.Module):
    """Of functions given by a few values, at points: products of features of both, as in DeepONet."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.branch, self.trunk = Net(3, outputs=4 * outputs), Net(2, outputs=4)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, functions: Tensor, points: Tensor) -> Tensor:
        features = self.branch(functions).unflatten(1, (len(self.shift), 4))
        return torch.einsum("bcp,np->bnc", features, self.trunk(points)) + self.shift


def operator_data(net: Operator) -> Terms:
    return [net(normal(5, 3, seed=1), POINTS) - 1]


def operator_equations(net: Operator) -> Terms:
    """A transport equation for each function, and values at other points."""
    x = POINTS.clone().requires_grad_()
    u = net(normal(5, 3, seed=1), x)[..., 0]
    return [torch.stack([slopes(own, x) @ torch.ones(2, dtype=F64) for own in u]), net(normal(5, 3, seed=1), -x)]


def operator_terms(net: Operator) -> Terms:
    """The same equation and its values, with a term for each function."""
    equations, values = operator_equations(net)
    return [*equations, *values[:, :4, 0]]


def separable(net: nn.Module) -> Terms:
    """Functions of one variable each, multiplied on a grid."""
    return [torch.einsum("ip,jp->ij", net.branch(normal(6, 3)), net.trunk(normal(7, 2))) - 1]


def operator_conditions(net: Operator) -> Terms:
    """The equation, and values at single points: a start, a period."""
    functions, at = normal(5, 3, seed=1), lambda x: torch.full((1, 2), x, dtype=F64)
    equations, around = operator_equations(net)[0], net(functions, POINTS[:2])[..., 0]
    return [equations, net(functions, at(0.0))[..., 0] - 1, net(functions, at(1.0))[:, 0], around[:, 0] - around[:, 1]]


def operator_and_points(net: Operator) -> Terms:
    """Data, put end to end with what is independent from point to point."""
    return [torch.cat([operator_data(net)[0].flatten(), net.trunk(normal(90, 2, seed=5))[:, 0] - 1])]


def separable_edges(net: nn.Module) -> Terms:
    """The grid, and its edges, where one of the factors has a single row."""
    f, g, edge = net.branch(normal(8, 3)), net.trunk(normal(7, 2)), normal(1, 2, seed=3)
    return [f @ g.mT - 1, f @ net.trunk(edge).mT, net.branch(normal(1, 3, seed=4)) @ g.mT, f @ net.trunk(-edge).mT]


SHARED = {
    "operator": (Operator, operator_data),
    "operator, end to end": (Operator, lambda net: [operator_data(net)[0].flatten()]),
    "operator, two outputs": (lambda: Operator(2), operator_data),
    "operator, equations": (Operator, operator_equations),
    "operator, function by function": (Operator, operator_terms),
    "separable": (Operator, separable),
}
"""Where each function has residuals at several points only."""

CONDITIONS = {
    "operator, conditions": (Operator, operator_conditions),
    "operator, beside points": (Operator, operator_and_points),
    "separable, edges": (Operator, separable_edges),
    "separable, end to end": (Operator, lambda net: [torch.cat([z.flatten() for z in separable_edges(net)])]),
}
"""Where there are values of all functions at one point, too."""


@pytest.mark.parametrize("name", [*SHARED, *CONDITIONS])
def test_uses_that_share_rows_in_ways_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function has residuals at all points, and every point those of all functions: J is not written out.

    Biases may be, for those of a batch of one are added to all functions' values.
    """
    monkeypatch.setattr(known_rows, "AFFORDABLE", 0)
    monkeypatch.setattr(known_rows, "_ROOM", 0)
    make, residuals = {**SHARED, **CONDITIONS}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().to(F64)
    params, vector, known = list(net.parameters()), ParameterVector(net), KnownOwners()
    biases = {at for at, p in enumerate(params) if p.ndim < 2} if name in CONDITIONS else set()
    loss = lambda: sum((z.square().mean() for z in residuals(net)), torch.zeros((), dtype=F64))
    for passes in (200, 40):  # the owners are known from the second on
        J = ResidualJacobian.at(FrozenClosure(loss, vector), vector, known)
        assert set(J.explicit) <= biases
        assert J.backward_passes < passes or name in CONDITIONS
        rows, expected = J.to_dense(), dense(residuals(net), params)
        order = torch.cdist(expected, rows).argmin(1)
        assert relative_error(rows[order], expected) < 1e-12
        known.load_state_dict(known.state_dict())


@pytest.mark.parametrize("kind", [Net, Modified, Factorised, Polynomials, Ensemble])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_differences_of_values_nearby(dtype: torch.dtype, kind: Callable[[], nn.Module]) -> None:
    """What cancels in a difference quotient leaves its rounding in the rows, which are right all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind().to(dtype)
    params, (x, h) = list(net.parameters()), (POINTS.to(dtype), torch.tensor([1e-2, 0], dtype=dtype))
    terms = lambda: [(net(x + h) - 2 * net(x) + net(x - h)) / 1e-4]
    J = ResidualJacobian(lambda: terms()[0].square().mean(), params)
    assert J.explicit == ()
    assert relative_error(J.to_dense(), dense(terms(), params).double()) < 1e5 * torch.finfo(dtype).eps
