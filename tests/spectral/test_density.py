"""Densities and functions of the spectrum against closed forms of all eigenvalues."""

import math

import pytest
import torch
from spectral_cases import F64, Counted, planted, seeded

import imstep
from imstep import spectral
from imstep.linalg import DenseOperator, DiagonalOperator

VALUES = torch.cat([torch.tensor([-2.0, 6.0, 8.0]), 1 + torch.randn(397, generator=seeded(9)) / 4]).double()


def smoothed(values, grid, width):
    """The density by its definition."""
    apart = (grid[:, None] - values.double()) / width
    return torch.exp(-(apart**2) / 2).mean(1) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_band_covers_the_density(dtype):
    covered, off, matrix = [], [], planted(VALUES).to(dtype)
    for seed in range(15):
        A = Counted(matrix)
        found = spectral.density(A, steps=50, probes=6, seed=seed)
        assert found.products == A.products <= 300
        true = smoothed(VALUES, found.grid, found.width)
        inside = true > 1e-3 * true.max()
        covered.append(((found.values - true).abs() <= found.error)[inside].double().mean())
        off.append((found.values - true).abs().max() / true.max())
        assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-4)
        assert found.grid.shape == found.values.shape == found.error.shape == (1024,)
    assert torch.stack(covered).mean() > 0.92
    assert torch.stack(off).mean() < 0.05


@pytest.mark.parametrize("name", ["normal", "uniform", "clusters", "a network's"])
def test_steps_end_where_more_would_change_little_of_the_band(name):
    """Signs meet each entry of a diagonal with the same weight, so that the steps alone are what is wrong."""
    many = torch.randn(20_000, generator=seeded(0))
    spectra = {
        "normal": many,
        "uniform": torch.rand(20_000, generator=seeded(1)),
        "clusters": many.sign() + many / 1000,
        "a network's": torch.cat([many / 1000, torch.logspace(-2, 1, 50)]),
    }
    A = DiagonalOperator(spectra[name].double())
    found = spectral.density(A, probes=3)
    assert found.products < 300
    off = found.values - smoothed(spectra[name], found.grid, found.width)
    assert (off.abs() <= 0.3 * found.error.clamp(min=1e-3 * found.error.max())).all()


def test_a_width_that_steps_do_not_resolve_takes_all_of_them():
    A = DiagonalOperator(torch.randn(20_000, generator=seeded(0)).double())
    assert spectral.density(A, steps=30, probes=3, width=0.01).products == 90


def test_the_default_width_is_resolved_by_the_steps():
    """With the same probes, twice as many steps change a density of the same width by little."""
    A = DenseOperator(planted(torch.linspace(-1, 3, 700, dtype=F64)))
    coarse = spectral.density(A, steps=30, probes=3)
    fine = spectral.density(A, steps=90, probes=3, width=coarse.width)
    on = torch.linspace(-1, 3, 50)
    at = lambda d: torch.as_tensor([float(d.values[(d.grid - x).abs().argmin()]) for x in on])
    assert (at(coarse) - at(fine)).abs().max() < 0.02 * float(fine.values.max())


def test_small_matrices_are_exact():
    for values in ([2.0], [0.0], [-1.0, -1.0, 3.0], [0.0] * 40):
        A = Counted(planted(values))
        found = spectral.density(A)
        assert A.products == found.products == len(values)
        true = smoothed(torch.tensor(values), found.grid, found.width)
        torch.testing.assert_close(found.values, true, atol=1e-6, rtol=1e-6)
        assert found.error.equal(torch.zeros_like(found.error))
        assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-4)


def test_multiples_of_the_identity_and_zero_end_early():
    for factor in (0.0, 1.5):
        found = spectral.density(DiagonalOperator(torch.full((3000,), factor)), steps=20)
        assert found.products == 10
        assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-4)
        assert found.grid[found.values.argmax()] == pytest.approx(factor, abs=found.width)


