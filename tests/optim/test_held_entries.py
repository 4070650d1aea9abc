"""Entries that a step leaves where they are, whatever earlier steps know of them: masked ones, and those without a
gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import LeastSquares, NewtonKrylov, methods
from imstep.optim import ConjugateGradient, EarlierDraws, NoPreconditioning, QuasiNewtonSteps

Make = Callable[..., Any]

MAKES: dict[str, Make] = {
    "newton-krylov": NewtonKrylov,
    "plain": lambda p, **o: NewtonKrylov(p, preconditioning=NoPreconditioning(), **o),
    "for-batches": NewtonKrylov.for_batches,
    "momentum": lambda p, **o: NewtonKrylov(p, momentum=True, **o),
    "warm start": lambda p, **o: NewtonKrylov(p, solver=ConjugateGradient(warm_start=0.95), **o),
    "between": lambda p, **o: NewtonKrylov(p, between=QuasiNewtonSteps(), **o),
    "least-squares": LeastSquares,
    "least-squares, momentum": lambda p, **o: LeastSquares(p, momentum=0.9, **o),
    "least-squares, recall": lambda p, **o: LeastSquares(p, recall=EarlierDraws(), **o),
    "newton": methods.newton,
    "shifted-newton": methods.shifted_newton,
    "trust-region": methods.trust_region,
    "hessian-free": methods.hessian_free,
    "subspace": methods.randomized_subspace_newton,
    "kfac": lambda p, **o: methods.kfac(p, seed=0, **o),
    "ekfac": lambda p, **o: methods.ekfac(p, seed=0, **o),
    "nystrom": methods.nystrom_newton_cg,
    "sketchy-sgd": methods.sketchy_sgd,
    "lbfgs": methods.lbfgs,
    "block-bfgs": methods.block_bfgs,
    "sr1": methods.sr1,
    "halley": methods.halley,
    "shampoo": methods.shampoo,
    "soap": methods.soap,
    "adahessian": methods.adahessian,
    "sophia": lambda p, **o: methods.sophia(p, seed=0, **o),
}


class Heads(nn.Module):
    """A trunk with two heads, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.first, self.second = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.trunk(x)
        out: Tensor = self.first(h)
        return out + self.second(h) if both else out


def trained(
    make: Make, redrawn: bool, hold: Callable[[Heads], bool], fixed: Callable[[Heads], Tensor], **o: Any
) -> None:
    """Three steps on everything, then four in which entries are held, and must be the same bit for bit."""
    model = Heads().double()
    optimizer = make(model.parameters(), **o)
    x = torch.randn(30, 3, dtype=torch.float64)
    both, before = True, None
    for number in range(7):
        if redrawn:
            x = torch.randn(30, 3, dtype=torch.float64)
        if number == 3:
            both, before = hold(model), fixed(model).clone()
        optimizer.step(lambda x=x, both=both: F.mse_loss(model(x, both), torch.stack([x.prod(1), x.sum(1).sin()], 1)))
        if before is not None:
            assert torch.equal(fixed(model), before)


@pytest.mark.parametrize(("redrawn", "decay"), [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.filterwarnings("ignore:.*used in ways that are not recognised")
def test_entries_that_a_hook_masks_from_some_step_on(name: str, redrawn: bool, decay: float) -> None:
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    def hold(model: Heads) -> bool:
        model.trunk[0].weight.register_hook(lambda g: g * mask)
        return True

    trained(MAKES[name], redrawn, hold, lambda model: model.trunk[0].weight.detach()[:, 1], weight_decay=decay)


@pytest.mark.parametrize(("redrawn", "decay"), [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("name", MAKES)
def test_parameters_that_the_loss_depends_on_no_more(name: str, redrawn: bool, decay: float) -> None:
    trained(MAKES[name], redrawn, lambda model: False, lambda model: model.second.weight.detach(), weight_decay=decay)
