"""Steps over several processes in which something fails: all leave together, and say why."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shared_cases import X, Y, all_are_told, flat, grouped, mlp, parts, said, squares, succeeded
from torch import Tensor

from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.linalg import NoiseTest
from imstep.optim import ConjugateGradient, MicroBatches, NewtonKrylov
from tests.launching import Outcomes, launch, outcomes


def leaves_together(rank: int, fail: Callable[[int], Tensor | None], own: type, other: type, **options: Any) -> str:
    """A fault in process 1 ends the step in both, with parameters as they were; the next step is taken.

    Args:
        fail: given the number of the evaluation, returns a loss in place of the right one, or raises; None for neither.
    """
    model, count = mlp(), iter(range(100))
    optimizer, before, random = grouped(model, **options), flat(model), torch.get_rng_state()
    loss = lambda: squares(model, (X[rank::2], Y[rank::2])) + 0 * torch.rand(())

    def faulty() -> Tensor:
        wrong = fail(next(count)) if rank == 1 else None
        return loss() if wrong is None else loss() * wrong

    with pytest.raises(own if rank == 1 else other) as caught:
        optimizer.step(faulty)
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    optimizer.step(loss)
    assert optimizer.last_step.accepted
    return str(caught.value)


def raising(at: int, error: BaseException) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == at:
            raise error

    return fail


def closure_raises(rank: int) -> list[str]:
    wrong = ZeroDivisionError("no such thing")
    at_start = leaves_together(rank, raising(0, wrong), ZeroDivisionError, OtherProcessError)
    at_trial = leaves_together(rank, raising(1, wrong), ZeroDivisionError, OtherProcessError)
    return [at_start, at_trial]


def interrupted(rank: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background

    def interrupt(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    leaves_together(rank, interrupt, KeyboardInterrupt, OtherProcessError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def outside_the_domain(rank: int) -> bytes:
    """A trial that fails in one process is one that failed, in both."""
    model, count = mlp(), iter(range(100))
    optimizer = grouped(model)

    def closure() -> Tensor:
        if rank == 1 and next(count) == 2:
            torch.linalg.cholesky(-torch.eye(2))
        return squares(model, (X[rank::2], Y[rank::2]))

    optimizer.step(closure)
    assert optimizer.last_step.trials > 1
    return flat(model).numpy().tobytes()


def not_finite(rank: int) -> None:
    model = mlp()
    optimizer, before = grouped(model), flat(model)
    optimizer.step(lambda: squares(model, (X, Y)) * (torch.nan if rank == 1 else 1))
    assert not optimizer.last_step.finite
    assert torch.equal(flat(model), before)
    optimizer.step(lambda: squares(model, (X, Y)))
    assert optimizer.last_step.accepted


def refused(rank: int) -> dict[str, str]:
    """Differences between processes, each of which all of them see; and what is not done over processes."""
    model = mlp()
    closure = lambda: squares(model, (X, Y))
    pieces = MicroBatches(lambda b: squares(model, b), parts((X, Y)))
    told = partial(said, model)

    found = {
        "options": told(lambda: grouped(model, lr=1.0 - rank / 2).step(closure)),
        "kinds": told(lambda: grouped(model).step(closure if rank else pieces)),
        "no data": told(lambda: grouped(model).step(MicroBatches(lambda b: squares(model, b), []))),
        "pieces": told(lambda: grouped(model, solver=ConjugateGradient(noise=NoiseTest())).step(pieces)),
        "examined": told(lambda: grouped(model).examine(closure, lambda loss, found: True)),
        "copy": told(lambda: torch.save(grouped(model), io.BytesIO()), TypeError),
    }
    handle = model[0].weight.register_hook(lambda g: 0 * g)
    found["hooks"] = told(lambda: grouped(model).step(closure))
    handle.remove()
    fixed = model[2].weight.requires_grad_(False)
    fixed += rank
    found["frozen"] = told(lambda: grouped(model).step(closure))
    fixed -= rank
    fixed.requires_grad_(rank == 0)
    found["frozen in one"] = told(lambda: grouped(model).step(closure))
    fixed.requires_grad_()
    alone = [dist.new_group([of]) for of in range(2)][1 - rank]
    found["outside"] = told(lambda: NewtonKrylov(model.parameters(), process_group=alone))
    with torch.no_grad():
        model[0].bias += rank
    found["parameters"] = told(lambda: grouped(model).step(closure))
    if rank == 0:
        found["a list"] = told(lambda: grouped(model).step(closure), OtherProcessError)
    else:
        told(lambda: grouped(model).step([closure, 1]), TypeError)
    return found


def different_vectors(rank: int) -> None:
    """Processes that are not at the same place see it."""
    model = mlp()
    processes = grouped(model)._processes
    assert processes is not None
    ones = torch.ones(3)
    assert processes.sum(lambda: ones, 3, ones, ones).tolist() == [2.0] * 3
    with pytest.raises(ProcessesLostError, match="not at the same place"):
        processes.sum(lambda: ones, 3, ones, ones.index_fill(0, torch.tensor(1), 1.0 + rank * 2**-23))
    with pytest.raises(ProcessesLostError, match="not at the same place"):
        processes.sum(lambda: ones, 3, ones, ones)


CHECKS = [
    closure_raises,
    interrupted,
    outside_the_domain,
    not_finite,
    refused,
    different_vectors,
]


two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    first, second = succeeded(two[check])
    assert first == second or check in ("closure_raises", "refused")


def test_what_processes_are_told(two: Outcomes) -> None:
    (elsewhere, own), (refusals, also) = two["closure_raises"], two["refused"]
    assert set(own) == {"no such thing"}
    assert all("process 1 of 2 failed" in text and "ZeroDivisionError: no such thing" in text for text in elsewhere)
    words = {
        "options": "other options or another state",
        "kinds": "process 0 takes a step on MicroBatches with MeanOverSamples, process 1 on a closure",
        "no data": "none in any process",
        "pieces": "comes in pieces",
        "examined": "one process alone",
        "copy": "Save optimizer.state_dict",
        "hooks": "a hook changes the gradient",
        "frozen": "the frozen parameters of process 1 differ from those of process 0",
        "frozen in one": "process 1 trains 3 tensors with 32 entries, process 0 4 with 44",
        "outside": "this process is not in the process_group",
        "parameters": "the parameters of process 1 differ from those of process 0",
    }
    all_are_told([refusals, also], words)
    assert "TypeError: a step on several pieces" in refusals["a list"]


# --- processes that end, or do something else -------------------------------------------------------------------


def killed(rank: int) -> list[str]:
    return lost(rank, lambda number: os._exit(1) if number == 1 else None)


def absent(rank: int) -> list[str]:
    return lost(rank, None)


def lost(rank: int, fail: Callable[[int], None] | None) -> list[str]:
    """What process 0 is told where process 1 ends in a step, or takes none."""
    model, count = mlp(), iter(range(100))
    optimizer, before, said = grouped(model), flat(model), []
    if fail is None and rank == 1:
        return []

    def closure() -> Tensor:
        if fail is not None and rank == 1:
            fail(next(count))
        return squares(model, (X, Y))

    for _ in range(2):
        with pytest.raises(ProcessesLostError) as caught:
            optimizer.step(closure)
        assert torch.equal(flat(model), before)
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("check", [killed, absent])
def test_a_process_that_is_lost(check: Callable[[int], list[str]]) -> None:
    first, second = launch(2, check, timeout=2.0)[check.__name__]
    assert len(first) == 2, first
    assert all("one has ended, or has not come to this point within the timeout" in text for text in first)
    assert second == ("ended" if check is killed else [])
