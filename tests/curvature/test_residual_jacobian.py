"""Rows of Jacobians read off autograd's graph, against one backward pass per residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imstep.curvature import ParameterVector, ResidualJacobian
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.gathering import KnownPlaces
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.use import Rows

Weighted = list[tuple[float, Tensor]]
Case = tuple[list[nn.Parameter], Callable[[], Weighted]]


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1]).double()


def case(model: nn.Module, residuals: Callable[[], Weighted]) -> Case:
    return list(model.parameters()), residuals


def slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def regression() -> Case:
    model, x, y = mlp(3, 5, 4, 1), normal(9, 3), normal(9, 1, seed=1)
    return case(model, lambda: [(1.0, model(x) - y)])


def components() -> Case:
    model, x, y = mlp(3, 5, 4), normal(6, 3), normal(6, 4, seed=1)
    return case(model, lambda: [(2.0, model(x) - y)])


def dead_units() -> Case:
    model, x = mlp(3, 8, 8, 1, activation=nn.ReLU), normal(70, 3)
    return case(model, lambda: [(1.0, model(x))])


def transport() -> Case:
    """First input derivatives, an initial condition, a periodic boundary: two rows a residual."""
    model, x = mlp(2, 6, 6, 1), normal(20, 2).requires_grad_()
    start, left, right = normal(7, 2, seed=1), normal(5, 2, seed=2), normal(5, 2, seed=3)

    def residuals() -> Weighted:
        d = slopes(model(x), x)
        return [(1.0, d[:, 1] + 30 * d[:, 0]), (3.0, model(start)[:, 0] - 1), (0.5, model(left) - model(right))]

    return case(model, residuals)


def heat() -> Case:
    """Second input derivatives."""
    model, x = mlp(2, 6, 6, 1), normal(12, 2).requires_grad_()

    def residuals() -> Weighted:
        d = slopes(model(x), x)
        return [(1.0, d[:, 1] - slopes(d[:, 0], x)[:, 0])]

    return case(model, residuals)


def together() -> Case:
    """All conditions from one evaluation of the model on concatenated points."""
    model, x = mlp(2, 6, 1), normal(17, 2).requires_grad_()

    def residuals() -> Weighted:
        u = model(x)
        d = slopes(u[:9], x)[:9]
        return [(1.0, d[:, 1] + d[:, 0]), (1.0, u[9:13] - u[13:])]

    return case(model, residuals)


def two_conditions() -> Case:
    """Two residuals at each point: rows are shared."""
    model, x = mlp(2, 6, 1), normal(8, 2).requires_grad_()

    def residuals() -> Weighted:
        u = model(x)
        return [(1.0, u - 1), (1.0, slopes(u, x)[:, 1])]

    return case(model, residuals)


def functional() -> Case:
    model, x = mlp(2, 6, 1), normal(8, 2)
    gradient = torch.func.vmap(torch.func.grad(lambda p: model(p).squeeze()))
    return case(model, lambda: [(1.0, gradient(x)[:, 1] - model(x)[:, 0])])


def convolution() -> Case:
    body = (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False))
    model, x = nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 1)).double(), normal(5, 2, 5, 5)
    return case(model, lambda: [(1.0, model(x))])


def convolution_over_time() -> Case:
    model = nn.Sequential(nn.Conv1d(2, 9, 3, padding=2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(63, 1)).double()
    x = normal(5, 2, 7)
    return case(model, lambda: [(1.0, model(x))])


def sequence() -> Case:
    """A layer over positions, several rows a residual; a wide one, so that the factors are kept."""
    inner, outer, x = nn.Linear(15, 20).double(), nn.Linear(20, 1, bias=False).double(), normal(6, 2, 15)
    return case(nn.ModuleList([inner, outer]), lambda: [(1.0, outer(inner(x).tanh()).mean(1))])


def tied() -> Case:
    model = mlp(4, 4, 4, 4, 1)
    model[2].weight = model[0].weight
    model[4].bias = model[0].bias
    x = normal(8, 4)
    return case(model, lambda: [(1.0, model(x))])


def by_hand() -> Case:
    """Weights on the left, scales, biases by broadcasting, factors of addmm, a difference."""
    weight, bias = nn.Parameter(normal(5, 3)), nn.Parameter(normal(5, 1, seed=1))
    scale, slope = nn.Parameter(normal(5, seed=2)), nn.Parameter(normal(1, seed=3)[0])
    last, shift = nn.Parameter(normal(5, 2, seed=4)), nn.Parameter(normal(2, seed=5))
    x = normal(7, 3, seed=5)

    def residuals() -> Weighted:
        h = (slope * (weight @ x.T - bias)).tanh().T * scale
        return [(1.0, torch.addmm(shift, h, last, beta=0.5, alpha=2.0).sum(1))]

    return [weight, bias, scale, slope, last, shift], residuals


def checkpointed() -> Case:
    model, x = mlp(3, 5, 4, 1), normal(9, 3)
    return case(model, lambda: [(1.0, checkpoint(model, x, use_reentrant=False))])


def frozen() -> Case:
    model, x = mlp(3, 5, 4, 1), normal(9, 3)
    model[0].weight.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad], lambda: [(1.0, model(x))]


def ensemble_of(count: int, *widths: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    models = [mlp(*widths) for _ in range(count)]
    stacked, _ = torch.func.stack_module_state(models)
    return models[0], {name: nn.Parameter(p.detach()) for name, p in stacked.items()}


def ensemble() -> Case:
    """Each member has residuals of its own."""
    base, params = ensemble_of(4, 3, 7, 6, 1)
    x = normal(9, 3)
    outputs = torch.func.vmap(lambda p, x: torch.func.functional_call(base, p, (x,)), (0, None))
    return list(params.values()), lambda: [(1.0, outputs(params, x) - normal(9, 1, seed=1))]


def mean_of_ensemble() -> Case:
    """Each residual has a row of every member; each member has inputs of its own."""
    base, params = ensemble_of(3, 3, 5, 2)
    x = normal(3, 9, 3)
    outputs = torch.func.vmap(lambda p, x: torch.func.functional_call(base, p, (x,)))
    return list(params.values()), lambda: [(1.0, outputs(params, x).mean(0))]


def slopes_of_ensemble() -> Case:
    base, params = ensemble_of(4, 2, 7, 6, 1)
    x = normal(8, 2)
    slope = torch.func.grad(lambda x, p: torch.func.functional_call(base, p, (x,)).squeeze())
    outputs = torch.func.vmap(torch.func.vmap(slope, (0, None)), (None, 0))
    return list(params.values()), lambda: [(1.0, outputs(x, params)[..., 1])]


CASES = [
    ensemble, mean_of_ensemble, slopes_of_ensemble,
    regression, components, dead_units, transport, heat, together, two_conditions, functional, convolution,
    convolution_over_time, sequence, tied, by_hand, checkpointed, frozen,
]  # fmt: skip


def unrecognised() -> Case:
    """Rows that nothing tells: of a weight that is summed up first and penalised itself, and of a rare operator's."""
    model, norm, bent = mlp(3, 5, 4, 1), nn.LayerNorm(5).double(), nn.Parameter(normal(3, 3))
    x = normal(9, 3)
    params = [*model.parameters(), *norm.parameters(), bent]
    scaled = lambda h: torch.addcmul(norm.bias, h, norm.weight)
    return params, lambda: [(1.0, model[1:](scaled(model[0](x @ bent.logcumsumexp(0))))), (0.1, bent)]


