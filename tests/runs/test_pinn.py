"""The race of physics-informed networks in small: a run of it, what its records say, and its rivals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.pinn.__main__ import main
from benchmarks.pinn.page import write_page
from benchmarks.pinn.phases import Kept, Then
from benchmarks.pinn.sides import SIDES
from benchmarks.pinn.spring import Spring
from benchmarks.pinn.table import hours, summary
from benchmarks.pinn.tasks import TASKS, Goal, reached
from benchmarks.strength.record import StrengthRecord, add, load
from benchmarks.strength.run import StrengthRun, describe, run_side, thinned
from benchmarks.strength.sides import Side
from imstep.runs.records import Point
from imstep.runs.rows import Limits
from imstep.runs.seconds import Seconds
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import PhysicsTask
from imstep.tasks.models import mlp

TASK = TASKS["poisson-2d"]
SMALL = replace(TASK.recipe, network=partial(mlp, (2, 4, 1)))


def made(side: str, seed: int, errors: list[float], seconds: float = 1.0) -> StrengthRun:
    """A run with a point every so many seconds."""
    curve = tuple(Point(10.0 * k, seconds * k, k, float(k), e * e, e) for k, e in enumerate(errors))
    return StrengthRun(side, seed, {}, {"seconds": 40.0}, "", curve, 0, {}, describe())


def test_a_short_race_is_kept_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--tasks", "poisson-2d", "--sides", "imstep", "spring", "--short", "--records", str(tmp_path)]
    main(arguments)
    record, written = load(tmp_path, "poisson-2d"), (tmp_path / "poisson-2d.json").read_bytes()
    assert [(run.side, run.seed) for run in record.runs] == [("imstep", 0), ("spring", 0)]
    assert [len(sweep.rows) for sweep in record.sweeps] == [4]  # imstep has nothing to tune
    own = record.of("imstep")[0]
    assert own.error is not None
    assert own.curve[-1].train < own.curve[0].train
    rms = math.sqrt(sum(e * e for row in own.error for e in row) / sum(map(len, own.error)))
    assert rms == pytest.approx(own.curve[-1].heldout, rel=0.1)
    capsys.readouterr()
    main([*arguments, "--table"])
    assert "Poisson's equation in the square" in capsys.readouterr().out
    main(arguments)
    assert (tmp_path / "poisson-2d.json").read_bytes() == written
    with pytest.raises(SystemExit):
        main([*arguments, "--clock", "processor"])
    assert "poisson-2d is recorded in wall seconds" in capsys.readouterr().err
    _writes_a_page(tmp_path, record)


def _writes_a_page(folder: Path, record: StrengthRecord) -> None:
    (folder / "images").mkdir()
    marks = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("pinn-summary", "pinn"))
    (folder / "pinn.md").write_text(f"before\n{marks}after\n")
    write_page([record, StrengthRecord("burgers")], docs=folder)
    text = (folder / "pinn.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| burgers, relative |" in text
    assert "![Solution, errors and losses of Poisson's equation in the square](images/pinn-poisson-2d.png)" in text
    assert (folder / "images" / "pinn-poisson-2d.png").stat().st_size > 0


def test_the_summary_compares_with_the_best_rival() -> None:
    task = replace(TASK, goals=(Goal(1e-3, 2.0), Goal(9.9e-7)))
    rivals = [made("spring", seed, [1.0, 1e-1, 1e-2, 1e-4], seconds=10.0) for seed in (0, 1)]
    rivals += [made("adam-lbfgs", 0, [1.0, float("nan")], seconds=10.0)]
    cells = lambda own: summary([task], [StrengthRecord("x", (), (*own, *rivals))]).rows[0][2:]
    good = [made("imstep", seed, [1.0, 1e-2, 1e-4, 1e-7]) for seed in (0, 1)]
    reach, here, ratio = cells(good)
    assert reach == "1e-3 within 2 s; 9.9e-7 in the end"
    assert here.startswith("1e-3 after 2 s, met; 9.9e-7 after 3 s, met; at the end 1.00e-7")
    assert ratio.startswith("0.067, met (ENGD")
    slow = [made("imstep", 0, [1.0, 1e-2, 1e-4], seconds=4.0)]
    assert "never in 40 s, **missed**" in cells(slow)[1]
    assert cells(slow)[2].startswith("0.27, **missed**")
    assert cells([made("imstep", 0, [1.0, 1e-2])])[2].startswith("**missed**: never")
    assert cells([])[1:] == ("not measured", "not measured")


def test_hours_are_those_of_what_is_missing() -> None:
    names, runs = ["imstep", "spring"], (made("imstep", 0, [1.0]),)
    left = lambda record: 3600 * hours([TASK], [record], names, (0, 1))
    assert left(StrengthRecord("x")) == pytest.approx(4 * 40 + 4 * 10)
    assert left(StrengthRecord("x", (), runs)) == pytest.approx(3 * 40 + 4 * 10)


def test_a_record_has_one_clock(tmp_path: Path) -> None:
    add(tmp_path, "poisson-2d", made("imstep", 0, [1.0]), Seconds.PROCESSOR)
    record = load(tmp_path, "poisson-2d")
    assert record.clock is Seconds.PROCESSOR
    assert "processor seconds" in summary([TASK], [record]).rows[0][0]
    with pytest.raises(ValueError, match="--clock processor"):
        add(tmp_path, "poisson-2d", made("imstep", 1, [1.0]))
    path = tmp_path / "burgers.json"  # as earlier versions wrote it
    path.write_text((tmp_path / "poisson-2d.json").read_text().replace('"clock": "processor", ', ""))
    assert load(tmp_path, "burgers").clock is Seconds.WALL


def test_a_curve_keeps_where_its_error_falls() -> None:
    points = [Point(float(k), k / 10, k, float(k), 1.0, 0.9**k) for k in range(400)]
    points[200] = replace(points[200], heldout=float("nan"))
    run = replace(made("imstep", 0, []), curve=thinned(points, TASK))
    assert len(run.curve) < 200
    for error in (0.5, 1e-3, 1e-6, 1e-9, 1e-15):
        found = reached(run, error)
        assert found is not None
        assert found.steps <= math.log(error) / math.log(0.9) + 7


def test_every_side_takes_steps() -> None:
    assert isinstance(SMALL, PhysicsTask)
    for name, side in SIDES.items():
        if name == "soap-cosine":  # needs a package of others
            continue
        problem = SMALL.build(0, dtype=torch.float64, examples=40)
        start = torch.cat([p.detach().flatten().clone() for p in problem.parameters])
        short = {key: 2 for key in ("adam", "kept") if key in side.spec.defaults}
        stepper = side.spec.create(problem, **{**side.trials[0], **short})
        batches = [next(iter(problem.batches(epoch))) for epoch in range(6)]
        results = [stepper.step(problem, batch) for batch in batches]
        end = torch.cat([p.detach().flatten() for p in problem.parameters])
        assert bool(end.isfinite().all()), name
        assert not torch.equal(start, end), name
        assert all(result.cost > 0 for result in results), name


class Counted(Stepper):
    """Steps that keep what they were given."""

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def step(self, problem: object, batch: object) -> StepResult:
        self.seen.append((self, batch))
        return StepResult(0.0, 1.0)


def test_points_stay_for_some_steps_after_the_first_phase() -> None:
    first, later, made_ones = [], [], []
    make = lambda: made_ones.append(Counted(later)) or made_ones[-1]
    stepper = Then(Counted(first), 2, lambda: Kept(make, 2, anew=True))
    for batch in range(6):
        stepper.step(None, batch)
    assert [batch for _, batch in first] == [0, 1]
    assert [batch for _, batch in later] == [2, 2, 4, 4]
    assert later[0][0] is later[1][0] is not later[2][0]


@pytest.mark.parametrize("count", [3, 30])
def test_spring_is_its_formula(count: int) -> None:
    torch.manual_seed(0)
    A, b = torch.randn(count, 5, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = Spring([w], rate=0.3, momentum=0.9, damping=1e-3)
    v, x = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        optimizer.step(lambda: (A @ w - b).square().sum() / 2)
        rhs = A.T @ (A @ x - b + 0.9 * A @ v)
        v = 0.9 * v - torch.linalg.solve(A.T @ A + 1e-3 * torch.eye(5, dtype=torch.float64), rhs)
        x = x + 0.3 * v
    torch.testing.assert_close(w.detach(), x)


def test_a_side_that_fails_keeps_its_curve() -> None:
    class Failing(Counted):
        def step(self, problem: object, batch: object) -> StepResult:
            if len(self.seen) == 2:
                raise RuntimeError("singular\nsomewhere")
            return super().step(problem, batch)

    spec = OptimizerSpec("failing", "Failing", "", lambda problem, options: Failing([]))
    small = replace(TASK, recipe=SMALL)
    side, often = Side("failing", "Failing", spec, ({},)), 10**15
    run = run_side(small, side, {}, 0, Limits(seconds=1e9), None, lambda *_: None, often)
    assert run.ending == "failed: RuntimeError: singular"
    assert [p.steps for p in run.curve] == [0, 1, 2]
