"""The signature promise: the digest after every step is the one-worker digest, for any number of workers."""

from __future__ import annotations

import pytest

from tests.cases import CASES, Case
from tests.training import run_team, train


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step_has_the_digest_of_one_worker(case: Case) -> None:
    (alone,) = run_team(1, lambda: train(case))
    assert len(alone) == 6  # 44 samples: two full global batches and a short one, twice
    assert len({digest for _, _, digest in alone}) == 6, "an update that changes nothing proves nothing"
    for num_workers in (2, 3):
        for seen in run_team(num_workers, lambda: train(case)):
            assert seen == alone


@pytest.mark.parametrize("num_workers", [4, 5, 8, 11])
def test_more_workers_up_to_and_above_the_number_of_micro_batches_change_nothing(num_workers: int) -> None:
    case = CASES["gpt, tied, dropout, token weights"]
    (alone,) = run_team(1, lambda: train(case, max_steps=3))
    for seen in run_team(num_workers, lambda: train(case, max_steps=3)):
        assert seen == alone


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(16, 16), (16, 8), (12, 2), (13, 13), (10, 1)])
def test_any_number_of_micro_batches_will_do(global_batch: int, micro_batch: int) -> None:
    case = CASES["convolution, batch norm"]
    if micro_batch == 1:
        case = CASES["experts, frozen, unused"]

    def job() -> list[tuple[float, float, str]]:
        return train(case, global_batch=global_batch, micro_batch=micro_batch, max_steps=3)

    (alone,) = run_team(1, job)
    for num_workers in (2, 3):
        for seen in run_team(num_workers, job):
            assert seen == alone


def test_the_digest_tells_other_seeds_and_settings_apart() -> None:
    case = CASES["gpt, tied, dropout, token weights"]
    digests = {
        run_team(1, lambda more=more: train(case, max_steps=2, **more))[0][-1][2]
        for more in ({}, {"seed": 1}, {"micro_batch": 4}, {"clip_grad_norm": 0.01}, {"precision": "bf16"})
    }
    assert len(digests) == 5