def build(make: Callable[[], Case]) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def loss_of(terms: Weighted) -> Tensor:
    return sum((weight * (z**2).mean() for weight, z in terms), torch.zeros((), dtype=F64))


def dense(case: Case) -> tuple[Tensor, Tensor]:
    """Residuals with f = ρᵀρ/2 and their Jacobian, row by row."""
    params, residuals = case
    scaled = torch.cat([((2 * weight / z.numel()) ** 0.5 * z).reshape(-1) for weight, z in residuals()])
    rows = []
    for r in scaled:
        gradients = torch.autograd.grad(r, params, retain_graph=True, allow_unused=True)
        pairs = zip(params, gradients, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    return scaled.detach(), torch.stack(rows)


def jacobian_at(closure: Callable[[], Tensor], vector: ParameterVector, known: KnownOwners) -> ResidualJacobian:
    return ResidualJacobian.at(FrozenClosure(closure, vector), vector, known)


def in_order_of(J: ResidualJacobian, values: Tensor) -> Tensor:
    """Where the entries of ``values`` stand among the Jacobian's residuals."""
    return torch.cdist(values[:, None], J.residuals[:, None]).argmin(1)


@pytest.mark.parametrize("make", CASES)
def test_is_the_jacobian(make: Callable[[], Case]) -> None:
    params, residuals = build(make)
    values, expected = dense((params, residuals))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = ResidualJacobian(lambda: loss_of(residuals()), params)
    order = in_order_of(J, values)
    torch.testing.assert_close(J.residuals[order], values)
    assert relative_error(J.to_dense()[order], expected) < 1e-12
    assert relative_error(J.gram().dense()[order][:, order], expected @ expected.T) < 1e-12
    assert J.explicit == ()


@pytest.mark.parametrize("make", [transport, components, sequence, unrecognised])
@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_products_diagonal_and_columns(make: Callable[[], Case]) -> None:
    params, residuals = build(make)
    J = ResidualJacobian(lambda: loss_of(residuals()), params)
    matrix, (count, size) = J.to_dense(), J.shape
    v, u, index = normal(size), normal(count, seed=1), torch.tensor([count - 1, 0, 2])
    gram = J.gram()
    torch.testing.assert_close(J @ v, matrix @ v)
    torch.testing.assert_close(J.T @ u, matrix.T @ u)
    torch.testing.assert_close(gram @ u, matrix @ (matrix.T @ u))
    torch.testing.assert_close(gram.diagonal(), (matrix**2).sum(1))
    torch.testing.assert_close(gram.columns(index), matrix @ matrix[index].T)
    torch.testing.assert_close(J.rows(index).to_dense(), matrix[index])


@pytest.mark.parametrize("make", [transport, unrecognised])
@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_blocks_of_products_with_the_gram_matrix(make: Callable[[], Case]) -> None:
    """Few by J (Jᵀ V), many by the matrix itself."""
    params, residuals = build(make)
    J = ResidualJacobian(lambda: loss_of(residuals()), params)
    matrix, gram = J.to_dense(), J.gram()
    for columns in (0, 1, 200):
        block = normal(J.shape[0], columns)
        torch.testing.assert_close(gram @ block, matrix @ (matrix.T @ block))


@pytest.mark.parametrize("make", CASES)
def test_owners_are_found_once(make: Callable[[], Case]) -> None:
    """The next Jacobian, elsewhere, is the same with remembered owners as without, from fewer passes."""
    params, residuals = build(make)
    vector, known = ParameterVector(params), KnownOwners()
    closure = lambda: loss_of(residuals())
    passes = [jacobian_at(closure, vector, known).backward_passes]
    for seed in (1, 2):
        vector.move(vector.snapshot(), 0.3 * normal(vector.size, seed=seed), 1.0)
        J = jacobian_at(closure, vector, known)
        passes.append(J.backward_passes)
        assert torch.equal(J.to_dense(), jacobian_at(closure, vector, KnownOwners()).to_dense())
    assert make is dead_units or (passes[0] > passes[1] == passes[2])


def test_new_data_take_no_more_passes_than_old() -> None:
    """Which row belongs to which residual follows from the graph and its shapes."""
    model = mlp(2, 6, 6, 1)
    vector, known = ParameterVector(model), KnownOwners()
    passes = []
    for seed in (0, 1, 1, 2):
        x = normal(70, 2, seed=seed).requires_grad_()

        def closure(x: Tensor = x) -> Tensor:
            u = model(x)
            return (slopes(u, x)[:, :1] - u).square().mean()

        J = jacobian_at(closure, vector, known)
        passes.append(J.backward_passes)
        assert torch.equal(J.to_dense(), jacobian_at(closure, vector, KnownOwners()).to_dense())
    assert passes[0] > passes[1] == passes[2] == passes[3] == 2


def test_remembered_owners_are_checked() -> None:
    """Other data of the same shapes, in another order; other shapes; residuals that depend on each other now."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)).double().eval()
    x = normal(9, 3)
    vector, known = ParameterVector(model), KnownOwners()
    at = lambda values: jacobian_at(lambda: values().square().mean(), vector, known)
    reference = at(lambda: model(x)).to_dense()
    turned = torch.arange(9).roll(2)
    assert relative_error(at(lambda: model(x)[turned]).to_dense(), reference[turned]) < 1e-12
    assert relative_error(at(lambda: model(x[:5])).to_dense(), (9 / 5) ** 0.5 * reference[:5]) < 1e-12
    at(lambda: model(x))
    model.train()
    whole = dense((list(model.parameters()), lambda: [(1.0, model(x))]))[1]
    for _ in range(2):
        assert relative_error(at(lambda: model(x)).to_dense(), whole) < 1e-12


@pytest.mark.parametrize("make", CASES)
def test_gradient(make: Callable[[], Case]) -> None:
    params, residuals = build(make)
    loss = loss_of(residuals())
    J = ResidualJacobian(lambda: loss_of(residuals()), params)
    expected = torch.autograd.grad(loss, params, allow_unused=True)
    torch.testing.assert_close(J.T @ J.residuals, ParameterVector(params).flatten(expected))
    torch.testing.assert_close(J.loss, loss.detach())
    torch.testing.assert_close(J.residuals.square().sum() / 2, loss.detach())


def test_keeps_factors_where_that_is_less() -> None:
    """Numbers that a Jacobian keeps: far fewer than its entries for a wide layer."""
    model, x = mlp(2, 60, 60, 1), normal(10, 2)
    J = ResidualJacobian(lambda: model(x).square().mean(), model)
    kept = sum(t.numel() for part in J._parts for t in vars(part).values())
    assert kept < 0.1 * J.shape[0] * J.shape[1]


def filled(entries: Tensor) -> Tensor:
    """Of 6 x 6, symmetric."""
    whole, index = torch.zeros(6, 6, dtype=F64), torch.triu_indices(6, 6)
    whole[index[0], index[1]] = entries
    return whole + whole.triu(1).T


def spectral(W: Tensor) -> Tensor:
    u = normal(6, seed=3)
    return W / torch.vdot(u, W @ u)


EYE = torch.eye(6, dtype=F64)
APART = torch.arange(6)[:, None] - torch.arange(6)
MADE: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "circulant": ((6,), lambda c: c[APART % 6]),
    "toeplitz": ((11,), lambda c: c[APART + 5]),
    "hankel": ((11,), lambda c: c.take(torch.arange(6)[:, None] + torch.arange(6))),
    "permuted": ((6, 6), lambda W: W[torch.arange(6).flip(0)]),
    "gathered": ((6, 6), lambda W: W.gather(1, APART % 6)),
    "symmetric": ((21,), filled),
    "orthogonal": ((6, 6), lambda W: normal(6, 6, seed=2) @ torch.linalg.qr(W)[0]),
    "rotation": ((6, 6), lambda W: torch.matrix_exp(W - W.T)),
    "cayley": ((6, 6), lambda W: torch.linalg.solve(EYE + W - W.T, EYE)),
    "subspace": ((4,), lambda c: (normal(36, 4, seed=2) @ c).view(6, 6)),
    "blocks": ((3, 3), lambda W: torch.block_diag(W, W)),
    "spectral": ((6, 6), spectral),
    "fourier": ((6,), lambda c: torch.fft.irfft(torch.fft.rfft(c)[:, None] * torch.fft.rfft(EYE, dim=0), 6, 0)),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a table"])
@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("name", MADE)
def test_weights_that_are_put_together_from_parameters(
    name: str, count: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By indices and matrix functions, from fewer numbers than entries; not written out, however large."""
    shape, make = MADE[name]
    c, last, table = nn.Parameter(normal(*shape) / 2), nn.Linear(6, 1).double(), nn.Embedding(4, 6).double()
    x, params = normal(count, 6), [c, *last.parameters(), *(table.parameters() if beside else ())]
    inputs = lambda: x + table(torch.arange(count) % 4) if beside else x
    residuals = lambda: [(1.0, last((inputs() @ make(c).T).tanh()))]
    values, expected = dense((params, residuals))
    monkeypatch.setattr("imstep.curvature.known_rows.AFFORDABLE", 8)
    vector, known = ParameterVector(params), KnownOwners()
    for at in range(3):
        J = jacobian_at(lambda: loss_of(residuals()), vector, known)
        assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12
        if count > 6:
            assert J.explicit == ()
            assert J.backward_passes <= (20, 2, 3)[at]
        if at == 1:
            state, known = known.state_dict(), KnownOwners()
            known.load_state_dict(state)


def test_a_network_that_makes_the_weights_of_another() -> None:
    maker, last, given = mlp(3, 5, 12), nn.Linear(4, 1).double(), normal(3, seed=1)
    x, params = normal(20, 3), [*maker.parameters(), *last.parameters()]
    residuals = lambda: [(1.0, last((x @ maker(given).view(4, 3).T).tanh()))]
    values, expected = dense((params, residuals))
    J = ResidualJacobian(lambda: loss_of(residuals()), params)
    assert J.explicit == ()
    assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12


@pytest.mark.parametrize("count", [9, 40])
def test_uses_that_are_not_recognised_are_written_out(count: int) -> None:
    """By columns where there are fewer of them, 19, than rows."""
    params, _ = build(unrecognised)
    x, (inner, norm, bent) = normal(count, 3), (params[:6], params[6:8], params[8])

    def residuals() -> Weighted:
        h = torch.addcmul(norm[1], F.linear(x @ bent.logcumsumexp(0), *inner[:2]), norm[0])
        return [(1.0, F.linear(F.linear(h.tanh(), *inner[2:4]).tanh(), *inner[4:])), (0.1, bent)]

    values, expected = dense((params, residuals))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(residuals())

    vector, known = ParameterVector(params), KnownOwners()
    for first in (True, False):
        calls = 0
        J = jacobian_at(closure, vector, known)
        order = in_order_of(J, values)
        assert relative_error(J.to_dense()[order], expected) < 1e-12
        assert [tuple(params[at].shape) for at in J.explicit] == [(5,), (5,), (3, 3)]
        assert J.evaluations == calls == (2 if first and count == 40 else 1)
        assert 19 <= J.backward_passes - (2 if first else 0) <= 22


@pytest.mark.parametrize("outputs", [1, 3])
def test_conditions_at_a_single_point_cost_nothing_more(outputs: int) -> None:
    """A start or a corner: biases, scale and shift of a batch of one are told like those of many."""
    model = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, outputs)).double()
    factor, x, start = nn.Parameter(torch.tensor(0.7, dtype=F64)), normal(9, 2), normal(1, 2, seed=1)
    params = [*model.parameters(), factor]
    residuals = lambda: [(1.0, factor * model(x)), (2.0, factor * model(start)[:, -1:])]
    values, expected = dense((params, residuals))
    vector, known = ParameterVector(params), KnownOwners()
    passes = []
    for _ in range(2):
        J = jacobian_at(lambda: loss_of(residuals()), vector, known)
        assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12
        assert J.explicit == ()
        passes.append(J.backward_passes)
    assert passes[1] == len(known._groups) + 1 <= outputs + 2


