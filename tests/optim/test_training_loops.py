"""What a training loop does to a closure: the right step, or an error that says what to do."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imstep.optim import ExactHessian, LeastSquares, NewtonKrylov, NoPreconditioning, StepOutcome

METHODS = [NewtonKrylov, LeastSquares]
INPUTS, TARGETS = normal(24, 4), normal(24, 2, seed=1)
Loop = Callable[[nn.Module, torch.optim.Optimizer], Callable[[], Any]]


def net(dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def error(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.mse_loss(model(INPUTS[rows]), TARGETS[rows])


def train(method: Any, loop: Loop, steps: int = 4, **options: Any) -> tuple[list[Tensor], Any, Any]:
    """The parameters after some steps, the optimizer, and what the last step returned."""
    model = net()
    optimizer = method(model.parameters(), **options)
    closure = loop(model, optimizer)
    for _ in range(steps):
        returned = optimizer.step(closure)
    return [p.detach() for p in model.parameters()], optimizer, returned


def plainly(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
    return lambda: error(model)


def with_backward(returned: Callable[[Tensor], Any], factor: float = 1.0, **options: Any) -> Loop:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Any:
            optimizer.zero_grad(**options)
            loss = error(model)
            (factor * loss).backward()
            return returned(loss)

        return closure

    return loop


# --- what is returned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "returned",
    [
        lambda loss: loss,
        lambda loss: loss.detach(),
        lambda loss: loss.detach().clone(),
        lambda loss: loss.item(),
        lambda loss: None,
        lambda loss: {"loss": loss},
        lambda loss: (loss, 1),
    ],
)
def test_what_backward_is_called_on_is_the_loss(method: Any, returned: Callable[[Tensor], Any]) -> None:
    expected, plain, value = train(method, plainly)
    found, optimizer, got = train(method, with_backward(returned))
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert float(got) == pytest.approx(float(value), rel=1e-9)
    assert got.shape == ()
    assert not got.requires_grad
    assert optimizer.last_step.loss == pytest.approx(plain.last_step.loss, rel=1e-9)
    if method is NewtonKrylov:
        assert optimizer.cost.hessian_products == plain.cost.hessian_products  # Gauss-Newton stays in use


@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_loss_is_the_one_that_is_minimised(method: Any) -> None:
    """As with accumulation over k batches, or a scaler: the monitor and the gradient see the same function."""
    _, optimizer, returned = train(method, with_backward(lambda loss: loss, factor=0.25), steps=3)
    assert float(returned) == pytest.approx(4 * optimizer.last_step.loss, rel=1e-12)
    assert optimizer.last_step.accepted
    expected = optimizer.last_step.loss - optimizer.last_step.predicted_decrease + optimizer.last_step.taylor_error
    assert optimizer.last_step.new_loss == pytest.approx(expected, rel=1e-6)


def two_batches(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows in (slice(0, 12), slice(12, 24)):
            loss = error(model, rows) / 2
            loss.backward()
            total += loss.item()
        return total

    return closure


def two_at_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> None:
        optimizer.zero_grad()
        losses = [error(model, slice(0, 12)), error(model, slice(12, 24))]
        torch.autograd.backward(losses, [torch.tensor(0.5, dtype=F64), torch.tensor(0.5, dtype=F64)])

    return closure


def one_graph_twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> None:
        optimizer.zero_grad()
        loss = error(model)
        (0.75 * loss).backward(retain_graph=True)
        loss.backward(gradient=torch.tensor(0.25, dtype=F64))

    return closure


def by_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> None:
        optimizer.zero_grad()
        squares = (model(INPUTS) - TARGETS) ** 2
        squares.backward(torch.full_like(squares, 1 / squares.numel(), requires_grad=False))

    return closure


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", [two_batches, two_at_once, one_graph_twice, by_entries])
def test_several_backward_calls_add_up(method: Any, loop: Loop) -> None:
    options = {} if method is LeastSquares else {"preconditioning": NoPreconditioning()}  # factors are drawn by case
    expected, plain, _ = train(method, plainly, **options)
    found, optimizer, returned = train(method, loop, **options)
    assert float(returned) == pytest.approx(plain.last_step.loss, rel=1e-6)
    assert optimizer.cost.hessian_products == plain.cost.hessian_products
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_calls_before_zero_grad_do_not_count(method: Any, set_to_none: bool) -> None:
    """Adversarial training: a first backward pass is for the inputs alone."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> float:
            x = INPUTS.clone().requires_grad_()
            F.mse_loss(model(x), TARGETS).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = F.mse_loss(model(INPUTS + 0.01 * x.grad.sign()), TARGETS)
            loss.backward()
            return loss.item()

        return closure

    _, optimizer, returned = train(method, loop)
    assert float(returned) == optimizer.last_step.loss
    assert optimizer.last_step.accepted


