"""The built-in networks have the shapes their names promise."""

import pytest
import torch
from torch import nn

from imstep.tasks.models import autoencoder, convolutional_classifier, mlp


def test_autoencoder_mirrors_its_widths() -> None:
    model = autoencoder((64, 32, 8))
    widths = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert widths == [(64, 32), (32, 8), (8, 32), (32, 64)]
    outputs = model(torch.rand(5, 64))
    assert outputs.shape == (5, 64)
    assert outputs.min() > 0
    assert outputs.max() < 1
    # The code is linear: what follows the layer of width 8 is the decoder's first layer.
    code = next(i for i, m in enumerate(model) if isinstance(m, nn.Linear) and m.out_features == 8)
    assert isinstance(model[code + 1], nn.Linear)


def test_mlp_is_linear_at_its_end() -> None:
    model = mlp((6, 5, 3))
    assert isinstance(model[-1], nn.Linear)
    assert model(torch.rand(2, 6)).shape == (2, 3)
    assert all((m.bias == 0).all() for m in model if isinstance(m, nn.Linear))


@pytest.mark.parametrize(("side", "channels"), [(8, (4, 6)), (28, (3, 5)), (16, (2, 2, 2))])
def test_cnn_takes_its_side(side: int, channels: tuple[int, ...]) -> None:
    model = convolutional_classifier(side, channels, hidden=7)
    assert model(torch.rand(2, 1, side, side)).shape == (2, 10)
