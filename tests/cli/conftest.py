"""For commands of which a test does not look at the page: without the drawing, which takes most of their time."""

import sys
from pathlib import Path

import pytest

from imstep.runs import report, run_report, spectrum_report

sys.path.insert(0, str(Path(__file__).parent))  # the folder's helpers can be imported


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written as ever; pages and pictures are empty or not there."""

    def nothing(draw: object, path: Path) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr(run_report, "save_run_report", lambda path, *_: path / "report.html")
    monkeypatch.setattr(spectrum_report, "save_spectrum", lambda record, out: (out / "report.html", out / "s.png"))
    monkeypatch.setattr(report, "save_png", nothing)
    monkeypatch.setattr(report, "render", lambda comparison: "")
