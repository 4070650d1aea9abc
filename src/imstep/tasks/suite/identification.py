"""System identification: models with a state, fitted to what simulated systems answer, up to a known noise.

Sources: Wigren and Schoukens, European Control Conference 2013 (Silverbox); Schoukens, Suykens and Ljung, SYSID 2009
(Wiener-Hammerstein benchmark). The measured records are not shipped: their published equations are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from imstep.tasks.base import DataNotFoundError, Metric
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import mlp

__all__ = ["TASKS", "LinearSystem", "StateSpace", "silverbox", "wiener_hammerstein"]

SAMPLES = 128
TRAIN, HELDOUT = 48, 16
NOISE = 0.01
"""Deviation of the measured answers' errors, where answers have a deviation of 1: the loss ends at its square."""

SILVERBOX_RATE, RESONANCE, DAMPING_RATIO = 610.35, 68.0, 0.05
"""Samples a second, and hertz and share of critical damping of the linear part."""
SUBSTEPS = 8
WIENER_HAMMERSTEIN_RATE = 51_200.0


class Cell(nn.Module):
    """The next state of a system, (k, n) from (k, n + inputs): linear, and a tanh layer beside it if `hidden` > 0."""

    def __init__(self, inputs: int, states: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(states + inputs, states, bias=False)
        self.bend = mlp((states + inputs, hidden, states)) if hidden else None
        with torch.no_grad():
            # A random rotation, slightly damped: states neither die out nor grow before anything is learnt.
            nn.init.orthogonal_(self.linear.weight[:, :states]).mul_(0.9)
            self.linear.weight[:, states:].normal_(0, 0.3)

    def forward(self, present: Tensor) -> Tensor:
        following = self.linear(present)
        return following if self.bend is None else following + self.bend(present)


class StateSpace(nn.Module):
    """x⁺ = A x + B u + V tanh(W (x, u) + b) + c, y = C x + D u + e, from x = 0.

    Args:
        states: numbers in x.
        hidden: width of the tanh layer; 0 for a linear system.

    Inputs u are (k, T, 1), outputs y (k, T, 1).
    """

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.states = Cell(1, states, hidden), states
        self.readout = nn.Linear(states + 1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        present, seen = inputs.new_zeros(len(inputs), self.states), []
        for given in inputs.unbind(1):
            both = torch.cat([present, given], 1)
            seen.append(both)
            present = self.cell(both)
        return self.readout(torch.stack(seen, 1))


class LinearSystem(StateSpace):
    """x⁺ = A x + B u, y = C x + D u + e."""

    def __init__(self, states: int) -> None:
        super().__init__(states, 0)


def _duffing(forces: Tensor) -> Tensor:
    """y'' + 2ζ y' + y + y³ = u at each sample, in units of the resonance; u (k, T) is held in between."""
    step = 2 * math.pi * RESONANCE / SILVERBOX_RATE / SUBSTEPS
    state, answers = forces.new_zeros(2, len(forces)), []

    def slope(s: Tensor, u: Tensor) -> Tensor:
        return torch.stack([s[1], u - 2 * DAMPING_RATIO * s[1] - s[0] - s[0] ** 3])

    for u in forces.unbind(1):
        answers.append(state[0])
        for _ in range(SUBSTEPS):
            a = slope(state, u)
            b = slope(state + step / 2 * a, u)
            c = slope(state + step / 2 * b, u)
            d = slope(state + step * c, u)
            state = state + step / 6 * (a + 2 * b + 2 * c + d)
    return torch.stack(answers, 1)


def _filters(u: Tensor) -> Tensor:
    """A Chebyshev low-pass, a diode, an inverse Chebyshev low-pass, each of third order; (k, T)."""
    try:
        from scipy import signal
    except ImportError as error:
        raise DataNotFoundError(
            "wiener-hammerstein is simulated with SciPy's filters. Install it: pip install 'imstep[tasks]'."
        ) from error
    before = signal.cheby1(3, 0.5, 4400, fs=WIENER_HAMMERSTEIN_RATE)
    after = signal.cheby2(3, 40, 5000, fs=WIENER_HAMMERSTEIN_RATE)
    middle = torch.from_numpy(signal.lfilter(*before, u.numpy(), axis=1))
    middle = middle / middle.std()
    # A diode and a resistor conduct above a threshold, and then divide the voltage.
    clipped = middle - 0.8 / 4 * torch.nn.functional.softplus(4 * (middle - 0.5))
    return torch.from_numpy(signal.lfilter(*after, clipped.numpy(), axis=1).copy())


def _white(generator: Generator, count: int, share: float) -> Tensor:
    """(count, SAMPLES) random-phase multisines of deviation 1 up to a share of half the sampling rate."""
    lines = int(share * SAMPLES / 2)
    phases = 2 * math.pi * torch.rand(count, lines, generator=generator, dtype=torch.float64)
    spectrum = torch.zeros(count, SAMPLES // 2 + 1, dtype=torch.complex128)
    spectrum[:, 1 : lines + 1] = torch.polar(torch.ones_like(phases), phases)
    signals = torch.fft.irfft(spectrum, SAMPLES)
    return signals / signals.std(1, keepdim=True)


def _records(
    answer: Callable[[Tensor], Tensor], loudness: float, share: float, data: Path | None
) -> tuple[Batch, Batch]:
    """Inputs and measured answers, standardised."""
    random = Generator().manual_seed(0)
    given = _white(random, TRAIN + HELDOUT, share)
    answers = answer(loudness * given)
    answers = (answers - answers[:TRAIN].mean()) / answers[:TRAIN].std()
    measured = answers + NOISE * torch.randn(answers.shape, generator=random, dtype=torch.float64)
    every = Batch(given[..., None], measured[..., None])
    return every.take(slice(0, TRAIN)), every.take(slice(TRAIN, None))


_OVER_NOISE = Metric(
    "RMSE over noise",
    lambda outputs, targets: (outputs - targets).double().square().flatten(1).mean(1),
    lambda mean: math.sqrt(mean) / NOISE,
)


def _task(
    name: str, title: str, description: str, load: Callable[[Path | None], tuple[Batch, Batch]],
    model: Callable[[], nn.Module], cells: Callable[[nn.Module], tuple[nn.Module, ...]],
) -> ExampleTask:  # fmt: skip
    return ExampleTask(
        name, title, f"{description} Mean squared error; the noise leaves {NOISE**2:g}.", load, model, nn.MSELoss(),
        _OVER_NOISE, unit="records", hidden=cells, budget=1000.0,
    )  # fmt: skip


def _cells(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module for module in model.modules() if isinstance(module, Cell))


silverbox = _task(
    "silverbox",
    "Silverbox: a simulated oscillator with a cubic spring",
    f"{TRAIN} records of {SAMPLES} samples of a Duffing oscillator; state-space model with 2 states, 16 tanh units.",
    partial(_records, _duffing, 0.5, 1 / 3),
    partial(StateSpace, 2, 16),
    _cells,
)

wiener_hammerstein = _task(
    "wiener-hammerstein",
    "Wiener-Hammerstein system: filter, diode, filter",
    f"{TRAIN} records of {SAMPLES} samples, simulated; a linear system with 3 states, tanh MLP 1-10-1, another system.",
    partial(_records, _filters, 1.0, 10_000 / (WIENER_HAMMERSTEIN_RATE / 2)),
    lambda: nn.Sequential(LinearSystem(3), mlp((1, 10, 1)), LinearSystem(3)),
    _cells,
)

TASKS = (silverbox, wiener_hammerstein)
