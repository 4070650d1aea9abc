"""K-FAC and E-KFAC as operators: against factors and Gauss-Newton matrices by reverse mode, case by case."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, dense_jacobian, normal, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import imstep
from imstep import spectral
from imstep.curvature import EKFAC, KFAC
from imstep.linalg import NotSolvedError


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Shared(nn.Module):
    """A layer that is used twice, and a parameter that belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.layer(torch.tanh(self.layer(x))))


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(12, 3)


def conv() -> tuple[nn.Module, Tensor]:
    body = (nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2, bias=False))
    return nn.Sequential(*body).double(), normal(6, 1, 4, 4)


def shared() -> tuple[nn.Module, Tensor]:
    return Shared().double(), normal(10, 3)


MODELS = {"mlp": mlp, "conv": conv, "shared": shared}


def gauss_newton(model: nn.Module, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
    """The block of a layer for half of a squared error, with the bias as a last column of the weight."""
    J = dense_jacobian(model(x), [weight] if bias is None else [weight, bias])
    out = len(weight)
    matrix = J[:, : weight.numel()].view(len(J), out, -1)
    if bias is not None:
        matrix = torch.cat([matrix, J[:, weight.numel() :, None]], 2)
    flat = matrix.reshape(len(J), -1)
    return flat.T @ flat


def half_square(model: nn.Module, x: Tensor):
    return lambda: 0.5 * model(x).square().sum()


def test_one_output_and_one_layer_are_exact() -> None:
    layer, x = nn.Linear(4, 1).double(), normal(9, 4)
    G = imstep.GaussNewton(lambda: (layer(x), torch.zeros(9, 1).double()), layer)
    for kind in (KFAC, EKFAC):
        K = kind(lambda: F.mse_loss(layer(x), torch.zeros(9, 1).double()), layer)
        assert relative_error(K.to_dense(), G.to_dense()) < 1e-13
        assert float(K.loss) == pytest.approx(float(G.loss))


def test_factors_are_those_of_expectations() -> None:
    model, x = mlp()
    K, hidden = KFAC(half_square(model, x), model, samples=100), model[1](model[0](x)).detach()
    with_ones = lambda a: torch.cat([a, torch.ones(len(a), 1, dtype=F64)], 1)
    through = torch.stack([model[2].weight.detach() * (1 - h**2) for h in hidden])  # d output / d hidden, case by case
    expected = torch.block_diag(
        torch.kron(torch.einsum("nki,nkj->ij", through, through), with_ones(x).T @ with_ones(x) / 12),
        torch.kron(12 * torch.eye(2, dtype=F64), with_ones(hidden).T @ with_ones(hidden) / 12),
    )
    assert relative_error(K.to_dense(), _without_columns(expected, [(4, 3), (2, 4)])) < 0.15


def _without_columns(matrix: Tensor, layers: list[tuple[int, int]]) -> Tensor:
    """From weights with a bias as last column to weights followed by biases."""
    order, start = [], 0
    for out, inn in layers:
        places = start + torch.arange(out * (inn + 1)).view(out, inn + 1)
        order += [places[:, :-1].reshape(-1), places[:, -1]]
        start += out * (inn + 1)
    index = torch.cat(order)
    return matrix[index][:, index]


@pytest.mark.parametrize("name", MODELS)
def test_corrected_eigenvalues_are_those_of_gauss_newton(name: str) -> None:
    model, x = MODELS[name]()
    plain, corrected = (kind(half_square(model, x), model, samples=50) for kind in (KFAC, EKFAC))
    tensors = list(model.parameters())
    assert len(plain.blocks) == len(corrected.blocks) == 2
    for first, second in zip(plain.blocks, corrected.blocks, strict=True):
        exact = gauss_newton(model, x, tensors[second.weight], None if second.bias is None else tensors[second.bias])
        basis = torch.kron(second.outputs, second.inputs)
        best = (basis.T @ exact @ basis).diagonal().view_as(second.values)
        assert relative_error(second.values, best) < 0.2
        dense = lambda b: (lambda q: (q * b.values.reshape(-1)) @ q.T)(torch.kron(b.outputs, b.inputs))
        assert relative_error(dense(second), exact) <= relative_error(dense(first), exact) * 1.02 + 0.02


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("name", MODELS)
def test_products_and_inverses_are_exact_for_the_matrix(kind: type[KFAC], name: str) -> None:
    model, x = MODELS[name]()
    K = kind(half_square(model, x), model)
    dense, v = K.to_dense(), normal(K.size, 3)
    assert relative_error(dense, dense.T) < 1e-13
    assert torch.linalg.eigvalsh(dense)[0] > -1e-10
    assert relative_error(K @ v[:, 0], dense @ v[:, 0]) < 1e-13
    for damping in (1e-2, 10.0):
        found = K.inverse(damping).solve(v)
        expected = torch.linalg.solve(dense + damping * torch.eye(K.size, dtype=F64), v)
        assert relative_error(found.solution, expected) < 1e-9
        assert found.converged.all()
        assert relative_error(K.preconditioner(damping) @ v, expected) < 1e-9
    with pytest.raises(ValueError, match="above 0"):
        K.preconditioner(0.0)
    assert spectral.trace(K, rtol=0.1).value == pytest.approx(float(dense.trace()), rel=0.3)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_singular_matrix_is_not_inverted(kind: type[KFAC]) -> None:
    layer, x = nn.Linear(4, 2).double(), normal(9, 4)
    x[:, 1] = 0
    K = kind(half_square(layer, x), layer)
    found = K.inverse().solve(normal(10))
    assert not found.converged.any()
    with pytest.raises(NotSolvedError, match="raise damping"):
        K.inverse() @ normal(10)
    assert K.inverse().solve(K @ normal(10)).converged.all()


def test_what_is_no_layer_has_a_diagonal() -> None:
    model, x = shared()
    K = KFAC(half_square(model, x), model)
    at = [name for name, _ in model.named_parameters()].index("scale")
    own = K.parameters.entries([at])
    rows = K.to_dense()[own]
    assert rows[:, own].count_nonzero() == rows.count_nonzero() == 3


PENALTIES = {
    "decay": lambda params: sum(p.square().sum() for p in params),
    "pull": lambda params: sum((p - 0.3).square().sum() for p in params),
    "mean of a pull": lambda params: sum(p.numel() * F.mse_loss(p - 0.1, torch.ones_like(p)) for p in params),
    "weighed pull": lambda params: sum((4 * (p - 0.3) ** 2 / 4).sum() for p in params),
    "multiples": lambda params: sum(((2 * p - 0.3) / 2).pow(2).sum() for p in params),
    "joined": lambda params: (nn.utils.parameters_to_vector(params) - 0.3).square().sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_weight_decay_is_added(kind: type[KFAC], penalty) -> None:
    layer, x = nn.Linear(4, 1).double(), normal(9, 4)
    plain = imstep.GaussNewton(lambda: (layer(x), torch.zeros(9, 1).double()), layer).to_dense()
    loss = lambda: layer(x).square().mean() + 0.35 * penalty(list(layer.parameters()))
    assert relative_error(kind(loss, layer).to_dense(), plain + 0.7 * torch.eye(5, dtype=F64)) < 1e-12


SHARING = {
    "squares": lambda p, q: (p - q).square().sum(),
    "mean": lambda p, q: p.numel() * F.mse_loss(p - 0.1, q),
    "a sum in parts": lambda p, q: ((q - torch.add(p, q, alpha=2) + 0.3) / 2 + (p - q) / 2 - p).square().sum(),
}


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("name", SHARING)
def test_sharing_between_weights_is_added_to_each(kind: type[KFAC], name: str) -> None:
    first, second, x = nn.Linear(4, 1).double(), nn.Linear(4, 1).double(), normal(9, 4)
    both, share = nn.ModuleList([first, second]), SHARING[name]
    data = lambda: first(x).square().mean() + second(2 * x).square().mean()
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    loss = lambda: data() + 0.35 * sum(share(p, q) for p, q in pairs)
    expected = kind(data, both).to_dense() + 0.7 * torch.eye(10, dtype=F64)
    assert relative_error(kind(loss, both).to_dense(), expected) < 1e-12


LABELS = torch.tensor([0, 1, -100, 1, -100, 0, -100, -100])
KEPT = LABELS >= 0
PARTIAL = {
    "ignored labels": lambda z: F.cross_entropy(z, LABELS),
    "selected": lambda z: z[KEPT].square().mean(),
    "weights of zero": lambda z: (KEPT[:, None] * z.square()).sum(),
    "masked": lambda z: F.binary_cross_entropy_with_logits(z, z.detach() + 0.5, weight=KEPT[:, None].double()),
    "tokens": lambda z: F.cross_entropy(z.view(2, 4, 2).mT, LABELS.view(2, 4)),
}


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_rows_that_the_loss_ignores_are_none(kind: type[KFAC], name: str) -> None:
    """Where all outputs are zero, factors are exact: the curvature of all rows that count is the same."""
    layer, x = nn.Linear(3, 2).double(), normal(8, 3) * torch.where(KEPT, 1.0, 30.0).double()[:, None]
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    exact = imstep.GaussNewton(lambda: (layer(x), None), layer, lambda z, _: PARTIAL[name](z)).to_dense()
    found = kind(lambda: PARTIAL[name](layer(x)), layer, samples=100).to_dense()
    assert relative_error(found, exact) < 0.15


def test_numbers_are_those_of_the_seed_and_states_are_left() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    x, state = normal(12, 3), torch.get_rng_state()
    make = lambda seed: KFAC(lambda: model(x).square().mean(), model, samples=2, seed=seed)
    first = make(1).to_dense()
    torch.set_rng_state(state)
    assert make(1).to_dense().equal(first)
    torch.set_rng_state(state)
    assert not make(2).to_dense().equal(first)
    assert all(p.grad is None for p in model.parameters())
    assert int(model[1].num_batches_tracked) == 3


def test_misuse_is_explained() -> None:
    model, x = mlp()
    with pytest.raises(ValueError, match="convex function of outputs"):
        KFAC(lambda: model(x).sin().sum(), model)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KFAC(half_square(model, x), model, samples=0)


# --- block diagonal ---------------------------------------------------------------------------------------------------


def test_block_diagonal_matrices() -> None:
    model, x = mlp()
    G = imstep.GaussNewton(lambda: (model(x), torch.zeros(12, 2).double()), model)
    dense, v = G.to_dense(), normal(G.size, 2)
    parts = {"layer": [16, 10], "parameter": [12, 4, 8, 2]}
    for by, sizes in parts.items():
        B = G.block_diagonal(by)
        mask = torch.block_diag(*[torch.ones(n, n, dtype=F64) for n in sizes])
        expected = dense * mask
        assert relative_error(B.to_dense(), expected) < 1e-13
        assert relative_error(B @ v[:, 0], expected @ v[:, 0]) < 1e-13
        solution = torch.linalg.solve(expected + 0.1 * torch.eye(26, dtype=F64), v)
        assert relative_error(B.inverse(0.1, rtol=1e-9) @ v, solution) < 1e-8
    few = imstep.GaussNewton(lambda: (model(x[:1]), torch.zeros(1, 2).double()), model)
    with pytest.raises(NotSolvedError):
        few.block_diagonal().inverse() @ v


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_the_weight_of_a_gru_is_seen_at_its_own_product(kind) -> None:
    """The reset gate multiplies what the weight of the states makes: one step is two linear layers."""
    layer, x, h, y = nn.GRU(2, 3).double(), normal(1, 20, 2), normal(1, 20, 3, seed=1), normal(20, 3, seed=2)

    def written_out() -> Tensor:
        q = dict(layer.named_parameters())
        a, b = (F.linear(v[0], q[f"weight_{n}_l0"], q[f"bias_{n}_l0"]) for n, v in (("ih", x), ("hh", h)))
        r, z, _ = (a + b).sigmoid().chunk(3, 1)
        n = (a.chunk(3, 1)[2] + r * b.chunk(3, 1)[2]).tanh()
        return F.mse_loss((1 - z) * n + z * h[0], y)

    found, expected = (kind(f, layer).to_dense() for f in (lambda: F.mse_loss(layer(x, h)[0][0], y), written_out))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


ERRORS = {"squared": F.mse_loss, "Huber": F.huber_loss, "smooth": F.smooth_l1_loss}


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_targets_that_require_gradients_of_others_are_constants(kind, error) -> None:
    """As the outputs of a teacher that another optimizer trains, on either side of the loss."""
    (model, x), teacher = mlp(), nn.Linear(3, 2).double()
    forms = (
        lambda: error(model(x), teacher(x).detach()),
        lambda: error(model(x), teacher(x)),
        lambda: error(teacher(x), model(x)),
    )
    expected, *found = (kind(f, model).to_dense() for f in forms)
    assert expected.any()
    for matrix in found:
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_both_sides_of_an_error_are_outputs(kind) -> None:
    (model, x), other = mlp(), nn.Linear(3, 2).double()
    y, parameters = normal(12, 3, seed=1), [*model.parameters(), *other.parameters()]
    for pair in (lambda: (model(x), other(x)), lambda: (model(x), model(y) + other(y))):
        forms = lambda: F.mse_loss(*pair()), lambda: torch.sub(*pair()).square().mean()  # noqa: B023
        found, expected = (kind(f, parameters).to_dense() for f in forms)
        assert expected.diagonal().all()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


ALONE = {
    "table": (nn.Embedding(5, 3), torch.tensor([[0, 1, 3]])),
    "norm": (nn.LayerNorm(3), normal(1, 3)),
    "groups": (nn.Conv1d(2, 2, 3, groups=2), normal(1, 2, 5)),
}


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("name", ALONE)
def test_parameters_of_no_layer_have_a_diagonal_without_layers(name, kind) -> None:
    model, x = ALONE[name][0].double(), ALONE[name][1]
    y, closure = torch.ones_like(model(x)), lambda: F.mse_loss(model(x), y)
    expected = imstep.GaussNewton(lambda: (model(x), y), model, F.mse_loss).to_dense().diagonal()
    found = kind(closure, model, samples=200).to_dense()
    assert torch.equal(found, torch.diag(found.diagonal()))
    assert relative_error(found.diagonal(), expected) < 0.3


@pytest.mark.parametrize("kernel", [3, 4, (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_that_keep_their_size_have_factors(kernel, dilation) -> None:
    layer, x = nn.Conv2d(2, 3, kernel, padding="same", dilation=dilation).double(), normal(3, 2, 6, 7)
    before, after = layer._reversed_padding_repeated_twice[::2], layer._reversed_padding_repeated_twice[1::2]
    wide = F.pad(x, [n for pair in zip(before, after, strict=True) for n in pair])
    plain = lambda: F.conv2d(wide, layer.weight, layer.bias, dilation=dilation)
    torch.testing.assert_close(layer(x), plain())
    found, expected = (KFAC(lambda f=f: f().square().mean(), layer) for f in (lambda: layer(x), plain))
    assert len(found.blocks) == 1
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-14)
    flat = nn.Conv1d(2, 3, 4, padding="same", dilation=dilation).double()
    assert len(KFAC(lambda: flat(x[:, :, 0]).square().mean(), flat).blocks) == 1


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_cross_entropy_that_is_written_out_has_the_same_factors(kind) -> None:
    (model, x), y = mlp(), torch.arange(12) % 2
    written_out = lambda z: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()
    forms = (
        lambda: F.cross_entropy(model(x), y),
        lambda: written_out(model(x)),
        lambda: -torch.distributions.Categorical(logits=model(x)).log_prob(y).mean(),
        lambda: -model(x).softmax(1).log()[torch.arange(12), y].mean(),
        lambda: (lambda z: z.exp().sum(1).log() - z[torch.arange(12), y])(model(x)).mean(),
        lambda: -sum(p[at].log() for p in [model(x).softmax(1)] for at in enumerate(y)) / 12,
    )
    expected, *found = (kind(f, model).to_dense() for f in forms)
    for matrix in found:
        torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_binary_cross_entropy_that_is_written_out_has_the_same_factors(kind) -> None:
    (model, x), y = mlp(), (torch.arange(12) % 2).double()[:, None].expand(12, 2)
    sign = 2 * y - 1
    forms = (
        lambda z: F.binary_cross_entropy_with_logits(z, y),
        lambda z: -F.logsigmoid(sign * z).mean(),
        lambda z: F.soft_margin_loss(z, sign),
        lambda z: torch.log1p((-sign * z).exp()).mean(),
        lambda z: -(sign * z).sigmoid().log().mean(),
        lambda z: -(1 - (-sign * z).sigmoid()).log().mean(),
    )
    expected, *found = (kind(lambda form=form: form(model(x)), model).to_dense() for form in forms)
    for matrix in found:
        torch.testing.assert_close(matrix.abs(), expected.abs(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_checkpointed_attention_runs_again_as_it_ran_first(kind) -> None:
    projection, head, x = nn.Linear(4, 12), nn.Linear(4, 3), normal(5, 6, 4).float()
    attend = lambda x: F.scaled_dot_product_attention(*projection(x).unsqueeze(1).chunk(3, -1)).squeeze(1)
    checkpointed = lambda x: checkpoint(attend, x, use_reentrant=False)
    params = [*projection.parameters(), *head.parameters()]
    loss = lambda own: F.cross_entropy(head(own(x)).mean(1), torch.arange(5) % 3)
    plain, again = (kind(partial(loss, own), params).to_dense() for own in (attend, checkpointed))
    assert torch.equal(again, plain)
