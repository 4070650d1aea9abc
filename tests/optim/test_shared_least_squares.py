"""Least squares whose residuals are spread over processes: steps are those of one process on all of them."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optim_cases import normal
from shared_cases import all_are_told, flat, grouped, mlp, said, squares, succeeded
from torch import Tensor, nn

from imstep.curvature import OtherProcessError, SumOverBatches
from imstep.curvature.processes import Processes
from imstep.curvature.shared_rows import SharedRows, Stack
from imstep.globalization import ContractionDamping
from imstep.linalg import (
    ByShape,
    DenseFactorisation,
    DenseRows,
    NormalEquations,
    PivotedCholesky,
    PivotedQR,
    RandomizedNystrom,
    SketchedFactorisation,
    ThinFactorisation,
)
from imstep.optim import ColumnNorms, EarlierDraws, ExponentialAverage, LeastSquares, MicroBatches, StepOutcome
from imstep.optim.box import Box
from imstep.optim.checking import OverfittingWarning
from tests.launching import Outcomes, launch, outcomes

Batch = tuple[Tensor, ...]


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()


def equation(model: nn.Module, points: Tensor) -> Tensor:
    """u' + u = 0 with u(0) = 1, as physics-informed networks have it."""
    x = points.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope + u).square().mean() + 10 * (model(torch.zeros_like(x[:1])) - 1).square().mean()


def curve(model: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), (3 * x).sin())


DAMPED = ContractionDamping(initial=1e-4)
"""So that rounding, which the order of processes changes, stays small where a problem is squared."""


