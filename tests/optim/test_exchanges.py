"""Closures that exchange tensors with those of other processes: the steps of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiated
import torch.nn.functional as F
from optim_cases import normal
from shared_cases import flat, grouped, mlp, squares, succeeded
from torch import Tensor, nn

from imstep.complexstep import UnsupportedOperatorError
from imstep.curvature import Hessian
from imstep.optim import ExactHessian, MicroBatches, NewtonKrylov, NoPreconditioning
from tests.launching import Outcomes, outcomes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")

X, Y = normal(8, 4), normal(8, 2, seed=1)
HALF = slice(0, 4), slice(4, 8)


def same_steps(
    rank: int,
    own: Callable[[nn.Module, slice], Tensor],
    whole: Callable[[nn.Module], Tensor],
    make: Callable[[bool], nn.Module] = lambda ours: mlp(),
    **options: Any,
) -> tuple[bytes, nn.Module, nn.Module]:
    options = {"preconditioning": NoPreconditioning(), **options}
    ours, alone = make(True), make(False)
    optimizer, reference = grouped(ours, **options), NewtonKrylov(alone.parameters(), **options)
    for _ in range(2):
        value = optimizer.step(lambda: own(ours, HALF[rank]))
        torch.testing.assert_close(value, reference.step(lambda: whole(alone)), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.cost.products > 0
    return flat(ours).numpy().tobytes(), ours, alone


def contrastive(rank: int) -> list[bytes]:
    """Each example is to be told from those of all processes."""
    loss = lambda z, every, labels: F.cross_entropy(z @ every.t(), labels)
    whole = lambda m: loss(m(X), m(X), torch.arange(8))

    def gathered(gather: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, slice], Tensor]:
        def own(model: nn.Module, part: slice) -> Tensor:
            z = model(X[part])
            return loss(z, gather(z), torch.arange(part.start, part.stop))

        return own

    by_nn = gathered(lambda z: torch.cat(differentiated.all_gather(z)))
    by_functional = gathered(lambda z: functional.all_gather_tensor_autograd(z, 0, dist.group.WORLD))
    return [
        same_steps(rank, by_nn, whole)[0],
        same_steps(rank, by_functional, whole)[0],
        same_steps(rank, by_nn, whole, curvature=ExactHessian())[0],
    ]


def sums_means_shares_and_copies(rank: int) -> list[bytes]:
    def summed(model: nn.Module, part: slice) -> Tensor:
        total = (model(X[part]) - Y[part]).square().sum()
        return functional.all_reduce(total, "sum", dist.group.WORLD).sqrt()

    def averaged(model: nn.Module, part: slice) -> Tensor:
        z = model(X[part])
        return (z - differentiated.all_reduce(z.mean(0), dist.ReduceOp.AVG) + 1).square().mean()

    def shared(model: nn.Module, part: slice) -> Tensor:
        z = model(X[part])
        pieces = [z[:2].contiguous(), z[2:].contiguous()]
        return differentiated.reduce_scatter(torch.empty_like(pieces[0]), pieces).square().mean()

    def copied(model: nn.Module, part: slice) -> Tensor:
        z = model(X[part])
        return (z - differentiated.broadcast(z, 1) - Y[part]).square().mean()

    both = lambda m: (m(X[HALF[0]]), m(X[HALF[1]]))
    return [
        same_steps(rank, summed, lambda m: (m(X) - Y).square().sum().sqrt())[0],
        same_steps(rank, averaged, lambda m: (m(X) - m(X).mean(0) + 1).square().mean())[0],
        same_steps(rank, shared, lambda m: sum(both(m)).square().mean())[0],
        same_steps(rank, copied, lambda m: (m(X) - both(m)[1].repeat(2, 1) - Y).square().mean())[0],
    ]


def batch_normalisation(rank: int) -> list[bytes]:
    def make(ours: bool) -> nn.Module:
        torch.manual_seed(4)
        layers = nn.Conv2d(1, 2, 2, padding=1, stride=2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
        model = nn.Sequential(*layers).double()
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if ours else model

    pictures = X.reshape(-1, 1, 2, 2)
    own = lambda model, part: squares(model, (pictures[part], Y[part]))
    whole = lambda model: own(model, slice(0, 8))
    plain, ours, alone = same_steps(rank, own, whole, make)
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)
    ours.eval()
    torch.testing.assert_close(ours(pictures), alone.eval()(pictures), rtol=1e-10, atol=1e-10)
    return [plain, same_steps(rank, own, whole, make, preconditioning=None)[0]]


def refused(rank: int) -> dict[str, str]:
    model = mlp()
    every = lambda z: torch.cat(differentiated.all_gather(z))
    coupled = lambda batch=(X[:2], Y[:2]): (every(model(batch[0])) - every(batch[1])).square().mean()

    def said(step: Callable[[], Any]) -> str:
        before = flat(model)
        with pytest.raises((ValueError, UnsupportedOperatorError)) as caught:
            step()
        assert torch.equal(flat(model), before)
        return str(caught.value)

    step = lambda closure: grouped(model).step(closure)
    uneven = MicroBatches(coupled, [(X[:2], Y[:2])], reduction=None)
    uneven.count = 2.0 + rank
    in_place = lambda: (model(X[:2]), dist.all_reduce(model(X[:2])))[0].sum()
    greatest = lambda: functional.all_reduce(model(X[:2]), "max", dist.group.WORLD).sum()
    return {
        "alone": said(lambda: NewtonKrylov(model.parameters()).step(coupled)),
        "uneven": said(lambda: step(uneven)),
        "pieces": said(lambda: step([coupled, coupled])),
        "operator": said(lambda: Hessian.over([(X, Y)], coupled, model, process_group=dist.group.WORLD).gradient),
        "in place": said(lambda: step(in_place)),
        "max": said(lambda: step(greatest)),
        "op": said(lambda: step(lambda: differentiated.all_reduce(model(X), dist.ReduceOp.MAX).sum())),
        "others": said(lambda: step(lambda: differentiated.reduce(model(X), 0).sum())),
    }


CHECKS = [contrastive, sums_means_shares_and_copies, batch_normalisation, refused]
two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    first, second = succeeded(two[check])
    assert first == second


def test_refusals_say_what_to_do(two: Outcomes) -> None:
    said = succeeded(two["refused"])[0]
    for name, words in {
        "alone": "Its optimizer or operator knows of one process.",
        "uneven": "Its processes do not count the same",
        "pieces": "or evaluate pieces",
        "operator": "Its processes do not count the same",
        "in place": "torch.distributed.nn.functional.all_reduce, all_gather",
        "max": "Take the sum, and divide by their number.",
        "op": "Take ReduceOp.SUM or AVG",
        "others": "which is not differentiated twice. Take all_reduce",
    }.items():
        assert words in said[name], name
