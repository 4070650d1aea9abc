"""Every module of PyTorch's own module database: the Hessian product of a smooth scalar of its outputs.

Compared with double backward; with central differences of the gradient where PyTorch has no second derivative.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import imstep

SAMPLES = 8  # inputs taken of each module and mode

ELSEWHERE = {
    "nn.CTCLoss": "PyTorch's gradient presumes normalised probabilities, which these samples are not: "
    "see test_substitutes.py",
}
TOLERANCE = {
    "nn.BCELoss": 1e-8,  # PyTorch adds 1e-12 to x (1 - x) in its second derivative
    "nn.GaussianNLLLoss": 1e-10,  # divides by small variances
}


def _is_real(t):
    return isinstance(t, Tensor) and t.is_floating_point()


def _scalar(outputs):
    """A smooth function of all floating-point outputs with fixed random weights."""
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    for t in tree_flatten(outputs)[0]:
        if _is_real(t) and t.numel() and t.requires_grad:
            weights = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            total = total + torch.tanh(weights * t).sum()
    return total


class _Case:
    """A module with its inputs as a function of parameters and floating-point inputs."""

    def __init__(self, info, sample, training):
        torch.manual_seed(1)
        arguments = sample.constructor_input
        self.module = info.module_cls(*arguments.args, **arguments.kwargs).to(torch.float64).train(training)
        inputs = (sample.forward_input.args, sample.forward_input.kwargs)
        leaves, self.structure = tree_flatten(tree_map(self._widen, inputs))
        self.names = [k for k, p in self.module.named_parameters() if p.requires_grad and not self._lazy(p)]
        named = dict(self.module.named_parameters())
        self.leaves = leaves
        self.moving = [i for i, t in enumerate(leaves) if _is_real(t) and t.requires_grad]
        self.point = [named[k].detach().clone() for k in self.names] + [leaves[i].detach().clone() for i in self.moving]
        generator = torch.Generator().manual_seed(2)
        self.direction = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in self.point]

    @staticmethod
    def _widen(t):
        return t.detach().double().requires_grad_(t.requires_grad) if _is_real(t) else t

    @staticmethod
    def _lazy(p):
        return isinstance(p, torch.nn.parameter.UninitializedParameter)

    def __call__(self, values):
        torch.manual_seed(3)
        module = copy.deepcopy(self.module)
        weights = dict(zip(self.names, values[: len(self.names)], strict=True))
        leaves = [t.detach() if _is_real(t) else t for t in self.leaves]
        for i, value in zip(self.moving, values[len(self.names) :], strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, self.structure)
        return _scalar(torch.func.functional_call(module, weights, args, kwargs))

    def gradient(self, values, create_graph=False):
        values = [t.detach().clone().requires_grad_() for t in values]
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            loss = self(values)
            gradients = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
        return values, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, values, strict=True)]

    def double_backward(self):
        values, gradients = self.gradient(self.point, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, self.direction, strict=True))
        if not slope.requires_grad:
            return [torch.zeros_like(t) for t in values]
        products = torch.autograd.grad(slope, values, allow_unused=True)
        return [torch.zeros_like(t) if p is None else p for p, t in zip(products, values, strict=True)]

    def central_differences(self, h=1e-5):
        ahead = self.gradient([t + h * d for t, d in zip(self.point, self.direction, strict=True)])[1]
        behind = self.gradient([t - h * d for t, d in zip(self.point, self.direction, strict=True)])[1]
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]


def _relative_error(found, expected):
    a, b = (torch.cat([t.reshape(-1) for t in ts]) for ts in (found, expected))
    return ((a - b).norm() / b.norm().clamp(min=1e-3)).item()


def _cases(info, training):
    torch.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    for sample in samples[:SAMPLES]:
        case = _Case(info, sample, training)
        if not case.point:
            continue
        loss = case([t.clone().requires_grad_() for t in case.point])
        if isinstance(loss, Tensor) and loss.requires_grad and torch.isfinite(loss):
            yield case


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_module_hessian_product(info, training):
    if info.name in ELSEWHERE:
        pytest.skip(ELSEWHERE[info.name])
    usable = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in _cases(info, training):
            found = imstep.hvp(case, case.point, case.direction)
            try:
                expected, tolerance = case.double_backward(), TOLERANCE.get(info.name, 1e-12)
            except RuntimeError:
                expected, tolerance = case.central_differences(), 1e-7
            assert _relative_error(found, expected) < tolerance
            usable += 1
    if not usable:
        pytest.skip("no sample with a differentiable output in this mode")
