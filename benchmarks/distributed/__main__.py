"""What processes send each other in a step, counted, and whether their steps are those of one process.

python -m benchmarks.distributed           # what the record lacks; writes record.json and docs/tutorial-processes.md
python -m benchmarks.distributed --table   # the page again, from the record
python -m benchmarks.distributed.scaling   # seconds on one process and on two, and what a slow network adds
python -m benchmarks.distributed.model     # what that comes to on many GPUs
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.record_page import Row, complete, load, show, table
from imstep import LeastSquares, MicroBatches, NewtonKrylov
from imstep.curvature import MeanOverSamples, processes
from imstep.tasks import get_task
from imstep.tasks.examples import Batch

NAME = "distributed"
TASKS = ("digits-autoencoder", "digits-cnn")
SQUARES = {"heat-1d": 1020, "convection": 400}
"""Points a step: more residuals than parameters, and fewer."""

PROCESSES = (1, 2, 4)
STEPS = 6


class Counted:
    """Collectives of this process and the bytes that it hands in; in the place of those of ``torch.distributed``.

    Args:
        delay: seconds to sleep before each, given the bytes handed in; None for none.
    """

    def __init__(self, delay: Callable[[int], float] | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._delay = delay
        dist.all_reduce = self._counting("sums", dist.all_reduce, 0)
        # By another name of torch.distributed in each of its versions.
        processes._all_gather = self._counting("gathers", processes._all_gather, 1)
        module = dist.distributed_c10d  # where objects are exchanged by this
        module.all_gather = self._counting("exchanges", module.all_gather, 1)

    def _counting(self, kind: str, collective: Any, own: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            size = args[own].numel() * args[own].element_size()
            self.calls[kind] += 1
            self.sent[kind] += size
            if self._delay is not None:
                time.sleep(self._delay(size))
            return collective(*args, **kwargs)

        return counted


def worker(task: str) -> None:
    """One of several processes that train on all examples; the first prints what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    counted, problem = Counted(), get_task(task).build(seed=0)
    own = Batch(*(t.tensor_split(size)[rank] for t in (problem.train.inputs, problem.train.targets)))
    mean = MeanOverSamples(lambda batch: len(batch.inputs))
    optimizer = NewtonKrylov(problem.parameters, process_group=dist.group.WORLD)
    products = trials = 0
    for _ in range(STEPS):
        optimizer.step(MicroBatches(lambda batch: problem.closure(batch)(), [own], reduction=mean))
        products, trials = products + optimizer.last_step.products, trials + optimizer.last_step.trials
    found = {
        "task": task,
        "processes": size,
        "parameters": sum(p.numel() for p in problem.parameters),
        "products": products / STEPS,
        "trials": trials / STEPS,
        "refreshes": optimizer.cost.refreshes / STEPS,
        "sums": counted.calls["sums"] / STEPS,
        "exchanges": counted.calls["exchanges"] / STEPS,
        "MB in sums": counted.sent["sums"] / STEPS / 1e6,
        "kB in exchanges": counted.sent["exchanges"] / STEPS / 1e3,
        "loss": optimizer.last_step.new_loss,
    }
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def squares(task: str, points: int) -> None:
    """As :func:`worker`, for least squares with about so many points, which all processes draw anew for each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    counted, problem = Counted(), get_task(task).build(seed=0, dtype=torch.float64, examples=points)
    optimizer, trials = LeastSquares(problem.parameters, process_group=dist.group.WORLD), 0
    for step in range(STEPS):
        optimizer.step(problem.share(next(problem.batches(step)), rank, size))
        trials += optimizer.last_step.trials
    gathered, summed = counted.sent["gathers"], counted.sent["sums"]
    found = {
        "task": task,
        "processes": size,
        "parameters": problem.size,
        "points": len(problem.train),
        "factorisation": optimizer.last_step.factorisation,
        "trials": trials / STEPS,
        "sums": (counted.calls["sums"] + counted.calls["gathers"]) / STEPS,
        "exchanges": counted.calls["exchanges"] / STEPS,
        "MB in sums": (summed + gathered) / STEPS / 1e6,
        "kB in exchanges": counted.sent["exchanges"] / STEPS / 1e3,
        "loss": optimizer.last_step.new_loss,
    }
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def run(task: str, processes: int, points: int = 0) -> Row:
    """What the first of so many processes counts; by least squares where there are points."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words = ["-m", "benchmarks.distributed", "--worker", task, "--points", str(points)]
    ended = subprocess.run([*start, *words], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{processes} processes on {task} failed: {ended.stderr}")
    found: Row = json.loads(ended.stdout.splitlines()[-1])
    return found


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    sent = {"trials": ".1f", "sums": ".1f", "MB in sums": ".2f", "kB in exchanges": ".1f"}
    last = f"loss after {record['steps']} steps"

    def rows(runs: list[Row], names: tuple[str, ...], numbers: dict[str, str]) -> list[list[str]]:
        return [
            [r["task"], f"{r['parameters']:,}", *(f"{r[name]:,}" for name in names), str(r["processes"])]
            + [format(r[name], digits) for name, digits in numbers.items()]
            + [f"{float(r['loss']):.4g}"]
            for r in runs
        ]

    runs = record["runs"].values()
    newton = rows([r for r in runs if "points" not in r], (), {"products": ".1f", **sent})
    fits = rows([r for r in runs if "points" in r], ("points",), {"factorisation": "", **sent})
    return "\n\n".join(
        [
            table(["task", "n", "processes", "products", *sent, last], newton),
            "By `LeastSquares`, in float64, at points that are drawn anew for each step; gathers are counted as sums:",
            table(["task", "n", "points", "processes", "factorisation", *sent, last], fits),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    parser.add_argument("--worker", metavar="TASK", help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker and arguments.points:
        squares(arguments.worker, arguments.points)
        return
    if arguments.worker:
        worker(arguments.worker)
        return
    runs = {f"{task}; {size}": partial(run, task, size) for task, size in itertools.product(TASKS, PROCESSES)}
    for (task, points), size in itertools.product(SQUARES.items(), PROCESSES):
        runs[f"{task}, {points} points; {size}"] = partial(run, task, size, points)
    show(NAME, "tutorial-processes", text_of(load(NAME) if arguments.table else complete(NAME, {"steps": STEPS}, runs)))


if __name__ == "__main__":
    main()
