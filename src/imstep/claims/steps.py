"""The steps: any method, the end of a solve, the Taylor monitor, convergence far from a solution and near it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep
from imstep.claims.claim import Figure, at_least, at_most
from imstep.claims.measuring import Regression, fitted_order, slope
from imstep.globalization import TaylorMonitor
from imstep.linalg import (
    DenseOperator,
    KrylovStatus,
    NoiseTest,
    RelativeResidual,
    SplitOperator,
    conjugate_gradient,
)
from imstep.optim import StepRecord
from imstep.runs.optimizers import METHODS
from imstep.runs.rows import Limits
from imstep.runs.runner import Trainer
from imstep.tasks import ExampleTask, held_out

__all__ = ["global_convergence", "local_convergence", "methods", "taylor_monitor", "termination"]

_F64 = torch.float64


def methods() -> Sequence[Figure]:
    """Every method of `imstep.methods` by its name, with its defaults, on one small network."""
    x = torch.linspace(-2, 2, 80)[:, None]
    task = ExampleTask(
        "wave", "A wave", "80 points.", lambda data: held_out(x, torch.sin(2 * x)),
        lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), nn.MSELoss(),
    )  # fmt: skip
    shares = {}
    for name, spec in METHODS.items():
        problem = task.build(0, dtype=_F64)
        trainer = Trainer(problem, spec.create(problem))
        start = problem.evaluate(problem.train).loss
        for _ in trainer.run(Limits(budget=30.0)):
            pass
        shares[name] = problem.evaluate(problem.train).loss / start
    worst = max(shares, key=lambda name: shares[name] if math.isfinite(shares[name]) else math.inf)
    return [
        at_least("methods by name", len(shares), 30),
        at_most(f"highest loss after 30 gradients / at the start ({worst})", shares[worst], 0.9),
    ]


def termination() -> Sequence[Figure]:
    """Spectra planted in matrices of 200 variables: what the solve must end at, and what it must not."""
    size, seeds, found, false, lost, products = 200, range(10), 0, 0, 0, []
    noisy = 0
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(size, size, dtype=_F64, generator=generator))[0]
        spectrum = torch.logspace(-1, 1, size, dtype=_F64)
        gradient = torch.randn(size, dtype=_F64, generator=generator)
        planted = spectrum.clone()
        planted[0] = -0.5
        matrix = basis @ planted.diag() @ basis.T
        result = conjugate_gradient(DenseOperator(matrix), -gradient, stopping=[RelativeResidual(1e-10)])
        p = result.disturbing_direction
        seen = result.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE and p is not None
        found += seen and float(p @ matrix @ p) < 0
        lost += result.iterations > 0 and not float(gradient @ result.solution) < 0
        products.append(result.products)
        definite = DenseOperator(basis @ spectrum.diag() @ basis.T)
        whole = conjugate_gradient(definite, -gradient, stopping=[RelativeResidual(1e-10)])
        false += whole.status is not KrylovStatus.CONVERGED
        # Two halves that agree but for one direction, in which one says up and the other down.
        strange = 40.0 * torch.outer(basis[:, 0], basis[:, 0])
        halves = SplitOperator(DenseOperator(definite.matrix + strange), DenseOperator(definite.matrix - strange))
        noise = conjugate_gradient(halves, -basis[:, 0] - 0.01 * gradient, noise=NoiseTest(z=2.0))
        noisy += noise.status is KrylovStatus.DISTURBING_NOISE
    share = sorted(products)[len(products) // 2] / size
    return [
        at_least("planted negative curvatures found, of 10", found, 10),
        at_most("ends that are no descent", lost, 0),
        at_most("false alarms on positive definite matrices, of 10", false, 0),
        at_least("planted noise found, of 10", noisy, 10),
        at_most("products until it is found / variables, median", share, 0.5),
    ]


def taylor_monitor() -> Sequence[Figure]:
    """The quadratic model's error is of third order in the step; first radii wrong by a million do not matter."""
    problem = Regression((4, 8, 1), 30, _F64)
    orders = [_error_order(problem, seed) for seed in range(5)]
    costs, rises = [], 0.0
    for radius in (math.inf, 1e-6, 1.0, 1e6):
        cost, records = _down(TaylorMonitor(radius=radius))
        costs.append(cost)
        rises = max(rises, *((r.new_loss - r.loss) / r.loss for r in records))
    return [
        at_most("order of the model's error, distance from 3, worst of 5", max(abs(p - 3) for p in orders), 0.15),
        at_most("cost from the worst first radius / from none", max(costs) / costs[0], 3.0),
        at_most("largest relative rise of the loss in a step", rises, 1e-10),
    ]


