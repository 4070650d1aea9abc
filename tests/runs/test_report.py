"""The page: whole, self-contained, escaped, in both modes; with and without the parts that may be missing."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

from rich.console import Console

from imstep.runs.live import ComparisonProgress, endings, result_table
from imstep.runs.records import Comparison, Point, Run, Sweep, SweepRow
from imstep.runs.report import render, save_report
from imstep.runs.verdict import judge
from imstep.tasks import Surface

STEP = {
    "status": "enough", "outcome": "accepted", "step_length": 0.5, "rho": 0.9, "taylor_error": -1e-4,
    "predicted_decrease": 1e-2, "products": 4, "damping": 1e-3, "gradient_norm": 0.3, "cost": 10.0,
}  # fmt: skip
PICTURES = tuple([[[0, 128], [255, 10]]] * 3)


def comparison_of(**changes: object) -> Comparison:
    steps = (
        STEP,
        {**STEP, "status": "disturbing_negative_curvature", "rho": math.nan},
        {**STEP, "outcome": "rejected", "status": None, "step_length": None},
    )
    points = tuple(Point(10.0 * i, i / 2, i, i, 0.1 / (1 + i), 0.2 / (1 + i)) for i in range(4))
    newton = Run(
        "newton-krylov", "NewtonKrylov", {}, points, 12,
        {"enough": 1, "disturbing_negative_curvature": 1}, "", steps, PICTURES,
    )  # fmt: skip
    slow = tuple(replace(point, train=2 * point.train) for point in points)
    adam = Run("adam", "Adam, lr 0.01", {"lr": 0.01}, slow, pictures=PICTURES)
    rows = (SweepRow({"lr": 0.001}, 0.07, 1.0), SweepRow({"lr": 0.01}, 0.05, 1.0))
    whole = Comparison(
        task="digits-autoencoder", title="Digits <autoencoder>", description="An MLP.", parameters=1234,
        seed=0, budget=30.0, batch_size=None, runs=(newton, adam), sweeps=(Sweep("Adam", 30.0, rows),),
        environment={"PyTorch": "2.13"}, command="imstep compare digits-autoencoder", seconds=3.0,
        verdict=judge((newton, adam), 30.0), originals=PICTURES,
    )  # fmt: skip
    return replace(whole, **changes)


@cache
def page_of() -> str:
    """The page of the usual comparison: drawing it takes seconds."""
    return render(comparison_of())


class Balance(HTMLParser):
    """Checks that tags close in order, and collects ids and outside references."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_self_contained() -> None:
    page = page_of()
    found = parsed(page)
    assert all(reference.startswith(("#", "data:")) for reference in found.references)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_ids_are_unique_and_references_resolve() -> None:
    page = page_of()
    found = parsed(page)
    assert len(found.ids) == len(set(found.ids))
    used = {reference[1:] for reference in found.references if reference.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(found.ids)


def test_figures_follow_the_page_in_both_modes() -> None:
    page = page_of()
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "var(--ink)" in svg
        colors = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        assert colors == set()


def test_page_holds_every_part() -> None:
    page = page_of()
    for part in (
        "NewtonKrylov reached the lowest training loss", "Result", "Loss curves",
        "Anatomy of the Newton steps", "disturbing negative curvature", "Tuning of the baselines", "0.001",
        "Held-out reconstructions",
        "Settings and versions", "imstep compare digits-autoencoder", "at the edge of the grid",
    ):  # fmt: skip
        assert part in page
    assert "Digits &lt;autoencoder&gt;" in page
    assert "<autoencoder>" not in page


def test_a_lost_comparison_is_said_and_marked() -> None:
    whole = comparison_of(sweeps=(), originals=())
    runs = tuple(reversed(whole.runs))
    page = render(replace(whole, runs=runs, verdict=judge(runs, 30.0)))
    assert 'class="verdict lost"' in page
    assert "Adam, lr 0.01 did not reach the lowest training loss" in page


def test_missing_parts_leave_a_whole_page() -> None:
    page = render(comparison_of(originals=(), sweeps=(), batch_size=50, command=""))
    parsed(page)
    assert "Held-out reconstructions" not in page
    assert "Tuning of the baselines" not in page


def test_a_run_that_diverged_at_once_can_be_drawn(tmp_path) -> None:
    points = (Point(0.0, 0.0, 0, 0.0, 1.0, 1.0), Point(1.0, 0.1, 1, 1.0, math.nan, math.inf))
    bad = Run("sgd", "SGD", {}, points, note="diverged: the loss was not finite several steps in a row")
    runs = (*comparison_of().runs, bad)
    files = save_report(comparison_of(runs=runs, verdict=judge(runs, 30.0), originals=(), sweeps=()), tmp_path)
    assert "diverged" in files.page.read_text(encoding="utf-8")


def test_files_are_written_and_the_record_reads_back(tmp_path) -> None:
    files = save_report(comparison_of(), tmp_path / "new" / "folder")
    assert files.picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(files.record.read_text(encoding="utf-8"))
    back = Comparison.from_dict(record)
    assert back.to_dict() == record
    assert page_of().count("<svg") == files.page.read_text(encoding="utf-8").count("<svg") == 10


def test_a_record_of_an_earlier_version_is_read_with_the_present_names() -> None:
    record = json.loads(json.dumps(comparison_of().to_dict()).replace('"enough"', '"stalled"'))
    assert Comparison.from_dict(record).to_dict() == comparison_of().to_dict()


def test_every_plot_names_its_axes_and_every_entry_of_a_card_its_head() -> None:
    page = page_of()
    for words in ("training loss", "seconds in steps", "held-out loss", "learning rate; filled: chosen", "step length",
                  "products", "λ", "‖g‖", "ρ", "change of the loss"):  # fmt: skip
        assert f">{words}</text>" in page
    cards = re.search(r'class="cards".*?</table>', page, flags=re.DOTALL)
    assert cards is not None
    assert cards[0].count("<td") == cards[0].count("data-head=") + 2  # the names of the two optimizers


def test_progress_and_table_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=220)
    whole = comparison_of()
    with ComparisonProgress(console) as progress:
        progress.begin(["newton-krylov", "adam"], [1, 2], 30.0)
        progress.candidate(0, 0, "")
        progress.advance(0, 10.0, 0.1, 0.5)
        progress.end(0, whole.runs[0])
        for number, rate in enumerate(("0.001", "0.01")):
            progress.candidate(1, number, f"lr {rate}")
            progress.advance(1, 30.0, 0.05, 0.5)
        progress.end(1, whole.runs[1])
    assert "NewtonKrylov: lowest training loss 2.50e-2, 1.5 s" in console.file.getvalue()


