"""`compare`, `demo` and `accuracy` write their files and never replace what is not theirs."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from cli_cases import imstep_command

from imstep.runs.interrupt import Interrupt
from imstep.runs.studies import ComparisonRequest
from imstep.tasks import TableOptions

QUICK = ["--optimizers", "lbfgs,adam", "--budget", "12", "--examples", "30", "--threads", "1", "--no-tune"]


def test_compare_writes_a_report(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "c"
    result = imstep_command("compare", "digits-mlp", *QUICK, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"comparison.json", "report.html", "summary.png"}
    assert "L-BFGS" in result.output
    request.getfixturevalue("no_pages")
    again = imstep_command("compare", "digits-mlp", *QUICK, "--out", str(out))
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert imstep_command("compare", "digits-mlp", *QUICK, "--out", str(out), "--overwrite").exit_code == 0


@pytest.mark.parametrize("command", [["compare", "digits-mlp", *QUICK], ["spectrum", "digits-mlp"], ["accuracy"]])
def test_a_folder_that_cannot_be_made_and_a_seed_are_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for computes in ("studies.compare", "studies.measure_accuracy", "spectrum.measure"):
        monkeypatch.setattr(f"imstep.runs.{computes}", None)
    (tmp_path / "file").touch()
    for words, message in (
        (["--out", str(tmp_path / "file" / "c")], "nothing can be made in"),
        (["--out", str(tmp_path / "c"), "--seed", "9" * 20], "give a whole number below 2**63"),
    ):
        if command[0] == "compare" and "--seed" in words:
            monkeypatch.undo()  # whose seed is that of the task, which it builds
        result = imstep_command(*command, *words)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_first_order_optimizer_that_refuses_says_so_before_any_has_run(tmp_path: Path) -> None:
    words = ["--optimizers", "adam,torch.optim:SparseAdam", "--out", str(tmp_path / "c")]
    result = imstep_command("compare", "digits-mlp", *QUICK[2:], *words)
    assert result.exit_code == 2, result.output
    assert "does not support dense gradients" in " ".join(result.output.split())
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_comparison_is_reported_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my comparison"

    class AfterTheFirst(Interrupt):
        requested = property(lambda self: (out / "comparison.json").exists(), lambda self, value: None)

    with monkeypatch.context() as patched:
        patched.setattr("imstep.runs.studies.Interrupt", AfterTheFirst)
        result = imstep_command("compare", "digits-mlp", *QUICK, "--batch-size", "15", "--out", str(out))
    assert result.exit_code == 130, result.output
    assert "Unfinished, without Adam" in " ".join(result.output.split())
    assert {path.name for path in out.iterdir()} == {"comparison.json", "report.html", "summary.png"}
    command = next(line for line in result.output.splitlines() if line.startswith("  imstep compare"))
    before = json.loads((out / "comparison.json").read_text())
    other = imstep_command("compare", "digits-mlp", *QUICK, "--seed", "1", "--out", str(out))
    assert other.exit_code == 2
    assert "holds an earlier result" in " ".join(other.output.split())
    result = imstep_command(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    after = json.loads((out / "comparison.json").read_text())
    assert after["runs"][:1] == before["runs"]
    assert ([run["label"] for run in after["runs"]], after["waiting"]) == (["L-BFGS, batch 15", "Adam, batch 15"], [])


def test_a_comparison_interrupted_at_once_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(Interrupt):
        requested = property(lambda self: True, lambda self, value: None)

    monkeypatch.setattr("imstep.runs.studies.Interrupt", AtOnce)
    result = imstep_command("compare", "digits-mlp", *QUICK, "--out", str(tmp_path / "c"))
    assert result.exit_code == 130
    assert "nothing is kept" in result.output
    assert not (tmp_path / "c").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (["compare", "digits-mlp", *QUICK], ["demo"], ["accuracy"]):
        result = imstep_command(*words, "--out", str(tmp_path))
        assert result.exit_code == 2
        assert "holds other files" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits-mlpp"], "Did you mean 'digits-mlp'"),
        (["digits-mlp", "--optimizers", "adam,dfp"], "there is no optimizer 'dfp'"),
        (["digits-mlp", "--optimizers", "adam,adam"], "named twice"),
        (["digits-mlp", "--optimizers", ""], "at least one optimizer"),
        (["digits-mlp", "--optimizers", "adam", "--budget", "-3"], "budget=-3.0"),
    ],
)
def test_bad_comparisons_are_explained(tmp_path: Path, words: list[str], message: str) -> None:
    result = imstep_command("compare", *words, "--out", str(tmp_path / "c"))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "c").exists()


def test_the_command_in_the_report_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TableOptions("the price", "regression", ("a",), True, (8,))
    request = ComparisonRequest(
        "my data.csv", ("lbfgs", "adam"), 12, 3, 10, 1, None, 30, tune=False, dtype="float64", table=table
    )
    seen: list[ComparisonRequest] = []
    monkeypatch.setattr("imstep.cli.comparing.run_comparison", lambda found, *_, **__: not seen.append(found))
    assert imstep_command(*shlex.split(request.command)[1:]).exit_code == 0
    assert seen[0].command == request.command
    assert seen[0] == replace(request, optimizers=["lbfgs", "adam"])


def test_accuracy_writes_figure_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imstep.runs import accuracy

    few = {"float64": (1e-3, 1e-20), "float32": (1e-3, 1e-20)}
    monkeypatch.setattr(accuracy, "steps_of", few.__getitem__)
    result = imstep_command("accuracy", "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "accuracy.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "a" / "accuracy.json").read_text())["curves"]
