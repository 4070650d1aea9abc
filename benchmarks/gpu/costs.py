"""What a product costs: milliseconds and peak memory of imstep's and of others', at one point and in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import imstep
from benchmarks.products.measure import Here, failure
from benchmarks.products.models import Subject
from benchmarks.products.sides import BLOCK, GRADIENT, OWN, PEERS, Product, Side, missing
from benchmarks.record_page import Row

MODELS = ("MLP", "ResNet-18", "GPT")
CAPTURED = "imstep, captured product"
DOUBLE_BACKWARD = next(side for side in PEERS if side.name == "double backward")
_WANTED = (DOUBLE_BACKWARD.name, "double backward, graph kept", "curvlinops, Hessian", "curvlinops, Gauss-Newton")


def captured_product(subject: Subject) -> Product:
    """As a replayed one, given to the GPU as a whole."""
    hessian = imstep.Hessian(subject.closure, subject.model).static()
    return lambda v: hessian @ v


SIDES = (
    GRADIENT,
    *OWN,
    Side(CAPTURED, "torch", captured_product, fresh=False),
    *(side for side in PEERS if side.name in _WANTED),
)
WARM = 3


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products and convolutions in float32 may round their factors to ten bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def model_row(name: str, tf32: bool, device: str, rounds: int) -> Row:
    """All sides on one model: median milliseconds, MiB above model and data, and distance from a float64 product."""
    allow_tf32(tf32)
    row: Row = {}
    running: dict[str, Here] = {}
    results: dict[str, Tensor] = {}
    for side in SIDES:
        absent = missing(side)
        if absent:
            row[f"{side.name}, failure"] = absent
            continue
        try:
            prepared = Here(side, name, device, 0)
            results[side.name] = prepared.result()
            for _ in range(WARM if rounds > 1 else 0):
                prepared.seconds()
            running[side.name] = prepared
        except Exception as error:
            row[f"{side.name}, failure"] = failure(error)
    times = [{side: prepared.seconds() for side, prepared in running.items()} for _ in range(rounds)]
    for side, prepared in running.items():
        row[f"{side}, ms"] = 1e3 * statistics.median(turn[side] for turn in times) / (BLOCK if "block" in side else 1)
        row[f"{side}, MiB"] = prepared.peak() / 2**20
    exact = Here(DOUBLE_BACKWARD, name, device, 0, torch.float64).result()
    for side, made in results.items():
        if side != GRADIENT.name and "Gauss" not in side:
            row[f"{side}, error"] = float((made.double() - exact).norm() / exact.norm())
    return row


def rows(device: torch.device, short: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Each model in float32, with TF32 off and, on a GPU, on."""
    for name in ("PINN",) if short else MODELS:
        for tf32 in (False, True) if device.type == "cuda" else (False,):
            rounds = 1 if short else 9
            yield f"{name}, TF32 {'on' if tf32 else 'off'}", partial(model_row, name, tf32, device.type, rounds)