def test_table_fits_a_terminal_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    whole = comparison_of()
    adam = replace(whole.runs[1], label="Adam, batch 150, lr 0.003", note="diverged")
    whole = replace(whole, runs=(whole.runs[0], adam))
    console.print(result_table(whole))
    text = console.file.getvalue()
    assert "…" not in text
    for shown in ("Adam, batch 150, lr 0.003", "2.50e-2", "12"):
        assert shown in text
    assert endings(whole) == [
        "NewtonKrylov: enough 1, disturbing negative curvature 1",
        "Adam, batch 150, lr 0.003: diverged",
    ]


def test_progress_draws_one_bar_for_each_optimizer() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with ComparisonProgress(console) as progress:
        progress.begin(["newton-krylov, batch 150", "adam, batch 150"], [1, 4], 600.0)
        progress.candidate(0, 0, "")
        progress.advance(0, 200.0, 0.1, 0.5)
        progress.end(0, comparison_of().runs[0])
        first = console.file.getvalue()
        progress.candidate(1, 1, "lr 0.003")
        progress.advance(1, 310.0, 0.05, 0.5)
    text = console.file.getvalue()
    assert "waiting: 4 learning rates, 600 each" in first
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in text.splitlines()]
    (shown,) = {line for line in lines if "310/600" in line}
    assert re.search(r"310/600  lowest 5.00e-2  \d+:\d\d left", shown)
    assert all(len(line) <= 80 for line in lines)


def test_a_solution_is_shown_and_kept() -> None:
    wave = [[math.sin(x / 3 + t) for x in range(12)] for t in range(8)]
    exact = Surface(wave, ((0.0, 4.0), (0.0, 8.0)), ("x", "t"))
    worse = replace(exact, values=[[1.1 * value for value in row] for row in wave])
    whole = comparison_of()
    runs = tuple(replace(run, surface=surface) for run, surface in zip(whole.runs, (exact, worse), strict=True))
    shown = replace(whole, originals=(), sweeps=(), solution=exact, runs=runs)
    text = render(shown)
    assert "absolute error" in text
    assert text.count(">absolute error, at most ") == 2
    assert "absolute error" not in page_of()
    assert Comparison.from_dict(json.loads(json.dumps(shown.to_dict()))).runs[1].surface.values == worse.values
