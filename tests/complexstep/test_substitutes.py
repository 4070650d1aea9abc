"""Stand-ins for kernels without a second derivative: the originals' values and gradients, products by differences."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import imstep
from imstep.complexstep import Arithmetic, substitutes


def _central_difference(f, x, v, h=1e-5):
    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    return (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)


def _case_grid(dims, mode, padding, align):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(5, 4, 3)[:dims], dtype=torch.float64)
    grid = 1.5 * torch.randn(2, *(3, 4, 2)[:dims], dims, dtype=torch.float64)
    return x, grid


_GRIDS = [
    (dims, mode, padding, align)
    for dims, mode, padding, align in product((2, 3), (0, 1, 2), (0, 1, 2), (False, True))
    if not (dims == 3 and mode == 2)
]


@pytest.mark.parametrize(("dims", "mode", "padding", "align"), _GRIDS)
def test_grid_sampler_is_the_original(dims, mode, padding, align):
    x, grid = (t.requires_grad_() for t in _case_grid(dims, mode, padding, align))
    original = torch.grid_sampler(x, grid, mode, padding, align)
    ours = substitutes.grid_sampler(x, grid, mode, padding, align)
    torch.testing.assert_close(ours, original)
    weights = torch.randn_like(original)
    expected = torch.autograd.grad(original, (x, grid), weights)
    found = torch.autograd.grad(ours, (x, grid), weights, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample_product(dims, mode):
    if dims == 3 and mode == "bicubic":
        pytest.skip("PyTorch has no bicubic sampling of volumes")
    x, grid = _case_grid(dims, mode, 0, False)
    join = lambda a, b: torch.cat([a.reshape(-1), b.reshape(-1)])

    def f(z):
        a, b = z[: x.numel()].view(x.shape), z[x.numel() :].view(grid.shape)
        return F.grid_sample(a, b, mode=mode, align_corners=False).tanh().sum()

    z = join(x, grid)
    v = torch.randn_like(z)
    torch.testing.assert_close(imstep.hvp(f, z, v), _central_difference(f, z, v), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_ctc_loss_is_the_original(reduction, padded, zero_infinity):
    torch.manual_seed(0)
    logits = torch.randn(12, 3, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 1, 7])  # the last needs more time than it has: an infinite loss
    targets = torch.randint(1, 5, (3, 7) if padded else (12,))
    targets[..., 1] = targets[..., 0]
    times = torch.tensor([12, 9, 6])
    results = []
    for loss in (torch.ctc_loss, substitutes.ctc_sum):
        code = {"none": 0, "mean": 1, "sum": 2}[reduction]
        results.append(loss(logits.log_softmax(2), targets, times, lengths, 0, code, zero_infinity))
    torch.testing.assert_close(results[1], results[0])
    if zero_infinity:
        found, expected = (torch.autograd.grad(r.sum(), logits)[0] for r in results[::-1])
        torch.testing.assert_close(found, expected)


def test_ctc_loss_product():
    torch.manual_seed(0)
    logits, v = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    targets = torch.randint(1, 5, (3, 4))

    def f(z):
        return F.ctc_loss(z.log_softmax(2), targets, [12, 9, 11], [4, 1, 3])

    torch.testing.assert_close(imstep.hvp(f, logits, v), _central_difference(f, logits, v), atol=1e-8, rtol=1e-6)


def test_max_pool1d_keeps_the_imaginary_part_without_gradients():
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, 3, 9, dtype=torch.float64)
    with torch.no_grad():
        value, tangent = imstep.jvp(lambda t: F.max_pool1d(t, 3), x, v)
    expected = torch.func.jvp(lambda t: F.max_pool2d(t, (1, 3)), (x,), (v,))
    torch.testing.assert_close((value, tangent), expected)


# Products with zeros among their factors: PyTorch's gradient at two zeros is a constant.
_SEGMENTS, _INDEX = torch.tensor([1, 3]), torch.tensor([0, 2, 2, 1])
_LINES = _INDEX[:, None].expand(4, 3)
_BEFORE = 1 + torch.arange(9.0, dtype=torch.float64).view(3, 3) / 10
_PRODUCTS = {
    "scatter_reduce": lambda x: _BEFORE.scatter_reduce(0, _LINES, x, "prod"),
    "scatter_reduce, named": lambda x: torch.scatter_reduce(_BEFORE, 0, index=_LINES, src=x, reduce="prod"),
    "scatter_reduce, alone": lambda x: _BEFORE.scatter_reduce(0, _LINES, x, "prod", include_self=False),
    "scatter_reduce, of few": lambda x: _BEFORE.scatter_reduce(0, _LINES[:2, :2], x, "prod"),
    "scatter_reduce_": lambda x: (1 * _BEFORE).scatter_reduce_(0, _LINES, x, reduce="prod"),
    "into zeros": lambda x: (x[:3] * 1).scatter_reduce(0, _LINES, x + 1, "prod"),
    "index_reduce": lambda x: _BEFORE.index_reduce(0, _INDEX, x, "prod"),
    "index_reduce along rows": lambda x: _BEFORE.index_reduce(1, _INDEX, x.T, "prod", include_self=False),
    "segment_reduce": lambda x: torch.segment_reduce(x, "prod", lengths=_SEGMENTS),
    "segment_reduce by offsets": lambda x: torch.segment_reduce(
        x, "prod", offsets=torch.tensor([0, 1, 4]), initial=2, axis=0
    ),
    "index_reduce, named": lambda x: _BEFORE.index_reduce(dim=0, index=_INDEX, source=x, reduce="prod"),
    "segment_reduce, one empty": lambda x: torch.segment_reduce(x, "prod", lengths=torch.tensor([1, 0, 3])),
    "segment_reduce of a part": lambda x: torch.segment_reduce(
        x, "prod", offsets=torch.tensor([1, 2, 3]), unsafe=True, initial=2
    ),
    "prod": lambda x: x.prod(0),
    "prod, named": lambda x: torch.prod(input=x, axis=1, keepdims=True),
    "cumprod, named": lambda x: torch.cumprod(x, axis=0),
    "cumprod_": lambda x: (1 * x).cumprod_(0),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", _PRODUCTS)
def test_products_with_zeros(name):
    f = _PRODUCTS[name]
    x = torch.tensor([[0.0, 1, 2], [0, 0, 1], [0, 3, 0], [0, 0, 0]], dtype=torch.float64)
    away = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    with Arithmetic() as arithmetic:
        found = f(arithmetic.number(x, away))
    torch.testing.assert_close(found, f(x))
    loss = lambda t: f(t).exp().sum()
    by_values = lambda h: (loss(x + h * away) - 2 * loss(x) + loss(x - h * away)) / h**2
    expected = (4 * by_values(1e-3) - by_values(2e-3)) / 3
    torch.testing.assert_close(imstep.hvp(loss, x, away).mul(away).sum(), expected, rtol=1e-5, atol=1e-5)


_ROWS, _OTHERS = (torch.randn(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 4 + 1).unbind()
_SEGMENTED = {"lengths": torch.tensor([1, 0, 3]), "offsets": torch.tensor([1, 2, 2, 5])}


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.logaddexp(x, other=_OTHERS),
        lambda x: torch.logaddexp(x1=x, x2=_OTHERS),
        lambda x: x.logaddexp2(other=_OTHERS),
        lambda x: torch.dist(x, other=_OTHERS, p=3),
        lambda x: torch.grid_sampler(
            _BEFORE.view(1, 1, 3, 3), x.view(1, 1, 3, 2) / 9, interpolation_mode=0, padding_mode=1, align_corners=True
        ),
        *(
            lambda x, reduce=reduce, by=by: torch.segment_reduce(
                x, reduce, **{by: _SEGMENTED[by]}, unsafe=True, initial=1.5
            )
            for reduce in ("sum", "mean", "max", "min", "prod")
            for by in _SEGMENTED
        ),
    ],
)
def test_arguments_by_name_and_segments_of_a_part(f):
    """Entries behind the last segment, or before the first, belong to none."""
    loss = lambda t: (f(t) ** 2).sin().sum()
    found = imstep.hvp(loss, _ROWS, _OTHERS)
    torch.testing.assert_close(found, _central_difference(loss, _ROWS, _OTHERS), atol=1e-6, rtol=1e-6)


def test_results_that_are_given_their_memory():
    """By ``out=``, which autograd does not differentiate."""
    out, x = torch.empty(2, dtype=torch.float64), torch.tensor([[0.0, 1, 1], [1, 1, 1]], dtype=torch.float64)

    def f(t):
        with torch.no_grad():
            factor = torch.prod(t, 1, out=out).sum()
        return (t**3).sum() * factor

    torch.testing.assert_close(imstep.hvp(f, x, torch.ones_like(x)), 6 * x)


def test_an_embedding_whose_rows_are_short_enough():
    table = torch.nn.Embedding(5, 3, max_norm=1.0).double()
    at, v = torch.tensor([[0, 3], [3, 1]]), torch.randn(15, dtype=torch.float64)
    loss = lambda: table(at).exp().sum()
    loss()  # shortens them
    weight = table.weight.detach().clone()
    H = imstep.Hessian(loss, table)
    expected = torch.zeros(5, 3, dtype=torch.float64).index_add(0, at.reshape(-1), weight.exp()[at.reshape(-1)])
    torch.testing.assert_close(H @ v, expected.reshape(-1) * v)
    assert torch.equal(table.weight, weight)


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_blocks_of_products_with_bags_are_batched(mode, padding, capfd):
    """PyTorch falls back to a loop over directions for the kernels, with a warning on the terminal for each."""
    bags = torch.nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding).double()
    at, starts = torch.tensor([0, 1, 1, 3, 2, 1]), torch.tensor([0, 3, 3])
    kept = torch.ones(6, dtype=torch.float64) if padding is None else (at != padding).double()
    shares = torch.zeros(3, 6, dtype=torch.float64)
    shares[0, :3], shares[2, 3:] = kept[:3], kept[3:]
    if mode == "mean":
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
    loss = lambda y: (y.sum(1).exp() * y[:, 0]).sum()
    w = bags.weight.detach().clone()
    expected = torch.autograd.functional.hessian(lambda t: loss(shares @ t[at]), w).reshape(15, 15)
    matrix = imstep.Hessian(lambda: loss(bags(at, starts)), bags).to_dense()
    torch.testing.assert_close(matrix, expected)
    assert "BatchedFallback" not in capfd.readouterr().err


def test_nested_tensors_are_refused():
    rows = torch.randn(5, 3, dtype=torch.float64)

    def ragged(t):
        return torch.nested.nested_tensor_from_jagged(t, torch.tensor([0, 2, 5])).sin().values().sum()

    with pytest.raises(imstep.UnsupportedOperatorError, match="padded to one length"):
        imstep.hvp(ragged, rows, rows)
