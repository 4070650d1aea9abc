"""How long a step takes on many processes, from what it sends and computes: numbers counted, not measured.

python -m benchmarks.distributed.model                                   # GPUs, by the numbers of `GPU` below
python -m benchmarks.distributed.model --flops 2e14 --double 3e13 --latency 1e-5

    T(W) = (N c / W + A) / s + I(W) / s' + sums and exchanges over a network of latency a and bandwidth b
    a sum of m bytes:  2 ⌈log₂ W⌉ a + 2 (W - 1) / W m / b

N examples are shared out, c operations each, those for factors among them; A is what every process does alike,
preconditioning above all; I are inverses, in double precision, the largest of which one process makes alone. A sum of W
processes is by halving and doubling (Thakur, Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19 (2005),
49-66, section 4.4). Left out are: computing while sending, kernels that fill no card, reading of data. Batches are
looked for among powers of two.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record_page import DOCS, put, table
from imstep.curvature.processes import HEADER
from imstep.curvature.shared_inverses import WORTH_SENDING, assigned

BYTES = 4
LARGEST = 4096  # of Kronecker()
SMALL = 400  # bytes of an exchange, by the record
ENOUGH = 0.9


@dataclass(frozen=True)
class Layer:
    """A weight, used at several places of an example: (out, in) with a bias as a column of its own."""

    inputs: int
    outputs: int
    places: int = 1


@dataclass(frozen=True)
class Network:
    """What a step needs to know of a network.

    Args:
        name: for the table.
        layers: with factors.
        parameters: n; those of no layer have a diagonal.
        forward: operations of a forward pass, an example; None for those of the layers.
        tensors: parameter tensors.
    """

    name: str
    layers: tuple[Layer, ...]
    parameters: int
    forward: float | None = None
    tensors: int = 0

    @property
    def passed(self) -> float:
        """Operations of a forward pass of one example."""
        return self.forward or sum(2.0 * of.inputs * of.outputs * of.places for of in self.layers)

    @property
    def factors(self) -> list[int]:
        """Rows of the factors."""
        return [rows for of in self.layers for rows in (of.inputs, of.outputs)]


@dataclass(frozen=True)
class Steps:
    """What the mean step does; as counted on the digits' autoencoder in ``record.json``."""

    products: float = 4.5
    trials: float = 1.5
    refreshes: float = 0.5

    @property
    def inverses(self) -> float:
        """A refresh is followed by new ones."""
        return self.refreshes


@dataclass(frozen=True)
class Machine:
    """A process and the network between processes.

    Args:
        flops, double: operations a second that are reached, in the network's precision and in float64.
        latency: seconds of a message.
        bandwidth: bytes a second.
    """

    flops: float
    double: float
    latency: float
    bandwidth: float

    def sum(self, processes: int, sent: float, times: float = 1.0) -> float:
        """Seconds of so many sums, of ``sent`` bytes together."""
        if processes == 1:
            return 0.0
        rounds = 2 * math.ceil(math.log2(processes))
        return times * rounds * self.latency + 2 * (processes - 1) / processes * sent / self.bandwidth


GPU = Machine(flops=5e13, double=1e13, latency=2e-5, bandwidth=1.25e9)
"""About a third of the peak of an A100 in TF32, and half of it in float64; 20 µs; 10 Gbit/s. Assumed, not measured."""


def sent(network: Network, steps: Steps) -> tuple[float, float, float]:
    """Sums of a step, the numbers in them, and its exchanges of objects, of which each is two collectives."""
    n, factors = network.parameters, network.factors
    large = [rows for rows in factors if rows >= WORTH_SENDING]
    layered = sum(of.inputs * of.outputs for of in network.layers)
    totals = sum(rows**2 for rows in factors) + len(network.layers) + n - layered
    inverses = steps.inverses if large else 0.0
    sums = 1 + steps.products + steps.trials + steps.refreshes + inverses
    numbers = n + network.tensors + 6 + steps.products * n + steps.trials + steps.refreshes * totals
    numbers += inverses * sum(rows**2 for rows in large)
    return sums, numbers + HEADER * sums, 1 + 2 * steps.refreshes


def seconds(network: Network, examples: float, processes: int, machine: Machine, steps: Steps) -> float:
    """Of a step on so many examples in all."""
    gradients = 4 / 3 + 4 / 3 * steps.products + steps.trials / 3 + 2 / 3 * steps.refreshes
    of_factors = sum(2.0 * of.places * (of.inputs**2 + of.outputs**2) for of in network.layers)
    shared = examples / processes * (3 * gradients * network.passed + steps.refreshes * of_factors)
    between = sum(2.0 * (of.inputs + of.outputs) * of.inputs * of.outputs for of in network.layers)
    alike = (steps.products + 1) * (between + 10 * network.parameters)
    sums, numbers, exchanges = sent(network, steps)
    network_time = machine.sum(processes, numbers * BYTES, sums)
    network_time += machine.sum(processes, exchanges * 2 * SMALL * processes, 2 * exchanges)
    inverted = steps.inverses * inversions(network.factors, processes)
    return (shared + alike) / machine.flops + inverted / machine.double + network_time


def inversions(factors: list[int], processes: int) -> float:
    """Operations of the process that has the most to invert: a triangle and its inverse, n³ products in all."""
    large = [rows for rows in factors if rows >= WORTH_SENDING]
    load = [0.0] * processes
    for rows, taker in zip(large, assigned(large, processes), strict=True):
        load[taker] += 2.0 * rows**3
    return max(load) + sum(2.0 * rows**3 for rows in factors if rows < WORTH_SENDING)


