"""A program of one's own defines a task; what goes wrong in it is told with its own line."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imstep.tasks import (
    Batch,
    Condition,
    ExampleTask,
    PhysicsTask,
    Reference,
    TaskError,
    find_task,
    get_task,
    held_out,
)
from imstep.tasks.sampling import box
from imstep.tasks.templates import KINDS, write_program

LINE = """
import torch
from torch import nn
from imstep.tasks import ExampleTask, held_out

x = torch.linspace(-1, 1, 20)[:, None]

def make(name, width):
    return ExampleTask(name, "t", "d.", lambda data: held_out(x, 2 * x), lambda: nn.Linear(1, width), nn.MSELoss())
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path


def program(folder: Path, text: str, name: str = "problem.py") -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(LINE + text)
    return str(file)


def refused(name: str) -> str:
    with pytest.raises(TaskError) as caught:
        get_task(name)
    return str(caught.value)


def test_the_only_task_is_taken(tmp_path: Path) -> None:
    assert get_task(program(tmp_path, "task = alias = make('line', 1)\n_other = make('private', 1)")).name == "line"


def test_of_several_one_is_named(tmp_path: Path) -> None:
    file = program(tmp_path, "a, b = make('first', 1), make('second', 1)\nclass Box: c = a\ndef d(): return b")
    assert refused(file) == f"{file} defines 2 tasks. Choose one: {file}:a, {file}:b."
    found = {name: get_task(f"{file}:{name}").name for name in ("a", "b", "Box.c", "d")}
    assert found == {"a": "first", "b": "second", "Box.c": "first", "d": "second"}
    assert "has no 'e'. Choose one:" in refused(f"{file}:e")
    assert "problem.py:x is an object of type Tensor, not a Task." in refused(f"{file}:x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"defines no task. Give it a line `task = ExampleTask"),
        ("built = make('a', 1).build()", "built is a problem built already"),
        ("class Mine(ExampleTask): pass", "defines the class Mine but no object of it"),
        ("task = make('a', 1", r"problem.py, line \d+: '\(' was never closed"),
        ("import absent_package", r"problem.py, line 10: ModuleNotFoundError: No module named 'absent_package'"),
        ("1 / 0", r"problem.py, line 10: ZeroDivisionError"),
        ("import sys\nsys.exit(1)", r"problem.py, line 11: SystemExit"),
        ("held_out(x, x, share=2)", r"problem.py, line 10: share=2"),
        ("from imstep.tasks import Batch\nBatch(x, x[:1])", "line 11: 20 inputs but 1 targets"),
    ],
)
def test_a_program_without_a_task_is_explained(tmp_path: Path, text: str, message: str) -> None:
    assert re.search(message, refused(program(tmp_path, text)))


def test_what_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "problem.py does not exist. `imstep new problem" in refused("problem.py")
    assert "there is no module 'nowhere'" in refused("nowhere:task")
    assert "Own problems: a file that ends in .py, .csv" in refused("problem")


@pytest.mark.parametrize("how", ["import width", "from . import width", "from .width import *; from . import width"])
def test_files_beside_it_can_be_imported(tmp_path: Path, how: str) -> None:
    """Also where another program has imported a file of the same name before."""
    for folder, width in (("one", 3), ("two", 5)):
        file = program(tmp_path / folder, f"{how}\ntask = make('line', width.WIDTH)")
        (tmp_path / folder / "width.py").write_text(f"WIDTH = {width}")
        origin = find_task(file)
        assert origin.task.build().size == 2 * width
        assert [path.name for path in origin.files()] == ["problem.py", "width.py"]


def test_a_file_in_a_package_can_import_from_above(tmp_path: Path) -> None:
    file = program(tmp_path / "lab" / "heat", "from ..width import WIDTH\ntask = make('line', WIDTH)")
    for part in ("lab/__init__.py", "lab/heat/__init__.py"):
        (tmp_path / part).write_text("")
    (tmp_path / "lab" / "width.py").write_text("WIDTH = 4")
    origin = find_task(file)
    assert origin.task.build().size == 8
    assert origin.root == tmp_path
    assert {str(path.relative_to(tmp_path)) for path in origin.files()} == {
        "lab/heat/problem.py", "lab/width.py", "lab/__init__.py", "lab/heat/__init__.py",
    }  # fmt: skip


def test_a_module_is_found_from_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "task = make('line', 1)", "lab/problem.py")
    monkeypatch.chdir(tmp_path)
    assert get_task("lab.problem:task").name == "line"


