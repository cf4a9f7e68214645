"""The noise scale (`noise=True`): the same for every team, as plain PyTorch finds it; no bit of the weights changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.spec.noise import PARTS, NoiseEstimator
from tests.engine.test_bits_do_not_depend_on_the_team import TEAMS, Team
from tests.fake_ranks import run_ranks
from tests.training import in_small_pieces, new_folder

STEPS = 6 * PARTS


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.5 * torch.randn(64, 1, generator=generator))


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def train(
    *, noise: bool, lr: float = 1e-2, max_steps: int = STEPS, bucket: int = 16, **settings: Any
) -> tuple[list[Any], str, Path]:
    """Return the estimates of the trace's step events, the digest, and the run's folder."""
    in_small_pieces(block=bucket, bucket=bucket)
    folder, model = new_folder(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run = lightwork.distribute(
        model, optimizer, **{"global_batch": 16, "micro_batch": 4, "run_dir": folder, "noise": noise, **settings}
    )
    found = []
    for step in run.steps(data(), max_steps=max_steps):
        for x, y in step:
            step.backward(nn.functional.mse_loss(model(x), y))
        found.append(step._result.noise if step._result is not None else None)
    digest = run.digest()
    run.close()
    return [one for one in found if one is not None], digest, folder


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_every_team_finds_the_same_and_changes_no_bit(team: Team) -> None:
    (expected,) = run_ranks(1, lambda: train(noise=True)[:2])
    (without,) = run_ranks(1, lambda: train(noise=False)[:2])
    assert expected[1] == without[1]
    assert not without[0]
    assert len(expected[0]) == 2, "from the fifth round on"
    for found in run_ranks(team.num_workers, lambda: train(noise=True)[:2], hosts=team.hosts, settings=team.settings):
        assert found == expected


@pytest.mark.parametrize("settings", [{"clip_grad_norm": 0.01}, {"precision": "bf16"}, {"wire": "bf16"}], ids=str)
def test_it_is_that_of_the_gradient_before_it_is_clipped_or_scaled(settings: dict[str, Any]) -> None:
    ((plain, *_),) = run_ranks(1, lambda: train(noise=True, lr=0.0))
    ((found, *_),) = run_ranks(1, lambda: train(noise=True, lr=0.0, **settings))
    for one, other in zip(plain, found, strict=True):
        assert other.samples == pytest.approx(one.samples, rel=0.05)


def test_it_is_what_plain_pytorch_measures_with_fixed_weights() -> None:
    """Over all samples: their gradients one by one, and the sum of the variances of the elements."""
    ((found, *_),) = run_ranks(1, lambda: train(noise=True, lr=0.0, max_steps=100 * PARTS))
    model = make()
    gradients = []
    for x, y in data():
        model.zero_grad()
        nn.functional.mse_loss(model(x[None]), y[None]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    stacked = torch.stack(gradients).double()
    variance, mean = stacked.var(0, correction=0).sum(), stacked.mean(0)
    direct = float(variance / mean.square().sum())
    assert found[-1].samples == pytest.approx(direct, rel=0.15)
    assert found[-1].low < direct * 1.15
    assert found[-1].high > direct * 0.85


def test_the_norms_of_micro_batches_are_those_of_their_own_mean_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with plain PyTorch, part by part, where weights stay."""
    taken: list[tuple[Any, ...]] = []
    take = NoiseEstimator.take

    def noted(self: NoiseEstimator, *arguments: Any) -> None:
        taken.append(arguments)
        take(self, *arguments)

    monkeypatch.setattr(NoiseEstimator, "take", noted)
    run_ranks(1, lambda: train(noise=True, lr=0.0, max_steps=4 * PARTS)[:1])
    assert {tuple(of[3:]) for of in taken} == {(4, 16, 64)}
    assert [of[0] for of in taken] == [*range(PARTS)] * 4
    model, smalls, bigs = make(), [], []
    for x, y in zip(*(of.split(16) for of in data().tensors), strict=True):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        bigs.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    for x, y in zip(*(of.split(4) for of in data().tensors), strict=True):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        smalls.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    # The samples come in another order: the same on average, as far as 4 rounds tell.
    rounds = [taken[first : first + PARTS] for first in range(0, len(taken), PARTS)]
    small = sum(one[1] for of_round in rounds for one in of_round) / len(rounds)
    assert small == pytest.approx(sum(smalls) / len(smalls), rel=0.3)
    assert sum(one[2] for one in taken) / len(rounds) == pytest.approx(sum(bigs) / len(bigs), rel=0.3)


@pytest.mark.parametrize("bucket", [48, 1024])
def test_a_small_model_may_have_fewer_buckets_than_there_are_parts(bucket: int) -> None:
    ((many, *_),) = run_ranks(1, lambda: train(noise=True, lr=0.0, max_steps=50 * PARTS))
    ((few, *_),) = run_ranks(1, lambda: train(noise=True, lr=0.0, max_steps=50 * PARTS, bucket=bucket))
    assert few[-1].samples == pytest.approx(many[-1].samples, rel=0.25)


def test_of_a_single_micro_batch_there_is_none() -> None:
    ((found, *_),) = run_ranks(1, lambda: train(noise=True, micro_batch=16))
    assert found == []


def test_it_is_in_the_trace() -> None:
    (result,) = fork_team(1, lambda: train(noise=True))
    assert result.error is None, result.error
    found, _, folder = result.value
    events = [json.loads(line) for line in (folder / "trace" / "rank0.jsonl").read_text().splitlines()]
    told = [event["noise"] for event in events if "noise" in event]
    assert told == [{"samples": one.samples, "low": one.low, "high": one.high} for one in found]


@pytest.mark.parametrize("scale", [3.0, 50.0, 2000.0])
def test_the_estimator_finds_the_ratio_of_variance_and_signal_and_its_interval_holds(scale: float) -> None:
    """Gradients of 800 elements in 8 parts, drawn around a mean; the interval of 95 % holds the truth nearly always."""
    num, b, big = 800, 4, 64
    held = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.ones(num, dtype=torch.float64) / math.sqrt(num)
        deviation = math.sqrt(scale / num)
        estimator = NoiseEstimator()
        for step in range(50 * PARTS):
            part = step % PARTS
            of_part = slice(part * num // PARTS, (part + 1) * num // PARTS)
            noise = torch.randn(big // b, num // PARTS, generator=generator, dtype=torch.float64)
            leaves = mean[of_part] + noise * deviation / math.sqrt(b)
            small, total = float(leaves.square().sum(1).mean()), float(leaves.mean(0).square().sum())
            estimator.take(part, small, total, b, big)
        found = estimator.estimate()
        assert found is not None
        held += found.low <= scale <= found.high
        if scale < 100:
            assert found.samples == pytest.approx(scale, rel=0.15)
    assert held >= 34


def test_a_step_that_tells_nothing_does_not_count() -> None:
    estimator = NoiseEstimator()
    for number in range(10):
        for part in range(PARTS):
            estimator.take(part, math.nan if part == 2 and number < 6 else 2.0, 1.0, 4, 16)
        assert (estimator.estimate() is None) == (number < 10), "the third part was seen 4 times"
    estimator.take(2, 2.0, 1.0, 4, 16)
    found = estimator.estimate()
    assert found is not None
    assert found.low == found.samples == found.high
