"""What users build around operators: views, in-place writes, nested derivatives, checkpoints, hooks, parametrizations.

Every loss here is differentiated twice by the complex step, evaluated and replayed, and compared with central
differences of the gradient that PyTorch computes, extrapolated once; where PyTorch has a second derivative, with that
as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import imstep
from imstep.curvature.hessian import Hessian

Loss = Callable[[Tensor], Tensor]
N = 12


def point(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def weights(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(f: Loss, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def by_differences(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    difference = lambda h: (gradient(f, x + h * v) - gradient(f, x - h * v)) / (2 * h)
    return (4 * difference(1e-3) - difference(2e-3)) / 3


def by_double_backward(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    g = torch.autograd.grad(f(x), x, create_graph=True)[0]
    return torch.autograd.grad(g @ v, x)[0]


def replayed(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    w = x.detach().clone().requires_grad_()
    hessian = Hessian(lambda: f(w), [w])
    one, block = hessian @ v, hessian @ torch.stack([v, -v], 1)
    torch.testing.assert_close(block, torch.stack([one, -one], 1), rtol=1e-12, atol=1e-12)
    return one


def agree(f: Loss, twice: bool = True) -> None:
    """Compare; ``twice``: whether PyTorch's double backward is right on ``f``."""
    x, v = point()
    found = imstep.hvp(f, x, v)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, by_differences(f, x, v), rtol=1e-6, atol=1e-8)
    if twice:
        torch.testing.assert_close(found, by_double_backward(f, x, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replayed(f, x, v), found, rtol=1e-12, atol=1e-12)


# --- linear algebra ---------------------------------------------------------------------------------------------------


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(4, 3)


def _definite(x: Tensor) -> Tensor:
    return _matrix(x).t() @ _matrix(x) + torch.eye(3, dtype=x.dtype)


def linalg_solve(x: Tensor) -> Tensor:
    return torch.linalg.solve(_definite(x), x[:3]).sin().sum()


def linalg_cholesky(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(_definite(x)).sin().sum()


def linalg_eigh(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_definite(x))
    return values.log().sum() + (values * vectors**4).sum()


def linalg_svd(x: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(_matrix(x), full_matrices=False)
    return (left**4).sum() + values.exp().sum() + (right**4 * values).sum()


def linalg_det(x: Tensor) -> Tensor:
    return torch.linalg.det(_matrix(x)[:3]).sin() + torch.linalg.slogdet(_definite(x)).logabsdet


def linalg_lstsq(x: Tensor) -> Tensor:
    return torch.linalg.lstsq(_matrix(x), _matrix(x.cos())[:, :2]).solution.pow(2).sum()


# --- views and in-place writes --------------------------------------------------------------------------------------


def write_through_views(x: Tensor) -> Tensor:
    h = torch.sin(x).reshape(3, 4).clone()
    h[1] = x[:4] * x[4:8]
    h.t()[2].mul_(x[:3])
    h[:, 1] += x[3:6].exp()
    return (h.cumsum(0) ** 2).sum()


def in_place_activations(x: Tensor) -> Tensor:
    h = (x * 2).relu_() * 1
    h = h.add_(x).tanh_() * x
    h = nn.functional.elu(h.clone(), inplace=True)
    return (nn.functional.leaky_relu(h + x, 0.1, inplace=True) ** 3).sum()


def fresh_buffer_filled(x: Tensor) -> Tensor:
    buffer = torch.zeros(4, 3, dtype=x.dtype)
    for row in range(4):
        buffer[row] = x[3 * row : 3 * row + 3] ** 2
    buffer[2] = 0.0
    return (buffer @ buffer.t()).exp().sum().log()


def strided_views(x: Tensor) -> Tensor:
    windows = x.unfold(0, 4, 2)
    first, *rest = windows.unbind(0)
    overlapping = x.as_strided((3, 3), (4, 1), 1)
    return (first * rest[0] * rest[-1]).sum() + torch.linalg.det(overlapping) + x.expand(2, N).prod(1).sum()


def indexed_writes(x: Tensor) -> Tensor:
    index = torch.tensor([0, 3, 3, 5])
    h = torch.cos(x).index_add(0, index, x[:4] ** 2)
    h = h.scatter_add(0, index, x[4:8].exp()).masked_fill(x > 1, 0.5)
    h = torch.where(x > 0, h * x, h)
    h.index_put_((index[:2],), x[:2] * x[2:4], accumulate=True)
    return (h**2).sum()


def index_without_dimensions(x: Tensor) -> Tensor:
    at, rows = torch.tensor(1), x.reshape(3, 4)
    h = torch.index_select(rows, 0, at).sin() * rows.index_add(0, at, rows[:1] ** 2)
    written = h.index_copy(1, at, rows[:, :1] * rows[:, 1:2]) ** 3
    return written.sum() + (rows.take(at) * rows.index_fill(0, at, x[0])).sum()


def memory_reused(x: Tensor) -> Tensor:
    kept = x + 1.0  # its imaginary part is that of x
    h = x.clone()
    h.mul_(2).sin_()
    copy = h.clone()
    h.zero_()
    return (kept**3 * copy).sum() + h.sum()


def lists_of_tensors(x: Tensor) -> Tensor:
    parts = list(torch.sin(x).split(4))
    parts = torch._foreach_mul(torch._foreach_exp(parts), 0.5)
    parts = torch._foreach_addcmul(parts, list(x.split(4)), parts[::-1], 2.0)
    torch._foreach_add_(parts, list(x.split(4)), alpha=0.3)
    return torch.stack(torch._foreach_norm(parts)).prod()


# --- derivatives inside the loss ------------------------------------------------------------------------------------


def network(x: Tensor, inputs: Tensor) -> Tensor:
    w1, w2 = x[:6].reshape(3, 2), x[6:9]
    return torch.tanh(inputs @ w1.t() + x[9:]) @ w2


INPUTS = weights(5, 2)


def create_graph_inside(x: Tensor) -> Tensor:
    inputs = INPUTS.clone().requires_grad_()
    u = network(x, inputs)
    (du,) = torch.autograd.grad(u.sum(), inputs, create_graph=True)
    (ddu,) = torch.autograd.grad(du[:, 0].sum(), inputs, create_graph=True)
    return ((ddu[:, 0] + du[:, 1] - u) ** 2).mean()


def func_grad(x: Tensor) -> Tensor:
    return (torch.func.grad(lambda t: network(x, t).sum())(INPUTS) ** 2).sum()


def func_vmap_grad(x: Tensor) -> Tensor:
    return (torch.func.vmap(torch.func.grad(lambda t: network(x, t)))(INPUTS) ** 2).sum()


def func_jvp(x: Tensor) -> Tensor:
    value, slope = torch.func.jvp(lambda t: network(x, t), (INPUTS,), (weights(5, 2, seed=6),))
    return (value * slope).sum()


def func_jacrev(x: Tensor) -> Tensor:
    return (torch.func.jacrev(lambda t: network(x, t))(INPUTS) ** 2).sum()


def func_jacfwd(x: Tensor) -> Tensor:
    return (torch.func.jacfwd(lambda t: network(x, t))(INPUTS) ** 2).sum()


def func_hessian(x: Tensor) -> Tensor:
    return (torch.func.hessian(lambda t: network(x, t).sum())(INPUTS[:2]) ** 2).sum()


def func_laplacian(x: Tensor) -> Tensor:
    laplacian = lambda t: torch.func.hessian(lambda s: network(x, s))(t).diagonal().sum()
    return (torch.func.vmap(laplacian)(INPUTS) ** 2).sum()


def func_functional_call(x: Tensor) -> Tensor:
    layer = nn.Linear(2, 4, dtype=torch.float64)
    values = {"weight": x[:8].reshape(4, 2), "bias": x[8:]}
    return torch.func.functional_call(layer, values, (INPUTS,)).tanh().pow(2).sum()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def checkpointed(reentrant: bool) -> Loss:
    block = lambda t: torch.sin(t) * torch.exp(-t * t)
    return lambda x: (
        checkpoint(block, checkpoint(block, x, use_reentrant=reentrant), use_reentrant=reentrant).pow(2).sum()
    )


# --- functions of the user ------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class SineOfSaved(torch.autograd.Function):
    """Saves its output and something computed in the forward pass that is neither input nor output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ctx.slope = torch.sin(x), torch.cos(x)
        ctx.save_for_backward(y)
        return y, y * y

    @staticmethod
    def backward(ctx: Any, g: Tensor, g2: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (g + 2 * y * g2) * ctx.slope


def user_function(x: Tensor) -> Tensor:
    return (Cube.apply(torch.sin(x)) * x).sum()


def user_function_once(x: Tensor) -> Tensor:
    return (CubeOnce.apply(torch.sin(x)) * x).sum()


def user_function_two_outputs(x: Tensor) -> Tensor:
    first, second = SineOfSaved.apply(x)
    return (first.exp() * second).sum()


# --- hooks ----------------------------------------------------------------------------------------------------------


def tensor_hook(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h.register_hook(lambda g: g * (1 + g))
    return (h**3).sum()


def module_hooks(x: Tensor) -> Tensor:
    layer = nn.Tanh()
    layer.register_forward_hook(lambda module, inputs, output: output * inputs[0])
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    layer.register_full_backward_hook(lambda module, given, received: (given[0] * 3,))
    return (layer(torch.sin(x)) ** 2).sum()


# --- stopped gradients ----------------------------------------------------------------------------------------------


def detached(x: Tensor) -> Tensor:
    return (torch.sin(x) * x.detach() ** 2 + x**2).sum()


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.exp(x).sum()
    return (x**3 * scale).sum()


def detached_in_place(x: Tensor) -> Tensor:
    h = x * x
    h.detach_()
    return (h * torch.sin(x)).sum()


# --- tied and parametrized ------------------------------------------------------------------------------------------


def tied(x: Tensor) -> Tensor:
    w = x.reshape(3, 4)
    return ((weights(5, 4) @ w.t()).tanh() @ w).pow(2).sum()


LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        write_through_views,
        in_place_activations,
        linalg_solve,
        linalg_cholesky,
        linalg_eigh,
        linalg_svd,
        linalg_det,
        linalg_lstsq,
        fresh_buffer_filled,
        strided_views,
        indexed_writes,
        index_without_dimensions,
        memory_reused,
        lists_of_tensors,
        create_graph_inside,
        func_grad,
        func_vmap_grad,
        func_jvp,
        func_jacrev,
        func_jacfwd,
        func_hessian,
        func_laplacian,
        func_functional_call,
        user_function,
        user_function_two_outputs,
        tensor_hook,
        module_hooks,
        tied,
    )
}
# Losses on which PyTorch's own double backward fails, or is wrong without saying so.
ONCE = {
    "func_jvp",
    "func_jacfwd",
    "func_hessian",
    "func_laplacian",
    "user_function_two_outputs",  # what is computed in forward and kept on ctx is a constant to it
    "tensor_hook",  # it calls the hook a second time, on the gradient of the gradient
    "module_hooks",
}


@pytest.mark.parametrize("name", LOSSES)
def test_composition(name: str) -> None:
    agree(LOSSES[name], twice=name not in ONCE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    agree_backward(checkpointed(reentrant), torch.nn.Parameter(point()[0]))


def agree_backward(f: Loss, w: nn.Parameter) -> None:
    """As ``agree`` for a closure that calls backward(), which the re-entrant checkpoint requires."""
    _, v = point()
    plain = checkpointed_reference(w.detach(), v)
    hessian = Hessian(lambda: _with_backward(f, w), [w])
    torch.testing.assert_close(hessian @ v, plain, rtol=1e-12, atol=1e-12)


def _with_backward(f: Loss, w: nn.Parameter) -> Tensor:
    w.grad = None
    loss = f(w)
    loss.backward()
    return loss


def checkpointed_reference(x: Tensor, v: Tensor) -> Tensor:
    block = lambda t: torch.sin(t) * torch.exp(-t * t)
    return by_double_backward(lambda t: block(block(t)).pow(2).sum(), x, v)


def test_once_differentiable_is_differentiated() -> None:
    x, v = point()
    expected = by_double_backward(lambda t: (torch.sin(t) ** 3 * t).sum(), x, v)
    torch.testing.assert_close(imstep.hvp(user_function_once, x, v), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replayed(user_function_once, x, v), expected, rtol=1e-12, atol=1e-12)


def overwritten_after_detach(x: Tensor) -> Tensor:
    """A detached view shows what is written to the memory later, as by an activation in place."""
    h = x * 2
    target, part = h.detach(), h.view(3, 4).data.t()[1:]
    h[2:5].add_(x[:3] ** 2)
    activated = nn.functional.relu(h, inplace=True).sin()
    return ((activated**2 - target) ** 2).sum() + (part * (x[:9].view(3, 3) ** 3)).sum()


def overwritten_again_and_again(x: Tensor) -> Tensor:
    h, seen = x * 1, []
    for _ in range(3):
        seen.append(h.detach().unsqueeze_(0))
        torch._foreach_mul_([h], 1.1)
        h.add_(x.sin())
    return sum((s * h).sum() for s in seen)


def detached_for_good(x: Tensor) -> Tensor:
    """What was detached of a tensor that is gone is nobody else's memory."""
    target = (x * 2 + 1).detach()
    target[x > 0] = 0.0
    return (target.mul_(3) * x**2).sum()


STOPPED = [
    detached,
    without_grad,
    detached_in_place,
    overwritten_after_detach,
    overwritten_again_and_again,
    detached_for_good,
]


@pytest.mark.parametrize("f", STOPPED, ids=lambda f: f.__name__)
def test_stopped_gradients_stay_constant(f: Loss) -> None:
    """As in double backward, what is detached does not move with the parameters."""
    x, v = point()
    expected = by_double_backward(f, x, v)
    torch.testing.assert_close(imstep.hvp(f, x, v), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replayed(f, x, v), expected, rtol=1e-12, atol=1e-12)
    w = x.clone().requires_grad_()
    torch.testing.assert_close(Hessian(lambda: f(w), [w]).loss, f(x))


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrized_layers(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    if kind == "weight_norm":
        layer = parametrizations.weight_norm(layer)
    elif kind == "orthogonal":
        layer = parametrizations.orthogonal(layer)
    elif kind == "spectral_norm":
        layer = parametrizations.spectral_norm(layer).eval()
    inputs = weights(6, 3)
    closure = lambda: (layer(inputs).tanh() ** 2).sum()
    hessian = Hessian(closure, layer)
    v = weights(hessian.size, seed=9)
    product = hessian @ v
    # Not by double backward: PyTorch's is wrong for weight_norm, whose norms it keeps constant the second time.
    at = hessian.parameters
    start = at.snapshot()

    def gradient_at(step: float) -> Tensor:
        at.move(start, v, step)
        return at.flatten(torch.autograd.grad(closure(), at.tensors))

    difference = lambda h: (gradient_at(h) - gradient_at(-h)) / (2 * h)
    expected = (4 * difference(1e-3) - difference(2e-3)) / 3
    at.restore(start)
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-8)


def write(t: Tensor) -> None:
    t[0] = 1.0


@pytest.mark.parametrize("over", [write, lambda t: torch._foreach_mul_([t], 2.0)], ids=["one", "list"])
def test_writing_into_a_detached_view_is_refused(over: Callable[[Tensor], Any]) -> None:
    def f(x: Tensor) -> Tensor:
        h = x * x
        over(h.detach())
        return (h * h).sum()

    x, v = point()
    with pytest.raises(imstep.UnsupportedOperatorError, match="detach"):
        imstep.hvp(f, x, v)


def test_views_of_what_is_overwritten_in_lists() -> None:
    """PyTorch does not count such writes under a dispatch mode, by which views find their new history."""

    def f(x: Tensor) -> Tensor:
        h = x * 1.0
        even = h[::2]
        torch._foreach_add_([h], [x.sin()], alpha=0.3)
        return (h**3).sum() + (even**2).sum()

    agree(f)
    x, v = point()
    w = x.clone().requires_grad_()
    torch.testing.assert_close(Hessian(lambda: f(w), [w]).gradient, gradient(f, x))

    def saved(x: Tensor) -> Tensor:
        h = x.exp()
        square = h * h
        torch._foreach_mul_([h], 2.0)
        return (square * h).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        imstep.hvp(saved, x, v)


def test_shared_memory_is_seen_by_all_views() -> None:
    """An imaginary part written through one view is read through another, also after a copy to another dtype."""

    def f(x: Tensor) -> Tensor:
        h = torch.zeros(2, N, dtype=torch.float64)
        h[0].copy_(x.sin())
        h.view(-1)[N:].copy_(x)
        pairs = torch.view_as_complex(h.t().contiguous())
        return (pairs * pairs.conj()).real.pow(2).sum() + pairs.prod().abs()

    agree(f)


def test_values_that_leave_pytorch_are_refused_unless_detached() -> None:
    x, v = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(imstep.UnsupportedOperatorError, match=r"outside PyTorch.*detach"):
        imstep.jvp(lambda t: torch.from_numpy(t.numpy() ** 2), (x,), (v,))
    _, product = imstep.jvp(lambda t: t * torch.from_numpy(t.detach().numpy()), (x,), (v,))
    assert torch.equal(product, x)
