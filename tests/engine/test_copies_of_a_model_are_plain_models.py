"""A copy of a model, made during a run or after it, is a model of plain PyTorch; so is the model itself after it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.errors import UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder, saved

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))

PLANS: list[dict[str, Any]] = [
    {},
    {"activations": "recompute"},
    {"activations": "int8"},
    {"activations": "offload", "device": "rehearsal"},
    {"device": "rehearsal"},
    {"offload": {"weights": "disk", "optimizer": "disk"}},
    {"transport": "group", "placement": "zero2"},
]


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1, bias=False))
        own = self[3].forward
        self[3].forward = lambda x: own(x) * 2  # some libraries put a forward beside the class's


def start(model: nn.Module, **settings: Any) -> lightwork.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=str(new_folder()), **settings)


def train(run: lightwork.Run, model: nn.Module, after: Callable[[], object] = lambda: None) -> None:
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).square().mean())
        after()


def outputs(model: nn.Module) -> list[float]:
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        values: list[float] = model(INPUTS).flatten().tolist()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return values


class Pickled(nn.Sequential):
    """As `Net`, of what can be pickled."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "twice": lambda model: saved(copy.deepcopy(saved(model))),
}


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_stays_as_it_was_made(name: str, plan: dict[str, Any]) -> None:
    make = COPIES[name]

    def job() -> None:
        model = Pickled()
        run = start(model, **plan)
        train(run, model)
        expected = outputs(model)
        other = make(model)
        assert outputs(other) == expected
        train(run, model)
        assert outputs(model) != expected
        assert outputs(other) == expected
        plain = Pickled()
        plain.load_state_dict(other.state_dict())
        assert outputs(plain) == expected
        other.train()
        other(INPUTS).sum().backward()
        run.digest()  # the run goes on

    run_ranks(2, job)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_run_of_a_copy_ends_no_other(plan: dict[str, Any]) -> None:
    def job() -> list[str]:
        model = Pickled()
        run = start(model, **plan)
        train(run, model)
        other = copy.deepcopy(model)
        second = start(other, **plan)
        train(second, other)
        train(run, model)
        return [run.digest(), second.digest()]

    one, other = run_ranks(1, job)[0]
    assert one == other
    assert run_ranks(2, job) == [[one, other]] * 2


def test_a_file_of_the_state_dict_holds_the_weights_alone() -> None:
    def job() -> int:
        model = Pickled()
        start(model)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
        return len(file.getvalue())

    plain = io.BytesIO()
    torch.save(Pickled().state_dict(), plain)
    assert run_ranks(1, job)[0] < 1.2 * len(plain.getvalue())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_average_of_the_weights_is_plain_pytorchs(plan: dict[str, Any], when: str) -> None:
    def average(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def job() -> list[list[float]]:
        model = Pickled()
        averaged = average(model) if when == "before" else None
        run = start(model, **plan)
        averaged = averaged or average(model)
        shadow = {name: value.clone() for name, value in Pickled().named_parameters()}
        first = True

        def update() -> None:
            nonlocal first
            averaged.update_parameters(model)
            for name, value in model.named_parameters():
                shadow[name] = value.detach().clone() if first else torch.lerp(shadow[name], value.detach(), 0.1)
            first = False

        train(run, model, update)
        found = {name: value for name, value in averaged.module.named_parameters()}
        assert all(torch.allclose(found[name], value) for name, value in shadow.items())
        return [outputs(averaged), outputs(model)]

    (alone,) = run_ranks(1, job)
    assert run_ranks(2, job) == [alone] * 2


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_after_close_each_worker_has_weights_of_its_own(plan: dict[str, Any]) -> None:
    def job() -> list[float]:
        model = Net()
        run = start(model, **plan)
        train(run, model)
        weights, expected = run.state_dict(), outputs(model)
        run.close()
        assert outputs(model) == expected
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            model[0].bias.add_(1)
        assert torch.equal(model[0].bias, weights["0.bias"] + 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(INPUTS).square().mean().backward()
        optimizer.step()
        return outputs(model)

    (alone,) = run_ranks(1, job)
    assert run_ranks(2, job) == [alone] * 2


def test_what_the_script_has_moved_before_close_stays_its_own() -> None:
    def job() -> None:
        model = Pickled()
        run = start(model)
        train(run, model)
        model.double()
        run.close()
        assert model[0].weight.dtype is torch.float64

    run_ranks(1, job)


def test_what_is_written_into_the_shared_weights_before_close_is_named() -> None:
    def job(write: Callable[[Any], object]) -> None:
        model = Pickled()
        run = start(model)
        train(run, model)
        with torch.no_grad():
            write(model)
        try:
            run.close()
        finally:  # it is closed all the same
            model(INPUTS).sum().backward()

    writes: list[Callable[[Any], object]] = [lambda m: m[0].bias.add_(1), lambda m: m[0].bias.data.add_(1)]
    for write in writes:
        with pytest.raises(UsageError, match=r"parameter 0.bias was written .* before run.close\(\)"):
            run_ranks(2, lambda write=write: job(write))  # type: ignore[misc]


def test_at_the_end_of_a_script_that_is_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        model: Any = Pickled()
        run = start(model)
        train(run, model)
        model[0].bias.data.add_(1)

    run_ranks(1, job)
    assert "parameter 0.bias was written" in capsys.readouterr().err


def test_a_parameter_is_in_one_run_at_a_time() -> None:
    def job(close: bool) -> list[str]:
        model = Pickled()
        run = start(model)
        train(run, model)
        if close:
            run.close()
        part = nn.Sequential(model[0], nn.Linear(6, 1))
        second = start(part)
        train(second, part)
        return [second.digest()]

    with pytest.raises(UsageError, match=r"parameter 0.weight is a parameter of another run's model"):
        run_ranks(1, lambda: job(False))
    (alone,) = run_ranks(1, lambda: job(True))
    assert run_ranks(2, lambda: job(True)) == [alone] * 2
