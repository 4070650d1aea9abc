"""Functions of a model's parameters, linearised where the model's curvature is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imstep.curvature import Jacobian, ParameterVector
from imstep.linalg import LinearOperator

Outputs = Callable[[], Tensor] | Jacobian
"""A closure that returns a tensor; or its Jacobian, which may be that of many batches."""


def parameters_of(curvature: LinearOperator) -> ParameterVector:
    """The parameters that a matrix belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    space = curvature.spaces[1]
    if not isinstance(space, ParameterVector):
        raise ValueError(
            f"this needs the curvature of a model's loss, and {curvature!r} belongs to no parameters. Pass a Hessian, "
            "Gauss-Newton or Fisher matrix, K-FAC, or what is made of one by sums and multiples."
        )
    return space


def linearised(outputs: Outputs, curvature: LinearOperator) -> Jacobian:
    """The Jacobian of the outputs in the parameters of the matrix.

    Raises:
        ValueError: a Jacobian was given that has other parameters.
    """
    parameters = parameters_of(curvature)
    made = outputs if isinstance(outputs, Jacobian) else Jacobian(outputs, parameters.tensors)
    same = len(made.parameters.tensors) == len(parameters.tensors)
    if not same or any(a is not b for a, b in zip(made.parameters.tensors, parameters.tensors, strict=True)):
        raise ValueError(
            "the Jacobian and the curvature matrix belong to different parameters. Build both with the same ones, in "
            "the same order."
        )
    return made


def rows_of(jacobian: Jacobian) -> Tensor:
    """Jᵀ as a block (n, m): one backward pass for each output."""
    return jacobian.T @ torch.eye(jacobian.shape[0], dtype=jacobian.dtype, device=jacobian.device)


def chosen(index: Tensor | Sequence[int], size: int, device: torch.device, name: str = "index") -> Tensor:
    """Positions among ``size``, (k,), from positions, which may count from the end, or from a mask (size,).

    Raises:
        ValueError: an argument, called ``name``, that is neither, or names a position that is not there.
    """
    given = torch.as_tensor(index, device=device).detach().reshape(-1)
    masked = given.dtype == torch.bool
    if given.numel() and not masked and (given.is_floating_point() or given.is_complex()):
        raise ValueError(f"{name} holds positions or is a mask, got numbers of {given.dtype}.")
    if masked and len(given) != size:
        raise ValueError(f"{name} is a mask of {len(given)} entries for {size} parameters.")
    own = given.nonzero()[:, 0] if masked else given.long()
    if bool(((own < -size) | (own >= size)).any()):
        raise ValueError(f"{name} names the position {int(own.abs().max())}, and there are {size} parameters, from 0.")
    return own % size
