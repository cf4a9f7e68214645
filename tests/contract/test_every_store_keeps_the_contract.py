"""One suite for every store: anonymous memory, an unlinked temporary file, and the private one beside them."""

from __future__ import annotations

import gc
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lightwork.errors import MemoryFull, TeamError
from lightwork.store import mapped
from lightwork.store.base import Store
from lightwork.store.mapped import check_room, create_store, open_store
from lightwork.store.private import PrivateStore

Make = Callable[[int], Store[mmap.mmap]]

MAPPED: dict[str, Make] = {
    "anonymous": lambda num_bytes: create_store("anonymous", num_bytes),
    "file": lambda num_bytes: create_store("file", num_bytes),
}
STORES: dict[str, Make] = {**MAPPED, "private": PrivateStore}

every_store = pytest.mark.parametrize("make", STORES.values(), ids=STORES)
every_mapped = pytest.mark.parametrize("make", MAPPED.values(), ids=MAPPED)


def in_child(function: Callable[[], None]) -> int:
    """Return the exit status of a forked process that calls `function`; 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@every_store
@pytest.mark.parametrize("num_bytes", [1, 4096, 3 * 4096 + 5])
def test_it_has_the_size_asked_for_and_is_zero(make: Make, num_bytes: int) -> None:
    store = make(num_bytes)
    assert store.num_bytes == len(store.buffer) == num_bytes
    assert bytes(store.buffer) == bytes(num_bytes)
    assert store.buffer is store.buffer


@every_store
def test_what_was_written_stays_also_once_it_is_published(make: Make) -> None:
    store = make(8192)
    store.buffer[4000:4100] = bytes(range(100))
    store.published()
    store.published()
    assert store.buffer[4000:4100] == bytes(range(100))
    assert store.buffer[:4000] == bytes(4000)


@every_store
def test_views_outlive_the_store(make: Make) -> None:
    store = make(4096)
    view = memoryview(store.buffer)
    del store
    gc.collect()
    view[7] = 9
    assert view[7] == 9


@every_store
def test_it_takes_up_room_only_where_it_was_written(make: Make) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    store = make(2**30)
    store.buffer[2**29] = 1
    assert store.buffer[2**29] == 1
    assert resident() - before < 2**26


@every_mapped
def test_another_process_sees_the_same_bytes_through_its_address(make: Make) -> None:
    store = make(10_000)
    store.buffer[10] = 1

    def other() -> None:
        opened = open_store(store.address())
        if opened.num_bytes != 10_000 or opened.buffer[10] != 1:
            raise ValueError("it sees other bytes")
        opened.buffer[9_999] = 42

    assert in_child(other) == 0
    assert store.buffer[9_999] == 42
    store.published()


@every_mapped
def test_a_process_that_opened_it_keeps_it_when_its_creator_has_died(make: Make) -> None:
    read, write = os.pipe()

    def creator() -> None:
        store = make(4096)
        store.buffer[:5] = b"alive"
        os.write(write, store.address().encode())
        os.read(hold, 1)

    hold, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        creator()
        os._exit(0)
    opened = open_store(os.read(read, 1000).decode())
    os.write(release, b"x")
    os.waitpid(pid, 0)
    assert opened.buffer[:5] == b"alive"
    opened.buffer[:5] = b"still"
    assert opened.buffer[:5] == b"still"
    for fd in (read, write, hold, release):
        os.close(fd)


@every_store
def test_nothing_has_a_name_while_it_lives_and_nothing_is_left_of_a_process_that_was_killed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_shm = set(os.listdir("/dev/shm"))
    store = make(4096)
    store.buffer[0] = 1
    assert os.listdir(tmp_path) == []

    def killed() -> None:
        make(4096).buffer[0] = 1
        os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert os.listdir(tmp_path) == []
    assert set(os.listdir("/dev/shm")) - in_shm == set()


@every_mapped
def test_its_descriptor_is_closed_with_it(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = make(4096)
    assert store.fileno() is not None
    del store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_memory_files_of_processes_the_file_has_a_name_until_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    is_dir = Path.is_dir
    monkeypatch.setattr(mapped.Path, "is_dir", lambda path: not str(path).startswith("/proc") and is_dir(path))
    store = create_store("file", 4096)
    assert store.address() == f"4096:{next(tmp_path.iterdir())}"
    opened = open_store(store.address())
    opened.buffer[3] = 3
    assert store.buffer[3] == 3
    store.published()
    assert list(tmp_path.iterdir()) == []
    assert store.buffer[3] == 3


@pytest.mark.parametrize("address", ["4096:/nowhere/lightwork-all", "4096:/proc/1/fd/99999"])
def test_memory_that_is_not_there_is_named(address: str) -> None:
    with pytest.raises(TeamError, match=r"can not be opened .*one host"):
        open_store(address)


def test_the_private_one_has_no_descriptor_to_lock() -> None:
    assert PrivateStore(10).fileno() is None


def test_too_little_room_is_refused_with_what_it_is_for() -> None:
    check_room("anonymous", 1000, 1000, "weights 1000 B")
    with pytest.raises(MemoryFull, match=r"needs 2 GiB of shared memory, and 1 GiB are left \(weights 2 GiB\)"):
        check_room("anonymous", 2**31, 2**30, "weights 2 GiB")
    with pytest.raises(MemoryFull, match="of shared room in "):
        check_room("file", 2**62, 2**63, "weights, many")


@pytest.mark.parametrize("make", [lambda path: path, lambda path: f"/proc/{os.getpid()}/fd/{os.open(path, os.O_RDWR)}"])
def test_only_the_memory_of_a_worker_is_opened(make: Callable[[Path], object], tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_bytes(b"x" * 4096)
    with pytest.raises(TeamError, match=r"is no memory of a worker|is another file than the memory of a worker"):
        open_store(f"4096:{make(file)}")
