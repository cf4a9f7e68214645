"""Optimizers of many kinds, one or several: as by hand, to the bit, for any team; or refused with what was seen."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import optimizer as of_all
from torch.utils.data import TensorDataset

import lightwork
from lightwork.errors import SpecError, UsageError
from lightwork.launcher.team import fork_team
from tests.fake_ranks import run_ranks
from tests.training import new_folder

DATA = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(3)), torch.arange(48).remainder(3))

Make = Callable[[nn.Module], Any]


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def fused(optimizer: Any) -> list[optim.Optimizer]:
    """Return the optimizers, with torch's fused implementation where nothing else was asked for."""
    members = list(optimizer) if isinstance(optimizer, list) else [optimizer]
    for member in members:
        for group in member.param_groups:
            has_fused = type(member) in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
            if has_fused and group["fused"] is None and not group.get("foreach"):
                group["fused"] = True
    return members


class ByHand:
    """The same as `steps` below, in plain PyTorch."""

    def __init__(self, make: Make) -> None:
        self.model = build()
        self.given = make(self.model)
        self.members = fused(self.given)

    def step(self, at: int, between: Callable[[Any], object] = lambda optimizer: None) -> None:
        x, y = (column[at * 8 : at * 8 + 8] for column in DATA.tensors)
        for member in self.members:
            member.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        for member in self.members:
            member.step()
        between(self.given)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def states(self) -> list[Any]:
        return [copy.deepcopy(member.state_dict()["state"]) for member in self.members]


Seen = tuple[str, list[list[torch.Tensor]], list[list[Any]]]


def steps(
    make: Make,
    micro_batch: int = 8,
    between: Callable[[Any], object] = lambda optimizer: None,
    looks: bool = True,
    **settings: Any,
) -> Seen:
    """Return the digest, and after each step the weights and the optimizers' state as their `state_dict` has it."""
    model = build()
    given = make(model)
    run = lightwork.distribute(model, given, global_batch=8, micro_batch=micro_batch, run_dir=new_folder(), **settings)
    weights, states = [], []
    for step in run.steps(DATA, shuffle=False, max_steps=6):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
        between(given)
        if looks:
            weights.append([p.detach().clone() for p in model.parameters()])
            members = given if isinstance(given, list) else [given]
            states.append([copy.deepcopy(member.state_dict()["state"]) for member in members])
    digest = run.digest()
    run.close()
    return digest, weights, states


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def by_parameter(model: nn.Module, large: bool) -> list[nn.Parameter]:
    return [p for p in model.parameters() if (p.dim() > 1) == large]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": by_parameter(model, large=True)}, {"params": by_parameter(model, large=False), "lr": 0.02}]


class Own(optim.Optimizer):
    """Momentum, corrected for its start by a count of steps, here of each parameter."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def count(self, group: dict[str, Any], p: torch.Tensor) -> int:
        self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return int(self.state[p]["step"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad, alpha=0.1)
                    p.add_(m / (1 - 0.9 ** self.count(group, p)), alpha=-group["lr"])


class CountsInGroup(Own):
    def count(self, group: dict[str, Any], p: torch.Tensor) -> int:
        return int(group["step"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()


class CountsOnItself(Own):
    steps = 0

    def count(self, group: dict[str, Any], p: torch.Tensor) -> int:
        return self.steps

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        super().step()


class CountsUnderAName(Own):
    def count(self, group: dict[str, Any], p: torch.Tensor) -> int:
        return int(self.state["all"]["step"])  # type: ignore[index]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        counts = self.state["all"]  # type: ignore[index]
        counts["step"] = counts.get("step", 0) + 1
        super().step()


class SlowWeights(Own):
    """Looks ahead: every third step, half way back to weights that are first kept then."""

    every = 3

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p] and self.state[p]["step"] % self.every == 0:
                    slow = self.state[p].setdefault("slow", p.clone())
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class StateOfMatrices(Own):
    """Keeps state for matrices alone, and takes it that each parameter has a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad, alpha=0.1)
                    p.sub_(group["lr"] * m)
                else:
                    p.sub_(group["lr"] * p.grad)


class DecaysAll(Own):
    """Its weights decay with a gradient and without."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.1 * group["lr"])
        super().step()


class SlowerWeights(SlowWeights):
    every = 11


class ByTheNorm(Own):
    """Divides by the norm of the whole gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (norm + 1e-12))


