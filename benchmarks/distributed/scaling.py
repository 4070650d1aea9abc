"""Seconds of a step on one process and on two of a core each; and what a network adds that is made slow by sleeping.

python -m benchmarks.distributed.scaling --cores 0 1 --record  # on a machine that does nothing else; twelve minutes
python -m benchmarks.distributed.scaling --short        # that it runs

Both sides in turn, the median of runs. Strong: the same examples shared out. Weak: as many in each process. The model
of `benchmarks.distributed.model` is given what this machine reaches, and must foretell what the slow network adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.distributed.__main__ import Counted
from benchmarks.distributed.model import BYTES, SMALL, Machine, Steps, efficiency, network_of, seconds, sent
from benchmarks.record_page import DOCS, Row, now, put, table
from imstep import NewtonKrylov
from imstep.runs.environment import environment
from imstep.tasks import get_task
from imstep.tasks.examples import Batch

TASK = "digits-autoencoder"
SLOW = Machine(flops=0, double=0, latency=5e-2, bandwidth=2.5e6)
"""A network of 50 ms and 20 Mbit/s: it adds more than steps vary by."""


def timed(function: Callable[[], Any], times: int) -> float:
    """The median of its seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def worker(copies: int, weak: bool, slow: bool, steps: int, cores: Sequence[int]) -> None:
    """One of several processes that train on copies of all examples; the first prints seconds and counts."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if cores:
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    problem = get_task(TASK).build(seed=0)
    whole = Batch(problem.train.inputs.repeat(copies, 1), problem.train.targets.repeat(copies, 1))
    optimizer = NewtonKrylov(problem.parameters, process_group=dist.group.WORLD)
    own = problem.share(whole, 0, 1) if weak else problem.share(whole, rank, size)
    optimizer.step(own)  # imports, and memory that is got for the first time
    message = torch.zeros(1), torch.zeros(2**20)
    latency, block = (timed(lambda m=m: dist.all_reduce(m), 9) for m in message) if size > 1 else (0.0, 0.0)
    counted = Counted((lambda sent: SLOW.sum(size, sent)) if slow else None)
    before, found = optimizer.cost, []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step(own)
        found.append(time.perf_counter() - start)
    names = "products", "losses", "refreshes"
    spent = {name: getattr(optimizer.cost, name) - getattr(before, name) for name in names}
    about = {"examples": len(whole), "steps": steps, "latency": latency, "block": block}
    if rank == 0:
        seen = {name: counted.calls[name] for name in ("sums", "exchanges")}
        print(json.dumps({"seconds": statistics.mean(found), **about, **spent, **seen}))
    dist.destroy_process_group()


def run(processes: int, copies: int, steps: int, cores: Sequence[int], weak: bool = False, slow: bool = False) -> Row:
    """What the first of so many processes prints."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    given = json.dumps({"copies": copies, "weak": weak, "slow": slow, "steps": steps, "cores": list(cores)})
    words = [*start, "-m", "benchmarks.distributed.scaling", "--worker", given]
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{processes} processes failed: {ended.stderr}")
    found: Row = json.loads(ended.stdout.splitlines()[-1])
    return found


def here(pair: Row) -> Machine:
    """What this machine reaches: products of matrices, triangles in double precision, and sums of two processes."""
    a, b = torch.randn(256, 256), torch.randn(256, 256, dtype=torch.float64)
    definite = b @ b.T + 256 * torch.eye(256, dtype=torch.float64)
    multiply = timed(lambda: a @ a, 20)
    invert = timed(lambda: torch.cholesky_inverse(torch.linalg.cholesky(definite)), 20)
    size = 2**20 * BYTES
    return Machine(2 * 256**3 / multiply, 2 * 256**3 / invert, pair["latency"] / 2, size / max(pair["block"], 1e-9))


def steps_of(row: Row) -> Steps:
    """The mean step of a run."""
    return Steps(*(row[name] / row["steps"] for name in ("products", "losses", "refreshes")))


def scaling(copies: int, steps: int, cores: Sequence[int], repeats: int) -> tuple[str, Row]:
    """Efficiency of two processes, and what the model says."""
    sides = {"one": (1, False), "strong": (2, False), "weak": (2, True)}
    found: dict[str, list[Row]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (processes, weak) in sides.items():
            found[name].append(run(processes, copies, steps, cores, weak))
    spent = {name: statistics.median(row["seconds"] for row in rows) for name, rows in found.items()}
    pair, problem = found["strong"][0], get_task(TASK).build(seed=0)
    network, examples = network_of(TASK, problem.model, problem.train.inputs[:1]), pair["examples"]
    machine, mean = here(pair), steps_of(pair)
    told = seconds(network, examples, 1, machine, mean), seconds(network, examples, 2, machine, mean)
    weak = seconds(network, 2 * examples, 2, machine, mean)
    rows = [
        ["one process", f"{spent['one']:.3f}", f"{told[0]:.3f}", "", ""],
        ["two, strong", f"{spent['strong']:.3f}", f"{told[1]:.3f}", f"{50 * spent['one'] / spent['strong']:.0f} %",
         f"{100 * efficiency(network, examples, 2, machine, mean):.0f} %"],
        ["two, weak", f"{spent['weak']:.3f}", f"{weak:.3f}", f"{100 * spent['one'] / spent['weak']:.0f} %",
         f"{100 * told[0] / weak:.0f} %"],
    ]  # fmt: skip
    return table(["", "seconds a step", "by the model", "efficiency", "by the model"], rows), pair


def slowed(steps: int, cores: Sequence[int]) -> str:
    """What a slow network adds to a step of 2 and 4 processes, measured and by the model."""
    problem, rows = get_task(TASK).build(seed=0), []
    network = network_of(TASK, problem.model, problem.train.inputs[:1])
    for processes in (2, 4):
        quick, slow = (run(processes, 1, steps, cores, slow=delayed) for delayed in (False, True))
        sums, numbers, exchanges = sent(network, steps_of(slow))
        added = SLOW.sum(processes, numbers * BYTES, sums) + SLOW.sum(processes, 2 * exchanges * SMALL, 2 * exchanges)
        measured = slow["seconds"] - quick["seconds"]
        counted = f"{slow['sums'] / steps:.1f}, {slow['exchanges'] / steps:.1f}"
        rows.append([str(processes), counted, f"{sums:.1f}, {2 * exchanges:.1f}", f"{measured:.3f}", f"{added:.3f}"])
    head = ["processes", "sums and exchanges counted", "by the model", "seconds added", "by the model"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps on few examples, to see that it runs")
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="a core for each process, such as 0 1")
    parser.add_argument("--record", action="store_true", help="put what was found into docs/tutorial-processes.md")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(**given.worker)
        return
    copies, steps, repeats = (1, 4, 1) if given.short else (16, 20, 3)
    efficiency_of, pair = scaling(copies, steps, given.cores, repeats)
    text = (
        f"Of `{TASK}`, with {pair['examples']:,} examples, in processes of a core each:\n\n{efficiency_of}\n\n"
        f"A network of 50 ms and 20 Mbit/s:\n\n{slowed(steps, given.cores)}"
    )
    print(text)
    if given.record and not given.short:
        versions = ", ".join(f"{key} {value}" for key, value in environment().items())
        put("scaling", DOCS / "tutorial-processes.md", f"{text}\n\nMeasured {now()}; {versions}.")


if __name__ == "__main__":
    main()
