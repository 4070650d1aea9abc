"""The package as others get it: a wheel, imported from elsewhere, with nothing but torch and numpy loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel

import imstep

ROOT = Path(__file__).resolve().parents[1]

SMOKE = """
import sys, torch, imstep
assert not {"typer", "rich", "matplotlib", "sklearn", "scipy", "safetensors", "tensorboard"} & sys.modules.keys()
print(imstep.__file__)
print(imstep.__version__)
print(imstep.hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.ones(2)).tolist())
w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
optimizer = imstep.NewtonKrylov([w])
for _ in range(40):
    loss = optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
print(float(loss) < 1e-10)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return out / build_wheel(str(out))  # what pip calls


def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", SMOKE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    where, version, product, converged = run.stdout.split("\n")[:4]
    assert Path(where).is_relative_to(tmp_path)
    assert version == imstep.__version__
    assert product == "[6.0, 12.0]"
    assert converged == "True"


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "imstep").rglob("*")
        if path.is_file() and path.suffix in {".py", ".css", ".typed"}
    }
    packaged = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packaged == source
    metadata = next(name for name in names if name.endswith("METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(metadata).decode().splitlines()
    core = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in core) == ["numpy", "torch"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_public_names_of_the_top_level() -> None:
    missing = [name for name in imstep.__all__ if not hasattr(imstep, name)]
    assert not missing
    contract = {"derivative", "jvp", "hvp", "Hessian", "GaussNewton", "NewtonKrylov", "minimize"}
    assert contract <= set(imstep.__all__)