def efficiency(network: Network, examples: float, processes: int, machine: Machine, steps: Steps) -> float:
    """Time of one process over that of all together: of a step on the same examples."""
    alone = seconds(network, examples, 1, machine, steps)
    return alone / (processes * seconds(network, examples, processes, machine, steps))


def enough(network: Network, processes: int, machine: Machine, steps: Steps) -> float | None:
    """Examples of a batch from which the efficiency is 90 %; None where no batch has it."""
    low, high = 0, 60
    if efficiency(network, 2.0**high, processes, machine, steps) < ENOUGH:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        few = efficiency(network, 2.0**middle, processes, machine, steps) < ENOUGH
        low, high = (middle, high) if few else (low, middle)
    return 2.0**high


# --- networks -------------------------------------------------------------------------------------------------------


def network_of(name: str, model: nn.Module, example: Tensor) -> Network:
    """Of a model of linear and convolutional layers, counted in a forward pass of one example."""
    found: list[Layer] = []

    def note(layer: Any, inputs: Any, output: Tensor) -> None:
        rows = layer.weight[0].numel() + (layer.bias is not None)
        found.append(Layer(rows, len(layer.weight), output.numel() // len(layer.weight)))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    parameters = list(model.parameters())
    kept = tuple(of for of in found if max(of.inputs, of.outputs) <= LARGEST)
    forward = sum(2.0 * of.inputs * of.outputs * of.places for of in found)
    return Network(name, kept, sum(p.numel() for p in parameters), forward, len(parameters))


def autoencoder() -> Network:
    """784-1000-500-250-30 and back: Hinton and Salakhutdinov, Science 313 (2006)."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))
        return network_of("autoencoder", model, torch.empty(1, 784))


def resnet18() -> Network:
    """On pictures of 224 by 224: He, Zhang, Ren and Sun, CVPR 2016, table 1."""

    def convolutions() -> Iterator[Layer]:
        yield Layer(3 * 49, 64, 112**2)
        before = 64
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            yield Layer(9 * before, width, size**2)
            yield from [Layer(9 * width, width, size**2)] * 3
            if before != width:
                yield Layer(before, width, size**2)
            before = width
        yield Layer(513, 1000)

    every = tuple(convolutions())
    forward = sum(2.0 * of.inputs * of.outputs * of.places for of in every)
    kept = tuple(of for of in every if max(of.inputs, of.outputs) <= LARGEST)
    return Network("ResNet-18", kept, 11_689_512, forward, 62)


def gpt(length: int = 1024, width: int = 768, depth: int = 12, words: int = 50257) -> Network:
    """GPT-2 of 124M parameters on sequences of 1,024: Radford et al. (2019); the vocabulary has a diagonal."""
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    blocks = tuple(Layer(a + 1, b, length) for a, b in shapes) * depth
    between = depth * 4.0 * length**2 * width  # queries with keys, and weights with values
    layers = sum(2.0 * of.inputs * of.outputs * of.places for of in blocks)
    parameters = sum(of.inputs * of.outputs for of in blocks) + (words + length + 2 * (2 * depth + 1)) * width
    return Network("GPT, 124M", blocks, parameters, layers + between + 2.0 * words * width * length, 148)


NETWORKS = (autoencoder, resnet18, gpt)


# --- tables ---------------------------------------------------------------------------------------------------------


def rows(machine: Machine, steps: Steps, processes: tuple[int, ...] = (8, 64, 512)) -> Iterator[list[str]]:
    """By network and bandwidth: what is sent, and the efficiency of so many processes at the batch that 8 need."""
    for make in NETWORKS:
        network = make()
        sums, numbers, _ = sent(network, steps)
        for gigabits in (1, 10, 100):
            at = replace(machine, bandwidth=gigabits * 1e9 / 8)
            examples = enough(network, 8, at, steps)
            found = [network.name, f"{network.parameters / 1e6:.1f}", f"{sums:.1f}", f"{numbers * BYTES / 1e6:,.0f}"]
            found += [str(gigabits), "none" if examples is None else f"{examples / 8:,.0f}"]
            for count in processes:
                if examples is None:
                    found.append("")
                else:
                    step = seconds(network, examples / 8 * count, count, at, steps)
                    share = efficiency(network, examples / 8 * count, count, at, steps)
                    found.append(f"{100 * share:.0f} %, {step:.3g} s")
            yield found


def text_of(machine: Machine, steps: Steps) -> str:
    """The table."""
    head = ["network", "n / 10⁶", "sums", "MB in sums", "Gbit/s", "examples a GPU, from which 8 have 90 %"]
    return table([*head, *(f"then {count} GPUs" for count in (8, 64, 512))], rows(machine, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flops", "double", "latency"):
        parser.add_argument(f"--{name}", type=float, default=getattr(GPU, name))
    for name in ("products", "trials", "refreshes"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Steps(), name), help="in a mean step")
    parser.add_argument("--page", action="store_true", help="write the table into docs/tutorial-processes.md")
    given = vars(parser.parse_args())
    page = given.pop("page")
    machine = replace(GPU, **{name: given.pop(name) for name in ("flops", "double", "latency")})
    text = text_of(machine, Steps(**given))
    print(text)
    if page:
        put("model", DOCS / "tutorial-processes.md", text)


if __name__ == "__main__":
    main()