CLUSTERED = {
    "the identity": torch.ones(700),
    "two": torch.cat([torch.ones(300), torch.zeros(400)]),
    "three": torch.tensor([-1.0, 0.0, 1.0]).repeat(234)[:700],
    "far out": torch.cat([torch.tensor([1e4, 1e3]), torch.linspace(0, 1, 698)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", CLUSTERED)
def test_what_rounding_leaves_of_few_clusters_is_no_asymmetry(name, dtype):
    """A Lanczos process has its space after a few steps there, and what follows is rounding, of no direction."""
    values = CLUSTERED[name].double()
    width = 0.01 if name == "the identity" else None  # which has no range
    found = spectral.density(DenseOperator(planted(values).to(dtype)), steps=30, probes=4, width=width)
    true = smoothed(values, found.grid, found.width)
    assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-4)
    assert ((found.values - true).abs() <= found.error + 1e-3 * true.max()).double().mean() > 0.95


def test_outliers_of_a_large_matrix_are_no_asymmetry():
    """As networks have them, in float32."""
    values = torch.cat([torch.tensor([1e4, 1e3, 8.0]), 1 + torch.randn(300_000, generator=seeded()) / 4])
    found = spectral.density(DiagonalOperator(values), steps=12, probes=2)
    assert found.grid[-1] == pytest.approx(1e4 + 5 * found.width, rel=1e-4)


def test_entries_whose_squares_leave_the_range_of_float32():
    values = torch.linspace(1, 2, 300, dtype=F64)
    widths, values_of = [], []
    for scale in (1.0, 1e-25, 1e25):
        A = DenseOperator((planted(values) * scale).float())
        widths.append(spectral.density(A, steps=10, probes=2).width / scale)
        values_of.append(spectral.eigenpairs(A, 2).values / scale)
    assert widths == pytest.approx([widths[0]] * 3, rel=1e-3)
    torch.testing.assert_close(torch.stack(values_of[1:]), values_of[0].expand(2, 2), rtol=1e-5, atol=0)


def test_one_probe_knows_no_error():
    found = spectral.density(DenseOperator(planted(VALUES)), steps=10, probes=1)
    assert found.error.isinf().all()


def test_the_same_seed_or_generator_gives_the_same_numbers():
    A = DenseOperator(planted(VALUES))
    first, same, other = (
        spectral.density(A, steps=10, probes=3, **o) for o in ({}, {"generator": seeded(0)}, {"seed": 1})
    )
    assert first.values.equal(same.values)
    assert not first.values.equal(other.values)


def test_products_that_are_not_finite_are_a_value():
    for n in (10, 5000):
        found = spectral.density(DiagonalOperator(torch.full((n,), math.nan)), steps=5)
        assert found.values.isnan().all()
        assert not found.error.isfinite().any()


def test_one_probe_whose_products_become_infinite_late_is_a_value():
    class Failing(DiagonalOperator):
        blocks = 0

        def matmat(self, block):
            self.blocks += 1
            images = super().matmat(block)
            images[:, 0] *= math.inf if self.blocks == 23 else 1
            return images

    found = spectral.density(Failing(torch.randn(5000, generator=seeded()).double()), probes=3)
    assert found.values.isnan().all()


@pytest.mark.parametrize("options", [{"steps": 0}, {"probes": 0}, {"points": 1}, {"width": 0.0}])
def test_misuse_is_explained(options):
    with pytest.raises(ValueError, match="at least"):
        spectral.density(DiagonalOperator(torch.ones(3)), **options)


# --- single numbers -------------------------------------------------------------------------------------------------

POSITIVE = torch.logspace(-2, 1, 410, dtype=F64)


def test_frobenius_norms():
    matrix = planted(VALUES)
    found = [spectral.frobenius_norm(DenseOperator(matrix), 0.05, seed=seed) for seed in range(20)]
    assert sum(abs(one.value - float(matrix.norm())) <= one.error for one in found) >= 16
    assert all(one.converged for one in found)
    wide = DenseOperator(matrix).submatrix(range(30), range(200))
    assert spectral.frobenius_norm(wide, 1e-3).value == pytest.approx(float(matrix[:30, :200].norm()), rel=2e-3)
    assert spectral.frobenius_norm(DenseOperator(torch.zeros(99, 99))).value == 0


def test_log_determinants():
    matrix = planted(POSITIVE)
    true = float((POSITIVE + 0.1).log().sum())
    found = [spectral.log_determinant(DenseOperator(matrix), 0.1, steps=40, seed=seed) for seed in range(20)]
    assert sum(abs(one.value - true) <= one.error for one in found) >= 15
    few = spectral.log_determinant(DenseOperator(matrix), 1e-6, steps=4)
    assert abs(few.value - float(POSITIVE.log().sum())) < few.error
    small = spectral.log_determinant(DenseOperator(planted([1.0, 2.0, 5.0])))
    assert small.value == pytest.approx(math.log(10), rel=1e-12)
    assert small.converged


@pytest.mark.parametrize("n", [3, 300])
def test_a_log_determinant_of_an_indefinite_or_singular_matrix_is_refused(n):
    for least in (-1.0, 0.0):
        values = torch.linspace(1, 2, n, dtype=F64)
        values[: max(1, n // 20)] = least
        with pytest.raises(ValueError, match=r"positive definite.*Raise damping above 0"):
            spectral.log_determinant(DenseOperator(planted(values)), steps=30, probes=5)


@pytest.mark.parametrize("n", [5, 150])
def test_condition_numbers(n):
    A = DenseOperator(planted(torch.logspace(-1, 1, n, dtype=F64)))
    for damping in (0.0, 1.0):
        found = spectral.condition_number(A, damping)
        assert found.value == pytest.approx((10 + damping) / (0.1 + damping), rel=1e-3)
        assert abs(found.value - (10 + damping) / (0.1 + damping)) <= found.error
    singular = torch.linspace(0, 1, n, dtype=F64)
    assert spectral.condition_number(DenseOperator(planted(singular)), tol=1e-6).value == math.inf
    with pytest.raises(ValueError, match="eigenvalue -1"):
        spectral.condition_number(DenseOperator(planted(singular - 1)))
    bad = DenseOperator(planted(torch.logspace(0, -8, n, dtype=F64)))
    assert spectral.condition_number(bad).value == pytest.approx(1e8, rel=1e-3)


def test_by_layer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    x = torch.randn(30, 3, generator=seeded()).double()
    G = imstep.GaussNewton(lambda: (model(x), torch.zeros(30, 1).double()), model)
    dense, places = G.to_dense(), {"0": slice(0, 20), "2": slice(20, 26)}
    density, norm = spectral.density(G, by="layer"), spectral.frobenius_norm(G, by="layer", rtol=1e-6)
    logdet, condition = (f(G, 0.1, by="layer") for f in (spectral.log_determinant, spectral.condition_number))
    for name, at in places.items():
        values = torch.linalg.eigvalsh(dense[at, at])
        torch.testing.assert_close(density[name].values, smoothed(values, density[name].grid, density[name].width))
        assert norm[name].value == pytest.approx(float(values.norm()), rel=1e-5)
        assert logdet[name].value == pytest.approx(float((values + 0.1).log().sum()), rel=1e-8)
        assert condition[name].value == pytest.approx(float((values[-1] + 0.1) / (values[0] + 0.1)), rel=1e-6)
