"""Kronecker factors: by hand, in expectation, as a preconditioner that never changes a solution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal
from torch import Tensor, nn

from imstep import NewtonKrylov
from imstep.curvature import FrozenClosure, Hessian, ParameterVector
from imstep.curvature.hessian import gauss_newton_of, hessian_of
from imstep.curvature.kronecker import KroneckerFactors
from imstep.curvature.layers import LayerObserver
from imstep.linalg import LinearOperator, RelativeResidual, conjugate_gradient


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def factors(
    closure: Callable[[], Tensor], model: nn.Module, updates: int = 1, decay: float = 0.95
) -> tuple[KroneckerFactors, ParameterVector]:
    parameters = ParameterVector(model)
    found = KroneckerFactors(parameters, decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        observer = LayerObserver(parameters.tensors)
        point = FrozenClosure(closure, parameters).linearise(observer)
        found.update(point, observer, generator)
    return found, parameters


def blocks_of(found: KroneckerFactors) -> dict[int, dict[str, Tensor]]:
    return {b["weight"]: b for b in found.state_dict()["blocks"]}


def test_factors_of_a_linear_layer_by_hand() -> None:
    """For mse/2 summed, L'' is the identity: the sampled output gradients are signs."""
    layer, x, y = nn.Linear(3, 2).double(), normal(5, 3), normal(5, 2, seed=1)
    found, _ = factors(lambda: 0.5 * F.mse_loss(layer(x), y, reduction="sum"), layer)
    block = blocks_of(found)[0]
    rows = torch.cat([x, torch.ones(5, 1, dtype=F64)], dim=1)
    torch.testing.assert_close(block["inputs"], rows.T @ rows / 5)
    torch.testing.assert_close(block["outputs"].diagonal(), torch.full((2,), 5.0, dtype=F64))
    assert block["bias"] == 1


SHAPES = {"one row": (3,), "rows": (5, 3), "batches of rows": (2, 5, 3), "many dimensions": (2, 2, 2, 3)}
OVERWRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sum": (lambda z: z.add_(W), lambda z: z + W),
    "product": (lambda z: z.mul_(W), lambda z: z * W),
    "activation": (lambda z: z.tanh_(), torch.tanh),
    "dropout and skip": (
        lambda z: F.dropout(z, 0.0, inplace=True).add_(1).mul_(W.exp()),
        lambda z: (z + 1) * W.exp(),
    ),
    "part": (lambda z: write_into_part(z), lambda z: torch.cat([z[..., :1].sin(), z[..., 1:]], -1)),
}
W = nn.Parameter(torch.tensor([0.5, -1.5], dtype=F64))


def write_into_part(z: Tensor) -> Tensor:
    z[..., :1].sin_()
    return z


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OVERWRITTEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_that_is_overwritten_afterwards(shape: str, name: str, bias: bool) -> None:
    layer, x = nn.Linear(3, 2, bias=bias, dtype=F64), normal(*SHAPES[shape])
    model = nn.ModuleList([layer])
    model.register_parameter("w", W)
    found = [
        blocks_of(factors(lambda f=f: f(layer(x)).pow(2).mean(), model)[0]) for f in OVERWRITTEN[name]
    ]
    assert len(found[1]) == 1
    for at, block in found[1].items():
        torch.testing.assert_close(found[0][at]["inputs"], block["inputs"])
        torch.testing.assert_close(found[0][at]["outputs"], block["outputs"])


def test_factors_of_a_convolution_by_hand() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    x = normal(4, 2, 6, 6)
    found, _ = factors(lambda: 0.5 * (layer(x) ** 2).sum(), layer)
    block = blocks_of(found)[0]
    padded = F.pad(x, (1, 1, 1, 1))
    patches = [padded[n, :, i : i + 3, j : j + 3].reshape(-1) for n in range(4) for i in (0, 2, 4) for j in (0, 2, 4)]
    rows = torch.stack(patches)
    torch.testing.assert_close(block["inputs"], rows.T @ rows / len(rows))
    torch.testing.assert_close(block["outputs"].diagonal(), torch.full((3,), 36.0, dtype=F64))


def test_a_convolution_over_time_is_one_over_images_of_height_one() -> None:
    flat, tall = nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), nn.Conv2d(2, 3, (1, 3), (1, 2), (0, 1), (1, 2))
    with torch.no_grad():
        tall.weight.copy_(flat.weight.unsqueeze(2))
        tall.bias.copy_(flat.bias)
    flat, tall, x = flat.double(), tall.double(), normal(4, 2, 9)
    one, _ = factors(lambda: (flat(x) ** 2).sum(), flat)
    other, _ = factors(lambda: (tall(x.unsqueeze(2)) ** 2).sum(), tall)
    for name in ("inputs", "outputs"):
        torch.testing.assert_close(blocks_of(one)[0][name], blocks_of(other)[0][name])


MANY = 3000
TARGETS, CLASSES = normal(MANY, 3, seed=3), torch.arange(MANY) % 3
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: F.cross_entropy(z, CLASSES),
    "soft targets": lambda z: F.cross_entropy(z, TARGETS.softmax(1)),
    "mse": lambda z: F.mse_loss(z, TARGETS),
    "mse, exchanged": lambda z: F.mse_loss(TARGETS, z),
    "squares": lambda z: 3 * (z * z).mean(),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, (TARGETS > 0).double()),
    "two losses": lambda z: F.mse_loss(z, TARGETS) + 2 * F.cross_entropy(z.flip(1), CLASSES),
}


def _cell(q: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...], kind: str) -> tuple[Tensor, ...]:
    own, of_states = (F.linear(v, q[f"weight_{n}_l0"], q.get(f"bias_{n}_l0")) for n, v in (("ih", x), ("hh", state[0])))
    if kind in ("tanh", "relu"):
        return (getattr(torch, kind)(own + of_states),)
    if kind == "gru":
        r, z, _ = (own + of_states).sigmoid().chunk(3, 1)
        n = (own.chunk(3, 1)[2] + r * of_states.chunk(3, 1)[2]).tanh()
        return ((1 - z) * n + z * state[0],)
    i, f, g, o = (own + of_states).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN, "relu": partial(nn.RNN, nonlinearity="relu"), "lstm": nn.LSTM, "gru": nn.GRU
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_layers_have_the_factors_of_their_steps(kind: str, bias: bool) -> None:
    """Those of the same cells called in a loop, for the sum over all steps."""
    layer = CELLS[kind](2, 3, bias=bias).double()
    x, y = normal(4, 5, 2), normal(5, 3, seed=1)

    def looped() -> Tensor:
        state: tuple[Tensor, ...] = (x.new_zeros(5, 3),) * 2
        for step in x:
            state = _cell(dict(layer.named_parameters()), step, state, kind)
        return F.mse_loss(state[0], y)

    found, _ = factors(lambda: F.mse_loss(layer(x)[0][-1], y), layer)
    expected = blocks_of(factors(looped, layer)[0])
    assert set(expected) == {0, 1}
    assert not found.diagonals()
    for at, block in blocks_of(found).items():
        assert block["bias"] == (at + 2 if bias else None)
        for name in ("inputs", "outputs"):
            torch.testing.assert_close(block[name], expected[at][name])


@pytest.mark.parametrize("name", LOSSES)
def test_output_factor_is_the_curvature_of_the_loss_in_expectation(name: str) -> None:
    """Where all examples have one input the Gauss-Newton block is exactly G ⊗ A, and each is a sample of its own."""
    layer, x = nn.Linear(2, 3, bias=False).double(), normal(1, 2).expand(MANY, 2)
    loss = LOSSES[name]
    found, parameters = factors(lambda: loss(layer(x)), layer)
    point = FrozenClosure(lambda: loss(layer(x)), parameters).linearise()
    exact = gauss_newton_of(point, parameters)
    assert exact is not None
    block = blocks_of(found)[0]
    sampled = torch.kron(block["outputs"], block["inputs"])
    assert (sampled - exact.to_dense()).norm() <= 0.1 * sampled.norm()


class _Mixed(nn.Module):
    """Layers, a layer used twice, a bias used by two layers, parameters that are no layers, a dead branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.other = nn.Linear(4, 4)
        self.other.bias = self.twice.bias
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(()))
        self.dead, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x).tanh()).relu())
        x = self.norm(self.other(x)) * self.scale
        return self.last(x) + self.dead(x - 1e6).relu() * 0


