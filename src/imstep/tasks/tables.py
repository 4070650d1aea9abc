"""Columns of numbers and of words from CSV, NPZ and Parquet files."""

from __future__ import annotations

import csv
import io
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imstep.tasks.base import TaskError

__all__ = ["UNNAMED", "Column", "Table", "is_table", "read_table"]

_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
UNNAMED = "column "
"""What a column without a name is called, with its number."""
_DELIMITERS = ",;\t|"
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_FEWER = re.compile(r"[+-]?\d{1,3}")
_NUMERAL = re.compile(r"[$€£¥]?\s?[+-]?[$€£¥]?(\d+|\d{1,3}([., '\u00a0\u202f]\d{3})+)([.,]\d+)?\s?[%‰$€£¥]?")
_CLOCK = r"\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?( ?[ap]\.?m\.?)?"
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATES = (
    r"\d{4}(?P<after_year>[-/.])\d{1,2}(?P=after_year)\d{1,2}",
    r"\d{1,2}(?P<after_day>[-/.])\d{1,2}(?P=after_day)\d{4}",
    r"\d{1,2}/\d{1,2}/\d{2}",
    rf"\d{{1,2}}\.?[ -]{_MONTH}[ -]\d{{2,4}}",
    rf"{_MONTH} \d{{1,2}}, ?\d{{4}}",
)
_MOMENT = re.compile(rf"{_CLOCK}|({'|'.join(_DATES)})([t ]\d{{1,2}}:.*)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Column:
    """One column: `values` are float64 with nan where one is missing, or strings with None.

    Args:
        name, values: of it.
        fault: why it cannot be used, a sentence; "" for a column that can.
        marks: the decimal marks of its numbers, "." and ",", as far as a text has them.
    """

    name: str
    values: np.ndarray
    fault: str = ""
    marks: frozenset[str] = frozenset()

    def check(self) -> None:
        """Whether it can be used.

        Raises:
            TaskError: it cannot, or a number is infinite.
        """
        if self.fault:
            raise TaskError(self.fault)
        if self.numeric and np.isinf(self.values).any():
            row = int(np.isinf(self.values).argmax())
            raise TaskError(f"column {self.name!r} is infinite in row {row + 1}: mend or leave out that row.")

    @property
    def numeric(self) -> bool:
        return self.values.dtype.kind == "f"

    @property
    def missing(self) -> np.ndarray:
        """(n,) bool: where there is no value."""
        return np.isnan(self.values) if self.numeric else np.array([value is None for value in self.values], dtype=bool)


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length.

    Args:
        file: where they are from.
        columns: by name, in the file's order.
        groups: what a target can be called -> names of its columns: a column's own name, or an array's.
    """

    file: Path
    columns: Mapping[str, Column]
    groups: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).values)


def is_table(name: str) -> bool:
    """Whether a name ends as a file that `read_table` reads."""
    return Path(name).suffix.lower() in _READERS


def read_table(file: Path) -> Table:
    """The table in a file.

    Raises:
        TaskError: it is not there, not such a file, or its columns cannot be told; says where.
    """
    if not file.is_file():
        raise TaskError(f"{file} does not exist.")
    columns = _READERS[file.suffix.lower()](file)
    flat = {column.name: column for group in columns.values() for column in group}
    if not flat or not len(next(iter(flat.values())).values):
        raise TaskError(f"{file} holds no rows.")
    return Table(file, flat, {name: tuple(column.name for column in group) for name, group in columns.items()})


def _read_csv(file: Path) -> dict[str, tuple[Column, ...]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not text in UTF-8 ({error}): save it as UTF-8.") from error
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = max(_DELIMITERS, key=re.sub(r'"[^"]*"', "", first).count)
    rows = [(number, row) for number, row in _lines(file, text, delimiter) if any(map(str.strip, row))]
    if len(rows) < 2:
        raise TaskError(f"{file} holds no rows below a line with the names of the columns.")
    names = [name.strip() or f"{UNNAMED}{at}" for at, name in enumerate(rows[0][1], 1)]
    if all(_number(name) is not None for name in names):
        raise TaskError(
            f"{file} begins with the numbers {', '.join(names[:3])}...: its first line must name the columns. Add one, "
            f"such as {','.join(f'x{at}' for at in range(1, len(names)))},y."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"{file} has two columns named {twice!r}: rename one.")
    odd = next(((number, row) for number, row in rows[1:] if len(row) != len(names)), None)
    if odd is not None:
        raise TaskError(f"{file}, line {odd[0]}: {len(odd[1])} entries, but the first line names {len(names)} columns.")
    comma = delimiter != ","
    cells = zip(*(row for _, row in rows[1:]), strict=True)
    numbers = [number for number, _ in rows[1:]]
    return {name: (_typed(file, name, column, numbers, comma),) for name, column in zip(names, cells, strict=True)}


def _lines(file: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        unclosed = "a quotation mark is not closed" if "unexpected end" in str(error) else str(error)
        raise TaskError(f"{file}, line {reader.line_num}: {unclosed}.") from error


def _typed(file: Path, name: str, cells: Sequence[str], lines: Sequence[int], comma: bool) -> Column:
    """Numbers if every entry is one or missing; words if few are numbers; in between something is wrong."""
    words = [None if cell.strip().lower() in _MISSING else cell.strip() for cell in cells]
    numbers = [None if word is None else _number(word, comma) for word in words]
    read = zip(words, numbers, lines, strict=True)
    odd = [(word, line) for word, number, line in read if word is not None and number is None]
    present = sum(word is not None for word in words)
    if present and not odd:
        marks = frozenset(mark for mark in ".," for word in words if word is not None and mark in word)
        values = np.array([math.nan if number is None else number for number in numbers])
        return Column(name, values, _thousands(file, name, words, lines) if comma else "", marks)
    if 2 * len(odd) < present:
        fault = (
            f"{file}, line {odd[0][1]}: {odd[0][0]!r} in column {name!r} is no number, as most of its entries are. "
            f"Mend it, or leave the column out: --drop {name}."
        )
        return _words(name, words, fault)
    return _words(name, words)


def _thousands(file: Path, name: str, words: Sequence[str | None], lines: Sequence[int]) -> str:
    """What is wrong with commas that are taken for decimal ones; "" if they may be."""
    given = [(word, line) for word, line in zip(words, lines, strict=True) if word is not None]
    commas = [(word, line) for word, line in given if "," in word]
    whole = [word for word, _ in given if "," not in word]
    if not commas or not whole or not all(_THOUSANDS.fullmatch(word) for word, _ in commas):
        return ""
    if not all(_FEWER.fullmatch(word) for word in whole):
        return ""
    return (
        f"{file}, line {commas[0][1]}: the comma in {commas[0][0]!r} of column {name!r} seems to part thousands, where "
        "a decimal comma is expected. Write the column without it, in digits alone, or leave the column out: "
        f"--drop {name}."
    )


def _words(name: str, words: Sequence[str | None], fault: str = "") -> Column:
    values = np.empty(len(words), dtype=object)
    values[:] = words
    return Column(name, values, fault or _not_words(name, words))


def _not_words(name: str, words: Sequence[str | None]) -> str:
    """Why words are no categories, as most have an order that would be lost; "" if they may be."""
    odd = [word for word in words if word is not None and _number(word) is None]
    numerals, moments = ([word for word in odd if form.fullmatch(word)] for form in (_NUMERAL, _MOMENT))
    if 2 * len(moments) > len(odd):
        return (
            f"column {name!r} holds dates or times, such as {moments[0]!r}: leave it out by --drop {name}, or write "
            "numbers, such as days since the first."
        )
    if 2 * len(numerals) > len(odd):
        return (
            f"column {name!r} holds numbers in a form that is not read, such as {numerals[0]!r}: write digits and a "
            f"decimal point alone, or leave it out by --drop {name}."
        )
    return ""


def _number(word: str, comma: bool = False) -> float | None:
    """The number that a word is; a decimal comma where commas do not part columns."""
    if "_" in word:  # Python's own, no file's
        return None
    try:
        return float(word.replace(",", ".") if comma else word)
    except ValueError:
        return None


def _read_npz(file: Path) -> dict[str, tuple[Column, ...]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise TaskError(f"{file} cannot be read as arrays of numbers or words: {error}") from error
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if len({len(array) if array.ndim else None for array in arrays.values()}) != 1:
        raise TaskError(f"{file} holds {shapes}: arrays of one length are needed, one row for each example.")
    return {name: _columns(name, array) for name, array in arrays.items()}


def _columns(name: str, array: np.ndarray) -> tuple[Column, ...]:
    """An array (n, ...) as columns: its own name, or name[0], name[1], ..."""
    flat = array.reshape(len(array), -1).T
    names = [name] if array.ndim == 1 else [f"{name}[{at}]" for at in range(len(flat))]
    return tuple(_from_array(own, values) for own, values in zip(names, flat, strict=True))


def _from_array(name: str, values: np.ndarray) -> Column:
    if values.dtype.kind in "iuf":
        return Column(name, values.astype(np.float64))
    if values.dtype.kind in "bU":
        return _words(name, [str(value) for value in values])
    fault = f"column {name!r} is of type {values.dtype}: numbers, words and truth values can be used."
    return _words(name, [None] * len(values), fault)


def _read_parquet(file: Path) -> dict[str, tuple[Column, ...]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"reading {file} needs pyarrow, which is not installed: pip install 'imstep[data]'.") from error
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return {name: (_from_arrow(name, table.column(name), pyarrow.types),) for name in table.column_names}


def _from_arrow(name: str, column: Any, types: Any) -> Column:
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    values = column.to_pylist()
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return Column(name, np.array([math.nan if value is None else float(value) for value in values]))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind) or types.is_null(kind):
        return _words(name, [None if value is None else str(value) for value in values])
    fault = f"column {name!r} is of type {kind}: leave it out (--drop {name}), or write numbers or words."
    return _words(name, [None] * len(values), fault)


_READERS: dict[str, Callable[[Path], dict[str, tuple[Column, ...]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}
