"""Clipping by norm, by value and adaptively: what the same written by hand gives, and the same bits for any team."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.data.order import shuffled
from lightwork.errors import SpecError
from tests.fake_ranks import run_ranks
from tests.training import in_small_pieces, new_folder, tiny_run

DATA = TensorDataset(
    torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(3)), torch.arange(24).remainder(3)
)


def build() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 7), nn.Tanh(), nn.Linear(7, 3))
    return model.to(memory_format=torch.channels_last)


def adaptively(factor: float) -> Callable[[list[nn.Parameter]], None]:
    """Return equation 3 of the paper, unit by unit."""

    def clip(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            assert p.grad is not None
            units = [(p.data, p.grad)] if p.dim() < 2 else [(p.data[i], p.grad[i]) for i in range(len(p))]
            for weight, gradient in units:
                longest = factor * max(weight.norm(), torch.tensor(1e-3))
                if gradient.norm() >= longest:
                    gradient.mul_(longest / gradient.norm().clamp(min=1e-6))

    return clip


WAYS: dict[str, tuple[dict[str, float], Callable[[list[nn.Parameter]], Any]]] = {
    "norm": ({"clip_grad_norm": 0.05}, lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05)),
    "value": ({"clip_grad_value": 0.003}, lambda parameters: nn.utils.clip_grad_value_(parameters, 0.003)),
    "adaptive": ({"clip_grad_adaptive": 0.02}, adaptively(0.02)),
}


def by_hand(clip: Callable[[list[nn.Parameter]], Any] | None) -> list[torch.Tensor]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=True)
    for epoch in range(3):
        ids = shuffled(0, epoch, len(DATA))
        for at in range(0, 24, 8):
            x, y = (column[torch.from_numpy(ids[at : at + 8].copy())] for column in DATA.tensors)
            F.cross_entropy(model(x), y).backward()
            if clip is not None:
                clip(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def by_run(micro_batch: int, **settings: Any) -> tuple[str, list[torch.Tensor]]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run = lightwork.distribute(
        model, optimizer, global_batch=8, micro_batch=micro_batch, run_dir=new_folder(), **settings
    )
    for step in run.steps(DATA, epochs=3):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
    result = run.digest(), list(run.state_dict().values())
    run.close()
    return result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_clipping_is_that_of_plain_pytorch(way: str, micro_batch: int) -> None:
    setting, clip = WAYS[way]
    ((_, ours),) = run_ranks(1, lambda: by_run(micro_batch, **setting))
    theirs, unclipped = by_hand(clip), by_hand(None)
    for mine, plain, without in zip(ours, theirs, unclipped, strict=True):
        if way == "value" and micro_batch == 8:
            assert torch.equal(mine, plain)
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(plain, without, rtol=1e-2)


PLANS: dict[str, dict[str, Any]] = {
    "host": {},
    "group": {"transport": "group"},
    "zero1": {"transport": "group", "placement": "zero1"},
    "zero3": {"transport": "group", "placement": "zero3"},
    "disk": {"offload": {"optimizer": "disk", "weights": "disk"}},
    "rehearsal": {"device": "rehearsal"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["value", "adaptive"])
def test_clipping_does_not_depend_on_the_team(way: str, plan: str) -> None:
    # A rehearsed device's kernels take larger pieces, which is a part of the spec.
    device = {key: value for key, value in PLANS[plan].items() if key == "device"}
    alone = run_ranks(1, lambda: by_run(2, **WAYS[way][0], **device))[0][0]
    for num_workers in (2, 3):
        team = run_ranks(num_workers, lambda: by_run(2, **WAYS[way][0], **PLANS[plan]), seed=num_workers)
        assert {digest for digest, _ in team} == {alone}


@pytest.mark.parametrize("way", ["value", "adaptive"])
def test_clipping_in_small_pieces_is_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_ranks(1, lambda: by_run(2, **WAYS[way][0]))[0][1]
    monkeypatch.setattr(lightwork.run.distribute, "TUNING", lightwork.run.distribute.TUNING)
    in_small_pieces(block=16, bucket=32)
    pieces = run_ranks(2, lambda: by_run(2, **WAYS[way][0]))[0][1]
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_grad_norm": 1.0, "clip_grad_value": 1.0},
        {"clip_grad_value": 0},
        {"clip_grad_adaptive": True},
        {"clip_grad_adaptive": 0.1, "optimizer_state": "int8"},
    ],
)
def test_impossible_clipping_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="clip_grad"):
        run_ranks(1, lambda: tiny_run(**settings))
