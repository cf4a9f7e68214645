"""A script that reads, clips or scales gradients as in a plain loop is told what replaces that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.errors import Disagreement, UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def start(model: nn.Module, **settings: Any) -> lightwork.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=str(new_folder()), **settings)


def train(use: Callable[[Any], object], where: str, **settings: Any) -> str:
    """Train, using gradients inside or after the inner loop; return the digest."""
    model = build()
    run = start(model, **settings)
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).square().mean())
            if where == "inside":
                use(model)
        if where == "after":
            use(model)
    return run.digest()


def scale_all(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def rows(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


USES: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    "clip_grad_norm_, one": lambda m: nn.utils.clip_grad_norm_(m[0].weight, 0.1, foreach=False),
    "clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.1),
    "get_total_norm": lambda m: nn.utils.get_total_norm(rows(m)),
    "clip_grads_with_norm_": lambda m: nn.utils.clip_grads_with_norm_(m.parameters(), 0.1, torch.ones(())),
    "scaled": scale_all,
    "scaled by data": lambda m: m[0].weight.grad.data.mul_(0.5),
    "unscaled": lambda m: torch._foreach_div_(rows(m), 2.0),
    "read": lambda m: m[2].bias.grad.abs().max(),
    "as numbers": lambda m: m[2].bias.grad.tolist(),
    "as an array": lambda m: m[2].bias.grad.numpy(),
    "compared": lambda m: bool((m[0].weight.grad == 0).all()),
    "copied": lambda m: [p.grad.clone() for p in m.parameters()],
    "flattened": lambda m: nn.utils.parameters_to_vector(rows(m)),
    "zeroed": lambda m: m.zero_grad(set_to_none=False),
    "noise added": lambda m: m[0].weight.grad.add_(torch.randn(3, 4)),
}


@pytest.mark.parametrize("where", ["inside", "after"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_uses_gradients_in_the_loop_is_told_what_replaces_it(use: Callable[[Any], object], where: str) -> None:
    with pytest.raises(UsageError, match=r"gradient of parameter .* clip_grad_norm="):
        run_ranks(1, lambda: train(use, where))


@pytest.mark.parametrize("settings", [{}, {"device": "rehearsal"}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("where", ["inside", "after"])
def test_what_does_not_use_them_changes_nothing(where: str, settings: dict[str, Any]) -> None:
    (expected,) = run_ranks(1, lambda: train(lambda model: None, where, **settings))
    harmless: list[Callable[[Any], object]] = [
        lambda m: m.zero_grad(),
        lambda m: [p.grad is not None and p.grad.shape for p in m.parameters()],
        lambda m: str(m[0].weight.grad),
        lambda m: m.to("cpu").float() if m[0].weight.dtype is torch.float32 else None,
        lambda m: copy.deepcopy(m),
        lambda m: torch.autograd.grad(m(INPUTS.to(m[0].weight.dtype)).sum(), list(m.parameters())),
    ]
    for use in harmless:
        assert run_ranks(2, lambda use=use: train(use, where, **settings)) == [expected] * 2  # type: ignore[misc]


def test_a_gradient_written_by_the_script_is_refused() -> None:
    def write(model: Any) -> None:
        model[0].bias.grad = torch.ones(3)

    for where in ("inside", "after"):
        with pytest.raises(UsageError, match=r"parameter 0.bias has a gradient that is none of the run's"):
            run_ranks(1, lambda where=where: train(write, where))  # type: ignore[misc]


def test_a_plain_backward_is_told_of_step_backward() -> None:
    for where in ("inside", "after"):
        with pytest.raises(UsageError, match=r"Call step.backward\(loss\) instead"):
            run_ranks(1, lambda where=where: train(lambda m: m(INPUTS).sum().backward(), where))  # type: ignore[misc]


def test_hooks_on_gradients_work() -> None:
    def job(halve: bool, rate: float) -> list[list[float]]:
        model = build()
        for parameter in model.parameters():
            if halve:
                parameter.register_hook(lambda gradient: gradient * 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=str(new_folder()))
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                step.backward(model(x).square().mean())
        return [value.flatten().tolist() for value in run.state_dict().values()]

    assert run_ranks(1, lambda: job(True, 0.5)) == run_ranks(1, lambda: job(False, 0.25))


def test_after_the_run_gradients_are_plain() -> None:
    def job() -> None:
        model = build()
        run = start(model)
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                step.backward(model(x).square().mean())
        run.close()
        assert all(parameter.grad is None for parameter in model.parameters())
        model(INPUTS).sum().backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0

    run_ranks(1, job)


def test_modules_in_train_mode_on_one_worker_alone_are_named() -> None:
    def job() -> None:
        model = build()
        run = start(model)
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                step.backward(model(x).square().mean())
            if run.is_main:
                model[1].eval()  # type: ignore[index]

    with pytest.raises(Disagreement, match="modules in train mode"):
        run_ranks(2, job)


def test_eval_mode_on_all_workers_is_legal() -> None:
    (alone,) = run_ranks(1, lambda: train(lambda model: model.eval(), "after"))
    assert run_ranks(2, lambda: train(lambda model: model.eval(), "after")) == [alone] * 2
