"""The Hessian where its record cannot be kept: products by evaluations of their own, on the same batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep


def _network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)).double()
    return model, torch.randn(16, 5).double()


def test_recomputed_products_equal_replayed_ones():
    model, x = _network()
    closure = lambda: model(x).pow(2).mean()
    state = torch.get_rng_state()
    replayed = imstep.Hessian(closure, model)
    after, statistics = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    block = torch.randn(replayed.size, 3, generator=torch.Generator().manual_seed(1)).double()
    single, several = replayed @ block[:, 0], replayed @ block
    torch.set_rng_state(state)
    model[1].reset_running_stats()
    recomputed = imstep.Hessian(closure, model, memory_budget=0)
    torch.testing.assert_close(recomputed @ block[:, 0], single, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(recomputed @ block, several, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close([recomputed.loss, recomputed.gradient], [replayed.loss, replayed.gradient])
    assert recomputed.products == replayed.products == 4
    # The state is that of one evaluation, however many products were made.
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(list(model.buffers())[:2], statistics[:2])


def test_says_why():
    model, x = _network()
    closure = lambda: model(x).pow(2).mean()
    free = imstep.Hessian(closure, model)
    assert free.recomputes is None
    tight = imstep.Hessian(closure, model, memory_budget=free.nbytes // 4)
    assert tight.recomputes is not None
    assert "memory budget" in tight.recomputes
    assert tight.nbytes == 0
    tight @ torch.zeros(tight.size).double()
    assert "evaluates the closure anew" in str(tight.explain())
    assert any("addmm" in use.operator for use in tight.explain().uses)
    assert imstep.Hessian(closure, model, memory_budget=4 * free.nbytes).recomputes is None


def test_tape_found_invalid(monkeypatch):
    """A write that only shows at the end of the recording."""
    from imstep.complexstep.tape import Tape, TapeChangedError

    def changed(self: Tape) -> None:
        raise TapeChangedError("a tensor was changed in place.")

    model, x = _network()
    labels = torch.arange(16) % 2
    closure = lambda: F.cross_entropy(model.eval()(x), labels)
    expected = imstep.Hessian(closure, model).to_dense()
    monkeypatch.setattr(Tape, "check", changed)
    hessian = imstep.Hessian(closure, model)
    assert hessian.recomputes == "a tensor was changed in place."
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_directions_are_read_where_they_lie():
    """Parts of a vector at odd places, seen as complex numbers, and overwritten copies of parameters."""
    torch.manual_seed(0)
    a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3,), (4, 2)))

    def closure() -> Tensor:
        z = torch.view_as_complex(b)
        c = a.clone().mul_(2.0).sin_()
        return (z * z.conj() * z).real.sum() * c.prod() + (z.imag.t() * b[:, 0]).pow(3).sum()

    recorded, recomputed = imstep.Hessian(closure, [a, b]), imstep.Hessian(closure, [a, b], memory_budget=0)
    v = torch.randn(11, dtype=torch.float64)
    before = v.clone()
    gradients = torch.autograd.grad(closure(), [a, b], create_graph=True)
    products = torch.autograd.grad(gradients, [a, b], [v[:3].clone(), v[3:].clone().view(4, 2)])
    expected = torch.cat([p.flatten() for p in products])
    torch.testing.assert_close(recomputed @ v, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorded @ v, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorded @ v[:, None].expand(-1, 3), expected[:, None].expand(-1, 3))
    assert torch.equal(v, before)


def test_point_is_still_watched():
    weight = nn.Parameter(torch.ones(3))
    hessian = imstep.Hessian(lambda: weight.pow(3).sum(), [weight], memory_budget=0)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        hessian @ torch.ones(3)


def test_negative_budget():
    with pytest.raises(ValueError, match="memory_budget"):
        imstep.Hessian(lambda: torch.zeros(()), [nn.Parameter(torch.ones(1))], memory_budget=-1)


def test_products_of_another_function_are_refused():
    """What a closure looks up may be another one when it is called again: a mode, or the variable of a loop."""
    model, x = _network()
    operators, jacobians = [], []
    for batch in x.split([6, 6, 4]):
        loss, outputs = (lambda: model(batch).pow(2).mean()), (lambda: model(batch))  # noqa: B023
        operators.append(imstep.Hessian(loss, model, memory_budget=0))
        operators.append(imstep.GaussNewton(lambda: (model(batch), 0.0), model, lambda z, y: z.pow(2).mean(), 0))  # noqa: B023
        jacobians.append(imstep.Jacobian(outputs, model, memory_budget=0))
    v = torch.ones(operators[0].size).double()
    for number, (A, J) in enumerate(zip(operators, [jacobians[n // 2] for n in range(6)], strict=True)):
        if number < 4:
            for product in (lambda: A @ v, lambda: J @ v, lambda: J.T @ torch.ones(J.shape[0]).double()):  # noqa: B023
                with pytest.raises(RuntimeError, match="the closure is another function"):
                    product()
        else:
            assert (A @ v).isfinite().all()
            assert (J @ v).isfinite().all()
    model.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) and eval\(\)"):
        operators[-1] @ v
    model.train()
    assert (operators[-1] @ v).isfinite().all()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_what_rounding_leaves_of_a_loss_is_no_other_function(kind):
    torch.manual_seed(0)
    model, x = kind(4, 24, batch_first=True), torch.randn(16, 10, 4)
    y = model(x)[0].detach() + 1e-7 * torch.randn(16, 10, 24)
    H = imstep.Hessian(lambda: F.mse_loss(model(x)[0], y), model, memory_budget=0)
    assert (H @ torch.ones(H.size)).isfinite().all()
