"""Connections between hosts: what is sent arrives, and an end is heard of at once by everyone."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from lightwork.errors import RankLost
from lightwork.transport import connection
from lightwork.transport.base import FIRST_TAG
from lightwork.transport.sockets import SocketCarrier
from tests.loopback import connected, over_loopback

LARGE = 32 * 1024 * 1024


@pytest.fixture
def two() -> Iterator[tuple[SocketCarrier, SocketCarrier]]:
    ends = connected(2)
    carriers = SocketCarrier(0, [0, 10], ends[0]), SocketCarrier(1, [0, 10], ends[1])
    yield carriers
    for carrier in carriers:
        carrier.close()


def bytes_of(value: int, size: int) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def seconds_until_lost(wait: Callable[[], object], match: str) -> float:
    start = time.monotonic()
    with pytest.raises(RankLost, match=match):
        wait()
    return time.monotonic() - start


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_what_is_sent_before_it_is_asked_for_is_kept_in_order(two: tuple[SocketCarrier, SocketCarrier]) -> None:
    for value, size, tag in ((1, 10, 5), (2, LARGE, 5), (3, 10, 6), (4, 0, 5), (5, 10, 5)):
        two[0].send(1, bytes_of(value, size), tag)
    two[0].send(1, bytes_of(9, 1), 7).wait()  # small ones go past no large one
    for value, size, tag in ((3, 10, 6), (1, 10, 5), (2, LARGE, 5), (4, 0, 5), (5, 10, 5)):
        into = torch.zeros(size, dtype=torch.uint8)
        two[1].receive(0, into, tag).wait()
        assert torch.equal(into, bytes_of(value, size))


def test_more_than_a_bound_is_not_kept_but_left_in_the_network_until_it_is_asked_for(
    two: tuple[SocketCarrier, SocketCarrier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_MOST_KEPT", 1024 * 1024)
    sent = [two[0].send(1, bytes_of(value, LARGE), 5) for value in (1, 2)]
    time.sleep(0.3)
    assert not two[1]._waiting.connections[0]._num_kept
    for value in (1, 2):
        into = torch.zeros(LARGE, dtype=torch.uint8)
        two[1].receive(0, into, 5).wait()
        assert torch.equal(into, bytes_of(value, LARGE))
    for one in sent:
        one.wait()


def test_large_tensors_go_both_ways_at_once_whoever_waits_first(two: tuple[SocketCarrier, SocketCarrier]) -> None:
    results = []

    def swap(own: int) -> None:
        into = torch.zeros(LARGE, dtype=torch.uint8)
        sent = two[own].send(1 - own, bytes_of(own + 1, LARGE), 5)
        sent.wait()  # neither has asked for the other's
        two[own].receive(1 - own, into, 5).wait()
        results.append(torch.equal(into, bytes_of(2 - own, LARGE)))

    threads = [threading.Thread(target=swap, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [True, True]


def test_what_was_sent_arrives_though_its_sender_closes(two: tuple[SocketCarrier, SocketCarrier]) -> None:
    two[1].send(0, bytes_of(1, 1), 9).wait()  # which nobody reads: a close would then reset the connection
    two[0].send(1, bytes_of(7, LARGE), 5)
    threading.Thread(target=two[0].close).start()
    time.sleep(0.2)
    into = torch.zeros(LARGE, dtype=torch.uint8)
    two[1].receive(0, into, 5).wait()
    assert torch.equal(into, bytes_of(7, LARGE))
    assert seconds_until_lost(two[1].receive(0, into, 5).wait, "rank 10 lost its connection to rank 0") < 1


def test_another_size_than_is_expected_ends_the_connection_by_name(two: tuple[SocketCarrier, SocketCarrier]) -> None:
    waiting = two[1].receive(0, torch.zeros(3, dtype=torch.uint8), 5)
    two[0].send(1, bytes_of(1, 4), 5)
    seconds_until_lost(waiting.wait, "it sends 4 bytes where 3 are expected")
    seconds_until_lost(two[1].receive(0, torch.zeros(3), 6).wait, "it sends 4 bytes where 3 are expected")


def test_a_length_that_nobody_can_hold_takes_no_memory() -> None:
    here, there = over_loopback()
    carrier = SocketCarrier(0, [0, 10], {1: here})
    there.sendall(struct.pack("<qQ", FIRST_TAG, 2**62))
    time.sleep(0.2)
    seconds_until_lost(carrier.receive(1, torch.zeros(4), FIRST_TAG).wait, "it sends 4611686018427387904 bytes")
    carrier.close()
    there.close()


# --- its end ----------------------------------------------------------------------------------------------------------


def test_closing_lets_go_whoever_waits_here(two: tuple[SocketCarrier, SocketCarrier]) -> None:
    errors: list[str] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except RankLost as error:
            errors.append(str(error))

    into = torch.zeros(4)
    calls: list[Callable[[], object]] = [
        two[0].receive(1, into, 5).wait,
        lambda: two[0].receive_from_any(into, 6),
        two[0].receive(1, into, 7).wait,
    ]
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    two[0].close()
    for thread in threads:
        thread.join(2)
    assert errors == ["rank 0 has closed its connections: its run was ended."] * 3
    seconds_until_lost(two[0].send(1, into, 5).wait, "has closed its connections")
    seconds_until_lost(lambda: two[0].receive_from_any(into, 5), "has closed its connections")


def test_a_host_that_leaves_does_not_end_the_wait_for_any_of_the_others() -> None:
    ends = connected(3)
    carriers = [SocketCarrier(host, [0, 10, 20], ends[host]) for host in range(3)]
    into, sources = torch.zeros(1, dtype=torch.uint8), []
    waiting = threading.Thread(target=lambda: sources.append(carriers[0].receive_from_any(into, 5)))
    waiting.start()
    carriers[1].close()
    time.sleep(0.1)
    carriers[2].send(0, bytes_of(3, 1), 5).wait()
    waiting.join(2)
    assert (sources, int(into)) == ([2], 3)
    carriers[2].close()
    seconds_until_lost(lambda: carriers[0].receive_from_any(into, 5), "rank 0 lost its connection")
    carriers[0].close()


def test_a_host_of_which_nothing_comes_is_lost_and_one_that_only_runs_is_not() -> None:
    ends, (here, there) = connected(2), over_loopback()
    ends[0][2] = here
    first = SocketCarrier(0, [0, 10, 20], ends[0], silence=0.2, patience=0.6)
    second = SocketCarrier(1, [0, 10, 20], ends[1], silence=0.2, patience=0.6)
    waiting = first.receive(1, torch.zeros(1), 5)
    silent = first.receive(2, torch.zeros(1), 5)
    lost_after = seconds_until_lost(silent.wait, r"lost its connection to rank 20 \(nothing came from it for 0\.[67]")
    assert 0.3 < lost_after < 2
    time.sleep(1.2)  # twice as long; it has nothing to say
    second.send(0, torch.ones(1), 5).wait()
    waiting.wait()
    for one in (first, second):
        one.close()
    there.close()


# --- processes --------------------------------------------------------------------------------------------------------

_EXCHANGES = """
import os, socket, sys, threading, time
import torch
from lightwork.transport.sockets import SocketCarrier
host, size, does, patience = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
connected = {int(other): socket.socket(fileno=int(fd)) for other, fd in (pair.split(":") for pair in sys.argv[5:])}
carrier = SocketCarrier(host, [0, 1, 2], connected, silence=1.0, patience=patience)
if does == "forks" and os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print("here", flush=True)
own, into = torch.ones(size), [torch.zeros(size) for _ in range(3)]
turn = 0
while True:
    turn += 1
    if does == "thinks" and turn == 10:
        print("thought", flush=True)
        if host == 1:
            start = time.time()
            sum(range(250_000_000))  # one call, in which no other thread of this process comes to its turn
            assert time.time() - start > 1.5
    if does == "thinks" and turn == 20:
        print("went on", flush=True)
        time.sleep(30)
    pending = [carrier.receive(other, into[other], 5) for other in connected]
    pending += [carrier.send(other, own, 5) for other in connected]
    for index, one in enumerate(pending):
        try:
            one.wait()
        except Exception as error:
            print(time.time(), error, flush=True)
            sys.exit(0)
