"""One suite for what brings tensors from host to host: sockets, and the fake of fake ranks."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightwork.device.cpu import Rehearsal
from lightwork.errors import Disagreement, RankLost
from lightwork.transport.base import FIRST_BYTES, FIRST_TAG, Carrier
from lightwork.transport.null import NullCarrier
from lightwork.transport.relay import ByHosts, Relay
from lightwork.transport.sockets import SocketCarrier
from tests.fake_ranks import Baton, FakeCarrier, Network, Process
from tests.loopback import connected

Job = Callable[[Carrier], Any]


def run_all(make: Callable[[int], Carrier], num_hosts: int, job: Job) -> list[Any]:
    results: list[Any] = [None] * num_hosts

    def work(host: int) -> None:
        carrier = make(host)
        try:
            results[host] = job(carrier)
        except Exception as error:
            results[host] = error

    threads = [threading.Thread(target=work, args=(host,)) for host in range(num_hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def of_fakes(seed: int, num_hosts: int, job: Job) -> list[Any]:
    baton = Baton(seed)
    network = Network(baton)
    results: list[Any] = [None] * num_hosts

    def work(host: int) -> None:
        try:
            results[host] = job(FakeCarrier(network, host, [10 * h for h in range(num_hosts)]))
        except Exception as error:
            results[host] = error

    baton.run([(Process(host), lambda host=host: work(host)) for host in range(num_hosts)])
    return results


def of_sockets(num_hosts: int, job: Job, **settings: Any) -> list[Any]:
    ends, leaders = connected(num_hosts), [10 * h for h in range(num_hosts)]
    return run_all(lambda host: SocketCarrier(host, leaders, ends[host], **settings), num_hosts, job)


def of_relays(num_hosts: int, job: Job) -> list[Any]:
    ends, leaders = connected(num_hosts), [10 * h for h in range(num_hosts)]

    def make(host: int) -> Carrier:
        network = SocketCarrier(host, leaders, ends[host])
        return Relay(Rehearsal(), network, ByHosts(Rehearsal(), network))

    return run_all(make, num_hosts, job)


Hosts = Callable[[int, Job], list[Any]]
every_carrier = pytest.mark.parametrize(
    "hosts",
    [*(functools.partial(of_fakes, seed) for seed in range(4)), of_sockets, of_relays],
    ids=[*(f"fakes {seed}" for seed in range(4)), "sockets", "relays"],
)


@every_carrier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_of_one_tag_arrive_in_order_and_those_of_others_beside_them(hosts: Hosts, dtype: torch.dtype) -> None:
    def job(carrier: Carrier) -> list[float]:
        other = 1 - carrier.host
        into = [torch.zeros(3, dtype=dtype) for _ in range(3)]
        tags = (FIRST_TAG, FIRST_TAG + 1, FIRST_TAG)
        pending = [carrier.receive(other, tensor, tag) for tensor, tag in zip(into, tags, strict=True)]
        # The last tag first: it must not be taken for the first.
        values = {0: 10 * carrier.host + 1, 1: 10 * carrier.host + 2, 2: 10 * carrier.host + 3}
        sent = [torch.full((3,), values[i], dtype=dtype) for i in (1, 0, 2)]
        pending += [carrier.send(other, sent[i], tags[j]) for i, j in ((0, 1), (1, 0), (2, 2))]
        for one in pending:
            one.wait()
        return [float(tensor[0]) for tensor in into]

    assert hosts(2, job) == [[11, 12, 13], [1, 2, 3]]


@every_carrier
@pytest.mark.parametrize("size", [0, 1, FIRST_BYTES - 57, FIRST_BYTES - 56, FIRST_BYTES - 55, 200_000])
@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_everyone_receives_everyones_payload_by_host(hosts: Hosts, num_hosts: int, size: int) -> None:
    def payload(host: int) -> bytes:
        return bytes((index + host) % 251 for index in range(size + (host == 1)))

    def job(carrier: Carrier) -> tuple[list[bytes], list[bytes]]:
        return carrier.exchange("a call", payload(carrier.host)), carrier.exchange("next", b"%d" % carrier.host)

    expected = ([payload(host) for host in range(num_hosts)], [b"%d" % host for host in range(num_hosts)])
    assert hosts(num_hosts, job) == [expected] * num_hosts


@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_a_carrier_without_other_hosts_gives_back_what_it_is_given_and_moves_nothing(size: int) -> None:
    carrier = NullCarrier(rank=7)
    assert (carrier.host, carrier.num_hosts, carrier.leaders, carrier.others) == (0, 1, [7], [])
    assert carrier.exchange("a call", bytes(size)) == [bytes(size)]
    with carrier.together():
        pass
    for call in (
        lambda: carrier.send(1, torch.zeros(1), FIRST_TAG),
        lambda: carrier.receive(1, torch.zeros(1), FIRST_TAG),
        lambda: carrier.receive_from_any(torch.zeros(1), FIRST_TAG),
    ):
        with pytest.raises(ValueError, match="no"):
            call()
    carrier.close()


@every_carrier
@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_others_are_all_hosts_but_the_own(hosts: Hosts, num_hosts: int) -> None:
    expected = [[host for host in range(num_hosts) if host != own] for own in range(num_hosts)]
    assert hosts(num_hosts, lambda carrier: carrier.others) == expected


@every_carrier
def test_hosts_that_make_different_calls_are_told_who_calls_what(hosts: Hosts) -> None:
    first, second = hosts(2, lambda carrier: carrier.exchange("save" if carrier.host else "step 7", b""))
    assert isinstance(first, Disagreement)
    assert "rank 0 calls step 7 while rank 10 calls save" in str(first)
    assert isinstance(second, Disagreement)


def test_a_host_whose_connections_are_gone_is_named() -> None:
    def job(carrier: Carrier) -> None:
        carrier.exchange("hello", b"")
        if carrier.host == 1:
            carrier.close()
        else:
            carrier.receive(1, torch.zeros(4), FIRST_TAG).wait()

    waiting, _ = of_sockets(2, job)
    assert isinstance(waiting, RankLost)
    assert "rank 0 lost its connection to rank 10" in str(waiting)


@every_carrier
def test_whoever_sends_first_is_received_from_and_named(hosts: Hosts) -> None:
    def job(carrier: Carrier) -> list[tuple[int, int]]:
        tensor = torch.zeros(1, dtype=torch.int64)
        if carrier.host:
            for number in range(3):
                carrier.send(0, torch.tensor([10 * carrier.host + number]), FIRST_TAG).wait()
            carrier.receive(0, tensor, FIRST_TAG + 1).wait()  # its connections stay until all is received
            return []
        received = []
        for _ in range(6):
            host = carrier.receive_from_any(tensor, FIRST_TAG)
            received.append((host, int(tensor)))
        for other in (1, 2):
            carrier.send(other, tensor, FIRST_TAG + 1).wait()
        return received

    received = hosts(3, job)[0]
    assert sorted(received) == [(host, 10 * host + number) for host in (1, 2) for number in range(3)]
    for host in (1, 2):
        assert [number for sender, number in received if sender == host] == [10 * host + n for n in range(3)]


def test_who_waits_for_a_host_tells_of_it_each_second() -> None:
    told: list[tuple[int, float]] = []

    def job(carrier: Carrier) -> None:
        tensor = torch.zeros(4)
        if carrier.host:
            time.sleep(2.5)
            carrier.send(0, tensor, FIRST_TAG).wait()
        else:
            carrier.receive(1, tensor, FIRST_TAG).wait()
        carrier.close()

    of_sockets(2, job, waits=lambda *wait: told.append(wait))
    assert [(host, round(seconds)) for host, seconds in told] == [(1, 1), (1, 2)]
