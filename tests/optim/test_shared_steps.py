"""Steps whose batch is spread over processes: those of one process on the whole batch, the same in all of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared_cases import Batch, X, Y, flat, grouped, mlp, parts, squares, succeeded
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader, TensorDataset

from imstep import methods
from imstep.curvature import Empirical, MonteCarlo, SumOverBatches
from imstep.curvature.kronecker_blocks import Block, FactoredDamping, TikhonovDamping, Work
from imstep.linalg import KrylovStatus, NoiseTest
from imstep.optim import (
    ChebyshevHalley,
    ConjugateGradient,
    ExactHessian,
    ExponentialAverage,
    FisherCurvature,
    GrowingBatches,
    Kronecker,
    KroneckerEigenbasis,
    LimitedMemoryBFGS,
    MicroBatches,
    NewtonKrylov,
    NoPreconditioning,
    SophiaG,
)
from tests.launching import Outcomes, launch, outcomes

LABELS = torch.arange(12) % 3
Loss = Callable[[nn.Module, Batch], Tensor]


def same_steps(
    rank: int,
    make: Callable[[], nn.Module],
    loss: Loss,
    batch: Batch = (X, Y),
    steps: int = 3,
    joined: bool = True,
    kind: Any = NewtonKrylov,
    **options: Any,
) -> bytes:
    """Compare steps of all processes with those of one on the whole batch; returns where they lead, bit for bit.

    Process 0 does so, and the others are to be where it is.
    """
    ours, alone = make(), make()
    every = parts(batch, dist.get_world_size())
    optimizer, reference = grouped(ours, kind, **options), kind(alone.parameters(), **options)
    whole = (lambda: loss(alone, batch)) if joined else MicroBatches(lambda b: loss(alone, b), every)
    for _ in range(steps):
        value = optimizer.step(MicroBatches(lambda b: loss(ours, b), [every[rank]]))
        if rank == 0:
            with torch.random.fork_rng(devices=[]):
                expected = reference.step(whole)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    assert optimizer.last_step.accepted
    return torch.cat([flat(ours), value.reshape(1)]).numpy().tobytes()


# --- the step is that of one process on the whole batch ---------------------------------------------------------


def multilayer_perceptron(rank: int) -> bytes:
    return same_steps(rank, mlp, squares, weight_decay=1e-3)


def classifier(rank: int) -> bytes:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()

    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    same_steps(rank, make, loss, (X, LABELS), steps=1)  # later the factors of normalised layers amplify rounding
    return same_steps(rank, make, loss, (X, LABELS), preconditioning=NoPreconditioning())


def convolutions_with_batch_normalisation(rank: int) -> bytes:
    """Each process normalises by its own part, as each piece of micro-batches is."""

    def make(norm: bool = True) -> nn.Module:
        torch.manual_seed(4)
        layers = nn.BatchNorm2d(2) if norm else nn.Identity(), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
        return nn.Sequential(nn.Conv2d(1, 2, 2, padding=1, stride=2), *layers).double()

    batch = X.reshape(12, 1, 2, 2), Y
    same_steps(rank, lambda: make(norm=False), squares, batch)
    return same_steps(rank, make, squares, batch, joined=False, preconditioning=NoPreconditioning())


def transformer(rank: int) -> bytes:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(3, 4)
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.end = nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.end(self.layer(self.tokens(tokens)))

    def make() -> nn.Module:
        torch.manual_seed(5)
        return Small().double()

    tokens = torch.arange(36).reshape(12, 3) ** 2 % 5 % 3
    loss = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())
    return same_steps(rank, make, loss, (tokens, tokens.roll(1, 1)), steps=2)


def physics_informed(rank: int) -> bytes:
    def make() -> nn.Module:
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope + u).square().mean() + 10 * (model(0 * batch[1]) - 1).square().mean()

    points = torch.linspace(0, 1, 12).double()[:, None]
    return same_steps(rank, make, loss, (points, points))


def other_configurations(rank: int) -> list[bytes]:
    plain = {"preconditioning": NoPreconditioning()}
    return [
        same_steps(rank, mlp, squares, kind=NewtonKrylov.for_batches, variance_every=1),
        same_steps(rank, mlp, squares, steps=2, curvature=ExactHessian(), momentum=True, weight_decay=0.1),
        same_steps(rank, mlp, squares, steps=2, solver=ChebyshevHalley(), weight_decay=0.1, **plain),
        same_steps(rank, mlp, squares, preconditioning=LimitedMemoryBFGS()),
        same_steps(rank, mlp, squares, preconditioning=KroneckerEigenbasis(every=1, basis_every=2)),
    ]


def fixed_rates(rank: int) -> list[bytes]:
    """Diagonals of curvature, and factors of gradients; by targets that are those of one process."""
    labels = X, LABELS % 2
    entropy = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    ends = [
        same_steps(rank, mlp, squares, steps=2, kind=methods.adahessian, weight_decay=0.1),
        same_steps(rank, mlp, entropy, labels, steps=2, kind=methods.sophia, rule=SophiaG(every=1)),
        same_steps(rank, mlp, squares, steps=2, kind=methods.kl_shampoo, average=ExponentialAverage()),
        same_steps(rank, mlp, squares, steps=2, kind=methods.shampoo),
    ]
    ours, alone = mlp(), mlp()
    optimizer, reference = grouped(ours, methods.sophia), methods.sophia(alone.parameters())
    for _ in range(2):  # of several pieces in one process, and none in the other
        optimizer.step(MicroBatches(lambda b: squares(ours, b), parts((X, Y)) if rank else []))
        reference.step(MicroBatches(lambda b: squares(alone, b), parts((X, Y))))
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    return [*ends, flat(ours).numpy().tobytes()]


def shared_inverses(rank: int) -> tuple[bytes, list[int]]:
    """Each factor is inverted in one process; returns the rows of those that were inverted here in one step."""
    done: list[int] = []

    class Counted(FactoredDamping):
        def work(self, block: Block, damping: float) -> list[Work]:
            note = lambda work: (done.append(len(work.factor)), work.compute())[1]
            return [replace(work, compute=partial(note, work)) for work in super().work(block, damping)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imstep.curvature.shared_inverses.WORTH_SENDING", 4)
        same_steps(rank, mlp, squares, preconditioning=Kronecker(damping=TikhonovDamping()))
        ends = same_steps(rank, mlp, squares)
        model = mlp()
        grouped(model, preconditioning=Kronecker(damping=Counted())).step(lambda: squares(model, (X, Y)))
    return ends, done


def growing_batches(rank: int) -> bytes:
    """A loader in each process, whose batches are parts of those of one process."""
    ours, alone = mlp(), mlp()
    options = {"preconditioning": NoPreconditioning(), "variance_every": 1}
    optimizer, reference = grouped(ours, **options), NewtonKrylov(alone.parameters(), **options)
    data = TensorDataset(X, Y)
    parts_of = GrowingBatches(12, size=3, window=2, process_group=dist.group.WORLD)
    wholes = GrowingBatches(12, size=3, window=2)
    for _ in range(2):
        loaders = DataLoader(data, batch_sampler=parts_of), DataLoader(data, batch_sampler=wholes)
        for own, whole in zip(*loaders, strict=True):
            optimizer.step(MicroBatches(lambda b: squares(ours, b), [own]))
            reference.step(MicroBatches(lambda b: squares(alone, b), [whole]))
            parts_of.observe(optimizer.last_step, len(own[0]))
            wholes.size = parts_of.size  # the variance is measured by other halves
    assert parts_of.size > 3
    torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-8, atol=1e-8)
    for numbers in ({"seed": rank}, {"largest": 1, "size": 1}):
        with pytest.raises(ValueError, match=r"different numbers|leave nothing to some"):
            GrowingBatches(**{"examples": 12, "size": 3, "process_group": dist.group.WORLD, **numbers})
    assert [len(batch) > 0 for batch in GrowingBatches(5, size=2, process_group=dist.group.WORLD)] == [True] * 2
    return flat(ours).numpy().tobytes()


def natural_gradients(rank: int) -> bytes:
    """Fisher matrices of single cases are summed over processes, of targets that each draws for itself."""
    options = {"preconditioning": NoPreconditioning(), "weight_decay": 0.1}
    same_steps(rank, mlp, squares, steps=2, curvature=FisherCurvature(Empirical()), **options)
    model = mlp()
    optimizer = grouped(model, curvature=FisherCurvature(MonteCarlo()), **options)
    for _ in range(3):
        optimizer.step(MicroBatches(lambda b: squares(model, b), [parts((X, Y))[rank]]))
    assert optimizer.last_step.accepted
    return flat(model).numpy().tobytes()


def noise_between_halves(rank: int) -> bytes:
    """The halves are those of every process's part; a test that nothing passes ends the solve at once."""
    options = {"weight_decay": 0.1, "preconditioning": NoPreconditioning()}
    ends = same_steps(rank, mlp, squares, steps=2, solver=ConjugateGradient(noise=NoiseTest()), **options)
    model = mlp()
    optimizer = grouped(model, solver=ConjugateGradient(noise=NoiseTest(z=1e6)), **options)
    optimizer.step(MicroBatches(lambda b: squares(model, b), [parts((X, Y))[rank]]))
    assert optimizer.last_step.status is KrylovStatus.DISTURBING_NOISE
    return ends


