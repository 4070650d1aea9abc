"""Transformers: addition modulo a prime, where what is learnt by heart is understood much later, and Shakespeare.

Sources: Power, Burda, Edwards, Babuschkin and Misra, arXiv 2201.02177; Nanda, Chan, Lieberum, Smith and Steinhardt,
ICLR 2023 (one layer without normalisation, addition modulo a prime); Radford et al. 2019 (the language model's layers).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from imstep.tasks.base import Metric
from imstep.tasks.examples import ACCURACY, Batch, ExampleTask
from imstep.tasks.texts import CHARACTERS, encode, shakespeare

__all__ = ["TASKS", "Transformer", "modular_addition"]

SHARE = 0.5
"""Of all pairs to train on, as in Power et al."""
WINDOW = 64
WINDOWS, HELDOUT_WINDOWS = 16_384, 1024
SMALL = 4
"""Times fewer pieces of half the length, for half the width and one block: to be swept through in minutes."""
BUDGET = 3000.0


class Block(nn.Module):
    """Causal attention, then a layer of GELU units, each added to what it was given; (k, T, width)."""

    def __init__(self, width: int, heads: int, normalised: bool) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = (nn.LayerNorm(width) if normalised else nn.Identity() for _ in range(2))
        self.attend, self.merge = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.layer = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        k, steps, width = x.shape
        split = self.attend(self.before(x)).view(k, steps, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).reshape(k, steps, width))
        return x + self.layer(self.between(x))


class Transformer(nn.Module):
    """Logits of the next token from tokens (k, T), int64: (k, tokens, T), or (k, tokens) after the last alone.

    Args:
        tokens: how many there are.
        steps: T at most.
        width, heads, blocks: of the network.
        last: whether only the last step counts.
        normalised: whether blocks begin with layer normalisation.
    """

    def __init__(
        self, tokens: int, steps: int, width: int, heads: int, blocks: int, *, last: bool, normalised: bool
    ) -> None:
        super().__init__()
        self.last = last
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(steps, width)
        self.blocks = nn.Sequential(*(Block(width, heads, normalised) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width) if normalised else nn.Identity()
        self.readout = nn.Linear(width, tokens, bias=False)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight.normal_(0, width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        x = self.blocks(x)
        x = self.norm(x[:, -1] if self.last else x)
        return self.readout(x) if self.last else self.readout(x).transpose(1, 2)


def modular_addition(prime: int, width: int = 64) -> ExampleTask:
    """The task of a + b modulo a number, from half of all pairs."""
    return ExampleTask(
        f"modular-addition-{prime}",
        f"Addition modulo {prime}, transformer",
        f"a, b, = told by half of all {prime * prime:,} pairs; one block of width {width} with 4 heads; cross entropy "
        "of a + b. Held-out accuracy comes late, with weight decay: 0.99 is solved.",
        partial(_sums, prime),
        partial(Transformer, prime + 1, 3, width, 4, 1, last=True, normalised=False),
        nn.CrossEntropyLoss(),
        ACCURACY,
        unit="sums",
        budget=BUDGET,
    )


def _sums(prime: int, data: Path | None) -> tuple[Batch, Batch]:
    pairs = torch.cartesian_prod(torch.arange(prime), torch.arange(prime))
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), prime)], 1)
    order = torch.randperm(len(pairs), generator=Generator().manual_seed(0))
    every = Batch(tokens[order], (pairs.sum(1) % prime)[order])
    train = int(SHARE * len(every))
    return every.take(slice(0, train)), every.take(slice(train, None))


def _windows(share: int, window: int, data: Path | None) -> tuple[Batch, Batch]:
    """Pieces of so many characters and the characters that follow each; held out are the last pieces."""
    train, aside = WINDOWS // share, HELDOUT_WINDOWS // share
    codes = encode(shakespeare(data, (train + aside) * window + 1))
    every = Batch(codes[:-1].view(-1, window), codes[1:].view(-1, window))
    return every.take(slice(0, train)), every.take(slice(train, None))


def _shakespeare(name: str, share: int, window: int, width: int, blocks: int) -> ExampleTask:
    layers = f"{blocks} block{'s' if blocks > 1 else ''} of width {width}"
    return ExampleTask(
        name,
        "Shakespeare, language model of characters",
        f"{WINDOWS // share:,} pieces of {window} characters of Shakespeare's plays; {layers} with 4 heads; cross "
        "entropy of the next character. Metric: share of characters that are guessed right.",
        partial(_windows, share, window),
        partial(Transformer, len(CHARACTERS), window, width, 4, blocks, last=False, normalised=True),
        nn.CrossEntropyLoss(),
        Metric("accuracy", lambda outputs, targets: outputs.argmax(1) == targets),
        unit="pieces",
        chunk=1024,
        budget=1000.0,
    )


TASKS = (
    modular_addition(59),
    modular_addition(97),
    _shakespeare("shakespeare-gpt", 1, WINDOW, 64, 2),
    _shakespeare("shakespeare-small", SMALL, WINDOW // 2, 32, 1),
)