def test_single_rows_whose_entries_are_residuals_by_themselves() -> None:
    """A scale met by a batch, and by numbers that it is to have itself: too many residuals in one row to part."""
    w, x, wanted = nn.Parameter(normal(20)), normal(5, 20), normal(1, 20, seed=1)
    residuals = lambda: [(1.0, (w * x).sum(1)), (3.0, w - wanted)]
    values, expected = dense(([w], residuals))
    vector, known = ParameterVector([w]), KnownOwners()
    for _ in range(2):
        J = jacobian_at(lambda: loss_of(residuals()), vector, known)
        assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12
        assert J.explicit == (0,)
        assert not known.lone


def test_one_side_is_enough() -> None:
    """400 residuals and 2 parameters: two products, one pass to check them, and nothing a residual."""
    t, w = torch.linspace(0, 1, 400, dtype=F64), nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    model = lambda w: (t + 1) ** w.logcumsumexp(0)[1] * w.logcumsumexp(0)[0]
    J = ResidualJacobian(lambda: (model(w) - 1).square().sum() / 2, [w])
    assert relative_error(J.to_dense(), torch.func.jacrev(model)(w.detach())) < 1e-14
    assert J.backward_passes == 3


class Doubled(torch.autograd.Function):
    """Has a derivative that is not recorded."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return torch.from_numpy(2 * g.detach().numpy()) if type(g) is Tensor else 2 * g


@pytest.mark.parametrize("outside", [torch.sin, Doubled.apply], ids=["sin", "NumPy"])
def test_what_cannot_be_recorded_takes_blocks_of_rows(outside: Callable[[Tensor], Tensor]) -> None:
    t, w = torch.linspace(0, 1, 50, dtype=F64), nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    residuals = lambda: [(1.0, w[0] * outside(w[1] * t))]
    expected = dense(([w], residuals))[1]
    assert relative_error(ResidualJacobian(lambda: loss_of(residuals()), [w]).to_dense(), expected) < 1e-14


@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_dear_jacobians_warn() -> None:
    w = nn.Parameter(normal(90))
    with pytest.warns(UserWarning, match="1 of 1 parameters .* 90 products"):
        ResidualJacobian(lambda: w.sin().square().sum(), [w])


def test_reentrant_checkpoints_are_refused() -> None:
    model, x = mlp(3, 5, 1), normal(9, 3).requires_grad_()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        ResidualJacobian(lambda: checkpoint(model, x, use_reentrant=True).square().mean(), model)


def batch_normalised() -> Case:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), normal(9, 3)
    return case(model, lambda: [(1.0, model(x))])


def attention() -> Case:
    model, x = nn.MultiheadAttention(4, 2, batch_first=True).double(), normal(1, 7, 4)
    return case(model, lambda: [(1.0, model(x, x, x, need_weights=False)[0].sum(2))])


@pytest.mark.filterwarnings("ignore:.*not recognised")
@pytest.mark.parametrize("make", [batch_normalised, attention])
def test_dependent_residuals_are_written_out(make: Callable[[], Case]) -> None:
    params, residuals = build(make)
    values, expected = dense((params, residuals))
    J = ResidualJacobian(lambda: loss_of(residuals()), params)
    assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12


@pytest.mark.parametrize("affordable", [8, 1000])
def test_residuals_of_many_times_are_written_out_at_once(affordable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 24 times would be a group of its own, which all use the same layer as often as there are times before."""
    monkeypatch.setattr("imstep.curvature.known_rows.AFFORDABLE", affordable)
    layer, x = nn.Linear(3, 2).double(), normal(4, 24, 1)

    def residuals() -> Weighted:
        state, seen = torch.zeros(4, 2, dtype=F64), []
        for given in x.unbind(1):
            state = layer(torch.cat([state, given], 1)).tanh()
            seen.append(state[:, 0])
        return [(1.0, torch.stack(seen, 1))]

    values, expected = dense((list(layer.parameters()), residuals))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = ResidualJacobian(lambda: loss_of(residuals()), layer)
    assert relative_error(J.to_dense()[in_order_of(J, values)], expected) < 1e-12
    assert J.backward_passes <= sum(p.numel() for p in layer.parameters()) + 4


