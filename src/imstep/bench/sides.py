"""Who takes part in the bench, and the ranges from which each is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imstep.bench.peers import ADAM_CLIPPED, ADAM_LBFGS, HESSIAN_FREE, KFAC, MUON
from imstep.bench.recurrent import LSTM, ORTHOGONAL
from imstep.bench.references import BOOSTING, MLP
from imstep.runs.optimizers import METHODS, OptimizerSpec, get_optimizer

__all__ = [
    "FIRST_ORDER_DECAY", "OWN", "PENALTY", "PUBLIC_SOAP", "SIDES", "USUAL", "Options", "Range", "Side", "own_side",
    "side_of",
]  # fmt: skip

Options = dict[str, float]

OWN = "imstep"
"""The name of our side, whichever configuration a task takes."""
PUBLIC_SOAP = "pytorch_optimizer:SOAP"
"""Whose steps are faster than our own SOAP's, and of which neither is always the better."""


@dataclass(frozen=True)
class Range:
    """Numbers from which an option is drawn, spread evenly over their logarithm.

    Args:
        low, high: 0 < low < high.
        none: share of the draws that are 0 instead, in [0, 1).
        whole: whether only whole numbers count.

    Raises:
        ValueError: the numbers are not so.

    Example:
        >>> [Range(1e-3, 1e-1).at(u) for u in (0.0, 0.5, 1.0)]
        [0.001, 0.01, 0.1]
        >>> str(Range(1e-4, 1.0, none=0.25)), Range(1e-4, 1.0, none=0.25).at(0.2)
        ('0 or 0.0001 to 1', 0.0)
    """

    low: float
    high: float
    none: float = 0.0
    whole: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high and 0 <= self.none < 1):
            raise ValueError(f"a range needs 0 < low < high and none in [0, 1), got {self}.")

    def at(self, share: float) -> float:
        """The number that a share in [0, 1] of the way stands for, to two digits."""
        if share < self.none:
            return 0.0
        value = self.low * (self.high / self.low) ** ((share - self.none) / (1 - self.none))
        return float(round(value)) if self.whole else float(f"{value:.2g}")

    def __str__(self) -> str:
        return f"{'0 or ' if self.none else ''}{self.low:g} to {self.high:g}"


FIRST_ORDER_DECAY = Range(1e-3, 1.0, none=0.25)
"""Of weight decay apart from the loss, which a learning rate multiplies."""
PENALTY = Range(1e-7, 1e-2, none=0.25)
"""Of weight decay as a penalty in the loss."""


@dataclass(frozen=True)
class Side:
    """A contestant.

    Args:
        name: for the command line and the records.
        title: for tables.
        optimizer: the optimizer's name or the optimizer.
        ranges: what tuning draws from; empty for no tuning.
        decay: the range of weight decay, drawn where a task asks for it.
        fixed: options that differ from the optimizer's defaults.
        cosine: whether the learning rate falls to 0 along a cosine.
        batches: True to take part with mini-batches only, False with the full batch only, None with both.
        pace: seconds of a gradient-equivalent in those of a gradient, roughly; for estimates alone.
        reference: whether it trains something else, whose figure is to be held beside the others'; in no duel.
    """

    name: str
    title: str
    optimizer: str | OptimizerSpec
    ranges: Mapping[str, Range] = field(default_factory=dict)
    decay: Range = PENALTY
    fixed: Mapping[str, float] = field(default_factory=dict)
    cosine: bool = False
    batches: bool | None = None
    pace: float = 1.5
    reference: bool = False

    @property
    def spec(self) -> OptimizerSpec:
        """The optimizer."""
        return get_optimizer(self.optimizer) if isinstance(self.optimizer, str) else self.optimizer

    def trials(self, number: int, ranges: Mapping[str, Range]) -> list[Options]:
        """So many different settings, spread over the ranges by multiples of an irrational vector; the middle first.

        Source: Roberts 2018, the sequence R_d.
        """
        ratio, found = _root(len(ranges)), []
        for k in range(20 * number):
            shares = [(0.5 + k * ratio ** -(axis + 1)) % 1 for axis in range(len(ranges))]
            options = {name: chosen.at(u) for u, (name, chosen) in zip(shares, ranges.items(), strict=True)}
            if options not in found:
                found.append(options)
        return found[:number]


