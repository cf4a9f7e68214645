"""One suite for the transport between workers that are processes, and between workers that are threads."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from lightwork.errors import Disagreement, TeamError
from lightwork.store.mapped import create_store
from lightwork.store.private import PrivateStore
from lightwork.transport.base import Transport
from lightwork.transport.lock import FileLock
from lightwork.transport.mailboxes import BOX_BYTES, HostTransport
from lightwork.transport.signal import Signal

Job = Callable[[int, Transport], Any]

_SIGNAL_BYTES = 64
TIMEOUT = 20.0


def watch(deadline: float | None = None) -> Callable[[], TeamError | None]:
    """Return a watch that gives up, so that a test that fails ends."""
    end = time.monotonic() + TIMEOUT if deadline is None else deadline

    def look() -> TeamError | None:
        return TeamError("the others did not come") if time.monotonic() > end else None

    return look


def of_threads(num_workers: int, job: Job) -> list[Any]:
    """Return what `job(rank, transport)` returned or raised in each of so many threads."""
    store = PrivateStore(_SIGNAL_BYTES + HostTransport.num_bytes(num_workers))
    region = memoryview(store.buffer)[_SIGNAL_BYTES:]
    lock = threading.Lock()
    results: list[Any] = [None] * num_workers

    def work(rank: int) -> None:
        transport = HostTransport(rank, range(num_workers), region, lock, Signal(store.buffer, 0))
        try:
            results[rank] = job(rank, transport)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def of_processes(num_workers: int, job: Job) -> list[Any]:
    """Return what `job(rank, transport)` returned or raised in each of so many processes."""
    store = create_store("anonymous", _SIGNAL_BYTES + HostTransport.num_bytes(num_workers))
    pipes, pids = [], []
    for rank in range(num_workers):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            region = memoryview(store.buffer)[_SIGNAL_BYTES:]
            fd = store.fileno()
            transport = HostTransport(rank, range(num_workers), region, FileLock(fd or -1), Signal(store.buffer, 0))
            try:
                result = job(rank, transport)
            except Exception as error:
                result = error
            with os.fdopen(write, "wb") as file:
                pickle.dump(result, file)
            os._exit(0)
        os.close(write)
        pipes.append(read)
        pids.append(pid)
    results = []
    for read, pid in zip(pipes, pids, strict=True):
        with os.fdopen(read, "rb") as file:
            results.append(pickle.load(file))
        os.waitpid(pid, 0)
    return results


Team = Callable[[int, Job], list[Any]]
every_team = pytest.mark.parametrize("team", [of_threads, of_processes], ids=["threads", "processes"])


@every_team
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_everyone_receives_everyones_payload_by_rank(team: Team, num_workers: int) -> None:
    received = team(num_workers, lambda rank, t: t.exchange("names", f"rank {rank}".encode(), watch()))
    assert received == [[f"rank {rank}".encode() for rank in range(num_workers)]] * num_workers


@every_team
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 0, 0),
        (0, 5, 0),
        (BOX_BYTES, 0, 1),
        (BOX_BYTES, BOX_BYTES, BOX_BYTES),
        (BOX_BYTES + 1, BOX_BYTES - 1, 2 * BOX_BYTES),
        (1_000_000, 3, 300_000),
    ],
)
def test_payloads_may_be_empty_larger_than_a_box_and_of_different_sizes(team: Team, sizes: tuple[int, ...]) -> None:
    def payload(rank: int) -> bytes:
        return bytes((index * 7 + rank) % 251 for index in range(sizes[rank] % 1000)).ljust(sizes[rank], b"%d" % rank)

    def job(rank: int, transport: Transport) -> tuple[bool, list[bytes]]:
        received = transport.exchange("payloads", payload(rank), watch())
        after = transport.exchange("the next", b"%d" % rank, watch())
        return received == [payload(other) for other in range(3)], after

    assert team(3, job) == [(True, [b"0", b"1", b"2"])] * 3


@every_team
def test_many_exchanges_in_a_row_do_not_mix(team: Team) -> None:
    def job(rank: int, transport: Transport) -> int:
        for number in range(300):
            received = transport.exchange(f"number {number}", b"%d %d" % (number, rank), watch())
            if received != [b"%d %d" % (number, other) for other in range(3)]:
                return number
        return -1

    assert team(3, job) == [-1, -1, -1]


@every_team
def test_nobody_leaves_before_all_have_entered(team: Team) -> None:
    def job(rank: int, transport: Transport) -> tuple[float, float]:
        time.sleep(0.1 * rank)
        entered = time.monotonic()
        transport.exchange("barrier", b"", watch())
        return entered, time.monotonic()

    times = team(3, job)
    assert max(entered for entered, _ in times) <= min(left for _, left in times)


@every_team
def test_different_calls_are_a_disagreement_that_names_both(team: Team) -> None:
    results = team(2, lambda rank, t: t.exchange("save" if rank == 0 else "digest", b"", watch()))
    for rank, (ours, theirs) in enumerate([("save", "digest"), ("digest", "save")]):
        assert isinstance(results[rank], Disagreement)
        assert f"rank {rank} calls {ours} while rank {1 - rank} calls {theirs}." in str(results[rank])


@every_team
def test_a_long_name_or_one_with_letters_of_all_kinds_is_a_name_as_any_other(team: Team) -> None:
    for name in ("x" * 200, "évaluer " * 6, "名" * 30):
        assert team(2, lambda rank, t, name=name: t.exchange(name, b"%d" % rank, watch())) == [[b"0", b"1"]] * 2


@every_team
def test_the_watch_is_asked_while_others_are_missing_and_what_it_returns_ends_the_wait(team: Team) -> None:
    def job(rank: int, transport: Transport) -> object:
        return None if rank else transport.exchange("alone", b"", watch(time.monotonic() + 0.3))

    assert str(team(2, job)[0]) == "the others did not come"


def test_a_disagreement_names_ranks_of_the_whole_team() -> None:
    store = PrivateStore(_SIGNAL_BYTES + HostTransport.num_bytes(2))
    region, lock = memoryview(store.buffer)[_SIGNAL_BYTES:], threading.Lock()
    a, b = (HostTransport(local, (4, 5), region, lock, Signal(store.buffer, 0)) for local in (0, 1))
    with pytest.raises(TeamError):
        b.exchange("digest", b"", lambda: TeamError("nobody came"))
    with pytest.raises(Disagreement, match="rank 4 calls save while rank 5 calls digest"):
        a.exchange("save", b"", watch())


def test_a_signal_wakes_who_waits_and_gives_up_in_time() -> None:
    store = PrivateStore(64)
    waiter, notifier = Signal(store.buffer, 0), Signal(store.buffer, 0)
    start = time.monotonic()
    assert not waiter.wait_for_change(waiter.value, 0.05)
    assert 0.04 < time.monotonic() - start < 2.0
    seen = waiter.value
    threading.Timer(0.05, notifier.notify).start()
    start = time.monotonic()
    assert waiter.wait_for_change(seen, 10.0)
    assert time.monotonic() - start < 5.0
    assert waiter.wait_for_change(seen, 10.0), "a change before the wait is not missed"


def test_the_lock_excludes_processes() -> None:
    store = create_store("anonymous", 4096)
    fd = store.fileno()
    assert fd is not None
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            lock = FileLock(fd)
            for _ in range(300):
                with lock:
                    value = int.from_bytes(store.buffer[8:16], "little")
                    if value % 20 == 0:
                        os.sched_yield()
                    store.buffer[8:16] = (value + 1).to_bytes(8, "little")
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert int.from_bytes(store.buffer[8:16], "little") == 900


def test_the_lock_dies_with_its_holder_also_if_the_holder_had_a_child() -> None:
    store = create_store("anonymous", 4096)
    fd = store.fileno()
    assert fd is not None
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        FileLock(fd).__enter__()
        if os.fork() == 0:  # such as a loading worker, which lives on for a while
            os.write(write, b"%d" % os.getpid())
            time.sleep(20)
            os._exit(0)
        time.sleep(20)
        os._exit(0)
    child = int(os.read(read, 20))
    taken = threading.Event()

    def take() -> None:
        with FileLock(fd):
            taken.set()

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    assert not taken.wait(0.1), "it is held"
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert taken.wait(5.0), "and released by the kernel"
    taker.join(5.0)  # it holds the store's descriptor
    os.kill(child, signal.SIGKILL)
    os.close(read)
    os.close(write)
