"""Regression and classification on the rows of a table, without a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imstep.tasks.base import Metric, Task, TaskError
from imstep.tasks.examples import ACCURACY, Batch, ExampleProblem, held_out
from imstep.tasks.models import mlp
from imstep.tasks.tables import UNNAMED, Column, Table, read_table

__all__ = ["TableOptions", "TableTask", "table_task"]

KINDS = ("regression", "classification")
FEW_CLASSES = 20
"""Whole numbers with at most so many values, each twice or more on average, are classes unless `kind` says else."""
MOST_CATEGORIES = 100
FEWEST_ROWS = 10
HELDOUT = 0.2


@dataclass(frozen=True)
class TableOptions:
    """How a table becomes a task.

    Args:
        target: the column to predict; an array's name for NPZ. None for `y` where there is one.
        kind: "regression" or "classification"; None to tell from the target.
        drop: columns that are not used.
        impute: fill missing inputs: numbers by the median of the training rows, words by a category of their own.
        hidden: widths of the tanh layers.

    Raises:
        TaskError: a setting that cannot be.
    """

    target: str | None = None
    kind: str | None = None
    drop: tuple[str, ...] = ()
    impute: bool = False
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise TaskError(f"--kind {self.kind}: give {' or '.join(KINDS)}.")
        if not all(1 <= width < 2**31 for width in self.hidden):
            raise TaskError(f"--hidden {','.join(map(str, self.hidden))}: give widths of at least 1, such as 64,64.")

    @property
    def words(self) -> list[str]:
        """The command line's words for what is not as it is by default."""
        said = [word for name in self.drop for word in ("--drop", name)] + (["--impute"] if self.impute else [])
        for name, value in (("--target", self.target), ("--kind", self.kind)):
            said += [] if value is None else [name, value]
        return said + ([] if self.hidden == TableOptions.hidden else ["--hidden", ",".join(map(str, self.hidden))])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {**asdict(self), "drop": list(self.drop), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TableOptions:
        """The inverse of `to_dict`."""
        return cls(**{**values, "drop": tuple(values["drop"]), "hidden": tuple(values["hidden"])})


def table_task(file: Path, options: TableOptions) -> TableTask:
    """The task of predicting one column of a table from the others.

    Raises:
        TaskError: the file cannot be read, or the columns do not fit; says which and why.
    """
    table = read_table(file)
    target = _target(table, options)
    unknown = [name for name in options.drop if name not in table.groups]
    if unknown:
        raise TaskError(f"--drop {unknown[0]}: {file} has no such column. Columns: {_listed(table.groups)}.")
    if target in options.drop:
        raise TaskError(f"--drop {target}: that is the column to predict. Leave it out, or name another --target.")
    left_out = {name for group in (*options.drop, target) for name in table.groups[group]}
    inputs = tuple(column for name, column in table.columns.items() if name not in left_out)
    targets = tuple(table.columns[name] for name in table.groups[target])
    _check(table, inputs, targets, options)
    classes = _classes(target, targets, options)
    features = sum(1 if column.numeric else len(_categories(column)) for column in inputs)
    widths = (features, *options.hidden, len(targets) if classes is None else len(classes))
    words = sum(not column.numeric for column in inputs)
    description = (
        f"{target} from {len(inputs)} columns"
        + (f" ({words} of them categories; {features} inputs)" if words else "")
        + (f", {len(classes)} classes" if classes is not None else ", standardised; a loss of 1 is the mean's")
        + f"; tanh MLP {'-'.join(map(str, widths))}; "
        + ("mean squared error." if classes is None else "cross entropy.")
    )
    kind = KINDS[0] if classes is None else KINDS[1]
    return TableTask(
        file.name, f"{file.name}: {kind} of {target}", description, table, target, inputs, targets, classes, widths
    )


def _target(table: Table, options: TableOptions) -> str:
    if options.target is not None:
        if options.target not in table.groups:
            raise TaskError(
                f"--target {options.target}: {table.file} has no such column. Columns: {_listed(table.groups)}."
            )
        return options.target
    if table.file.suffix.lower() == ".npz":
        named = next((name for name in table.groups if name in ("y", "Y")), None)
        if named is not None:
            return named
    raise TaskError(f"say which column of {table.file} to predict: --target NAME. Columns: {_listed(table.groups)}.")


def _listed(groups: Mapping[str, Any], most: int = 20) -> str:
    names = list(groups)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check(table: Table, inputs: tuple[Column, ...], targets: tuple[Column, ...], options: TableOptions) -> None:
    if len(table) < FEWEST_ROWS:
        raise TaskError(f"{table.file} has {len(table)} rows: at least {FEWEST_ROWS} are needed, some to be held out.")
    if not inputs:
        raise TaskError(f"{table.file} has no column left to predict from.")
    for column in (*targets, *inputs):
        column.check()
    _check_marks(table, (*targets, *inputs))
    for column in targets:
        if column.missing.any():
            raise TaskError(
                f"the target {column.name!r} is missing in {_count(int(column.missing.sum()))}, first in row "
                f"{int(column.missing.argmax()) + 1}: leave out such rows; a target is not guessed."
            )
    gaps = [column for column in inputs if column.missing.any()]
    if gaps and not options.impute:
        shown = ", ".join(f"{column.name} ({_count(int(column.missing.sum()))})" for column in gaps[:5])
        raise TaskError(
            f"values are missing in {len(gaps)} of {len(inputs)} input columns of {table.file}: {shown}. Give --impute "
            "to fill them (numbers by the median, words by a category of their own), or leave columns out by --drop."
        )
    for column in inputs:
        if column.name.startswith(UNNAMED) and column.name.removeprefix(UNNAMED).isdecimal():
            raise TaskError(
                f"{column.name} of {table.file} has no name, as where a program has written the numbers of its rows. "
                f"Leave it out by --drop '{column.name}', or name it in the file's first line."
            )
        if column.missing.all():
            raise TaskError(f"column {column.name!r} is empty: leave it out by --drop {column.name}.")
        if not column.numeric and len(_categories(column)) > min(MOST_CATEGORIES, len(table) // 2):
            raise TaskError(
                f"column {column.name!r} has {len(_categories(column))} different words in {len(table)} rows, such as "
                f"{_categories(column)[0]!r}: too many for categories. Leave it out by --drop {column.name}, or write "
                "it as numbers."
            )


def _check_marks(table: Table, columns: tuple[Column, ...]) -> None:
    """Whether numbers have one decimal mark."""
    by = {mark: next((column.name for column in columns if mark in column.marks), None) for mark in ".,"}
    if None not in by.values():
        raise TaskError(
            f"{table.file} has numbers with a point, in column {by['.']!r}, and with a comma, in column {by[',']!r}: "
            "one of them seems to part thousands. Write digits and a decimal mark alone, or leave columns out: --drop."
        )


def _count(rows: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}"


def _classes(name: str, targets: tuple[Column, ...], options: TableOptions) -> tuple[Any, ...] | None:
    """The classes of a target in order; None for regression."""
    values = targets[0].values
    if options.kind != "classification" and all(column.numeric and np.ptp(column.values) == 0 for column in targets):
        raise TaskError(f"the target {name!r} is {values[0]:g} in every row: there is nothing to predict.")
    if not all(column.numeric for column in targets):
        if options.kind == "regression" or len(targets) > 1:
            raise TaskError(f"the target {name!r} holds words: it can be classified only, one column at a time.")
    elif options.kind is None:
        whole = len(targets) == 1 and bool((values == np.round(values)).all())
        different = len(np.unique(values))
        if not whole or different > FEW_CLASSES or 2 * different > len(values):
            return None
    elif options.kind == "regression":
        return None
    elif len(targets) > 1:
        raise TaskError(f"the target {name!r} has {len(targets)} columns: classes are one column.")
    classes = tuple(sorted(set(values.tolist())))
    if len(classes) < 2:
        raise TaskError(f"the target {name!r} is {classes[0]!r} in every row: there is nothing to tell apart.")
    if 2 * len(classes) > len(values):
        raise TaskError(
            f"the target {name!r} has {len(classes)} different values in {len(values)} rows: too many for classes. "
            "Choose another --target, or --kind regression for numbers."
        )
    return classes


def _categories(column: Column) -> list[str]:
    """The words of a column in order; what is missing is a last category of its own."""
    present = sorted({word for word in column.values if word is not None})
    return [*present, "(missing)"] if column.missing.any() else present


@dataclass(frozen=True, eq=False)
class TableTask(Task):
    """Prediction of a column from the others by a tanh network.

    Numbers are standardised by mean and deviation of the training rows, words become one input for each category.
    The seed decides which fifth of the rows is held out.

    Args:
        name, title, description: as for every task.
        table: all columns.
        target: what is predicted.
        inputs, targets: columns.
        classes: in order; None for regression.
        widths: of the network's layers, inputs and outputs included.

    Example:
        >>> import numpy, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "line.npz")
        >>> numpy.savez(file, X=numpy.arange(20.0), y=2 * numpy.arange(20.0) + 0.5)
        >>> problem = table_task(file, TableOptions()).build(seed=0)
        >>> problem.data, problem.metric.name
        ('16 rows (4 held out)', 'RMSE of y')
    """

    table: Table
    target: str
    inputs: tuple[Column, ...]
    targets: tuple[Column, ...]
    classes: tuple[Any, ...] | None
    widths: tuple[int, ...]

    @property
    def has_batches(self) -> bool:
        return True

    @property
    def squares(self) -> bool:
        return self.classes is None

    @property
    def notes(self) -> tuple[str, ...]:
        filled = [
            f"{column.name} ({_count(int(column.missing.sum()))}, "
            + ("median of the training rows)" if column.numeric else "as a category)")
            for column in self.inputs
            if column.missing.any()
        ]
        told = [] if not filled else [f"missing values were filled: {', '.join(filled)}."]
        if self.classes is not None and self.targets[0].numeric:
            told.append(
                f"{self.target} holds {len(self.classes)} different whole numbers, taken as classes; give "
                "--kind regression to predict it as a number."
            )
        return tuple(told)

    def _model(self) -> nn.Module:
        return mlp(self.widths)

    def _problem(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        data: Path | None,
        examples: int | None,
    ) -> ExampleProblem:
        if data is not None:
            raise TaskError(f"--data {data}: {self.table.file} is the data already; leave it out.")
        rows = torch.arange(len(self.table))
        train, heldout = (batch.inputs.numpy() for batch in held_out(rows, rows, HELDOUT, seed=seed))
        inputs = np.stack([part for column in self.inputs for part in _encoded(column, train)], 1)
        targets, metric = self._targets(train)
        every = Batch(torch.from_numpy(inputs), torch.from_numpy(targets)).to(device, dtype)
        loss = nn.MSELoss() if self.classes is None else nn.CrossEntropyLoss()
        used = every.take(torch.from_numpy(train[:examples]).to(device))
        aside = every.take(torch.from_numpy(heldout).to(device))
        return ExampleProblem(self.name, model, used, aside, loss, metric, unit="rows")

    def _targets(self, train: np.ndarray) -> tuple[np.ndarray, Metric]:
        """Class numbers (n,), or standardised numbers (n, k); and what people read."""
        if self.classes is not None:
            number = {value: at for at, value in enumerate(self.classes)}
            return np.array([number[value] for value in self.targets[0].values.tolist()]), ACCURACY
        values = np.stack([column.values for column in self.targets], 1)
        mean, deviation = _moments(values[train])
        in_units = float(deviation[0]) if len(deviation) == 1 else 1.0
        name = f"RMSE of {self.target}" + ("" if len(deviation) == 1 else ", standardised")
        return (values - mean) / deviation, Metric(name, _squares, lambda square: in_units * math.sqrt(square))


def _squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).double().square().flatten(1).mean(1)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation; 1 for a column that does not vary, up to rounding."""
    unit = np.maximum(np.abs(values).max(0), np.finfo(values.dtype).tiny)  # no square is beyond the range of numbers
    mean, deviation = unit * (values / unit).mean(0), unit * (values / unit).std(0)
    return mean, np.where(deviation > 1e-12 * np.abs(mean), deviation, 1.0)


def _encoded(column: Column, train: np.ndarray) -> list[np.ndarray]:
    """Inputs (n,) of a column: one of its standardised numbers, or one for each of its words."""
    if not column.numeric:
        words = np.array(["(missing)" if word is None else word for word in column.values], dtype=object)
        return [(words == category).astype(np.float64) for category in _categories(column)]
    known = column.values[train][~column.missing[train]]
    values = np.where(column.missing, np.median(known) if len(known) else 0.0, column.values)
    mean, deviation = _moments(values[train])
    return [(values - mean) / deviation]