@pytest.mark.parametrize("method", METHODS)
def test_backward_for_inputs_alone_is_run_in_trials(method: Any) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            x = INPUTS.clone().requires_grad_()
            F.mse_loss(model(x), TARGETS).backward(inputs=[x])
            return F.mse_loss(model(INPUTS + 0.01 * x.grad.sign()), TARGETS)

        return closure

    _, optimizer, _ = train(method, loop)
    assert optimizer.last_step.accepted


def test_gradients_of_other_parameters_are_those_of_one_evaluation() -> None:
    model, other = net(), nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = NewtonKrylov(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(INPUTS) * other, TARGETS)
        loss.backward()
        return loss

    before = copy.deepcopy(model)
    optimizer.step(closure)
    (expected,) = torch.autograd.grad(F.mse_loss(before(INPUTS) * other, TARGETS), other)
    torch.testing.assert_close(other.grad, expected, rtol=1e-12, atol=0)


# --- gradients that are not those of the loss ---------------------------------------------------------------------


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clipped_by_value(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad.mul_(0.5)


def assigned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = p.grad * 0.5


def dropped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight.grad = None


def noisy(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad += 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [clipped, clipped_by_value, scaled, assigned, dropped, noisy])
def test_gradients_changed_after_backward_are_refused(method: Any, change: Callable[..., None]) -> None:
    model = net()
    optimizer = method(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(model)
        loss.backward()
        change(model, optimizer)
        return loss

    with pytest.raises(ValueError, match=r"changed \.grad other than by backward\(\).*: max_step_norm of"):
        optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.last_step is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("emptied", [False, True])
def test_gradients_written_by_hand_are_refused(method: Any, emptied: bool) -> None:
    model = net()
    optimizer = method(model.parameters())

    def closure() -> Tensor:
        if emptied:
            optimizer.zero_grad()
        loss = error(model)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        return loss

    with pytest.raises(ValueError, match=r"in its own thread, as by torch\.autograd\.grad.*Return the loss"):
        optimizer.step(closure)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_gradients_emptied_after_backward_are_refused(set_to_none: bool, share: bool) -> None:
    model = net()
    optimizer = NewtonKrylov(model.parameters())

    def closure() -> Tensor:
        loss = error(model)
        loss.backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        return loss / 2 if share else loss

    with pytest.raises(ValueError, match=r"emptied \.grad afterwards.*zero_grad\(\) before backward\(\)"):
        optimizer.step(closure)


def test_a_graph_that_outlives_backward_is_taken() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            loss = error(model)
            loss.backward(retain_graph=True)
            optimizer.zero_grad()
            return loss

        return closure

    for p, q in zip(train(NewtonKrylov, loop)[0], train(NewtonKrylov, plainly)[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_reentrant_checkpoints_of_inputs_that_require_gradients() -> None:
    """Trials make a pass for the inputs, and such a checkpoint takes none for some leaves alone."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            x = INPUTS.clone().requires_grad_()
            hidden = checkpoint(lambda x: model[0](x).tanh(), x, use_reentrant=True)
            loss = F.mse_loss(model[2](hidden), TARGETS)
            loss.backward()
            assert x.grad is not None
            return loss

        return closure

    options = {"preconditioning": NoPreconditioning()}
    expected = train(NewtonKrylov, plainly, **options)[0]
    for p, q in zip(train(NewtonKrylov, loop, **options)[0], expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_gradients_that_are_looked_at_are_not_changed() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = error(model)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)  # is not active
            return loss

        return closure

    expected = train(NewtonKrylov, plainly)[0]
    for p, q in zip(train(NewtonKrylov, loop)[0], expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_accumulated_before_the_step_are_refused(method: Any) -> None:
    model = net()
    optimizer = method(model.parameters())

    def closure() -> Tensor:
        loss = error(model, slice(12, 24)) / 2
        loss.backward()
        return loss

    (error(model, slice(0, 12)) / 2).backward()
    with pytest.raises(ValueError, match=r"without zero_grad\(\).*one closure"):
        optimizer.step(closure)
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step(closure)  # what a step has left is no such gradient
    assert optimizer.last_step.outcome is not StepOutcome.NON_FINITE
    closure()
    with pytest.raises(ValueError, match=r"without zero_grad\(\)"):
        optimizer.step(closure)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", [plainly, with_backward(lambda f: f), with_backward(lambda f: f, set_to_none=False)])
def test_gradients_left_over_do_no_harm(method: Any, loop: Loop) -> None:
    def after_another(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        error(model, slice(0, 12)).backward()
        return loop(model, optimizer)

    expected = train(method, plainly)[0]
    for p, q in zip(train(method, after_another)[0], expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unit", [1.0, 1e-12])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_a_derivative_itself_is_refused(method: Any, unit: float) -> None:
    """Gradient caching: z.backward(dL/dz) has the gradient of L, but <z, dL/dz> is not L."""

    def loop(returned: Callable[[Tensor], Any]) -> Loop:
        def made(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
            def closure() -> Any:
                optimizer.zero_grad()
                z = model(INPUTS)
                copied = z.detach().requires_grad_()
                loss = unit * F.mse_loss(copied, TARGETS)
                loss.backward()
                z.backward(copied.grad)
                return returned(loss)

            return closure

        return made

    for returned in (lambda loss: loss, lambda loss: None):
        with pytest.raises(ValueError, match=r"on the loss itself|no sum of squares|not recognised"):
            train(method, loop(returned))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_two_functions_to_differentiate_are_refused() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            loss = error(model)
            loss.backward(create_graph=True)
            return loss + sum(p.grad.square().sum() for p in model.parameters())

        return closure

    with pytest.raises(ValueError, match=r"two functions to differentiate.*autograd\.grad"):
        train(NewtonKrylov, loop)


# --- hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", [plainly, with_backward(lambda loss: loss.item())])
@pytest.mark.filterwarnings("ignore:.*used in ways that are not recognised")
def test_a_mask_by_a_hook_holds_entries_fixed(method: Any, loop: Loop) -> None:
    mask = (normal(8, 4, seed=3) > 0).to(F64)
    model = net()
    start = model[0].weight.detach().clone()
    model[0].weight.register_hook(lambda g: g * mask)
    optimizer = method(model.parameters())
    closure = loop(model, optimizer)
    losses = [float(optimizer.step(closure)) for _ in range(15)]
    moved = model[0].weight.detach() - start
    assert not bool((moved * (1 - mask)).any())
    assert float((moved * mask).norm()) > 1e-2
    # The same problem with the entries as constants.
    twin, free = net(), nn.Parameter(torch.zeros(8, 4, dtype=F64))
    start = twin[0].weight.detach().clone()
    forward = lambda: F.mse_loss(twin[2](F.linear(INPUTS, start + mask * free, twin[0].bias).tanh()), TARGETS)
    other = method([free, twin[0].bias, *twin[2].parameters()])
    expected = [float(other.step(forward)) for _ in range(15)]
    assert losses[-1] <= 1.1 * expected[-1]


def test_a_mask_is_kept_where_the_step_leaves_a_saddle() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    w.register_hook(lambda g: g * torch.tensor([0.0, 1.0], dtype=F64))
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    for _ in range(10):
        optimizer.step(lambda: ((w**2 - 1) ** 2).sum())
    assert w[0].item() == 0
    assert abs(w[1].item()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", [plainly, with_backward(lambda loss: loss)])
@pytest.mark.parametrize(
    "hook",
    [
        lambda g: g / g.norm(),
        lambda g: g.clamp(-1e-3, 1e-3),
        lambda g: g + 1,
        lambda g: 0.5 * g,
        lambda g: g.mul_(0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*used in ways that are not recognised")
def test_hooks_that_make_it_no_gradient_are_refused(method: Any, loop: Loop, hook: Callable[[Tensor], Tensor]) -> None:
    model = net()
    model[0].weight.register_hook(hook)
    optimizer = method(model.parameters())
    with pytest.raises(ValueError, match=r"a hook .*the gradient of a parameter.*Remove the hook"):
        optimizer.step(loop(model, optimizer))


def test_hooks_that_look_are_let_be() -> None:
    seen: list[float] = []

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        for p in model.parameters():
            p.register_hook(lambda g: seen.append(float(g.norm())))
            p.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
        return with_backward(lambda loss: loss)(model, optimizer)

    expected = train(NewtonKrylov, plainly)[0]
    for p, q in zip(train(NewtonKrylov, loop)[0], expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert len(seen) == 4 * 4 * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", [plainly, with_backward(lambda loss: loss)])
def test_post_accumulate_hooks_that_change_or_are_not_run(method: Any, loop: Loop) -> None:
    model = net()

    def halve(p: Tensor) -> None:
        p.grad.mul_(0.5)

    model[0].weight.register_post_accumulate_grad_hook(halve)
    optimizer = method(model.parameters())
    with pytest.raises(ValueError, match=r"post-accumulate-grad hook.*Remove the hook"):
        optimizer.step(loop(model, optimizer))


# --- where and when it is computed --------------------------------------------------------------------------------


def in_a_pool(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(model, INPUTS.chunk(2)))
        return F.mse_loss(torch.cat(outputs), TARGETS)

    return closure


def half_in_a_thread(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> float:
        optimizer.zero_grad()
        outputs: list[Tensor] = []
        thread = threading.Thread(target=lambda: outputs.append(model(INPUTS[12:])))
        thread.start()
        first = model(INPUTS[:12])
        thread.join()
        loss = F.mse_loss(torch.cat([first, *outputs]), TARGETS)
        loss.backward()
        return loss.item()

    return closure


def backward_in_a_thread(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(model)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return loss

    return closure


def computed_before(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    hidden = model[:2](INPUTS)
    return lambda: F.mse_loss(model[2](hidden), TARGETS)


@pytest.mark.parametrize("loop", [in_a_pool, half_in_a_thread, computed_before])
def test_what_is_computed_elsewhere_is_refused(loop: Loop) -> None:
    with pytest.raises(ValueError, match="in another thread, or before the closure was called"):
        train(NewtonKrylov, loop)


@pytest.mark.parametrize("method", METHODS)
def test_backward_elsewhere_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match="other than by backward"):
        train(method, backward_in_a_thread)


def test_threads_do_no_harm_to_least_squares() -> None:
    expected = train(LeastSquares, plainly)[0]
    for p, q in zip(train(LeastSquares, in_a_pool)[0], expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


# --- what a closure must not do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_within_a_step_is_refused(method: Any) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            optimizer.step(lambda: error(model))
            return error(model)

        return closure

    with pytest.raises(RuntimeError, match="in the closure of a step"):
        train(method, loop)
    assert train(method, plainly)[1].last_step.accepted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "write", [lambda p: p.mul_(0.99), lambda p: p.clamp_(-0.1, 0.1), lambda p: p.add_(p.grad, alpha=-1e-2)]
)
def test_a_closure_that_moves_parameters_is_refused(method: Any, write: Callable[[Tensor], Any]) -> None:
    model = net()
    optimizer = method(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(model)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                write(p)
        return loss

    with pytest.raises(ValueError, match=r"changed the parameters.*after the step"):
        optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_frozen_in_the_closure_are_refused(method: Any) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def closure() -> Tensor:
            model[0].weight.requires_grad_(False)
            return error(model)

        return closure

    with pytest.raises(ValueError, match=r"requires_grad=False.*outside the closure"):
        train(method, loop)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda loss: {"loss": loss}, r"'dict'.*outputs\['loss'\]"),
        (lambda loss: (loss, loss), r"'tuple'.*outputs\[0\]"),
        (lambda loss: None, r"'NoneType'.*call backward\(\)"),
    ],
)
def test_closures_that_return_more_than_a_loss(method: Any, returned: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(method, lambda model, optimizer: lambda: returned(error(model)))


# --- regions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.set_grad_enabled(False), torch.autograd.detect_anomaly]
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_regions_that_change_nothing(method: Any, region: Callable[[], Any]) -> None:
    expected = train(method, plainly)[0]
    with region():
        found = train(method, with_backward(lambda loss: loss))[0]
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_run_uncompiled(method: Any, backend: str, warm: bool) -> None:
    def loop(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
        compiled = torch.compile(model, backend=backend)
        if warm:
            compiled(INPUTS)
        return lambda: error(compiled)

    for p, q in zip(train(method, loop)[0], train(method, plainly)[0], strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_steps_in_compiled_code_run_uncompiled(method: Any, whole: bool) -> None:
    model = net()
    optimizer = method(model.parameters())

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    compiled = torch.compile(train_step if whole else optimizer.step, backend="eager")
    for _ in range(4):
        compiled(INPUTS, TARGETS) if whole else compiled(lambda: error(model))
    for p, q in zip(model.parameters(), train(method, plainly)[0], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_under_inference_mode_leaves_statistics(method: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), *net()).to(F64)
    optimizer = method(model.parameters())
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        with torch.inference_mode():
            return error(model)

    with pytest.raises(ValueError, match=r"without a graph|under torch\.inference_mode\(\)"):
        optimizer.step(closure)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_is_named(method: Any) -> None:
    model = net()
    optimizer = method(model.parameters())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode\(\)"):
        optimizer.step(lambda: error(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_concerns_the_closure_alone(method: Any, half: torch.dtype) -> None:
    """In the closure or around the step, it is the same; and steps go on as without."""
    x, y = INPUTS.float(), TARGETS.float()

    def losses(inside: bool, around: bool) -> tuple[list[float], list[Tensor]]:
        model = net(torch.float32)
        optimizer = method(model.parameters())

        def closure() -> Tensor:
            with torch.autocast("cpu", half, enabled=inside or around):
                return F.mse_loss(model(x), y)

        outside = lambda: F.mse_loss(model(x), y)
        with torch.autocast("cpu", half, enabled=around):
            history = [float(optimizer.step(outside if around else closure)) for _ in range(8)]
            assert model(x).dtype is (half if around else torch.float32)  # its copies of parameters are new ones
            assert float(F.mse_loss(model(x), y)) < history[0]
        assert all(p.grad.dtype is torch.float32 for p in model.parameters())
        return history, [p.detach() for p in model.parameters()]

    plain, inside, around = losses(False, False), losses(True, False), losses(False, True)
    assert inside[0] == around[0]
    assert all(torch.equal(p, q) for p, q in zip(inside[1], around[1], strict=True))
    assert inside[0][-1] < plain[0][0] - 0.7 * (plain[0][0] - plain[0][-1])


@pytest.mark.parametrize("configuration", [NewtonKrylov, NewtonKrylov.for_batches])
def test_autocast_with_convolutions_and_classes(configuration: Callable[..., NewtonKrylov]) -> None:
    images, labels = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = configuration(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(optimizer.step(lambda: F.cross_entropy(model(images), labels))) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_models_are_wider(half: torch.dtype) -> None:
    model, x, y = net(half), INPUTS.to(half), TARGETS.to(half)
    optimizer = NewtonKrylov(model.parameters())
    losses = [float(optimizer.step(lambda: F.mse_loss(model(x), y))) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_compiled_models() -> None:
    """The first step's second evaluation, for comparison, is beyond what looks at layers, which would be compiled."""

    def stepped(wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer, x = NewtonKrylov(model.parameters()), torch.linspace(-1, 1, 24).double().reshape(8, 3)
        seen = wrap(model)
        for _ in range(2):
            optimizer.step(lambda: F.cross_entropy(seen(x), torch.arange(8) % 2))
        return [p.detach() for p in model.parameters()]

    compiled = stepped(lambda model: torch.compile(model, backend="eager"))
    torch.testing.assert_close(compiled, stepped(lambda model: model))
