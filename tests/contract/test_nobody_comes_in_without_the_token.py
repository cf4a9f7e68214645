"""Hosts are connected to those of their run, and to nobody else."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightwork.errors import RankLost, TeamError
from lightwork.team import hosts
from lightwork.team.environment import Environment, Launcher, read
from lightwork.team.page import FileRendezvous, Page
from lightwork.team.rendezvous import Rendezvous, StoreRendezvous
from lightwork.transport import doors
from lightwork.transport.doors import Door, Secret, call, connect_all

SECRET = Secret("token", "leaders 1")


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door("127.0.0.1", 0, SECRET)
    yield door
    door.close()


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("num_hosts", [2, 3, 5])
def test_each_is_connected_to_each_other(door: Door, num_hosts: int) -> None:
    leaders = list(range(num_hosts))
    own = {host: Door("127.0.0.1", host, SECRET) for host in range(1, num_hosts)} | {0: door}
    results = in_threads(
        *(lambda host=host: connect_all(own[host], door.place, host, leaders, SECRET, 10) for host in leaders)
    )
    connected = [ends for ends, _ in results]
    for _, said in results:
        assert {host: said[host]["place"] for host in said} == {host: own[host].place for host in leaders}
    for host, ends in enumerate(connected):
        assert set(ends) == {*leaders} - {host}
        for other, one in ends.items():
            one.sendall(bytes([host]))
            assert connected[other][host].recv(1) == bytes([host])
    for ends in connected:
        for one in ends.values():
            one.close()
    for one in own.values():
        one.close()


@pytest.mark.parametrize(
    "secret", [Secret("another", "leaders 1"), Secret("token", "leaders 2"), Secret("", "leaders 1")], ids=str
)
def test_another_token_or_purpose_is_turned_away(door: Door, secret: Secret, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="it was closed"):
        call(door.place, 0, 1, secret, {}, 5)
    assert door.next(time.monotonic() + 0.1) is None
    assert "somebody at 127.0.0.1 was turned away from this run's team: it does not know the" in capfd.readouterr().err


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"lightwork host 1" + bytes(100)])
def test_who_says_something_else_or_nothing_keeps_nobody_waiting(
    door: Door, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "_PATIENCE", 1.0)
    strangers = [socket.create_connection(door.place) for _ in range(5)]
    for stranger in strangers:
        stranger.sendall(said)
    start = time.monotonic()
    connection = call(door.place, 0, 3, SECRET, {}, 5)
    came = door.next(time.monotonic() + 5)
    assert came is not None
    assert came.host == 3
    assert time.monotonic() - start < 0.9
    for stranger in strangers:
        stranger.settimeout(5)
        received = b"..."
        while received:  # the question, and then the end
            try:
                received = stranger.recv(1000)
            except ConnectionResetError:
                break
        stranger.close()
    assert door.next(time.monotonic() + 0.1) is None
    for one in (connection, came.socket):
        one.close()


def test_a_caller_does_not_take_another_program_for_the_team() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            stranger, _ = server.accept()
            stranger.sendall(doors._QUESTION.pack(doors._MAGIC, bytes(32)))
            stranger.recv(1000)
            stranger.sendall(bytes(32))
            stranger.close()

        refused, _ = in_threads(lambda: call(server.getsockname(), 0, 1, SECRET, {}, 5), answer)
    assert isinstance(refused, OSError)
    assert "does not know the token" in str(refused)


def test_a_proof_can_not_be_used_again(door: Door) -> None:
    with socket.create_server(("127.0.0.1", 0)) as between:
        heard: list[bytes] = []

        def listen_in() -> None:
            caller, _ = between.accept()
            with socket.create_connection(door.place) as through:
                caller.sendall(through.recv(1000))
                heard.append(caller.recv(1000))
                through.sendall(heard[0])
                caller.sendall(through.recv(1000))
                through.sendall(caller.recv(1000))
                time.sleep(0.1)
            caller.close()

        in_threads(lambda: call(between.getsockname(), 0, 1, SECRET, {}, 5).close(), listen_in)
    came = door.next(time.monotonic() + 2)
    assert came is not None
    came.socket.close()
    with socket.create_connection(door.place) as again:
        again.recv(1000)
        again.sendall(heard[0])
        assert again.recv(1000) == b""
    assert door.next(time.monotonic() + 0.1) is None


def test_a_host_that_does_not_come_is_named(door: Door) -> None:
    with pytest.raises(RankLost, match="rank 20 has not connected to the others") as lost:
        connect_all(door, door.place, 0, [0, 20], SECRET, 0.2)
    assert lost.value.rank == 20


def meeting(rendezvous: Rendezvous, environment: Environment, size: int = 2) -> Any:
    carrier = hosts.connect_hosts("leaders 1", environment.rank, list(range(size)), environment, rendezvous, 0.0)
    received = carrier.exchange("hello", b"%d" % environment.rank)
    carrier.close()
    return received


def test_workers_of_one_machine_meet_by_their_launchers_page() -> None:
    fd = Page.create()
    calls = [
        lambda rank=rank: meeting(
            FileRendezvous(fd, rank), Environment(rank=rank, world_size=3, launcher=Launcher.LIGHTWORK), 3
        )
        for rank in range(3)
    ]
    assert in_threads(*calls) == [[b"0", b"1", b"2"]] * 3
    os.close(fd)


@pytest.mark.parametrize("token", ["", "said beforehand"])
def test_a_token_of_the_environment_is_told_to_nobody(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    published: list[str] = []
    publish = StoreRendezvous.publish
    monkeypatch.setattr(
        StoreRendezvous,
        "publish",
        lambda self, key, message: (published.append(message), publish(self, key, message))[1],
    )
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {"LIGHTWORK_TOKEN": token} if token else {}
    first = read(variables)
    assert first.token == token
    assert not token or token not in repr(first)
    other = read({**variables, "RANK": "1"})
    rendezvous = StoreRendezvous(first)
    assert (
        in_threads(lambda: meeting(rendezvous, first), lambda: meeting(StoreRendezvous(other), other))
        == [[b"0", b"1"]] * 2
    )
    told = json.loads(published[0])[2]
    assert len(told) == (0 if token else 64)


def test_one_with_another_token_of_the_environment_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "JOIN_TIMEOUT", 2.0)
    fd = Page.create()
    environments = [
        Environment(rank=rank, world_size=2, launcher=Launcher.LIGHTWORK, token=f"token {rank}") for rank in range(2)
    ]
    lost, refused = in_threads(
        *(lambda rank=rank: meeting(FileRendezvous(fd, rank), environments[rank]) for rank in range(2))
    )
    assert isinstance(lost, RankLost)
    assert isinstance(refused, TeamError)
    assert "All must have the same LIGHTWORK_TOKEN, or none" in str(refused)
    os.close(fd)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system has no /proc")
def test_a_door_is_open_to_this_machine_alone_unless_it_is_told_another_address(door: Door) -> None:
    listening = {
        line.split()[1].partition(":")[0]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].partition(":")[2], 16) == door.place[1]
    }
    assert listening == {"0100007F"}
    with pytest.raises(TeamError, match=r"this machine can not listen at 192\.0\.2\.1"):
        Door("192.0.2.1", 0, SECRET)


def test_a_network_is_named_by_its_interface() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = StoreRendezvous(read({**variables, "GLOO_SOCKET_IFNAME": "lo"}))
    assert found.address() == "127.0.0.1"
    found._interface = "nowhere0"
    with pytest.raises(TeamError, match=r"GLOO_SOCKET_IFNAME=nowhere0 is no network .* It has .*lo"):
        found.address()