def mixed() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, x, labels = _Mixed().double(), normal(7, 3), torch.arange(7) % 2
    return model, lambda: F.cross_entropy(model(x), labels) + 0.01 * sum((p**2).sum() for p in model.parameters())


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-2, 10.0])
def test_symmetric_positive_definite(damping: float) -> None:
    model, closure = mixed()
    found, _ = factors(closure, model, updates=2)
    P = found.preconditioner(damping)
    assert P is not None
    dense = P.to_dense()
    assert bool(dense.isfinite().all())
    assert (dense - dense.T).abs().max() <= 1e-10 * dense.abs().max()
    assert torch.linalg.eigvalsh((dense + dense.T) / 2).min() > 0


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_never_changes_the_solution(damping: float) -> None:
    model, closure = mixed()
    found, parameters = factors(closure, model)
    point = FrozenClosure(closure, parameters).linearise()
    operator = gauss_newton_of(point, parameters)
    assert operator is not None
    rule = (RelativeResidual(1e-11),)
    solve = lambda P: conjugate_gradient(operator, point.gradient, damping=damping, preconditioner=P, stopping=rule)
    plain, preconditioned = solve(None), solve(found.preconditioner(damping))
    torch.testing.assert_close(preconditioned.solution, plain.solution, rtol=1e-6, atol=1e-9)


