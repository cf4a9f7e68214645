"""Weights that are shared out or offloaded are brought when a script reads them between steps, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.errors import UsageError
from tests.fake_ranks import run_ranks
from tests.training import in_small_pieces, new_folder, poison_what_is_given_back, saved

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

PLANS: list[tuple[int, dict[str, Any]]] = [
    (2, {"transport": "group", "placement": "zero3"}),
    (3, {"transport": "group", "placement": "zero3", "precision": "bf16"}),
    (1, {"device": "rehearsal", "offload": {"weights": "host"}}),
    (2, {"device": "rehearsal", "offload": {"weights": "host"}, "precision": "bf16"}),
    (2, {"device": "rehearsal", "placement": "zero3"}),
    (1, {"offload": {"weights": "disk"}}),
]


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_pieces(block=None, bucket=600, kept=1)
    poison_what_is_given_back()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 30), nn.Linear(30, 1))


def train(look: Callable[[Any], Any], **settings: Any) -> list[Any]:
    """Return what is seen of the model between steps."""
    model, seen = build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=str(new_folder()), **settings)
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).float().mean())
        seen.append(look(model))
    run.close()
    return seen


def whole(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that may change bits, for a run that has all weights at hand."""
    return {name: value for name, value in settings.items() if name == "precision"}


def total(tensors: Any) -> float:
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors))


def kept_for_later(model: Any) -> float:
    views = [p.detach() for p in model.parameters()]
    model(INPUTS.to(views[0].dtype))
    return total(views)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda m: float(m[2].weight.detach().float().norm()),
    "all": lambda m: total(m.parameters()),
    "state dict": lambda m: total(m.state_dict().values()),
    "views kept": kept_for_later,
    "functional": lambda m: float(
        F.linear(torch.ones(1, 4, dtype=m[0].weight.dtype), m[0].weight, m[0].bias).double().sum().detach()
    ),
    "foreach": lambda m: [float(norm.detach()) for norm in torch._foreach_norm(list(m.parameters()))],
    "stacked": lambda m: float(torch.cat([p.flatten() for p in m.parameters()]).double().sum().detach()),
    "transposed": lambda m: m[2].weight.T[0].tolist(),
    "item": lambda m: m[3].bias[0].item(),
    "printed": lambda m: str(m[3].weight[0, :3].tolist()),
    "forward": lambda m: float(m.eval()(INPUTS.to(m[0].weight.dtype)).double().sum().detach()),
    "gradient": lambda m: total(
        torch.autograd.grad((m[2].weight.float() @ torch.ones(400)).square().sum(), [m[2].weight])
    ),
    "a copy": lambda m: total(copy.deepcopy(m).parameters()),
    "a file": lambda m: total(saved(m).parameters()),
    "shapes": lambda m: [(p.shape, p.numel(), p.requires_grad, p.is_contiguous()) for p in m.parameters()],
    "chunks": lambda m: [float(part.double().sum()) for part in m[2].weight.detach().chunk(3)],
}


@pytest.mark.parametrize(("num_workers", "settings"), PLANS, ids=str)
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_is_read_is_the_value(look: Callable[[Any], Any], num_workers: int, settings: dict[str, Any]) -> None:
    (expected,) = run_ranks(1, lambda: train(look, **whole(settings)))
    assert run_ranks(num_workers, lambda: train(look, **settings)) == [expected] * num_workers


@pytest.mark.parametrize(("num_workers", "settings"), PLANS, ids=str)
def test_an_average_of_them_is_the_same(num_workers: int, settings: dict[str, Any]) -> None:
    def job(settings: dict[str, Any]) -> list[float]:
        averages: list[AveragedModel] = []

        def update(model: nn.Module) -> float:
            if not averages:
                averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
            averages[0].update_parameters(model)
            return total(averages[0].parameters())

        return train(update, **settings)

    (expected,) = run_ranks(1, lambda: job(whole(settings)))
    assert run_ranks(num_workers, lambda: job(settings)) == [expected] * num_workers


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: [p.mul_(0.5) for p in m.parameters()],
    "an operator": lambda m: m[0].weight.__imul__(0.5),
    "by index": lambda m: [p.__setitem__(0, 0.0) for p in m.parameters()],
    "by data": lambda m: [p.data.mul_(0.5) for p in m.parameters()],
    "by out": lambda m: [torch.mul(p.detach(), 2, out=p) for p in m.parameters()],
    "other data": lambda m: [setattr(p, "data", torch.zeros_like(p)) for p in m.parameters()],
    "loaded": lambda m: m.load_state_dict(m.state_dict()),
    "converted": lambda m: m.double(),
    "as an array": lambda m: [p.detach_().numpy() for p in m.parameters()],
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
}


@pytest.mark.parametrize(("num_workers", "settings"), [PLANS[0], PLANS[2]], ids=str)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_would_be_lost_is_refused(write: Callable[[Any], Any], num_workers: int, settings: dict[str, Any]) -> None:
    def job(model: nn.Module) -> None:
        with torch.no_grad():
            write(model)

    # `load_state_dict` makes an error of its own, with ours in it.
    with pytest.raises((UsageError, RuntimeError), match=r"parameter \d\.(weight|bias) .*run.edit\(\)"):
        run_ranks(num_workers, lambda: train(job, **settings))


def test_after_close_the_offloaded_ones_are_plain_and_those_of_others_are_refused() -> None:
    def job(settings: dict[str, Any]) -> float:
        models: list[nn.Module] = []
        train(models.append, **settings)
        models[0](INPUTS).sum().backward()
        return total(models[0].parameters()) + total(p.grad for p in models[0].parameters())

    (expected,) = run_ranks(1, lambda: job({}))
    assert run_ranks(1, lambda: job(PLANS[2][1])) == [expected]
    with pytest.raises(UsageError, match=r"was read after run.close\(\)"):
        run_ranks(2, lambda: job(PLANS[0][1]))


class Mapped(nn.Module):
    """Reads its weights by attributes that are views, and under torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.eye(6) * scale) for scale in (0.5, 0.3, 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.w.T) @ self.v.mT
        return torch.func.vmap(lambda row: self.b @ row + self.b[0])(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "rehearsal", "offload": {"weights": "host"}},
        {"transport": "group", "placement": "zero3"},
        {"device": "rehearsal", "transport": "group", "placement": "zero3"},
    ],
    ids=str,
)
def test_views_by_attribute_and_what_torch_func_wraps_are_the_values(settings: dict[str, Any]) -> None:
    def job(**more: Any) -> list[torch.Tensor]:
        model = nn.Sequential(*(Mapped() for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=new_folder(), **more)
        data = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
        for step in run.steps(data, shuffle=False):
            for x in step:
                step.backward(model(x).square().mean())
        return list(run.state_dict().values())

    expected = run_ranks(1, job)[0]
    for seen in run_ranks(2, lambda: job(**settings)):
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other)