class ClippedByTheNorm(ByTheNorm):
    """Does so only where it is large."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            p.sub_(0.01 * p.grad / torch.clamp(norm / 1000, min=1.0))


class Noisy(Own):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"]).add_(torch.randn_like(p), alpha=1e-3)


class Stacked(Own):
    """Keeps the momentum of all parameters of a shape under the first, as fast implementations of Muon do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                alike = [p for p in group["params"] if p.shape == shape]
                gradients = torch.stack([p.grad for p in alike])
                m = self.state[alike[0]].setdefault("m", torch.zeros_like(gradients)).mul_(0.9).add_(gradients)
                for p, update in zip(alike, m, strict=True):
                    p.sub_(group["lr"] * update)


class Around(optim.Optimizer):
    """Holds another optimizer and shares its groups."""

    def __init__(self, params: Any) -> None:
        self.base = optim.SGD(params, lr=0.05)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class Both(optim.Optimizer):
    """Two in one."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = [optim.Muon(by_parameter(model, large=True)), optim.AdamW(by_parameter(model, large=False))]
        super().__init__([group for one in self.inner for group in one.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inner:
            one.step()


class Handle(optim.Optimizer):
    """What a library hands out in place of an optimizer: nothing of it is its own."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state, lambda self, value: setattr(self.optimizer, "state", value))
    param_groups = property(
        lambda self: self.optimizer.param_groups, lambda self, value: setattr(self.optimizer, "param_groups", value)
    )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


class Asks(Own):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def muon_and_adamw(model: nn.Module) -> list[optim.Optimizer]:
    return [
        optim.Muon(by_parameter(model, large=True), lr=0.02, weight_decay=0.0),
        optim.AdamW(by_parameter(model, large=False), lr=0.01),
    ]


RIGHT: dict[str, Make] = {
    "SGD": lambda m: optim.SGD(groups(m), lr=0.1),
    "SGD, momentum": lambda m: optim.SGD(groups(m), lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD, Nesterov": lambda m: optim.SGD(groups(m), lr=0.1, momentum=0.9, nesterov=True, fused=False),
    "SGD, foreach": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True, maximize=True),
    "SGD, rate in a tensor": lambda m: optim.SGD(m.parameters(), lr=torch.tensor(0.1), momentum=0.9, fused=False),
    "Adam": lambda m: optim.Adam(groups(m), lr=0.01),
    "Adam, amsgrad": lambda m: optim.Adam(groups(m), lr=0.01, amsgrad=True, weight_decay=0.1),
    "Adam, plain": lambda m: optim.Adam(groups(m), lr=0.01, fused=False),
    "Adam, foreach": lambda m: optim.Adam(groups(m), lr=0.01, foreach=True),
    "AdamW": lambda m: optim.AdamW(groups(m), lr=0.01, maximize=True),
    "AdamW, plain, rate in a tensor": lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "Adagrad": lambda m: optim.Adagrad(groups(m), lr=0.1, initial_accumulator_value=0.1, lr_decay=0.01),
    "RMSprop": lambda m: optim.RMSprop(groups(m), lr=0.01),
    "RMSprop, all": lambda m: optim.RMSprop(groups(m), lr=0.01, centered=True, momentum=0.9),
    "Adamax": lambda m: optim.Adamax(groups(m), lr=0.01),
    "NAdam": lambda m: optim.NAdam(groups(m), lr=0.01, decoupled_weight_decay=True),
    "RAdam": lambda m: optim.RAdam(groups(m), lr=0.01),
    "Adadelta": lambda m: optim.Adadelta(groups(m)),
    "ASGD": lambda m: optim.ASGD(groups(m), lr=0.1, t0=2),
    "Rprop": lambda m: optim.Rprop(groups(m), lr=0.01),
    "Adafactor": lambda m: optim.Adafactor(groups(m), lr=0.01),
    "Muon and AdamW": muon_and_adamw,
    "three": lambda m: [*muon_and_adamw(m)[:1], *(optim.SGD([p], lr=0.1) for p in by_parameter(m, large=False))],
    "its own, counts by parameter": lambda m: Own(groups(m)),
    "its own, counts in the group": lambda m: CountsInGroup(groups(m)),
    "its own, state of the third step": lambda m: SlowWeights(groups(m)),
    "its own, state of matrices": lambda m: StateOfMatrices(groups(m)),
    "its own, decays all": lambda m: DecaysAll(groups(m)),
    "a subclass": lambda m: type("Mine", (optim.AdamW,), {})(groups(m), lr=0.01),
}


