"""The IDX format of MNIST and its successors, plain or gzipped.

Layout (http://yann.lecun.com/exdb/mnist/): two zero bytes, a type code, the number of dimensions, one
big-endian uint32 per dimension, then the values, big-endian, last index fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from imstep.tasks.base import TaskError

__all__ = ["IdxError", "read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"


class IdxError(TaskError):
    """A file is not a readable IDX file; the message names the file and what is wrong with it."""


def read_idx(path: Path, dimensions: int | None = None) -> torch.Tensor:
    """Read one IDX file, gzipped or plain (decided by its first bytes, not by its name).

    Args:
        path: the file.
        dimensions: how many dimensions it must have (3 for images, 1 for labels); None accepts any.

    Returns:
        A tensor of the file's shape and type (uint8 for images and labels).

    Raises:
        IdxError: unreadable, damaged, truncated, too long, of unknown type, or of other dimensions.
    """
    raw = _content(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        raise IdxError(
            f"{path} is no IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}, "
            "expected 00 00 <type 08..0e> <dimensions>. Download it again or point --data to another folder."
        )
    count = raw[3]
    if dimensions is not None and count != dimensions:
        raise IdxError(f"{path} has {count} dimensions, expected {dimensions}: images and labels swapped?")
    offset = 4 + 4 * count
    if len(raw) < offset:
        raise IdxError(
            f"{path} is truncated in its header ({len(raw)} of {offset} bytes). Download it again."
        )
    shape = struct.unpack(f">{count}I", raw[4:offset])
    dtype = np.dtype(_TYPES[raw[2]])
    expected, found = math.prod(shape) * dtype.itemsize, len(raw) - offset
    if found != expected:
        what = "is truncated" if found < expected else "has bytes left over"
        raise IdxError(
            f"{path} {what}: its header says {'x'.join(map(str, shape))} ({expected} bytes), "
            f"it holds {found}. Download it again."
        )
    values = np.frombuffer(raw, dtype, offset=offset).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == _GZIP_MAGIC else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path} is a damaged or truncated gzip file ({error}). Download it again.") from error
    except OSError as error:
        raise IdxError(f"{path} cannot be read: {error.strerror or error}.") from error
