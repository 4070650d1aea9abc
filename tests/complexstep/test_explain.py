"""What an evaluation reports of itself: operators, treatments, shares of the time, kernels that it went around."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import imstep
from imstep.complexstep import Arithmetic
from imstep.complexstep.report import OperatorReport


def _explained(closure, module) -> OperatorReport:
    return imstep.Hessian(closure, module).explain()


def _avoided(report: OperatorReport) -> dict[str, int]:
    return {use.operator: use.count for use in report.uses if use.treatment == "avoided kernel"}


def test_counts_treatments_and_shares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    report = _explained(lambda: model(torch.randn(32, 4)).square().mean(), model)
    met = {use.operator: use for use in report.uses}
    assert met["aten.addmm.default"].count == 3
    assert met["aten.tanh.default"].treatment == "elementwise"
    assert met["aten.tanh_backward.default"].count == 2
    shares = [use.share for use in report.uses]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 1
    assert sum(use.seconds for use in report.uses) < report.seconds
    lines = str(report).splitlines()
    assert lines[0].split() == ["operator", "treatment", "count", "share"]
    assert lines[-1].startswith("everything else")


def test_time_between_operators_is_nobodys():
    def f(x):
        y = x.exp()
        time.sleep(0.1)
        return y.sum()

    x = torch.zeros(3, requires_grad=True)
    report = _explained(lambda: f(x), [x])
    assert report.seconds > 0.1
    assert sum(use.seconds for use in report.uses) < 0.05


def test_a_decomposition_is_charged_for_itself_only():
    """Whatever the operators take that stand for another is theirs."""
    x = torch.randn(50, dtype=torch.float64)
    with Arithmetic() as arithmetic:
        z = arithmetic.number(x, torch.ones_like(x))
        torch.nn.functional.silu(torch.special.entr(z.abs())).sum()
    report = arithmetic.report()
    assert sum(use.seconds for use in report.uses) <= report.seconds
    assert all(use.seconds > 0 for use in report.uses)


def test_an_operator_that_fails_leaves_the_clock_in_order():
    w = torch.eye(3, requires_grad=True)

    def f():
        try:
            torch.linalg.cholesky(w - 2 * torch.eye(3))
        except torch.linalg.LinAlgError:
            return w.exp().sum()
        raise AssertionError

    met = {use.operator: use for use in _explained(f, [w]).uses}
    assert met["aten.exp.default"].seconds > 0


def test_constants_show_as_cut():
    x = torch.ones(3, requires_grad=True)
    report = _explained(lambda: (x * x.detach().exp()).sum(), [x])
    assert any(use.treatment == "cut" for use in report.uses)


@pytest.mark.parametrize(
    ("module", "kernel"),
    [(nn.LSTM(3, 4), "torch.lstm"), (nn.GRU(3, 4), "torch.gru"), (nn.RNN(3, 4), "torch.rnn_tanh")],
    ids=["lstm", "gru", "rnn"],
)
def test_recurrent_kernels_are_avoided(module, kernel):
    x = torch.randn(5, 2, 3)
    assert _avoided(_explained(lambda: module(x)[0].square().sum(), module)) == {kernel: 1}


def test_fused_attention_is_avoided():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    found = _avoided(_explained(lambda: layer(x).square().sum(), layer))
    assert list(found.values()) == [1]
    assert "scaled_dot_product_attention" in next(iter(found))


def test_fast_path_of_attention_is_avoided():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with Arithmetic() as arithmetic, torch.no_grad():
        z = arithmetic.number(x, torch.ones_like(x))
        layer(z, z, z, need_weights=False)
    assert "torch._native_multi_head_attention" in _avoided(arithmetic.report())


def test_substitutes_are_named_where_they_are_needed():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert _avoided(_explained(lambda: x.prod(), [x])) == {}
    assert _avoided(_explained(lambda: (x - 2).prod(), [x])) == {"torch.Tensor.prod": 1}
    image, grid = torch.randn(1, 1, 4, 4, requires_grad=True), torch.rand(1, 2, 2, 2)
    sample = lambda: nn.functional.grid_sample(image, grid, align_corners=True).square().sum()
    assert _avoided(_explained(sample, [image])) == {"torch.nn.functional.grid_sample": 1}