def test_a_copy_runs_in_place_of_the_original(tmp_path: Path) -> None:
    """Its own data stays where the original has it."""
    text = "import width\nfrom pathlib import Path\nn = int(Path(__file__).with_name('n.txt').read_text())\n"
    file = program(tmp_path / "here", text + "task = make(f'{n}', width.WIDTH)")
    (tmp_path / "here" / "n.txt").write_text("7")
    (tmp_path / "here" / "width.py").write_text("WIDTH = 2")
    kept = tmp_path / "kept"
    for path in find_task(file).files():
        (kept / path.name).parent.mkdir(exist_ok=True)
        (kept / path.name).write_text(path.read_text())
    Path(file).write_text("broken(")
    (tmp_path / "here" / "width.py").write_text("broken(")
    task = find_task(file, kept=kept).task
    assert task.name == "7"
    assert task.build().size == 4


@pytest.mark.parametrize("kind", KINDS)
def test_each_program_to_start_from_trains(tmp_path: Path, kind: str) -> None:
    from imstep import LeastSquares, NewtonKrylov

    file = write_program(str(tmp_path / "mine"), kind)
    task = get_task(str(file))
    assert task.name == "mine"
    problem = task.build(seed=0, dtype=torch.float64, examples=60)
    optimizer = (LeastSquares if kind == "pinn" else NewtonKrylov)(problem.parameters)
    before = problem.evaluate(problem.train).loss
    for epoch in range(3):
        optimizer.step(problem.closure(next(problem.batches(epoch))))
    assert problem.evaluate(problem.train).loss < 0.9 * before
    text = file.read_text()
    assert "NAME" not in text
    with pytest.raises(TaskError, match="exists already and is left as it is"):
        write_program(str(file), kind)
    assert file.read_text() == text


def test_what_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="give one of classification, regression"):
        write_program(str(tmp_path / "a"), "gan")
    with pytest.raises(TaskError, match="cannot be written: No such file"):
        write_program(str(tmp_path / "absent" / "a"), "pinn")


@pytest.mark.parametrize("name", ["", "torch", "random", "x/json.py"])
def test_programs_that_would_hide_a_module_are_not_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(TaskError, match="would hide the module of that name, or has none"):
        write_program(f"{tmp_path}/{name}", "pinn")


def test_examples_are_held_out_by_seed() -> None:
    x = torch.arange(10.0)
    parts = [held_out(x, x, 0.3, seed=seed) for seed in (0, 0, 1)]
    for train, heldout in parts:
        assert sorted([*train.inputs.tolist(), *heldout.inputs.tolist()]) == x.tolist()
        assert (len(train), len(heldout)) == (7, 3)
    assert torch.equal(parts[0][0].inputs, parts[1][0].inputs)
    assert not torch.equal(parts[0][0].inputs, parts[2][0].inputs)
    assert [len(batch) for batch in held_out(x[:2], x[:2], 0.01)] == [1, 1]
    with pytest.raises(TaskError, match="at least two"):
        held_out(x[:1], x[:1])
    assert isinstance(parts[0][0], Batch)


def test_a_physics_task_without_a_solution_is_judged_at_other_points() -> None:
    condition = Condition("slope", lambda u, x: u(x) - x, box([(0.0, 1.0)]), 10)
    problem = PhysicsTask("t", "t", "d.", lambda: torch.nn.Linear(1, 1), (condition,)).build(dtype=torch.float64)
    points = problem.heldout.of[0]
    assert not torch.equal(points, problem.train.of[0])
    expected = (problem.model(points) - points).square().mean().item()
    assert problem.evaluate(problem.heldout).loss == pytest.approx(expected, rel=1e-12)
    assert problem.surfaces() is None


@pytest.mark.parametrize(
    ("residual", "says"),
    [
        (lambda u, x: u(x) - x[:, 0], "where a column (20, 1) and a row (20,) are combined"),
        (lambda u, x: (u(x) - x).square().mean(), "the shape () at 20 points: return what is missed at each"),
        (lambda u, x: (u(x) - x).T, "the shape (1, 20) at 20 points"),
        (lambda u, x: (u(x) - x, u(x)), "type tuple, not a tensor"),
    ],
)
def test_residuals_that_are_not_one_a_point_are_refused(residual: object, says: str) -> None:
    task = PhysicsTask("t", "t", "d.", lambda: torch.nn.Linear(1, 1), (Condition("c", residual, box([(0, 1)]), 20),))
    problem = task.build()
    with pytest.raises(TaskError, match=re.escape(says)):
        problem.evaluate(problem.train)


