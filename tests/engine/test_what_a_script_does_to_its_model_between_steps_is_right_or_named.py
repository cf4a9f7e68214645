"""Whatever a script does to its model at or after `distribute` is as in plain PyTorch, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import lightwork
from lightwork.engine.looks import EVERY
from lightwork.errors import SpecError, UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)) + 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.body, self.head = nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("cache", None)
        self.register_buffer("holes", torch.tensor([1.0, float("nan")]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.norm(x)))) / self.temperature


def start(model: nn.Module, **settings: Any) -> lightwork.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lightwork.distribute(
        model, optimizer, **{"global_batch": 8, "micro_batch": 4, "run_dir": str(new_folder()), **settings}
    )


def train(
    model: nn.Module, change: Callable[[Any, lightwork.Run], object], at: str = "between", **settings: Any
) -> list[Any]:
    """Train in three steps, with a change to the model before, inside or between them; return what was seen of it."""
    run = start(model, **settings)
    seen: list[Any] = []
    if at == "before":
        change(model, run)
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            loss = model(x).square().mean()
            if at == "inside" and step.index == 0:
                change(model, run)
            step.backward(loss)
            if at == "after backward":
                change(model, run)
        if at == "between" and step.index == 0:
            change(model, run)
        seen.append(step.loss)
    seen.append(run.digest())
    run.close()
    return seen


def assign(model: Net) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def set_data(model: Net) -> None:
    model.body.weight.data = model.body.weight.data.clone()


def probe(model: Net) -> None:
    with torch.no_grad():
        model(INPUTS)


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "fill a buffer": ("buffer temperature", lambda m: m.temperature.fill_(0.5)),
    "fill a buffer by data": ("buffer temperature", lambda m: m.temperature.data.mul_(0.5)),
    "replace a buffer": ("buffer temperature", lambda m: setattr(m, "temperature", torch.full((1,), 0.5))),
    "reshape a buffer": ("buffer temperature", lambda m: setattr(m, "temperature", torch.ones(3))),
    "reset statistics": ("buffer norm.running_mean", lambda m: m.norm.reset_running_stats()),
    "a forward in train mode": ("buffer norm.running_mean", probe),
    "a buffer that appears": ("buffer cache", lambda m: setattr(m, "cache", torch.ones(2))),
    "a buffer that goes": ("buffer temperature", lambda m: setattr(m, "temperature", None)),
    "a new buffer": ("buffer head.scale", lambda m: m.head.register_buffer("scale", torch.ones(1))),
    "a new parameter": ("parameter norm.extra", lambda m: m.norm.register_parameter("extra", nn.Parameter(INPUTS))),
    "a new head": ("module head", lambda m: setattr(m, "head", nn.Linear(6, 1))),
    "a module removed": ("module head", lambda m: delattr(m, "head")),
    "a module added": ("module tail", lambda m: m.add_module("tail", nn.Linear(1, 1))),
    "a parameter replaced": ("parameter head.weight", lambda m: setattr(m.head, "weight", nn.Parameter(INPUTS))),
    "weight norm": ("parameter head.weight", lambda m: nn.utils.parametrizations.weight_norm(m.head)),
    "pruning": ("parameter head.weight", lambda m: prune.l1_unstructured(m.head, "weight", 0.3)),
    "assigned": ("parameter norm.weight", assign),
    "loaded": ("parameter norm.weight", lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))),
    "bfloat16": ("parameter norm.weight", lambda m: m.bfloat16()),
    "other data": ("parameter body.weight", set_data),
    "written by data": ("parameter body.weight", lambda m: m.body.weight.data.mul_(0.5)),
    "clamped by data": ("parameter body.bias", lambda m: m.body.bias.data.clamp_(-0.01, 0.01)),
    "initialised anew": ("parameter head.weight", lambda m: nn.init.xavier_uniform_(m.head.weight)),
}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *((name, "between") for name in CHANGES),
        *((name, "before") for name in CHANGES if name != "reset statistics"),  # which changes nothing there
    ],
)
def test_a_change_outside_an_edit_is_refused_by_name(name: str, at: str) -> None:
    what, change = CHANGES[name]
    for num_workers in (1, 2) if at == "between" else (1,):
        with pytest.raises(UsageError, match=f"^{what} "):
            run_ranks(num_workers, lambda: train(Net(), lambda model, run: change(model), at))


@pytest.mark.parametrize("name", ["fill a buffer", "a buffer that appears", "loaded", "written by data", "a new head"])
def test_so_is_one_after_the_last_step(name: str) -> None:
    what, change = CHANGES[name]

    def job(call: Callable[[lightwork.Run], object]) -> None:
        model = Net()
        run = start(model)
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                step.backward(model(x).square().mean())
        change(model)
        call(run)

    calls: list[Callable[[lightwork.Run], object]] = [
        lambda run: run.save(),
        lambda run: run.digest(),
        lambda run: run.state_dict(),
        lambda run: run.evaluate(TensorDataset(INPUTS)).__enter__(),
        lambda run: run.edit().__enter__(),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"^{what} "):
            run_ranks(1, lambda call=call: job(call))  # type: ignore[misc]


#: With these plain PyTorch's own forward fails.
BROKEN = ("a module removed", "a parameter replaced")


@pytest.mark.parametrize("after", [30, 39])
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in BROKEN])
def test_so_is_one_late_in_a_run_before_anything_comes_of_it(name: str, after: int) -> None:
    what, change = CHANGES[name]
    if name in ("assigned", "bfloat16"):  # buffers, too, and these are looked at in every step
        what = f"({what}|buffer temperature)"
    steps: list[int] = []

    def job() -> None:
        model = Net()
        run = start(model)
        for step in run.steps(TensorDataset(INPUTS), max_steps=40):
            for (x,) in step:
                step.backward(model(x).square().mean())
            if step.index == after:
                change(model)
            steps.append(step.index)

    with pytest.raises(UsageError, match=f"^{what} "):
        run_ranks(1, job)
    if name != "a new buffer":  # of a module that had nothing: looked for at the end
        assert steps[-1] <= after + EVERY


INSIDE: dict[str, tuple[str, Callable[[Any], object]]] = {
    name: CHANGES[name]
    for name in ("a buffer that appears", "a buffer that goes", "a new head", "written by data", "other data")
}


@pytest.mark.parametrize("name", INSIDE)
def test_so_is_one_in_the_first_forward(name: str) -> None:
    what, change = INSIDE[name]
    with pytest.raises(UsageError, match=f"^{what} "):
        run_ranks(1, lambda: train(Net(), lambda model, run: change(model), "inside"))


@pytest.mark.parametrize(
    "name", ["fill a buffer", "a forward in train mode", "loaded", "clamped by data", "a new head"]
)
def test_so_is_one_after_backward_in_the_loop(name: str) -> None:
    what, change = CHANGES[name]
    for micro_batch in (4, 8):
        with pytest.raises(UsageError, match=f"^{what} "):
            run_ranks(
                1,
                lambda micro_batch=micro_batch: train(  # type: ignore[misc]
                    Net(), lambda model, run: change(model), "after backward", micro_batch=micro_batch
                ),
            )


def test_a_buffer_that_the_loop_sets_before_forward_has_that_value() -> None:
    def job() -> list[float]:
        model: Any = Net()
        run = start(model)
        seen = []
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                model.temperature.fill_(1 / (1 + step.index))
                step.backward(model(x).square().mean())
            seen.append(model.temperature.item())
        return seen

    for num_workers in (1, 2, 3):
        for seen in run_ranks(num_workers, job):
            assert seen == pytest.approx([1, 1 / 2, 1 / 3])


def halve(model: Net, run: lightwork.Run) -> None:
    with run.edit():
        model.temperature.fill_(0.5)
        model.norm.reset_running_stats()
        model.head.load_state_dict({"weight": torch.ones(1, 6), "bias": torch.zeros(1)})
        model.body.weight.data.mul_(0.5)


def by_hand() -> list[float]:
    model, losses = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(INPUTS.split(8)):
        start = copy.deepcopy(model.norm.state_dict())
        loss, left = 0.0, []
        for part in batch.split(4):
            model.norm.running_mean.copy_(start["running_mean"])  # type: ignore[operator]
            model.norm.running_var.copy_(start["running_var"])  # type: ignore[operator]
            of_part = model(part).square().mean() / 2
            of_part.backward()
            loss += of_part.item()
            left.append((model.norm.running_mean.clone(), model.norm.running_var.clone()))  # type: ignore[operator]
        model.norm.running_mean.copy_((left[0][0] + left[1][0]) / 2)  # type: ignore[operator]
        model.norm.running_var.copy_((left[0][1] + left[1][1]) / 2)  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if index == 0:
            with torch.no_grad():
                model.temperature.fill_(0.5)
                model.norm.reset_running_stats()
                model.head.load_state_dict({"weight": torch.ones(1, 6), "bias": torch.zeros(1)})
                model.body.weight.mul_(0.5)
    return losses


def test_an_edit_applies_the_same_changes_once() -> None:
    (alone,) = run_ranks(1, lambda: train(Net(), halve))
    assert alone[:-1] == pytest.approx(by_hand(), rel=1e-5)
    for num_workers in (2, 3):
        assert run_ranks(num_workers, lambda: train(Net(), halve)) == [alone] * num_workers


def test_an_edit_keeps_the_form_of_weights_and_buffers() -> None:
    def edited(change: Callable[[Any], object]) -> None:
        model = Net()
        with start(model).edit():
            change(model)

    for change, what in (
        (lambda m: setattr(m, "temperature", torch.ones(3)), "buffer temperature changed"),
        (lambda m: setattr(m.head.bias, "data", torch.ones(1, 1)), "parameter head.bias has shape"),
        (lambda m: m.head.register_buffer("scale", torch.ones(1)), "buffer head.scale appeared"),
    ):
        with pytest.raises(UsageError, match=what):
            run_ranks(1, lambda change=change: edited(change))  # type: ignore[misc]


def with_gradients(model: nn.Module) -> nn.Module:
    model(INPUTS).sum().backward()
    model.norm.reset_running_stats()  # type: ignore[operator, union-attr]
    return model


def test_gradients_from_before_the_run_are_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    (expected,) = run_ranks(1, lambda: train(Net(), lambda model, run: None))
    for num_workers in (1, 2, 3):
        found = run_ranks(num_workers, lambda: train(with_gradients(Net()), lambda model, run: None))
        assert found == [expected] * num_workers
    assert "had gradients" in capsys.readouterr().err


class Tied(nn.Module):
    def __init__(self, tie: Callable[[Any], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        tie(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def expanded(model: Tied) -> None:
    model.b.bias = nn.Parameter(torch.zeros(1).expand(4))


TIES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "by data": ("b.weight", lambda m: setattr(m.b.weight, "data", m.a.weight.data)),
    "a row": ("b.bias", lambda m: setattr(m.b, "bias", nn.Parameter(m.a.weight.data[0]))),
    "transposed": ("b.weight", lambda m: setattr(m.b.weight, "data", m.a.weight.data.t())),
    "a buffer": ("b.mirror", lambda m: m.b.register_buffer("mirror", m.a.weight.data)),
    "an attribute": ("view", lambda m: setattr(m, "view", m.a.weight.detach().t())),
    "in a list": ("views", lambda m: setattr(m, "views", [m.a.weight.data[:2]])),
    "expanded": ("b.bias", expanded),
}


@pytest.mark.parametrize("name", TIES)
def test_a_tie_by_memory_alone_is_refused_by_name(name: str) -> None:
    what, tie = TIES[name]
    with pytest.raises(SpecError, match=what):
        run_ranks(1, lambda: train(Tied(tie), lambda model, run: None))


def test_parts_of_one_tensor_that_do_not_overlap_are_no_tie() -> None:
    def columns(model: Tied) -> None:
        whole = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
        model.a.weight.data, model.b.weight.data = whole[:, :4], whole[:, 4:]

    (alone,) = run_ranks(1, lambda: train(Tied(columns), lambda model, run: None))
    assert run_ranks(2, lambda: train(Tied(columns), lambda model, run: None)) == [alone] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: prune.random_unstructured(layer, "weight", 0.2),
    ],
    ids=["old spectral norm", "old weight norm", "spectral norm", "weight norm", "orthogonal", "pruned"],
)
def test_weights_that_are_made_of_others_are_no_tie(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def wrapped() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))

    (alone,) = run_ranks(1, lambda: train(wrapped(), lambda model, run: None))
    for num_workers in (2, 3):
        assert run_ranks(num_workers, lambda: train(wrapped(), lambda model, run: None)) == [alone] * num_workers


class Odd(nn.Module):
    """Buffers of odd forms: an empty one first, one that overlaps itself, small unsigned integers, NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("where", torch.empty(0))
        self.fc = nn.Linear(4, 1)
        self.register_buffer("one", torch.ones(1).expand(4))
        self.register_buffer("count", torch.zeros(2, dtype=torch.uint16))
        self.register_buffer("seen", torch.zeros(()))
        with torch.inference_mode():
            self.register_buffer("loaded", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count = (self.count.int() + 1).to(torch.uint16)
            self.seen = self.seen + x.mean()
        return self.fc(x * self.one)


@pytest.mark.parametrize("settings", [{}, {"device": "rehearsal"}], ids=str)
def test_buffers_of_odd_forms_are_kept(settings: dict[str, Any]) -> None:
    def job() -> list[Any]:
        model: Any = Odd()
        model.fc.load_state_dict({"weight": torch.ones(1, 4), "bias": torch.zeros(1)})
        seen = train(model, lambda model, run: None, **settings)
        return [*seen, model.count.tolist(), float(model.seen)]

    (alone,) = run_ranks(1, job)
    assert alone[-2] == [6, 6]  # two micro-batches in each of three steps
    assert alone[-1] == pytest.approx(sum(float(batch.mean()) for batch in INPUTS.split(8)), rel=1e-5)
    for num_workers in (2, 3):
        assert run_ranks(num_workers, job) == [alone] * num_workers


@pytest.mark.filterwarnings("ignore")
def test_buffers_that_are_no_plain_arrays_are_refused_by_name() -> None:
    def with_buffer(make: Callable[[], torch.Tensor]) -> nn.Module:
        model = Net()
        model.register_buffer("odd", make())
        return model

    for make in (
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ):
        with pytest.raises(SpecError, match=r"^buffer odd is "):
            run_ranks(1, lambda make=make: start(with_buffer(make)))  # type: ignore[misc]