# --- what a process passes --------------------------------------------------------------------------------------


def sums(rank: int) -> None:
    ours, alone = mlp(), mlp()
    add = lambda model, b: F.mse_loss(model(b[0]), b[1], reduction="sum")
    own = MicroBatches(lambda b: add(ours, b), [parts((X, Y))[rank]], reduction=SumOverBatches())
    grouped(ours, weight_decay=0.1).step(own)
    NewtonKrylov(alone.parameters(), weight_decay=0.1).step(lambda: add(alone, (X, Y)))
    torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)


def means_of_closures(rank: int) -> None:
    ours, alone = mlp(), mlp()
    own = X[rank::2], Y[rank::2]
    for closure in (lambda: squares(ours, own), [lambda: squares(ours, own) / 2] * 2):
        grouped(ours, preconditioning=NoPreconditioning()).step(closure)
        NewtonKrylov(alone.parameters(), preconditioning=NoPreconditioning()).step(lambda: squares(alone, (X, Y)))
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)


def nothing_in_one_process(rank: int) -> bytes:
    """... and several pieces in the other."""
    ours, alone = mlp(), mlp()
    options = {"weight_decay": 0.1, "preconditioning": NoPreconditioning(), "variance_every": 1}
    optimizer = grouped(ours, average=ExponentialAverage(), **options)
    reference = NewtonKrylov(alone.parameters(), **options)
    for _ in range(2):
        loss = optimizer.step(MicroBatches(lambda b: squares(ours, b), parts((X, Y)) if rank else []))
        torch.testing.assert_close(loss, reference.step(lambda: squares(alone, (X, Y))))
    torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    fresh = mlp()
    with_factors = grouped(fresh)
    for _ in range(3):
        with_factors.step(MicroBatches(lambda b: squares(fresh, b), parts((X, Y)) if rank else []))
    assert with_factors.last_step.loss < float(squares(mlp(), (X, Y)).detach())
    return flat(fresh).numpy().tobytes()


