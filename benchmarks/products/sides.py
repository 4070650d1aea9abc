"""The sides of the benchmark: each prepares, for a subject and a direction, the callables to be timed.

A peer is given every remedy known for its failures (the mathematical form of attention, recurrent networks without
fused kernels); where it fails all the same, the failure is what is recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import imstep
from benchmarks.products.models import Subject

BLOCK = 8
Product = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Side:
    """A way to a product.

    Attributes:
        name: as in the tables.
        package: the distribution it comes from.
        prepare: subject -> a function of a flat vector (n,) that makes one product.
        fresh: whether a product repeats all of the work at the point, so that nothing is kept between products.
        matrix: "Hessian" or "Gauss-Newton".
        apart: whether to run it in a process of its own, since it may take the interpreter down.
    """

    name: str
    package: str
    prepare: Callable[[Subject], Product]
    fresh: bool
    matrix: str = "Hessian"
    apart: bool = False


def missing(side: Side) -> str | None:
    """What to report where a peer is not installed; else None."""
    try:
        metadata.version(side.package)
    except metadata.PackageNotFoundError:
        return "not installed"
    return None


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Kernels that PyTorch can differentiate twice."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=torch.cuda.is_available()):
        before = torch._C._get_mkldnn_enabled()
        # oneDNN's LSTM has no second derivative; its convolutions have, and are faster.
        torch._C._set_mkldnn_enabled(before and not _RECURRENT[0])
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)


_RECURRENT = [False]


def remedy(subject: Subject) -> None:
    """Choose the kernels that suit a subject."""
    _RECURRENT[0] = any(isinstance(m, torch.nn.RNNBase) for m in subject.model.modules())


# --- imstep ---------------------------------------------------------------------------------------------------------


def gradient(subject: Subject) -> Product:
    """The unit of all ratios: a gradient with PyTorch's own kernels."""
    return lambda _: torch.autograd.grad(subject.closure(), subject.parameters)


def first_product(subject: Subject) -> Product:
    return lambda v: imstep.Hessian(subject.closure, subject.model) @ v


def replayed_product(subject: Subject) -> Product:
    hessian = imstep.Hessian(subject.closure, subject.model)
    return lambda v: hessian @ v


def product_without_record(subject: Subject) -> Product:
    return lambda v: imstep.Hessian(subject.closure, subject.model, memory_budget=0) @ v


def block_product(subject: Subject) -> Product:
    hessian = imstep.Hessian(subject.closure, subject.model)
    generator = torch.Generator(device=hessian.device).manual_seed(1)
    block = torch.randn(hessian.size, BLOCK, generator=generator, device=hessian.device)

    def product(v: Tensor) -> Tensor:
        block[:, 0] = v
        return (hessian @ block)[:, 0]

    return product


def gauss_newton_product(subject: Subject) -> Product:
    matrix = imstep.GaussNewton(subject.pair, subject.model, subject.loss)
    return lambda v: matrix @ v


# --- peers ----------------------------------------------------------------------------------------------------------


def _parts(v: Tensor, subject: Subject) -> list[Tensor]:
    sizes = [p.numel() for p in subject.parameters]
    return [part.view_as(p) for part, p in zip(v.split(sizes), subject.parameters, strict=True)]


def double_backward(subject: Subject) -> Product:
    def product(v: Tensor) -> Any:
        with twice_differentiable():
            gradients = torch.autograd.grad(subject.closure(), subject.parameters, create_graph=True)
        return torch.autograd.grad(gradients, subject.parameters, _parts(v, subject))

    return product


def double_backward_kept(subject: Subject) -> Product:
    with twice_differentiable():
        gradients = torch.autograd.grad(subject.closure(), subject.parameters, create_graph=True)
    return lambda v: torch.autograd.grad(gradients, subject.parameters, _parts(v, subject), retain_graph=True)


def _functional_gradient(subject: Subject) -> tuple[Callable[..., Any], dict[str, Tensor], Callable[[Tensor], Any]]:
    point = {name: p.detach() for name, p in subject.model.named_parameters()}
    loss = lambda q: subject.loss(functional_call(subject.model, q, (subject.inputs,)), subject.targets)
    named = lambda v: dict(zip(point, _parts(v, subject), strict=True))
    return torch.func.grad(loss), point, named


def forward_over_reverse(subject: Subject) -> Product:
    derivative, point, named = _functional_gradient(subject)

    def product(v: Tensor) -> Any:
        with twice_differentiable():
            return list(torch.func.jvp(derivative, (point,), (named(v),))[1].values())

    return product


def linearised(subject: Subject) -> Product:
    derivative, point, named = _functional_gradient(subject)
    with twice_differentiable():
        _, apply = torch.func.linearize(derivative, point)
    return lambda v: list(apply(named(v)).values())


def _curvlinops(matrix: str) -> Callable[[Subject], Product]:
    def prepare(subject: Subject) -> Product:
        import curvlinops

        data = [(subject.inputs, subject.targets)]
        kind = getattr(curvlinops, matrix)
        with twice_differentiable():
            operator = kind(subject.model, subject.loss, subject.parameters, data, check_deterministic=False)

        def product(v: Tensor) -> Any:
            with twice_differentiable():
                return operator @ v

        return product

    return prepare


def pyhessian(subject: Subject) -> Product:
    """Its constructor makes the gradient with its graph; a product differentiates that graph."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    with twice_differentiable():
        computed = hessian(
            subject.model, subject.loss, data=(subject.inputs, subject.targets), cuda=subject.inputs.is_cuda
        )
    return lambda v: list(hessian_vector_product(computed.gradsH, computed.params, _parts(v, subject)))


def hessian_eigenthings(subject: Subject) -> Product:
    from hessian_eigenthings import HessianOperator

    loss = lambda model, batch: subject.loss(model(batch[0]), batch[1])
    operator = HessianOperator(subject.model, [(subject.inputs, subject.targets)], loss)

    def product(v: Tensor) -> Any:
        with twice_differentiable():
            return operator.matvec(v)

    return product


GRADIENT = Side("gradient", "torch", gradient, fresh=True, matrix="gradient")
OWN = (
    Side("imstep, first product", "torch", first_product, fresh=True),
    Side("imstep, replayed product", "torch", replayed_product, fresh=False),
    Side(f"imstep, block of {BLOCK}, per product", "torch", block_product, fresh=False),
    Side("imstep, replayed Gauss-Newton product", "torch", gauss_newton_product, fresh=False, matrix="Gauss-Newton"),
    Side("imstep, gradient and a product without a record", "torch", product_without_record, fresh=True),
)
PEERS = (
    Side("double backward", "torch", double_backward, fresh=True),
    Side("double backward, graph kept", "torch", double_backward_kept, fresh=False),
    Side("torch.func, jvp of grad", "torch", forward_over_reverse, fresh=True),
    Side("torch.func, linearize of grad", "torch", linearised, fresh=False, apart=True),
    Side("curvlinops, Hessian", "curvlinops-for-pytorch", _curvlinops("HessianLinearOperator"), fresh=True),
    Side("PyHessian", "PyHessian", pyhessian, fresh=False),
    Side("hessian-eigenthings", "hessian-eigenthings", hessian_eigenthings, fresh=True),
    Side("curvlinops, Gauss-Newton", "curvlinops-for-pytorch", _curvlinops("GGNLinearOperator"), True, "Gauss-Newton"),
)
