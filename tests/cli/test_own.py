"""A problem of one's own on the command line: a program or a table, from `new` to `resume` and `compare`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_cases import imstep_command, output

from imstep.cli import app
from imstep.cli.options import complete_optimizer, complete_task
from imstep.runs.interrupt import Interrupt
from imstep.runs.optimizers import METHODS, OPTIMIZERS, get_optimizer
from imstep.tasks import TASKS

QUICK = ["--threads", "1", "--examples", "40"]

PROGRAM = """
import torch
from torch import nn
from imstep.tasks import ExampleTask, held_out
from .slope import SLOPE

x = torch.linspace(-1, 1, 50)[:, None]
task = ExampleTask("my line", "A line", "50 points.", lambda d: held_out(x, SLOPE * x), lambda: nn.Linear(1, 1), LOSS)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "here" / "problem.py"
    file.parent.mkdir()
    file.write_text(PROGRAM.replace("LOSS", "nn.MSELoss()"))
    file.with_name("slope.py").write_text("SLOPE = 2.0")
    return file


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "houses.csv"
    rows = [f"{20 + 4.5 * at},{'AB'[at % 2]},{3000 * at + 500 * (at % 2)}" for at in range(40)]
    file.write_text("\n".join(["size,town,price", *rows]))
    return file


def config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["config"]


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "record")} for row in found]


def test_new_writes_a_program_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "imstep train waves.py" in output("new", "waves", "--kind", "regression")
    text = Path("waves.py").read_text()
    assert "waves.py exists already" in output("new", "waves.py", "--kind", "pinn", code=2)
    assert Path("waves.py").read_text() == text
    assert "one of classification, regression" in output("new", "other", "--kind", "gan", code=2)


