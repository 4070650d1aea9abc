"""The flow in a square cavity whose lid moves: the steady Navier-Stokes equations, with a solution by differences."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from imstep import pde
from imstep.tasks.models import mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, face, grid

__all__ = ["CENTRELINES", "TASKS", "cavity_flow"]

REYNOLDS = 100.0
SIDES = [(0.0, 1.0), (0.0, 1.0)]
INTERVALS = 32

CENTRELINES: dict[str, tuple[tuple[float, float], ...]] = {
    "u": (
        *((1.0, 1.0), (0.9766, 0.84123), (0.9688, 0.78871), (0.9609, 0.73722), (0.9531, 0.68717), (0.8516, 0.23151)),
        *((0.7344, 0.00332), (0.6172, -0.13641), (0.5, -0.20581), (0.4531, -0.2109), (0.2813, -0.15662)),
        *((0.1719, -0.1015), (0.1016, -0.06434), (0.0703, -0.04775), (0.0625, -0.04192), (0.0547, -0.03717)),
        (0.0, 0.0),
    ),
    "v": (
        *((1.0, 0.0), (0.9688, -0.05906), (0.9609, -0.07391), (0.9531, -0.08864), (0.9453, -0.10313)),
        *((0.9063, -0.16914), (0.8594, -0.22445), (0.8047, -0.24533), (0.5, 0.05454), (0.2344, 0.17527)),
        *((0.2266, 0.17507), (0.1563, 0.16077), (0.0938, 0.12317), (0.0781, 0.1089), (0.0703, 0.10091)),
        *((0.0625, 0.09233), (0.0, 0.0)),
    ),
}
"""Published at Reynolds number 100: (y, u) at x = 1/2 and (x, v) at y = 1/2.

Of a grid of 129 by 129; at the extremes of v they are 2 to 4% nearer to zero than more exact solutions.

