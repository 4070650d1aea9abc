"""One side: the processor seconds of the parts of a step, one by one as they are asked for. Runs with any checkout.

PYTHONPATH=CHECKOUT/src python benchmarks/step_time/side.py TASK
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import imstep
from imstep import pde
from imstep.tasks.models import mlp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.products.models import SUBJECTS, build

Task = tuple[nn.Module, Any, Callable[[], Tensor]]


def poisson_2d() -> Task:
    """The task of the same name: 900 + 120 points drawn anew, 2-64-1."""
    torch.set_default_dtype(torch.float64)
    net = mlp((2, 64, 1))
    solution = lambda x: torch.sin(math.pi * x).prod(1, keepdim=True)

    def closure() -> Tensor:
        x, edge = torch.rand(900, 2), torch.rand(120, 2)
        edge[torch.arange(120), torch.randint(2, (120,))] = torch.randint(2, (120,)).double()
        equation = pde.laplacian(net, x) + 2 * math.pi**2 * solution(x)
        return equation.square().mean() + (net(edge) - solution(edge)).square().mean()

    return net, imstep.LeastSquares(net.parameters()), closure


def poisson_2d_nested() -> Task:
    """The same with nested calls of torch.autograd.grad."""
    torch.set_default_dtype(torch.float64)
    net = mlp((2, 64, 1))
    solution = lambda x: torch.sin(math.pi * x).prod(1, keepdim=True)

    def closure() -> Tensor:
        x, edge = torch.rand(900, 2).requires_grad_(), torch.rand(120, 2)
        edge[:60, 0], edge[60:, 1] = 0, 1
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        bends = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        equation = torch.stack(bends, 1).sum(1, keepdim=True) + 2 * math.pi**2 * solution(x.detach())
        return equation.square().mean() + (net(edge) - solution(edge)).square().mean()

    return net, imstep.LeastSquares(net.parameters()), closure


def convection() -> Task:
    """Speed 30, 2,000 + 128 + 100 points drawn anew, 2-50-50-50-50-1."""
    torch.set_default_dtype(torch.float64)
    net, scale = mlp((2, 50, 50, 50, 50, 1)), torch.tensor([2 * math.pi, 1.0])

    def closure() -> Tensor:
        x = (torch.rand(2000, 2) * scale).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        start, time_ = torch.rand(128, 2) * scale * torch.tensor([1.0, 0.0]), torch.rand(100, 1)
        ends = [net(torch.cat([torch.full_like(time_, end), time_], 1)) for end in (0.0, 2 * math.pi)]
        misses = slope[:, 1] + 30 * slope[:, 0], net(start) - start[:, :1].sin(), ends[0] - ends[1]
        return sum((miss.square().mean() for miss in misses), torch.zeros(()))

    return net, imstep.LeastSquares(net.parameters()), closure


def convection_forward() -> Task:
    """The same by `imstep.pde`, with both entries of the gradient."""
    torch.set_default_dtype(torch.float64)
    net, scale = mlp((2, 50, 50, 50, 50, 1)), torch.tensor([2 * math.pi, 1.0])

    def closure() -> Tensor:
        slope = pde.gradient(net, torch.rand(2000, 2) * scale)[:, 0]
        start, time_ = torch.rand(128, 2) * scale * torch.tensor([1.0, 0.0]), torch.rand(100, 1)
        ends = [net(torch.cat([torch.full_like(time_, end), time_], 1)) for end in (0.0, 2 * math.pi)]
        misses = slope[:, 1] + 30 * slope[:, 0], net(start) - start[:, :1].sin(), ends[0] - ends[1]
        return sum((miss.square().mean() for miss in misses), torch.zeros(()))

    return net, imstep.LeastSquares(net.parameters()), closure


class StateSpace(nn.Module):
    """x⁺ = A (x, u) + V tanh(W (x, u) + b) + c, y = C (x, u) + d, from x = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bend, self.readout = nn.Linear(3, 2, bias=False), mlp((3, 16, 2)), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        present, seen = inputs.new_zeros(len(inputs), 2), []
        for given in inputs.unbind(1):
            seen.append(torch.cat([present, given], 1))
            present = self.linear(seen[-1]) + self.bend(seen[-1])
        return self.readout(torch.stack(seen, 1))


def state_space() -> Task:
    """48 records of 128 samples of one such model, fitted by another: of the size of the task silverbox."""
    torch.set_default_dtype(torch.float64)
    inputs = torch.randn(48, 128, 1)
    with torch.no_grad():
        answers = StateSpace()(inputs) + 0.01 * torch.randn(48, 128, 1)
    net = StateSpace()
    return net, imstep.LeastSquares(net.parameters()), lambda: nn.functional.mse_loss(net(inputs), answers)


def _digits(net: nn.Module) -> Task:
    images, labels = torch.rand(1797, 64), torch.randint(10, (1797,))

    def closure() -> Tensor:
        chosen = torch.randint(1797, (128,))
        return nn.functional.cross_entropy(net(images[chosen]), labels[chosen])

    return net, imstep.NewtonKrylov.for_batches(net.parameters()), closure


def digits_mlp() -> Task:
    """64-256-128-10, batches of 128."""
    return _digits(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)))


def digits_cnn() -> Task:
    """Two convolutions, batches of 128."""
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    return _digits(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions, *head))


_BUILDERS = (poisson_2d, convection, convection_forward, state_space, digits_mlp, poisson_2d_nested, digits_cnn)
STEPS = {f.__name__.replace("_", "-"): f for f in _BUILDERS}
TASKS = (*STEPS, *SUBJECTS)
"""Steps, and the models of `benchmarks.products`, of which a step has no fixed number of products."""


def parts(name: str) -> dict[str, Callable[[], object]]:
    """What to measure: a step, a gradient and, for a Hessian, its record and a product."""
    torch.set_num_threads(1)
    if name in SUBJECTS:
        subject = build(name, torch.device("cpu"), 0)
        return _products(subject.closure, list(subject.parameters))
    torch.manual_seed(0)
    net, optimizer, closure = STEPS[name]()
    parameters = list(net.parameters())
    found = _products(closure, parameters)
    if not isinstance(optimizer, imstep.NewtonKrylov):
        found = {"gradient": found["gradient"]}
    return {"step": lambda: optimizer.step(closure), **found}


def _products(closure: Callable[[], Tensor], parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    direction = torch.randn(sum(p.numel() for p in parameters))
    held: dict[str, imstep.Hessian] = {}
    return {
        "gradient": lambda: torch.autograd.grad(closure(), parameters, allow_unused=True),
        "record": lambda: held.update(at=imstep.Hessian(closure, parameters)),
        "replay": lambda: held["at"] @ direction,
    }


def main() -> None:
    """For each line that is read, the name of a part, its seconds of this thread's processor time."""
    found = parts(sys.argv[1])
    print(*found, flush=True)
    for line in sys.stdin:
        run, start = found[line.strip()], time.thread_time()
        run()
        print(time.thread_time() - start, flush=True)


if __name__ == "__main__":
    main()