def test_knows_weight_decay() -> None:
    """Where the layers have no curvature the decay has: the preconditioner must not take it for flat."""
    layer, x = nn.Linear(4, 3).double(), normal(50, 4)
    x[:, 2:] = 0
    closure = lambda: F.mse_loss(layer(x), x[:, :3]) + 0.05 * sum((p**2).sum() for p in layer.parameters())
    found, parameters = factors(closure, layer)
    exact = Hessian(closure, layer).to_dense()
    P = found.preconditioner(1e-12)
    assert P is not None
    product = torch.linalg.eigvals(P.to_dense() @ exact).real
    assert parameters.size == len(product)
    assert product.max() / product.min() < 20


def test_saves_products() -> None:
    """On inputs of very different scales, of which plain iterations know nothing."""
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    x = normal(200, 10) * torch.logspace(-2, 1, 10, dtype=F64)
    closure = lambda: F.mse_loss(model(x), x)
    found, parameters = factors(closure, model)
    point = FrozenClosure(closure, parameters).linearise()
    operator = gauss_newton_of(point, parameters)
    assert operator is not None
    rule = (RelativeResidual(1e-3),)
    count = lambda P: (
        conjugate_gradient(operator, point.gradient, damping=1e-5, preconditioner=P, stopping=rule).products
    )
    assert count(found.preconditioner(1e-5)) < 0.5 * count(None)


def test_inverse_is_exact_for_one_example() -> None:
    layer, x = nn.Linear(3, 2, bias=False).double(), normal(1, 3)
    found, _ = factors(lambda: 0.5 * (layer(x) ** 2).sum(), layer)
    block = blocks_of(found)[0]
    damping = 0.3
    a, g = block["inputs"], block["outputs"]
    balance = ((a.trace() / 3) / (g.trace() / 2)).sqrt()
    eye = lambda n: torch.eye(n, dtype=F64)
    expected = torch.kron(g + damping**0.5 / balance * eye(2), a + balance * damping**0.5 * eye(3)).inverse()
    P = found.preconditioner(damping)
    assert isinstance(P, LinearOperator)
    torch.testing.assert_close(P.to_dense(), expected)


def test_checkpointed_layers_are_seen() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(5, 3)
    again = lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    plain, _ = factors(lambda: (model(x) ** 2).mean(), model)
    checkpointed, _ = factors(lambda: (again() ** 2).mean(), model)
    for at, block in blocks_of(plain).items():
        for name in ("inputs", "outputs"):
            torch.testing.assert_close(blocks_of(checkpointed)[at][name], block[name])


