"""The spectrum of a problem's curvature as the user sees it: progress, files, a table, how to go on."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from imstep.runs.config import RunConfig
from imstep.runs.environment import environment
from imstep.runs.files import write_json
from imstep.runs.kept import Weights, kept_steps, weights
from imstep.runs.records import finite
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectory, RunDirectoryError
from imstep.runs.sources import hashes, origin_of
from imstep.runs.spectra import Point, Questions, measure
from imstep.runs.studies import claim
from imstep.runs.verdict import short
from imstep.tasks import Origin, Problem

__all__ = ["SpectrumRequest", "run_spectrum"]

RECORD = "spectrum.json"
FORMAT = "imstep-spectrum/1"


@dataclass(frozen=True)
class SpectrumRequest:
    """Whose spectrum is wanted, and what is asked.

    Args:
        config: task, seed, data, device and dtype of a problem at its initial weights; None for a run.
        run: a run directory; None for a problem.
        at: "all", "last" or steps such as "0,50,100"; of a run.
        questions: what is asked.
        words: the command line that repeats it, without the output folder.
    """

    questions: Questions
    config: RunConfig | None = None
    run: Path | None = None
    at: str = "all"
    words: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The command line that repeats it."""
        return shlex.join(["imstep", "spectrum", *self.words])


@dataclass(frozen=True)
class Spectrum:
    """The record: what was asked of what, and the answers.

    Args:
        waiting: how many points are not done.
    """

    task: str
    title: str
    parameters: int
    questions: Questions
    command: str
    environment: dict[str, str]
    points: tuple[Point, ...] = ()
    waiting: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: a number that is not finite becomes null."""
        return {"format": FORMAT, **finite(asdict(self))}

    def replaced(self, point: Point, waiting: int) -> Spectrum:
        """With this point in place of one at the same step, or after the others."""
        others = [own for own in self.points if own.step != point.step]
        return replace(self, points=(*others, point), waiting=waiting)


def run_spectrum(request: SpectrumRequest, out: Path, console: Console, *, overwrite: bool = False) -> bool:
    """Measure, then write report.html, spectrum.png and spectrum.json into `out`.

    The record is written after each answer; one that is unfinished and by the same request is gone on with.

    Returns:
        Whether all questions were answered; False if it was interrupted.

    Raises:
        TaskError, TrainingError, CheckpointError, RunDirectoryError: what cannot be; says why.
    """
    subject = _subject(request, console)
    record = _begun(request, subject)
    earlier = None if overwrite else _unfinished(out / RECORD, record)
    if earlier is None:
        claim(out, RECORD, overwrite)
    record = earlier or record
    try:
        with console.status("") as status:
            for number, (step, state) in enumerate(zip(subject.steps, subject.states, strict=True)):
                if state is not None:
                    subject.problem.model.load_state_dict(state)
                place = "" if step is None else f"step {step} ({number + 1} of {len(subject.steps)}): "
                left = len(subject.steps) - number

                def keep(point: Point, left: int = left) -> None:
                    nonlocal record
                    record = record.replaced(point, left)
                    _write(record, out)

                point = measure(
                    subject.problem, request.questions, step,
                    earlier=next((point for point in record.points if point.step == step), None), keep=keep,
                    tell=partial(_show, status, place),
                )  # fmt: skip
                record = record.replaced(point, left - 1)
    except KeyboardInterrupt:
        done = sum(len(point.answers) for point in record.points)
        console.print(f"Stopped. {done} answers are kept. Go on with:" if done else "Stopped; no answer is kept.")
        if done:
            _print(f"  {request.command} --out {shlex.quote(str(out))}", console)
        return False
    _write(record, out)
    _present(record, out, console)
    return True


def _show(status: Status, place: str, words: str) -> None:
    status.update(escape(place + words))


@dataclass(frozen=True)
class _Subject:
    """A problem, the steps to measure it at with the model's states there, and what it depends on."""

    origin: Origin
    problem: Problem
    sources: dict[str, str]
    steps: Sequence[int | None] = (None,)
    states: Iterable[Weights | None] = (None,)


