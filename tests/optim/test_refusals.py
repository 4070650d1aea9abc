"""What NewtonKrylov refuses: losses that are not finite, and misuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, X, network, normal
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from imstep.complexstep import UnsupportedOperatorError
from imstep.globalization import LevenbergMarquardt, TaylorMonitor
from imstep.optim import (
    BestRateForcing,
    ConjugateGradient,
    Cost,
    Hutchinson,
    Kronecker,
    LeastSquares,
    NewtonKrylov,
    NonFiniteLossError,
    ResidualForcing,
    StepOutcome,
)
from imstep.optim.arguments import check_device

# --- refusals -----------------------------------------------------------------------------------------------------


def test_several_refusals_raise() -> None:
    w = nn.Parameter(normal(3))
    before = w.detach().clone()
    optimizer = NewtonKrylov([w], max_refusals=3)
    for _ in range(2):
        optimizer.step(lambda: (w * math.nan).sum())
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row .* empty batch"):
        optimizer.step(lambda: (w * math.nan).sum())
    assert torch.equal(w, before)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    optimizer.step(lambda: (w**2).sum())
    assert optimizer.last_step.accepted


def test_refusals_are_counted_in_a_row() -> None:
    w = nn.Parameter(normal(3))
    optimizer = NewtonKrylov([w], max_refusals=2)
    for _ in range(4):
        optimizer.step(lambda: (w * math.nan).sum())
        optimizer.step(lambda: (w**2).cosh().sum())


def test_gradient_that_is_not_finite() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = NewtonKrylov([w])
    assert float(optimizer.step(lambda: w.abs().sqrt().sum())) == 0
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert not w.any()


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
@pytest.mark.parametrize("loss_of", [lambda u: F.mse_loss(u, u.detach() + 1), lambda u: (u - 1).square().mean()])
def test_empty_batch(method: Any, loss_of: Callable[[Tensor], Tensor]) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = method(model.parameters())
    loss = optimizer.step(lambda: loss_of(model(X[:0])))
    assert math.isnan(loss)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_function_that_falls_to_minus_infinity_is_not_followed() -> None:
    """From the exact saddle at zero: log is -inf where the escape first lands, and nothing is accepted there."""
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    loss = lambda: (1 - (w**2).sum()).clamp(min=0).log()
    optimizer = NewtonKrylov([w])
    optimizer.step(loss)
    assert math.isfinite(optimizer.last_step.new_loss)
    assert bool(w.isfinite().all())


def test_products_that_are_not_finite_do_not_end_the_run() -> None:
    """|w|^1.5 has a gradient at zero, but no second derivative."""
    w = nn.Parameter(torch.tensor([0.0, 0.0], dtype=F64))
    optimizer = NewtonKrylov([w])
    loss = lambda: (w.abs() ** 1.5).sum() + ((w - 1) ** 2).sum()
    start = float(optimizer.step(loss))
    assert float(loss().detach()) < start


# --- misuse -------------------------------------------------------------------------------------------------------


def step_with(result: Callable[[Tensor], Any]) -> tuple[nn.Parameter, NewtonKrylov]:
    w = nn.Parameter(normal(3))
    before, optimizer = w.detach().clone(), NewtonKrylov([w])
    with pytest.raises(ValueError, match=r"closure returned|depends on none"):
        optimizer.step(lambda: result(w))
    assert torch.equal(w, before)
    assert w.grad is None
    assert optimizer.last_step is None
    assert optimizer.cost == Cost()
    return w, optimizer


@pytest.mark.parametrize(
    "result",
    [
        lambda w: w,
        lambda w: None,
        lambda w: float(w.detach().sum()),
        lambda w: (w**2).sum().detach(),
        lambda w: (w * 1j).sum(),
        lambda w: normal(2).requires_grad_().sum(),
    ],
)
def test_closures_that_return_no_usable_loss(result: Callable[[Tensor], Any]) -> None:
    w, optimizer = step_with(result)
    optimizer.step(lambda: (w**2).sum())
    assert optimizer.last_step.accepted


def test_no_closure() -> None:
    with pytest.raises(TypeError, match="needs a closure"):
        NewtonKrylov([nn.Parameter(torch.ones(1))]).step()


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        ([nn.Parameter(torch.ones(2), requires_grad=False)], ValueError, "requires_grad=False"),
        ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))], ValueError, "several devices"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ],
)
def test_parameters_that_cannot_be_optimised(params: list[Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NewtonKrylov(params)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_options_in_parameter_groups(method: type[NewtonKrylov] | type[LeastSquares]) -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="makes no use of: betas, momentum"):
        method([{"params": [a]}, {"params": [b], "momentum": 0.1, "betas": (0.9, 0.99)}])
    optimizer = method([("a", a)])
    with pytest.raises(ValueError, match="makes no use of: eps"):
        optimizer.add_param_group({"params": [b], "eps": 1e-3})
    assert [group["params"] for group in optimizer.param_groups] == [[a]]


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": -1.0},
        {"tolerance": math.nan},
        {"max_trials": 0},
        {"max_refusals": 0},
    ],
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        NewtonKrylov([nn.Parameter(torch.ones(1))], **options)


def test_momentum_is_no_number() -> None:
    with pytest.raises(TypeError, match="momentum is True or False"):
        NewtonKrylov([nn.Parameter(torch.ones(1))], momentum=0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kronecker(every=0),
        lambda: Kronecker(decay=1.0),
        lambda: ConjugateGradient(curvature_floor=-1e-3),
        lambda: ConjugateGradient(warm_start=1.5),
        lambda: BestRateForcing(eta=0.0),
        lambda: BestRateForcing(max_products=0),
        lambda: ResidualForcing(eta=1.0),
        lambda: ResidualForcing(max_products=0),
        lambda: TaylorMonitor(theta=2.0),
        lambda: LevenbergMarquardt(factor=0.5),
    ],
)
def test_strategies_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"got"):
        make()


def test_a_device_without_double_precision():
    with pytest.raises(ValueError, match=r"live on mps, which has no float64.*Move model and data"):
        check_device(torch.device("mps"))


def test_selective_checkpoints_take_one_pass() -> None:
    layer, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.ones(2, 3)
    save = lambda context, func, *args, **kwargs: CheckpointPolicy.PREFER_SAVE
    contexts = partial(create_selective_checkpoint_contexts, save)
    closure = lambda: checkpoint(layer, x, use_reentrant=False, context_fn=contexts).square().sum()
    with pytest.raises(ValueError, match=r"selective checkpoint .*Hutchinson"):
        NewtonKrylov(layer.parameters()).step(closure)
    optimizer = NewtonKrylov(layer.parameters(), preconditioning=Hutchinson())
    optimizer.step(closure)
    assert optimizer.last_step.accepted


def test_operators_of_other_packages_are_told_a_way() -> None:
    cube = torch.library.custom_op("imstep_tests::cube", lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor")
    cube.register_autograd(
        lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedOperatorError, match=r"cube.*of your own.*extending\.md"):
        NewtonKrylov([w]).step(lambda: cube(w).sum())
