"""Buffers mean what their modules mean by them: by torch's own modules as in plain PyTorch, else refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

import lightwork
from lightwork.errors import UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)) + torch.arange(24)[:, None] / 8


def train(model: nn.Module, *, micro_batch: int = 2, buffers: dict[str, Any] | None = None) -> list[Any]:
    """Return digests, buffers after each step, and what the model gives in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = lightwork.distribute(
        model, optimizer, global_batch=8, micro_batch=micro_batch, buffers=buffers, run_dir=str(new_folder())
    )
    seen: list[Any] = []
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).square().mean())
        seen.append(run.digest())
    seen.append({name: value.tolist() for name, value in model.named_buffers()})
    with torch.no_grad():
        seen.append(model.eval()(INPUTS).tolist())
    return seen


def by_hand(model: nn.Module, micro_batch: int) -> tuple[dict[str, Any], Any]:
    """Accumulate gradients, one micro-batch after the other, as a plain loop does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in INPUTS.split(8):
        for part in batch.split(micro_batch):
            (model(part).square().mean() * len(part) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return {name: value.tolist() for name, value in model.named_buffers()}, model.eval()(INPUTS).tolist()


def normed(norm: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(), nn.Linear(4, 1))


class OverTime(nn.Module):
    """Instance normalisation over a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True, momentum=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(torch.stack([x, x * 2, x + 1], dim=2)).mean(2) + x
        return result


#: Of these a plain loop over micro-batches keeps the same, whatever their order.
SAME_AS_A_LOOP: dict[str, Callable[[], nn.Module]] = {
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "cumulative, not affine": lambda: nn.BatchNorm1d(4, momentum=None, affine=False),
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "ranges": MinMaxObserver,
}

#: Of these with one micro-batch a step.
SAME_AS_PLAIN: dict[str, Callable[[], nn.Module]] = {
    **SAME_AS_A_LOOP,
    "moving average": lambda: nn.BatchNorm1d(4),
    "instances": OverTime,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "moving ranges": MovingAverageMinMaxObserver,
    "quantised": lambda: FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255),
}


def assert_close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(value), rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME_AS_PLAIN)
def test_with_one_micro_batch_they_are_plain_pytorchs(name: str) -> None:
    expected, outputs = by_hand(normed(SAME_AS_PLAIN[name]), 8)
    for num_workers in (1, 2):
        for seen in run_ranks(num_workers, lambda: train(normed(SAME_AS_PLAIN[name]), micro_batch=8)):
            assert_close(seen[-2], expected)
            assert torch.allclose(torch.tensor(seen[-1]), torch.tensor(outputs), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME_AS_PLAIN)
def test_with_several_they_do_not_depend_on_the_team(name: str) -> None:
    (alone,) = run_ranks(1, lambda: train(normed(SAME_AS_PLAIN[name])))
    if name in SAME_AS_A_LOOP:
        expected, _ = by_hand(normed(SAME_AS_PLAIN[name]), 2)
        assert_close(alone[-2], expected)
    for num_workers in (2, 3):
        assert run_ranks(num_workers, lambda: train(normed(SAME_AS_PLAIN[name]))) == [alone] * num_workers


def test_what_quantisation_keeps_is_in_its_range() -> None:
    buffers = train_alone(SAME_AS_PLAIN["quantised"])
    assert 0 <= buffers["0.zero_point"][0] <= 255
    assert buffers["0.activation_post_process.min_val"] == pytest.approx(float(INPUTS.min()))
    assert buffers["0.activation_post_process.max_val"] == pytest.approx(float(INPUTS.max()))


def train_alone(norm: Callable[[], nn.Module]) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(1, lambda: train(normed(norm)))[0][-2]
    return found


class Queue(nn.Module):
    """Past samples, and where the next ones go."""

    def __init__(self, by_column: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.by_column = nn.Linear(4, 4), by_column
        self.register_buffer("queue", torch.zeros((4, 16) if by_column else (16, 4)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        table = self.queue.T if self.by_column else self.queue
        result = y @ table.clone().T
        if self.training:
            at = int(self.pointer)
            table[at : at + len(x)] = y.detach()[: 16 - at]
            self.pointer.fill_((at + len(x)) % 16)
        return result + y.mean(1, keepdim=True)


class Bank(Queue):
    """Samples by a number of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        self.queue[(x[:, 0] * 10).long().abs() % 16] = y.detach()
        return y


class Wrapping(Queue):
    """A pointer alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pointer.fill_((int(self.pointer) + 5) % 16)
        y: torch.Tensor = self.fc(x)
        return y


@pytest.mark.parametrize(
    ("build", "what"),
    [(Queue, "queue"), (lambda: Queue(True), "queue"), (Bank, "queue"), (Wrapping, "pointer")],
    ids=["queue", "columns", "bank", "pointer"],
)
def test_what_the_default_rule_would_spoil_is_refused(build: Callable[[], nn.Module], what: str) -> None:
    for num_workers in (1, 2):
        with pytest.raises(UsageError, match=f"buffer {what} .*buffers="):
            run_ranks(num_workers, lambda: train(build()))


@pytest.mark.parametrize("build", [Queue, Bank, Wrapping])
def test_with_one_micro_batch_or_a_rule_it_is_right(build: Callable[[], nn.Module]) -> None:
    expected, outputs = by_hand(build(), 8)
    for num_workers in (1, 2):
        for seen in run_ranks(num_workers, lambda: train(build(), micro_batch=8)):
            assert_close(seen[-2], expected)
            assert torch.allclose(torch.tensor(seen[-1]), torch.tensor(outputs), rtol=1e-5, atol=1e-6)
    rules = {"queue": "last", "pointer": "last"}
    (alone,) = run_ranks(1, lambda: train(build(), buffers=rules))
    assert run_ranks(2, lambda: train(build(), buffers=rules)) == [alone] * 2


class Flagged(nn.Module):
    """Looks at its first batch, and says so in a flag; counts beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 1)
        self.register_buffer("ready", torch.zeros((), dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if not bool(self.ready):
                self.shift.copy_(-x.mean(0))
                self.ready.fill_(1)
        y: torch.Tensor = self.fc(x + self.shift)
        return y


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_a_flag_is_refused_until_it_has_a_rule(dtype: torch.dtype) -> None:
    for num_workers in (1, 2):
        with pytest.raises(UsageError, match=r"buffer ready .*buffers="):
            run_ranks(num_workers, lambda: train(Flagged(dtype)))
    rule = "last" if dtype is torch.bool else "maximum"
    (alone,) = run_ranks(1, lambda: train(Flagged(dtype), buffers={"ready": rule}))
    assert (alone[-2]["ready"], alone[-2]["calls"]) == (1, 12)
    assert torch.allclose(torch.tensor(alone[-2]["shift"]), -INPUTS[:8].mean(0))
    assert run_ranks(2, lambda: train(Flagged(dtype), buffers={"ready": rule})) == [alone] * 2
    expected, _ = by_hand(Flagged(dtype), 8)
    (seen,) = run_ranks(1, lambda: train(Flagged(dtype), micro_batch=8))
    assert_close(seen[-2], expected)
