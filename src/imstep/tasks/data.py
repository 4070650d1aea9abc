"""Where examples come from: scikit-learn's digits, and Fashion-MNIST from IDX files on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from imstep.tasks.base import DataNotFoundError, TaskError
from imstep.tasks.examples import Batch, Loader
from imstep.tasks.idx import read_idx

__all__ = ["digits", "fashion_mnist", "find_fashion_mnist", "idx_pictures", "reconstruction"]

DIGITS_HELDOUT = 297
_FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "heldout": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_LAYOUTS = ("", "fashion-mnist", "FashionMNIST/raw")
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def digits(data: Path | None = None) -> tuple[Batch, Batch]:
    """1,797 handwritten digits (8x8, 10 classes) that scikit-learn ships: 1,500 to train on, 297 held out.

    The split is one fixed permutation, so that results of different seeds are on the same data.

    Args:
        data: not used; digits come with scikit-learn.

    Returns:
        (train, heldout): inputs (k, 64) in [0, 1], targets (k,) int64.

    Raises:
        DataNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataNotFoundError(
            "the digits tasks read the data that scikit-learn ships. Install it: pip install 'imstep[tasks]'."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels).float() / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    examples = Batch(inputs[order], targets[order])
    train = len(inputs) - DIGITS_HELDOUT
    return examples.take(slice(0, train)), examples.take(slice(train, None))


def fashion_mnist(data: Path | None = None) -> tuple[Batch, Batch]:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 pictures of clothes to train on, 10,000 held out.

    Returns:
        (train, heldout): inputs (k, 784) in [0, 1], targets (k,) int64.

    Raises:
        DataNotFoundError: the files are not installed; says where it looked and how to get them.
        IdxError: a file is damaged.
        TaskError: the files are whole but are not 28x28 pictures with one label 0..9 each.
    """
    return idx_pictures("Fashion-MNIST", _LAYOUTS, data, _GET_FASHION)


def reconstruction(load: Loader, data: Path | None) -> tuple[Batch, Batch]:
    """The same pictures as inputs and targets."""
    train, heldout = load(data)
    return Batch(train.inputs, train.inputs), Batch(heldout.inputs, heldout.inputs)


def find_fashion_mnist(data: Path | None = None) -> Path:
    """The first folder that holds all four IDX files.

    Looked in: `data` (only there, when it is given), then `$IMSTEP_DATA`, the Debian package's folder, and
    torchvision's usual roots; in each also in `fashion-mnist/` and `FashionMNIST/raw/`.

    Raises:
        DataNotFoundError: there is none.
    """
    return _find_folder("Fashion-MNIST", _LAYOUTS, data, _GET_FASHION)


_GET_FASHION = (
    "  apt-get install dataset-fashion-mnist           (Debian, Ubuntu)\n"
    "  torchvision.datasets.FashionMNIST('data', download=True)   then  --data data\n"
    "  https://github.com/zalandoresearch/fashion-mnist           then  --data FOLDER or $IMSTEP_DATA"
)


def idx_pictures(what: str, layouts: tuple[str, ...], data: Path | None, ways: str) -> tuple[Batch, Batch]:
    """Train and held-out pictures (k, 784) with classes from the four IDX files of MNIST's names.

    Args:
        what: name of the data set.
        layouts: folders to look in, below `data` or the usual ones; in `data` also in itself.
        data: a folder, or None.
        ways: how to get it, for the error.
    """
    folder = _find_folder(what, layouts, data, ways)
    train, heldout = (_pictures(folder, names) for names in _FASHION_FILES.values())
    return train, heldout


def _find_folder(what: str, layouts: tuple[str, ...], data: Path | None, ways: str) -> Path:
    roots = [data] if data is not None else _usual_roots()
    below = layouts if data is None or "" in layouts else ("", *layouts)
    names = [name for pair in _FASHION_FILES.values() for name in pair]
    for folder in (root / layout for root in roots for layout in below):
        if all(_find(folder, name) is not None for name in names):
            return folder
    looked = "\n".join(f"  {root}" for root in roots)
    raise DataNotFoundError(
        f"{what} was not found. Looked for {names[0]}[.gz] and three more in the following, "
        f"and in {' and '.join(f'{layout}/' for layout in layouts if layout)} below:\n{looked}\n"
        f"Get it by one of:\n{ways}"
    )


def _usual_roots() -> list[Path]:
    configured = os.environ.get("IMSTEP_DATA")
    first = [Path(configured)] if configured else []
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [*first, _DEBIAN_FOLDER, Path("data"), cache / "torchvision", cache / "torch"]


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _pictures(folder: Path, names: tuple[str, str]) -> Batch:
    images_file, labels_file = (_find(folder, name) or folder / name for name in names)
    images, labels = read_idx(images_file, dimensions=3), read_idx(labels_file, dimensions=1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0:
        raise TaskError(
            f"{folder} holds no MNIST or Fashion-MNIST: {names[0]} holds {tuple(images.shape)}, "
            f"{names[1]} {tuple(labels.shape)}; expected (k, 28, 28) and (k,) with k >= 1."
        )
    if int(labels.max()) > 9 or int(labels.min()) < 0:
        raise TaskError(f"{labels_file} has label {int(labels.max())}; there are the classes 0 to 9.")
    return Batch(images.reshape(len(images), -1).float() / 255, labels.long())
