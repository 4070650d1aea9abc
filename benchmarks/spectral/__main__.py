"""Eigenpairs, densities and traces of Hessians beside those of other packages.

    python -m venv .venv/peers && .venv/peers/bin/pip install -c constraints.txt '.[peers]' scipy
    .venv/peers/bin/python -m benchmarks.spectral               # everything; writes record.json and page.md here
    .venv/peers/bin/python -m benchmarks.spectral --models GPT  # one of GPT, MLP, ResNet-18
    .venv/peers/bin/python -m benchmarks.spectral --questions trace  # of pairs, density, trace
    .venv/peers/bin/python -m benchmarks.spectral --short       # one small model, low accuracy; prints, writes nothing
    .venv/peers/bin/python -m benchmarks.spectral --page        # the page again, from the record

Peers that are not installed are noted as such. Run it on a machine that does nothing else. Each side's answers on a
model are written as they are found; what the record has is not measured again, so that it can be interrupted. To begin
anew delete the record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

import torch  # noqa: E402
from torch import nn  # noqa: E402

import imstep  # noqa: E402
from benchmarks.products.__main__ import environment  # noqa: E402
from benchmarks.products.measure import failure  # noqa: E402
from benchmarks.products.models import SUBJECTS, Subject, build  # noqa: E402
from benchmarks.products.sides import remedy  # noqa: E402
from benchmarks.spectral.page import page  # noqa: E402
from benchmarks.spectral.sides import SIDES, Pairs, Side  # noqa: E402
from imstep import spectral  # noqa: E402

SEED = 0
QUESTIONS = ("pairs", "density", "trace")
BESIDE = 100
"""Products with random vectors that are made to see whether their trace is the same."""
LIMIT, LEAST_LIMIT = 3.0, 20.0
"""Times imstep's seconds after which a peer is stopped, and the least: for eigenpairs all budgets together, for a trace
each run."""


@dataclass(frozen=True)
class Asked:
    """What is asked about one model.

    Attributes:
        rtol: of the trace, with probability 95 %.
        probes: with which imstep's density is timed.
        examples: so many of the batch; None for all.
    """

    rtol: float = 0.01
    probes: int = 10
    examples: int | None = None


class GivenUpError(Exception):
    """A side took too long."""


@dataclass(frozen=True)
class Size:
    """What is asked.

    Attributes:
        models: by the names of `product_models`, what is asked about each.
        k, tol: eigenpairs, and their residuals relative to the largest eigenvalue.
        steps, probes: of the density.
        peer_probes: with which a peer's density is timed; seconds are multiplied to ``probes``.
        repeats: seeds on which a trace is judged.
    """

    models: Mapping[str, Asked] = field(
        default_factory=lambda: {"GPT": Asked(), "MLP": Asked(), "ResNet-18": Asked(examples=4)}
    )
    k: int = 10
    tol: float = 1e-6
    steps: int = 100
    probes: int = 10
    peer_probes: int = 1
    repeats: int = 3


SHORT = Size({"small": Asked(0.1, probes=2)}, k=3, tol=1e-5, steps=10, probes=2, repeats=2)


def small(device: torch.device) -> Subject:
    """A model that shows whether the program works."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(device)
    x, y = torch.randn(64, 20, device=device), torch.randn(64, 5, device=device)
    return Subject("small", "20-30-5 tanh, batch 64", model, x, y, nn.MSELoss())


def timed(work: Callable[[], Any], limit: float = math.inf) -> tuple[float, Any]:
    """Seconds and result.

    Raises:
        GivenUpError: it took longer than ``limit`` seconds.
    """

    def stop(*_: object) -> None:
        raise GivenUpError

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if math.isinf(limit) else limit)
    try:
        start = time.perf_counter()
        found = work()
        return time.perf_counter() - start, found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)


def worst_residual(hessian: imstep.Hessian, pairs: Pairs) -> float:
    """The largest residual relative to the largest eigenvalue, by products of imstep, in float64."""
    vectors = pairs.vectors.to(hessian.dtype)
    images = (hessian @ vectors.mT).mT.double()
    vectors = vectors.double()
    values = (vectors * images).sum(1) / vectors.square().sum(1)
    residuals = (images - values[:, None] * vectors).norm(dim=1) / vectors.norm(dim=1)
    return float(residuals.max() / values.abs().max())


def ask_pairs(side: Side, hessian: imstep.Hessian, size: Size, limit: float) -> dict[str, Any]:
    """The time of the first budget whose residuals meet the tolerance; earlier ones do not count."""
    entry: dict[str, Any] = {}
    for budget in side.pair_budgets:
        seconds, found = timed(lambda b=budget: side.pairs(size.k, size.tol, b, SEED), limit)
        limit -= seconds
        residual = worst_residual(hessian, found)
        # Rounding of the products that check is no fault of a side.
        entry = {"seconds": seconds, "residual": residual, "reached": residual <= 1.5 * size.tol, "budget": budget}
        if entry["reached"]:
            break
        if limit <= 0:
            raise GivenUpError
    return entry


def ask_density(side: Side, size: Size, probes: int, limit: float) -> dict[str, Any]:
    """The time of all probes, from that of the first so many."""
    seconds = timed(lambda: side.density(size.steps, probes, SEED), limit * probes / size.probes)[0]
    return {"seconds": seconds * size.probes / probes, "reached": True}


