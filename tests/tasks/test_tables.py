"""Tables become tasks: standardised numbers, one input a category, targets in their own units; odd entries are told."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from imstep.tasks import Problem, TableOptions, TaskError, get_task
from imstep.tasks.tables import read_table

ROWS = 40
SIZE = np.linspace(20, 200, ROWS)
TOWN = np.array(["Aachen", "Bern", "Como"])[np.arange(ROWS) % 3]
PRICE = 3000 * SIZE + 10000 * (np.arange(ROWS) % 3) ** 2


def csv(folder: Path, rows: list[str], head: str = "size,town,price", name: str = "data.csv") -> str:
    file = folder / name
    file.write_text("\n".join([head, *rows]) + "\n")
    return str(file)


def houses(folder: Path, **changed: str) -> str:
    rows = [f"{size!r},{town},{price!r}" for size, town, price in zip(SIZE.tolist(), TOWN, PRICE.tolist(), strict=True)]
    for line, text in changed.items():
        rows[int(line.removeprefix("row"))] = text
    return csv(folder, rows)


def refused(name: str, **options: object) -> str:
    with pytest.raises(TaskError) as caught:
        get_task(name, TableOptions(**options))
    return str(caught.value)


def training_rows(problem: Problem) -> list[int]:
    """Sizes ascend with the row, and standardising keeps their order."""
    order = torch.cat([problem.train.inputs, problem.heldout.inputs])[:, 0].argsort().argsort()
    return order[: len(problem.train)].tolist()


def test_numbers_are_standardised_by_the_training_rows_and_words_become_inputs(tmp_path: Path) -> None:
    task = get_task(houses(tmp_path), TableOptions("price"))
    assert "price from 2 columns (1 of them categories; 4 inputs)" in task.description
    problem = task.build(seed=3, dtype=torch.float64)
    assert problem.data == "32 rows (8 held out)"
    rows = training_rows(problem)
    expected = (SIZE[rows] - SIZE[rows].mean()) / SIZE[rows].std()
    np.testing.assert_allclose(problem.train.inputs[:, 0], expected, rtol=1e-9)
    assert problem.train.inputs[:, 1:].argmax(1).tolist() == [row % 3 for row in rows]
    assert torch.equal(problem.heldout.inputs[:, 1:].sum(1), torch.ones(8, dtype=torch.float64))
    assert training_rows(task.build(seed=3)) == rows != training_rows(task.build(seed=4))
    assert torch.equal(task.build(seed=3, dtype=torch.float64, examples=5).train.inputs, problem.train.inputs[:5])


def test_the_metric_is_the_error_in_units_of_the_target(tmp_path: Path) -> None:
    problem = get_task(houses(tmp_path), TableOptions("price")).build(dtype=torch.float64)
    for parameter in problem.parameters:
        torch.nn.init.zeros_(parameter)  # predicts the training rows' mean
    train, heldout = problem.evaluate(problem.train), problem.evaluate(problem.heldout)
    rows = training_rows(problem)
    missed = PRICE - PRICE[rows].mean()
    assert problem.metric is not None
    assert problem.metric.name == "RMSE of price"
    assert train.loss == pytest.approx(1, rel=1e-12)
    assert train.metric == pytest.approx(PRICE[rows].std(), rel=1e-12)
    assert heldout.metric == pytest.approx(np.sqrt((np.delete(missed, rows) ** 2).mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (TOWN.tolist(), None, 3),
        (["yes", "no"] * 20, None, 2),
        ([3, 5, 6, 7] * 10, None, 4),
        ([3, 5, 6, 7] * 10, "regression", None),
        (list(range(40)), None, None),
        ([0.5, 1.5] * 20, None, None),
        ([0.5, 1.5] * 20, "classification", 2),
    ],
)
def test_the_target_tells_the_kind_unless_it_is_given(
    tmp_path: Path, values: list[object], kind: str | None, classes: int | None
) -> None:
    file = csv(tmp_path, [f"{at},{value}" for at, value in enumerate(values)], "x,y")
    task = get_task(file, TableOptions("y", kind))
    problem = task.build()
    outputs = problem.model(problem.train.inputs)
    assert outputs.shape == (32, classes or 1)
    assert problem.train.targets.shape == ((32,) if classes else (32, 1))
    assert task.squares == (classes is None)
    assert problem.metric is not None
    assert problem.metric.name == ("accuracy" if classes else "RMSE of y")
    assert any("taken as classes" in note for note in task.notes) == (bool(classes) and not isinstance(values[0], str))


def test_missing_values_are_refused_or_filled_by_what_the_training_rows_hold(tmp_path: Path) -> None:
    file = houses(tmp_path, row3=",Bern,1", row4="NA,Bern,1", row5="33,,1")
    message = refused(file, target="price")
    assert "values are missing in 2 of 2 input columns" in message
    assert "size (2 rows), town (1 row). Give --impute" in message
    task = get_task(file, TableOptions("price", impute=True))
    assert task.notes == (
        "missing values were filled: size (2 rows, median of the training rows), town (1 row, as a category).",
    )
    assert "(1 of them categories; 5 inputs)" in task.description
    problem = task.build(dtype=torch.float64)
    assert problem.train.inputs.isfinite().all()
    assert problem.heldout.inputs.isfinite().all()


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({}, {}, "say which column of {file} to predict: --target NAME. Columns: size, town, price."),
        ({"target": "cost"}, {}, "--target cost: {file} has no such column. Columns: size"),
        ({"target": "price", "drop": ("age",)}, {}, "--drop age: {file} has no such column"),
        ({"target": "price", "drop": ("price",)}, {}, "--drop price: that is the column to predict"),
        ({"target": "price", "drop": ("size", "town")}, {}, "has no column left to predict from"),
        ({"target": "town", "kind": "regression"}, {}, "holds words: it can be classified only"),
        ({"target": "price", "kind": "classification"}, {}, "has 40 different values in 40 rows"),
        ({"target": "price"}, {"row7": "1,Bern,"}, "the target 'price' is missing in 1 row, first in row 8"),
        ({"target": "price"}, {"row7": "1,Bern"}, "{file}, line 9: 2 entries, but the first line names 3 columns"),
        ({"target": "price"}, {"row7": "1,Bern,12 000"}, "{file}, line 9: '12 000' in column 'price' is no number"),
        ({"target": "price"}, {"row7": "inf,Bern,1"}, "column 'size' is infinite in row 8"),
        ({"target": "price", "kind": "both"}, {}, "--kind both: give regression or classification"),
        ({"target": "price", "hidden": (0,)}, {}, "--hidden 0: give widths of at least 1"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, options: dict[str, object], changed: dict[str, str], message: str
) -> None:
    file = houses(tmp_path, **changed)
    assert message.format(file=file) in refused(file, **options)


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        ("1,2,3", ["4,5,6"] * 20, "its first line must name the columns"),
        ("a,a,b", ["4,5,6"] * 20, "two columns named 'a'"),
        ("a,b", [], "holds no rows"),
        (",a,b", ["4,5,6"] * 20, "Leave it out by --drop 'column 1', or name it"),
        ("a,b", ["1,2"] * 5, "has 5 rows: at least 10"),
        ("name,b", [f"Ann {at},{at}" for at in range(20)], "has 20 different words in 20 rows, such as 'Ann 0'"),
        ("a,b", ["1,no"] * 20, "is 'no' in every row"),
        ("a,b", [f",{at}" for at in range(20)], "Give --impute"),
        ("a,b", [f"{at},2.5" for at in range(20)], "the target 'b' is 2.5 in every row: there is nothing to predict"),
        ("a,b", [*["1,2"] * 20, '3,"x'], "line 22: a quotation mark is not closed"),
        ("a;b", [f"{at};{at},{at:03d}" for at in range(1, 12)] + ["3;4.5"], "in column 'b', and with a comma"),
        ("a;b", [f"{at};{at},{at:03d}" for at in range(1, 12)] + ["3;999"], "seems to part thousands"),
        ("a;c;b", [f"{at};{at}.5;{at},25" for at in range(1, 12)], "with a point, in column 'c', and with a comma"),
    ],
)
def test_files_that_are_no_such_tables_are_told(tmp_path: Path, head: str, rows: list[str], message: str) -> None:
    assert message in refused(csv(tmp_path, rows, head), target="b")


@pytest.mark.parametrize(
    "entries",
    [
        ("2024-01-05", "2024-02-05"),
        ("5.1.2024 12:30", "5.2.2024 12:30"),
        ("1/31/24", "2/28/24"),
        ("05-Jan-2024", "Feb 5, 2024"),
        ("12:30", "7:05 pm"),
    ],
)
def test_dates_and_times_are_refused_though_few_are_different(tmp_path: Path, entries: tuple[str, str]) -> None:
    rows = [f'"{entries[at % 2]}",{at}' for at in range(20)]
    assert f"column 'a' holds dates or times, such as '{entries[0]}'" in refused(csv(tmp_path, rows, "a,b"), target="b")


@pytest.mark.parametrize(
    "entries", [("0,5", "1"), ("1,500", "12,500.25"), ("5%", "10 %"), ("$5", "-$7"), ("1 000", "2 000")]
)
def test_numbers_in_another_form_are_no_categories(tmp_path: Path, entries: tuple[str, str]) -> None:
    rows = [f'"{entries[at % 2]}",{at}' for at in range(20)]
    message = f"column 'a' holds numbers in a form that is not read, such as '{entries[0]}'"
    assert message in refused(csv(tmp_path, rows, "a,b"), target="b")


def test_words_with_digits_are_categories(tmp_path: Path) -> None:
    kinds = ("1.2.3", "18-25", "65+", "16:9", "A1", "12345-6789", "2024-Q1", "5%", "12:30")
    rows = [f"{kinds[at % len(kinds)]},{at}" for at in range(45)]
    problem = get_task(csv(tmp_path, rows, "a,b"), TableOptions(target="b")).build(seed=0)
    assert problem.train.inputs.shape[1] == len(kinds)


def test_delimiters_decimal_commas_quotes_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    file = tmp_path / "export.csv"
    file.write_bytes(b'\xef\xbb\xbfsize;"kind of; town"\r\n1,5;"a;b"\r\n-2;c\r\n\r\n')
    columns = read_table(file).columns
    assert columns["size"].values.tolist() == [1.5, -2.0]
    assert columns["kind of; town"].values.tolist() == ["a;b", "c"]
    file.write_bytes("größe,y\n1,2\n".encode("latin-1"))
    with pytest.raises(TaskError, match="not text in UTF-8"):
        read_table(file)


def test_what_is_no_delimiter_and_no_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "export.csv"
    file.write_text('"price, EUR";"size, m2, all";y\n1,5;a\x0bb\u2028c;2\n-2;d\x85e;3,125\n', encoding="utf-8")
    columns = read_table(file).columns
    assert columns["price, EUR"].values.tolist() == [1.5, -2.0]
    assert columns["size, m2, all"].values.tolist() == ["a\x0bb\u2028c", "d\x85e"]
    assert columns["y"].values.tolist() == [2.0, 3.125]


def test_what_is_wrong_with_a_column_does_not_count_once_it_is_left_out(tmp_path: Path) -> None:
    file = houses(tmp_path, row5="-,Bern,12000.5", row6="inf,Bern,3000.5", row7="1_0,Bern,1.5")
    assert "--drop size" in refused(file, target="price")
    assert get_task(file, TableOptions("price", drop=("size",))).build().data == "32 rows (8 held out)"
    np.savez(tmp_path / "data.npz", y=np.arange(21) / 2, x=np.arange(21.0), z=np.arange(21) * 1j)
    assert "column 'z' is of type complex128" in refused(str(tmp_path / "data.npz"))
    get_task(str(tmp_path / "data.npz"), TableOptions(drop=("z",)))
    mixed = csv(tmp_path, [f"{at}.5;{at},25;{at}" for at in range(30)], "a;c;b")
    get_task(mixed, TableOptions("b", drop=("a",)))


@pytest.mark.parametrize("unit", [1e-200, 1e-170, 1.0, 1e200, 1e300])
def test_units_do_not_matter(tmp_path: Path, unit: float) -> None:
    values = np.sin(np.arange(30.0)) + 0.1
    rows = zip(values.tolist(), values.tolist()[::-1], strict=True)
    file = csv(tmp_path, [f"{x * unit!r},{y * unit!r}" for x, y in rows], "x,y")
    problem = get_task(file, TableOptions("y")).build(dtype=torch.float64)
    for part in (problem.train.inputs, problem.train.targets):
        torch.testing.assert_close(part.square().mean(), torch.tensor(1.0, dtype=torch.float64))
    deviation = float(problem.train.targets.max() - problem.train.targets.min()) / np.ptp(values)
    found = problem.evaluate(problem.train)
    assert found.metric == pytest.approx(unit * found.loss**0.5 / deviation, rel=0.2)


def test_arrays(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    x = np.random.default_rng(0).normal(size=(30, 2, 2))
    np.savez(file, X=x, y=np.stack([x[:, 0, 0], x[:, 1, 1]], 1), kind=np.arange(30) % 2 == 0)
    problem = get_task(str(file), TableOptions(drop=("kind",))).build(dtype=torch.float64)
    assert problem.train.inputs.shape == (24, 4)
    assert problem.train.targets.shape == (24, 2)
    assert problem.metric is not None
    assert problem.metric.name == "RMSE of y, standardised"
    problem = get_task(str(file), TableOptions("kind", drop=("y",))).build()
    assert problem.model(problem.train.inputs).shape == (24, 2)
    np.savez(file, X=x, y=np.zeros(29))
    assert "arrays of one length are needed" in refused(str(file))
    np.savez(file, X=x, y=np.array([None] * 30))
    assert "cannot be read as arrays of numbers or words" in refused(str(file))
    file.write_bytes(b"not a zip file")
    assert "cannot be read" in refused(str(file))


def test_parquet_agrees_with_csv(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    file = tmp_path / "data.parquet"
    town = arrow.array([None if at == 3 else word for at, word in enumerate(TOWN)]).dictionary_encode()
    parquet.write_table(arrow.table({"size": [None, *SIZE[1:]], "town": town, "price": PRICE}), file)
    options = TableOptions("price", impute=True)
    found = get_task(str(file), options).build(dtype=torch.float64)
    same = houses(tmp_path, row0=f",Aachen,{PRICE[0]}", row3=f"{SIZE[3]},,{PRICE[3]}")
    expected = get_task(same, options).build(dtype=torch.float64)
    torch.testing.assert_close(found.train.inputs, expected.train.inputs)
    torch.testing.assert_close(found.heldout.targets, expected.heldout.targets)
    parquet.write_table(arrow.table({"day": arrow.array([0] * 20, arrow.date32()), "y": list(range(20))}), file)
    assert "column 'day' is of type date32[day]: leave it out (--drop day)" in refused(str(file), target="y")
    file.write_bytes(b"PAR1")
    assert "cannot be read as Parquet" in refused(str(file), target="y")


def test_parquet_without_its_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    assert "pip install 'imstep[data]'" in refused(str(tmp_path / "data.parquet"), target="y")


def test_options_are_for_tables_only() -> None:
    with pytest.raises(TaskError, match=r"are for tables such as data\.csv; digits-mlp is none"):
        get_task("digits-mlp", TableOptions("price"))
    assert TableOptions.from_dict(TableOptions("a", drop=("b",)).to_dict()) == TableOptions("a", drop=("b",))