"""


def hosts_that_exchange(size: int, does: str = "", patience: float = 60.0) -> list[subprocess.Popen[str]]:
    """Return three processes that send to each other as fast as they can."""
    ends = connected(3)
    started = []
    for host in range(3):
        fds = [end.fileno() for end in ends[host].values()]
        arguments = [str(host), str(size), does, str(patience)]
        arguments += [f"{other}:{end.fileno()}" for other, end in ends[host].items()]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", _EXCHANGES, *arguments],
                pass_fds=fds,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    for of_host in ends:
        for end in of_host.values():
            end.close()
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    return started


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
        process.communicate()


@pytest.mark.parametrize("size", [1, 2 * 1024 * 1024], ids=["small", "large"])
@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a child"])
def test_the_others_hear_at_once_of_a_process_that_is_killed_under_traffic(size: int, *, forks: bool) -> None:
    processes = hosts_that_exchange(size, "forks" if forks else "")
    try:
        time.sleep(0.3)
        killed = time.time()
        processes[1].kill()
        first = []
        for other in (0, 2):
            stdout = processes[other].stdout
            assert stdout is not None
            at, _, text = stdout.readline().partition(" ")
            first.append(text)
            assert float(at) - killed < 5  # the one who hears of it second has lost the first, too
        assert any("to rank 1 (" in text for text in first)
    finally:
        end(processes)


def test_the_others_lose_a_process_that_is_stopped_under_traffic() -> None:
    processes = hosts_that_exchange(2 * 1024 * 1024, patience=2.0)
    try:
        time.sleep(0.3)
        os.kill(processes[1].pid, signal.SIGSTOP)
        stdout = processes[0].stdout
        assert stdout is not None
        assert "lost its connection to rank" in stdout.readline()
    finally:
        end(processes)


@pytest.mark.parametrize("size", [1, 2 * 1024 * 1024], ids=["small", "large"])
def test_a_process_that_is_in_one_long_call_is_waited_for(size: int) -> None:
    """It sends nothing and reads nothing; its machine answers for it."""
    processes = hosts_that_exchange(size, "thinks")
    try:
        for process in processes:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["thought\n", "went on\n"]
    finally:
        end(processes)


def test_a_child_does_not_keep_a_connection_open() -> None:
    here, there = over_loopback()
    carrier = SocketCarrier(0, [0, 1], {1: here})
    pid = os.fork()
    if not pid:
        there.close()
        time.sleep(10)
        os._exit(0)
    try:
        carrier.close()
        there.settimeout(5)
        assert there.recv(100).endswith(b"L")  # its farewell
        assert there.recv(1) == b""
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        there.close()