@pytest.mark.usefixtures("no_pages")
def test_a_run_keeps_its_program_and_goes_on_with_it(program: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ["train", str(program), "-o", "adam", *QUICK]
    output(*words, "--epochs", "4", "--out", str(whole))
    shown = output(*words, "--epochs", "2", "--out", str(run))
    assert "my line by adam: 2 parameters, 40 examples (10 held out)" in shown
    assert sorted(path.name for path in (run / "problem").iterdir()) == ["problem.py", "slope.py"]
    assert [Path(name).name for name in config(run)["files"]] == ["problem.py", "slope.py"]
    program.with_name("slope.py").write_text("SLOPE = 3.0")
    assert "slope.py changed since this run began, or moved: it goes on with the copy" in output(
        "train", "--resume", str(run), "--epochs", "4"
    )
    assert rows(run) == rows(whole)
    program.unlink()
    (run / "problem" / "problem.py").write_text("changed")
    assert "are not as this run wrote them" in output("train", "--resume", str(run), code=2)


@pytest.mark.usefixtures("no_pages")
def test_a_run_of_a_module_goes_on_from_any_folder(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    output("train", "here.problem:task", "-o", "adam", *QUICK, "--epochs", "1", "--out", str(run))
    assert [Path(name).name for name in config(run)["files"]] == ["problem.py", "slope.py"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "all epochs done" in output("train", "--resume", str(run), "--epochs", "2")


def test_a_run_on_a_table(table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", str(table), "--target", "price", "--hidden", "8", "--threads", "1"]
    shown = output(*words, "--budget", "20", "--out", str(run))
    assert "RMSE of price train" in shown
    assert "32 rows (8 held out)" in shown
    assert config(run)["table"] == {"target": "price", "kind": None, "drop": [], "impute": False, "hidden": [8]}
    assert "There was nothing left to do" in output("train", "--resume", str(run))
    table.write_text(table.read_text() + "\n1,A,1")
    message = output("train", "--resume", str(run), "--budget", "30", code=2)
    assert "houses.csv has changed since this run began" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["houses.csv"], "say which column of houses.csv to predict: --target NAME. Columns: size, town, price."),
        (["houses.csv", "--target", "price", "--hidden", "a"], "--hidden a: give whole numbers such as 64,64"),
        (["houses.csv", "--target", "town", "-o", "least-squares"], "not recognised as a sum of squares"),
        (["houses.csv", "--target", "price", "--data", "."], "is the data already"),
        (["digits-mlp", "--target", "price"], "are for tables such as data.csv; digits-mlp is none"),
        (["absent.csv", "--target", "price"], "absent.csv does not exist"),
        (["absent.py"], "absent.py does not exist"),
        (["here/problem.py:other"], "here/problem.py has no 'other'. Choose one: here/problem.py:task."),
        (["here/problem.py", "-o", "torch.optim:LBFGS"], "torch.optim:LBFGS needs a closure"),
        (["here/problem.py", "-o", "torch.optim:Absent"], "Write MODULE:CLASS, such as torch.optim:RMSprop."),
        (["here/problem.py", "-o", "absent:SOAP"], "absent:SOAP: No module named 'absent'. Install it"),
    ],
)
def test_a_refusal_leaves_no_run_directory(
    table: Path, program: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(table.parent)
    assert message in output("train", *words, code=2)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("command", ["train", "compare", "spectrum", "tasks"])
def test_an_error_of_the_network_or_loss_is_told(program: Path, command: str) -> None:
    words = [] if command in ("spectrum", "tasks") else ["--budget", "5"]
    text = program.read_text()
    program.write_text(text.replace("nn.MSELoss()", "lambda outputs, targets: outputs @ targets"))
    assert "problem.py, line 8: RuntimeError: mat1 and mat2 shapes" in output(command, str(program), *words, code=2)
    program.write_text(text.replace("nn.Linear(1, 1)", "nn.Linear(3, 1)"))
    assert "of 'my line': RuntimeError: mat1 and mat2 shapes" in output(command, str(program), *words, code=2)


@pytest.mark.usefixtures("no_pages")
def test_compare_races_any_optimizers_on_it(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    racers = "least-squares,torch.optim:RMSprop"
    words = ["--optimizers", racers, "--budget", "8", "--no-tune", "--dtype", "float64", "--threads", "1"]
    output("compare", str(program), *words, "--out", str(out))
    record = json.loads((out / "comparison.json").read_text())
    assert [run["label"] for run in record["runs"]] == ["LeastSquares", "RMSprop"]
    assert "--dtype float64" in record["command"]
    assert record["runs"][0]["points"][-1]["train"] < 1e-17  # below what float32 resolves


def test_compare_refuses_before_anything_has_run(program: Path, tmp_path: Path) -> None:
    program.write_text(PROGRAM.replace("LOSS", "nn.L1Loss()"))
    words = ["--optimizers", "adam,least-squares", "--budget", "8", "--threads", "1", "--out", str(tmp_path / "c")]
    message = output("compare", str(program), *words, code=2)
    assert "least-squares does not suit my line: " in message
    assert "adam" not in message.split("error:")[0]
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_comparison_says_what_is_done_and_goes_on_on_the_same_files_only(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"

    class AfterTheFirst(Interrupt):
        @property
        def requested(self) -> bool:
            if (out / "comparison.json").exists():
                raise KeyboardInterrupt
            return False

        @requested.setter
        def requested(self, value: bool) -> None: ...

    words = ["compare", str(program), "--optimizers", "lbfgs,adam", "--budget", "4", "--no-tune", "--batch-size", "40"]
    words += ["--threads", "1", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr("imstep.runs.studies.Interrupt", AfterTheFirst)
        shown = output(*words, code=130)
    assert "Stopped at once, without a report. Done and kept: L-BFGS, batch 40 (lowest " in shown
    assert f"--out {out}" in shown
    program.with_name("slope.py").write_text("SLOPE = 3.0")
    assert "slope.py has changed since the comparison" in output(*words, code=2)
    program.with_name("slope.py").write_text("SLOPE = 2.0")
    assert "lowest training loss" in output(*words)


def test_tasks_says_which_optimizers_suit(program: Path) -> None:
    listed = output("tasks")
    assert "optimizers: least-squares, newton-krylov, lbfgs, adam" in listed
    assert "optimizers: newton-krylov, adam, sgd, lbfgs" in listed
    shown = output("tasks", str(program))
    assert "newton-krylov suits least-squares suits adam suits" in shown
    assert "natural-gradient can train it" in shown
    program.write_text(PROGRAM.replace("LOSS", "nn.L1Loss()"))
    shown = output("tasks", str(program))
    assert "least-squares refuses it: least-squares does not suit my line" in shown


def test_options_are_handed_on_in_their_own_types() -> None:
    found = get_optimizer("torch.optim:SGD")
    assert found.resolve({"nesterov": 1.0, "momentum": 0.9})["nesterov"] == 1.0
    import torch

    problem = type("P", (), {"parameters": [torch.nn.Parameter(torch.zeros(1))]})()
    optimizer = found.create(problem, nesterov=1.0, momentum=0.9, weight_decay=0.1).optimizer
    assert (optimizer.defaults["nesterov"], optimizer.defaults["weight_decay"]) == (True, 0.1)


def test_the_shell_completes_tasks_files_and_optimizers(
    table: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(table.parent)
    assert complete_task("digits-m") == ["digits-mlp"]
    assert complete_task("h") == ["heat-1d", "heat-inverse", "here/", "houses.csv"]
    assert complete_task("here/") == ["here/problem.py", "here/slope.py"]
    assert set(TASKS) <= set(complete_task(""))
    assert complete_optimizer("adam,lb") == ["adam,lbfgs"]
    assert complete_optimizer("") == [*OPTIMIZERS, *METHODS]


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shown = imstep_command("--help").output
    assert "--install-completion" in shown
    words = {"_IMSTEP_COMPLETE": "complete_bash", "COMP_WORDS": "imstep train digits-c", "COMP_CWORD": "2"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["imstep"])
    with pytest.raises(SystemExit):
        app(prog_name="imstep")
    assert capsys.readouterr().out.split() == ["digits-cnn"]


class AtOnce(Interrupt):
    requested = property(lambda self: True, lambda self, value: None)


class Twice(Interrupt):
    """As if Ctrl-C had been pressed twice while the second step ran."""

    @property
    def requested(self) -> bool:
        raise KeyboardInterrupt

    @requested.setter
    def requested(self, value: bool) -> None: ...


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_run_says_what_it_did_last(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    for kind, words in ((AtOnce, "Interrupted and saved. Go on with:"), (Twice, "Saved is step 1; later ones")):
        monkeypatch.setattr("imstep.runs.session.Interrupt", kind)
        shown = output("train", str(program), "-o", "adam", *QUICK, "--out", run, code=130)
        assert "step 1 (epoch 1): loss " in shown
        assert "last evaluation at step 0: held-out loss" in shown
        assert words in shown
        assert f"imstep train --resume {run}" in shown
        run += "-again"
