"""The page of the documentation, from a record: ratios to the gradient, and which figures are reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.products.sides import BLOCK, GRADIENT, OWN, PEERS

FIRST, REPLAYED, IN_BLOCK, GAUSS_NEWTON, UNRECORDED = (side.name for side in OWN)
_HESSIAN_PEERS = [side.name for side in PEERS if side.matrix == "Hessian"]

Sides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A figure to reach: the value computed from a model's sides, and the bound for each model."""

    name: str
    value: Callable[[Sides], float]
    bounds: dict[str, float]


def _bounds(*values: float) -> dict[str, float]:
    found = dict(zip(("MLP", "ResNet-18", "LSTM", "GPT", "PINN"), values, strict=True))
    return {**found, "GRU": found["LSTM"]}


def best_peer(sides: Sides) -> str:
    """The peer with the fastest Hessian product, its graph kept if it can."""
    return min((n for n in _HESSIAN_PEERS if "seconds" in sides[n]), key=lambda n: sides[n]["seconds"])


def _ratio(key: str, above: str, below: str) -> Callable[[Sides], float]:
    return lambda sides: sides[above][key] / sides[below][key]


TARGETS = (
    Target(
        "replayed Hessian product / the best peer's",
        lambda sides: sides[REPLAYED]["seconds"] / sides[best_peer(sides)]["seconds"],
        _bounds(1.0, 1.0, 0.7, 0.8, 0.8),
    ),
    Target("first product, gradients", _ratio("seconds", FIRST, GRADIENT.name), _bounds(2.6, 3.2, 5, 4, 4)),
    Target(
        "replayed Gauss-Newton product, gradients",
        _ratio("seconds", GAUSS_NEWTON, GRADIENT.name),
        _bounds(1.3, 1.6, 2.5, 1.8, 1.8),
    ),
    Target(
        f"block of {BLOCK}, per product / single",
        _ratio("seconds", IN_BLOCK, REPLAYED),
        _bounds(0.9, 1.0, 0.4, 0.8, 0.5),
    ),
    Target(
        "peak memory of a product / the gradient's",
        _ratio("peak_bytes", FIRST, GRADIENT.name),
        _bounds(2.2, 2.2, 2.5, 2.2, 2.2),
    ),
    Target(
        "peak memory of a product without a record / the gradient's",
        _ratio("peak_bytes", UNRECORDED, GRADIENT.name),
        _bounds(2.2, 2.2, 2.5, 2.2, 2.2),
    ),
)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows), ""]


def _targets(models: dict[str, Any]) -> list[str]:
    rows = []
    for target in TARGETS:
        cells = [target.name]
        for name, model in models.items():
            value, bound = target.value(model["sides"]), target.bounds[name]
            cells.append(f"{value:.2f} ({'met' if value <= bound else '**missed**'}, <= {bound:g})")
        rows.append(cells)
    return _table(["figure", *models], rows)


def _cells(models: dict[str, Any], side: str, show: Callable[[dict[str, Any], Sides], str]) -> list[str]:
    cells = []
    for model in models.values():
        entry = model["sides"][side]
        cells.append(show(entry, model["sides"]) if "seconds" in entry else entry["failure"].split(":")[0])
    return cells


def _section(device: str, models: dict[str, Any]) -> list[str]:
    names = [side.name for side in (GRADIENT, *OWN, *PEERS)]
    time = lambda e, sides: f"{e['seconds'] / sides[GRADIENT.name]['seconds']:.2f}"
    memory = lambda e, sides: f"{e['peak_bytes'] / sides[GRADIENT.name]['peak_bytes']:.2f}"
    error = lambda e, sides: f"{e['relative_error']:.0e}" if "relative_error" in e else ""
    unit = lambda key, scale: [f"{m['sides'][GRADIENT.name][key] * scale:.1f}" for m in models.values()]
    fastest = [best_peer(m["sides"]) for m in models.values()]
    return [
        f"## {device.upper()}",
        "",
        "### Figures to reach",
        "",
        *_targets(models),
        "### Time of a product, in gradients",
        "",
        *_table(
            ["side", *models],
            [["gradient, ms", *unit("seconds", 1e3)]]
            + [[n, *_cells(models, n, time)] for n in names[1:]]
            + [["best peer", *fastest]],
        ),
        "### Peak memory of preparation and one product, above model and data, in gradients",
        "",
        *_table(
            ["side", *models],
            [["gradient, MiB", *unit("peak_bytes", 2**-20)]] + [[n, *_cells(models, n, memory)] for n in names[1:]],
        ),
        "### Relative difference of the products",
        "",
        "Hessian products from those of double backward, Gauss-Newton products from those of curvlinops; float32.",
        "",
        *_table(["side", *models], [[n, *_cells(models, n, error)] for n in names[1:]]),
        *_failures(models),
    ]


