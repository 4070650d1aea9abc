"""The benchmark for GPUs, as far as a CPU can run it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import checks, stream, training
from benchmarks.gpu.__main__ import SECTIONS, collect, work
from benchmarks.gpu.table import text_of

CPU = torch.device("cpu")


def _program(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(("import os, time", *lines))]


@pytest.mark.parametrize(
    ("last", "ended"),
    [("", "finished"), ("os._exit(3)", "died with exit code 3"), ("time.sleep(60)", "ran out of time")],
)
def test_a_section_keeps_its_rows_however_it_ends(last, ended):
    found = collect(_program("""print('{"name": "one"}', flush=True)""", "print('noise', flush=True)", last), 1.0)
    assert found["rows"] == [{"name": "one"}]
    assert found["ended"] == ended


def test_a_row_that_fails_holds_its_error():
    def fails():
        raise RuntimeError("no kernel image is available")

    first, second = work(iter([("a", fails), ("b", lambda: {"x": 1.0})]))
    assert first["failure"].startswith("RuntimeError at test_gpu.py:")
    assert first["failure"].endswith(": no kernel image is available")
    assert second["name"] == "b"
    assert second["x"] == 1.0


def test_sections_fit_six_minutes():
    assert sum(limit for _, limit in SECTIONS.values()) <= 350


def test_a_wrong_product_is_seen(monkeypatch):
    row = checks.product_row("Tanh", CPU)
    assert not any(value > 1e-9 for key, value in row.items() if key != "differences")
    assert row["differences"] < 1e-8
    right = checks.infinitesimal
    monkeypatch.setattr(checks, "infinitesimal", lambda network, v: right(network, v) * 1.001)
    wrong = checks.product_row("Tanh", CPU)
    assert wrong["differences"] > 1e-4
    assert wrong["double backward"] > 1e-4
    assert wrong["block"] > 1e-4
    rows = [{"name": "good", **row}, {"name": "bad", **wrong}, {"name": "c", "failure": "E"}]
    shown = text_of(_record("checks", rows))
    assert "1 of 3 checks agree" in shown
    assert "| bad | differences 0.001" in shown
    assert "| c | E |" in shown


def _record(name: str, rows: list[dict[str, object]]) -> dict[str, object]:
    section = {"ended": "finished", "seconds": 1.0, "limit": 9.0, "rows": json.loads(json.dumps(rows))}
    return {"sections": {name: section}}


def test_the_stream_is_profiled():
    name = "NewtonKrylov, autoencoder"
    row = stream.profiled(stream.SETTINGS[name], CPU, short=True)
    assert row["reads in one step"] > 0
    assert row["ms a step"] > 0
    assert f"**{name}**: ms a step" in text_of(_record("stream", [{"name": name, **row}]))


def test_training_is_timed_and_its_error_followed():
    values = iter([4.0, 2.0, 1.0])
    row = training.train(lambda: None, lambda: next(values), CPU, 1e-9)
    assert row["steps"] == 1
    assert row["error at the start"] == 4.0
    assert row["error"] == 2.0
    pictures = training.curves(20, CPU)
    assert pictures.shape == (20, 784)
    assert pictures.max() > 0.9
    assert 0 <= pictures.min() < 1e-3
    made = training.reconstruction("SOAP of imstep, lr 1e-2", pictures, 8, 1e-9)
    assert math.isfinite(made["error"])
    assert "| a | 1 |" in text_of(_record("autoencoder", [{"name": "a", **made}]))


def test_networks_move_to_a_device():
    network = checks.built("Tanh")
    moved = network.to("meta")
    assert moved.parameters[0].device.type == moved.inputs[0].device.type == "meta" != network.inputs[0].device.type
    assert moved.closure().shape == replace(network).closure().shape == ()
