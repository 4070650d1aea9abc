"""Eigenpairs against planted spectra, dense decompositions and SciPy; residuals as certificates; going on."""

import io
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from spectral_cases import F64, Counted, planted, seeded

import imstep
from imstep import spectral
from imstep.linalg import DenseOperator, DiagonalOperator, LinearOperator

OUTLIERS = torch.tensor([9.0, 7.5, -7.0, 5.0, 4.0, -3.5, 3.0, 2.5, 2.0, -1.5], dtype=F64)


def spectrum(n=400):
    """Ten outliers and a bulk."""
    return torch.cat([OUTLIERS, torch.linspace(-0.5, 1.0, n - 10, dtype=F64)])


def wanted(values, which, k):
    key = {"LM": values.abs(), "LA": values, "SA": -values}[which]
    return values[key.argsort(descending=True)[:k]]


def assert_eigenpairs(found, matrix, values, which, k, tol):
    """What has to hold of any answer, checked in float64."""
    vectors = found.vectors.double()
    scale = float(values.abs().max())
    assert found.converged
    assert (found.values.shape, found.vectors.shape, found.residual_norms.shape) == ((k,), (len(matrix), k), (k,))
    residuals = (matrix @ vectors - vectors * found.values).norm(dim=0)
    eps = torch.finfo(found.vectors.dtype).eps
    torch.testing.assert_close(found.residual_norms, residuals, rtol=0.5, atol=30 * eps * scale)
    assert found.residual_norms.max() <= tol * scale * (1 + 1e-6)
    assert (vectors.T @ vectors - torch.eye(k, dtype=F64)).abs().max() < 40 * eps
    torch.testing.assert_close(found.values, wanted(values, which, k), rtol=0, atol=max(tol, 40 * eps) * scale)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(("dtype", "tol"), [(F64, 1e-6), (F64, 1e-11), (torch.float32, 1e-6)])
def test_extreme_pairs_of_a_planted_spectrum(which, dtype, tol):
    matrix, k = planted(spectrum()), {"LM": 10, "LA": 7, "SA": 3}[which]
    A = Counted(matrix.to(dtype))
    found = spectral.eigenpairs(A, k, which, tol)
    assert_eigenpairs(found, matrix, spectrum(), which, k, tol)
    assert found.products == A.products < 150
    assert found.state is None
    expected = scipy.sparse.linalg.eigsh(matrix.numpy(), k=k, which=which)[0]
    torch.testing.assert_close(found.values.sort()[0], torch.as_tensor(expected).sort()[0], rtol=0, atol=2e-5)


