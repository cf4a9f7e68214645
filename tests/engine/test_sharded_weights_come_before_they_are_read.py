"""Placement zero3: whatever way a model reads its weights, it finds them there.

What is given back reads as NaN here, so that a weight that did not come shows.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightwork
from lightwork.device.cpu import Cpu
from lightwork.engine.forward.sources import answer_requests
from lightwork.transport.null import NullCarrier
from tests.cases import LSTM
from tests.fake_ranks import pause, run_ranks
from tests.training import new_folder

pytestmark = pytest.mark.usefixtures("small_pieces")

ZERO3 = {"transport": "group", "placement": "zero3"}


def test_a_host_without_others_starts_no_thread_to_answer_them() -> None:
    before = threading.active_count()
    weights: Any = None  # are not looked at
    answer_requests(weights, NullCarrier(0), Cpu(), threading.Event())
    assert threading.active_count() == before


class Product(torch.autograd.Function):
    """Keeps its weight outside what autograd saves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        return gradient @ ctx.weight.t(), x.flatten(0, -2).t() @ gradient.flatten(0, -2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


class Odd(nn.Module):
    """Reads its weights in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.memory = LSTM(16, 16, num_layers=2, batch_first=True)
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(16)) for _ in range(3))
        self.square = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        views = self.square.t(), self.square.T
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = checkpoint(block, x, use_reentrant=False) * scale
        x = self.frozen(self.memory(x)[0]) + x @ views[0] + Product.apply(x.to(self.square.dtype), views[1])  # type: ignore[no-untyped-call]
        return F.linear(x, self.tokens.weight)  # of another module


def train(**settings: Any) -> list[Any]:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    run = lightwork.distribute(
        model, optimizer, global_batch=6, micro_batch=2, run_dir=str(new_folder()), clip_grad_norm=1.0, **settings
    )
    ids = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(ids)
    seen: list[Any] = []
    for step in run.steps(data, epochs=2):
        for (x,) in step:
            pause()
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), x.flatten())
            step.backward(loss + 0.01 * sum(p.square().sum() for p in model.parameters() if p.requires_grad))
        if run.rank == run.world_size - 1:  # one worker alone calls the model
            with torch.autocast("cpu", torch.bfloat16, enabled="precision" in settings):
                assert model(ids[:2]).isfinite().all()
        with run.evaluate(data) as ev:
            for (x,) in ev:
                ev.add("mean", model(x).float().mean())
        if step.index == 1:
            with run.edit():
                model.square.mul_(0.5)
        if step.index == 2:
            run.save(run.run_dir / "saved")
        seen.append((step.loss, step.grad_norm, ev["mean"], run.digest()))
    run.load(run.run_dir / "saved")
    seen.append(run.digest())
    state = {name: value.sum().item() for name, value in run.state_dict().items()}
    run.close()
    return [*seen, state]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}], ids=str)
def test_a_model_finds_its_weights_however_it_reads_them(settings: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, lambda: train(**settings))
    for num_workers in (2, 3):
        for seen in run_ranks(num_workers, lambda: train(**settings), settings=ZERO3):
            assert seen == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": "recompute"},
        {"activations": {"blocks.1": "int8"}},
        {"offload": {"weights": "disk", "optimizer": "disk", "gradients": "disk"}},
        {"optimizer_state": "int8", "wire": "bf16"},
        {"device": "rehearsal"},
        {"device": "rehearsal", "offload": {"weights": "host", "optimizer": "host"}, "precision": "bf16"},
    ],
    ids=str,
)
def test_sharded_weights_compose_with_the_other_dials(settings: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, functools.partial(train, **{k: v for k, v in settings.items() if k != "device"}))
    for seen in run_ranks(2, functools.partial(train, **settings), settings=ZERO3):
        assert seen == alone