def test_dependent_residuals_are_refused_where_that_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstep.curvature.known_rows.AFFORDABLE", 8)
    params, residuals = build(batch_normalised)
    with pytest.raises(ValueError, match="depend on each other"):
        ResidualJacobian(lambda: loss_of(residuals()), params)


@pytest.mark.filterwarnings("ignore:.*not recognised")
@pytest.mark.parametrize("affordable", [8, 1000])
def test_buffers_are_left_as_one_evaluation_leaves_them(affordable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstep.curvature.known_rows.AFFORDABLE", affordable)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).double().train(), normal(9, 3)
    twin = nn.BatchNorm1d(4, affine=False).double()
    twin(model[0](x))
    with pytest.raises(ValueError, match="depend on each other") if affordable == 8 else nullcontext():
        ResidualJacobian(lambda: model(x).square().mean(), model)
    torch.testing.assert_close(model[1].running_mean, twin.running_mean)


def test_random_residuals() -> None:
    """Dropout's mask belongs to the evaluation; the closure may call backward itself."""
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 1)).double(), normal(9, 3)

    def closure() -> Tensor:
        loss = F.mse_loss(model(x), torch.zeros(9, 1, dtype=F64))
        loss.backward()
        return loss

    with torch.random.fork_rng():
        torch.manual_seed(3)
        J = ResidualJacobian(closure, model)
        torch.manual_seed(3)
        expected = torch.autograd.grad(F.mse_loss(model(x), torch.zeros(9, 1, dtype=F64)), list(model.parameters()))
    torch.testing.assert_close(J.T @ J.residuals, ParameterVector(model).flatten(expected))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [transport, heat, components])