def part_for_curvature(rank: int) -> None:
    ours, alone = mlp(), mlp()
    own, few = (X[rank::2], Y[rank::2]), (X[rank:4:2], Y[rank:4:2])
    options = {"preconditioning": NoPreconditioning(), "weight_decay": 0.1}
    grouped(ours, **options).step(lambda: squares(ours, own), lambda: squares(ours, few))
    NewtonKrylov(alone.parameters(), **options).step(
        lambda: squares(alone, (X, Y)), lambda: squares(alone, (X[:4], Y[:4]))
    )
    torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)


def unused_parameters(rank: int) -> bytes:
    """A parameter that one process alone uses decays as one that all use."""

    def loss(model: nn.Module, b: Batch) -> Tensor:
        return squares(model[0] if len(b[0]) > 6 else model, b)

    def make() -> nn.Module:
        return nn.Sequential(mlp(), nn.Linear(2, 2).double().requires_grad_())

    torch.manual_seed(0)
    layer = nn.Linear(2, 2).double()
    model, alone = nn.Sequential(mlp(), layer), nn.Sequential(mlp(), nn.Linear(2, 2).double())
    alone[1].load_state_dict(layer.state_dict())
    options = {"weight_decay": 0.1, "preconditioning": NoPreconditioning()}
    every = parts((X, Y))
    grouped(model, **options).step(MicroBatches(lambda b: loss(model, b), [every[rank]]))
    reversed_pieces = MicroBatches(lambda b: loss(alone, b), every[::-1])  # the first decides what decays
    NewtonKrylov(alone.parameters(), **options).step(reversed_pieces)
    torch.testing.assert_close(flat(model), flat(alone), rtol=1e-10, atol=1e-10)
    return flat(model).numpy().tobytes()