def points(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(rows: Tensor) -> list[Tensor]:
    """In parts of unequal sizes, one for each process."""
    size = dist.get_world_size()
    return list(rows.split([len(rows) - len(rows) // 4 * (size - 1), *[len(rows) // 4] * (size - 1)]))


def same_steps(
    rank: int,
    every: Callable[[int], Sequence[Tensor]],
    make: Callable[[], nn.Module] = net,
    loss: Callable[[nn.Module, Any], Tensor] = curve,
    steps: int = 2,
    tolerance: float = 1e-10,
    reduction: Any = None,
    **options: Any,
) -> tuple[bytes, LeastSquares]:
    """Compare steps of all processes with those of one, given every process's part of the batch of a step.

    Process 0 does so, and the others are to be where it is, bit for bit.
    """
    ours, alone = make(), make()
    optimizer, reference = grouped(ours, LeastSquares, **options), LeastSquares(alone.parameters(), **options)
    for number in range(steps):
        parts = every(number)
        own = [parts[rank]] if len(parts[rank]) else []
        present = [part for part in parts if len(part)]
        value = optimizer.step(MicroBatches(lambda b: loss(ours, b), own, reduction=reduction))
        if rank:
            continue
        expected = reference.step(MicroBatches(lambda b: loss(alone, b), present, reduction=reduction))
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=1e-12)
        torch.testing.assert_close(flat(ours), flat(alone), rtol=tolerance, atol=tolerance)
        for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=100 * tolerance, atol=tolerance)
        ran, wanted = optimizer.last_step, reference.last_step
        same = lambda record: (record.outcome, record.factorisation, record.rank, record.iterations)
        assert same(ran) == same(wanted)
    assert optimizer.last_step.outcome is StepOutcome.ACCEPTED
    return flat(ours).numpy().tobytes() + repr(optimizer.last_step.loss).encode(), optimizer


# --- every way to factorise -------------------------------------------------------------------------------------


def triangles(rank: int) -> list[bytes]:
    """N >= n: the rows of a process are more than the columns, or fewer in one of them."""
    taken = []
    triangular = ThinFactorisation(values=5)
    for count, steps, way, kind in (
        (60, 1, ThinFactorisation(), "singular values"),
        (60, 2, triangular, "triangular"),
        (16, 1, triangular, "triangular"),
        (60, 2, NormalEquations(), "normal"),
    ):
        some = lambda number, count=count: cut(points(count, number))
        end, optimizer = same_steps(rank, some, steps=steps, factorisation=way, damping=DAMPED)
        assert optimizer.last_step.factorisation == kind
        taken.append(end)
    return taken


def as_accurate_as_their_condition(rank: int) -> bytes:
    """J has condition 1e9, JᵀJ 1e18: what solves with J keeps seven digits."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0] for shape in ((40, 5), (5, 5)))
    J = left * torch.logspace(0, -9, 5, dtype=torch.float64) @ right.mT
    x, processes = torch.randn(5, dtype=torch.float64), Processes(dist.group.WORLD)
    found = []
    for values in (100, 0):
        rows = SharedRows(Stack(processes, [30, 10]), DenseRows(J.split([30, 10])[rank]), None)
        space = ThinFactorisation(values=values).of(rows, 0.0, draw=0)
        found.append(space.vector(space.reduced.solve(-J @ x, torch.zeros_like(x), 1e-40)))
        torch.testing.assert_close(found[-1], x, rtol=1e-6, atol=1e-6)
    return torch.cat(found).numpy().tobytes()


def columns_of_the_gram_matrix(rank: int) -> list[bytes]:
    """N < n, or few columns do: these have the rounding of J Jᵀ."""
    few = PivotedQR(most=100), PivotedCholesky(most=1), RandomizedNystrom(), SketchedFactorisation(columns=50)
    ends = []
    for way, tolerance in zip((DenseFactorisation(), *few), (1e-10, *4 * [1e-7]), strict=True):
        options = {"loss": equation if tolerance < 1e-8 else curve, "factorisation": way, "tolerance": tolerance}
        options["steps"] = 2 if tolerance < 1e-8 else 1
        ends.append(same_steps(rank, lambda number: cut(points(16, number)), **options)[0])
    wide, by_shape = (lambda: net(50)), {"factorisation": ByShape(narrow=0), "tolerance": 1e-7, "steps": 1}
    columns, optimizer = same_steps(rank, lambda number: cut(points(160)), wide, **by_shape)
    assert optimizer.last_step.factorisation == "columns"
    sketched = {"factorisation": SketchedFactorisation(columns=1), "steps": 1, "tolerance": 1e-6}
    iterated, optimizer = same_steps(rank, lambda number: cut(points(40)), **sketched)
    assert optimizer.last_step.factorisation == "sketch"
    return [*ends, columns, iterated]


def written_out_in_other_units(rank: int) -> list[bytes]:
    """Column norms, and bounds on parameters."""
    few = lambda number: cut(points(40, number))
    size = flat(net()).numel()
    box = Box(flat(net()) - 0.1, torch.full((size,), 0.4).double().maximum(flat(net())))
    return [
        same_steps(rank, few, scaling=ColumnNorms())[0],
        same_steps(rank, few, scaling=ColumnNorms(), factorisation=DenseFactorisation(), steps=1)[0],
        same_steps(rank, few, box=box, steps=1)[0],
    ]


# --- what a process passes --------------------------------------------------------------------------------------


def points_drawn_anew(rank: int) -> list[bytes]:
    """... with earlier ones recalled, momentum and weight decay."""
    drawn = lambda number: cut(points(24, 10 + number))
    thin = {"factorisation": ThinFactorisation()}
    return [
        same_steps(rank, drawn, recall=EarlierDraws(), **thin)[0],
        same_steps(rank, drawn, lambda: net(20), recall=EarlierDraws(rows=30), **thin)[0],
        same_steps(rank, drawn, momentum=0.5, weight_decay=1e-3, max_step_norm=0.5, **thin)[0],
    ]


def nothing_in_one_process(rank: int) -> list[bytes]:
    """In this step or that; or rows of which there are none in it."""
    absent = lambda number: [points(24, number), points(0)][:: 1 if number % 2 else -1]
    without = same_steps(rank, absent, factorisation=ThinFactorisation(), weight_decay=1e-3)[0]
    ours, alone = net(), net()
    own = points(20)[: 20 if rank == 0 else 0]
    total = lambda model, x: (model(x) - x.exp()).square().sum()
    optimizer, reference = grouped(ours, LeastSquares), LeastSquares(alone.parameters())
    for _ in range(2):
        optimizer.step(lambda: total(ours, own))
        reference.step(lambda: total(alone, points(20)) / 2)
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    return [without, flat(ours).numpy().tobytes()]


def sums_and_means(rank: int) -> bytes:
    """Sums over all; and means over processes of what closures return, of different layers."""
    total = lambda model, x: (model(x) - x.exp()).square().sum()
    same_steps(rank, lambda number: cut(points(16, number)), loss=total, reduction=SumOverBatches(), steps=1)
    ours, alone = mlp(), mlp()
    X, Y = normal(12, 4), normal(12, 2, seed=1)
    first, second = (lambda m: squares(m, (X[:7], Y[:7]))), (lambda m: F.mse_loss(m[0](X[7:]), Y[7:].repeat(1, 3)))
    optimizer = grouped(ours, LeastSquares, weight_decay=0.1)
    reference = LeastSquares(alone.parameters(), weight_decay=0.1)
    for _ in range(2):
        value = optimizer.step([lambda: (second if rank else first)(ours)])
        expected = reference.step([lambda: first(alone) / 2, lambda: second(alone) / 2])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    return flat(ours).numpy().tobytes()


def data_parallel_models(rank: int) -> bytes:
    """In float32, by closures that call backward() and return something else."""
    ours, alone = net().float(), net().float()
    wrapped, x = nn.parallel.DistributedDataParallel(ours), points(20).float()
    optimizer, reference = grouped(wrapped, LeastSquares), LeastSquares(alone.parameters())

    def closure() -> float:
        loss = F.mse_loss(wrapped(x[10 * rank : 10 * rank + 10]), x[10 * rank : 10 * rank + 10])
        loss.backward()
        return 3.0 + rank

    for _ in range(3):
        assert float(optimizer.step(closure)) == 3.5
        reference.step(lambda: F.mse_loss(alone(x), x))
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-3, atol=1e-4)
    return flat(ours).numpy().tobytes()


def rows_of_layers_that_differ(rank: int) -> bytes:
    """A weight that a process uses once, and another twice: outer products; or so often that it is written out."""

    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 9), nn.Linear(9, 1)).double()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model[0](x).tanh()
        for _ in range(len(x) % 3 + 1):
            y = model[1](y).tanh()
        return (model[2](y) - x).square().mean()

    many = {"factorisation": DenseFactorisation(), "loss": loss}
    return same_steps(rank, lambda number: [points(9, number), points(7 + number, 5)], make, **many)[0]


# --- loss elsewhere, ends, faults -------------------------------------------------------------------------------


def checked_elsewhere(rank: int) -> list[float]:
    """The loss of check is that of all processes."""
    ours, alone, x, other = net(8), net(8), points(6), points(9, 3)
    own, elsewhere = x.split([4, 2])[rank], other.split([3, 6])[rank]
    noisy = lambda model, x: F.mse_loss(model(x), (1e3 * x).sin())
    optimizer, reference = grouped(ours, LeastSquares), LeastSquares(alone.parameters())
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverfittingWarning)
        for _ in range(3):
            check = MicroBatches(lambda b: noisy(ours, b), [elsewhere])
            optimizer.step(MicroBatches(lambda b: noisy(ours, b), [own]), check=check)
            ran = optimizer.last_step
            found += [ran.check_loss, ran.new_check_loss, ran.generalisation]
            if rank == 0:
                reference.step(lambda: noisy(alone, x), check=lambda: noisy(alone, other))
                wanted = reference.last_step
                assert math.isclose(ran.new_check_loss, wanted.new_check_loss, rel_tol=1e-4)
    other_kind = MicroBatches(lambda b: noisy(ours, b), [own])
    ours[0].bias.data += 1  # so that it is evaluated
    with pytest.raises(ValueError, match="process 0 takes a step on a check, a closure, process 1 on"):
        optimizer.step(lambda: noisy(ours, own), check=other_kind if rank else lambda: noisy(ours, own))
    with pytest.raises(ValueError, match="process 0 takes a step on a check, a closure, process 1 on a closure"):
        optimizer.step(lambda: noisy(ours, own), check=None if rank else lambda: noisy(ours, own))
    return found[1:]


def at_stationary_points(rank: int) -> list[bytes]:
    """Converged; and out of a saddle."""
    w = nn.Parameter(torch.ones(2).double())
    optimizer = LeastSquares([w], process_group=dist.group.WORLD)
    while len(ends := [optimizer.last_step]) and (ends[0] is None or ends[0].outcome is StepOutcome.ACCEPTED):
        optimizer.step(lambda: (w[rank] - 3).square())
    assert optimizer.last_step.outcome is StepOutcome.CONVERGED
    v = nn.Parameter(torch.zeros(2).double())
    optimizer = LeastSquares([v], process_group=dist.group.WORLD)
    optimizer.step(lambda: (v[rank].square() - 1).square())
    assert optimizer.last_step.new_loss < optimizer.last_step.loss
    return [w.detach().numpy().tobytes(), v.detach().numpy().tobytes()]


def many_steps(rank: int) -> bytes:
    """At points that each process draws for itself: beyond where closures have been seen to run again."""
    model = net()
    optimizer = grouped(model, LeastSquares, momentum=0.3, recall=EarlierDraws(rows=20), average=ExponentialAverage())
    for step in range(10):
        x = points(5 + rank, 2 * step + rank)
        optimizer.step(lambda x=x: curve(model, x))
    with optimizer.averaged():
        return flat(model).numpy().tobytes()


def leaves_together(rank: int, at: int, wrong: float | Exception) -> str:
    """A fault in process 1 ends the step in both, with parameters as they were; the next step is taken."""
    model, count = net(), iter(range(100))
    optimizer, before, random = grouped(model, LeastSquares), flat(model), torch.get_rng_state()
    loss = lambda: curve(model, points(6, rank)) + 0 * torch.rand(()).square()

    def faulty() -> Tensor:
        if rank == 1 and next(count) == at:
            if isinstance(wrong, Exception):
                raise wrong
            return loss() * wrong
        return loss()

    said = ""
    if isinstance(wrong, Exception):
        with pytest.raises(type(wrong) if rank == 1 else OtherProcessError) as caught:
            optimizer.step(faulty)
        said = str(caught.value)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(flat(model), before)
    else:
        optimizer.step(faulty)
        assert optimizer.last_step.accepted is (at > 0)
        assert at > 0 or torch.equal(flat(model), before)
    optimizer.step(loss)
    assert optimizer.last_step.accepted
    return said


def faults(rank: int) -> list[str]:
    leaves_together(rank, 0, torch.nan)
    leaves_together(rank, 1, torch.nan)
    return [leaves_together(rank, at, ZeroDivisionError("no such thing")) for at in (0, 1)]


def outside_the_domain(rank: int) -> bytes:
    """A trial that fails in one process is one that failed, in both."""
    model, count = net(), iter(range(100))
    optimizer = grouped(model, LeastSquares)

    def closure() -> Tensor:
        if rank == 1 and next(count) == 2:
            torch.linalg.cholesky(-torch.eye(2))
        return curve(model, points(9, rank))

    optimizer.step(closure)
    assert optimizer.last_step.accepted
    return flat(model).numpy().tobytes()


def refused(rank: int) -> dict[str, str]:
    model = net()
    closure = lambda: curve(model, points(9, rank))
    told = partial(said, model)

    of = lambda **options: grouped(model, LeastSquares, **options)
    found = {
        "options": told(lambda: of(factorisation=ByShape(narrow=rank)).step(closure)),
        "no data": told(lambda: of().step(MicroBatches(lambda b: closure(), []))),
    }
    curved = lambda: closure().exp() if rank == 1 else closure()
    found["no squares"] = told(lambda: of().step(curved), ValueError if rank else OtherProcessError)

    def summed() -> Tensor:
        x = points(9, rank)
        outputs = model(x)
        dist.all_reduce(outputs)
        return (outputs - x).square().mean()

    found["collective"] = told(lambda: of().step(summed), RuntimeError)
    start = model[0].weight.detach().clone()

    def changing() -> Tensor:
        more = bool((model[0].weight != start).any())
        return (model(points(9, rank)) - 1)[: 5 + more].square().sum()

    found["numbers"] = told(lambda: of().step(changing))
    handle = model[0].weight.register_hook(lambda g: 0 * g)
    found["hooks"] = told(lambda: of().step(closure))
    handle.remove()
    handle = model[0].weight.register_hook(lambda g: None)
    of().step(closure)
    handle.remove()
    return found


CHECKS = [
    triangles,
    as_accurate_as_their_condition,
    columns_of_the_gram_matrix,
    written_out_in_other_units,
    points_drawn_anew,
    nothing_in_one_process,
    sums_and_means,
    data_parallel_models,
    rows_of_layers_that_differ,
    checked_elsewhere,
    at_stationary_points,
    many_steps,
    faults,
    outside_the_domain,
    refused,
]


two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    first, second = succeeded(two[check])
    assert first == second or check in ("faults", "refused")


def test_what_processes_are_told(two: Outcomes) -> None:
    (elsewhere, own), (refusals, also) = two["faults"], two["refused"]
    assert set(own) == {"no such thing"}
    assert all("process 1 of 2 failed" in text and "ZeroDivisionError: no such thing" in text for text in elsewhere)
    words = {
        "options": "other options or another state",
        "no data": "none in any process",
        "no squares": "not recognised as a sum of squares",
        "numbers": "torch.where(mask, r, 0.0)",
        "collective": "do exchanges outside of it",
        "hooks": "a hook changes the gradient",
    }
    all_are_told([refusals, also], words)


# --- another number of processes --------------------------------------------------------------------------------

OPTIONS = {"momentum": 0.5, "recall": EarlierDraws(), "factorisation": ThinFactorisation()}


def some_steps(optimizer: LeastSquares, model: nn.Module, rank: int, size: int, numbers: range) -> None:
    for number in numbers:
        own = points(24, number).tensor_split(size)[rank]
        optimizer.step(MicroBatches(lambda b: equation(model, b), [own]))
        assert optimizer.last_step.accepted


def four_steps(rank: int) -> list[bytes]:
    """Dense for one network of a few more rows than processes; then some to be saved."""
    end, _ = same_steps(rank, lambda number: cut(points(8, number)), factorisation=DenseFactorisation(), steps=1)
    model = net()
    optimizer = grouped(model, LeastSquares, **OPTIONS)
    some_steps(optimizer, model, rank, 4, range(2))
    state = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), state)
    return [end, flat(model).numpy().tobytes(), state.getvalue()]


def resumed_by(size: int, state: bytes) -> Callable[[int], bytes]:
    """Two steps from a state that was saved once."""

    def resumed(rank: int) -> bytes:
        model = net()
        optimizer = grouped(model, LeastSquares, **OPTIONS) if size > 1 else LeastSquares(model.parameters(), **OPTIONS)
        weights, saved = torch.load(io.BytesIO(state))
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        some_steps(optimizer, model, rank, size, range(2, 4))
        return flat(model).numpy().tobytes()

    return resumed


def test_a_state_goes_on_with_another_number_of_processes() -> None:
    first, *others = succeeded(launch(4, four_steps)["four_steps"])
    assert all(other[:2] == first[:2] for other in others)
    one, two, other = resumed_by(1, first[2])(0), *succeeded(launch(2, resumed_by(2, others[1][2]))["resumed"])
    assert two == other
    values = [torch.frombuffer(bytearray(of), dtype=torch.float64) for of in (one, two)]
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-8)
