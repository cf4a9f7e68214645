"""Hosts of one process that lose one of them: who goes on, who waits for whom, and who is told that it does not."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightwork.errors import HostLost, RankFailed, RankLost
from lightwork.transport.base import Farewell
from lightwork.transport.doors import Door, Secret, connect_all
from lightwork.transport.regrouping import Regrouping, _Fate
from lightwork.transport.sockets import SocketCarrier
from tests.contract.test_nobody_comes_in_without_the_token import in_threads

SECRET = Secret("token", "leaders 1")


class Host:
    """A host: its carrier, and its end without a word."""

    def __init__(self, host: int, doors: list[Door], silence: float) -> None:
        leaders = [10 * other for other in range(len(doors))]
        connected, of_all = connect_all(doors[host], doors[0].place, host, leaders, SECRET, 10)
        places = {other: said["place"] for other, said in of_all.items()}
        self.regrouping = Regrouping(doors[host], places, leaders, SECRET, silence, 60.0)
        self.carrier = SocketCarrier(host, leaders, connected, regrouping=self.regrouping)

    def die(self) -> None:
        self.carrier.farewell = None
        self.carrier.close()

    def come_together(self, report: int) -> Callable[[], Any]:
        return lambda: self.carrier.come_together(report)


@pytest.fixture
def team(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Yield hosts that are connected; of the parametrized number, 4 unless given."""
    num_hosts = getattr(request, "param", 4)
    doors = [Door("127.0.0.1", host, SECRET) for host in range(num_hosts)]
    hosts: list[Host] = in_threads(*(lambda host=host: Host(host, doors, 1.0) for host in range(num_hosts)))
    yield hosts
    for host in hosts:
        host.die()


def check_connected(hosts: list[Host]) -> None:
    """Check that messages go between these hosts, and no others."""
    everyone = {host.carrier.host for host in hosts}

    def exchange(host: Host) -> list[bytes | None]:
        return host.carrier.exchange("a test", bytes([host.carrier.host]))

    for received in in_threads(*(lambda host=host: exchange(host) for host in hosts)):
        assert received == [bytes([host]) if host in everyone else None for host in range(len(received))]


@pytest.mark.parametrize("lost", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 2, 3)], ids=str)
def test_those_that_are_left_are_connected_and_know_what_each_reports(team: list[Host], lost: tuple[int, ...]) -> None:
    for host in lost:
        team[host].die()
    left = [host for host in team if host.carrier.host not in lost]
    reports = in_threads(*(host.come_together(100 + host.carrier.host) for host in left))
    assert reports == [{host.carrier.host: 100 + host.carrier.host for host in left}] * len(left)
    check_connected(left)


def test_one_after_the_other_may_be_lost(team: list[Host]) -> None:
    for last in (2, 0, 3):
        next(host for host in team if host.carrier.host == last).die()
        left = [host for host in team if host.carrier.host != last]
        in_threads(*(host.come_together(1) for host in left))
        check_connected(left)
        team = left


def test_one_that_still_computes_is_waited_for(team: list[Host]) -> None:
    """It lives, and its door says so; also when it is the one that gathers the others."""
    team[2].die()

    def late() -> Any:
        time.sleep(2.5)  # longer than a machine may be silent
        return team[0].carrier.come_together(7)

    reports = in_threads(late, team[1].come_together(7), team[3].come_together(6))
    assert reports == [{0: 7, 1: 7, 3: 6}] * 3
    check_connected([team[0], team[1], team[3]])


def test_who_lost_nobody_comes_too_as_the_others_end_their_connections(team: list[Host]) -> None:
    here, there = team[0].carrier, team[1].carrier
    here._waiting.connections[1].end("the network resets it")
    waiting = in_threads(
        lambda: there.receive(2, torch.zeros(1), 9).wait(),
        team[0].come_together(1),
        team[2].come_together(1),
        team[3].come_together(1),
        lambda: time.sleep(0.2) or there.come_together(1),
    )
    assert isinstance(waiting[0], HostLost)
    assert waiting[1:] == [dict.fromkeys(range(4), 1)] * 4
    check_connected(team)


