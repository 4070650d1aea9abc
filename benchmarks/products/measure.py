"""Time, peak memory and agreement of the sides, in interleaved rounds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.products.models import build
from benchmarks.products.sides import BLOCK, GRADIENT, OWN, PEERS, Side, missing, remedy
from imstep.claims.measuring import peak_of

_TIME_LIMIT = 300.0  # seconds that a process of its own may take for an answer


def failure(error: BaseException) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"fails: {type(error).__name__}: {lines[0][:160]}"


# --- a side in this process, or in one of its own -------------------------------------------------------------------


class Here:
    """A prepared side in this process."""

    def __init__(
        self, side: Side, subject_name: str, device: str, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self._subject = build(subject_name, torch.device(device), seed).to(dtype)
        remedy(self._subject)
        self._synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
        generator = torch.Generator(device=device).manual_seed(seed + 1)
        size = sum(p.numel() for p in self._subject.parameters)
        self._vector = torch.randn(size, generator=generator, device=device).to(dtype)
        self._side = side
        self._product = side.prepare(self._subject)

    def result(self) -> Tensor:
        """The product as one vector (n,) on the CPU."""
        found = self._product(self._vector)
        parts = [found] if isinstance(found, Tensor) else found
        return torch.cat([p.detach().reshape(-1) for p in parts]).cpu()

    def seconds(self) -> float:
        """The time of one product."""
        self._synchronise()
        start = time.perf_counter()
        found = self._product(self._vector)
        self._synchronise()
        seconds = time.perf_counter() - start
        del found
        return seconds

    def peak(self) -> int:
        """Bytes allocated above model and data, at the worst moment of preparation and one product."""
        self._product = None  # type: ignore[assignment]
        gc.collect()

        def work() -> None:
            self._product = self._side.prepare(self._subject)
            self._product(self._vector)

        return peak_of(work, self._vector.device)

    def close(self) -> None:
        """Nothing to end."""


def _serve(pipe: Any, side: Side, subject_name: str, device: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        here = Here(side, subject_name, device, seed)
        pipe.send(None)
    except Exception as error:
        pipe.send(failure(error))
        return
    while (request := pipe.recv()) != "close":
        try:
            pipe.send(getattr(here, request)())
        except Exception as error:
            pipe.send(failure(error))


class Apart:
    """A prepared side in a process of its own; raises RuntimeError where it fails or dies."""

    def __init__(self, side: Side, subject_name: str, device: str, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, side, subject_name, device, seed, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv() if self._pipe.poll(_TIME_LIMIT) else "fails: no answer in time"
        except EOFError:
            self._process.join(5)
            answer = f"fails: the interpreter died (exit code {self._process.exitcode})"
        if isinstance(answer, str):
            raise RuntimeError(answer.removeprefix("fails: "))
        return answer

    def _ask(self, request: str) -> Any:
        self._pipe.send(request)
        return self._receive()

    def result(self) -> Tensor:
        return self._ask("result")

    def seconds(self) -> float:
        return self._ask("seconds")

    def peak(self) -> int:
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send("close")
            self._process.join(10)


# --- one subject ----------------------------------------------------------------------------------------------------


def measure(subject_name: str, device: str, seed: int, rounds: int) -> dict[str, Any]:
    """All sides on one subject: seconds (median), peak bytes, relative error against double backward."""
    entries: dict[str, dict[str, Any]] = {}
    running: dict[str, Here | Apart] = {}
    results: dict[str, Tensor] = {}
    for side in (GRADIENT, *OWN, *PEERS):
        entries[side.name] = {"matrix": side.matrix, "kept": not side.fresh}
        absent = missing(side)
        if absent:
            entries[side.name]["failure"] = absent
            continue
        try:
            prepared = (Apart if side.apart else Here)(side, subject_name, device, seed)
            results[side.name] = prepared.result()
            running[side.name] = prepared
        except Exception as error:
            entries[side.name]["failure"] = failure(error)
    _agree(entries, results)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, prepared in running.items():
            times[name].append(prepared.seconds())
    for name in running:
        per = BLOCK if "block" in name else 1
        entries[name] |= {
            "seconds": statistics.median(times[name]) / per,
            "fastest_seconds": min(times[name]) / per,
        }
    for name, prepared in running.items():
        entries[name]["peak_bytes"] = prepared.peak()
        prepared.close()
    subject = build(subject_name, torch.device("cpu"), seed)
    size = sum(p.numel() for p in subject.parameters)
    about = {"description": subject.description, "parameters": size, "rounds": rounds}
    return {**about, "load_average": os.getloadavg()[0], "sides": entries}


def _agree(entries: dict[str, dict[str, Any]], results: dict[str, Tensor]) -> None:
    """Relative errors: of Hessian products against double backward, of Gauss-Newton products against curvlinops."""
    references = {"Hessian": "double backward", "Gauss-Newton": "curvlinops, Gauss-Newton"}
    for name, found in results.items():
        expected = results.get(references.get(entries[name]["matrix"], ""))
        if expected is not None:
            entries[name]["relative_error"] = float((found - expected).norm() / expected.norm())
