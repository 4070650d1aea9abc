"""The verdict of a comparison: who reached the lowest training loss within the same budget, said plainly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from imstep.runs.records import Run, Verdict

__all__ = ["judge", "short"]


def judge(runs: Sequence[Run], budget: float, waiting: Sequence[str] = ()) -> Verdict:
    """Rank the runs by the lowest training loss within the budget; the first run is the subject.

    Only points within the budget are recorded, so a last step that overshoots does not count for anyone.

    Args:
        waiting: titles of those that have not run to their end.
    """
    if waiting:
        verdict = judge(runs, budget)
        headline = f"Unfinished, without {', '.join(waiting)}: {verdict.headline}"
        return replace(verdict, headline=headline)
    if not runs:
        return Verdict("No optimizer has run to its end.", (), False, 1.0)
    subject, rivals = runs[0], runs[1:]
    if not rivals:
        return Verdict(f"{subject.label} ran alone; there is nothing to compare.", (), False, 1.0)
    second = min(rivals, key=_loss)
    if not math.isfinite(min(_loss(subject), _loss(second))):
        return Verdict("No optimizer reached a finite loss.", (), False, 1.0)
    won = _loss(subject) < _loss(second)
    winner, loser = (subject, second) if won else (second, subject)
    factor = _loss(loser) / _loss(winner)
    spent = f"{budget:,.0f} gradient-equivalents"
    if won:
        headline = (
            f"{subject.label} reached the lowest training loss within {spent}: {short(_loss(subject))}, "
            f"{_times(factor)} lower than the next best, {second.label} ({short(_loss(second))})."
        )
    else:
        headline = (
            f"{subject.label} did not reach the lowest training loss within {spent}: {winner.label} reached "
            f"{short(_loss(winner))}, {_times(factor)} lower than {subject.label} ({short(_loss(subject))})."
        )
    details = [_crossing(subject, rival) for rival in rivals] + [_clock(runs), _heldout(runs), _stopped(runs)]
    return Verdict(headline, tuple(details), won, factor)


def short(value: float, digits: int = 2) -> str:
    """A loss as people write it.

    >>> short(0.00271), short(1.5), short(float("nan"))
    ('2.71e-3', '1.50', 'nan')
    """
    if not math.isfinite(value) or 0.1 <= abs(value) < 1000:
        return f"{value:.{digits}f}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _loss(run: Run) -> float:
    loss = run.best.train
    return loss if math.isfinite(loss) else math.inf


def _times(factor: float) -> str:
    if not math.isfinite(factor):
        return "infinitely many times"
    digits = 0 if factor >= 10 else 1 if factor >= 1.1 else 3
    return f"{factor:.{digits}f} times"


def _crossing(subject: Run, rival: Run) -> str:
    """What the subject paid to reach the rival's best loss."""
    there = rival.best
    here = subject.first_below(there.train)
    if here is None:
        return f"{subject.label} never reached the loss of {rival.label} ({short(_loss(rival))})."
    if not there.cost:
        return f"{rival.label} did not get below the loss at the start ({short(there.train)}) within the budget."
    cost = there.cost / here.cost if here.cost else math.inf
    return (
        f"{subject.label} passed the best of {rival.label} ({short(there.train)}) after {here.cost:,.0f} "
        f"gradient-equivalents instead of {there.cost:,.0f} ({_ratio(cost)}), in {here.seconds:.1f} s "
        f"instead of {there.seconds:.1f} s."
    )


def _ratio(cost: float) -> str:
    return f"{cost:.1f} times fewer" if cost >= 1 else f"{1 / cost:.1f} times more"


def _clock(runs: Sequence[Run]) -> str:
    """The same question asked of the clock: the lowest loss when the quickest run had ended."""
    seconds = min(run.final.seconds for run in runs)
    ranked = sorted(runs, key=lambda run: run.within_seconds(seconds).train)
    losses = ", ".join(f"{run.label} {short(run.within_seconds(seconds).train)}" for run in ranked)
    return f"By the clock, after {seconds:.1f} s (when the quickest run ended): {losses}."


def _heldout(runs: Sequence[Run]) -> str:
    """Training loss is what is optimized; the held-out loss is what one wants in the end."""
    ranked = sorted(runs, key=lambda run: run.best.heldout if _ok(run) else math.inf)
    best = ranked[0]
    others = "" if best is runs[0] else f"; {runs[0].label} {short(runs[0].best.heldout)}"
    loss = f"{short(best.best.heldout)}{others}"
    return f"Where each has its lowest training loss, {best.label} has the lowest held-out loss ({loss})."


def _stopped(runs: Sequence[Run]) -> str:
    """Early stopping, the same for all; by the held-out set itself, so that all these losses are a little too low."""
    ranked = sorted(runs, key=lambda run: run.stopped.heldout if math.isfinite(run.stopped.heldout) else math.inf)
    losses = ", ".join(
        f"{run.label} {short(run.stopped.heldout)} after {run.stopped.cost:,.0f} gradient-equivalents"
        for run in ranked
    )
    return f"Stopped early, each where its held-out loss is lowest: {losses}."


def _ok(run: Run) -> bool:
    return math.isfinite(run.best.heldout)
