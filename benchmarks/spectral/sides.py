"""The sides: each makes eigenpairs, a density and a trace of the Hessian of a subject's loss, its own way.

A peer is given what it does not find out itself: how many steps or probes its answer takes.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import imstep
from benchmarks.products.models import Subject
from benchmarks.products.sides import twice_differentiable
from imstep import spectral


@dataclass(frozen=True, eq=False)
class Pairs:
    """Eigenpairs as found: vectors are rows (k, n)."""

    values: Tensor
    vectors: Tensor


class Side(ABC):
    """A package on a subject. Constructing it is part of each measurement.

    Attributes:
        name: as in the tables.
        package: the distribution it comes from.
        pair_budgets, trace_budgets: what it is asked with, in order, until the answer is good enough.
    """

    name = ""
    package = ""
    pair_budgets: tuple[int, ...] = (0,)
    trace_budgets: tuple[int, ...] = (0,)

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abstractmethod
    def pairs(self, k: int, tol: float, budget: int, seed: int) -> Pairs:
        """The k eigenpairs of largest magnitude."""

    @abstractmethod
    def density(self, steps: int, probes: int, seed: int) -> Any:
        """A density; what it is made of differs."""

    @abstractmethod
    def trace(self, rtol: float, budget: int, seed: int) -> float:
        """The trace."""


class Imstep(Side):
    name, package = "imstep", "torch"
    trace_budgets = (100, 70, 50)  # percent of the tolerance asked for

    def _hessian(self) -> imstep.Hessian:
        return imstep.Hessian(self.subject.closure, self.subject.model)

    def pairs(self, k: int, tol: float, budget: int, seed: int) -> Pairs:
        found = spectral.eigenpairs(self._hessian(), k, "LM", tol, seed=seed)
        return Pairs(found.values, found.vectors.mT)

    def density(self, steps: int, probes: int, seed: int) -> Any:
        return spectral.density(self._hessian(), steps, probes, seed=seed)

    def trace(self, rtol: float, budget: int, seed: int) -> float:
        return spectral.trace(self._hessian(), rtol * budget / 100, seed=seed).value


class Curvlinops(Side):
    name, package = "curvlinops", "curvlinops-for-pytorch"
    trace_budgets = (50, 100, 200, 400, 800, 1600, 3200)

    def _operator(self) -> Any:
        import curvlinops

        s = self.subject
        return curvlinops.HessianLinearOperator(
            s.model, s.loss, s.parameters, [(s.inputs, s.targets)], check_deterministic=False
        )

    def pairs(self, k: int, tol: float, budget: int, seed: int) -> Pairs:
        from scipy.sparse.linalg import eigsh

        with twice_differentiable():
            values, vectors = eigsh(self._operator().to_scipy(), k=k, which="LM", tol=tol)
        return Pairs(torch.as_tensor(values), torch.as_tensor(vectors).mT)

    def density(self, steps: int, probes: int, seed: int) -> Any:
        from curvlinops import lanczos_approximate_spectrum

        torch.manual_seed(seed)
        with twice_differentiable():
            return lanczos_approximate_spectrum(self._operator(), steps, num_repeats=probes)

    def trace(self, rtol: float, budget: int, seed: int) -> float:
        from curvlinops import xtrace

        torch.manual_seed(seed)
        with twice_differentiable():
            return float(xtrace(self._operator(), budget))


class Eigenthings(Side):
    name, package = "hessian-eigenthings", "hessian-eigenthings"
    pair_budgets = (40, 60, 80, 120, 160, 240, 320)
    trace_budgets = (51, 99, 201, 399, 801, 1599, 3201)

    def _operator(self) -> Any:
        from hessian_eigenthings import HessianOperator

        s = self.subject
        return HessianOperator(s.model, [(s.inputs, s.targets)], lambda model, batch: s.loss(model(batch[0]), batch[1]))

    def pairs(self, k: int, tol: float, budget: int, seed: int) -> Pairs:
        from hessian_eigenthings import lanczos

        with twice_differentiable():
            found = lanczos(self._operator(), k=k, max_iter=budget, tol=tol, reorthogonalize=True, seed=seed)
        return Pairs(found.eigenvalues, found.eigenvectors)

    def density(self, steps: int, probes: int, seed: int) -> Any:
        from hessian_eigenthings import spectral_density

        with twice_differentiable():
            return spectral_density(self._operator(), num_runs=probes, lanczos_steps=steps, seed=seed)

    def trace(self, rtol: float, budget: int, seed: int) -> float:
        from hessian_eigenthings import trace

        with twice_differentiable():
            return float(trace(self._operator(), num_matvecs=budget, method="hutch++", seed=seed).estimate)


@contextlib.contextmanager
def former_eig() -> Iterator[None]:
    """PyHessian 0.1 calls `torch.eig`, which is no more; of a symmetric matrix it is `torch.linalg.eigh`."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    before = torch.eig
    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = before


class PyHessian(Side):
    name, package = "PyHessian", "PyHessian"
    trace_budgets = (50, 100, 200, 400, 800, 1600, 3200)

    def _computed(self) -> Any:
        from pyhessian import hessian

        s = self.subject
        with twice_differentiable():
            return hessian(s.model, s.loss, data=(s.inputs, s.targets), cuda=s.inputs.is_cuda)

    def pairs(self, k: int, tol: float, budget: int, seed: int) -> Pairs:
        torch.manual_seed(seed)
        values, vectors = self._computed().eigenvalues(maxIter=300, tol=tol, top_n=k)
        flat = [torch.cat([part.reshape(-1) for part in vector]) for vector in vectors]
        return Pairs(torch.tensor(values), torch.stack(flat))

    def density(self, steps: int, probes: int, seed: int) -> Any:
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()), former_eig():
            return self._computed().density(iter=steps, n_v=probes)

    def trace(self, rtol: float, budget: int, seed: int) -> float:
        torch.manual_seed(seed)
        found = self._computed().trace(maxIter=budget, tol=0.0)
        return float(sum(found) / len(found))


SIDES: tuple[type[Side], ...] = (Imstep, Curvlinops, Eigenthings, PyHessian)