@pytest.mark.parametrize("name", RIGHT)
def test_weights_and_state_after_each_step_are_plain_pytorch_s_to_the_bit(name: str) -> None:
    make = RIGHT[name]
    plain = ByHand(make)
    expected = []
    for at in range(6):
        plain.step(at)
        expected.append((plain.weights(), plain.states()))
    ((_, weights, states),) = run_ranks(1, lambda: steps(make))
    for at, (of_weights, of_states) in enumerate(expected):
        assert same(weights[at], of_weights), f"weights after step {at}"
        assert same(states[at], of_states), f"state after step {at}"


@pytest.mark.parametrize("name", RIGHT)
def test_any_team_has_the_same_bits(name: str) -> None:
    make = RIGHT[name]
    ((digest, weights, states),) = run_ranks(1, lambda: steps(make, 2))
    for world_size in (2, 3):
        for seen in run_ranks(world_size, lambda: steps(make, 2)):
            assert seen[0] == digest
            assert same(seen[1], weights)
            assert same(seen[2], states)


@pytest.mark.parametrize("placement", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["Muon and AdamW", "its own, counts in the group", "its own, state of the third step"])
def test_so_has_one_that_shares_the_state_out(name: str, placement: str) -> None:
    make = RIGHT[name]
    ((digest, *_),) = run_ranks(1, lambda: steps(make, 2))
    seen = run_ranks(3, lambda: steps(make, 2, looks=False, transport="group", placement=placement))
    assert [of_rank[0] for of_rank in seen] == [digest] * 3


@pytest.mark.parametrize(
    "settings",
    [{"offload": {"optimizer": "disk"}}, {"device": "rehearsal", "offload": {"optimizer": "host"}}],
    ids=["disk", "host"],
)
def test_state_that_lies_elsewhere_is_served_between_steps(settings: dict[str, Any]) -> None:
    ((_, _, here),) = run_ranks(1, lambda: steps(muon_and_adamw, 2))
    ((_, _, elsewhere),) = run_ranks(1, lambda: steps(muon_and_adamw, 2, **settings))
    assert [[len(state) for state in of_step] for of_step in elsewhere] == [[4, 4]] * 6
    if settings.get("device") != "rehearsal":  # whose kernels are cut otherwise
        assert same(here, elsewhere)


# --- several ----------------------------------------------------------------------------------------------------------


def trained(num: int, *, save: bool = False, resume: Any = None) -> tuple[str, Any]:
    model = build()
    optimizers = muon_and_adamw(model)
    schedulers = [optim.lr_scheduler.CosineAnnealingLR(one, 6) for one in optimizers]
    run = lightwork.distribute(
        model, optimizers, global_batch=8, micro_batch=2, run_dir=new_folder(), resume=resume, clip_grad_norm=1.0
    )
    run.keep(muon=schedulers[0], adamw=schedulers[1])
    folder = None
    for step in run.steps(DATA, epochs=1):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
        for scheduler in schedulers:
            scheduler.step()
        if save and step.index == num - 1:
            folder = run.save(new_folder())
            break
    return run.digest(), folder


def test_several_optimizers_are_resumed_with_another_number_of_workers() -> None:
    ((whole, _),) = run_ranks(1, lambda: trained(6))
    folder = run_ranks(2, lambda: trained(3, save=True))[0][1]
    assert {digest for digest, _ in run_ranks(3, lambda: trained(6, resume=folder))} == {whole}


def test_a_bucket_has_room_for_the_state_of_its_own_optimizer_alone() -> None:
    def entries() -> set[tuple[str, ...]]:
        model = build()
        run = lightwork.distribute(model, muon_and_adamw(model), global_batch=8, run_dir=new_folder())
        rows = run._engine._parts.holdings.rows
        return {tuple(sorted(name for name in row.parts if name.startswith("state "))) for row in rows}

    (seen,) = run_ranks(1, entries)
    assert seen == {("state momentum_buffer",), ("state exp_avg", "state exp_avg_sq")}


def refused(make: Make, **settings: Any) -> str:
    """Return why a run with these optimizers is refused, before its first step."""

    def attempt() -> str:
        model = build()
        with pytest.raises((SpecError, UsageError)) as error:
            lightwork.distribute(model, make(model), global_batch=8, run_dir=new_folder(), **settings)
        return str(error.value)

    return str(run_ranks(1, attempt)[0])