def test_a_spectrum_without_gaps():
    values = torch.linspace(0, 1, 300, dtype=F64)
    found = spectral.eigenpairs(DenseOperator(planted(values)), 4, "LA", 1e-8)
    assert_eigenpairs(found, planted(values), values, "LA", 4, 1e-8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_repeated_eigenvalues_come_as_often_as_they_occur(dtype, seed):
    values = torch.cat([torch.tensor([5.0] * 4 + [3.0, 3.0, 2.0, 2.0, 2.0]), torch.linspace(0, 1, 291)]).double()
    found = spectral.eigenpairs(DenseOperator(planted(values).to(dtype)), 9, "LA", 1e-5, seed=seed)
    assert_eigenpairs(found, planted(values), values, "LA", 9, 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_last_pair_may_be_one_of_several(seed):
    values = torch.cat([torch.tensor([5.0, 3.0, 3.0, 3.0, 3.0]), torch.linspace(0, 1, 295)]).double()
    found = spectral.eigenpairs(DenseOperator(planted(values)), 3, "LA", 1e-8, seed=seed)
    assert_eigenpairs(found, planted(values), values, "LA", 3, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_more_copies_than_are_asked_for(dtype):
    """Each search brings one more of the first; the last one that is found stays the same."""
    values = torch.cat([torch.tensor([5.0, 4.0, 3.0, 2.0]).repeat(100), torch.linspace(0, 1, 600)]).double()
    found = spectral.eigenpairs(DiagonalOperator(values.to(dtype)), 5, "LA", seed=1)
    assert found.converged
    torch.testing.assert_close(found.values, values.new_full((5,), 5.0), rtol=0, atol=5e-6)


def test_a_search_for_copies_takes_few_products_where_much_is_known():
    values = torch.linspace(-0.999, 1, 1000, dtype=F64) ** 3  # no two of the same magnitude
    A, told = Counted(torch.diag(values)), []
    found = spectral.eigenpairs(A, 6, progress=told.append)
    assert_eigenpairs(found, A.matrix, values, "LM", 6, 1e-6)
    first = next(now.products for now in told if now.converged == 6)
    assert told[-1].products - first <= 25


def test_the_last_layer_of_a_regression_repeats_each_eigenvalue():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(40, 5, bias=False).double(), torch.randn(60, 40).double()
    G = imstep.GaussNewton(lambda: (model(x), torch.zeros(60, 5).double()), model)
    every = torch.linalg.eigvalsh(x.T @ x * 2 / 300).flip(0).repeat_interleave(5)
    torch.testing.assert_close(spectral.eigenpairs(G, 12, "LA").values, every[:12], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [6, 19, 25, 29, 38, 45, 47])
def test_a_copy_that_half_known_vectors_have_most_of_is_found(seed):
    every = torch.linspace(1, 0, 40, dtype=F64).pow(2).repeat_interleave(5)
    found = spectral.eigenpairs(DiagonalOperator(every), 12, "LA", seed=seed)
    torch.testing.assert_close(found.values, every[:12], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 2, 30, 300])
def test_multiples_of_the_identity(n, dtype):
    for factor in (0.0, 2.0):
        A = DiagonalOperator(torch.full((n,), factor, dtype=dtype))
        found = spectral.eigenpairs(A, min(n, 5))
        assert found.converged
        torch.testing.assert_close(found.values, torch.full((min(n, 5),), factor, dtype=F64))
        overlap = found.vectors.T @ found.vectors
        torch.testing.assert_close(overlap, torch.eye(min(n, 5), dtype=dtype), rtol=0, atol=1e-5)


def test_all_pairs_of_small_matrices():
    values = torch.tensor([3.0, -4.0, 0.0, 1.0], dtype=F64)
    A = Counted(planted(values))
    for which in ("LM", "LA", "SA"):
        assert_eigenpairs(spectral.eigenpairs(A, 4, which), A.matrix, values, which, 4, 1e-12)
    one = spectral.eigenpairs(DiagonalOperator(torch.tensor([-2.0])), 1)
    assert (one.values.tolist(), one.products) == ([-2.0], 1)


def test_low_rank_and_a_null_space():
    values = torch.cat([torch.tensor([4.0, 2.0, 1.0]), torch.zeros(297)]).double()
    matrix = planted(values)
    for which, k in (("LM", 3), ("LM", 6), ("SA", 4)):
        found = spectral.eigenpairs(DenseOperator(matrix), k, which)
        assert_eigenpairs(found, matrix, values, which, k, 1e-6)


def test_by_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)).double()
    x = torch.randn(40, 9).double()
    H = imstep.Hessian(lambda: (model(x) - 1).square().mean(), model)
    found, dense = spectral.eigenpairs(H, 3, by="layer"), H.to_dense()
    for name, at in {"0": slice(0, 200), "2": slice(200, 221)}.items():
        torch.testing.assert_close(found[name].values, wanted(torch.linalg.eigvalsh(dense[at, at]), "LM", 3))
    assert {name: len(own.values) for name, own in spectral.eigenpairs(H, by="parameter").items()} == {
        "0.weight": 10, "0.bias": 10, "2.weight": 10, "2.bias": 1
    }  # fmt: skip


# --- going on, and looking on ---------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_where_it_was():
    matrix = planted(spectrum())
    whole = spectral.eigenpairs(DenseOperator(matrix), 6, tol=1e-8, generator=seeded(4))
    part, spent = spectral.eigenpairs(DenseOperator(matrix), 6, tol=1e-8, seed=4, max_products=20), 0
    assert not part.converged
    rounds = 0
    while part.state is not None:
        assert not part.converged
        file = io.BytesIO()
        torch.save(part.state, file)
        file.seek(0)
        rounds += 1
        A = Counted(matrix)
        part = spectral.eigenpairs(
            A, 6, tol=1e-8, max_products=20 + 5 * rounds, resume=torch.load(file, weights_only=True)
        )
        spent += A.products
    assert rounds > 2
    assert part.converged
    assert part.values.equal(whole.values)
    assert part.vectors.equal(whole.vectors)
    assert part.products == whole.products
    other = DenseOperator(torch.eye(300, dtype=F64))
    state = spectral.eigenpairs(DenseOperator(matrix), 6, max_products=20).state
    with pytest.raises(ValueError, match="of size 400"):
        spectral.eigenpairs(other, 6, resume=state)


@pytest.mark.parametrize("unit", [2.0**-1000, 2.0**1000])
def test_units_whose_squares_leave_the_range_of_float64_change_nothing(unit):
    matrix, told = planted(spectrum()), []
    one = spectral.eigenpairs(DenseOperator(matrix), 3)
    part = spectral.eigenpairs(DenseOperator(unit * matrix), 3, max_products=20)
    other = spectral.eigenpairs(DenseOperator(unit * matrix), 3, resume=part.state, progress=told.append)
    assert other.converged
    assert other.products == one.products
    assert (other.residual_norms <= 1e-6 * unit * one.values.abs().max()).all()
    torch.testing.assert_close(other.values / unit, one.values)
    torch.testing.assert_close(told[-1].values / unit, one.values)
    small = spectral.eigenpairs(DenseOperator(unit * matrix[:20, :20]), 3)
    assert small.converged
    torch.testing.assert_close(small.values / unit, spectral.eigenpairs(DenseOperator(matrix[:20, :20]), 3).values)