@pytest.mark.parametrize(("count", "components"), [(20, 1), (20, 30), (3, 3), (1, 1)])
def test_residuals_of_one_a_point_are_taken(count: int, components: int) -> None:
    network = lambda: torch.nn.Linear(1, components)
    for residual in (lambda u, x: u(x) - x, lambda u, x: u(x)[:, 0]):
        condition = Condition("c", residual, box([(0, 1)]), count)
        problem = PhysicsTask("t", "t", "d.", network, (condition,)).build()
        assert problem.evaluate(problem.train).loss > 0


def test_references_that_do_not_fit_are_refused() -> None:
    x = torch.linspace(0, 1, 12)[:, None]
    for values in (x[:, 0], x[:1]):
        with pytest.raises(TaskError, match=r"points \(k, d\) and values \(k, m\)"):
            Reference(x, values)
    with pytest.raises(TaskError, match="give relative=False"):
        Reference(x, 0 * x)
    condition = Condition("c", lambda u, x: u(x) - x, box([(0, 1)]), 20)
    wide = Reference(x, x.expand(-1, 3))
    problem = PhysicsTask("t", "t", "d.", lambda: torch.nn.Linear(1, 1), (condition,), lambda: wide).build()
    with pytest.raises(TaskError, match=r"values \(12, 3\), and the network gives \(12, 1\)"):
        problem.evaluate(problem.heldout)
    for conditions in ((), condition, (lambda u, x: u(x),)):
        with pytest.raises(TaskError, match="a tuple of one Condition or more"):
            PhysicsTask("t", "t", "d.", lambda: torch.nn.Linear(1, 1), conditions)


X = torch.linspace(-1, 1, 20)[:, None]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"load": lambda data: (X, X)}, "got 2 of Tensor, Tensor"),
        ({"load": lambda data: None}, "got an object of type NoneType"),
        ({"load": lambda data: held_out(X.numpy(), X)}, "a batch is of two tensors, got ndarray and Tensor"),
        ({"load": held_out(X, X)}, "is a function of a folder"),
        ({"model": torch.nn.Linear(1, 1)}, "a function that makes one"),
        ({"loss": lambda outputs, targets: (outputs - targets).square()}, "has the shape (16, 1): it is one number"),
    ],
)
def test_parts_of_a_task_that_are_something_else_are_refused(changed: dict[str, object], says: str) -> None:
    parts = {"load": lambda data: held_out(X, 2 * X), "model": lambda: torch.nn.Linear(1, 1)}
    task = ExampleTask("t", "t", "d.", **{**parts, "loss": torch.nn.MSELoss(), **changed})
    with pytest.raises(TaskError, match=re.escape(says)):
        (lambda problem: problem.evaluate(problem.train))(task.build())


def _fails(*_: object) -> torch.Tensor:
    raise RuntimeError("not here")


HERE = f"{__file__}, line {_fails.__code__.co_firstlineno + 1}: RuntimeError: not here"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"load": _fails}, HERE),
        ({"model": _fails}, HERE),
        ({"loss": _fails}, HERE),
        ({"start": _fails}, HERE),
        ({"model": lambda: torch.nn.Linear(3, 1)}, "network, loss or data of 't': RuntimeError: mat1 and mat2 shapes"),
    ],
)
def test_errors_in_parts_of_a_task_are_told_with_their_line(changed: dict[str, object], says: str) -> None:
    parts = {"load": lambda data: held_out(X, 2 * X), "model": lambda: torch.nn.Linear(1, 1)}
    task = ExampleTask("t", "t", "d.", **{**parts, "loss": torch.nn.MSELoss(), **changed})
    with pytest.raises(TaskError, match=re.escape(says)):
        (lambda problem: problem.evaluate(problem.train))(task.build())


@pytest.mark.parametrize(
    ("network", "residual", "says"),
    [
        (lambda: torch.nn.Linear(1, 1), lambda u, x: _fails(), HERE),
        (_fails, lambda u, x: u(x), HERE),
        (lambda: torch.nn.Linear(2, 1), lambda u, x: u(x), "test_own.py, line"),
    ],
)
def test_errors_in_an_equation_are_told_with_their_line(network: Any, residual: Any, says: str) -> None:
    condition = Condition("c", residual, box([(0, 1)]), 20)
    task = PhysicsTask("t", "t", "d.", network, (condition,))
    with pytest.raises(TaskError, match=re.escape(says)):
        (lambda problem: problem.evaluate(problem.train))(task.build())
