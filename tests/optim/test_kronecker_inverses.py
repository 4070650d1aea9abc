"""K-FAC and E-KFAC as preconditioners and steps: against their papers' formulas from gradients of single cases."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep import NewtonKrylov, methods
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenPieces, Linearised, Piece
from imstep.linalg import DiagonalOperator
from imstep.optim import FactoredDamping, Kronecker, KroneckerEigenbasis, MicroBatches, TikhonovDamping
from imstep.optim.preconditioning import Evidence, Preconditioner

Layer = tuple[Tensor, Tensor, Tensor]


def refreshed(preconditioner: Preconditioner, vector: ParameterVector, frozen: FrozenClosure | FrozenPieces) -> None:
    observer = preconditioner.observer()
    point: Linearised = frozen.linearise(observer)
    preconditioner.refresh(Evidence(point, observer, DiagonalOperator(torch.ones(vector.size, dtype=F64)), 0.1))


def cases(net: nn.Module, generator: torch.Generator, x: Tensor = X, n: int = 30) -> list[Layer]:
    """Per layer: gradients D (N, out, in + 1) of single cases with drawn labels, a (N, in + 1), g (N, out)."""
    labels = torch.multinomial(net(x).detach().softmax(1), 1, generator=generator).squeeze(1)
    found: list[list[Layer]] = [[], []]
    for row, label in zip(x, labels, strict=True):
        hidden = net[1](net[0](row)).detach()
        loss = F.cross_entropy(net(row)[None], label[None]) / math.sqrt(n)
        w1, b1, w2, b2 = torch.autograd.grad(loss, list(net.parameters()))
        for at, (w, b, a) in enumerate([(w1, b1, row), (w2, b2, hidden)]):
            found[at].append((torch.cat([w, b[:, None]], 1), torch.cat([a, a.new_ones(1)]), b))
    return [tuple(map(torch.stack, zip(*layer, strict=True))) for layer in found]  # type: ignore[misc]


def applied(blocks: list[Tensor], v: Tensor) -> Tensor:
    """Dense blocks of the layers, in row-major order with the bias as a last column, times a vector."""
    parts = v.split([24, 6, 18, 3])
    made = []
    for block, w, b in zip(blocks, parts[::2], parts[1::2], strict=True):
        matrix = torch.cat([w.view(len(b), -1), b[:, None]], 1)
        image = (block @ matrix.reshape(-1)).view_as(matrix)
        made += [image[:, :-1].reshape(-1), image[:, -1]]
    return torch.cat(made)


def eigenvectors(layer: Layer) -> Tensor:
    _, a, g = layer
    return torch.kron(torch.linalg.eigh(g.T @ g)[1], torch.linalg.eigh(a.T @ a / len(a))[1])


def test_one_refresh_is_algorithm_1_of_e_kfac() -> None:
    net, v = network(), normal(51, seed=3)
    vector = ParameterVector(net)
    preconditioner = KroneckerEigenbasis(seed=7).make(vector)
    refreshed(preconditioner, vector, FrozenClosure(lambda: F.cross_entropy(net(X), LABELS), vector))
    layers = cases(net, torch.Generator().manual_seed(7))
    for damping in (0.1, 0.15, 10.0):
        blocks = []
        for layer in layers:
            U, D = eigenvectors(layer), layer[0].flatten(1)
            s = ((D @ U) ** 2).sum(0)
            blocks.append(U @ torch.diag(1 / (s + damping)) @ U.T)
        found = preconditioner.operator(damping)
        assert found is not None
        if damping != 0.15:  # an inverse serves dampings that are near
            torch.testing.assert_close(found @ v, applied(blocks, v), rtol=1e-9, atol=1e-10)
    fisher = [layer[0].flatten(1).T @ layer[0].flatten(1) for layer in layers]
    for layer, exact in zip(layers, fisher, strict=True):  # nearer in Frobenius norm than K-FAC, the paper's point
        U, D = eigenvectors(layer), layer[0].flatten(1)
        kron = torch.kron(layer[2].T @ layer[2], layer[1].T @ layer[1] / 30)
        assert (U @ torch.diag(((D @ U) ** 2).sum(0)) @ U.T - exact).norm() <= (kron - exact).norm()


@pytest.mark.parametrize("damping", [FactoredDamping(), TikhonovDamping()])
def test_dampings_of_k_fac(damping: FactoredDamping | TikhonovDamping) -> None:
    net, v, value = network(), normal(51, seed=3), 0.1
    vector = ParameterVector(net)
    preconditioner = Kronecker(seed=7, damping=damping).make(vector)
    refreshed(preconditioner, vector, FrozenClosure(lambda: F.cross_entropy(net(X), LABELS), vector))
    blocks = []
    for _, a, g in cases(net, torch.Generator().manual_seed(7)):
        A, G = a.T @ a / 30, g.T @ g
        if isinstance(damping, TikhonovDamping):
            blocks.append(torch.linalg.inv(torch.kron(G, A) + value * torch.eye(len(A) * len(G), dtype=F64)))
        else:
            pi = float((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
            A, G = (m + s * torch.eye(len(m), dtype=F64) for m, s in ((A, pi * value**0.5), (G, value**0.5 / pi)))
            blocks.append(torch.kron(torch.linalg.inv(G), torch.linalg.inv(A)))
    torch.testing.assert_close(preconditioner.operator(value) @ v, applied(blocks, v), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("basis_every", [1, 3])
def test_moments_are_averaged_in_eigenvectors_old_and_new(basis_every: int) -> None:
    net, v, decay = network(), normal(51, seed=3), 0.5
    vector, x = ParameterVector(net), normal(30, 4, seed=9)
    preconditioner = KroneckerEigenbasis(seed=7, decay=decay, basis_every=basis_every, every=1).make(vector)
    generator, averages, U, s = torch.Generator().manual_seed(7), None, [None, None], [None, None]
    for step, data in enumerate([X, x, x]):
        preconditioner._steps = preconditioner._due  # due in every step
        closure = lambda data=data: F.cross_entropy(net(data), LABELS)
        refreshed(preconditioner, vector, FrozenClosure(closure, vector))
        keep = min(1 - 1 / (step + 1), decay)
        layers = cases(net, generator, data)
        new = [(a.T @ a / 30, g.T @ g) for _, a, g in layers]
        averages = new if averages is None else [
            tuple(keep * old + (1 - keep) * n for old, n in zip(o, m, strict=True))
            for o, m in zip(averages, new, strict=True)
        ]  # fmt: skip
        for at, ((D, *_), (A, G)) in enumerate(zip(layers, averages, strict=True)):
            if step % basis_every == 0:
                fresh = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
                if s[at] is not None:
                    s[at] = (fresh.T @ (U[at] @ torch.diag(s[at]) @ U[at].T) @ fresh).diagonal()
                U[at] = fresh
            squares = ((D.flatten(1) @ U[at]) ** 2).sum(0)
            s[at] = squares if s[at] is None else keep * s[at] + (1 - keep) * squares
    blocks = [u @ torch.diag(1 / (m + 0.1)) @ u.T for u, m in zip(U, s, strict=True)]
    torch.testing.assert_close(preconditioner.operator(0.1) @ v, applied(blocks, v), rtol=1e-8, atol=1e-9)


def test_a_batch_in_equal_pieces_keeps_their_cases_apart() -> None:
    """As one batch, but for targets: on squared errors of one output the squares of sampled gradients do not vary."""
    net = nn.Sequential(nn.Linear(4, 1)).to(F64)
    y, v, vector = normal(30, 1, seed=2), normal(5), ParameterVector(net)
    found = []
    for parts in ([slice(0, 30)], [slice(0, 15), slice(15, 30)]):
        pieces = [Piece(1 / len(parts), lambda p=p: F.mse_loss(net(X[p]), y[p])) for p in parts]
        preconditioner = KroneckerEigenbasis().make(vector)
        refreshed(preconditioner, vector, FrozenPieces(pieces, vector, False, None, None))
        found.append(preconditioner.operator(0.1) @ v)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_steps_of_factors_train_resume_and_repeat(name: str) -> None:
    make = lambda net, seed=3: getattr(methods, name)(net.parameters(), seed=seed)
    closure = lambda net: lambda: F.cross_entropy(net(X), LABELS)
    run = lambda optimizer, net, steps: [float(optimizer.step(closure(net))) for _ in range(steps)]
    nets = [network() for _ in range(4)]
    first, again, other, resumed = (make(net, 4 if at == 2 else 3) for at, net in enumerate(nets))
    losses = run(first, nets[0], 14)
    assert losses[-1] < 0.5 * losses[0]
    assert run(again, nets[1], 6) == losses[:6]
    assert run(other, nets[2], 6) != losses[:6]
    file = io.BytesIO()
    torch.save([nets[1].state_dict(), again.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    nets[3].load_state_dict(model)
    resumed.load_state_dict(state)
    assert run(resumed, nets[3], 8) == losses[6:]


def test_micro_batches_and_a_convolution_that_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.scale * self.conv(x).tanh()).flatten(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Twice().float()
    x, labels = normal(6, 2, 2, 2).float(), torch.arange(6) % 3
    optimizer = methods.ekfac(net.parameters())
    batches = [torch.arange(3), torch.arange(3, 6)]
    closure = MicroBatches(lambda s: F.cross_entropy(net(x[s]), labels[s]), batches)
    losses = [float(optimizer.step(closure)) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


def test_misuse_is_explained() -> None:
    with pytest.raises(TypeError, match=r"FactoredDamping\(\) or TikhonovDamping\(\)"):
        Kronecker(damping=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="basis_every"):
        KroneckerEigenbasis(basis_every=0)
    net = network()
    plain, moments = (NewtonKrylov(net.parameters(), preconditioning=p) for p in (Kronecker(), KroneckerEigenbasis()))
    for optimizer in (plain, moments):
        optimizer.step(lambda: F.cross_entropy(net(X), LABELS))
    for one, other in ((plain, moments), (moments, plain)):
        with pytest.raises(ValueError, match="another preconditioning"):
            one.load_state_dict(other.state_dict())
