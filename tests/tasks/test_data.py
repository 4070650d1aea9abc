"""IDX files are read as NumPy reads them, refused when damaged, and found where people keep them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from imstep.tasks import DataNotFoundError, TaskError, get_task
from imstep.tasks import data as data_module
from imstep.tasks.idx import IdxError, read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray, code: str = "u1") -> bytes:
    header = bytes([0, 0, CODES[code], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(f">{code}").tobytes()


def write_fashion(
    folder: Path, *, suffix: str = "", train: int = 20, heldout: int = 5, side: int = 28
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", heldout)):
        pictures = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", np.arange(count) % 10)):
            raw = idx_bytes(array)
            content = gzip.compress(raw) if suffix == ".gz" else raw
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(content)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without Fashion-MNIST."""
    monkeypatch.setattr(data_module, "_DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("IMSTEP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_round_trip(tmp_path: Path, code: str, compressed: bool) -> None:
    array = np.arange(-12, 12).reshape(2, 3, 4).astype(code)
    raw = idx_bytes(array, code)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    tensor = read_idx(path, dimensions=3)
    assert np.array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == np.dtype(code)


WHOLE = idx_bytes(np.ones((3, 4, 4)))
DAMAGED = {
    "empty": (b"", "is no IDX file: it starts with nothing"),
    "foreign": (b"\x89PNG....", "is no IDX file: it starts with 89 50 4e 47"),
    "unknown type": (b"\0\0\x07\x01" + WHOLE[4:], "is no IDX file"),
    "short header": (WHOLE[:9], "is truncated in its header"),
    "short": (WHOLE[:-1], r"is truncated: its header says 3x4x4 \(48 bytes\), it holds 47"),
    "long": (WHOLE + b"1", "has bytes left over"),
    "short gzip": (gzip.compress(WHOLE)[:-12], "damaged or truncated gzip"),
    "changed gzip": (gzip.compress(WHOLE)[:-8] + b"12345678", "damaged or truncated gzip"),
    "labels for images": (idx_bytes(np.ones(4)), "has 1 dimensions, expected 3"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(IdxError, match=message) as caught:
        read_idx(path, dimensions=3)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_idx_error(tmp_path: Path) -> None:
    with pytest.raises(IdxError, match="No such file"):
        read_idx(tmp_path / "absent")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", ["", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("how", ["--data", "$IMSTEP_DATA", "debian"])
def test_fashion_is_found(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, layout: str, how: str
) -> None:
    root = nowhere / ("debian" if how == "debian" else "mine")
    write_fashion(root / layout, suffix=suffix)
    if how == "$IMSTEP_DATA":
        monkeypatch.setenv("IMSTEP_DATA", str(root))
    problem = get_task("fashion-mlp").build(data=root if how == "--data" else None)
    assert problem.train.inputs.shape == (20, 784)
    assert problem.train.targets.dtype == torch.int64
    assert 0 <= problem.train.inputs.min() < problem.train.inputs.max() <= 1


@pytest.mark.parametrize("name", ["fashion-autoencoder", "fashion-mlp", "fashion-cnn"])
def test_fashion_tasks_train(nowhere: Path, name: str) -> None:
    write_fashion(nowhere / "data")
    problem = get_task(name).build()
    problem.closure(problem.train)().backward()
    assert all(p.grad is not None for p in problem.parameters)


def test_absent_fashion_says_how_to_get_it(nowhere: Path) -> None:
    (nowhere / "debian").mkdir()
    with pytest.raises(DataNotFoundError) as caught:
        get_task("fashion-mlp").build()
    for hint in (
        "apt-get install dataset-fashion-mnist",
        "torchvision",
        "IMSTEP_DATA",
        str(nowhere / "debian"),
    ):
        assert hint in str(caught.value)


def test_a_given_folder_is_the_only_one(nowhere: Path) -> None:
    write_fashion(nowhere / "debian")
    with pytest.raises(DataNotFoundError, match="elsewhere"):
        get_task("fashion-mlp").build(data=nowhere / "elsewhere")


def test_other_data_under_the_names_is_refused(nowhere: Path) -> None:
    write_fashion(nowhere / "data", side=27)
    with pytest.raises(TaskError, match=r"holds no MNIST or Fashion-MNIST: .* holds \(20, 27, 27\)"):
        get_task("fashion-mlp").build()
    write_fashion(nowhere / "data")
    (nowhere / "data" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(20)))
    with pytest.raises(TaskError, match="has label 19"):
        get_task("fashion-mlp").build()
