"""Judge complex-step directional derivatives against PyTorch's reverse mode, on its operator and module databases.

For outputs y = f(x), a direction v and random weights w,

    <w, J v>  =  <Jᵀ w, v>,

the left by :func:`imstep.jvp`, the right by one backward pass; where PyTorch's gradient disagrees, J v is compared
with central differences of f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

import imstep
from benchmarks.coverage.operator_walk import (
    DIFFERENCE_TOLERANCE,
    SINGLE_TOLERANCE,
    Entry,
    Judgement,
    Sample,
    as_real,
    differentiable,
    judge_by,
    short,
)

TOLERANCE = 1e-10  # relative to the sum of the magnitudes of all terms of both inner products


def judge_directional(entry: OpInfo, count: int) -> Entry:
    """Judge the directional derivatives of up to ``count`` samples of an operator."""
    return judge_by(lambda problem: compare(problem.outputs, problem.leaves), entry, count)


def compare(f: Callable[[list[Tensor]], Sequence[Any]], leaves: list[Tensor]) -> Sample:
    """Both inner products at ``leaves``, and the values of both evaluations."""
    generator = torch.Generator().manual_seed(2)
    normal = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
    v = [normal(t) for t in leaves]
    inputs = [t.clone().requires_grad_() for t in leaves]
    try:
        outputs = list(f(inputs))
        at = [i for i, y in enumerate(outputs) if differentiable(y)]
        expected = [as_real(outputs[i]) for i in at]
        weights = [normal(y) for y in expected]
        gradients = torch.autograd.grad(expected, inputs, weights, allow_unused=True)
    except (RuntimeError, NotImplementedError, ValueError) as e:
        return Sample(Judgement.UNUSABLE, message=short(e))
    try:
        pick = lambda *x: [as_real(y) for i, y in enumerate(f(list(x))) if i in at]
        values, slopes = imstep.jvp(pick, tuple(leaves), tuple(v))
    except Exception as e:  # any failure is a finding
        return Sample(Judgement.ERROR, message=short(e))
    terms = [w * s for w, s in zip(weights, slopes, strict=True)]
    references = [as_real(g).double() * as_real(d) for g, d in zip(gradients, v, strict=True) if g is not None]
    error = max(_deviation(terms, references), *map(_different, values, expected))
    if error <= max(TOLERANCE, _rounding([*leaves, *values])):
        return Sample(Judgement.REVERSE, error)
    return _by_differences(pick, leaves, v, slopes, error)


def _by_differences(
    f: Callable[..., list[Tensor]], leaves: list[Tensor], v: list[Tensor], slopes: list[Tensor], error: float
) -> Sample:
    moved = lambda step: _joined(f(*[t + step * d for t, d in zip(leaves, v, strict=True)]))
    coarse, fine = ((moved(step) - moved(-step)) / (2 * step) for step in (2e-4, 1e-4))
    found = _joined(slopes)
    error_of_differences = _different(found, (4 * fine - coarse) / 3)  # Richardson
    if error_of_differences <= DIFFERENCE_TOLERANCE:
        return Sample(Judgement.DIFFERENCES, error_of_differences, "PyTorch's gradient is not that of the values")
    if not bool(fine.isfinite().all()) or _different(coarse, fine) > 0.1:
        return Sample(Judgement.UNDEFINED, message="differences do not settle")
    message = f"reverse mode disagrees; differences off by {error_of_differences:.1e}"
    return Sample(Judgement.WRONG, error, message)


def _rounding(tensors: list[Tensor]) -> float:
    """The precision of the coarsest dtype among them, in which one of both sides may round and the other not."""
    coarsest = max(torch.finfo(t.dtype).eps for t in tensors)
    return max(coarsest, SINGLE_TOLERANCE) if coarsest > torch.finfo(torch.float64).eps else 0.0


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def _deviation(terms: list[Tensor], references: list[Tensor]) -> float:
    """The difference of two sums, against the magnitudes of their terms."""
    total, reference = (sum(float(t.sum()) for t in side) for side in (terms, references))
    scale = sum(float(t.abs().sum()) for t in (*terms, *references))
    return abs(total - reference) / (scale + 1e-3) if scale < float("inf") else float("inf")


def _different(found: Tensor, expected: Tensor) -> float:
    """The relative difference of the values, wherever these are finite."""
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found.isfinite(), finite):
        return float("inf")
    found, expected = found[finite], expected[finite].detach()
    return float((found - expected).norm() / (expected.norm() + 1e-3))