def test_progress_is_told_after_each_product():
    told = []
    found = spectral.eigenpairs(DenseOperator(planted(spectrum())), 3, progress=told.append)
    assert [one.products for one in told] == list(range(1, len(told) + 1))
    assert found.products == len(told) + 3
    assert told[-1].converged == 3
    assert told[0].values.shape == (1,)
    torch.testing.assert_close(told[-1].values, found.values, rtol=1e-6, atol=1e-6)
    assert told[-1].residual_norms.max() < 1e-5


def test_the_same_seed_or_generator_gives_the_same_numbers():
    A = DenseOperator(planted(spectrum()).float())
    first, same, other = (spectral.eigenpairs(A, 3, **o) for o in ({}, {"generator": seeded(0)}, {"seed": 1}))
    assert first.vectors.equal(same.vectors)
    assert not first.vectors.equal(other.vectors)
    state = torch.get_rng_state()
    spectral.eigenpairs(A, 3)
    assert torch.get_rng_state().equal(state)


def test_running_out_of_products_is_no_success():
    A = DenseOperator(planted(torch.linspace(0, 1, 400, dtype=F64)))
    found = spectral.eigenpairs(A, 5, "LA", 1e-10, max_products=40)
    assert not found.converged
    assert found.products <= 40
    vectors = found.vectors
    residuals = (A.matrix @ vectors - vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residual_norms, residuals)


@pytest.mark.parametrize("fails_at", [1, 3, 30])
def test_products_that_are_not_finite_are_a_value(fails_at):
    class Failing(LinearOperator):
        made = 0

        def matvec(self, vector):
            self.made += 1
            return torch.linspace(1, 2, 300) * vector * (math.nan if self.made == fails_at else 1)

    found = spectral.eigenpairs(Failing(300, torch.float32, "cpu"), 4)
    assert not found.converged
    assert found.state is None
    assert found.values.isnan().all() or found.residual_norms.min() > 0
    small = spectral.eigenpairs(DiagonalOperator(torch.tensor([1.0, math.nan])), 1)
    assert (small.converged, small.values.isnan().all()) == (False, True)


@pytest.mark.parametrize("n", [20, 300])
def test_matrices_that_are_not_symmetric_are_noticed(n):
    matrix = torch.randn(n, n, generator=seeded(), dtype=F64)
    with pytest.raises(ValueError, match=r"not symmetric.*0.5 \* \(A \+ A.T\)"):
        spectral.eigenpairs(DenseOperator(matrix), 3)
    with pytest.raises(ValueError, match="not symmetric"):
        spectral.density(DenseOperator(matrix), steps=10, probes=2)
    spectral.eigenpairs(0.5 * (DenseOperator(matrix) + DenseOperator(matrix).T), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "between 1 and the size 300"),
        ({"k": 301}, "between 1 and the size 300"),
        ({"which": "SM"}, "A.inverse"),
        ({"which": "largest"}, "'LM'"),
        ({"which": "BE"}, "'LA' and for 'SA'"),
        ({"tol": -1.0}, "tol"),
        ({"tol": 1.0}, "tol"),
        ({"k": 5, "max_products": 10}, "at least 3 k = 15"),
    ],
)
def test_misuse_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral.eigenpairs(DiagonalOperator(torch.ones(300)), **arguments)


def test_the_number_of_pairs_is_a_whole_number():
    for k in (torch.tensor(2), np.int64(2)):
        assert len(spectral.eigenpairs(DiagonalOperator(torch.ones(300)), k).values) == 2
    with pytest.raises(TypeError, match=r"whole number, got 2\.0"):
        spectral.eigenpairs(DiagonalOperator(torch.ones(300)), 2.0)


@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 1e-6), (F64, 1e-14)])
def test_less_than_rounding_is_not_waited_for(dtype, left):
    A = Counted(planted(spectrum()).to(dtype))
    found = spectral.eigenpairs(A, 3, tol=0.0)
    assert found.converged
    assert A.products < 150
    assert found.residual_norms.max() <= left * spectrum().abs().max()


def test_a_small_matrix_is_decomposed_where_a_search_is_long():
    """The wanted end is a cluster, next to eigenvalues of all sizes."""
    values = torch.logspace(0, -12, 250, dtype=F64)
    A = Counted(planted(values))
    found = spectral.eigenpairs(A, 6, "SA", 1e-10)
    assert found.converged
    assert found.products == A.products <= 2 * 250
    torch.testing.assert_close(found.values, values.flip(0)[:6], rtol=0, atol=1e-13)


def test_a_million_unknowns_in_float32():
    """Sums over so many entries lose four digits where they are added up one after the other."""
    values = torch.randn(1_000_000, generator=seeded(), dtype=F64) * 0.05
    values[:6] = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0, 2.0])
    found = spectral.eigenpairs(DiagonalOperator(values.float()), 4)
    vectors = found.vectors.double()
    assert found.converged
    assert (values[:, None] * vectors - vectors * found.values).norm(dim=0).max() < 2e-6 * 9
    assert (vectors.T @ vectors - torch.eye(4, dtype=F64)).abs().max() < 2e-6
    torch.testing.assert_close(found.values, values[:4], rtol=1e-6, atol=0)