def test_what_was_sent_before_is_never_received(team: list[Host]) -> None:
    team[1].carrier.send(0, torch.ones(4), 9).wait()
    team[3].die()
    in_threads(*(host.come_together(1) for host in team[:3]))
    team[1].carrier.send(0, torch.full((4,), 2.0), 9).wait()
    received = torch.zeros(4)
    team[0].carrier.receive(1, received, 9).wait()
    assert received.tolist() == [2.0] * 4


def test_one_that_was_taken_for_lost_is_told_so_when_it_calls(
    team: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine did not answer for too long, to the others."""
    fate = Regrouping._fate
    monkeypatch.setattr(Regrouping, "_fate", lambda self, host: _Fate.UNREACHABLE if host == 2 else fate(self, host))
    reports = in_threads(*(host.come_together(1) for host in team if host is not team[2]))
    assert reports == [{0: 1, 1: 1, 3: 1}] * 3
    with pytest.raises(RankLost, match="rank 20 was taken for lost, and rank 0 and others go on without it"):
        team[2].carrier.come_together(1)


@pytest.mark.parametrize("says", ["nothing", "something", "what another team says"])
def test_another_program_that_has_got_the_port_of_a_lost_host_is_not_waited_for(team: list[Host], says: str) -> None:
    team[2].die()
    left = [team[0], team[1], team[3]]

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as stranger:
                    if says == "something":
                        stranger.sendall(b"HTTP/1.1 400 Bad Request" + bytes(100))
                    time.sleep(0.2)

    with socket.create_server(("127.0.0.1", 0)) as server:
        other = Door("127.0.0.1", 2, Secret("of another", "leaders 1"))
        threading.Thread(target=answer, daemon=True).start()
        for host in left:
            place = other.place if says == "what another team says" else server.getsockname()
            host.regrouping._places = {**host.regrouping._places, 2: place}
            host.regrouping._patience = 1.5
        in_threads(*(host.come_together(1) for host in left))
        other.close()
    check_connected(left)


@pytest.mark.parametrize("farewell", [*Farewell, None], ids=str)
def test_a_host_says_in_parting_whether_the_others_can_go_on(team: list[Host], farewell: Farewell | None) -> None:
    team[1].carrier.farewell = farewell
    closing = threading.Timer(0.1, team[1].carrier.close)
    closing.start()
    kind = {Farewell.LEFT: RankLost, Farewell.FAILED: RankFailed, None: HostLost}[farewell]
    with pytest.raises(kind) as caught:
        team[0].carrier.receive(1, torch.zeros(1), 9).wait()
    assert type(caught.value) is kind
    closing.join()


def test_of_two_parts_that_do_not_reach_each_other_at_most_one_goes_on(team: list[Host]) -> None:
    """For every cut of up to six hosts, and whoever of them has ended, as each part may know or not know."""

    def goes_on(here: tuple[int, ...], unreachable: set[int], ended: set[int]) -> bool:
        lost = dict.fromkeys(unreachable, _Fate.UNREACHABLE) | dict.fromkeys(ended, _Fate.ENDED)
        regrouping = team[0].regrouping
        regrouping._host = min(here)
        try:
            regrouping._refuse_to_split([host for host in here if host != min(here)], lost)
        except RankLost:
            return False
        return True

    regrouping = team[0].regrouping
    regrouping._leaders = range(6)
    num_goes_on = 0
    for num_hosts in range(2, 7):
        for where in itertools.product(
            "ab-", repeat=num_hosts
        ):  # of each: in which part it lives, or that it has ended
            parts = [tuple(host for host in range(num_hosts) if where[host] == part) for part in "ab"]
            ended = {host for host in range(num_hosts) if where[host] == "-"}
            if not all(parts):
                continue
            results = []
            for here, there in (parts, parts[::-1]):
                known = [set(), ended]  # an end shows only on one's own side of the cut
                results.append([goes_on(here, {*there} | ended - of, of) for of in known])
            assert not (any(results[0]) and any(results[1]))
            num_goes_on += any(results[0]) or any(results[1])
    assert num_goes_on > 500
    regrouping._host = 0
