"""A physics-informed network for imstep: the heat equation.

    u_t = 0.25 u_xx   for x in [0, 1] and t in [0, 1],   u(x, 0) = sin πx,   u(0, t) = u(1, t) = 0

    imstep train FILE -o least-squares --dtype float64    the method for such problems
    imstep compare FILE --dtype float64                   against Adam and L-BFGS; writes a report

Where to put your own equation and network is marked by 1 to 4.
"""

import torch
from torch import nn

from imstep import pde
from imstep.tasks import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, face, grid

DOMAIN = [(0.0, 1.0), (0.0, 1.0)]  # x, t


# 1. Your conditions: `residual(network, points)` -> (k, m) is what the network misses at points (k, 2); to be zero.
def equation(u, points):
    found = pde.expand(u, points, second=[0])  # value and derivatives in one pass; the last axis is the coordinate
    u_t, u_xx = found.first[..., 1], found.second[..., 0]
    return u_t - 0.25 * u_xx


def start(u, points):
    return u(points) - torch.sin(torch.pi * points[:, :1])


def ends(u, points):
    return u(points)


#    Each has points of its own, which are drawn anew for every step: so many of them, with a weight in the loss.
conditions = (
    Condition("equation", equation, box(DOMAIN), count=400),
    Condition("start", start, face(DOMAIN, axis=1, value=0.0), count=60, weight=10.0),
    Condition("ends", ends, boundary(DOMAIN, axes=[0]), count=60, weight=10.0),
)


# 2. Your network: maps points (k, 2) to values (k, 1). Activations must be smooth: tanh, sine, GELU.
def network():
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


# 3. The solution, if you know it somewhere, to measure the error against. Else leave `reference` out below: the
#    held-out loss is then the loss at points that no step has seen.
def reference():
    points = grid(DOMAIN, (41, 41))
    x, t = points[:, :1], points[:, 1:]
    values = torch.exp(-0.25 * torch.pi**2 * t) * torch.sin(torch.pi * x)
    return Reference(points, values, shape=(41, 41))


# 4. Names for tables and reports.
task = PhysicsTask(
    name="NAME",
    title="Heat equation",
    description="u_t = 0.25 u_xx, u(x, 0) = sin πx; tanh MLP 2-32-32-1. Held out: relative L2 error.",
    network=network,
    conditions=conditions,
    reference=reference,
)
