"""How the residuals of a loss came about, and what was found out of evaluations that took the same course."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gradients import runs_functions
from imstep.curvature.outline import Outline
from imstep.curvature.recording import Recording
from imstep.curvature.rerun import Rerun
from imstep.curvature.staleness import nodes_of

PROBATION = 8
"""Evaluations of one course in which something has to be seen right before it is taken for granted; our choice."""


class KnownCourses:
    """What is remembered from one evaluation to the next."""

    def __init__(self) -> None:
        self._form = self._fixed = ""
        self._rerun = self._rows = 0  # in how many evaluations of this course in a row each was right
        self.refuted = False  # whether something has not run again as the closure does
        self.outline: Outline | None = None  # of evaluations that have repeated themselves
        self._graph: Any = None  # of the last

    def recording(self, parameters: Sequence[Tensor]) -> Recording:
        """For an evaluation that begins."""
        recording = Recording(parameters, self.outline)
        if self.refuted:
            recording.unfit = "an evaluation has come to something else when it was run again"
        return recording

    def meet(self, recording: Recording, graph: Any) -> None:
        """An evaluation took a course, and autograd has made a graph of it."""
        if recording.repeated and graph == self._graph:
            form = self._form
        else:
            form = _digest((recording.form, graph))
            self.outline = recording.outline() if form == self._form else None
        fixed = _digest([None if t is None else _contents(t) for t in recording.fixed])
        if (form, fixed) != (self._form, self._fixed):
            self._rows = 0
        if form != self._form:
            self._rerun = 0
        self._form, self._fixed, self._graph = form, fixed, graph

    def agree(self, rerun: bool = False, rows: bool = False) -> None:
        """What was right in it."""
        self._rerun, self._rows = self._rerun + rerun, self._rows + rows

    @property
    def reruns(self) -> bool:
        """Whether the course that was met last runs again as the closure does."""
        return self._rerun >= PROBATION

    @property
    def has_rows(self) -> bool:
        """Whether it is known which rows belong to which residual in that course."""
        return self._rows >= PROBATION

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, without what only saves time."""
        return {name: value for name, value in vars(self).items() if name not in ("outline", "_graph")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state, outline=None, _graph=None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.state_dict(), "outline": None, "_graph": None}


class Course:
    """The course of an evaluation: its operators and its graph, without the numbers.

    Args:
        recording: of the evaluation and the residuals.
        loss: its result.
        residuals: (N,).
        known: what is remembered; completed.

    Attributes:
        nodes: of the graph of the loss, by name and number.
        trusted: whether evaluations of this course have run again as the closure does, bit for bit.
    """

    def __init__(self, recording: Recording, loss: Tensor, residuals: Tensor, known: KnownCourses) -> None:
        self._known, self.nodes = known, nodes_of(loss)
        self._rerun: Rerun | None = None
        self._smooth = self._compared = self.trusted = False
        rerun = recording.finish(residuals)
        if rerun is not None and not known.refuted:
            self._rerun = rerun
            nodes = sorted((number, name) for name, number in self.nodes)
            known.meet(recording, [(number - nodes[0][0], name) for number, name in nodes])
            # A Function says itself what its derivative is.
            self._smooth, self.trusted = recording.smooth and not runs_functions([loss]), known.reruns

    # --- at other parameters ------------------------------------------------------------------------------------

    def again(self) -> Tensor | None:
        """The residuals (N,) where the parameters are now; None where that takes the closure."""
        if self._rerun is None or (self._compared and not self.trusted):
            return None
        try:
            return self._rerun()
        except Exception:  # the closure will show what it means
            return None

    def compare(self, again: Tensor | None, values: Tensor) -> None:
        """What :meth:`again` and the closure come to at one point."""
        if again is None or not bool(values.isfinite().all()):
            return
        self._compared = True
        if torch.equal(again.double(), values):
            self._known.agree(rerun=True)
        else:  # something is out of sight
            self._known.refuted, self._rerun = True, None

    @property
    def finite(self) -> bool:
        """Whether finite residuals have finite derivatives."""
        return self._smooth and self.trusted

    # --- the same rows ------------------------------------------------------------------------------------------

    @property
    def has_known_rows(self) -> bool:
        """Whether rows of the same course were right: then it is known which of them belongs to which residual.

        Where all operators are smooth and constants have their zeros at the same places, what depends on what is the
        same as well.
        """
        return self._smooth and self._known.has_rows

    def know_rows(self) -> None:
        """The rows are right."""
        self._known.agree(rows=self._smooth)


def _contents(t: Tensor) -> Any:
    return t.dtype, t.shape, hashlib.sha256(t.cpu().numpy().tobytes()).digest()


def _digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()
