"""Judge complex-step derivatives on PyTorch's own module database, in train and eval mode.

The Hessian product of a smooth scalar of a module's outputs is compared with double backward, and with central
differences of the gradient where PyTorch has no second derivative; the directional derivative of the outputs with
reverse mode. Both in parameters and inputs at once.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import imstep
from benchmarks.coverage.directional_walk import compare
from benchmarks.coverage.operator_walk import Entry, Judgement, Sample, short

SAMPLES = 8  # inputs taken of each module and mode
MODES = (True, False)  # training, evaluation

TOLERANCES = {
    "nn.BCELoss": 1e-8,  # PyTorch adds 1e-12 to x (1 - x) in its second derivative
    "nn.GaussianNLLLoss": 1e-10,  # divides by small variances
}
EXPLAINED = {
    "nn.CTCLoss": "PyTorch's gradient presumes normalised probabilities, which these samples are not: "
    "see tests/complexstep/test_substitutes.py",
}


def is_real(t: Any) -> bool:
    """Whether it is a floating-point tensor."""
    return isinstance(t, Tensor) and t.is_floating_point()


def _scalar(outputs: list[Any]) -> Any:
    """A smooth function of all floating-point outputs with fixed random weights."""
    generator = torch.Generator().manual_seed(5)
    total: Any = 0.0
    for t in outputs:
        if is_real(t) and t.numel() and t.requires_grad:
            weights = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            total = total + torch.tanh(weights * t).sum()
    return total


class Case:
    """A module with its inputs as a function of parameters and floating-point inputs."""

    def __init__(self, info: ModuleInfo, sample: Any, training: bool) -> None:
        torch.manual_seed(1)
        arguments = sample.constructor_input
        self.module = info.module_cls(*arguments.args, **arguments.kwargs).to(torch.float64).train(training)
        inputs = (sample.forward_input.args, sample.forward_input.kwargs)
        leaves, self.structure = tree_flatten(tree_map(self._widen, inputs))
        self.names = [k for k, p in self.module.named_parameters() if p.requires_grad and not self._lazy(p)]
        named = dict(self.module.named_parameters())
        self.leaves = leaves
        self.moving = [i for i, t in enumerate(leaves) if is_real(t) and t.requires_grad]
        self.point = [named[k].detach().clone() for k in self.names] + [leaves[i].detach().clone() for i in self.moving]
        generator = torch.Generator().manual_seed(2)
        self.direction = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in self.point]

    @staticmethod
    def _widen(t: Any) -> Any:
        return t.detach().double().requires_grad_(t.requires_grad) if is_real(t) else t

    @staticmethod
    def _lazy(p: nn.Parameter) -> bool:
        return isinstance(p, nn.parameter.UninitializedParameter)

    def outputs(self, values: list[Tensor]) -> list[Any]:
        """What the module returns, flat."""
        torch.manual_seed(3)
        module = copy.deepcopy(self.module)
        weights = dict(zip(self.names, values[: len(self.names)], strict=True))
        leaves = [t.detach() if is_real(t) else t for t in self.leaves]
        for i, value in zip(self.moving, values[len(self.names) :], strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, self.structure)
        return list(tree_flatten(torch.func.functional_call(module, weights, args, kwargs))[0])

    def __call__(self, values: list[Tensor]) -> Any:
        """A smooth scalar of the outputs."""
        return _scalar(self.outputs(values))

    def gradient(self, values: list[Tensor], create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves at ``values`` and the gradient there, through PyTorch's differentiable formulas."""
        values = [t.detach().clone().requires_grad_() for t in values]
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            loss = self(values)
            gradients = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
        return values, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, values, strict=True)]

    def double_backward(self) -> list[Tensor]:
        """H v by PyTorch."""
        values, gradients = self.gradient(self.point, create_graph=True)
        slope: Any = sum((g * d).sum() for g, d in zip(gradients, self.direction, strict=True))
        if not slope.requires_grad:
            return [torch.zeros_like(t) for t in values]
        products = torch.autograd.grad(slope, values, allow_unused=True)
        return [torch.zeros_like(t) if p is None else p for p, t in zip(products, values, strict=True)]

    def central_differences(self, h: float = 1e-5) -> list[Tensor]:
        """H v from the gradients at two points."""
        ahead = self.gradient([t + h * d for t, d in zip(self.point, self.direction, strict=True)])[1]
        behind = self.gradient([t - h * d for t, d in zip(self.point, self.direction, strict=True)])[1]
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over norm of the expected."""
    a, b = (torch.cat([t.reshape(-1) for t in ts]) for ts in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-3))


def cases(info: ModuleInfo, training: bool, count: int = SAMPLES) -> Iterator[Case]:
    """The samples of a module whose outputs depend on something in a differentiable way."""
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    for sample in samples[:count]:
        case = Case(info, sample, training)
        if not case.point:
            continue
        loss = case([t.clone().requires_grad_() for t in case.point])
        if isinstance(loss, Tensor) and loss.requires_grad and torch.isfinite(loss):
            yield case


def modules() -> list[ModuleInfo]:
    """The entries of the database (114 in torch 2.13)."""
    return list(module_db)


def judge_module(info: ModuleInfo, count: int = SAMPLES) -> tuple[Entry, Entry]:
    """The verdicts on Hessian products and on directional derivatives, over both modes."""
    start = time.perf_counter()
    products: list[Sample] = []
    slopes: list[Sample] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in MODES:
            for case in cases(info, training, count):
                products.append(judge_product(case, TOLERANCES.get(info.name, 1e-12)))
                slopes.append(compare(case.outputs, case.point))
    return Entry(info.name, tuple(products), time.perf_counter() - start), Entry(info.name, tuple(slopes))


def judge_product(case: Case, tolerance: float) -> Sample:
    """H v against double backward, or against differences."""
    try:
        found = imstep.hvp(case, case.point, case.direction)
    except Exception as e:  # any failure is a finding
        return Sample(Judgement.ERROR, message=short(e))
    reason, judgement = "", Judgement.DOUBLE_BACKWARD
    try:
        expected = case.double_backward()
    except RuntimeError as e:
        expected, tolerance, judgement, reason = case.central_differences(), 1e-7, Judgement.DIFFERENCES, short(e)
    error = relative_error(found, expected)
    return Sample(judgement if error < tolerance else Judgement.WRONG, error, reason)