REFUSED: dict[str, tuple[Make, str]] = {
    "a count on itself": (lambda m: CountsOnItself(groups(m)), "attribute 'steps'|outside of optimizer.state"),
    "a count under a name": (lambda m: CountsUnderAName(groups(m)), "optimizer.state['all']"),
    "a norm over all": (lambda m: ByTheNorm(groups(m)), "reads several parameters at once"),
    "a norm over all where it is large": (lambda m: ClippedByTheNorm(groups(m)), "reads several parameters at once"),
    "noise": (lambda m: Noisy(groups(m)), "draws random numbers in step()"),
    "a stack": (lambda m: Stacked(m.parameters()), "keeps the state of several parameters together"),
    "one around another": (lambda m: Around(groups(m)), "Around wraps another optimizer (SGD)"),
    "two in one": (Both, "wraps other optimizers (Muon, AdamW)"),
    "a handle": (lambda m: Handle(optim.AdamW(groups(m))), "Handle wraps another optimizer (AdamW)"),
    "a closure": (lambda m: Asks(groups(m)), "step() can be called without arguments"),
    "a parameter in two": (lambda m: [optim.SGD(m.parameters()), optim.Adam([m[0].bias])], "both have a parameter"),
    "an empty list": (lambda m: [], "the list of optimizers is empty"),
    "no optimizer in the list": (lambda m: [optim.SGD(m.parameters()), m], "not Sequential"),
    "LBFGS in a list": (lambda m: [optim.LBFGS(m.parameters())], "LBFGS can not train data-parallel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_team_can_not_share_is_refused_with_what_was_seen(name: str) -> None:
    make, words = REFUSED[name]
    message = refused(make)
    assert any(word in message for word in words.split("|")), message


def test_state_in_8_bits_is_refused_for_the_one_that_reads_whole_parameters() -> None:
    assert "Muon reads whole parameters" in refused(muon_and_adamw, optimizer_state="int8")


def test_observing_writes_nothing_of_the_script_s() -> None:
    def look() -> None:
        model = build()
        inner = optim.AdamW(groups(model))
        before = [p.detach().clone() for p in model.parameters()]
        random = torch.get_rng_state()
        for optimizer in (Handle(inner), Noisy(groups(model)), CountsOnItself(groups(model))):
            with pytest.raises(SpecError):
                lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder())
        assert torch.equal(torch.get_rng_state(), random)
        assert same([p.detach() for p in model.parameters()], before)
        assert all(p.grad is None for p in model.parameters())
        assert [len(group["params"]) for group in inner.param_groups] == [4, 4]
        assert not inner.state

    run_ranks(1, look)


def test_state_that_comes_later_than_was_observed_is_refused_when_it_comes() -> None:
    def attempt() -> str:
        with pytest.raises(SpecError) as error:
            later()
        return str(error.value)

    def later() -> None:
        model = build()
        run = lightwork.distribute(model, SlowerWeights(groups(model)), global_batch=8, run_dir=new_folder())
        for step in run.steps(DATA, epochs=3):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))

    assert "SlowerWeights has begun to keep state 'slow'" in run_ranks(1, attempt)[0]


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["a number", "a tensor"])
def test_one_that_changes_parameters_without_a_gradient_is_refused_where_one_has_none(rate: Any) -> None:
    def attempt() -> None:
        model = build()
        unused = nn.Parameter(torch.ones(7))
        optimizer = DecaysAll([*model.parameters(), unused], lr=rate)
        model.register_parameter("unused", unused)
        run = lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder())
        for step in run.steps(DATA):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))

    with pytest.raises(SpecError, match=r"^parameter unused got no gradient in this step, and DecaysAll changes"):
        run_ranks(1, attempt)


# --- settings that are switched ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "value", "state"),
    [
        (lambda m: optim.Adam(groups(m), lr=0.1), "amsgrad", True, "max_exp_avg_sq"),
        (lambda m: optim.RMSprop(groups(m), lr=0.1), "centered", True, "grad_avg"),
    ],
    ids=["amsgrad", "centered"],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_setting_that_needs_other_state_is_refused_at_the_step_that_would_need_it(
    make: Make, name: str, value: object, state: str, world_size: int
) -> None:
    def switch(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group[name] = value

    def attempt() -> str:
        model = build()
        optimizer = make(model)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=new_folder())
        try:
            for step in run.steps(DATA):
                before = [p.detach().clone() for p in model.parameters()]
                for x, y in step:
                    step.backward(F.cross_entropy(model(x), y))
                switch(optimizer)
        except SpecError as error:
            assert step.index == 1
            assert same(before, [p.detach() for p in model.parameters()])
            return str(error)
        return ""

    for message in run_ranks(world_size, attempt):
        assert f"keeps state {state!r} with the settings that it has now" in message
        assert f"{name} is on" in message


