"""neurodiffeq."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

neurodiffeq = pytest.importorskip("neurodiffeq")

from neurodiffeq.conditions import IVP  # noqa: E402
from neurodiffeq.generators import Generator1D  # noqa: E402
from neurodiffeq.networks import FCNN  # noqa: E402
from neurodiffeq.solvers import Solver1D, _requires_closure  # noqa: E402

import imstep  # noqa: E402


def test_example(final_loss: Callable[[str], float]) -> None:
    """`Solver1D(optimizer=imstep.LeastSquares(net.parameters()))`"""
    assert final_loss("neurodiffeq") < 1e-6


@pytest.mark.parametrize("method", [imstep.LeastSquares, imstep.NewtonKrylov])
def test_systems_and_schedules(method: Callable[..., torch.optim.Optimizer]) -> None:
    """systems of equations, several networks, points drawn at random, schedules by callbacks, `get_solution`"""
    torch.set_default_dtype(torch.float64)
    nets = [FCNN(1, 1, hidden_units=(10,)) for _ in range(2)]
    optimizer = method([p for net in nets for p in net.parameters()])
    assert _requires_closure(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    assert _requires_closure(optimizer)  # schedules put a step of their own in place
    solver = Solver1D(
        lambda u, v, t: [neurodiffeq.diff(u, t) - v, neurodiffeq.diff(v, t) + u],
        conditions=[IVP(0.0, 0.0), IVP(0.0, 1.0)],
        t_min=0.0,
        t_max=2.0,
        nets=nets,
        optimizer=optimizer,
        train_generator=Generator1D(32, 0.0, 2.0, method="equally-spaced-noisy"),
        valid_generator=Generator1D(16, 0.0, 2.0, method="equally-spaced"),
        n_batches_valid=1,
    )
    solver.fit(max_epochs=12, tqdm_file=None, callbacks=[lambda _: schedule.step()])
    t = torch.linspace(0, 2, 20)
    u, _ = solver.get_solution()(t, to_numpy=False)
    assert float((u.flatten() - t.sin()).abs().max()) < 0.05
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.99**12)
