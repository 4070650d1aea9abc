"""How far a bench is: the present run, all runs, and the time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from imstep.bench.work import Job
from imstep.runs.progress import Drawn, clock, fitting
from imstep.runs.verdict import short

__all__ = ["BenchProgress"]

BAR = 12


class BenchProgress(Drawn):
    """A line that is redrawn on a terminal, below a line for each finished run.

    Args:
        console: where to draw.
        lacking: the runs to be made, (entry, side, kind) -> their time in seconds, roughly.
    """

    def __init__(self, console: Console, lacking: dict[tuple[str, str, str], float]) -> None:
        self._live = Live(Text(""), console=console, refresh_per_second=4, transient=True)
        super().__init__(console, self._live)
        self._left, self._total = dict(lacking), len(lacking)
        self._measured = self._foreseen = 0.0
        self._job: Job | None = None
        self._began = 0.0

    def skip(self, entry: str) -> None:
        """An entry is left out."""
        self._left = {key: value for key, value in self._left.items() if key[0] != entry}

    def begin(self, job: Job) -> None:
        """A run begins."""
        self._job, self._began = job, time.monotonic()
        self.at(0.0, float("nan"))

    def at(self, done: float, loss: float) -> None:
        """The run has come so far, 0 to 1."""
        if self._job is None or not self._console.is_terminal:
            return
        made = self._total - len(self._left)
        full = round(BAR * made / max(self._total, 1))
        bar = f"[cyan]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
        name = f"{self._job.entry.label}, {self._job.side}, {self._job.kind}"
        parts = [f"{made}/{self._total} runs", f"{clock(self.left())} left", f"{name} {100 * min(done, 1):.0f} %"]
        parts += [] if loss != loss else [f"loss {short(loss)}"]
        self._live.update(Text.from_markup(bar).append(" " + fitting(parts, self._console.width - BAR - 2)))

    def end(self, job: Job, seconds: float, line: str) -> None:
        """A run is finished; `line` tells its result."""
        foreseen = self._left.pop((job.entry.label, job.side, job.kind), 0.0)
        self._measured, self._foreseen, self._job = self._measured + seconds, self._foreseen + foreseen, None
        made = self._total - len(self._left)
        self._console.print(escape(f"{made}/{self._total}  {line}; {clock(self.left())} left"), highlight=False)

    def left(self) -> float:
        """Seconds until all is done: as foreseen, by what the finished runs took of what was foreseen for them."""
        scale = self._measured / self._foreseen if self._foreseen else 1.0
        running = time.monotonic() - self._began if self._job is not None else 0.0
        return max(0.0, scale * sum(self._left.values()) - running)