def _subject(request: SpectrumRequest, console: Console) -> _Subject:
    if request.run is None:
        assert request.config is not None
        origin = request.config.origin()
        _note(origin.task.notes, console)
        return _Subject(origin, request.config.build(origin.task).problem, hashes(origin))
    run = RunDirectory.open(request.run)
    origin, notes = origin_of(run.config, request.run)
    _note(notes, console)
    trainer = run.config.build(origin.task)
    steps = _steps(request.at, kept_steps(run))
    return _Subject(origin, trainer.problem, {"run": run.config.identity}, steps, weights(run, trainer, steps))


def _note(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


def _steps(at: str, there: list[int]) -> list[int]:
    if at in ("all", "last"):
        return there if at == "all" else there[-1:]
    words = [word.strip() for word in at.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise TrainingError(f"--at {at}: give all, last, or steps such as 0,50,100.")
    return sorted({int(word) for word in words})


def _begun(request: SpectrumRequest, subject: _Subject) -> Spectrum:
    task, about = subject.origin.task, {**environment(), **subject.sources}
    return Spectrum(task.name, task.title, subject.problem.size, request.questions, request.command, about)


def _unfinished(file: Path, wanted: Spectrum) -> Spectrum | None:
    """The record in the file if it is unfinished, and of the same question about the same thing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["command"] != wanted.command or not content["waiting"]:
            return None
        points = tuple(Point(**_present_numbers(point)) for point in content["points"])
        found = replace(wanted, points=points, environment=content["environment"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found.environment != wanted.environment:
        raise RunDirectoryError(
            f"the answers in {file.parent} were found with other files, versions or threads than there are now. Add "
            "--overwrite to begin anew, or choose another --out."
        )
    return found


def _present_numbers(value: Any) -> Any:
    """Numbers that JSON does not know as nan again; only a step may be missing."""
    if isinstance(value, dict):
        return {key: None if key == "step" and item is None else _present_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_present_numbers(item) for item in value]
    return math.nan if value is None else value


def _write(record: Spectrum, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record.to_dict())


def _present(record: Spectrum, out: Path, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("step", "loss", "largest |λ|", "trace", "products", "seconds"):
        table.add_column(head, justify="right")
    for point in record.points:
        answers = point.answers
        values, trace = answers["eigenvalues"]["values"], answers["trace"]
        spent = [sum(answer[key] for answer in answers.values()) for key in ("products", "seconds")]
        table.add_row(
            "" if point.step is None else str(point.step), short(point.loss), short(values[0]),
            f"{short(trace['value'])} ± {trace['error']:.1g}", f"{spent[0]:,}", f"{spent[1]:.1f}",
        )  # fmt: skip
    console.print(table)
    _note((sentence for point in record.points for sentence in _warnings(point)), console)
    try:
        from imstep.runs.spectrum_report import save_spectrum  # matplotlib: slow to import, and an extra
    except ImportError:
        _print(f"record: {out / RECORD}  (for a page with plots: pip install 'imstep[report]')", console)
        return
    page, picture = save_spectrum(record, out)
    _print(f"report: {page}\nfigure: {picture}\nrecord: {out / RECORD}", console)


def _warnings(point: Point) -> Iterator[str]:
    where = "" if point.step is None else f" at step {point.step}"
    if not all(math.isfinite(value) for value in point.answers["eigenvalues"]["values"]):
        yield f"products were not finite{where}: there is no spectrum."
    elif not point.answers["eigenvalues"]["converged"]:
        yield f"not all eigenvalues meet the tolerance{where}; see residual_norms in the record."
    if not point.answers["trace"]["converged"]:
        yield f"the trace{where} is less accurate than asked for: its error is {point.answers['trace']['error']:.2g}."


def _print(words: str, console: Console) -> None:
    console.print(words, highlight=False, markup=False, soft_wrap=True)
