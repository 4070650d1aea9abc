"""Gauss-Newton products read off a tape, against Jᵀ L'' J assembled with PyTorch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from imstep.curvature import FrozenClosure, ParameterVector
from imstep.curvature.hessian import gauss_newton_of

EXAMPLES, INPUTS, OUTPUTS = 6, 3, 4

X = normal(EXAMPLES, INPUTS)
Y = normal(EXAMPLES, OUTPUTS, seed=1)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SOFT = normal(EXAMPLES, OUTPUTS, seed=2).softmax(1)
BINARY = (Y > 0).double()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)


def network(last: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)]
        return nn.Sequential(*layers, *([last] if last else [])).double()


def by_hand_squares(z: Tensor) -> Tensor:
    return ((z - Y) ** 2).mean()


def products_of_residuals(z: Tensor) -> Tensor:
    r = z - Y
    return 0.5 * (r * r).sum()


def in_place_sum(z: Tensor) -> Tensor:
    loss = F.mse_loss(z, Y)
    loss += 0.3 * F.huber_loss(z, Y)
    return loss


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: F.mse_loss(z, Y),
    "mse, sum": lambda z: F.mse_loss(z, Y, reduction="sum"),
    "mse, arguments exchanged": lambda z: F.mse_loss(Y, z),
    "cross entropy, gathered": lambda z: -z.log_softmax(1).gather(1, LABELS[:, None]).mean(),
    "cross entropy, along a dimension": lambda z: -torch.take_along_dim(z.log_softmax(1), LABELS[:, None], 1).mean(),
    "cross entropy, selected by a mask": lambda z: -z.log_softmax(1).masked_select(F.one_hot(LABELS) > 0).sum(),
    "cross entropy of a distribution": lambda z: -torch.distributions.Categorical(logits=z).log_prob(LABELS).mean(),
    "cross entropy, written out": lambda z: (z.logsumexp(1) - z[torch.arange(EXAMPLES), LABELS]).mean(),
    "cross entropy along the first dimension": lambda z: (z.T.logsumexp(0, keepdim=True) - z.T * SOFT.T).sum() / 7,
    "cross entropy, less than one": lambda z: (1 - z.log_softmax(1)[torch.arange(EXAMPLES), LABELS]).mean(),
    "hardest examples": lambda z: F.cross_entropy(z, LABELS, reduction="none").topk(3).values.mean(),
    "easiest examples": lambda z: F.cross_entropy(z, LABELS, reduction="none").sort().values[:3].mean(),
    "weighed by a product": lambda z: F.cross_entropy(z, LABELS, reduction="none") @ SOFT[:, 0],
    "weighed by a product of matrix and vector": lambda z: (F.mse_loss(z, Y, reduction="none") @ WEIGHTS).mean(),
    "moved about": lambda z: F.pad(F.mse_loss(z, Y, reduction="none").roll(1, 0).flip(1), (1, 2)).cumsum(1).mean(),
    "some rows twice": lambda z: F.mse_loss(z, Y, reduction="none").index_select(0, LABELS).repeat(2, 1).mean(),
    "added up by groups": lambda z: z.new_zeros(4).scatter_add(0, LABELS, (z - Y).square().sum(1)).sum(),
    "means of groups": lambda z: z.new_zeros(4).index_add(0, LABELS, F.mse_loss(z, Y, reduction="none")[:, 0]).mean(),
    "mse, none then mean": lambda z: F.mse_loss(z, Y, reduction="none").sum(1).mean(),
    "mse, weighted": lambda z: (F.mse_loss(z, Y, reduction="none") * WEIGHTS).mean(),
    "mse, over a view": lambda z: F.mse_loss(z.t().reshape(-1), Y.t().reshape(-1)),
    "mse of an affine map of outputs": lambda z: F.mse_loss(3 * z[:, :2] + 1, Y[:, :2]),
    "squares": by_hand_squares,
    "residual times itself": products_of_residuals,
    "huber": lambda z: F.huber_loss(z, Y, delta=0.7),
    "smooth l1": lambda z: F.smooth_l1_loss(z, Y, beta=0.7),
    "cross entropy": lambda z: F.cross_entropy(z, LABELS),
    "cross entropy, class weights": lambda z: F.cross_entropy(z, LABELS, weight=WEIGHTS),
    "cross entropy, ignored labels": lambda z: F.cross_entropy(z, LABELS, ignore_index=1),
    "cross entropy, probabilities": lambda z: F.cross_entropy(z, SOFT),
    "cross entropy, smoothed": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "nll of log-softmax": lambda z: F.nll_loss(z.log_softmax(1), LABELS),
    "nll over rows of a sequence": lambda z: F.nll_loss(z.log_softmax(1).t().contiguous().t(), LABELS),
    "kl": lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean"),
    "bce with logits": lambda z: F.binary_cross_entropy_with_logits(z, BINARY, pos_weight=WEIGHTS),
    "softplus": lambda z: F.softplus(-Y * z).mean(),
    "log of a sigmoid": lambda z: -(BINARY * z.sigmoid().log()).mean(),
    "log-sigmoid of differences": lambda z: -F.logsigmoid(z[:, 0] - z[:, 1]).sum() - 0.1 * F.logsigmoid(-z).mean(),
    "soft margin": lambda z: F.soft_margin_loss(z, Y),
    "soft margin, summed": lambda z: F.soft_margin_loss(z, Y.sign(), reduction="none").sum(),
    "soft margins of labels": lambda z: F.multilabel_soft_margin_loss(z, BINARY),
    "negative binomial": lambda z: -torch.distributions.NegativeBinomial(3.0, logits=z).log_prob(BINARY).mean(),
    "log1p of an exponential": lambda z: torch.log1p(torch.exp(-Y * z)).mean(),
    "log of one and an exponential": lambda z: torch.log(1 + (-Y * z).exp()).mean() + (z.exp() + 1).log().sum(),
    "bce of a sigmoid": lambda z: (lambda p: -(SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean())(z.sigmoid()),
    "bce of a sigmoid by log1p": lambda z: -(z.sigmoid().log() + SOFT * torch.log1p(-z.sigmoid())).sum(),
    "softplus by logaddexp": lambda z: (
        torch.logaddexp(-Y * z, torch.zeros(())).mean() + torch.logaddexp(BINARY, z).sum()
    ),
    "cross entropy by exponentials": lambda z: (z.exp().sum(1).log() - z[torch.arange(EXAMPLES), LABELS]).mean(),
    "cross entropy of one row by exponentials": lambda z: z[0].exp().sum().log() - z[0, 1],
    "cross entropy by exponentials, transposed": lambda z: (z.T.exp().sum(0, keepdim=True).log() - z.T * SOFT.T).sum(),
    "log of a softmax": lambda z: -z.softmax(1).log()[torch.arange(EXAMPLES), LABELS].mean(),
    "log of entries of a softmax": lambda z: (
        -(p := z.softmax(1)).gather(1, LABELS[:, None]).log().mean() - p[0, 1].log()
    ),
    "bce of a clamped sigmoid": lambda z: (lambda p: -(SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean())(
        z.sigmoid().clamp(0.45, 0.6)
    ),
    "bce of a sigmoid, clamped late": lambda z: -((1 - z.sigmoid()).clamp(min=0.5).log().sum()),
    "log of a clamped softmax": lambda z: (
        -z.softmax(1).clamp(0.2, 1 - 1e-7).log()[torch.arange(EXAMPLES), LABELS].mean()
    ),
    "bce by xlogy": lambda z: -(torch.xlogy(SOFT, z.sigmoid()) + torch.xlogy(1 - SOFT, 1 - z.sigmoid())).mean(),
    "categorical distributions of probabilities": lambda z: -torch.xlogy(SOFT, z.softmax(1)).sum(),
    "poisson distributions": lambda z: -torch.distributions.Poisson(z.exp()).log_prob(BINARY).mean(),
    "exponential distributions": lambda z: -torch.distributions.Exponential(z.exp()).log_prob(BINARY + 0.1).mean(),
    "gamma distributions of a known shape": lambda z: -torch.distributions.Gamma(2.0, z.exp()).log_prob(SOFT).mean(),
    "bce by hand": lambda z: (F.softplus(z) - BINARY * z).sum(),
    "poisson": lambda z: F.poisson_nll_loss(z, BINARY),
    "poisson, targets of both signs": lambda z: (z.exp() - Y * z).mean() + z[0].sum(),
    "divergence from a normal distribution": lambda z: 0.5 * (z[:, :2] ** 2 + z[:, 2:].exp() - 1 - z[:, 2:]).sum(),
    "squares less a linear term": lambda z: F.mse_loss(z, Y) - 3 * z.mean() + (Y * z).sum(),
    "losses added": lambda z: 0.2 * F.cross_entropy(z, LABELS) + F.mse_loss(z, Y) / 3,
    "losses added in place": in_place_sum,
    "losses stacked": lambda z: torch.stack([F.mse_loss(z, Y), 2 * F.huber_loss(z, Y)]).sum(),
    "minus the negative": lambda z: -(-2 * F.mse_loss(z, Y)),
    "zero times the outputs": lambda z: F.cross_entropy(z, LABELS) + 0 * z.sum() - 0.0 * z.exp().mean(),
    "zero times what is no loss": lambda z: F.mse_loss(z, Y) + (torch.zeros_like(z) * z.sin()).sum(),
    "difference of a constant": lambda z: F.mse_loss(z, Y) - (Y**2).mean(),
}


@dataclass(frozen=True)
class Case:
    """A closure and the parts it is made of: outputs z = model(w), loss L(z)."""

    closure: Callable[[], Tensor]
    model: nn.Module
    outputs: Callable[[dict[str, Tensor]], Tensor]
    loss: Callable[[Tensor], Tensor]

    def dense(self) -> Tensor:
        """Jᵀ L'' J by PyTorch's reverse mode alone."""
        names = [name for name, _ in self.model.named_parameters()]
        sizes = [p.numel() for p in self.model.parameters()]
        shapes = [p.shape for p in self.model.parameters()]
        w = torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

        def z(vector: Tensor) -> Tensor:
            parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
            return self.outputs(dict(zip(names, parts, strict=True)))

        at = z(w).detach()
        jacobian = torch.autograd.functional.jacobian(z, w).reshape(at.numel(), -1)
        flat = lambda t: self.loss(t.view(at.shape))
        curvature = torch.autograd.functional.hessian(flat, at.reshape(-1))
        return jacobian.T @ curvature @ jacobian


