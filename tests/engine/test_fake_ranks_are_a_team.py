"""The fake itself: one seed is one interleaving, it does what a team of processes does, and it notices what hangs."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from lightwork.errors import Disagreement
from tests.cases import CASES
from tests.fake_ranks import Baton, Deadlock, FakeCarrier, Network, Process, pause, run_ranks
from tests.training import Numbered, tiny_run, train

CASE = CASES["experts, frozen, unused"]
GROUP = {"transport": "group", "placement": "zero3"}


def history(seed: int, **more: Any) -> list[str]:
    baton = Baton(seed)
    run_ranks(3, lambda: train(CASE, max_steps=2), baton=baton, **more)
    return baton.history


@pytest.mark.parametrize("settings", [{}, GROUP], ids=["one host", "three hosts"])
def test_a_seed_is_an_interleaving_and_another_seed_another(settings: dict[str, Any]) -> None:
    assert history(1, settings=settings) == history(1, settings=settings)
    assert len({tuple(history(seed, settings=settings)) for seed in range(5)}) == 5


def computed(seed: int) -> list[int]:
    """Return how many micro-batches each of three workers computes."""

    def job() -> int:
        run = tiny_run(global_batch=16)
        count = 0
        for step in run.steps(Numbered(64), epochs=1):
            for _, x in step:
                pause()
                step.backward(run.model(x).mean())
                count += 1
        return count

    return run_ranks(3, job, seed=seed)


def test_slow_workers_are_relieved_by_the_others() -> None:
    shares = [computed(seed) for seed in range(12)]
    assert all(sum(counts) == 32 for counts in shares)
    assert len({tuple(counts) for counts in shares}) > 6
    assert any(min(counts) < 4 < 20 < max(counts) for counts in shares), "one did nearly all, another hardly anything"


def test_each_has_random_numbers_of_its_own() -> None:
    def draw() -> list[float]:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        drawn = []
        for _ in range(5):
            pause()
            drawn += [float(torch.rand(())), float(np.random.rand()), random.random()]
        return drawn

    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state(legacy=False)
    for seed in range(5):
        first, *others = run_ranks(4, draw, seed=seed)
        assert others == [first] * 3
    assert torch.equal(torch.default_generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state(legacy=False)["state"]["pos"] == before[2]["state"]["pos"]


def test_an_error_of_one_ends_the_others_and_is_raised() -> None:
    threads = threading.active_count()

    def job() -> None:
        run = tiny_run()
        for step in run.steps(Numbered(64), epochs=2):
            for _, x in step:
                step.backward(run.model(x).mean())
            if step.index == 3 and run.rank == 1:
                raise ZeroDivisionError("of rank 1")

    for settings in ({}, GROUP):
        with pytest.raises(ZeroDivisionError, match="of rank 1"):
            run_ranks(3, job, settings=settings)
    assert threading.active_count() <= threads


def test_those_who_wait_for_each_other_are_named() -> None:
    def job() -> None:
        run = tiny_run()
        if run.rank:
            run.digest()  # a call that rank 0 does not make

    with pytest.raises(Deadlock, match=r"(?s)nobody can go on.*rank 1 waits for the signal"):
        run_ranks(2, job)


def test_different_calls_are_told_as_in_a_real_team() -> None:
    def job() -> None:
        run = tiny_run()
        run.digest() if run.rank else run.state_dict()

    with pytest.raises(Disagreement, match="calls digest while rank 0 calls state_dict"):
        run_ranks(2, job, seed=1)


def transfers(seed: int, job: Any) -> list[Any]:
    """Return what `job` returned for both ends of a network."""
    baton, results = Baton(seed), {}
    network = Network(baton)

    def main(host: int) -> None:
        results[host] = job(FakeCarrier(network, host, [0, 1]))

    baton.run([(Process(host), lambda host=host: main(host)) for host in range(2)])
    return [results[host] for host in range(2)]


def test_the_network_shows_a_tensor_that_is_written_before_it_has_left_or_read_before_it_came() -> None:
    def job(carrier: FakeCarrier) -> tuple[str, str]:
        tensor = torch.zeros(3)
        if carrier.host == 0:
            sent = carrier.send(1, tensor.fill_(1), 2)
            tensor.fill_(2)  # too early
            sent.wait()
            return "", ""
        received = carrier.receive(0, tensor, 2)
        early = str(tensor[0].item())
        received.wait()
        return early, str(tensor[0].item())

    seen = {transfers(seed, job)[1] for seed in range(40)}
    assert {early for early, _ in seen} > {"nan"}
    assert {late for _, late in seen} == {"1.0", "2.0"}


def test_a_network_without_a_sender_is_a_deadlock() -> None:
    def job(carrier: FakeCarrier) -> None:
        if carrier.host:
            carrier.receive(0, torch.zeros(1), 7).wait()

    with pytest.raises(Deadlock, match="rank 1 waits for host 0 to send 7"):
        transfers(0, job)