NOTES = (
    "## What bounds the figures",
    "",
    "**Memory of a record.** The gradient keeps one tensor for each layer and frees it on the way back. A replay "
    "needs more of them, all at once: for y = tanh(W x) the values x, the gradient that reaches y and the one that "
    "reaches W x, and while it runs the imaginary part of x. The operator holds the gradient, and the product comes "
    "beside it. In MiB, for the MLP: 3 x 8.4 recorded, 8.4 imaginary, 10.8 for the gradient and for the product "
    "each, together 55, or 3.6 gradients of 15.3. ResNet-18: 143 recorded (inputs of convolutions and of "
    "normalisations, and the gradients that reach them), 75 imaginary, 2 x 42.6: 303, or 2.8 gradients. GPT: 81 "
    "recorded, about 40 imaginary, 2 x 3.3, or 3.5 gradients; the gradient's fused attention keeps no probabilities, "
    "which a second derivative needs. PINN: the record alone, 34 beside a gradient's 11.7, is above the bound. No "
    "replay of these four fits 2.2 gradients, and double backward with its graph kept does not either.",
    "",
    "Where memory is short, `memory_budget=0` makes each product by an evaluation of its own, beside the gradient. "
    "Directions are read where they lie, and real gradients dropped as they come. It remains above the bound where "
    "parameters weigh most: of the MLP's 33.7 MiB the gradient and the product take 21.6, both parts of the "
    "activations 16.9.",
    "",
    "**Blocks.** A block shares the reading of constants and the work of the interpreter, but no arithmetic. By CPU "
    "time on one core, the MLP's six matrix products make 17.4 GFLOP at about 170 GFLOP/s, where oneDNN reaches 200 "
    "on the largest of them: there is little to share. The LSTM's 1.6 GFLOP at that rate would take 0.4 of its "
    "single product, were its gates free. Eight directions at once take 0.9 to 1.0 of eight products (LSTM), 0.8 to "
    "0.95 (GPT), 1.0 to 1.1 (MLP). A PINN's product spends a sixth of its time in the interpreter; a block saves "
    "half of that, and loses as much when its values outgrow the cache. So a block is replayed together only as far "
    "as its values fit the cache, and one by one beyond, with the memory of one.",
    "",
    "**First product.** It is a gradient, what is recorded beside it, and a replay, of twice a gradient's matrix "
    "products: 3 where all take the same kernels, as in ResNet-18, and less where a replay has faster ones. A PINN "
    "records 340 operators at about 45 microseconds of the interpreter each, as much as its arithmetic takes.",
    "",
    "**Replay of a PINN.** Its 154 matrix products of at most 50 columns take about a third of the time, the "
    "interpreter a sixth; the rest are 360 passes over values of 200 KB that come from beyond the nearest cache. "
    "Double backward with its graph kept makes the same products and 560 passes. On one thread the replay took 0.73 to "
    "0.98 of its time; with two, `--only PINN` gave 1.06 to 1.39 in four runs.",
    "",
    "**Compiling a replay.** Traced to an FX graph and compiled by `torch.compile`, the MLP's replay took 171 ms of "
    "CPU time on one busy core, where the eager one takes 88 by oneDNN and 172 by MKL: Inductor fuses what is left "
    "beside the matrix products, which is little, and has no lowering for oneDNN's with weights that change. The "
    "PINN's, of 1,100 nodes, took 17.5 ms instead of 25, after 150 seconds of tracing and compiling: 20,000 products "
    "to win that back, at a point that is left after fewer than a hundred. So there is no such option.",
    "",
)


def _failures(models: dict[str, Any]) -> list[str]:
    found = [
        f"- {name}, {side}: `{entry['failure']}`"
        for name, model in models.items()
        for side, entry in model["sides"].items()
        if "failure" in entry
    ]
    return ["### Failures", "", *found, ""] if found else []


def page(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    loads = [m["load_average"] for models in record["devices"].values() for m in models.values()]
    lines = [
        "# Speed and memory of products",
        "",
        "With this page you can see what a product costs in time and memory, in gradients, beside other packages.",
        "",
        "Generated by `benchmarks/products`: all sides in one run, in interleaved rounds; a figure is the median of "
        "its rounds. Times are of one product at a point that was evaluated before, except where a side evaluates it "
        "anew each time (first product, double backward, `torch.func.jvp`, curvlinops, hessian-eigenthings). "
        "The gradient, the unit, uses PyTorch's own kernels, fused attention and recurrent ones included; sides that "
        "cannot differentiate these take others.",
        "",
        "Peak memory counts what PyTorch's allocator hands out above the model and its data: on a CPU the sum of the "
        "allocations and releases that `torch.profiler` reports, on a GPU the allocator's own statistics.",
        "",
        f"{record['date']}; {record['cpu']}, {record['cores']} cores, {record['threads']} threads, "
        f"load average {record['load_average']:.1f} at the start, "
        f"{max(loads):.1f} at most (other work slows whatever uses all cores); "
        f"GPU: {record['gpu'] or 'none'}; {versions}; {record['dtype']}, seed {record['seed']}.",
        "",
    ]
    for device, measured in record["devices"].items():
        models = {name: measured[name] for name in TARGETS[0].bounds if name in measured}
        lines += [f"- {name}: {m['description']}; {m['parameters']:,} parameters" for name, m in models.items()] + [""]
        lines += _section(device, models)
    lines += NOTES
    return "\n".join(lines).rstrip() + "\n"
