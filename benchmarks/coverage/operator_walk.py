"""Judge complex-step Hessian products on PyTorch's own operator database.

For each operator and each of its sample inputs, a random smooth scalar of the outputs,

    phi(x) = sum_k sum(tanh(w_k * y_k(x))),    w_k fixed normal weights of size O(1),

is differentiated twice: H v by :func:`imstep.hvp` against double backward, and where PyTorch's own second
derivative is missing or disagrees, against central differences of its first one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_unflatten

import imstep
from imstep.curvature.hessian import Hessian

for module in (common_utils, core):  # each sample looks for a unittest all the way up the stack, most of the time here
    module.extract_test_fn = lambda: None

TOLERANCE = 1e-9  # relative to the norm of the product; ill-conditioned factorisations need the slack
SINGLE_TOLERANCE = 1e-5
DIFFERENCE_TOLERANCE = 3e-5  # central differences are only good for about two thirds of the digits


class Judgement(str, Enum):
    """How a sample ended."""

    REVERSE = "agrees with reverse mode"
    DOUBLE_BACKWARD = "agrees with double backward"
    DIFFERENCES = "agrees with central differences of the gradient"
    WRONG = "disagrees with both references"
    REPLAY = "right when evaluated, wrong when the recorded derivative is replayed"
    ERROR = "raised an error"
    UNDEFINED = "no second derivative exists there: differences of the gradient do not settle"
    UNUSABLE = "no usable sample: PyTorch's own gradient is missing"


@dataclass(frozen=True)
class Sample:
    """One sample: its verdict, the relative error against the reference, and what went wrong."""

    judgement: Judgement
    error: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Entry:
    """All samples of one operator of the database."""

    name: str
    samples: tuple[Sample, ...] = field(default_factory=tuple)
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether PyTorch itself can differentiate a sample once."""
        return any(s.judgement not in (Judgement.UNUSABLE, Judgement.UNDEFINED) for s in self.samples)

    @property
    def passed(self) -> bool:
        """Whether every usable sample agrees with a reference."""
        bad = (Judgement.WRONG, Judgement.REPLAY, Judgement.ERROR)
        return self.usable and not any(s.judgement in bad for s in self.samples)

    @property
    def worst(self) -> Sample:
        """The sample to look at first."""
        order = list(Judgement)
        return max(
            self.samples,
            key=lambda s: (
                s.judgement in (Judgement.WRONG, Judgement.REPLAY, Judgement.ERROR),
                s.error,
                order.index(s.judgement),
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """For the JSON record."""
        samples = [{**asdict(s), "judgement": s.judgement.name.lower()} for s in self.samples]
        return {
            "name": self.name,
            "passed": self.passed,
            "usable": self.usable,
            "seconds": self.seconds,
            "samples": samples,
        }


def yardstick(dtype: torch.dtype = torch.float64) -> list[OpInfo]:
    """The entries of the database that support autograd in ``dtype`` on the CPU (540 of 702 in torch 2.13)."""
    return [op for op in op_db if op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")]


def judge(entry: OpInfo, count: int, h: float | None = None, dtype: torch.dtype = torch.float64) -> Entry:
    """Judge the Hessian products of up to ``count`` samples of an operator."""
    return judge_by(lambda problem: _judge_sample(problem, h), entry, count, dtype)


def judge_by(
    verdict: Callable[[Scalar], Sample], entry: OpInfo, count: int, dtype: torch.dtype = torch.float64
) -> Entry:
    """The verdicts on up to ``count`` usable samples of an operator."""
    start = time.perf_counter()
    torch.manual_seed(0)
    results: list[Sample] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in _samples(entry, dtype):
            problem = Scalar.of(entry, sample)
            if problem is None:
                continue
            results.append(verdict(problem))
            if sum(r.judgement not in (Judgement.UNUSABLE, Judgement.UNDEFINED) for r in results) >= count:
                break
    return Entry(entry.formatted_name, tuple(results), time.perf_counter() - start)


def _samples(entry: OpInfo, dtype: torch.dtype) -> Iterator[SampleInput]:
    yield from entry.sample_inputs("cpu", dtype, requires_grad=True)


@dataclass(frozen=True)
class Scalar:
    """phi as a function of the differentiable leaves of a sample; ``outputs`` are what it is a scalar of."""

    outputs: Callable[[list[Tensor]], list[Any]]
    leaves: list[Tensor]

    def f(self, leaves: list[Tensor]) -> Tensor:
        """phi."""
        return _smooth(self.outputs(leaves))

    @classmethod
    def of(cls, entry: OpInfo, sample: SampleInput) -> Scalar | None:
        """None where no leaf or no output is differentiable."""
        flat, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        at = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad and t.layout is torch.strided]
        if not at or not any(flat[i].numel() for i in at):
            return None
        constants = [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in flat]

        def evaluate(leaves: list[Tensor]) -> list[Any]:
            inputs = list(constants)
            for i, leaf in zip(at, leaves, strict=True):
                inputs[i] = leaf
            torch.manual_seed(0)
            x, args, kwargs = tree_unflatten(inputs, structure)
            # The wrapper makes inputs what the operator assumes them to be, such as Hermitian.
            outputs = sample.output_process_fn_grad(entry.gradcheck_wrapper(entry.op, x, *args, **kwargs))
            return list(tree_flatten(outputs)[0])

        def safe(leaves: list[Tensor]) -> list[Any]:
            # In-place operators may not overwrite a leaf.
            return evaluate([t.clone() for t in leaves] if _overwrites(entry) else leaves)

        problem = cls(safe, [flat[i].detach() for i in at])
        try:
            loss = problem.f([t.clone().requires_grad_() for t in problem.leaves])
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return None
        return problem if loss.requires_grad else None


def _overwrites(entry: OpInfo) -> bool:
    return entry.name.endswith("_") and not entry.name.startswith("__")


def differentiable(y: Any) -> bool:
    """Whether autograd differentiates an output."""
    return isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) and y.requires_grad


def as_real(y: Tensor) -> Tensor:
    """An output as a dense real tensor."""
    y = y.to_dense() if y.layout is not torch.strided else y
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def _smooth(outputs: list[Any]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for y in filter(differentiable, outputs):
        y = as_real(y)
        w = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        total = total + torch.tanh(w * y).sum()
    return total


def _judge_sample(problem: Scalar, h: float | None) -> Sample:
    generator = torch.Generator().manual_seed(2)
    v = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in problem.leaves]
    try:
        _gradient(problem, problem.leaves)
    except (RuntimeError, NotImplementedError, ValueError) as e:
        return Sample(Judgement.UNUSABLE, message=short(e))
    try:
        product = _flat(imstep.hvp(problem.f, problem.leaves, v, h=h))
        replayed = [] if h is not None else _replayed(problem, v)
    except Exception as e:  # any failure is a finding
        return Sample(Judgement.ERROR, message=short(e))
    sample = _compare(problem, v, product)
    deviation = max((_relative(r, product) for r in replayed), default=0.0)
    if sample.judgement in (Judgement.DOUBLE_BACKWARD, Judgement.DIFFERENCES) and deviation > _tolerance(problem):
        return Sample(Judgement.REPLAY, deviation)
    return sample


def _tolerance(problem: Scalar) -> float:
    return TOLERANCE if all(t.dtype is torch.float64 for t in problem.leaves) else SINGLE_TOLERANCE


def _replayed(problem: Scalar, v: list[Tensor]) -> list[Tensor]:
    """H v from the tape of an operator: one product, and one in a block with another direction."""
    inputs = [t.clone().requires_grad_() for t in problem.leaves]
    try:
        hessian = Hessian(lambda: problem.f(inputs), inputs)
    except ValueError:  # a loss that depends on nothing has no Hessian to build
        return []
    vector = hessian.parameters.flatten(v)
    block = torch.stack([vector.flip(0), vector], 1)
    return [(hessian @ vector).double(), (hessian @ block)[:, 1].double()]


def _compare(problem: Scalar, v: list[Tensor], product: Tensor) -> Sample:
    tolerance = _tolerance(problem)
    reason, error = "double backward disagrees", float("inf")
    try:
        error = _relative(product, _flat(double_backward(problem, v)))
    except (RuntimeError, NotImplementedError, IndexError, TypeError) as e:
        reason = short(e)
    if error <= tolerance:
        return Sample(Judgement.DOUBLE_BACKWARD, error)
    coarse, fine = (_flat(central_differences(problem, v, step)) for step in (2e-4, 1e-4))
    error_of_differences = _relative(product, (4 * fine - coarse) / 3)  # Richardson
    if error_of_differences <= DIFFERENCE_TOLERANCE:
        return Sample(Judgement.DIFFERENCES, error_of_differences, reason)
    if not bool(fine.isfinite().all()) or _relative(coarse, fine) > 0.1:
        return Sample(Judgement.UNDEFINED, message=reason)
    return Sample(
        Judgement.WRONG, min(error, error_of_differences), f"{reason}; differences off by {error_of_differences:.1e}"
    )


def _gradient(problem: Scalar, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in leaves] if not create_graph else leaves
    g = torch.autograd.grad(problem.f(inputs), inputs, allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, g, strict=True)]


