"""Block BFGS: an inverse Hessian from several exact products a step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import BlockBFGSPreconditioner, IdentityOperator, LinearOperator
from imstep.linalg.dots import dots, norm_in_range
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost


@dataclass(frozen=True)
class BlockBFGS(Preconditioning):
    """The BFGS formula with random blocks S and their exact products Y = A S, a block a step.

    See :class:`~imstep.linalg.BlockBFGSPreconditioner`. It begins as tr SᵀY / tr YᵀY times the identity, of the last
    block. A block along which curvature is not positive definite does not count.

    Args:
        columns: of a block, >= 1: products a step.
        blocks: how many count, >= 1; 2 ``columns`` vectors of memory for each, also in ``state_dict``.
        seed: of S; it does not touch the global random state.

    Source: Gower, Goldfarb and Richtárik, ICML 2016 (arXiv 1603.09649), with normal sketches and limited memory.
    """

    columns: int = 8
    blocks: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.columns < 1 or self.blocks < 1:
            raise ValueError(f"columns and blocks are at least 1, got {self.columns} and {self.blocks}.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _BlockBFGS(self, parameters)


class _BlockBFGS(Preconditioner):
    def __init__(self, kind: BlockBFGS, parameters: ParameterVector) -> None:
        self._columns, self._size = min(kind.columns, parameters.size), 1.0
        self._blocks: deque[tuple[Tensor, Tensor]] = deque(maxlen=kind.blocks)
        self._generator = torch.Generator(device=parameters.device).manual_seed(kind.seed)
        self._identity = IdentityOperator(parameters.size, dtype=parameters.dtype, device=parameters.device)

    def refresh(self, evidence: Evidence) -> Cost:
        gradient = evidence.point.gradient
        shape = len(gradient), self._columns
        sketch = torch.randn(shape, generator=self._generator, dtype=gradient.dtype, device=gradient.device)
        # Row by row, as they come back from a saved state: another layout is rounded otherwise.
        S = torch.linalg.qr(sketch)[0].contiguous()
        Y = evidence.curvature.matmat(S).contiguous()
        if len(BlockBFGSPreconditioner(self._identity, [(S, Y)], evidence.damping)) == 1:
            damped = Y + evidence.damping * S
            across, along = dots((S.flatten(), damped.flatten()), (damped.flatten(), damped.flatten()))
            self._size = across / along
            self._blocks.append((S, Y))
        elif not self._blocks:
            self._size = 1 / (norm_in_range(gradient) or 1.0)
        return Cost()

    def operator(self, damping: float) -> LinearOperator | None:
        return BlockBFGSPreconditioner(self._size * self._identity, list(self._blocks), damping)

    def state_dict(self) -> dict[str, Any]:
        blocks = [{"block": S, "images": Y} for S, Y in self._blocks]
        return {"blocks": blocks, "size": self._size, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "blocks" not in state:
            raise ValueError(OTHER_STATE)
        self._generator.set_state(state["generator"].cpu())
        self._size = state["size"]
        self._blocks.clear()
        self._blocks.extend((entry["block"], entry["images"]) for entry in state["blocks"])
