"""The signature promise: the digest after every step is the one-worker digest, for any number of workers and hosts, and
in whatever order they come to what they share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lightwork
from tests.cases import CASES, Case
from tests.fake_ranks import pause, run_ranks
from tests.training import Seen, alone, distributed, in_small_pieces, new_folder, train


@dataclass(frozen=True)
class Team:
    num_workers: int
    hosts: tuple[int, ...] | None = None  #: workers of each
    settings: dict[str, Any] = field(default_factory=dict)

    def train(self, case: Case, seed: int, **more: Any) -> list[Seen]:
        job = functools.partial(train, case, **more)
        return run_ranks(self.num_workers, job, seed=seed, hosts=self.hosts, settings=self.settings)


PLACEMENTS = ("replicate", "zero1", "zero2", "zero3")
TEAMS = {
    "2 workers": Team(2),
    "3 workers": Team(3),
    **{
        f"{hosts} hosts, {placement}": Team(hosts, (1,) * hosts, {"transport": "group", "placement": placement})
        for hosts in (2, 3)
        for placement in PLACEMENTS
    },
    **{
        f"2 hosts of 2 workers, {placement}": Team(4, (2, 2), {"placement": placement})
        for placement in PLACEMENTS
        if placement != "zero3"  # which is for workers with memories of their own
    },
    "hosts of 1 and 3 workers": Team(4, (1, 3)),
}
every_team = pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)


@pytest.mark.parametrize("name", CASES)
def test_every_update_changes_something(name: str) -> None:
    assert len(alone(name)) == 6  # 44 samples: two full global batches and a short one, twice
    assert len({digest for _, _, digest in alone(name)}) == 6, "an update that changes nothing proves nothing"


@every_team
@pytest.mark.parametrize("name", CASES)
def test_every_step_has_the_digest_of_one_worker(name: str, team: Team) -> None:
    steps = 4 if team.num_workers == 2 else 2
    for seen in team.train(CASES[name], seed=list(CASES).index(name), max_steps=steps):
        assert seen == alone(name)[:steps]


@every_team
@pytest.mark.parametrize("name", ["experts, frozen, unused", "buffers"])
def test_so_it_has_in_any_order_in_which_workers_come_to_what_they_share(name: str, team: Team) -> None:
    for seed in range(100, 104):
        for seen in team.train(CASES[name], seed=seed, max_steps=2):
            assert seen == alone(name)[:2], f"seed {seed}"


@every_team
def test_between_two_steps_a_worker_sees_the_state_after_the_first_for_as_long_as_it_likes(team: Team) -> None:
    case = CASES["experts, frozen, unused"]

    def job() -> list[tuple[float, float, float]]:
        run, _ = distributed(case)
        seen = []
        for step in run.steps(case.dataset(), epochs=2):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
            for _ in range(20):
                pause()
            weights = float(run.model(case.dataset()[:][0]).detach().double().sum())
            seen.append((step.loss, step.grad_norm, weights))
        run.close()
        return seen

    (of_one,) = run_ranks(1, job)
    for seed in range(4):
        for seen in run_ranks(team.num_workers, job, seed=seed, hosts=team.hosts, settings=team.settings):
            assert seen == of_one, f"seed {seed}"


@pytest.mark.parametrize("hosts", [(1, 3), (3, 1), (2, 1, 1), (1,) * 6], ids=str)
def test_backward_on_one_host_does_not_wait_for_another_that_waits_for_it(hosts: tuple[int, ...]) -> None:
    """A host of one worker sends buckets as backward completes them, and backward waits while too many have not left.
    One of several workers, or with no micro-batch, begins when it is done: what comes then must not wait for the first.
    """

    def job() -> str:
        in_small_pieces(block=16, bucket=16, backlog=2)
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        run = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=4, run_dir=new_folder())
        for step in run.steps(torch.utils.data.TensorDataset(torch.randn(64, 6)), max_steps=3):
            for (x,) in step:
                step.backward(model(x).square().mean())
        return run.digest()

    (alone,) = run_ranks(1, job)
    for seed in range(4):
        assert run_ranks(sum(hosts), job, hosts=hosts, seed=seed) == [alone] * sum(hosts)


@pytest.mark.parametrize("num_workers", [4, 5, 8, 11])
def test_more_workers_up_to_and_above_the_number_of_micro_batches_change_nothing(num_workers: int) -> None:
    name = "gpt, tied, dropout, token weights"
    for seen in Team(num_workers).train(CASES[name], seed=num_workers, max_steps=3):
        assert seen == alone(name)[:3]


MANY_HOSTS = {name: team for name, team in TEAMS.items() if team.hosts} | {
    f"5 hosts, {placement}": Team(5, (1,) * 5, {"transport": "group", "placement": placement})
    for placement in PLACEMENTS
}


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(16, 16), (16, 8), (12, 2), (13, 13), (10, 1)])
@pytest.mark.parametrize("team", [Team(2), Team(3), *MANY_HOSTS.values()], ids=["2 workers", "3 workers", *MANY_HOSTS])
def test_any_number_of_micro_batches_will_do(global_batch: int, micro_batch: int, team: Team) -> None:
    name = "convolution, batch norm" if micro_batch > 1 else "experts, frozen, unused"
    more = {"global_batch": global_batch, "micro_batch": micro_batch, "max_steps": 2}
    for seen in team.train(CASES[name], seed=global_batch, **more):
        assert seen == alone(name, **more)


def test_the_digest_tells_other_seeds_and_settings_apart() -> None:
    name = "gpt, tied, dropout, token weights"
    digests = {
        alone(name, max_steps=2, **more)[-1][2]
        for more in ({}, {"seed": 1}, {"micro_batch": 4}, {"clip_grad_norm": 0.01}, {"precision": "bf16"})
    }
    assert len(digests) == 5


@pytest.mark.parametrize("name", CASES)
def test_many_buckets_travel_and_come_and_go(name: str, small_pieces: None) -> None:
    (whole,) = run_ranks(1, lambda: train(CASES[name], max_steps=2))
    for team in ("2 hosts, replicate", "3 hosts, zero1", "3 hosts, zero2", "2 hosts, zero3", "3 hosts, zero3"):
        for seen in TEAMS[team].train(CASES[name], seed=2, max_steps=2):
            assert seen == whole