def double_backward(problem: Scalar, v: list[Tensor]) -> list[Tensor]:
    """H v by PyTorch: the gradient of (gradient . v)."""
    inputs = [t.clone().requires_grad_() for t in problem.leaves]
    gradients = _gradient(problem, inputs, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, v, strict=True) if g.requires_grad)
    if not isinstance(slope, Tensor):
        return [torch.zeros_like(t) for t in inputs]
    products = torch.autograd.grad(slope, inputs, allow_unused=True)
    return [torch.zeros_like(t) if p is None else p for t, p in zip(inputs, products, strict=True)]


def central_differences(problem: Scalar, v: list[Tensor], step: float) -> list[Tensor]:
    """H v from the gradients at two points."""
    ahead = _gradient(problem, [t + step * d for t, d in zip(problem.leaves, v, strict=True)])
    behind = _gradient(problem, [t - step * d for t, d in zip(problem.leaves, v, strict=True)])
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def _flat(tensors: list[Tensor]) -> Tensor:
    dense = (t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in tensors)
    parts = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense)
    return torch.cat([p.reshape(-1).double() for p in parts])


def _relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected; the same entries must be finite."""
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    found, expected = found[finite], expected[finite]
    return float((found - expected).norm() / (expected.norm() + 1e-3))


def short(e: BaseException) -> str:
    """The first line of an error, without the path of this checkout."""
    lines = str(e).strip().splitlines()
    where = str(Path(__file__).resolve().parents[2]) + "/"
    return f"{type(e).__name__}: {lines[0][:300].replace(where, '') if lines else ''}"