def test_single_precision(make: Callable[[], Case]) -> None:
    """Rows are as accurate as autograd's own; their products are made in float64."""
    params, residuals = build(make)
    _, expected = dense((params, residuals))
    with torch.no_grad():
        for p in params:
            p.data = p.data.float()
    inputs = {id(t): t for t in _tensors(residuals)}
    for t in inputs.values():
        t.data = t.data.float()
    J = ResidualJacobian(lambda: loss_of(residuals()).float(), params)
    assert J.dtype == F64
    assert relative_error((J.to_dense() ** 2).sum(0), (expected**2).sum(0)) < 1e-5


def _tensors(function: Callable[..., object]) -> list[Tensor]:
    return [cell.cell_contents for cell in function.__closure__ or () if isinstance(cell.cell_contents, Tensor)]


# --- residuals of a loss ----------------------------------------------------------------------------------------------

W = normal(6)
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "power": (lambda z: (z**2).sum(), lambda z: 2**0.5 * z),
    "power, a tensor": (lambda z: (z ** torch.full((6,), 2.0)).sum(), lambda z: 2**0.5 * z),
    "power, a tensor for all": (lambda z: (z.view(2, 3) ** torch.full((2, 1), 2)).sum(), lambda z: 2**0.5 * z),
    "product": (lambda z: (z * z).mean(), lambda z: (2 / 6) ** 0.5 * z),
    "square": (lambda z: 3 * z.square().sum() / 2, lambda z: 3**0.5 * z),
    "weights": (lambda z: (W.abs() * z**2).sum(), lambda z: (2 * W.abs()).sqrt() * z),
    "mse": (lambda z: F.mse_loss(z, W), lambda z: (2 / 6) ** 0.5 * (z - W)),
    "mse, sum": (lambda z: F.mse_loss(z, W, reduction="sum"), lambda z: 2**0.5 * (z - W)),
    "mse, none": (
        lambda z: F.mse_loss(z, W, reduction="none")[2:].sum(),
        lambda z: 2**0.5 * (torch.arange(6) > 1) * (z - W),
    ),
    "mse, exchanged": (lambda z: F.mse_loss(W, z), lambda z: (2 / 6) ** 0.5 * (W - z)),
    "mse, both": (lambda z: F.mse_loss(z, z.flip(0)), lambda z: (2 / 6) ** 0.5 * (z - z.flip(0))),
    "views": (lambda z: (z.view(2, 3) ** 2).sum(1).reshape(1, 2).mean(), lambda z: z),
    "constant": (lambda z: (z**2).sum() + 7, lambda z: 2**0.5 * z),
    "twice": (lambda z: (q := (z**2).mean()) + 2 * q, lambda z: z),
    "a multiple, and once more": (lambda z: 2 * (q := (z**2).mean()) + q, lambda z: z),
    "zero times entries": (lambda z: (z**2).sum() + 0 * z.sum() + (z.exp() * 0.0).mean(), lambda z: 2**0.5 * z),
    "square of a square": (
        lambda z: (s := z**2).mean() + ((s - 5) ** 2).sum(),
        lambda z: torch.cat([(2 / 6) ** 0.5 * z, 2**0.5 * (z**2 - 5)]),
    ),
    "mean and its square": (
        lambda z: (m := F.mse_loss(z, W)) + m**2,
        lambda z: torch.cat([(2 / 6) ** 0.5 * (z - W), 2**0.5 * (z - W).square().mean()[None]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_residuals(name: str) -> None:
    loss, expected = FORMS[name]
    w = nn.Parameter(normal(6, seed=1))
    J = ResidualJacobian(lambda: loss(w.sin()), [w])
    torch.testing.assert_close(J.residuals, expected(w.detach().sin()))
    rows = torch.func.jacrev(lambda p: expected(p.sin()))(w.detach())
    torch.testing.assert_close(J.to_dense(), rows)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cube": lambda z: (z**3).sum(),
    "several powers": lambda z: (z ** torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 3.0])).sum(),
    "power of several": lambda z: (z ** torch.full((2, 6), 2.0)).sum(),
    "power that depends": lambda z: (W ** (z - z.detach() + 2)).sum(),
    "square and power that depends": lambda z: (z**2).sum() + (z ** (z - z.detach() + 2)).sum(),
    "negative": lambda z: -(z**2).sum(),
    "difference": lambda z: (z**2).sum() - (z.cos() ** 2).sum(),
    "sum of norms": lambda z: z.view(2, 3).norm(dim=1).sum(),
    "linear": lambda z: z.sum(),
    "square and linear": lambda z: (z**2).sum() + z.sum(),
    "zero times what is added as well": lambda z: (z**2).sum() + 0 * (total := z.sum()) + total,
    "product of two": lambda z: (z * z.sin()).sum(),
    "factor that depends": lambda z: (z**2).sum() * z.exp().sum(),
    "quotient": lambda z: 1 / (z**2).sum(),
    "cross entropy": lambda z: F.cross_entropy(z.view(2, 3), torch.tensor([0, 1])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_have_no_residuals(name: str) -> None:
    w = nn.Parameter(normal(6))
    with pytest.raises(ValueError, match=r"not recognised as a sum of squares \((at \w+|a factor is negative)\)"):
        ResidualJacobian(lambda: OTHERS[name](w.sin()), [w])


def test_what_is_in_the_way_of_residuals_is_told() -> None:
    w = nn.Parameter(normal(6))
    for loss, obstacle in {
        lambda: w @ w.sin(): "at DotBackward0",
        lambda: 2 * w.abs().sum(): "at AbsBackward0",
        lambda: w.sum(): "at a parameter",
        lambda: -(w**2).sum(): "a factor is negative",
    }.items():
        with pytest.raises(ValueError, match=rf"\({obstacle}\), so it has no residuals"):
            ResidualJacobian(loss, [w])


def test_what_takes_another_loss_is_told() -> None:
    """An energy, multipliers, a weight that is trained as well."""
    w = nn.Parameter(normal(6))
    for loss in (
        lambda: w.sin().square().mean() / 2 - w.sum(),
        lambda: (w[0] - 1).square() + (normal(5) * w[1:]).sum(),
        lambda: (-w[0]).exp() * w[1:].square().sum() + w[0],
    ):
        with pytest.raises(ValueError, match="use an optimizer that needs no residuals, such as NewtonKrylov"):
            ResidualJacobian(loss, [w])


def test_an_exponent_that_is_trained_makes_no_square() -> None:
    x, a, e = torch.linspace(0.1, 1, 12), nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(2.0))
    for power in (lambda z: z**e, lambda z: z.float_power(e)):
        with pytest.raises(ValueError, match="not recognised as a sum of squares"):
            ResidualJacobian(lambda power=power: power(a * x + 0.5).mean(), [a, e])


OWNERS = {
    "one each": [range(6)],
    "twice": [range(6), range(6)],
    "some": [range(4), range(2, 6)],
    "every other": [range(0, 6, 2), range(1, 6, 2)],
    "backwards": [range(5, -1, -1)],
    "none": [[-1] * 6, range(6)],
    "some of none": [[3, -1, 1, -1], [5]],
    "several of one": [[0, 0, 2, 2, 2, 5]],
    "no rows": [[], [1, 4]],
}


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("outer", [(True,), (False,), (True, False)], ids=str)
def test_rows_are_put_where_they_belong(owners: list[list[int]], outer: tuple[bool, ...]) -> None:
    known, where = KnownPlaces(), [torch.tensor(list(owner), dtype=torch.long) for owner in owners]
    for seed in range(3):
        if seed == 2:
            where = [owner.flip(0) for owner in where]  # others, in the place of those that are known
        expected, pieces = torch.zeros(6, 6, dtype=F64), []
        for at, owner in enumerate(where):
            if outer[at % len(outer)]:
                rows = Rows(normal(len(owner), 3, seed=seed), normal(len(owner), 2, seed=seed + 9).float())
                added = rows.left[:, :, None] * rows.right[:, None]  # type: ignore[index]
            else:
                rows = Rows(normal(len(owner), 6, seed=seed), None)
                added = rows.left
            for i, row in zip(owner.tolist(), added.reshape(-1, 6), strict=True):
                expected[max(i, 0)] += row * (i >= 0)
            pieces.append((rows, owner))
        found = known.gather((0, 0), pieces, 6, 6).written_out()
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e170])
def test_products_whose_factors_are_multiples_are_one(scale: float, dtype: torch.dtype) -> None:
    scale = scale if dtype == F64 else scale**0.1
    known, first, others = KnownPlaces(), torch.arange(6), torch.tensor([6, 8, 7])
    owners = [first.repeat(2), first, others.repeat(2)]  # derivatives along two directions, the value; two places
    for multiples, terms in ((True, 2), (True, 2), (False, 3), (True, 3)):  # once it has failed it is not tried again
        slopes = [scale * normal(6, 30), scale * normal(6, 30, seed=1)]
        if multiples:
            slopes[1] = normal(6, 1) * slopes[0]
        slopes[0][4] = 0
        for slope in slopes[1:]:
            slope[[4, 5]] = 0
        lefts = [torch.cat(slopes), scale * normal(6, 30, seed=2), scale * normal(6, 30, seed=3)]
        pieces = [(Rows(lefts[at].to(dtype), normal(len(own), 40, seed=at)), own) for at, own in enumerate(owners)]
        expected = torch.zeros(9, 30, 40, dtype=F64)
        for rows, own in pieces:
            expected.index_add_(0, own, torch.einsum("no,ni->noi", rows.left.double() / scale, rows.right))
        found = known.gather((0, 0), pieces, 9, 1200)
        assert scale != 1 or found.form.terms == terms
        error = found.written_out() / scale - expected.flatten(1)
        assert error.norm() <= 10 * torch.finfo(dtype).eps * expected.norm()


def test_squares_of_divisors_may_leave_the_range_of_float32() -> None:
    """The rows of a parameter that divides, beside those of an entry whose rows are 10²⁴ times larger."""
    p, x = nn.Parameter(torch.tensor([1.5e24, 2.0])), 1e24 * torch.linspace(-5, 5, 80)
    jacobian = ResidualJacobian(lambda: (p[1] * torch.exp(-(x / p[0]).square()) - 1).square().sum() / 2, [p])
    w, ratios = p.detach().double(), x.double() / p.detach().double()[0]
    value = torch.exp(-ratios.square())
    expected = torch.stack([w[1] * value * 2 * ratios.square() / w[0], value], 1)
    for column, exact in zip(jacobian.written_out().mT, expected.mT, strict=True):
        assert relative_error(column, exact) < 1e-6
