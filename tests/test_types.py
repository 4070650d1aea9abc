"""Types: the first pages pass a strict checker, slips do not, and public functions say what they return."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import imstep
from imstep.optim.newton_krylov import NewtonKrylovOptions

_spec = importlib.util.spec_from_file_location("documentation", Path(__file__).with_name("documentation.py"))
assert _spec is not None
assert _spec.loader is not None
documentation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(documentation)

ROOT = documentation.ROOT
SETTINGS = f"""
[mypy]
strict = true
mypy_path = {ROOT / "src"}
[mypy-imstep.*]
follow_imports = silent
[mypy-torch.*,numpy.*]
follow_imports = skip
"""

SLIPS = """
import imstep
from imstep.globalization import Armijo
from torch import nn

model = nn.Linear(2, 1)
imstep.NewtonKrylov.for_batches(model.parameters(), variance_every=3, step=Armijo())
imstep.NewtonKrylov.for_batches(model.parameters(), variance_evry=3)  # type: ignore[call-arg]
imstep.NewtonKrylov.for_batches(model.parameters(), variance_every="3")  # type: ignore[arg-type]
imstep.NewtonKrylov(model.parameters(), variance_evry=3)  # type: ignore[call-arg]
optimizer = imstep.LeastSquares(model.parameters())
steps: str = optimizer.last_step.step  # type: ignore[assignment]
product: dict[str, float] = imstep.hvp(lambda t: t["a"], {"a": model.weight}, {"a": model.weight})
other: str = imstep.hvp(lambda t: t[0], [model.weight], [model.weight])  # type: ignore[assignment]
"""


def test_strict_checker(tmp_path: Path) -> None:
    """PyTorch itself is left out, which takes a minute to read; what is unknown is then of any type."""
    files = []
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        source = ""
        for line, block in documentation.blocks(page):
            source += "\n" * (line - 1 - source.count("\n")) + block
        files.append(tmp_path / f"{page.stem.lower()}_page.py")
        files[-1].write_text(source)
    files.append(tmp_path / "slips.py")
    files[-1].write_text(SLIPS)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" / "pages")]
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), *cache, *map(str, files)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


PACKAGES = ("imstep", *(f"imstep.{name}" for name in ("complexstep", "curvature", "linalg", "globalization", "optim")))

OF_THE_USER = [imstep.curvature.FrozenClosure.evaluate]
"""What these return is what a user's function does."""


def public_functions() -> Iterator[Any]:
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isfunction(thing):
                yield pytest.param(thing, id=f"{package.__name__}.{name}")
            for method, value in vars(thing).items() if inspect.isclass(thing) else ():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if inspect.isfunction(function) and not method.startswith("_") and function not in OF_THE_USER:
                    yield pytest.param(function, id=f"{package.__name__}.{name}.{method}")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not keep overloads")
@pytest.mark.parametrize("function", public_functions())
def test_public_functions_say_what_they_return(function: Any) -> None:
    for one in typing.get_overloads(function) or [function]:
        assert one.__annotations__.get("return") not in (None, "Any", "object")


def test_options_are_those_of_the_constructor() -> None:
    taken = inspect.signature(imstep.NewtonKrylov.__init__).parameters
    assert set(NewtonKrylovOptions.__annotations__) == set(taken) - {"self", "params"}


def test_unknown_option() -> None:
    for make in (imstep.NewtonKrylov, imstep.NewtonKrylov.for_batches):
        with pytest.raises(TypeError, match="variance_evry"):
            make([nn.Parameter(torch.ones(1))], variance_evry=3)
