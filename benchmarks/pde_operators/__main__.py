"""Laplacians of a network in 2 to 100 dimensions: imstep.pde beside nested autograd and torch.func, with the gradient.

python -m benchmarks.pde_operators           # what the record lacks; writes record.json and the page
python -m benchmarks.pde_operators --quick   # a smoke test; prints, writes nothing
python -m benchmarks.pde_operators --table   # the page again, from the record
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.record_page import Row, complete, load, show, table
from imstep import pde
from imstep.tasks.models import mlp

NAME = "pde-operators"
DIMENSIONS = (2, 5, 10, 100)
POINTS = {2: 2000, 5: 2000, 10: 1000, 100: 100}
REPEATS = 15


def nested(net: nn.Module, x: Tensor) -> Tensor:
    """One backward pass for the gradient, one for each second derivative."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    bends = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(bends, 1).sum(1, keepdim=True)


def hessian_trace(net: nn.Module, x: Tensor) -> Tensor:
    """The trace of torch.func's Hessian, forward over reverse, batched over points."""
    hessian = torch.func.vmap(torch.func.hessian(lambda point: net(point[None])[0, 0]))
    return hessian(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


def twice_forward(net: nn.Module, x: Tensor) -> Tensor:
    """torch.func's jvp of a jvp, batched over coordinates."""
    along = lambda v: torch.func.jvp(lambda y: torch.func.jvp(net, (y,), (v,))[1], (x,), (v,))[1]
    return torch.func.vmap(along)(torch.eye(x.shape[1], dtype=x.dtype)[:, None].expand(-1, *x.shape)).sum(0)


SIDES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "imstep.pde": pde.laplacian,
    "nested autograd": nested,
    "torch.func, jvp of jvp": twice_forward,
    "torch.func, Hessian": hessian_trace,
}


def run(dimension: int, repeats: int) -> Row:
    """Median milliseconds of a residual's loss with its gradient, the sides in turn; and their largest difference."""
    torch.manual_seed(0)
    net = mlp((dimension, 64, 64, 64, 1)).double()
    x = torch.rand(POINTS[dimension], dimension, dtype=torch.float64)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    gradients: dict[str, Tensor] = {}
    for turn in range(repeats + 2):
        for name, side in SIDES.items():
            start = time.perf_counter()
            found = torch.autograd.grad((side(net, x) - 1).square().mean(), list(net.parameters()), allow_unused=True)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
            gradients[name] = torch.cat([g.reshape(-1) for g in found if g is not None])
    reference = gradients["nested autograd"]
    error = max(float((g - reference).norm() / reference.norm()) for g in gradients.values())
    return {**{name: 1e3 * statistics.median(times) for name, times in seconds.items()}, "difference": error}


def text_of(record: dict) -> str:
    """The table of the page."""
    head = ["dimensions", "points", *SIDES, "imstep.pde over nested autograd"]
    rows = []
    for dimension, row in record["runs"].items():
        own = row["imstep.pde"]
        times = [f"{row[name]:.3g}" for name in SIDES]
        rows.append([dimension, str(POINTS[int(dimension)]), *times, f"{own / row['nested autograd']:.2f}"])
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, few dimensions; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        print(text_of({"runs": {str(d): run(d, 2) for d in DIMENSIONS[:2]}}))
        return
    runs = {str(dimension): partial(run, dimension, REPEATS) for dimension in DIMENSIONS}
    show(NAME, "pde-operators", text_of(load(NAME) if arguments.table else complete(NAME, {}, runs)))


if __name__ == "__main__":
    main()
