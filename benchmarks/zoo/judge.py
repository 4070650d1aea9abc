"""Judge Hessian-vector products on a network: by imstep and by PyTorch's double backward, against differences.

The reference is

    H v = (∇f(w + t v) - ∇f(w - t v)) / 2t + O(t²)

in float64 for a sequence of t, extrapolated by Richardson; the pair of neighbours that agree best is taken, and their
difference says how far it can be trusted. It needs nothing but gradients, so it is independent of both sides.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import imstep
from benchmarks.zoo.problem import Problem

TOLERANCE = 1e-5  # of a parameter's part of the product, relative to it
SINGLE_TOLERANCE = 3e-3  # the same where a network runs in float32 only; the reference is in float64 all the same
SLACK = 10.0  # times the reference's own error, where that is larger
UNSETTLED = 1e-3  # a reference with a larger error is none
NEGLIGIBLE = 1e-3  # parts below this fraction of the whole product are judged relative to the whole
SETTLED = 1e-6  # errors below this are small enough to stop
STEPS = (4e-3, 1e-6, 1e-8)  # the first t of three, relative to the parameters; small ones are for kinks, as of ReLU
SMALLEST = 1e-2  # size of directions of parameters that are zero


class Verdict(str, Enum):
    """How a side's product compares with the reference."""

    RIGHT = "right"
    WRONG = "wrong"
    REFUSED = "refused"
    NO_REFERENCE = "no reference"


@dataclass(frozen=True)
class Outcome:
    """A side's verdict; its error is the largest relative one over parameters."""

    verdict: Verdict
    error: float | None = None
    message: str = ""


