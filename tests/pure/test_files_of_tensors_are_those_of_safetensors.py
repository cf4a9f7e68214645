"""A file written piece by piece is read by the safetensors package, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightwork.checkpoint.tensors import _DTYPES, TensorFile, TensorWriter, in_file_order
from lightwork.errors import CheckpointError
from lightwork.state.items import Plain

TENSORS = {
    **{f"{dtype}".removeprefix("torch."): (torch.arange(35) % 2).view(5, 7).to(dtype) for dtype in _DTYPES.values()},
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    'a name with "quotes" and ünïcode': torch.randn(3),
}


def write(path: Path, tensors: dict[str, torch.Tensor], piece: int) -> None:
    items = in_file_order([Plain(name, tensor) for name, tensor in tensors.items()])
    writer = TensorWriter(path, items)
    for item in items:
        for start in range(0, item.numel, piece):
            writer.write(item.read(start, min(start + piece, item.numel)))
    writer.close()


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = one.dtype == other.dtype and one.shape == other.shape
    return bits and one.reshape(-1).view(torch.uint8).tolist() == other.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_what_is_written_here_is_read_there(piece: int, tmp_path: Path) -> None:
    write(tmp_path / "file", TENSORS, piece)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(equal(found[name], TENSORS[name]) for name in TENSORS)


def test_what_is_written_there_is_read_here(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    found = TensorFile(tmp_path / "file", {"again": "number"})
    assert set(found) == {*TENSORS, "again"}
    assert all(equal(found[name], TENSORS[name]) for name in TENSORS)
    assert found["again"].item() == 3.5
    assert found.read("float32", 3, 9).tolist() == TENSORS["float32"].view(-1)[3:9].tolist()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:5],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: (10**12).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b"[0,12]", b"[4,12]"),
        lambda data: data.replace(b'"shape":[3]', b'"shape":[9]'),
        lambda data: data.replace(b'"shape":[3]', b'"shape":"3"'),
    ],
)
def test_a_file_that_can_not_be_is_refused(damage: object, tmp_path: Path) -> None:
    write(tmp_path / "file", {"x": torch.randn(3)}, 3)
    data = (tmp_path / "file").read_bytes()
    damaged = damage(data)  # type: ignore[operator]
    assert damaged != data
    (tmp_path / "file").write_bytes(damaged)
    with pytest.raises((ValueError, KeyError, TypeError)):
        TensorFile(tmp_path / "file")


def test_a_type_that_no_file_can_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x is of torch\.complex128"):
        write(tmp_path / "file", {"x": torch.zeros(3, dtype=torch.complex128)}, 3)