def _error_order(problem: Regression, seed: int) -> float:
    """p of |f(w + t d) - m(t)| ~ C t^p in a random direction."""
    matrix = imstep.Hessian(problem.loss, problem.parameters)
    d = torch.randn(len(matrix.gradient), dtype=_F64, generator=torch.Generator().manual_seed(seed))
    d /= d.norm()
    first, second = float(matrix.gradient @ d), float(d @ (matrix @ d))
    start = nn.utils.parameters_to_vector(problem.parameters).detach().clone()
    lengths, errors = [2.0**-k for k in range(5, 11)], []
    with torch.no_grad():
        base = float(problem.loss())
        for t in lengths:
            nn.utils.vector_to_parameters(start + t * d, problem.parameters)
            errors.append(abs(float(problem.loss()) - base - t * first - t * t * second / 2))
        nn.utils.vector_to_parameters(start, problem.parameters)
    return slope([math.log(t) for t in lengths], [math.log(e) for e in errors])


def _down(step: TaylorMonitor, target: float = 1e-10) -> tuple[float, list[StepRecord]]:
    """Gradients until Rosenbrock's function of 10 variables is below the target; infinity for 300 steps."""
    w = nn.Parameter(torch.tensor([-1.2, 1.0] * 5, dtype=_F64))
    optimizer, cost, records = imstep.NewtonKrylov([w], step=step), 0.0, []
    for _ in range(300):
        optimizer.step(lambda: _rosenbrock(w))
        record = optimizer.last_step
        assert record is not None
        cost += record.cost.gradient_equivalents
        records.append(record)
        if record.new_loss < target:
            return cost, records
    return math.inf, records


def _rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def _powell(x: Tensor) -> Tensor:
    return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def _beale(x: Tensor) -> Tensor:
    targets = zip((1.5, 2.25, 2.625), (1, 2, 3), strict=True)
    return torch.stack([(y - x[0] * (1 - x[1] ** i)) ** 2 for y, i in targets]).sum()


def _wood(x: Tensor) -> Tensor:
    return (
        100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
        + 10 * (x[1] + x[3] - 2) ** 2 + (x[1] - x[3]) ** 2 / 10
    )  # fmt: skip


_FUNCTIONS: tuple[tuple[Callable[[Tensor], Tensor], list[float]], ...] = (
    (_rosenbrock, [-1.2, 1.0] * 2),
    (_powell, [3.0, -1.0, 0.0, 1.0]),
    (_beale, [1.0, 1.0]),
    (_wood, [-3.0, -1.0, -3.0, -1.0]),
)


def global_convergence() -> Sequence[Figure]:
    """Functions of Moré, Garbow and Hillstrom whose least value is 0, from the standard start and ten times that."""
    highest, failed, steps = 0.0, 0, 0
    for function, start in _FUNCTIONS:
        for factor in (1.0, 10.0):
            found = imstep.minimize(function, factor * torch.tensor(start, dtype=_F64))
            failed += not found.success
            steps = max(steps, found.nit)
            # Rosenbrock's chain of four has a second minimum, of value 3.70.
            value = min(abs(found.fun - 3.7014), found.fun) if function is _rosenbrock else found.fun
            highest = max(highest, value)
    return [
        at_most("starts of 8 without a minimum", failed, 0),
        at_most("highest value reached, 0 being the least", highest, 1e-4),
        at_most("most steps", steps, 300),
    ]


def local_convergence() -> Sequence[Figure]:
    """Order p of ‖g'‖ ~ C ‖g‖^p at the end, on a convex problem and on a network, both with a small penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, dtype=_F64, generator=generator)
    y = (x[:, :3].sum(1) + torch.randn(200, dtype=_F64, generator=generator) > 0).double()
    figures = []
    for title, hidden, weight in (("logistic regression", 0, 1e-3), ("a network", 4, 1e-2)):
        layers = [nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 1)] if hidden else [nn.Linear(10, 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(*layers).to(_F64)
            for p in model.parameters():
                nn.init.normal_(p, 0, 0.3)
        norms, lengths = _to_the_end(model, partial(_penalised, model, x, y, weight))
        figures += [
            at_least(f"order on {title}", fitted_order(norms), 1.4),
            at_most("last gradient norm", norms[-1], 1e-11),
            at_most("last step's distance from Newton's full step", abs(lengths[-1] - 1), 1e-2),
        ]
    return figures


def _penalised(model: nn.Module, x: Tensor, y: Tensor, weight: float) -> Tensor:
    penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return F.binary_cross_entropy_with_logits(model(x)[:, 0], y) + weight * penalty


def _to_the_end(model: nn.Module, closure: Callable[[], Tensor], steps: int = 150) -> tuple[list[float], list[float]]:
    """Gradient norms of all steps, and lengths of those that were accepted."""
    optimizer = imstep.NewtonKrylov(model.parameters())
    norms: list[float] = []
    lengths: list[float] = []
    while len(norms) < steps and (not norms or norms[-1] > 1e-12):
        optimizer.step(closure)
        record = optimizer.last_step
        assert record is not None
        norms.append(record.gradient_norm)
        lengths += [record.step_length] if record.accepted else []
    return norms, lengths
