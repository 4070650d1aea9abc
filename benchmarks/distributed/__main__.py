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
from imstep import MicroBatches, NewtonKrylov
from imstep.curvature import MeanOverSamples
from imstep.tasks import get_task
from imstep.tasks.examples import Batch

NAME = "distributed"
TASKS = ("digits-autoencoder", "digits-cnn")
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


def run(task: str, processes: int) -> Row:
    """What the first of so many processes counts."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    ended = subprocess.run([*start, "-m", "benchmarks.distributed", "--worker", task], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{processes} processes on {task} failed: {ended.stderr}")
    found: Row = json.loads(ended.stdout.splitlines()[-1])
    return found


def text_of(record: dict[str, Any]) -> str:
    """The table of the page."""
    numbers = {"products": ".1f", "trials": ".1f", "sums": ".1f", "MB in sums": ".2f", "kB in exchanges": ".1f"}
    rows = [
        [r["task"], f"{r['parameters']:,}", str(r["processes"])]
        + [format(float(r[name]), digits) for name, digits in numbers.items()]
        + [f"{float(r['loss']):.4g}"]
        for r in record["runs"].values()
    ]
    return table(["task", "n", "processes", *numbers, f"loss after {record['steps']} steps"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    parser.add_argument("--worker", metavar="TASK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    runs = {f"{task}; {size}": partial(run, task, size) for task, size in itertools.product(TASKS, PROCESSES)}
    show(NAME, "tutorial-processes", text_of(load(NAME) if arguments.table else complete(NAME, {"steps": STEPS}, runs)))


if __name__ == "__main__":
    main()