def ask_trace(side: Side, reference: float, rtol: float, repeats: int, limit: float) -> dict[str, Any]:
    """The mean time of the first budget whose root mean square error is half of the tolerance: 95 % lie within it."""
    entry: dict[str, Any] = {}
    for budget in side.trace_budgets:
        runs = [timed(lambda b=budget, s=seed: side.trace(rtol, b, s), limit) for seed in range(repeats)]
        seconds = sum(seconds for seconds, _ in runs) / len(runs)
        error = (sum((value / reference - 1) ** 2 for _, value in runs) / len(runs)) ** 0.5
        entry = {"seconds": seconds, "error": error, "reached": error <= rtol / 2, "budget": budget}
        if entry["reached"]:
            break
    return entry


def ask(
    kind: type[Side],
    subject: Subject,
    hessian: imstep.Hessian,
    trace: float,
    size: Size,
    own: dict[str, Any],
    entry: dict[str, Any],
    only: Sequence[str],
) -> dict[str, Any]:
    """Questions to one side, but those that ``entry`` answers; ``own`` are imstep's answers, empty for its own turn."""
    try:
        metadata.version(kind.package)
    except metadata.PackageNotFoundError:
        return {"failure": "not installed"}
    entry.pop("failure", None)
    side, asked = kind(subject), size.models[subject.name]
    probes = size.peer_probes if own else asked.probes
    questions: dict[str, Callable[[float], dict[str, Any]]] = {
        "pairs": lambda limit: ask_pairs(side, hessian, size, limit),
        "density": lambda limit: ask_density(side, size, probes, limit),
        "trace": lambda limit: ask_trace(side, trace, asked.rtol, size.repeats, limit),
    }
    for name in only:
        if name in entry:
            continue
        question = questions[name]
        limit = max(LIMIT * own[name]["seconds"], LEAST_LIMIT) if own else math.inf
        try:
            entry[name] = question(limit)
        except GivenUpError:
            entry[name] = {"failure": f"given up after {limit:.0f}"}
        except Exception as error:
            entry[name] = {"failure": failure(error)}
        print(f"{subject.name}, {kind.name}, {name}: {entry[name]}", flush=True)
    return entry


def references(hessian: imstep.Hessian, rtol: float) -> dict[str, Any]:
    """The trace to compare with, and what products with whole random vectors, as the peers make them, say of it."""
    found = spectral.trace(hessian, rtol / 4, seed=SEED + 100)
    # A multiple is known by its products alone.
    beside = spectral.trace(1.0 * hessian, rtol, seed=SEED + 200, max_products=BESIDE)
    return {"trace": asdict(found), "beside": asdict(beside)}


def measure(name: str, size: Size, entry: dict[str, Any], keep: Callable[[], None], only: Sequence[str]) -> None:
    """All sides on one model, one after the other, into the model's part of the record."""
    subject, count = build(name, torch.device("cpu"), SEED), size.models[name].examples
    if count is not None:
        described = f"{subject.description}; the first {count} examples"
        batch = {"inputs": subject.inputs[:count], "targets": subject.targets[:count]}
        subject = replace(subject, description=described, **batch)
    remedy(subject)
    hessian = imstep.Hessian(subject.closure, subject.model)
    if not entry:
        entry.update(description=subject.description, parameters=hessian.size, load_average=0.0, sides={})
    if "beside" not in entry:
        entry.update(references(hessian, size.models[name].rtol))
        print(f"{subject.name}, the trace to compare with: {entry['trace']}; {entry['beside']}", flush=True)
    for kind in SIDES:
        sides, own = entry["sides"], entry["sides"].get(SIDES[0].name, {}) if kind is not SIDES[0] else {}
        answers = sides.get(kind.name, {})
        if set(only) <= answers.keys():
            continue
        sides[kind.name] = ask(kind, subject, hessian, entry["trace"]["value"], size, own, answers, only)
        entry["load_average"] = max(entry["load_average"], os.getloadavg()[0])
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=Size().models)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    options = parser.parse_args()
    path, size = HERE / "record.json", SHORT if options.short else Size()
    if not options.page:
        torch.set_num_threads(options.threads)
        SUBJECTS["small"] = small
        record: dict[str, Any] = {**environment(options.threads), "size": asdict(size), "models": {}}
        if path.exists() and not options.short:
            earlier = json.loads(path.read_text())
            now = json.loads(json.dumps(record))
            if any(earlier[key] != now[key] for key in ("versions", "cpu", "threads", "size")):
                parser.error(f"{path} has other versions, machine or questions: delete it to begin anew.")
            record |= {"models": earlier["models"], "notes": earlier.get("notes", [])}
        # What is measured stays, should a later side fail.
        keep = lambda: None if options.short else path.write_text(json.dumps(record, indent=1) + "\n")
        for name in options.models or size.models:
            measure(name, size, record["models"].setdefault(name, {}), keep, options.questions)
        if options.short:
            print(page(record))
            return
    (HERE / "page.md").write_text(page(json.loads(path.read_text())))
    print((HERE / "page.md").read_text())


if __name__ == "__main__":
    main()