def case(loss: Callable[[Tensor], Tensor], model: nn.Module | None = None) -> Case:
    model = model or network()
    return Case(lambda: loss(model(X)), model, lambda parts: functional_call(model, parts, (X,)), loss)


def products(closure: Callable[[], Tensor], model: nn.Module) -> Tensor | None:
    parameters = ParameterVector(model)
    operator = gauss_newton_of(FrozenClosure(closure, parameters).linearise(), parameters)
    if operator is None:
        return None
    assert operator.definite
    singles = torch.stack([operator @ e for e in torch.eye(parameters.size, dtype=parameters.dtype)], dim=1)
    torch.testing.assert_close(operator.to_dense(), singles, rtol=1e-12, atol=1e-13)
    return singles


def assert_dense(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual is not None
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_products_against_the_dense_matrix(name: str) -> None:
    c = case(LOSSES[name])
    matrix = products(c.closure, c.model)
    assert_dense(matrix, c.dense())
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("last", [nn.Tanh(), nn.ReLU(), nn.LayerNorm(OUTPUTS), nn.Sigmoid()])
def test_nonlinear_outputs_count_as_model(last: nn.Module) -> None:
    c = case(LOSSES["mse"], network(last.double()))
    assert_dense(products(c.closure, c.model), c.dense())


def test_bce_of_probabilities() -> None:
    c = case(lambda p: F.binary_cross_entropy(p, BINARY), network(nn.Sigmoid()))
    # PyTorch's second derivative of this loss adds 1e-12 to its denominator.
    assert_dense(products(c.closure, c.model), c.dense(), 1e-10)


def test_single_precision() -> None:
    c = case(LOSSES["cross entropy"])
    expected = c.dense()
    model = c.model.float()
    matrix = products(lambda: F.cross_entropy(model(X.float()), LABELS), model)
    assert_dense(matrix.double() if matrix is not None else None, expected, 1e-5)


def test_closure_that_calls_backward() -> None:
    c = case(LOSSES["cross entropy"])

    def closure() -> Tensor:
        c.model.zero_grad()
        loss = c.closure()
        loss.backward()
        return loss

    assert_dense(products(closure, c.model), c.dense())


@pytest.mark.parametrize("power", [lambda p: p**2, lambda p: p * p, torch.square])
def test_weight_decay_is_exact(power: Callable[[Tensor], Tensor]) -> None:
    c = case(LOSSES["mse"])
    decay = lambda: 0.05 * sum(power(p).sum() for p in c.model.parameters())
    matrix = products(lambda: c.closure() + decay(), c.model)
    expected = c.dense()
    assert_dense(matrix, expected + 0.1 * torch.eye(len(expected), dtype=F64))


def test_checkpointed_model() -> None:
    model = network()
    plain = case(LOSSES["cross entropy"], model)
    again = lambda: F.cross_entropy(checkpoint(model, X, use_reentrant=False), LABELS)
    assert_dense(products(again, model), plain.dense())


@pytest.mark.parametrize("name", LOSSES)
def test_copies_of_what_autograd_saves(name: str) -> None:
    """As ``save_on_cpu()`` makes them on a GPU."""
    c = case(LOSSES[name])

    def closure() -> Tensor:
        with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return c.closure()

    assert_dense(products(closure, c.model), c.dense())


def test_two_models_share_a_loss() -> None:
    first, second = network(), network(nn.Tanh())
    both = nn.ModuleList([first, second])
    matrix = products(lambda: F.mse_loss(first(X), second(X)), both)
    outputs = lambda parts: (
        functional_call(first, {k[2:]: v for k, v in parts.items() if k[0] == "0"}, (X,))
        - functional_call(second, {k[2:]: v for k, v in parts.items() if k[0] == "1"}, (X,))
    )
    expected = Case(lambda: X.sum(), both, outputs, lambda z: (z**2).mean()).dense()
    assert_dense(matrix, expected)


def test_derivatives_of_outputs_by_inputs_are_outputs() -> None:
    """A physics-informed loss: the residual u' - u is what the square sees."""
    model = network()
    x = X.clone().requires_grad_()

    def residual(parts: dict[str, Tensor]) -> Tensor:
        u = functional_call(model, parts, (x,)).sum(1)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.sum(1) - u

    closure = lambda: (residual(dict(model.named_parameters())) ** 2).mean()
    expected = Case(closure, model, residual, lambda r: (r**2).mean()).dense()
    assert_dense(products(closure, model), expected)


NOT_CONVEX: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": lambda z: z.sin().sum(),
    "cube": lambda z: (z**3).mean(),
    "norm, squared": lambda z: (z - Y).norm() ** 2,
    "relative norm, squared": lambda z: (-(z - Y).norm() / Y.norm()) ** 2,
    "root, squared": lambda z: (2 * F.mse_loss(z, Y).sqrt()).square(),
    "root times itself": lambda z: (lambda r: r * r)((z - Y).square().mean() ** 0.5),
    "negative squares": lambda z: -((z - Y) ** 2).mean(),
    "difference of losses": lambda z: F.mse_loss(z, Y) - 0.1 * F.huber_loss(z, Y),
    "added with a negative factor": lambda z: torch.add(F.mse_loss(z, Y), F.mse_loss(z, -Y), alpha=-1),
    "negative scale": lambda z: -2.0 * F.mse_loss(z, Y),
    "weights of both signs": lambda z: (F.mse_loss(z, Y, reduction="none") * Y).mean(),
    "reciprocal": lambda z: 1 / F.mse_loss(z, Y),
    "constant over loss": lambda z: torch.tensor(2.0, dtype=F64) / F.mse_loss(z, Y),
    "logarithm of a loss": lambda z: F.mse_loss(z, Y).log(),
    "squares of complex numbers": lambda z: torch.view_as_complex(z.view(-1, 2)).square().real.sum(),
    "exponentials of complex numbers": lambda z: torch.view_as_complex(z.view(-1, 2)).exp().real.sum(),
    "one exponential": lambda z: z.prod().exp(),
    "exponentials, negative": lambda z: -(z.exp() - z).mean(),
    "exponentials less squares": lambda z: z.exp().sum() - (z**2).sum(),
    "linear in another output": lambda z: F.mse_loss(z.tanh(), Y) + z.mean(),
    "zero times what is added as well": lambda z: F.mse_loss(z, Y) + 0 * (other := z.sin().sum()) + other,
    "product of losses": lambda z: F.mse_loss(z, Y) * F.huber_loss(z, Y),
    "log-likelihood, to be minimised": lambda z: -F.cross_entropy(z, LABELS),
    "targets that depend on the model": lambda z: F.binary_cross_entropy_with_logits(z, z.flip(1).sigmoid()),
    "weights of both signs in a product": lambda z: F.mse_loss(z, Y, reduction="none").sum(1) @ Y[:, 0],
    "groups less": lambda z: z.new_zeros(4).index_add(0, LABELS, (z - Y).square().sum(1), alpha=-2).sum(),
    "a soft maximum of losses": lambda z: F.mse_loss(z, Y, reduction="none").logsumexp(0).mean(),
    "a soft maximum of losses, less one": lambda z: (lambda e: (e.logsumexp(0) - e.sum(0)).mean().exp())((z - Y) ** 2),
    "a soft maximum and more": lambda z: (z.logsumexp(1) + z[:, 0]).mean(),
    "mixtures by exponentials": lambda z: -(z + SOFT.log()).exp().sum(1).log().mean(),
    "a soft maximum by exponentials": lambda z: z.square().exp().sum(1).log().mean(),
    "all exponentials": lambda z: z.exp().sum().log() - (SOFT * z).sum() / SOFT.sum(),
    "mixtures": lambda z: -(z + SOFT.log()).logsumexp(1).mean(),
    "a logarithm of twice an exponential": lambda z: (2 * (0 * z).exp()).log().sum() + (2 * z.exp()).log().mean(),
    "an exponential and more": lambda z: (z.exp() + 2).log().mean(),
    "less an exponential": lambda z: (1 - (z - 9).exp()).log().mean(),
    "logarithms of a sigmoid, to be maximised": lambda z: z.sigmoid().log().mean(),
    "a sigmoid and a little": lambda z: -(z.sigmoid() + 1e-3).log().mean(),
    "a sigmoid and more, clamped": lambda z: -(z.sigmoid() + SOFT).clamp(0.4, 0.7).log().mean(),
    "weights of both signs in xlogy": lambda z: -torch.xlogy(Y, z.sigmoid()).mean(),
    "a constant to an output": lambda z: -torch.xlogy(z.sigmoid(), SOFT).mean(),
    "a difference of two sigmoids": lambda z: -((z + 2).sigmoid() - (z - 1).sigmoid()).log().mean(),
    "a sum of two exponentials": lambda z: torch.log1p(z.exp() + (-z).exp()).mean(),
    "a sigmoid and more": lambda z: -(z.sigmoid() + 1).log().mean(),
    "probabilities that are penalised, too": lambda z: -(p := z.softmax(1))[:, 0].log().mean() + p.square().sum(),
    "probabilities that are added, too": lambda z: -(p := z.softmax(1))[:, 0].log().mean() + p[0, 0],
    "targets alone": lambda z: F.binary_cross_entropy_with_logits(Y, z.sigmoid()),
    "probabilities as targets": lambda z: F.binary_cross_entropy(SOFT, z.sigmoid()),
    "squares within an operator": lambda z: F.multi_margin_loss(z, LABELS, p=2),
    "squares in place": lambda z: (z - Y).square_().mean(),
}


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_losses_without_a_convex_end_are_not_split(name: str) -> None:
    c = case(NOT_CONVEX[name])
    assert products(c.closure, c.model) is None
