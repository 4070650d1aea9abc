"""How the parts of several processes make up the batch of a step, and whether the processes agree."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.pieces import FrozenPieces
from imstep.curvature.processes import Processes, check_forms, check_parameters, digest
from imstep.curvature.reduction import shares
from imstep.curvature.shared import SharedBatch
from imstep.optim.memory import Memory
from imstep.optim.micro_batches import MicroBatches


@dataclass(frozen=True)
class _Part:
    """What a process tells the others of its part of a step, and of itself.

    Attributes:
        kind: of closure.
        count: its weight before scaling; 0 for no part.
        pieces: how many it evaluates one by one.
        form: numbers of tensors and of entries that are trained.
        parameters, fixed, state: digests of the parameters, of those of the optimizer that are frozen, and of options
            and memory.
        loss: of a part that was evaluated.
    """

    kind: str
    count: float
    pieces: int = 1
    form: tuple[int, int] = (0, 0)
    parameters: int = 0
    fixed: int = 0
    state: int = 0
    loss: float = 0.0


def shared_batch(
    processes: Processes,
    closure: Any,
    begin: Callable[[], tuple[ParameterVector, bool, Penalty | None]],
    state: Callable[[], tuple[int, int]],
    whole: bool = False,
) -> SharedBatch:
    """The batch of a step, of which this process evaluates ``closure``; all processes call this together.

    Args:
        closure: of this process; a :class:`MicroBatches` or a list of closures likewise.
        begin: parameters, whether ``.grad`` holds gradients, and the penalty; may fail.
        state: digests of frozen parameters, and of the optimizer's options and memory.
        whole: whether the pieces of a process are evaluated at once.

    Raises:
        ValueError: the processes differ in parameters, options, state or the kind of their closures; or none has data.
        OtherProcessError: another process raised here.
    """
    own: list[Any] = []

    def part() -> _Part:
        parameters, stale, penalty = begin()
        pieces = MicroBatches.of(closure)
        own[:] = [parameters, stale, penalty, pieces]
        form = len(parameters.tensors), parameters.size
        return _Part(*_kind(pieces), form, digest(parameters.replicated), *state())

    parts = processes.gather(part)
    _check(parts)
    parameters, stale, penalty, pieces = own
    weights = _weights(pieces, [part.count for part in parts])
    processes.alike = all(part.pieces == 1 and part.count == parts[0].count for part in parts)
    frozen = _frozen(closure, pieces, parameters.evaluated, stale, whole)
    return SharedBatch(frozen, weights[processes.rank], sum(weights), parameters, penalty)


def shared_loss(processes: Processes, closure: Any, evaluate: Callable[[], float]) -> float:
    """The loss of all processes at points beside those of steps; all call this together.

    Args:
        closure: of this process, as a step takes it.
        evaluate: the loss of this process; may fail.

    Raises: as :func:`shared_batch`.
    """
    own: list[MicroBatches | None] = []

    def part() -> _Part:
        own[:] = [MicroBatches.of(closure)]
        kind, count, number = _kind(own[0])
        return _Part(f"a check, {kind}", count, number, loss=evaluate() if count else 0.0)

    parts = processes.gather(part)
    _check(parts)
    weights = _weights(own[0], [part.count for part in parts])
    return sum(weight * part.loss for weight, part in zip(weights, parts, strict=True))


def _kind(pieces: MicroBatches | None) -> tuple[str, float, int]:
    """The kind of a closure, its weight before scaling, and of how many pieces it is."""
    if pieces is None:
        return "a closure", 1.0, 1
    if pieces.reduction is not None:
        return f"MicroBatches with {type(pieces.reduction).__name__}", pieces.count, len(pieces.pieces)
    pieces.checked()
    return "a closure", 1.0, len(pieces.pieces)


def _frozen(
    closure: Any, pieces: MicroBatches | None, parameters: ParameterVector, stale: bool, whole: bool
) -> FrozenClosure | FrozenPieces | None:
    """What this process evaluates; one piece as a whole, which more can be done with."""
    if pieces is None:
        return FrozenClosure(closure, parameters, stale)
    if whole and pieces.pieces:
        return FrozenClosure(pieces, parameters, stale)
    if len(pieces.pieces) == 1 and math.isclose(pieces.pieces[0].weight, 1):
        return FrozenClosure(pieces.pieces[0].closure, parameters, stale)
    if not pieces.pieces:
        return None
    return FrozenPieces(pieces.pieces, parameters, stale, None, pieces.memory_budget)


def state_digest(options: str, memory: Memory) -> int:
    """Of an optimizer's representation and of the numbers in its memory."""
    numbers = {name: value for name, value in memory.to_dict().items() if not isinstance(value, Tensor)}
    return zlib.crc32(re.sub(r"0x[0-9a-f]+", "", f"{options}{numbers}").encode())


def _weights(pieces: MicroBatches | None, counts: list[float]) -> list[float]:
    """What the loss of each process is multiplied by; 0 where there is none."""
    reduction = None if pieces is None else pieces.reduction
    if reduction is None:
        return [1 / len(counts)] * len(counts)
    if not any(counts):
        raise ValueError("a step needs at least one piece of a batch, got none in any process.")
    return shares(reduction, counts)


def _check(parts: list[_Part]) -> None:
    """Raise where processes differ from the first; all do so alike."""
    first = parts[0]
    if all(part.kind == first.kind for part in parts):
        check_forms([part.form for part in parts])
        check_parameters([part.parameters for part in parts])
        check_parameters([part.fixed for part in parts], "frozen ")
    for rank, part in enumerate(parts):
        if part.kind != first.kind:
            raise ValueError(
                f"process 0 takes a step on {first.kind}, process {rank} on {part.kind}. Pass the same kind in every "
                "process: a MicroBatches(loss, [batch]) counts by its examples, a MicroBatches(loss, []) has none."
            )
        if part.state != first.state:
            raise ValueError(
                f"the optimizer of process {rank} has other options or another state than that of process 0. Build "
                "them alike, let schedulers do the same in every process, and load a saved state in all of them."
            )
