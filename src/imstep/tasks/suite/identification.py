"""System identification: models with a state, fitted to what simulated systems answer, up to a known noise.

Models begin as the best linear system, as practitioners have it (Schoukens 2021, arXiv 2103.14516): from random
dynamics a method spends most of its steps on finding a frequency.

Sources: Wigren and Schoukens, European Control Conference 2013 (Silverbox); Schoukens, Suykens and Ljung, SYSID 2009
(Wiener-Hammerstein benchmark). The measured records are not shipped: their published equations are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from imstep.tasks.base import DataNotFoundError, Metric
from imstep.tasks.examples import Batch, ExampleTask, Loader
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
_REFITS, _RADIUS = 8, 0.99


class Cell(nn.Module):
    """The next state of a system, (k, n) from (k, n + inputs): linear, and a tanh layer beside it if `hidden` > 0."""

    def __init__(self, inputs: int, states: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(states + inputs, states, bias=False)
        self.bend = mlp((states + inputs, hidden, states)) if hidden else None

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

    @torch.no_grad()
    def start(self, train: Batch) -> None:
        """Begin as the linear system that fits best; of a tanh layer, whose first weights stay, nothing comes yet."""
        A, B, C, D, e = linear_fit(train.inputs[..., 0], train.targets[..., 0], self.states)
        self.cell.linear.weight.copy_(torch.cat([A, B], 1))
        self.readout.weight.copy_(torch.cat([C, D], 1))
        self.readout.bias.copy_(e)
        if self.cell.bend is not None:
            list(self.cell.bend.parameters())[-2].zero_()


class LinearSystem(StateSpace):
    """x⁺ = A x + B u, y = C x + D u + e."""

    def __init__(self, states: int) -> None:
        super().__init__(states, 0)


def linear_fit(inputs: Tensor, answers: Tensor, order: int) -> tuple[Tensor, ...]:
    """A, B, C, D, e of x⁺ = A x + B u, y = C x + D u + e from x = 0, the best for inputs and answers (k, T).

    States have a covariance of 1.

    Source: Young and Jakeman, International Journal of Control 29 (1979), 1-30, refined instrumental variables in their
    simple form: what a system answers beyond the best linear one is no function of the inputs' past that is linear.
    """
    u, y = inputs.double().mT, answers.double().mT
    (a, b), constant = (u.new_zeros(order), None), u.new_ones(u.numel(), 1)
    for _ in range(_REFITS):
        # Linear in a and b: errors of the equation, weighted by 1/a so that they are errors of answers.
        shaped, target = _lagged(_recursion(a, u), order), _lagged(_recursion(a, y), order)
        clean = target if b is None else _lagged(_recursion(a, shaped @ b), order)
        both = (torch.cat([-of[..., 1:], shaped], -1).flatten(0, 1) for of in (target, clean))
        columns, instruments = (torch.cat([of, constant], 1) for of in both)
        normal = instruments.mT @ columns, instruments.mT @ target[..., :1].flatten(0, 1)
        found = torch.linalg.lstsq(*normal, driver="gelsd").solution[:, 0]
        a, b, e = _stable(found[:order]), found[order:-1], found[-1]
    assert b is not None
    A = torch.diag(a.new_ones(order - 1), -1)
    A[0], C = -a, (b[1:] - b[0] * a)[None]
    states = _lagged(_recursion(a, u), order)[..., 1:].flatten(0, 1)
    units = torch.linalg.cholesky(states.mT @ states / len(states))
    B = torch.linalg.solve_triangular(units, torch.eye(order, 1, dtype=u.dtype), upper=False)
    return torch.linalg.solve_triangular(units, A @ units, upper=False), B, C @ units, b[:1, None], e


def _recursion(a: Tensor, given: Tensor) -> Tensor:
    """v with v_t + a₁ v_t₋₁ + ... = given_t, (T, k)."""
    past, made = given.new_zeros(len(a), given.shape[1]), []
    for one in given:
        made.append(one - a @ past)
        past = torch.cat([made[-1][None], past[:-1]])
    return torch.stack(made)


def _lagged(signal: Tensor, order: int) -> Tensor:
    """(T, k, order + 1) of (T, k): what is, and was up to `order` samples before; zero before the first."""
    late = lambda lag: torch.cat([signal.new_zeros(lag, signal.shape[1]), signal[: len(signal) - lag]])
    return torch.stack([late(lag) for lag in range(order + 1)], -1)


def _stable(a: Tensor) -> Tensor:
    """The polynomial with its roots drawn into the unit circle, where they are not."""
    companion = torch.diag(a.new_ones(len(a) - 1), -1)
    companion[0] = -a
    radius = float(torch.linalg.eigvals(companion).abs().max())
    return a * min(1.0, _RADIUS / radius) ** torch.arange(1.0, len(a) + 1, dtype=a.dtype)


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
    name: str, title: str, description: str, load: Loader, model: Callable[[], nn.Module],
    start: Callable[[Any, Batch], None],
) -> ExampleTask:  # fmt: skip
    return ExampleTask(
        name, title, f"{description} Mean squared error; the noise leaves {NOISE**2:g}.", load, model, nn.MSELoss(),
        _OVER_NOISE, unit="records", hidden=_cells, budget=1000.0, start=start,
    )  # fmt: skip


@torch.no_grad()
def _start_in_parts(model: Any, train: Batch) -> None:
    """Begin as the best linear system behind what leaves signals as they are.

    All linear dynamics before the diode was tried, too: that stays at 19 times the noise.
    """
    front, bend, back = model
    back.start(train)
    front.cell.linear.weight.copy_(back.cell.linear.weight)
    front.readout.weight.zero_()[0, -1] = 1
    front.readout.bias.zero_()
    signal = torch.linspace(-3, 3, 61)[:, None].to(bend[0].weight)
    features = torch.cat([bend[:-1](signal), torch.ones_like(signal)], 1)
    ridge = torch.eye(features.shape[1]).to(features)
    fitted = torch.linalg.solve(features.mT @ features + ridge, features.mT @ signal)
    bend[-1].weight.copy_(fitted[:-1].mT)
    bend[-1].bias.copy_(fitted[-1])


def _cells(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module for module in model.modules() if isinstance(module, Cell))


silverbox = _task(
    "silverbox",
    "Silverbox: a simulated oscillator with a cubic spring",
    f"{TRAIN} records of {SAMPLES} samples of a Duffing oscillator; state-space model with 2 states, 16 tanh units.",
    partial(_records, _duffing, 0.08, 1 / 3),  # so loud that the best linear system is wrong by a fourth
    partial(StateSpace, 2, 16),
    StateSpace.start,
)

wiener_hammerstein = _task(
    "wiener-hammerstein",
    "Wiener-Hammerstein system: filter, diode, filter",
    f"{TRAIN} records of {SAMPLES} samples, simulated; a linear system with 3 states, tanh MLP 1-10-1, another system.",
    partial(_records, _filters, 1.0, 10_000 / (WIENER_HAMMERSTEIN_RATE / 2)),
    lambda: nn.Sequential(LinearSystem(3), mlp((1, 10, 1)), LinearSystem(3)),
    _start_in_parts,
)

TASKS = (silverbox, wiener_hammerstein)
