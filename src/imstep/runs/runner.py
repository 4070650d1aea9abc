"""The training loop: a state machine that yields one row per step and per evaluation.

The loop prints nothing and writes nothing: whoever iterates over it draws progress, writes files and
decides to stop early. Between two rows its state is complete, so stopping there loses nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from imstep.runs.optimizers import LOSS_COST, Stepper
from imstep.runs.peers import ALONE, Peers
from imstep.runs.randomness import RandomStream
from imstep.runs.rows import (
    Clock,
    Ending,
    EvaluationRow,
    Limits,
    Row,
    Schedule,
    StepRow,
    Totals,
    TrainingError,
    present_status,
)
from imstep.runs.seconds import Seconds
from imstep.tasks import AnyBatch, Evaluation, Problem
from imstep.tasks.base import mix

__all__ = [
    "Clock",
    "Ending",
    "EvaluationRow",
    "Limits",
    "Row",
    "Schedule",
    "StepRow",
    "Totals",
    "Trainer",
    "TrainingError",
]

EVERY_EPOCH = Schedule()

NON_FINITE_PATIENCE = 3
"""Steps in a row without a finite loss after which a run is given up."""


class Trainer:
    """Trains one problem by one optimizer, resumably.

    Args:
        problem: data, model, loss.
        stepper: makes the steps.
        batch_size: examples per step (>= 1); None for the full batch.
        seed: decides the order of mini-batches and the random draws of the model (dropout).
        schedule: when to evaluate.
        peers: the processes that train together; each draws dropout for itself, the first alone evaluates, and its
            clock counts.
        seconds: the clock of steps, and of a limit in seconds.

    Raises:
        TaskError: `batch_size` is below 1.
        TrainingError: a clock that does not show how long such a run takes.
    """

    def __init__(
        self,
        problem: Problem,
        stepper: Stepper,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        schedule: Schedule = EVERY_EPOCH,
        peers: Peers = ALONE,
        seconds: Seconds = Seconds.WALL,
    ) -> None:
        seconds.check(problem.device, peers.size)
        self.problem = problem
        self.stepper = stepper
        self.batch_size = batch_size
        self.seed = seed
        self.schedule = schedule
        self.peers = peers
        self.seconds = seconds
        self.totals = Totals()
        self.ending: Ending | None = None
        self._batches_per_epoch = problem.batch_count(batch_size)
        self._evaluated_at = -1
        self._next_evaluation = 0.0
        self._non_finite = 0
        self._converged = False
        self._batches: Iterator[AnyBatch] = iter(())
        self._points = problem.growing() if stepper.grows else None
        self._random = RandomStream(problem.device, seed)

    @property
    def epoch(self) -> float:
        """Epochs done so far; a fraction within an epoch."""
        return self.totals.steps / self._batches_per_epoch

    def run(self, limits: Limits) -> Iterator[Row]:
        """Step and evaluate until a limit is reached; `ending` then says which.

        Cost: evaluations take a forward pass over all data each and are not charged.
        """
        self.ending = None
        self._seek()
        while True:
            if self._evaluated_at < self.totals.steps and self._now() >= self._next_evaluation - 1e-9:
                yield self._evaluate()
                continue
            ending = self._limit(limits)
            if ending is None:
                yield self._step()
                continue
            if self._evaluated_at < self.totals.steps:
                yield self._evaluate()
            self.ending = ending
            return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer: numbers, strings and tensors only."""
        return {
            "points": None if self._points is None else self._points.state_dict(),
            "totals": asdict(self.totals),
            "evaluated_at": self._evaluated_at,
            "next_evaluation": self._next_evaluation,
            "non_finite": self._non_finite,
            "converged": self._converged,
            "random": self._random.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Load the model and the optimizer as well."""
        statuses = {present_status(name): count for name, count in state["totals"]["statuses"].items()}
        self.totals = Totals(**{**state["totals"], "statuses": statuses})
        self._evaluated_at = state["evaluated_at"]
        self._next_evaluation = state["next_evaluation"]
        self._non_finite = state["non_finite"]
        self._converged = state["converged"]
        self._random.load_state_dict(state["random"])
        if state.get("points") is None:
            self._points = None  # as in runs of earlier versions
        elif self._points is not None:
            self._points.load_state_dict(state["points"])

    def _now(self) -> float:
        now = {Clock.EPOCHS: self.epoch, Clock.COST: self.totals.cost, Clock.SECONDS: self.totals.seconds}
        return now[self.schedule.clock]

    def _limit(self, limits: Limits) -> Ending | None:
        if self._converged:
            return Ending.CONVERGED
        if self._non_finite >= NON_FINITE_PATIENCE:
            return Ending.DIVERGED
        if limits.epochs is not None and self.epoch >= limits.epochs:
            return Ending.EPOCHS
        # A sum of thirds may end one rounding error below a whole budget.
        if limits.budget is not None and self.totals.cost >= limits.budget * (1 - 1e-9):
            return Ending.BUDGET
        if limits.seconds is not None and self.totals.seconds >= limits.seconds:
            return Ending.SECONDS
        return None

    def _epoch_batches(self, epoch: int) -> Iterator[AnyBatch]:
        if self._points is None:
            yield from self.problem.batches(epoch, self.batch_size, self.seed)
        else:
            yield self.problem.drawn(epoch, self.seed, self._points.count)

    def _seek(self) -> None:
        """Place the batch iterator at the current step; batches depend on (seed, epoch); points on how many, and where
        the model is.
        """
        epoch, done = divmod(self.totals.steps, self._batches_per_epoch)
        self._batches = itertools.islice(self._epoch_batches(epoch), done, None)

    def _next_batch(self) -> AnyBatch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._epoch_batches(self.totals.steps // self._batches_per_epoch)
            batch = next(self._batches)
        return batch

    def _step(self) -> StepRow:
        start = self.seconds.now()
        batch = self._next_batch()  # which takes evaluations where points lie by residuals
        share = len(batch) / len(self.problem.train)
        with self._draws():
            result = self.stepper.step(self.problem, batch)
        _synchronize(self.problem.device)
        seconds = self.peers.of_first(self.seconds.now() - start)
        if self._points is not None and result.new_loss is not None:
            self._points.observe_losses(result.loss, result.new_loss)
        self._non_finite = 0 if math.isfinite(result.loss) else self._non_finite + 1
        # A mini-batch at its own minimum says nothing about the next one.
        self._converged = result.converged and self._batches_per_epoch == 1 and not self.problem.redrawn
        totals, statuses = self.totals, dict(self.totals.statuses)
        if result.status is not None:
            statuses[result.status] = statuses.get(result.status, 0) + 1
        self.totals = replace(
            totals,
            steps=totals.steps + 1,
            cost=totals.cost + share * result.cost,
            gradients=totals.gradients + result.gradients,
            products=totals.products + result.products,
            losses=totals.losses + result.losses,
            seconds=totals.seconds + seconds,
            statuses=statuses,
        )
        return StepRow(
            step=self.totals.steps,
            epoch=self.epoch,
            loss=result.loss,
            cost=self.totals.cost,
            step_cost=share * result.cost,
            seconds=self.totals.seconds,
            new_loss=result.new_loss,
            status=result.status,
            record=result.record,
        )

    def _draws(self) -> RandomStream:
        """What the model draws from in a step; of several processes each from its own, which needs no saving."""
        if self.peers.size == 1:
            return self._random
        return RandomStream(self.problem.device, mix(mix(self.seed, self.peers.rank), self.totals.steps))

    def _evaluate(self) -> EvaluationRow:
        start = self.seconds.now()
        if self.peers.first:
            with self.stepper.evaluating():
                train, heldout = (
                    self.problem.evaluate(self.problem.train),
                    self.problem.evaluate(self.problem.heldout),
                )
        else:
            train = heldout = Evaluation(math.nan, None, len(self.problem.train))
        seconds = self.seconds.now() - start
        share = (train.examples + heldout.examples) / train.examples
        self.totals = replace(
            self.totals,
            evaluations=self.totals.evaluations + 1,
            evaluation_cost=self.totals.evaluation_cost + LOSS_COST * share,
            evaluation_seconds=self.totals.evaluation_seconds + seconds,
        )
        self._evaluated_at = self.totals.steps
        periods = int((self._now() + 1e-9) / self.schedule.every)
        self._next_evaluation = (periods + 1) * self.schedule.every
        return self._row(train, heldout)

    def _row(self, train: Evaluation, heldout: Evaluation) -> EvaluationRow:
        return EvaluationRow(
            step=self.totals.steps,
            epoch=self.epoch,
            cost=self.totals.cost,
            seconds=self.totals.seconds,
            train_loss=train.loss,
            heldout_loss=heldout.loss,
            train_metric=train.metric,
            heldout_metric=heldout.metric,
        )


def _synchronize(device: torch.device) -> None:
    """Wait for the device, so that a step's seconds are its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
