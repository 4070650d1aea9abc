"""Tasks that a file or a module of one's own defines: `problem.py`, `problem.py:name`, `package.module:name`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from imstep.tasks.base import Problem, Task, TaskError

__all__ = ["Program", "is_program", "load_program"]

_PACKAGE = "_imstep_problem"
"""Name of the package that a lone file is made a module of, so that its relative imports are of files beside it."""

_present: list[tuple[list[str], frozenset[str]]] = []
"""Of the program loaded last: the folders put on `sys.path` for it, and the modules that there were before it."""


@dataclass(frozen=True)
class Program:
    """A task and where its source is.

    Args:
        task: what the program defines.
        file: the program.
        root: the folder that its imports start from: that of the file, or the one above its outermost package; for a
            module, the present folder.
        before: names of the modules that were loaded before it.
    """

    task: Task
    file: Path
    root: Path
    before: frozenset[str]

    def files(self) -> tuple[Path, ...]:
        """The program and what it has imported from below `root` so far; installed packages excluded.

        Nothing for a module that is not below it: it is installed, and known by its version.
        """
        if not self.file.is_relative_to(self.root):
            return ()
        below = {Path(_source(sys.modules[name])) for name in _own_modules(str(self.root), self.before)}
        return (self.file, *sorted(below - {self.file}))


def is_program(name: str) -> bool:
    """Whether a name means a file or a module rather than a task of imstep's."""
    path, colon, _ = name.rpartition(":")
    return name.endswith(".py") or bool(colon and path)


def load_program(name: str, kept: Path | None = None) -> Program:
    """Run the program that a name means, and find its task.

    Args:
        name: a file, a file and an object in it, or a module and an object in it.
        kept: a folder with copies of the program's files below its root, to be run in their place.

    Raises:
        TaskError: the program is not there, fails, or does not define just one task; the message says where.
    """
    path, _, wanted = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    if path.endswith(".py"):
        file = Path(os.path.abspath(path))
        module, root = _run_file(file, kept)
    else:
        module = _import(path, kept)
        file = Path(module.__file__ or path)
        root = Path.cwd()
    task = _named(module, wanted, path) if wanted else _only(module, path)
    return Program(task, file, root, _present[0][1])


def _run_file(file: Path, kept: Path | None) -> tuple[ModuleType, Path]:
    """The file as a module, and the folder that its imports start from."""
    root = file.parent
    while (root / "__init__.py").exists():
        root = root.parent
    parts = file.relative_to(root).with_suffix("").parts
    text = file if kept is None else kept / file.relative_to(root)
    if not text.is_file():
        raise TaskError(f"{text} does not exist. `imstep new {file.stem} --kind regression` writes one to start from.")
    folders = [str(folder) for folder in (kept, root) if folder is not None]
    with _importing(folders), _explained(file):
        package = ".".join(parts[:-1])
        if package:
            importlib.import_module(package)
        else:
            package = _PACKAGE
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = folders
        module = ModuleType(f"{package}.{parts[-1]}")
        module.__file__, module.__package__ = str(file), package
        sys.modules[module.__name__] = module
        # The name of the file is the original's also when a copy runs: it finds its data beside itself.
        exec(compile(text.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    return module, root


def _import(name: str, kept: Path | None) -> ModuleType:
    folders = [str(folder) for folder in (kept, Path.cwd()) if folder is not None]
    with _importing(folders), _explained(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = error.name is not None and f"{name}.".startswith(f"{error.name}.")
            if not absent:
                raise
    raise TaskError(
        f"there is no module {name!r}, neither in {Path.cwd()} nor installed. Write FILE.py:NAME for a file, "
        "MODULE:NAME for a module."
    )


@contextmanager
def _importing(folders: list[str]) -> Iterator[None]:
    """Folders are first on `sys.path`, and stay there for imports later on, in place of a former program's.

    A former program's modules are forgotten: a `model.py` beside another program is another one.
    """
    for formers, before in _present:
        for folder in formers:
            if folder in sys.path:
                sys.path.remove(folder)
            for name in _own_modules(folder, before):
                del sys.modules[name]
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
    _present[:] = [(folders, frozenset(sys.modules))]
    importlib.invalidate_caches()
    sys.path[:0] = folders
    yield


def _own_modules(folder: str, before: frozenset[str]) -> list[str]:
    """Modules below a folder that a program has imported: neither installed ones nor imstep's."""
    here = Path(__file__).parents[1]
    files = {name: Path(_source(module)) for name, module in list(sys.modules.items()) if name not in before}
    return [
        name
        for name, file in files.items()
        if file.suffix == ".py"
        and file.is_relative_to(folder)
        and not file.is_relative_to(here)
        and not {"site-packages", "dist-packages"} & set(file.parts)
    ]


def _source(module: Any) -> str:
    return getattr(module, "__file__", None) or ""


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """What goes wrong in a program is told with the program's own line."""
    try:
        yield
    except SyntaxError as error:
        raise TaskError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        folder = str(file if file.is_dir() else file.parent)
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
        place = f"{own[-1].filename}, line {own[-1].lineno}" if own else str(file)
        kind = "" if isinstance(error, TaskError) else f"{type(error).__name__}: "
        raise TaskError(f"{place}: {kind}{error}") from error


def _named(module: ModuleType, wanted: str, path: str) -> Task:
    found: Any = module
    for part in wanted.split("."):
        if not hasattr(found, part):
            raise TaskError(f"{path} has no {wanted!r}. {_offered(_tasks(module), path)}")
        found = getattr(found, part)
    if not isinstance(found, Task | Problem | type) and callable(found):
        with _explained(Path(_source(module))):
            found = found()
    if not isinstance(found, Task):
        raise TaskError(f"{path}:{wanted} is {_article(found)}, not a Task. {_offered(_tasks(module), path)}")
    return found


def _only(module: ModuleType, path: str) -> Task:
    tasks = _tasks(module)
    different = {id(task): task for task in tasks.values()}
    if len(different) == 1:
        return next(iter(different.values()))
    if tasks:
        raise TaskError(f"{path} defines {len(different)} tasks. {_offered(tasks, path)}")
    raise TaskError(f"{path} defines no task. {_hint(vars(module))}")


def _tasks(module: ModuleType) -> dict[str, Task]:
    """The tasks by name; a name that begins with an underscore is private."""
    return {n: value for n, value in vars(module).items() if isinstance(value, Task) and not n.startswith("_")}


def _offered(tasks: Mapping[str, Task], path: str) -> str:
    if not tasks:
        return "It defines no task."
    return f"Choose one: {', '.join(f'{path}:{name}' for name in tasks)}."


def _hint(names: Mapping[str, Any]) -> str:
    """What may have been meant by a program without a task."""
    built = [name for name, value in names.items() if isinstance(value, Problem)]
    if built:
        return f"{built[0]} is a problem built already, of one seed and dtype: give the task it is built from a name."
    classes = {name: value for name, value in names.items() if isinstance(value, type) and issubclass(value, Task)}
    own = [name for name, value in classes.items() if value.__module__ == names["__name__"]]
    if own:
        return f"It defines the class {own[0]} but no object of it: add a line such as `task = {own[0]}(...)`."
    return (
        "Give it a line `task = ExampleTask(...)` or `task = PhysicsTask(...)` (both from imstep.tasks); "
        "`imstep new NAME --kind pinn` writes a file to start from."
    )


def _article(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"