class Points:
    """Stands for a tensor, as objects of frameworks do."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        return func(*(a.entries if isinstance(a, Points) else a for a in args), **(kwargs or {}))  # type: ignore[dict-item]


def test_what_stands_for_a_tensor_is_seen() -> None:
    def losses(seen: Callable[[Tensor], object]) -> list[float]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double(), normal(20, 2)
        optimizer = NewtonKrylov(model.parameters())
        return [float(optimizer.step(lambda: (model(seen(x)) - x.sum(1, True)).square().mean())) for _ in range(3)]

    assert losses(Points) == losses(lambda x: x)


def test_a_layer_without_inputs() -> None:
    """As where a table has no categories: its bias is all that is trained."""
    torch.manual_seed(0)
    empty, full = nn.Linear(0, 2), nn.Linear(3, 2)
    x = torch.randn(8, 3)
    optimizer = NewtonKrylov([*empty.parameters(), *full.parameters()])
    closure = lambda: (empty(x[:, :0]) + full(x) - x[:, :2].exp()).square().mean()
    first = float(optimizer.step(closure))
    assert optimizer.last_step.new_loss < 0.9 * first
    assert bool(empty.bias.any())


def test_closure_that_calls_backward() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(5, 3)
    plain, _ = factors(lambda: (model(x) ** 2).mean(), model)

    def closure() -> Tensor:
        loss = (model(x) ** 2).mean()
        loss.backward()
        return loss

    other, _ = factors(closure, model)
    for at, block in blocks_of(plain).items():
        for name in ("inputs", "outputs"):
            assert torch.equal(blocks_of(other)[at][name], block[name])
    assert all(p.grad is None for p in model.parameters())


def test_running_average() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    parameters, generator = ParameterVector(layer), torch.Generator().manual_seed(0)
    found = KroneckerFactors(parameters, decay=0.75)
    batches = [normal(3, 2, seed=i) for i in range(6)]
    expected = torch.zeros(2, 2, dtype=F64)
    for i, x in enumerate(batches):
        observer = LayerObserver(parameters.tensors)
        found.update(
            FrozenClosure(lambda x=x: (layer(x) ** 2).sum(), parameters).linearise(observer), observer, generator
        )
        keep = min(i / (i + 1), 0.75)
        expected = keep * expected + (1 - keep) * x.T @ x / 3
    torch.testing.assert_close(blocks_of(found)[0]["inputs"], expected)


def test_saved_factors_are_the_same_preconditioner() -> None:
    model, closure = mixed()
    found, parameters = factors(closure, model)
    other = KroneckerFactors(parameters)
    other.load_state_dict(found.state_dict())
    v = normal(parameters.size)
    assert torch.equal(other.preconditioner(0.1) @ v, found.preconditioner(0.1) @ v)


def test_overflowing_products_are_left_out() -> None:
    layer, x = nn.Linear(3, 2), torch.full((4, 3), 1e25)
    found, _ = factors(lambda: ((layer(x) * 1e-25) ** 2).mean(), layer)
    P = found.preconditioner(1.0)
    assert P is None or bool((P @ torch.ones(8)).isfinite().all())


def test_nothing_before_the_first_update() -> None:
    assert KroneckerFactors(ParameterVector(nn.Linear(2, 1))).preconditioner(1.0) is None


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match="decay"):
        KroneckerFactors(ParameterVector(nn.Linear(2, 1)), decay=1.0)


def test_refreshing_changes_neither_loss_nor_products() -> None:
    model, closure = mixed()
    parameters = ParameterVector(model)
    observer = LayerObserver(parameters.tensors)
    observed = FrozenClosure(closure, parameters).linearise(observer)
    plain = FrozenClosure(closure, parameters).linearise()
    KroneckerFactors(parameters).update(observed, observer, torch.Generator().manual_seed(0))
    v = normal(parameters.size)
    assert torch.equal(observed.loss, plain.loss)
    assert torch.equal(observed.gradient, plain.gradient)
    assert torch.equal(hessian_of(observed, parameters) @ v, hessian_of(plain, parameters) @ v)