def momentum_from_zero(num_workers: int, late: bool, **settings: Any) -> list[Seen]:
    def job() -> Seen:
        model = build()
        optimizer = optim.SGD(groups(model), lr=0.1)
        run = lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder(), **settings)
        scheduler = cycle(optimizer) if late else None
        weights, states = [], []
        for step in run.steps(DATA, shuffle=False):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            scheduler.step() if scheduler else raise_momentum(optimizer, step.index)
            weights.append([p.detach().clone() for p in model.parameters()])
            states.append([copy.deepcopy(optimizer.state_dict()["state"])])
        return run.digest(), weights, states

    return run_ranks(num_workers, job)


def cycle(optimizer: optim.Optimizer) -> optim.lr_scheduler.OneCycleLR:
    """Return a scheduler whose constructor raises the momentum."""
    return optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=7)


def raise_momentum(optimizer: optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["momentum"] = 0.2 * step


@pytest.mark.parametrize("late", [False, True], ids=["by hand", "by a scheduler made after distribute"])
def test_momentum_that_is_raised_from_zero_is_as_by_hand(late: bool) -> None:
    plain = ByHand(lambda m: optim.SGD(groups(m), lr=0.1))
    scheduler = cycle(plain.given) if late else None
    expected = []
    for at in range(6):
        plain.step(at)
        scheduler.step() if scheduler else raise_momentum(plain.given, at)
        expected.append((plain.weights(), plain.states()))
    ((_, weights, states),) = momentum_from_zero(1, late, micro_batch=8)
    for at in range(6):
        assert same(weights[at], expected[at][0])
        assert same(states[at], expected[at][1])
    ((digest, *_),) = momentum_from_zero(1, late, micro_batch=2)
    assert {seen[0] for num in (2, 3) for seen in momentum_from_zero(num, late, micro_batch=2)} == {digest}


def test_momentum_that_is_raised_is_refused_where_a_device_has_no_room_for_it() -> None:
    with pytest.raises(SpecError, match="keeps state 'momentum_buffer' with the settings that it has now"):
        momentum_from_zero(1, late=False, device="rehearsal")


def test_a_setting_that_is_switched_and_needs_nothing_new_is_as_by_hand() -> None:
    def switch(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 - group["weight_decay"]
            group["nesterov"] = not group["nesterov"]

    make: Make = lambda m: optim.SGD(groups(m), lr=0.1, momentum=0.9, nesterov=True)  # noqa: E731
    plain = ByHand(make)
    for at in range(6):
        plain.step(at, switch)
    ((_, weights, _),) = run_ranks(1, lambda: steps(make, between=switch))
    assert same(weights[-1], plain.weights())


# --- hooks and methods ------------------------------------------------------------------------------------------------


@contextmanager
def hook_on_all(kind: str) -> Iterator[None]:
    register = getattr(of_all, f"register_optimizer_step_{kind}_hook")
    handle = register(clip)
    try:
        yield
    finally:
        handle.remove()


def clip(optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Clip by value."""


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_on_all_optimizers_is_refused_before_the_run_and_in_it(kind: str) -> None:
    words = f"torch.optim.optimizer.register_optimizer_step_{kind}_hook was called with clip"
    with hook_on_all(kind):
        assert words in refused(lambda m: optim.SGD(m.parameters()))

    def later() -> str:
        model = build()
        run = lightwork.distribute(model, optim.SGD(model.parameters()), global_batch=8, run_dir=new_folder())
        with pytest.raises(UsageError) as error, hook_on_all(kind):
            list(run.steps(DATA))
        return str(error.value)

    assert words in run_ranks(1, later)[0]


def test_a_step_that_was_replaced_on_the_object_is_refused() -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        optimizer = optim.SGD(model.parameters())
        optimizer.step = clip  # type: ignore[method-assign, assignment]
        return optimizer

    assert "optimizer.step was replaced by clip" in refused(make)


def test_a_step_that_a_scheduler_has_wrapped_is_not() -> None:
    def train() -> None:
        model = build()
        optimizer = optim.SGD(model.parameters())
        optim.lr_scheduler.StepLR(optimizer, 1)
        lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder()).close()

    run_ranks(1, train)


# --- state dicts ------------------------------------------------------------------------------------------------------


def test_a_state_dict_is_an_ordinary_one_that_torch_loads_as_weights_only() -> None:
    def save() -> Any:
        model = build()
        optimizers = muon_and_adamw(model)
        run = lightwork.distribute(model, optimizers, global_batch=8, run_dir=new_folder())
        assert optimizers[0].state_dict()["state"] == {}
        for step in run.steps(DATA, shuffle=False, max_steps=2):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        file = io.BytesIO()
        torch.save([one.state_dict() for one in optimizers], file)
        assert list(optimizers[1].state) == by_parameter(model, large=False)
        assert optimizers[1].state[model[0].bias]["step"] == 2
        assert copy.deepcopy(optimizers[1]).state_dict()["state"].keys() == {0, 1, 2, 3}
        return file.getvalue(), model[0].bias in optimizers[1].state, model[0].bias in optimizers[0].state

    data, is_in, is_in_other = run_ranks(1, save)[0]
    assert (is_in, is_in_other) == (True, False)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    plain = ByHand(lambda m: muon_and_adamw(m))
    for at in range(2):
        plain.step(at)
    found = [(type(one["state"]), {type(of) for of in one["state"].values()}) for one in loaded]
    assert found == [(dict, {dict})] * 2
    for one, member in zip(loaded, plain.members, strict=True):
        member.load_state_dict(one)


@pytest.mark.parametrize("name", ["Adam", "Muon and AdamW", "RMSprop, all", "its own, counts in the group", "Adagrad"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_dict_is_loaded_between_steps_and_before_the_first(name: str, world_size: int) -> None:
    make = RIGHT[name]
    donor = ByHand(make)
    for at in range(3):
        donor.step(at)
    donated = [copy.deepcopy(member.state_dict()) for member in donor.members]
    for state_dict in donated:  # settings are loaded with it
        state_dict["param_groups"][0]["lr"] = 0.003

    def load(optimizer: Any) -> None:
        members = optimizer if isinstance(optimizer, list) else [optimizer]
        for member, state_dict in zip(members, donated, strict=True):
            member.load_state_dict(copy.deepcopy(state_dict))

    def job(first: bool) -> tuple[list[torch.Tensor], list[Any]]:
        model = build()
        given = make(model)
        run = lightwork.distribute(model, given, global_batch=8, micro_batch=8, run_dir=new_folder())
        if first:
            load(given)
        for step in run.steps(DATA, shuffle=False, max_steps=4):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            if not first and step.index == 1:
                load(given)
        members = given if isinstance(given, list) else [given]
        return [p.detach().clone() for p in model.parameters()], [one.state_dict()["state"] for one in members]

    for first in (True, False):
        plain = ByHand(make)
        if first:
            load(plain.given)
        for at in range(4):
            plain.step(at, load if not first and at == 1 else lambda optimizer: None)
        for weights, states in run_ranks(world_size, lambda first=first: job(first)):
            assert same(weights, plain.weights())
            assert same(states, plain.states())


def test_state_that_does_not_belong_here_is_refused_and_nothing_is_changed() -> None:
    def attempt() -> list[str]:
        model = build()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        run = lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder())
        for step in run.steps(DATA, max_steps=1):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        before = run.digest()
        messages = []
        good = optimizer.state_dict()
        missing, odd, large = copy.deepcopy(good), copy.deepcopy(good), copy.deepcopy(good)
        del missing["state"][0]["exp_avg"]
        odd["state"][0]["more"] = torch.zeros(3)
        large["state"][0]["exp_avg"] = torch.zeros(3)
        for bad in (missing, odd, large):
            with pytest.raises(SpecError) as error:
                optimizer.load_state_dict(bad)
            messages.append(str(error.value))
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({**good, "param_groups": []})
        assert run.digest() == before
        optimizer.load_state_dict(good)
        assert run.digest() == before
        return messages

    missing, odd, large = run_ranks(1, attempt)[0]
    assert "0.weight has no 'exp_avg'" in missing
    assert "0.weight has also 'more'" in odd
    assert "'exp_avg' for 0.weight has 3 elements, where 1200 are expected" in large


WRITES: dict[str, Callable[[optim.Optimizer, nn.Parameter], object]] = {
    "a tensor": lambda o, p: o.state[p]["exp_avg"].mul_(0.5),
    "a tensor that is kept": lambda o, p: KEPT.append(o.state[p]["exp_avg"].mul_(0.5)),
    "an entry": lambda o, p: o.state[p].update(exp_avg=torch.zeros_like(p)),
    "one entry": lambda o, p: o.state[p].__setitem__("exp_avg", torch.zeros_like(p)),
    "a parameter's": lambda o, p: o.state.__setitem__(p, {}),
    "all": lambda o, p: o.state.clear(),
    "another mapping": lambda o, p: setattr(o, "state", {}),
}
KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("name", WRITES)
def test_state_that_is_written_in_place_is_refused(name: str) -> None:
    def attempt() -> str:
        model = build()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        run = lightwork.distribute(model, optimizer, global_batch=8, run_dir=new_folder())
        try:
            for step in run.steps(DATA):
                for x, y in step:
                    step.backward(F.cross_entropy(model(x), y))
                assert step.index == 0
                WRITES[name](optimizer, model[0].bias)
        except UsageError as error:
            return str(error)
        return ""

    assert "would not reach the team's memory" in run_ranks(1, attempt)[0]


def test_state_that_is_shared_out_is_refused_by_name() -> None:
    def attempt() -> str:
        model = build()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        settings = {"transport": "group", "placement": "zero1", "run_dir": new_folder()}
        run = lightwork.distribute(model, optimizer, global_batch=8, **settings)
        for step in run.steps(DATA, max_steps=1):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        with pytest.raises(UsageError) as error:
            optimizer.state_dict()
        run.close()
        with pytest.raises(UsageError, match="shared out"):
            optimizer.state_dict()
        return str(error.value)

    assert all("run.save() writes all of it" in message for message in run_ranks(2, attempt))


@pytest.mark.parametrize("name", ["Adam", "Muon and AdamW", "its own, counts in the group", "ASGD"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_after_close_plain_pytorch_goes_on_with_state_of_its_own(name: str, world_size: int) -> None:
    make = RIGHT[name]

    def job() -> list[torch.Tensor]:
        model = build()
        given = make(model)
        run = lightwork.distribute(model, given, global_batch=8, micro_batch=8, run_dir=new_folder())
        for step in run.steps(DATA, shuffle=False, max_steps=3):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        run.close()
        members = fused(given)
        for at in range(3, 6):
            x, y = (column[at * 8 : at * 8 + 8] for column in DATA.tensors)
            for member in members:
                member.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for member in members:
                member.step()
        return [p.detach().clone() for p in model.parameters()]

    plain = ByHand(make)
    for at in range(6):
        plain.step(at)
    for weights in run_ranks(world_size, job):
        assert same(weights, plain.weights())


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Adam", "Adafactor", "Muon and AdamW"])
@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 1.0}, {"transport": "group", "placement": "zero2"}])
def test_a_default_type_of_the_script_s_changes_nothing(
    dtype: torch.dtype, name: str, settings: dict[str, Any]
) -> None:
    def job(default: torch.dtype) -> Any:
        model = build()
        given = RIGHT[name](model)
        torch.set_default_dtype(default)
        run = lightwork.distribute(model, given, global_batch=8, micro_batch=4, run_dir=new_folder(), **settings)
        for step in run.steps(DATA, max_steps=3):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        return run.state_dict()

    # Each in a process of its own: the type is a process's.
    for world_size in (1, 2):
        expected, seen = (fork_team(world_size, lambda d=d: job(d), timeout=60)[0] for d in (torch.float32, dtype))
        assert seen.error is None
        # Some of torch's classes compute a number of theirs in the default type.
        for one, other in zip(seen.value.values(), expected.value.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_parameter_without_elements_is_left_alone() -> None:
    def job() -> str:
        torch.manual_seed(0)
        model = build()
        model.register_parameter("nothing", nn.Parameter(torch.empty(0, 4)))
        run = lightwork.distribute(model, optim.Adafactor(model.parameters()), global_batch=8, run_dir=new_folder())
        for step in run.steps(DATA, max_steps=2):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        return str(run.digest())

    assert len({*run_ranks(1, job), *run_ranks(2, job)}) == 1
