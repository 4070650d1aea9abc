"""The tasks that can be named on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from imstep.tasks.base import Metric, Task, TaskError
from imstep.tasks.convection import convection_model, convection_points, uniform
from imstep.tasks.data import digits, fashion_mnist
from imstep.tasks.equations import EQUATIONS
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import autoencoder, convolutional_classifier, mlp

__all__ = ["TASKS", "UnknownTaskError", "get_task"]

Loader = Callable[[Path | None], tuple[Batch, Batch]]


class UnknownTaskError(TaskError):
    """There is no task of that name; the message lists those that there are."""


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(k, classes), (k,) -> (k,): 1 where the largest logit is the target's, else 0."""
    return outputs.argmax(dim=1) == targets


def _reconstruction(load: Loader, data: Path | None) -> tuple[Batch, Batch]:
    """The same pictures as inputs and targets."""
    train, heldout = load(data)
    return Batch(train.inputs, train.inputs), Batch(heldout.inputs, heldout.inputs)


def _as_images(load: Loader, side: int, data: Path | None) -> tuple[Batch, Batch]:
    """Inputs of shape (k, side²) as (k, 1, side, side)."""
    train, heldout = load(data)
    return (
        Batch(train.inputs.reshape(-1, 1, side, side), train.targets),
        Batch(heldout.inputs.reshape(-1, 1, side, side), heldout.targets),
    )


ACCURACY = Metric("accuracy", _accuracy)

_ALL = (
    ExampleTask(
        "digits-autoencoder",
        "Handwritten digits, autoencoder",
        "1,500 digits (8x8, scikit-learn); MLP 64-128-64-12-64-128-64, tanh; mean squared error.",
        partial(_reconstruction, digits),
        partial(autoencoder, (64, 128, 64, 12)),
        nn.MSELoss(),
        image_shape=(8, 8),
    ),
    ExampleTask(
        "digits-mlp",
        "Handwritten digits, classification by an MLP",
        "1,500 digits (8x8, scikit-learn); tanh MLP 64-64-32-10; cross entropy.",
        digits,
        partial(mlp, (64, 64, 32, 10)),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (8, 8),
    ),
    ExampleTask(
        "digits-cnn",
        "Handwritten digits, classification by a CNN",
        "1,500 digits (8x8, scikit-learn); two 3x3 convolutions (8, 16 channels), GELU; cross entropy.",
        partial(_as_images, digits, 8),
        partial(convolutional_classifier, 8, (8, 16), 32),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (8, 8),
    ),
    ExampleTask(
        "fashion-autoencoder",
        "Fashion-MNIST, autoencoder",
        "60,000 pictures (28x28); MLP 784-128-32-128-784, tanh; mean squared error.",
        partial(_reconstruction, fashion_mnist),
        partial(autoencoder, (784, 128, 32)),
        nn.MSELoss(),
        image_shape=(28, 28),
    ),
    ExampleTask(
        "fashion-mlp",
        "Fashion-MNIST, classification by an MLP",
        "60,000 pictures (28x28); tanh MLP 784-128-64-10; cross entropy.",
        fashion_mnist,
        partial(mlp, (784, 128, 64, 10)),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (28, 28),
    ),
    ExampleTask(
        "fashion-cnn",
        "Fashion-MNIST, classification by a CNN",
        "60,000 pictures (28x28); two 3x3 convolutions (16, 32 channels), GELU; cross entropy.",
        partial(_as_images, fashion_mnist, 28),
        partial(convolutional_classifier, 28, (16, 32), 64),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (28, 28),
    ),
    ExampleTask(
        "convection-sobol",
        "Convection equation at fixed Sobol points",
        "u_t + 30 u_x = 0, u(x, 0) = sin x, periodic; 2,000 + 128 + 100 points; tanh MLP 2-50-50-50-50-1; sum of the "
        "three mean squares. Held out: the squared relative L2 error of u.",
        convection_points,
        convection_model,
        nn.MSELoss(),
    ),
    ExampleTask(
        "convection-random",
        "Convection equation at fixed random points",
        "As convection-sobol, at uniformly distributed random points in place of Sobol points.",
        partial(convection_points, draw=uniform),
        convection_model,
        nn.MSELoss(),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in (*_ALL, *EQUATIONS)}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownTaskError: there is none; names the nearest and lists all.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTaskError(f"there is no task {name!r}.{hint} Tasks: {', '.join(TASKS)}.")
