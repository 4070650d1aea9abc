"""Rows as TensorBoard scalars; needs the `tensorboard` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from imstep.runs.rows import CurvatureRow, LogRow, StepRow, TrainingError
from imstep.runs.runner import Trainer

__all__ = ["TensorBoardLog", "writer_class"]


def writer_class() -> type:
    """torch's SummaryWriter.

    Raises:
        TrainingError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "--tensorboard needs TensorBoard, which is not installed: pip install 'imstep[tensorboard]'."
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """An observer that writes scalars to `<run>/tensorboard`, for `tensorboard --logdir <run>`.

    Args:
        run: the run directory.
        step: of the checkpoint that the run goes on from; later scalars are dropped.

    Raises:
        TrainingError: TensorBoard is not installed.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        made = writer_class()
        # Made at the first row: before it there is no run directory.
        self._make = lambda: made(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer: Any = None

    def __call__(self, trainer: Trainer, row: LogRow) -> None:
        if self._writer is None:
            self._writer = self._make()
        values = row.to_dict()
        if isinstance(row, StepRow) and row.record is not None:
            values |= {f"record/{name}": value for name, value in row.record.items()}
        group = values.pop("kind")
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, row.step)
        if isinstance(row, CurvatureRow):
            self._histogram(row)

    def _histogram(self, row: CurvatureRow) -> None:
        """The density of the eigenvalues, as if so many had been counted about each point of its grid."""
        grid, values = (np.asarray(row.density[name], dtype=float) for name in ("grid", "values"))
        if not np.isfinite(values).all():
            return
        counts = values / values.sum()
        self._writer.add_histogram_raw(
            "curvature/density", min=grid[0], max=grid[-1], num=1.0, sum=float(counts @ grid),
            sum_squares=float(counts @ grid**2), bucket_limits=grid.tolist(), bucket_counts=counts.tolist(),
            global_step=row.step,
        )  # fmt: skip

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
