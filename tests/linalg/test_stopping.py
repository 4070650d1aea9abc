import pytest
import torch

from imstep.linalg import (
    BestRate,
    DenseOperator,
    KrylovStatus,
    ProductBudget,
    Progress,
    ProgressStall,
    RelativeResidual,
    conjugate_gradient,
)


def progress(decreases, residual_norm=0.5, products=None):
    return Progress(
        len(decreases) - 1 if products is None else products, residual_norm, rhs_norm=1.0, decreases=decreases
    )


@pytest.mark.parametrize(("residual", "ends"), [(0.11, False), (0.1, True), (0.0, True)])
def test_relative_residual(residual, ends):
    assert (RelativeResidual(0.1).check(progress([0.0, 1.0], residual)) is KrylovStatus.CONVERGED) is ends


def test_progress_stall_is_the_rule_of_martens():
    rule = ProgressStall(tolerance=1e-3, minimum=2)
    # k = 2: stop if (q_j - q_{j-2}) / q_j < 0.002.
    assert rule.check(progress([0.0, 1.0, 1.0])) is None  # j = 2 is not beyond the window
    assert rule.check(progress([0.0, 1.0, 1.001, 1.003])) is None
    assert rule.check(progress([0.0, 1.0, 1.001, 1.0019])) is KrylovStatus.ENOUGH
    assert rule.check(progress([-1.0, -1.0, -1.0, -1.0])) is None  # a warm start that still loses


def test_progress_stall_widens_its_window_with_the_iteration():
    rule = ProgressStall(tolerance=5e-4, minimum=10)
    rising = [0.0] * 170 + [1.0] * 31  # flat for the last 30: window 10 would stop, window 20 would, not 40
    assert rule.check(progress(rising)) is KrylovStatus.ENOUGH
    recent = [0.0] * 185 + [1.0] * 16  # j = 200, k = 20: the rise is inside the window
    assert rule.check(progress(recent)) is None


def test_best_rate_is_the_rule_of_the_design():
    rule = BestRate(window=2, product_cost=2.0, fixed_cost=3.0)
    # j = 3: (q_3 - q_1) / 4 against q_3 / 9; equality at q_1 = 5/9 q_3.
    assert rule.check(progress([0.0, 5.0 - 1e-9, 7.0, 9.0])) is None
    assert rule.check(progress([0.0, 5.0 + 1e-9, 7.0, 9.0])) is KrylovStatus.ENOUGH
    assert rule.check(progress([0.0, 9.0])) is None


def test_best_rate_never_stops_within_its_first_window():
    for q in ([0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]):
        assert BestRate(window=3).check(progress(q)) is None
    assert BestRate(window=3).check(progress([0.0, 1.0, 1.0, 1.0, 1.0])) is KrylovStatus.ENOUGH


def test_best_rate_spends_more_where_fixed_costs_are_high(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-4, 0, 100))
    spent = [
        conjugate_gradient(DenseOperator(matrix), normal(100), stopping=[BestRate(fixed_cost=c)])
        for c in (1.0, 30.0, 1000.0)
    ]
    assert all(result.status is KrylovStatus.ENOUGH for result in spent)
    assert spent[0].products < spent[1].products < spent[2].products


def test_best_rate_comes_near_the_best_truncation(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-2, 0, 100))
    rule = BestRate(fixed_cost=10.0)
    result = conjugate_gradient(DenseOperator(matrix), normal(100), stopping=[rule])
    full = conjugate_gradient(DenseOperator(matrix), normal(100), stopping=[RelativeResidual(1e-10)])

    def rate(j):
        return full.decreases[j] / (rule.fixed_cost + j * rule.product_cost)

    assert rate(result.iterations) >= 0.9 * max(rate(j) for j in range(1, full.iterations))


def test_product_budget_counts_refreshes_and_warm_start(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-3, 0, 30))
    result = conjugate_gradient(
        DenseOperator(matrix),
        normal(30),
        x0=normal(30, seed=3),
        stopping=[ProductBudget(9)],
        recompute_residual_every=3,
    )
    assert result.status is KrylovStatus.MAX_ITERATIONS
    assert (result.products, result.iterations) == (9, 6)


def test_the_first_rule_that_answers_counts(with_spectrum, normal):
    matrix, _ = with_spectrum([1.0, 2.0])
    rules = [ProductBudget(1), RelativeResidual(0.999)]
    assert (
        conjugate_gradient(DenseOperator(matrix), normal(2), stopping=rules).status
        is KrylovStatus.MAX_ITERATIONS
    )
    assert (
        conjugate_gradient(DenseOperator(matrix), normal(2), stopping=rules[::-1]).status
        is KrylovStatus.CONVERGED
    )


def test_without_rules_cg_runs_to_rounding_level(with_spectrum, normal):
    matrix, _ = with_spectrum([1.0, 2.0, 3.0])
    result = conjugate_gradient(DenseOperator(matrix), normal(3), stopping=())
    assert result.status is KrylovStatus.CONVERGED
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, normal(3)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: RelativeResidual(1.0),
        lambda: RelativeResidual(-0.1),
        lambda: ProgressStall(tolerance=0.0),
        lambda: ProgressStall(minimum=0),
        lambda: BestRate(window=0),
        lambda: BestRate(product_cost=0.0),
        lambda: BestRate(fixed_cost=0.0),
        lambda: ProductBudget(0),
    ],
)
def test_options_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match="got"):
        build()
