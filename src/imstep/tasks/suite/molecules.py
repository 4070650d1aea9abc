"""Force matching: energies of a molecule and their slopes, so that there are gradients inside the loss.

Source of the potential: the united-atom model of n-butane, torsion by Ryckaert and Bellemans, Chemical Physics Letters
30 (1975), 123; harmonic angles as in TraPPE (Martin and Siepmann, Journal of Physical Chemistry B 102 (1998), 2569).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from imstep.tasks.base import Metric
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import mlp

__all__ = ["TASKS", "EnergyAndForces", "butane_energy"]

BEADS = 4
STRETCH, BEND = 1000.0, 208.0
"""Spring constants, in kT at 300 K: for bonds of length 1, and for angles."""
ANGLE = math.radians(114.0)
TORSION = (1116.0, 1462.0, -1578.0, -368.0, 3156.0, -3788.0)
"""Kelvin; of the powers of the cosine of the torsion, which is 0 for the stretched molecule."""
TEMPERATURE = 300.0
TRAIN, HELDOUT = 400, 400
ENERGY_SCALE, FORCE_SCALE = 3.0, 30.0
"""kT, and kT a bond length: roughly the deviations of what is to be learnt."""
FIRST, SECOND = torch.triu_indices(BEADS, BEADS, 1)


def butane_energy(places: Tensor) -> Tensor:
    """Energy (k,) in kT at 300 K of molecules at `places` (k, 4, 3), in bond lengths."""
    bonds = places.diff(dim=1)
    lengths = bonds.norm(dim=2)
    cosines = -(bonds[:, :-1] * bonds[:, 1:]).sum(2) / (lengths[:, :-1] * lengths[:, 1:])
    one, other = (torch.linalg.cross(bonds[:, at], bonds[:, at + 1]) for at in (0, 1))
    # The normals of the two planes agree where the chain is bent to one side, cis: the torsion is pi there.
    torsion = -(one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    turned = sum(c * torsion**power for power, c in enumerate(TORSION)) / TEMPERATURE
    stretched = STRETCH / 2 * (lengths - 1).square().sum(1)
    return stretched + BEND / 2 * (cosines.acos() - ANGLE).square().sum(1) + turned


class EnergyAndForces(nn.Module):
    """A tanh network for the energy of the distances, and its forces: (k, 13) of places (k, 4, 3).

    The energy is a function of the six reciprocal distances, so that molecules that are moved or turned have the same.
    First the energy, then the forces -dE/dx, both divided by fixed scales.
    """

    def __init__(self) -> None:
        super().__init__()
        self.energy = mlp((BEADS * (BEADS - 1) // 2, 40, 40, 1))

    def forward(self, places: Tensor) -> Tensor:
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            distances = (places[:, FIRST] - places[:, SECOND]).square().sum(2).sqrt()
            energy = self.energy(4 * (1 / distances - 0.7))[:, 0]
            (slopes,) = torch.autograd.grad(energy.sum(), places, create_graph=trained)
        return torch.cat([energy[:, None], -ENERGY_SCALE / FORCE_SCALE * slopes.flatten(1)], 1)


def _molecules(count: int, generator: Generator) -> Tensor:
    """(count, 4, 3): bonds and angles as at 300 K, all torsions alike, and any direction in space."""
    noise = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    lengths = 1 + noise[:, :3] / math.sqrt(STRETCH)
    angles = ANGLE + noise[:, 3:] / math.sqrt(BEND)
    torsion = math.pi * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
    zero = torch.zeros(count, dtype=torch.float64)
    second = torch.stack([lengths[:, 0], zero, zero], 1)
    third = second + lengths[:, 1:2] * torch.stack([-angles[:, 0].cos(), angles[:, 0].sin(), zero], 1)
    along = (third - second) / lengths[:, 1:2]
    side = torch.stack([-along[:, 1], along[:, 0], zero], 1)
    up = torch.linalg.cross(along, side)
    turned = -torsion.cos()[:, None] * side + torsion.sin()[:, None] * up
    fourth = third + lengths[:, 2:] * (-angles[:, 1:].cos() * along + angles[:, 1:].sin() * turned)
    places = torch.stack([torch.zeros_like(second), second, third, fourth], 1)
    turns = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))[0]
    return places @ turns


def _load(data: Path | None) -> tuple[Batch, Batch]:
    places = _molecules(TRAIN + HELDOUT, Generator().manual_seed(0)).requires_grad_()
    energy = butane_energy(places)
    (slopes,) = torch.autograd.grad(energy.sum(), places)
    energy = energy.detach() - energy.detach()[:TRAIN].mean()
    targets = torch.cat([energy[:, None] / ENERGY_SCALE, -slopes.flatten(1) / FORCE_SCALE], 1)
    every = Batch(places.detach(), targets)
    return every.take(slice(0, TRAIN)), every.take(slice(TRAIN, None))


TASKS = (
    ExampleTask(
        "butane-forces",
        "Butane, energies and forces",
        f"{TRAIN} shapes of a molecule of four beads; energy by a tanh MLP 6-40-40-1 of the reciprocal distances, "
        "forces by its gradient; mean squared error of both, scaled. Metric: root mean square error of a force, in kT "
        "a bond.",
        _load,
        EnergyAndForces,
        nn.MSELoss(),
        Metric(
            "force error",
            lambda outputs, targets: (outputs - targets)[:, 1:].double().square().mean(1),
            lambda mean: FORCE_SCALE * math.sqrt(mean),
        ),
        unit="molecules",
        budget=1000.0,
    ),
)