def _root(dimensions: int) -> float:
    """The root above 1 of x^(d + 1) = x + 1; the golden ratio for one dimension."""
    x = 1.5
    for _ in range(60):
        x = (1 + x) ** (1 / (dimensions + 1))
    return x


def own_side(optimizer: str) -> Side:
    """Our side: a named configuration with its defaults, of which weight decay alone is tuned where a task asks."""
    title = f"imstep ({get_optimizer(optimizer).title})"
    return Side(OWN, title, optimizer, pace=4.0 if optimizer == "least-squares" else 2.0)


_RATE = Range(3e-4, 3e-2)
_USUAL = (
    Side(
        "sgd", "SGD, momentum", "torch.optim:SGD", {"lr": Range(3e-3, 10.0)}, PENALTY,
        {"momentum": 0.9, "nesterov": 1}, cosine=True, pace=1.0,
    ),
    Side("adamw", "AdamW", "torch.optim:AdamW", {"lr": _RATE}, FIRST_ORDER_DECAY, {"weight_decay": 0}, True, pace=1.1),
    Side("muon", "Muon", MUON, {"lr": _RATE}, FIRST_ORDER_DECAY, cosine=True),
    Side(
        "soap", "SOAP (imstep.methods)", METHODS["soap"], {"lr": Range(1e-3, 1e-1)}, FIRST_ORDER_DECAY, cosine=True,
        pace=3.0,
    ),
    Side(
        PUBLIC_SOAP, "SOAP (pytorch_optimizer)", PUBLIC_SOAP, {"lr": Range(1e-3, 1e-1)}, FIRST_ORDER_DECAY,
        {"weight_decay": 0}, cosine=True, pace=2.0,
    ),
    Side(
        "kl-shampoo", "KL-Shampoo (imstep.methods)", METHODS["kl-shampoo"], {"lr": Range(1e-3, 1e-1)},
        FIRST_ORDER_DECAY, cosine=True, pace=3.0,
    ),
    Side(
        "lbfgs", "L-BFGS", "lbfgs", {"history": Range(5, 300, whole=True)}, batches=False, pace=1.2,
    ),
    Side("kfac", KFAC.title, KFAC, {"damping": Range(1e-3, 30.0)}),
    Side("hessian-free", HESSIAN_FREE.title, HESSIAN_FREE, {"damping": Range(1e-4, 10.0)}),
)  # fmt: skip
_OTHERS = (
    Side("adam-clipped", ADAM_CLIPPED.title, ADAM_CLIPPED, {"lr": Range(1e-4, 1e-2)}, cosine=True, pace=1.1),
    Side("adam-orthogonal", ORTHOGONAL.title, ORTHOGONAL, {"lr": Range(1e-4, 1e-2)}, cosine=True, pace=1.1),
    Side("lstm-adam", LSTM.title, LSTM, {"lr": Range(1e-4, 1e-2)}, cosine=True, pace=4.0, reference=True),
    Side(
        "adam-lbfgs", ADAM_LBFGS.title, ADAM_LBFGS, {"lr": _RATE, "first": Range(50, 500, whole=True)}, batches=False,
        pace=1.2,
    ),
    Side("sklearn-mlp", MLP.title, MLP, {"lr": Range(3e-4, 1e-2)}, Range(1e-5, 10.0, none=0.25), reference=True),
    Side(
        "sklearn-boosting", BOOSTING.title, BOOSTING, {"lr": Range(1e-2, 0.3)}, Range(1e-3, 100.0, none=0.25),
        reference=True,
    ),
)  # fmt: skip
SIDES: dict[str, Side] = {side.name: side for side in (*_USUAL, *_OTHERS)}
"""Peers by name."""
USUAL = tuple(side.name for side in _USUAL)
"""Who takes part where nobody else is named."""


def side_of(name: str) -> Side:
    """The contestant of that name; or any optimizer of the command line, its rate drawn from around its default.

    Raises:
        OptimizerError: there is no such optimizer.

    Example:
        >>> side_of("torch.optim:RMSprop").ranges["lr"].high
        0.3
    """
    if name in SIDES:
        return SIDES[name]
    spec = get_optimizer(name)
    rate = spec.defaults.get("lr")
    tuned = {"lr": Range(rate / 30, rate * 30)} if rate and (spec.learning_rates or ":" in name) else {}
    return Side(name, spec.title, spec, tuned, PENALTY, cosine=bool(tuned))
