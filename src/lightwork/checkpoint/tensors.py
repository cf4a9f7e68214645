"""Files of named tensors in the format of safetensors, written and read piece by piece.

    8 bytes     the length of the header, little-endian
    header      JSON: of each tensor its type, shape, and the first byte and end of its data
    data        of one tensor after the other, without gaps

(The safetensors package writes a file of tensors that are all in memory, and reads one by mapping all of it.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, final

import torch

from lightwork.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: What the header's length is rounded up to, so that data is aligned; its longest, as safetensors has it.
_ALIGNMENT, _LONGEST_HEADER = 8, 100_000_000

#: Bytes of a file that are read at a time where all of it is.
_READ_AT_ONCE = 1 << 20

#: Key of the header that names no tensor.
_METADATA = "__metadata__"


class Named(Protocol):
    """A tensor to come: its name, type and shape."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


_N = TypeVar("_N", bound=Named)


def in_file_order(tensors: Iterable[_N]) -> list[_N]:
    """Return tensors in the order of a file: the widest types first, so that each is aligned."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


@final
class TensorWriter:
    """Writes a file, whose tensors are known before and come one after the other, each in any number of pieces.

    Owns: the file, until `close` or `abandon`.
    """

    def __init__(self, path: Path, tensors: Iterable[Named], *, hashed: bool = True) -> None:
        """Unless `hashed`, its SHA-256 is left to another time.

        Raises: OSError; CheckpointError for a type that the format does not have.
        """
        header: dict[str, object] = {_METADATA: {"format": "pt"}}
        at = 0
        for tensor in tensors:
            if tensor.dtype not in _NAMES:
                raise CheckpointError(
                    f"{tensor.name} is of {tensor.dtype}, which a checkpoint can not hold. Keep it as another type."
                )
            end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
            header[tensor.name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._path = path
        self._left = at  # bytes of data that are still to come
        self._hash = hashlib.sha256()
        self._is_hashed = hashed
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._put(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self.abandon()
            raise

    def write(self, values: torch.Tensor) -> None:
        """Write the next elements, flat, contiguous and on the host."""
        data = values.view(torch.uint8).numpy().data
        self._left -= len(data)
        self._put(data)

    def close(self) -> None:
        """Return when the file is on the disk."""
        if self._left:
            raise ValueError(f"{self._path} lacks {self._left} bytes")
        os.fsync(self._fd)
        self.abandon()

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal digits."""
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _put(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        if self._is_hashed:
            self._hash.update(rest)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


class _Place(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  #: in bytes, from the start of the file
    num_bytes: int


def sha256_of(path: Path) -> str:
    """Return the hash of a whole file, in hexadecimal digits. Reads it piece by piece."""
    found = hashlib.sha256()
    room = memoryview(bytearray(_READ_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(room):
            found.update(room[:count])
    return found.hexdigest()


@final
class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a file by name, each read when it is asked for; of the file as it was when it was opened.

    Owns: a descriptor of the file.
    """

    def __init__(self, path: Path, aliases: Mapping[str, str] | None = None) -> None:
        """`aliases` are further names of tensors.

        Raises: OSError; ValueError for a file of another format or length.
        """
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._places = _read_header(self._fd)
        self._places |= {alias: self._places[name] for alias, name in (aliases or {}).items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._places[name]
        return self.read(name, 0, math.prod(place.shape)).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._places[name].shape

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return elements `start` to `end` of a tensor, flat.

        Raises: CheckpointError when the file can not be read.
        """
        place = self._places[name]
        values = torch.empty(end - start, dtype=place.dtype)
        rest = values.view(torch.uint8).numpy().data
        at = place.offset + start * place.dtype.itemsize
        while rest:
            try:
                count = os.preadv(self._fd, [rest], at)
            except OSError as error:
                raise CheckpointError(
                    f"{name} could not be read from {self._path} ({error}). Use an older checkpoint."
                ) from error
            if not count:
                raise CheckpointError(f"{self._path} ends within {name}. It is damaged: use an older checkpoint.")
            rest, at = rest[count:], at + count
        return values


def _read_header(fd: int) -> dict[str, _Place]:
    """Return where each tensor lies.

    Raises: ValueError when that can not be.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a file of {size} bytes with a header of {length}")
    places: dict[str, _Place] = {}
    for name, entry in json.loads(os.pread(fd, length, 8)).items():
        if name == _METADATA:
            continue
        dtype, shape, (first, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if (
            not all(isinstance(n, int) and n >= 0 for n in shape)
            or first < 0
            or end - first != math.prod(shape) * dtype.itemsize
        ):
            raise ValueError(f"{name} of {entry['dtype']} {shape} lies in {end - first} bytes")
        places[name] = _Place(dtype, shape, 8 + length + first, end - first)
    needed = max((place.offset + place.num_bytes for place in places.values()), default=8 + length)
    if size != needed:
        raise ValueError(f"a file of {size} bytes, where {needed} are expected")
    return places
