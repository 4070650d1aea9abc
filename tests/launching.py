"""Several processes on this machine, each of which runs the same functions."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from imstep import NewtonKrylov

Outcomes = dict[str, list[Any]]
"""By the name of a function what it returned in each process; text of an error where it raised one."""

_FORK = multiprocessing.get_context("fork")  # torch is there already


def launch(size: int, *functions: Callable[[int], Any], timeout: float = 20.0) -> Outcomes:
    """Run the functions in each of ``size`` processes of a gloo group, one after the other; given the rank."""
    _first_step()
    pipes, met = [_FORK.Pipe(duplex=False) for _ in range(size)], _FORK.Barrier(size)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        workers = [
            _FORK.Process(target=_work, args=(rank, size, meeting, met, functions, timeout, sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        with ThreadPoolExecutor(size) as pool:  # at once: a pipe that nobody reads holds its process up
            found = list(pool.map(_received, (receiver for receiver, _ in pipes)))
        for worker in workers:
            worker.join(timeout)
            worker.kill()
    return {f.__name__: [of_rank.get(f.__name__, "ended") for of_rank in found] for f in functions}


def outcomes(size: int, checks: Sequence[Callable[[int], Any]]) -> Any:
    """A fixture for all tests of a module: what the functions return in each process, launched once."""
    return pytest.fixture(lambda: launch(size, *checks), scope="module", name="two")


@functools.cache
def _first_step() -> None:
    """What a first step imports, once, before there are several processes."""
    model = torch.nn.Linear(1, 1)
    NewtonKrylov(model.parameters()).step(lambda: model(torch.ones(1, 1)).square().mean())


def _received(receiver: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        while True:
            name, value = receiver.recv()
            found[name] = value
    except EOFError:
        return found


def _work(rank: int, size: int, meeting: str, met: Any, functions: Any, timeout: float, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, timedelta(seconds=timeout), size, rank)
    met.wait(timeout)  # one that ended at once would be lost to those that still connect to it
    for function in functions:
        torch.manual_seed(0)
        try:
            value = function(rank)
        except BaseException:
            value = traceback.format_exc(limit=-4)
        sender.send((function.__name__, value))
    sender.close()
    dist.destroy_process_group()