def data_parallel_models(rank: int) -> bytes:
    ours, alone = mlp(), mlp()
    wrapped = nn.parallel.DistributedDataParallel(ours)
    optimizer, reference = grouped(wrapped, weight_decay=0.1), NewtonKrylov(alone.parameters(), weight_decay=0.1)
    wrapped(X).sum()  # with a graph, which leaves its reducer waiting for a backward pass

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squares(wrapped, (X[6 * rank : 6 * rank + 6], Y[6 * rank : 6 * rank + 6]))
        loss.backward()
        return loss

    for _ in range(3):
        torch.testing.assert_close(optimizer.step(closure), reference.step(lambda: squares(alone, (X, Y))))
        torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[0].weight.grad, alone[0].weight.grad)
    with pytest.raises(ValueError, match="Leave Join out"), Join([wrapped]):
        optimizer.step(closure)
    return flat(ours).numpy().tobytes()


def many_steps(rank: int) -> bytes:
    torch.manual_seed(rank)  # masks of dropout differ, decisions do not
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 2)).double()
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    optimizer = grouped(model, NewtonKrylov.for_batches)
    for step in range(25):
        own = X[(step + rank) % 5 :: 2], Y[(step + rank) % 5 :: 2]
        optimizer.step(MicroBatches(lambda b: squares(model, b), [own]))
    return flat(model).numpy().tobytes()


CHECKS = [
    multilayer_perceptron,
    classifier,
    convolutions_with_batch_normalisation,
    transformer,
    physics_informed,
    other_configurations,
    fixed_rates,
    shared_inverses,
    growing_batches,
    natural_gradients,
    noise_between_halves,
    sums,
    means_of_closures,
    nothing_in_one_process,
    part_for_curvature,
    unused_parameters,
    data_parallel_models,
    many_steps,
]


two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    first, second = succeeded(two[check])
    assert first == second or check == "shared_inverses"


def test_each_factor_is_inverted_once(two: Outcomes) -> None:
    """Of a network 4-6-2 factors have 5, 6, 7 and 2 rows, of which the least is not worth sending."""
    (ends, first), (same, second) = succeeded(two["shared_inverses"])
    assert ends == same
    assert (sorted(first), sorted(second)) == ([2, 7], [2, 5, 6])


# --- another number of processes --------------------------------------------------------------------------------

DECAYED = {"weight_decay": 1e-3, "average": ExponentialAverage()}


def four_steps(rank: int) -> list[bytes]:
    transformer(rank)
    model = mlp()
    optimizer = grouped(model, **DECAYED)
    for _ in range(3):
        optimizer.step(MicroBatches(lambda b: squares(model, b), [parts((X, Y), 4)[rank]]))
    state = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), state)
    return [flat(model).numpy().tobytes(), state.getvalue()]


def resumed_by(size: int, state: bytes) -> Callable[[int], bytes]:
    """Two steps from a state that was saved once."""

    def resumed(rank: int) -> bytes:
        model = mlp()
        optimizer = grouped(model, **DECAYED) if size > 1 else NewtonKrylov(model.parameters(), **DECAYED)
        weights, saved = torch.load(io.BytesIO(state))
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        own = [parts((X, Y), size)[rank]] if size > 1 else [(X, Y)]
        for _ in range(2):
            optimizer.step(MicroBatches(lambda b: squares(model, b), own))
        with optimizer.averaged():
            return flat(model).numpy().tobytes()

    return resumed


def test_a_state_goes_on_with_another_number_of_processes() -> None:
    saved = succeeded(launch(4, four_steps)["four_steps"])
    assert all(one == saved[0] for one in saved)  # any process may save
    one, two, other = resumed_by(1, saved[0][1])(0), *succeeded(launch(2, resumed_by(2, saved[0][1]))["resumed"])
    assert two == other
    values = [torch.frombuffer(bytearray(of), dtype=torch.float64) for of in (one, two)]
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-8)
