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
from imstep.curvature.processes import Processes, check_parameters, digest
from imstep.curvature.reduction import Reduction, shares
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
        parameters, state: digests of the parameters, and of options and memory of the optimizer.
    """

    kind: str
    count: float
    pieces: int
    parameters: int
    state: int


def shared_batch(
    processes: Processes,
    closure: Any,
    begin: Callable[[], tuple[ParameterVector, bool, Penalty | None]],
    state: Callable[[], int],
) -> SharedBatch:
    """The batch of a step, of which this process evaluates ``closure``; all processes call this together.

    Args:
        closure: of this process; a :class:`MicroBatches` or a list of closures likewise.
        begin: parameters, whether ``.grad`` holds gradients, and the penalty; may fail.
        state: a digest of the optimizer's options and memory.

    Raises:
        ValueError: the processes differ in parameters, options, state or the kind of their closures; or none has data.
        OtherProcessError: another process raised here.
    """
    own: list[Any] = []

    def part() -> _Part:
        parameters, stale, penalty = begin()
        pieces = MicroBatches.of(closure)
        own[:] = [parameters, stale, penalty, pieces]
        signs = digest(parameters.replicated), state()
        if pieces is not None and pieces.reduction is not None:
            kind = f"MicroBatches with {type(pieces.reduction).__name__}"
            return _Part(kind, pieces.count, len(pieces.pieces), *signs)
        if pieces is not None:
            pieces.checked()
        return _Part("a closure", 1.0, 1 if pieces is None else len(pieces.pieces), *signs)

    parts = processes.gather(part)
    _check(parts)
    parameters, stale, penalty, pieces = own
    reduction = None if pieces is None else pieces.reduction
    weights = _weights(reduction, [part.count for part in parts])
    processes.alike = all(part.pieces == 1 and part.count == parts[0].count for part in parts)
    frozen = _frozen(closure, pieces, parameters.evaluated, stale)
    return SharedBatch(frozen, weights[processes.rank], sum(weights), parameters, penalty)


def _frozen(
    closure: Any, pieces: MicroBatches | None, parameters: ParameterVector, stale: bool
) -> FrozenClosure | FrozenPieces | None:
    """What this process evaluates; one piece as a whole, which more can be done with."""
    if pieces is None:
        return FrozenClosure(closure, parameters, stale)
    if len(pieces.pieces) == 1 and math.isclose(pieces.pieces[0].weight, 1):
        return FrozenClosure(pieces.pieces[0].closure, parameters, stale)
    if not pieces.pieces:
        return None
    return FrozenPieces(pieces.pieces, parameters, stale, None, pieces.memory_budget)


def state_digest(options: str, memory: Memory) -> int:
    """Of an optimizer's representation and of the numbers in its memory."""
    numbers = {name: value for name, value in memory.to_dict().items() if not isinstance(value, Tensor)}
    return zlib.crc32(re.sub(r"0x[0-9a-f]+", "", f"{options}{numbers}").encode())


def _weights(reduction: Reduction | None, counts: list[float]) -> list[float]:
    """What the loss of each process is multiplied by; 0 where there is none."""
    if reduction is None:
        return [1 / len(counts)] * len(counts)
    if not any(counts):
        raise ValueError("a step needs at least one piece of a batch, got none in any process.")
    return shares(reduction, counts)


def _check(parts: list[_Part]) -> None:
    """Raise where processes differ from the first; all do so alike."""
    check_parameters([part.parameters for part in parts])
    first = parts[0]
    for rank, part in enumerate(parts):
        if part.state != first.state:
            raise ValueError(
                f"the optimizer of process {rank} has other options or another state than that of process 0. Build "
                "them alike, let schedulers do the same in every process, and load a saved state in all of them."
            )
        if part.kind != first.kind:
            raise ValueError(
                f"process 0 takes a step on {first.kind}, process {rank} on {part.kind}. Pass the same kind in every "
                "process: a MicroBatches(loss, [batch]) counts by its examples, a MicroBatches(loss, []) has none."
            )
