"""Operators of closures as training loops bring them: regions, hooks, threads, subclasses of Tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import methods
from imstep.complexstep import hvp, jvp
from imstep.curvature import (
    Categorical,
    Fisher,
    FrozenClosure,
    GaussNewton,
    Hessian,
    Jacobian,
    ParameterVector,
    ResidualJacobian,
)
from imstep.linalg import DenseOperator, conjugate_gradient, minres
from imstep.optim import LeastSquares, NewtonKrylov, minimize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = normal(16, 4), normal(16, 2, seed=1)
BFLOAT = lambda: torch.autocast("cpu", torch.bfloat16)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def reference(model: nn.Module, v: Tensor) -> Tensor:
    """The Hessian product by double backward."""
    params = list(model.parameters())
    flat = lambda ts: torch.cat([t.reshape(-1) for t in ts])
    g = flat(torch.autograd.grad(F.mse_loss(model(X.to(v)), Y.to(v)), params, create_graph=True))
    return flat(torch.autograd.grad(g @ v, params))


# --- what is kept alive, and grad mode ------------------------------------------------------------------------------


def held(model: nn.Module, use: Callable[[Callable[[], Tensor]], object]) -> weakref.ref[Tensor]:
    """A batch that ``use`` has evaluated a closure on, and nobody else holds."""
    inputs = X.clone()
    use(lambda: F.mse_loss(model(inputs), Y))
    return weakref.ref(inputs)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: lambda f: Hessian(f, m),
        lambda m: lambda f: Hessian(f, m, memory_budget=0) @ torch.ones(44),
        lambda m: lambda f: ResidualJacobian(f, m),
        lambda m: NewtonKrylov.for_batches(m.parameters()).step,
        lambda m: LeastSquares(m.parameters()).step,
    ],
)
def test_a_batch_is_released_with_its_record(build: Callable[..., Any]) -> None:
    """By itself: until Python looks for cycles, each evaluation would take fresh memory from the system."""
    model = net()
    gc.disable()
    try:
        assert held(model, build(model))() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("within", [True, False])
def test_a_closure_that_leaves_gradients_off(within: bool) -> None:
    model = net(torch.float64)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        loss = F.mse_loss(model(X.double()), Y.double())
        entries = loss.reshape(1)
        torch.set_grad_enabled(False)
        return entries

    v = normal(44, seed=2).double()
    with torch.set_grad_enabled(within):
        H = Hessian(closure, model)
        assert torch.is_grad_enabled() is within
    torch.testing.assert_close(H @ v, reference(model, v), rtol=1e-12, atol=1e-12)
    point = FrozenClosure(closure, ParameterVector(model))
    torch.testing.assert_close(point.gradient()[1], H.gradient, rtol=1e-12, atol=1e-12)
    assert torch.is_grad_enabled()


# --- autocast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "build",
    [
        lambda m, b: Hessian(lambda: F.mse_loss(m(X), Y), m, memory_budget=b),
        lambda m, b: GaussNewton(lambda: (m(X), Y), m, memory_budget=b),
        lambda m, b: Fisher(lambda: (m(X), torch.arange(16) % 2), m, Categorical(), memory_budget=b),
        lambda m, b: Jacobian(lambda: m(X).float(), m, memory_budget=b),
    ],
)
def test_products_do_not_see_the_region(build: Callable[..., Any], budget: int | None) -> None:
    """Of an operator built outside they are the same inside; of one built inside the model is what is rounded."""
    model = net()
    A = build(model, None)
    v = normal(A.shape[1], seed=2)
    expected = A @ v
    with BFLOAT():
        assert torch.equal(A @ v, expected)
        assert (A @ torch.stack([v, v], 1)).dtype is torch.float32
        rounded = build(model, budget)
        product = rounded @ v
    assert product.dtype is torch.float32
    torch.testing.assert_close(rounded @ v, product, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(product, expected, rtol=0, atol=0.03 * float(expected.norm()))


def test_residuals_in_a_region() -> None:
    model = net()

    def closure() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.mse_loss(model(X), Y)

    J = ResidualJacobian(closure, model)
    with BFLOAT():
        found = ResidualJacobian(closure, model)
        assert torch.equal(J.gram().dense(), found.gram().dense())
    assert found.explicit == ()


@pytest.mark.parametrize("solver", [conjugate_gradient, minres])
def test_solvers_in_a_region(solver: Callable[..., Any]) -> None:
    root = normal(8, 8)
    A, b = DenseOperator(root @ root.T + torch.eye(8)), normal(8, seed=3)
    expected = solver(A, b)
    with BFLOAT():
        found = solver(A, b)
    assert torch.equal(found.solution, expected.solution)


def test_minimize_in_a_region() -> None:
    with BFLOAT():
        result = minimize(lambda x: (x**2 - 1).square().sum(), torch.full((3,), 2.0, dtype=torch.float64))
    assert result.success
    torch.testing.assert_close(result.x, torch.ones(3, dtype=torch.float64))


# --- hooks and threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [True, False])
def test_a_linear_hook_acts_on_products_alike(backward: bool) -> None:
    model = net(torch.float64)
    v = normal(44, seed=2).double()
    expected = reference(model, v)
    factors = normal(6, 4, seed=4).double()
    model[0].weight.register_hook(lambda g: g * factors)

    def closure() -> Tensor:
        loss = F.mse_loss(model(X.double()), Y.double())
        if backward:
            loss.backward()
        return loss

    expected[:24] *= factors.reshape(-1)
    torch.testing.assert_close(Hessian(closure, model) @ v, expected, rtol=1e-11, atol=1e-12)


def test_a_hook_that_is_not_linear_is_refused() -> None:
    model = net()
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    with pytest.raises(ValueError, match="a hook changes the gradient"):
        Hessian(lambda: F.mse_loss(model(X), Y), model)


def threaded(model: nn.Module) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(model, X.chunk(2))))


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "build",
    [
        lambda m, b: Hessian(lambda: F.mse_loss(threaded(m), Y), m, memory_budget=b),
        lambda m, b: GaussNewton(lambda: (threaded(m), Y), m, memory_budget=b),
        lambda m, b: Jacobian(lambda: threaded(m), m, memory_budget=b),
    ],
)
def test_a_model_that_is_evaluated_in_threads_is_refused(build: Callable[..., Any], budget: int | None) -> None:
    with pytest.raises(ValueError, match="in another thread"):
        build(net(), budget)


def test_threads_for_what_does_not_depend_on_parameters() -> None:
    model, frozen = net(), net().requires_grad_(False)
    H = Hessian(lambda: F.mse_loss(model(X), threaded(frozen)), model)
    assert bool((H @ normal(H.size)).isfinite().all())


# --- subclasses of Tensor -----------------------------------------------------------------------------------------


class Labelled(Tensor):
    """Columns with names, as some libraries have; its methods insist on them."""

    labels: list[str]

    @staticmethod
    def of(t: Tensor) -> Labelled:
        t = t.as_subclass(Labelled)
        t.labels = ["x"]
        return t

    def clone(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._named(super().clone(*args, **kwargs))

    def detach(self) -> Tensor:
        return self._named(super().detach())

    def reshape(self, *shape: Any) -> Tensor:
        raise RuntimeError("labels have no other shape")

    def sum(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._named(super().sum(*args, **kwargs))

    def __getitem__(self, index: Any) -> Tensor:
        return self._named(super().__getitem__(index))

    def _named(self, t: Tensor) -> Tensor:
        t.labels = self.labels  # an AttributeError where the name was lost
        return t


class Strict(Tensor):
    """Knows what the model needs, and nothing else."""

    known = (
        *("linear", "tanh", "mse_loss", "sub", "mul", "square", "mean"),
        *("grad", "backward", "requires_grad_", "__get__", "__set__"),
    )

    @staticmethod
    def of(t: Tensor) -> Tensor:
        return t.as_subclass(Strict)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in cls.known:
            raise TypeError(f"not known: {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


KINDS = [Labelled, Strict]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "apply",
    [
        lambda m, x, y, v: Hessian(lambda: F.mse_loss(m(x), y), m) @ v,
        lambda m, x, y, v: Hessian(lambda: F.mse_loss(m(x), y), m, memory_budget=0) @ v,
        lambda m, x, y, v: GaussNewton(lambda: (m(x), y), m) @ v,
        lambda m, x, y, v: GaussNewton(lambda: (m(x), y), m, memory_budget=0) @ v,
        lambda m, x, y, v: Jacobian(lambda: m(x), m) @ v,
        lambda m, x, y, v: Jacobian(lambda: m(x), m).T @ torch.ones(32),
        lambda m, x, y, v: ResidualJacobian(lambda: F.mse_loss(m(x), y), m).gram().dense(),
        lambda m, x, y, v: jvp(lambda w: F.mse_loss(F.linear(x, w), y), (v[:8].view(2, 4),), (v[8:16].view(2, 4),))[1],
        lambda m, x, y, v: hvp(lambda w: F.mse_loss(F.linear(x, w), y), v[:8].view(2, 4), v[8:16].view(2, 4)),
    ],
)
def test_inputs_of_a_subclass(kind: Any, apply: Callable[..., Tensor]) -> None:
    model, v = net(), normal(44, seed=2)
    expected = apply(model, X, Y, v)
    found = apply(model, kind.of(X), kind.of(Y), v)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
@pytest.mark.parametrize("form", ["returned", "backward", "differential equation"])
def test_steps_on_inputs_of_a_subclass(kind: Any, method: Any, form: str) -> None:
    def losses(of: Callable[[Tensor], Tensor]) -> list[float]:
        model = net()
        optimizer = method(model.parameters())

        def closure() -> Any:
            x, y = of(X.clone()), of(Y.clone())
            if form == "differential equation":
                x.requires_grad_()
                u = model(x)
                (du,) = torch.autograd.grad(u.as_subclass(Tensor)[:, 0].sum(), x, create_graph=True)
                return (du.as_subclass(Tensor)[:, 0] - u.as_subclass(Tensor)[:, 0]).square().mean()
            loss = F.mse_loss(model(x), y)
            if form == "backward":
                optimizer.zero_grad()
                loss.backward()
            return loss

        returned = [optimizer.step(closure) for _ in range(3)]
        assert all(type(loss) is Tensor for loss in returned)
        return [float(loss) for loss in returned]

    assert losses(kind.of) == pytest.approx(losses(lambda t: t), rel=1e-5)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares, methods.lbfgs, Hessian])
def test_leaves_that_lie_in_a_parameter(method: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    other = nn.Parameter(w.data[1:])
    loss = lambda: (w * other - 2).square().sum()
    with pytest.raises(ValueError, match=r"0 and another, .* share memory"):
        Hessian(loss, [w]) if method is Hessian else method([w]).step(loss)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_parameters_that_share_memory_since_the_optimizer_was_built(method: Any) -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = method([first, second])
    second.data = first.data
    with pytest.raises(ValueError, match="0 and 1 share memory"):
        optimizer.step(lambda: (first * second - 2).square().sum())
    assert first.tolist() == [1, 1]


OUTSIDE: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "what it was made of": lambda x0, w: x0,
    "detached": lambda x0, w: w.detach(),
    "data": lambda x0, w: w.data.view(2, 1),
    "part": lambda x0, w: w.data[1:],
}
USES: dict[str, Callable[[nn.Parameter, Tensor], Tensor]] = {
    "difference": lambda w, c: (w - c + 1).square().sum(),
    "product": lambda w, c: (w * c).sum() + (w**4).sum(),
    "number": lambda w, c: w.square().sum() * (1 + float(c.sum()) ** 2),
    "in a list": lambda w, c: torch.cat([w.reshape(-1), c.reshape(-1)]).square().sum(),
}


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares, methods.lbfgs, Hessian])
@pytest.mark.parametrize("made", OUTSIDE)
def test_constants_in_the_memory_of_a_parameter_are_refused(made: str, method: Any) -> None:
    x0 = torch.ones(2)
    w = nn.Parameter(x0)
    constant = OUTSIDE[made](x0, w)
    del x0
    for use in USES.values():
        with pytest.raises(ValueError, match=r"lies in the memory of parameter 0.* Keep a copy"):
            Hessian(lambda use=use: use(w, constant), [w]) if method is Hessian else method([w]).step(
                lambda use=use: use(w, constant)
            )
    assert w.tolist() == [1, 1]


INSIDE: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "detached": lambda w: w.detach(),
    "data": lambda w: w.data.view(2),
    "entries": lambda w: torch.stack(list(w.detach())),
    "without graph": torch.no_grad()(lambda w: w.view(2)),
}


@pytest.mark.parametrize("made", INSIDE)
def test_constants_that_the_closure_makes_are_taken(made: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    kept = {"w": w.detach()}  # as model.state_dict() is
    H = Hessian(lambda: (w * INSIDE[made](w)).square().sum() + w.new_zeros(kept["w"].shape).sum(), [w])
    torch.testing.assert_close(H.to_dense(), torch.diag(torch.tensor([2.0, 8.0])))


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares, methods.lbfgs, Hessian])
def test_parameters_keep_nothing_of_an_evaluation(method: Any) -> None:
    """Not even copies that stand for detached views of them, of which each evaluation makes its own."""
    w = nn.Parameter(torch.ones(3))
    loss = lambda: (w * (w - w.detach() + 1) - 2 * w.data.exp()).square().sum()
    optimizer = None if method is Hessian else method([w])
    for _ in range(3):
        Hessian(loss, [w]) if optimizer is None else optimizer.step(loss)
    assert not [key for key in w.untyped_storage().__dict__ if key.startswith("_imstep")]
