"""Structural damping: its curvature is that of the hidden states, by Jacobians of autograd, and it is nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import methods
from imstep.curvature import StructuralDamping
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.hessian import gauss_newton_of, hessian_of
from imstep.curvature.parameters import ParameterVector

F64 = torch.float64
X = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
LABELS = torch.tensor([0, 1, 1, 0])


class Net(nn.Module):
    """Keeps its states, (T, batch, 3) flattened, for the test."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.core = {"rnn": nn.RNN(2, 3, batch_first=True), "cell": nn.LSTMCell(2, 3)}[kind].double()
        self.out = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.core, nn.RNN):
            states, _ = self.core(x)
            self.states = states.reshape(-1)
            return self.out(states[:, -1])
        state, every = None, []
        for t in range(x.shape[1]):
            state = self.core(x[:, t], state)
            every.append(state[0])
        self.states = torch.cat(every).reshape(-1)
        return self.out(every[-1])


def jacobian(net: Net) -> Tensor:
    names = [name for name, _ in net.named_parameters()]

    def states(*values: Tensor) -> Tensor:
        torch.func.functional_call(net, dict(zip(names, values, strict=True)), (X,))
        return net.states

    parts = torch.autograd.functional.jacobian(states, tuple(net.parameters()))
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


@pytest.mark.parametrize("kind", ["rnn", "cell"])
def test_it_adds_the_curvature_of_the_states_and_nothing_else(kind: str) -> None:
    net = Net(kind)
    J = jacobian(net)
    weight = 0.3
    structural = StructuralDamping(net.core, weight=lambda: 2 * weight)
    parameters = ParameterVector(net.parameters())
    plain = lambda: F.cross_entropy(net(X), LABELS)
    before = FrozenClosure(plain, parameters).linearise()
    after = FrozenClosure(structural(plain), parameters).linearise()
    assert float(after.loss) == float(before.loss)
    torch.testing.assert_close(after.gradient, before.gradient, rtol=1e-14, atol=0)
    for of in (gauss_newton_of, hessian_of):
        added = of(after, parameters).to_dense() - of(before, parameters).to_dense()
        torch.testing.assert_close(added, 2 * weight * J.T @ J / len(J), rtol=1e-10, atol=1e-12)


def test_the_more_of_it_the_less_states_move() -> None:
    moves = []
    for weight in (0.0, 1.0, 100.0):
        net = Net("rnn")
        structural = StructuralDamping(net.core, weight=weight)
        with torch.no_grad():
            net(X)
            before = net.states
        methods.hessian_free(net.parameters()).step(structural(lambda: F.cross_entropy(net(X), LABELS)))  # noqa: B023
        with torch.no_grad():
            net(X)
            moves.append(float((net.states - before).norm()))
    assert moves[0] > 1.5 * moves[1] > 2 * moves[2]


def test_closures_that_call_backward_are_damped_as_well() -> None:
    ends = []
    for backward in (False, True):
        net = Net("rnn")
        optimizer = methods.hessian_free(net.parameters())

        def closure(net: Net = net, backward: bool = backward, optimizer: object = optimizer) -> Tensor | float:
            loss = F.cross_entropy(net(X), LABELS)
            if not backward:
                return loss
            optimizer.zero_grad()
            (loss / 2).backward()
            (loss / 2).backward()
            return float(loss.detach())

        for _ in range(2):
            optimizer.step(StructuralDamping(net.core, weight=10.0)(closure))
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_states_of_sequences_of_several_lengths_count_once_each() -> None:
    net, lengths = nn.GRU(2, 3, batch_first=True).double(), torch.tensor([5, 3, 2, 2])
    packed = nn.utils.rnn.pack_padded_sequence(X, lengths, batch_first=True)
    parameters = ParameterVector(net.parameters())
    loss = lambda: net(packed)[1].square().mean()
    added = [gauss_newton_of(FrozenClosure(c, parameters).linearise(), parameters).to_dense()
             for c in (loss, StructuralDamping(net, weight=1.0)(loss))]  # fmt: skip
    names = [name for name, _ in net.named_parameters()]
    states = lambda *values: torch.func.functional_call(net, dict(zip(names, values, strict=True)), (packed,))[0].data
    parts = torch.autograd.functional.jacobian(states, tuple(net.parameters()))
    J = torch.cat([part.reshape(12 * 3, -1) for part in parts], 1)
    torch.testing.assert_close(added[1] - added[0], J.T @ J / len(J), rtol=1e-9, atol=1e-12)


def test_it_refuses_what_it_cannot_damp() -> None:
    net = Net("rnn")
    plain = lambda: F.cross_entropy(net(X), LABELS)
    with pytest.raises(ValueError, match="closure has not evaluated"):
        StructuralDamping(nn.RNN(2, 3), weight=1.0)(plain)()
    with pytest.raises(ValueError, match="loss without a graph"):
        methods.newton_cg(net.parameters()).step(StructuralDamping(net.core, weight=1.0)(lambda: plain().detach()))
    with torch.no_grad():  # an evaluation
        assert float(StructuralDamping(net.core, weight=1.0)(plain)()) == float(plain())
    with pytest.raises(ValueError, match="at least 0"):
        StructuralDamping(net.core, weight=-1.0)
    with pytest.raises(ValueError, match="name at least one"):
        StructuralDamping(weight=1.0)
