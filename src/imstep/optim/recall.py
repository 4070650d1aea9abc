"""Rows of earlier steps' Jacobians, at whose points a step changes as little as may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import RowMatrix

_SAME = 1e-3
"""Of the loss: where it is as near as that to where the last step ended, the points are those of the last step."""


@dataclass(frozen=True)
class EarlierDraws:
    """Steps keep the residuals at earlier steps' points as they are, as far as that costs little.

        min over d of ‖ρ(w + d)‖² + Σ_j β^j ‖J_j d‖² + λ‖d‖²,   J_j the Jacobian of j steps before

    For points that are drawn anew for each step: without these terms a step fits its own at the expense of all others.
    Nothing is evaluated at the earlier points again. Whether points are new is told by the loss: where it is that with
    which the last step ended, they are not. Then there are no such terms, earlier steps are forgotten, and nothing is
    kept: steps at points that stay are as without this.

    Args:
        decay: β, in (0, 1).
        rows: of earlier Jacobians that are kept at most, the newest, >= 1; where there are fewer parameters than that,
            or than residuals, a triangle that stands for those of all steps. Of steps with more residuals none is kept.

    Cost: J is written out, and has up to so many rows more, N n numbers each; for n parameters and the triangle,
        2 (N + n) n² operations. No evaluation.

    Source: the Gramian Σ_j β^j J_jᵀJ_j averaged over steps is from ENGD (Müller and Zeinhofer, arXiv 2302.13163) as
        Dangel et al. (arXiv 2405.15603) run it; keeping it as rows beside those of the step, which needs no n by n
        matrix, is our choice; so are the defaults, which ``benchmarks/redrawn_points`` measures.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> EarlierDraws(decay=0.25).after(DenseRows(torch.ones(2, 3)), None)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    decay: float = 0.5
    rows: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay, the weight of the last step's points, lies in (0, 1), got {self.decay}.")
        if self.rows < 1:
            raise ValueError(f"rows is at least 1, got {self.rows}.")

    def after(self, jacobian: RowMatrix, earlier: Tensor | None) -> Tensor | None:
        """What the next step keeps, (m, n): the rows J of this one, (N, n), and those it kept, weighted."""
        count, size = jacobian.shape
        triangular = size <= max(self.rows, count)
        if count > self.rows and not triangular:
            return None
        rows = jacobian.condensed()[0].written_out()
        kept = rows if earlier is None else torch.cat([rows, earlier])
        kept = math.sqrt(self.decay) * kept
        if triangular and len(kept) > size:
            kept = torch.linalg.qr(kept, mode="r").R
        return (kept if triangular else kept[: self.rows]).contiguous()  # as it comes back from a file


def new_points(loss: float, last: float) -> bool:
    """Whether a step has other points than the last one: its loss is another than that where the last one has ended.

    Of the first step, whose ``last`` is nan, it is not known.
    """
    return abs(loss - last) > _SAME * abs(loss)