Source: Ghia, Ghia and Shin, J. Comput. Phys. 48 (1982), p. 387, tables I and II.
"""


@lru_cache
def cavity_flow(intervals: int, reynolds: float = REYNOLDS) -> np.ndarray:
    """The velocity (u, v) at the nodes of a grid of the unit square, x fastest: (intervals + 1, intervals + 1, 2).

        Δ²ψ = Re (ψ_y Δψ_x - ψ_x Δψ_y),   u = ψ_y, v = -ψ_x

    By central differences and Newton's method; walls by reflection. The lid, at y = 1, moves with u = 1.

    Cost: some five factorisations of a sparse matrix with about 20 entries a node.

    Source: the differences are textbook, such as Kupferman, SIAM J. Sci. Comput. 23 (2001), p. 1, in their use of ψ
        alone; second order, except near the upper corners, where the velocity jumps.
    """
    import scipy.sparse as sp
    from scipy.sparse.linalg import spsolve

    count, h = intervals - 1, 1 / intervals
    bands = lambda values, offsets, columns=count: sp.diags(values, offsets, shape=(count, columns), dtype=float)
    none, one = sp.csr_matrix((1, count)), sp.identity(count, format="csr")
    wall = lambda at: sp.csr_matrix(([2 / h**2], ([0], [at])), shape=(1, count))
    bend = bands([1.0, -2.0, 1.0], [-1, 0, 1]) / h**2
    ends = sp.csr_matrix(([1.0, 1.0], ([0, count - 1], [0, count - 1])), shape=(count, count))
    fourth = (bands([1.0, -4.0, 6.0, -4.0, 1.0], [-2, -1, 0, 1, 2]) + ends) / h**4
    slope, inside = bands([-1.0, 1.0], [-1, 1]) / (2 * h), bands([1.0], [1], intervals + 1)
    of_all = bands([-1.0, 1.0], [0, 2], intervals + 1) / (2 * h)  # of values at all nodes of a line, at the inner ones
    padded, with_walls = sp.vstack([none, one, none]), sp.vstack([wall(0), bend, wall(count - 1)])

    biharmonic = sp.kron(one, fourth) + 2 * sp.kron(bend, bend) + sp.kron(fourth, one)
    lid = np.zeros((count, count))
    lid[-1] = 2 / h**3
    at_lid = np.zeros((intervals + 1, intervals + 1))
    at_lid[-1] = 2 / h
    laplacian = (sp.kron(padded, with_walls) + sp.kron(with_walls, padded)).tocsr()  # at all nodes
    across, up = sp.kron(one, slope), sp.kron(slope, one)
    of_x, of_y = sp.kron(inside, of_all), sp.kron(of_all, inside)
    in_x, in_y, from_x, from_y = of_x @ laplacian, of_y @ laplacian, of_x @ at_lid.ravel(), of_y @ at_lid.ravel()
    psi, move = np.zeros(count**2), np.ones(1)
    while abs(move).max() > 1e-10:
        u, v, zeta_x, zeta_y = up @ psi, -across @ psi, in_x @ psi + from_x, in_y @ psi + from_y
        missed = biharmonic @ psi + lid.ravel() - reynolds * (u * zeta_x + v * zeta_y)
        carried = sp.diags(zeta_x) @ up + sp.diags(u) @ in_x - sp.diags(zeta_y) @ across + sp.diags(v) @ in_y
        move = spsolve((biharmonic - reynolds * carried).tocsc(), -missed)
        psi += move
    whole = np.zeros((intervals + 1, intervals + 1, 2))
    whole[-1, :, 0] = 1
    whole[1:-1, 1:-1, 0], whole[1:-1, 1:-1, 1] = (w.reshape(count, count) for w in (up @ psi, -across @ psi))
    return whole


def _equations(u: nn.Module, x: Tensor) -> Tensor:
    """Two components of momentum, and mass: (k, 3)."""
    flow = pde.expand(u, x, laplacian=[0, 1])
    assert flow.laplacian is not None
    velocity, slopes = flow.value[:, :2], flow.first  # (k, 3, 2) for u, v, p
    carried = (slopes[:, :2] * velocity[:, None]).sum(-1)
    momentum = carried + slopes[:, 2] - flow.laplacian[:, :2] / REYNOLDS
    return torch.cat([momentum, slopes[:, :1, 0] + slopes[:, 1:2, 1]], 1)


def _walls(u: nn.Module, x: Tensor) -> Tensor:
    """The velocity that is missed, (k, 2); at the lid less towards its ends, where it jumps and no network follows."""
    lid = x[:, 1] == 1
    weight = torch.where(lid, 4 * x[:, 0] * (1 - x[:, 0]), 1.0)
    return weight[:, None] * (u(x)[:, :2] - torch.stack([lid.to(x), torch.zeros_like(weight)], 1))


def _reference() -> Reference:
    """Extrapolated from two grids."""
    coarse, fine = cavity_flow(INTERVALS), cavity_flow(2 * INTERVALS)[::2, ::2]
    values = torch.from_numpy((4 * fine - coarse) / 3).reshape(-1, 2)
    points = grid(SIDES, (INTERVALS + 1, INTERVALS + 1))
    return Reference(points, values, shape=(INTERVALS + 1, INTERVALS + 1), axes=((0, "x"), (1, "y")))


TASKS = (
    PhysicsTask(
        "cavity",
        "Lid-driven cavity",
        "Steady Navier-Stokes equations in the unit square for u, v and p, Reynolds number 100, u = 1 at the lid; "
        "2,000 + 400 + 1 points, the walls with weight 10; tanh MLP 2-30-30-30-3. Held out: relative L2 error of the "
        "velocity.",
        partial(mlp, (2, 30, 30, 30, 3)),
        (
            Condition("equations", _equations, box(SIDES), 2000),
            Condition("walls", _walls, boundary(SIDES), 400, weight=10.0),
            Condition("pressure", lambda u, x: u(x)[:, 2:], face([(0.0, 0.0), (0.0, 0.0)], 0, 0.0), 1),
        ),
        _reference,
    ),
)
