"""Fields that draw random numbers, by one forward pass against nested reverse mode with the same draws, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import pde
from tests.pde.nested import agrees, points

torch.manual_seed(0)
HIDDEN, OUT = (nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double(), nn.Linear(6, 2).double())
ATTENTION = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True).double()
GENERATOR = torch.Generator()
DRAWING = {
    "dropout": nn.Dropout(0.4),
    "alpha dropout": nn.AlphaDropout(0.4),
    "feature dropout": nn.FeatureAlphaDropout(0.4),
    "dropout of channels": nn.Dropout1d(0.4),
    "slopes": nn.RReLU(),
    "Gumbel's softmax": F.gumbel_softmax,
    "Gumbel's softmax, hard": lambda h: F.gumbel_softmax(h, hard=True),
    "dropout and its mask": lambda h: torch.native_dropout(h, 0.4, True)[0],
    "attention": lambda h: ATTENTION(h[:, None], h[:, None], h[:, None])[0][:, 0],
    "recurrent": nn.GRU(6, 6, num_layers=2, dropout=0.4, batch_first=True).double(),
    "draws by value": lambda h: h * torch.bernoulli(h.sigmoid()),
    "draws by a generator": lambda h: torch.normal(h, 1.0, generator=GENERATOR),
    "integers": lambda h: h * torch.randint_like(h, 5),
}


@pytest.mark.parametrize("name", DRAWING)
def test_all_derivatives_see_the_same_draws(name: str) -> None:
    function = DRAWING[name]

    def field(x: Tensor) -> Tensor:
        torch.manual_seed(5), GENERATOR.manual_seed(5)
        h = HIDDEN(x)
        return OUT((function(h[:, None])[0][:, 0] if isinstance(function, nn.GRU) else function(h)).square())

    agrees(field)
    states = []
    for evaluate in (field, lambda x: pde.laplacian(field, x)):
        evaluate(points())
        states.append((torch.get_rng_state(), GENERATOR.get_state()))
    assert all(map(torch.equal, *states))
