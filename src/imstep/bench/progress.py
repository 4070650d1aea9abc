"""How far a bench is: the present runs, all runs, and the time left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

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
        jobs: how many go side by side.
    """

    def __init__(self, console: Console, lacking: dict[tuple[str, str, str], float], jobs: int = 1) -> None:
        self._live = Live(Text(""), console=console, refresh_per_second=4, transient=True)
        super().__init__(console, self._live)
        self._left, self._total, self._jobs = dict(lacking), len(lacking), jobs
        self._measured = self._foreseen = 0.0
        self._running: dict[tuple[str, str, str], _Shown] = {}

    def skip(self, entry: str) -> None:
        """An entry is left out."""
        self._left = {key: value for key, value in self._left.items() if key[0] != entry}

    def begin(self, job: Job) -> None:
        """A run begins."""
        self._running[_key(job)] = _Shown(time.monotonic())
        self._draw()

    def at(self, job: Job, done: float, loss: float) -> None:
        """A run has come so far, 0 to 1."""
        shown = self._running[_key(job)]
        shown.done, shown.loss = min(done, 1.0), loss
        self._draw()

    def end(self, job: Job, line: str) -> None:
        """A run has ended; `line` tells its result, and is empty if it has none."""
        seconds = time.monotonic() - self._running.pop(_key(job)).began
        if not line:
            return
        foreseen = self._left.pop(_key(job), 0.0)
        self._measured, self._foreseen = self._measured + seconds, self._foreseen + foreseen
        made = self._total - len(self._left)
        self._console.print(escape(f"{made}/{self._total}  {line}; {clock(self.left())} left"), highlight=False)

    def left(self) -> float:
        """Seconds until all is done: as foreseen, by what the finished runs took of what was foreseen for them."""
        scale = self._measured / self._foreseen if self._foreseen else 1.0
        running = sum(time.monotonic() - shown.began for shown in self._running.values())
        return max(0.0, scale * sum(self._left.values()) - running) / self._jobs

    def _draw(self) -> None:
        if not self._console.is_terminal:
            return
        made = self._total - len(self._left)
        full = round(BAR * made / max(self._total, 1))
        bar = f"[cyan]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
        parts = [f"{made}/{self._total} runs", f"{clock(self.left())} left"]
        parts += [f"{', '.join(key)} {100 * shown.done:.0f} %" for key, shown in self._running.items()]
        parts += [f"loss {short(shown.loss)}" for shown in self._running.values() if shown.loss == shown.loss]
        self._live.update(Text.from_markup(bar).append(" " + fitting(parts, self._console.width - BAR - 2)))


@dataclass
class _Shown:
    """A run that is being made."""

    began: float
    done: float = 0.0
    loss: float = math.nan


def _key(job: Job) -> tuple[str, str, str]:
    return job.entry.label, job.side, job.kind