class Widened(TorchFunctionMode):
    """Does in float64 what a network insists on doing in float32 or less.

    Attributes:
        single: whether it met an operator that PyTorch has in float32 only, for which it put another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.single = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = (torch.float32, torch.float16, torch.bfloat16)
        wide = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in narrow else a
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        if func is torch._grouped_mm:
            func, self.single = _grouped_mm, True
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def _grouped_mm(x: Tensor, weights: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """`torch.nn.functional.grouped_mm` of rows in groups that end at `offs`, each with a matrix of its own."""
    ends = offs.tolist()
    rows = [x[start:end] @ w for start, end, w in zip([0, *ends[:-1]], ends, weights, strict=True)]
    return torch.cat([*rows, x.new_zeros(len(x) - ends[-1], weights.shape[-1])])


class Judge:
    """Evaluates a problem with the same random numbers and buffers each time."""

    def __init__(self, problem: Problem) -> None:
        self.module, self._loss = problem.module, problem.loss
        self._use(torch.float32)  # weights that both precisions have
        self._use(torch.float64)
        self._seed()
        with Widened() as widened:
            problem.loss()  # some networks make buffers in their first evaluation
        self.single = problem.single or widened.single
        self._buffers = [(b, b.detach().clone()) for b in self.module.buffers()]
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        reached = torch.autograd.grad(self.loss(), [p for _, p in named], allow_unused=True)
        self.params = [p for (_, p), g in zip(named, reached, strict=True) if g is not None]
        self.names = [name for (name, _), g in zip(named, reached, strict=True) if g is not None]
        if not self.params:
            raise ValueError("the loss depends on no parameter")
        generator = torch.Generator().manual_seed(1)
        self.direction = [
            p.detach().abs().square().mean().sqrt().clamp(min=SMALLEST)
            * torch.randn(p.shape, dtype=p.dtype, generator=generator)
            for p in self.params
        ]

    @staticmethod
    def _seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    def _use(self, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)
        self.module._apply(  # `Module.to` would make complex parameters real
            lambda t: t.to(dtype.to_complex()) if t.is_complex() else t.to(dtype) if t.is_floating_point() else t
        )

    def loss(self) -> Tensor:
        """The loss, evaluated anew; in float64 but for sides that are judged in float32."""
        self._seed()
        with torch.no_grad():
            for buffer, value in self._buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        with Widened() if torch.get_default_dtype() == torch.float64 else nullcontext():
            return self._loss()

    def gradient(self) -> list[Tensor]:
        """Of the loss, by PyTorch.

        Attention is the mathematical one: behind it dropout draws in the order of memory, which fused kernels change.
        """
        with sdpa_kernel(SDPBackend.MATH):
            return list(torch.autograd.grad(self.loss(), self.params, allow_unused=True, materialize_grads=True))

    # --- the reference ------------------------------------------------------------------------------------------

    def reference(self) -> tuple[list[Tensor], float]:
        """H v by differences, with an estimate of its error."""
        best: tuple[float, list[Tensor]] = (math.inf, [])
        for start in STEPS:
            slopes = [self._difference(start * 4.0**-k) for k in range(3)]
            better = [
                [(16 * fine - coarse) / 15 for coarse, fine in zip(*pair, strict=True)]
                for pair in itertools.pairwise(slopes)
            ]
            best = min(best, (self.error(*better), better[1]), key=lambda pair: pair[0])
            if best[0] < SETTLED:
                break
        return best[1], best[0]

    def _difference(self, t: float) -> list[Tensor]:
        with self._moved(t):
            ahead = self.gradient()
        with self._moved(-t):
            behind = self.gradient()
        return [(a - b) / (2 * t) for a, b in zip(ahead, behind, strict=True)]

    @contextmanager
    def _moved(self, t: float) -> Iterator[None]:
        before = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, d in zip(self.params, self.direction, strict=True):
                p.add_(d, alpha=t)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(self.params, before, strict=True):
                    p.copy_(old)

    def error(self, found: list[Tensor], expected: list[Tensor]) -> float:
        """The largest relative error over parameters; infinite where an entry is not finite."""
        whole = torch.stack([e.norm() for e in expected]).norm()
        errors = [
            (f.to(e.dtype) - e).norm() / torch.maximum(e.norm(), NEGLIGIBLE * whole).clamp(min=1e-300)
            for f, e in zip(found, expected, strict=True)
        ]
        return float(torch.nan_to_num(torch.stack(errors), nan=torch.inf).max())

    @property
    def tolerance(self) -> float:
        """The relative error that is still right."""
        return SINGLE_TOLERANCE if self.single else TOLERANCE

    # --- sides --------------------------------------------------------------------------------------------------

    def by_imstep(self) -> list[Tensor]:
        """H v by imstep; raises where its gradient is not PyTorch's."""
        expected = self.gradient()
        hessian = imstep.Hessian(self.loss, self.params)
        off = self.error(self._parts(hessian.gradient), expected)
        if off > self.tolerance:
            raise AssertionError(f"the gradient is off by {off:.1e}")
        flat = torch.cat([_real(d).reshape(-1) for d in self.direction])
        return self._parts(hessian @ flat.to(hessian.gradient.dtype))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """A vector in the shapes of the parameters; complex ones are pairs in it."""
        shapes = [_real(p.detach()).shape for p in self.params]
        parts = [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        return [
            torch.view_as_complex(part.clone()) if p.is_complex() else part
            for part, p in zip(parts, self.params, strict=True)
        ]

    def by_double_backward(self) -> list[Tensor]:
        """H v by PyTorch, with its default kernels."""
        gradient = torch.autograd.grad(
            self.loss(), self.params, create_graph=True, allow_unused=True, materialize_grads=True
        )
        pairs = zip(gradient, self.direction, strict=True)
        slope = torch.stack([(g.conj() * d.to(g.dtype)).sum().real for g, d in pairs]).sum()
        return list(torch.autograd.grad(slope, self.params, allow_unused=True, materialize_grads=True))

    def product(self, by: Callable[[], list[Tensor]], context: AbstractContextManager[Any]) -> list[Tensor] | Outcome:
        """A side's product, or why there is none."""
        self._use(torch.float32 if self.single else torch.float64)
        try:
            with context:
                return by()
        except AssertionError as error:
            return Outcome(Verdict.WRONG, message=short(error))
        except Exception as error:  # whatever it is, there is no product
            return Outcome(Verdict.REFUSED, message=short(error))

    def verdict(self, found: list[Tensor] | Outcome, reference: tuple[list[Tensor], float], other: Any) -> Outcome:
        """How a side does; `other` is the other side's product.

        Where differences do not settle, or see a dependence that the network detaches on purpose, such as that of
        statistics made under no_grad, two products that agree confirm each other.
        """
        if isinstance(found, Outcome):
            return found
        expected, uncertainty = reference
        error = self.error(found, expected)
        if uncertainty <= UNSETTLED and error <= max(self.tolerance, SLACK * uncertainty):
            return Outcome(Verdict.RIGHT, error)
        if not isinstance(other, Outcome) and (apart := self.error(found, other)) <= self.tolerance:
            return Outcome(Verdict.RIGHT, apart, "by the other side; differences are no reference here")
        return Outcome(Verdict.WRONG if uncertainty <= UNSETTLED else Verdict.NO_REFERENCE, error)


def _real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers."""
    return torch.view_as_real(t) if t.is_complex() else t


def short(error: BaseException) -> str:
    """Type and message on one line, without the path of the line of code that it names."""
    message = re.sub(r" \(called from [^)]*\)", "", f"{type(error).__name__}: {error}")
    return " ".join(message.split())[:400]


def row(build: Callable[[], Problem]) -> dict[str, Any]:
    """A row of the record; {"not_built": reason} where there is no network with a loss to judge."""
    start = time.perf_counter()
    try:
        judge = Judge(build())
    except Exception as error:  # a configuration that cannot be so small, a package that is missing
        return {"not_built": short(error)}
    reference = judge.reference()
    own = judge.product(judge.by_imstep, nullcontext())
    default = judge.product(judge.by_double_backward, nullcontext())
    forced = default
    if isinstance(default, Outcome):
        forced = judge.product(judge.by_double_backward, sdpa_kernel(SDPBackend.MATH))
    sides = {
        "imstep": judge.verdict(own, reference, forced),
        "double backward": judge.verdict(default, reference, own),
        "double backward, math attention": judge.verdict(forced, reference, own),
    }
    return {
        "parameters": sum(p.numel() for p in judge.params),
        "dtype": "float32" if judge.single else "float64",
        "reference_error": reference[1],
        "sides": {name: asdict(outcome) for name, outcome in sides.items()},
        "seconds": round(time.perf_counter() - start, 2),
    }
