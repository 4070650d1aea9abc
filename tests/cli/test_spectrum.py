"""`imstep spectrum` and `imstep train --watch-curvature`: against Hessians by double backward, and undisturbed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import imstep_command as command
from cli_cases import refused
from torch import nn

from imstep import spectral
from imstep.runs import spectra
from imstep.runs.watch import edge_of_stability
from imstep.tasks import Problem, get_task

PROGRAM = """
import torch
from torch import nn
from imstep.tasks import ExampleTask, held_out

def load(data):
    x = torch.linspace(-2, 2, 30)[:, None]
    return held_out(x, torch.sin(2 * x), share=0.2)

def model():
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 1))

task = ExampleTask("wave", "A wave", "30 points.", load, model, nn.MSELoss())
"""
ASK = ["-k", "3", "--steps", "10", "--probes", "2", "--rtol", "0.1"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "wave.py"
    file.write_text(PROGRAM)
    return file


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "spectrum.json").read_text())


def dense(problem: Problem) -> torch.Tensor:
    """The Hessian of the mean training loss in evaluation mode, by double backward."""
    model, train = problem.model.eval(), problem.train
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(w: torch.Tensor) -> torch.Tensor:
        parts = w.split([shape.numel() for shape in shapes.values()])
        named = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, named, (train.inputs,)), train.targets)

    return torch.func.hessian(loss)(nn.utils.parameters_to_vector(model.parameters()).detach())


@pytest.mark.usefixtures("no_pages")
def test_a_problem(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    result = command("spectrum", program, "--by", "layer", "--dtype", "float64", *ASK, "--out", out)
    assert result.exit_code == 0, result.output
    problem = get_task(str(program)).build(dtype=torch.float64)
    expected = dense(problem)
    (point,) = record(out)["points"]
    values = torch.linalg.eigvalsh(expected)
    values = values[values.abs().argsort(descending=True)][:3]
    found = torch.tensor(point["answers"]["eigenvalues"]["values"], dtype=torch.float64)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=0)
    assert point["answers"]["trace"]["value"] == pytest.approx(float(expected.trace()))
    layers = point["answers"]["layers"]["by"]
    assert {name: layer["parameters"] for name, layer in layers.items()} == {"0": 8, "1": 8, "4": 5}
    assert layers["4"]["trace"] == pytest.approx(float(expected[-5:, -5:].trace()))


def numbers(run: Path, kinds: tuple[str, ...] = ("step", "evaluation")) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "measuring_seconds"):
            row.pop(name, None)
            (row.get("record") or {}).pop(name, None)
    return [row for row in rows if row["kind"] in kinds]


EVERYTHING = ("step", "evaluation", "curvature")


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("optimizer", ["sgd", "newton-krylov"])
def test_a_watched_run_has_the_numbers_of_one_that_is_not(program: Path, tmp_path: Path, optimizer: str) -> None:
    train = ["train", program, "-o", optimizer, "--batch-size", "12", "--threads", "1", "--dtype", "float64"]
    watch = ["--watch-curvature", "every=2"]
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    for words in (
        [*train, "--epochs", "2", "--out", plain],
        [*train, "--epochs", "2", "--out", whole, *watch],
        [*train, "--epochs", "1", "--out", parts, *watch],
        ["train", "--resume", parts, "--epochs", "2", *watch],
    ):
        result = command(*words)
        assert result.exit_code == 0, result.output
    assert numbers(whole) == numbers(plain)
    assert numbers(parts, EVERYTHING) == numbers(whole, EVERYTHING)
    watched = numbers(whole, ("curvature",))
    assert [row["step"] for row in watched] == [0, 2, 4]
    assert (watched[0]["edge"] is None) == (optimizer == "newton-krylov")
    expected = dense(get_task(str(program)).build(dtype=torch.float64))
    assert watched[0]["largest"] == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-3)
    assert watched[0]["trace"] == pytest.approx(float(expected.trace()), rel=1e-6)


def test_a_run_at_several_steps(program: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "s"
    words = ["-o", "sgd", "--lr", "0.1", "--batch-size", "12", "--dtype", "float64", "--threads", "1", "--epochs", "2"]
    assert command("train", program, *words, "--out", run, "--watch-curvature", "2", "--keep", "every=2").exit_code == 0
    assert "Sharpness over the steps" in (run / "report.html").read_text()
    result = command("spectrum", run, *ASK, "--tol", "1e-6", "--by", "layer", "--at", "0,4", "--out", out)
    assert result.exit_code == 0, result.output
    watched, points = numbers(run, ("curvature",)), record(out)["points"]
    assert [point["step"] for point in points] == [0, 4]
    for point, row in zip(points, watched[::2], strict=True):
        assert point["answers"]["eigenvalues"]["largest"] == pytest.approx(row["largest"], rel=1e-3)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "Largest eigenvalue and trace by step" in page
    assert (out / "spectrum.png").stat().st_size > 1000
    assert "There are steps 0, 2, 4" in refused("spectrum", run, "--at", "3", "--out", tmp_path / "t")
    assert "--dtype cannot be given for a run" in refused("spectrum", run, "--dtype", "float32")


@pytest.mark.usefixtures("no_pages")
def test_tensorboard_has_the_curvature(program: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["-o", "sgd", "--lr", "0.1", "--batch-size", "full", "--epochs", "1", "--watch-curvature", "1"]
    assert command("train", program, *words, "--tensorboard", "--out", tmp_path / "r").exit_code == 0
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("curvature/largest")]
    assert logged == pytest.approx([row["largest"] for row in numbers(tmp_path / "r", ("curvature",))], rel=1e-5)
    assert "curvature/density" in events.Tags()["histograms"]


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_one_goes_on(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["spectrum", program, *ASK]
    assert command(*words, "--out", tmp_path / "whole").exit_code == 0
    asked: list[str] = []

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spectral, "density", interrupted)
        result = command(*words, "--out", tmp_path / "parts")
    assert result.exit_code == 130
    assert "1 answers are kept. Go on with:" in result.output
    assert f"--out {tmp_path / 'parts'}" in result.output
    once = spectral.eigenpairs
    monkeypatch.setattr(spectra.spectral, "eigenpairs", lambda *a, **o: asked.append("eigenpairs") or once(*a, **o))
    assert command(*words, "--out", tmp_path / "parts").exit_code == 0
    assert not asked
    whole, parts = (record(tmp_path / name)["points"][0]["answers"] for name in ("whole", "parts"))
    assert all(whole[name].pop("seconds") and parts[name].pop("seconds") for name in whole)
    assert parts == whole
    assert "holds an earlier result" in refused(*words, "--out", tmp_path / "parts")


REFUSED = {
    "matrix": (["--of", "hessain"], "--of hessain: there are hessian, gauss-newton, fisher"),
    "group": (["--by", "module"], "give layer or parameter"),
    "number": (["-k", "0"], "-k 0: give a whole number of at least 1"),
    "seed": (["--seed", "9" * 20], "give a whole number below 2**63"),
    "step": (["--at", "3"], "--at says which steps of a run"),
    "accuracy": (["--rtol", "2"], "give a number between 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_explained(tmp_path: Path, case: str) -> None:
    words, message = REFUSED[case]
    assert message in refused("spectrum", "digits-mlp", *words, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_other_refusals(tmp_path: Path) -> None:
    assert "holds no run (no config.json)" in refused("spectrum", tmp_path)
    assert "there is no folder" in refused("spectrum", tmp_path / "run")
    words = refused("spectrum", "poisson-5d", "--of", "fisher", "--out", tmp_path / "s")
    assert "no outputs that a distribution" in words
    for option in ("--watch-curvature", "--keep"):
        words = refused("train", "digits-mlp", option, "often", "--out", tmp_path / "r")
        assert f"{option} often: write every=N" in words
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("of", ["gauss-newton", "fisher"])
def test_other_matrices(program: Path, tmp_path: Path, of: str) -> None:
    assert command("spectrum", program, "--of", of, "--dtype", "float64", *ASK, "--out", tmp_path / "s").exit_code == 0
    (point,) = record(tmp_path / "s")["points"]
    model = get_task(str(program)).build(dtype=torch.float64)
    net, x = model.model.eval(), model.train.inputs
    named = {name: p.detach() for name, p in net.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,))[:, 0])(named)
    square = sum(float(part.square().sum()) for part in rows.values()) / len(x)
    assert point["answers"]["trace"]["value"] == pytest.approx(square * (2 if of == "gauss-newton" else 1))


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "gradient descent": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.8},
    "Nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.5},
    "decay": {"lr": 0.1, "momentum": 0.5, "weight_decay": 1.0},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_edge_is_where_iterates_begin_to_grow(kind: str) -> None:
    for factor, grows in ((0.9, False), (1.1, True)):
        w = nn.Parameter(torch.ones(1).double())
        optimizer = torch.optim.SGD([w], **OPTIMIZERS[kind])
        edge = edge_of_stability(optimizer)
        assert edge is not None
        for _ in range(100):
            optimizer.zero_grad()
            (factor * edge * w.square() / 2).sum().backward()
            optimizer.step()
        assert (float(w.detach().abs()) > 1) == grows
    assert edge_of_stability(torch.optim.Adam([w])) is None
