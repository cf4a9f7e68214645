"""Another process comes to the place of a worker that was killed, and from then on sees what one worker alone sees.

It begins its script anew. Whoever is killed over it, the newcomer or who lets it in, and at whatever point: the others
go on to the same bits.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.engine.engine import Engine
from lightwork.launcher.team import WorkerResult, fork_team
from lightwork.run.handover import HandOver
from lightwork.run.run import Run
from lightwork.spec.plan import Plan
from lightwork.team.membership import Membership
from lightwork.team.newcomer import Newcomer, Welcome
from tests.run.test_a_team_goes_on_without_a_worker_that_is_killed import DATA, POINTS, Point, stop
from tests.training import in_small_pieces, new_folder

#: What one step came to: its number first.
Seen = dict[str, Any]

NUM_STEPS = 40


def is_newcomer() -> bool:
    return "LIGHTWORK_JOINS" in os.environ


def train(arm: Callable[[int], None], folder: Path, seconds: float = 0.01, **settings: Any) -> Seen:
    """Train with all kinds of collective calls; `arm` is given the rank, and `seconds` are those of a micro-batch."""
    in_small_pieces(block=64, bucket=160)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(96, 6), torch.randint(3, (96,))
    arm(int(os.environ["LIGHTWORK_RANK"]))
    run = lightwork.distribute(
        model,
        optimizer,
        **{"global_batch": 24, "micro_batch": 3, "clip_grad_norm": 1.0, "run_dir": folder, "save_every": 9, **settings},
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1))
    run.keep(scheduler=scheduler, average=average)
    if run.step_index == 0:
        run.keep(best=100.0)
    seen: Seen = {"steps": [], "evaluations": []}
    for epoch in run.epochs(NUM_STEPS // 4):
        for step in run.steps(TensorDataset(x, y)):
            for xs, ys in step:
                time.sleep(seconds)
                out = model(xs)
                step.sum("right", (out.argmax(1) == ys).sum())
                step.backward(nn.functional.cross_entropy(out, ys))
            scheduler.step()
            average.module.bias.data.add_(step.loss)
            run.keep(best=min(run.kept["best"], step.loss))
            seen["steps"].append((step.index, step.loss, step.grad_norm, step["right"], run.digest()))
            if step.index % 5 == 4:
                with run.edit():
                    model[0].bias.mul_(0.99)
        with run.evaluate(TensorDataset(x, y)) as ev:
            for xs, ys in ev:
                ev.add("loss", nn.functional.cross_entropy(model(xs), ys))
        seen["evaluations"].append((epoch, ev["loss"]))
        if epoch % 3 == 1:
            run.save()
    seen["at the end"] = average.module.bias.item(), run.kept["best"], optimizer.param_groups[0]["lr"]
    return seen


def nobody(rank: int) -> None:
    """Let nobody be killed."""


_alone: dict[str, Seen] = {}


def undisturbed(**settings: Any) -> Seen:
    """Return what one worker alone sees."""
    key = repr(settings)
    if key not in _alone:
        (result,) = fork_team(1, partial(train, nobody, new_folder(), 0.0, **settings))
        assert result.error is None, result.error
        _alone[key] = result.value
    return _alone[key]


def check(results: list[WorkerResult], expected: Seen, num_workers: int) -> list[WorkerResult]:
    """Check what was seen by those who were not killed: all of it, or by newcomers its end; return these."""
    living = [result for result in results if result.status != -signal.SIGKILL]
    assert {result.rank for result in living} == set(range(num_workers)), "nobody is missing at the end"
    newcomers = []
    for result in living:
        assert result.error is None, result.error
        for what in ("steps", "evaluations"):
            there = result.value[what]
            assert there == expected[what][len(expected[what]) - len(there) :], f"{what} of rank {result.rank}"
        assert result.value["at the end"] == expected["at the end"]
        if len(result.value["steps"]) < NUM_STEPS:
            newcomers.append(result)
    return newcomers


def dies_in_step(victim: int, at: int, rank: int) -> None:
    """Be armed to die on entering a step, as the first process of a rank."""
    if rank == victim and not is_newcomer():
        replace(POINTS["before a micro-batch"], turn=at).arm()


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_newcomer_sees_what_one_worker_alone_sees(num_workers: int, victim: int) -> None:
    results = fork_team(num_workers, partial(train, partial(dies_in_step, victim, 6), new_folder()), restarts=3)
    (newcomer,) = check(results, undisturbed(), num_workers)
    assert newcomer.rank == victim


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"optimizer_state": "int8"},
        {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}},
        {"activations": "recompute"},
        {"clip_grad_norm": None},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_in_every_place_and_type_of_state(settings: dict[str, Any]) -> None:
    arm = partial(dies_in_step, 1, 4)
    results = fork_team(2, partial(train, arm, new_folder(), **settings), restarts=3)
    assert check(results, undisturbed(**settings), 2)


# --- whoever is killed over it ---------------------------------------------------------------------------------------

#: In a newcomer's life.
OF_NEWCOMER = {
    "before it waits": Point(Newcomer, "wait_until_let_in", 1),
    "waiting": Point(Membership, "wait_to_come", 1, "after"),
    "let in": Point(Newcomer, "wait_until_let_in", 1, "after"),
    "knowing": Point(HandOver, "take", 1, "after"),
    "before its first step": Point(Engine, "enter_step", 1),
    "in its first step": Point(Engine, "enter_step", 1, "after"),
    "in its first micro-batch": replace(POINTS["before backward"], turn=1),
    "in its first update": replace(POINTS["in an update"], turn=1),
    "in its first meeting": replace(POINTS["posting"], turn=1),
    "having posted there": replace(POINTS["having posted"], turn=1),
}

#: In the life of who lets it in.
OF_SENIOR = {
    "before writing": Point(HandOver, "write", 1),
    "having written": Point(HandOver, "write", 1, "after"),
    "having let in": Point(Membership, "admit", 1, "after"),
    "having said so": Point(Welcome, "let_in", 12, "after"),
}


def dies_twice(point: Point, rank: int) -> None:
    """Be armed to die early as the first process of rank 1, and at a point as its first newcomer."""
    if rank == 1 and not is_newcomer():
        dies_in_step(1, 3, rank)
    elif rank == 1:
        point.arm()


@pytest.mark.parametrize("name", OF_NEWCOMER)
@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_newcomer_may_be_killed_at_any_point(num_workers: int, name: str) -> None:
    folder = new_folder()
    arm = partial(dies_twice, replace(OF_NEWCOMER[name], only=folder / "died"))
    results = fork_team(num_workers, partial(train, arm, folder), restarts=3)
    assert check(results, undisturbed(), num_workers)
    assert (folder / "died").exists()


def dies_over_it(point: Point, rank: int) -> None:
    """Be armed to die early as rank 1, and, as any other, over letting it in."""
    dies_in_step(1, 3, rank)
    if rank != 1:
        point.arm()


@pytest.mark.parametrize("name", OF_SENIOR)
def test_who_lets_a_newcomer_in_may_be_killed_over_it(name: str) -> None:
    folder = new_folder()
    arm = partial(dies_over_it, replace(OF_SENIOR[name], only=folder / "died"))
    results = fork_team(3, partial(train, arm, folder), restarts=3)
    assert len(check(results, undisturbed(), 3)) == 2
    assert (folder / "died").exists()


# --- what lies before the loop ---------------------------------------------------------------------------------------


def with_calls(arm: Callable[[int], None], folder: Path, *, omits: str = "", adds: str = "") -> list[Any]:
    """Train with all collective calls before the loop, and in the body of each epoch before and between its loops.

    A newcomer omits or adds one.
    """
    omits, adds = (omits, adds) if is_newcomer() else ("", "")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(48, 6)
    arm(int(os.environ["LIGHTWORK_RANK"]))
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)

    def evaluate() -> float:
        with run.evaluate(TensorDataset(x)) as ev:
            for (xs,) in ev:
                ev.add("loss", model(xs).square().mean())
        return float(ev["loss"])

    def edit() -> None:
        with run.edit():
            model[0].weight.mul_(0.9)

    def made(name: str, call: Callable[[], Any]) -> Any:
        return None if name == omits else call()

    seen: list[Any] = [made("digest", run.digest), made("evaluate", evaluate), made("edit", edit)]
    start = {name: value.clone() for name, value in run.state_dict().items()}
    made("save", run.save)
    if adds:
        run.digest()
    for epoch in run.epochs(12):
        in_epoch = [epoch, evaluate(), start["0.weight"].sum().item()]
        for part in range(2):
            for step in run.steps(TensorDataset(x[24 * part : 24 * part + 24])):
                for (xs,) in step:
                    time.sleep(0.01)
                    step.backward(model(xs).square().mean())
            in_epoch.append(evaluate())
        seen.append(in_epoch)
        optimizer.param_groups[0]["lr"] = 0.01 / (epoch + 2)
    return [*seen[:2], *seen[3:], run.digest()]


def test_calls_before_the_loop_come_to_what_they_came_to() -> None:
    (alone,) = fork_team(1, partial(with_calls, nobody, new_folder()))
    assert alone.error is None, alone.error
    for at in (2, 5, 7):
        results = fork_team(2, partial(with_calls, partial(dies_in_step, 1, at), new_folder()), restarts=3)
        (newcomer,) = [result for result in results if result.rank == 1 and result.status == 0]
        count = len(newcomer.value) - 2
        assert 1 < count <= len(alone.value) - 2
        assert newcomer.value == [*alone.value[:2], *alone.value[-count:]]
        assert results[0].value == alone.value


@pytest.mark.parametrize("other", [{"omits": "evaluate"}, {"omits": "save"}, {"adds": "digest"}], ids=str)
def test_a_newcomer_that_makes_other_calls_is_turned_away_by_name(
    other: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    results = fork_team(2, partial(with_calls, partial(dies_in_step, 1, 2), new_folder(), **other), restarts=3)
    assert [(result.rank, result.status) for result in results] == [(0, 0), (1, -signal.SIGKILL)]
    assert results[0].value
    assert "CanNotJoin: the script calls run." in capfd.readouterr().err


def with_other_settings(arm: Callable[[int], None], folder: Path, what: str) -> str:
    """Train; a newcomer has another learning rate, fails, or leaves."""
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arm(int(os.environ["LIGHTWORK_RANK"]))
    if what == "fails before" and is_newcomer():
        raise ValueError("before distribute")
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)
    if what == "fails" and is_newcomer():
        raise ValueError("before its loop")
    if what == "leaves" and is_newcomer():
        return "left"
    for step in run.steps(torch.randn(240, 6, generator=torch.Generator().manual_seed(1)), epochs=2):
        if what == "other rate" and is_newcomer():
            optimizer.param_groups[0]["lr"] = 0.5
        if what == "breaks" and is_newcomer():
            break
        if what == "fails in its loop" and is_newcomer():
            raise ValueError("in its loop")
        for xs in step:
            time.sleep(0.01)
            step.backward(model(xs).square().mean())
    return run.digest()


@pytest.mark.parametrize("what", ["other rate", "fails", "fails before", "fails in its loop", "leaves", "breaks"])
def test_a_newcomer_that_can_not_go_on_leaves_the_others_alone(what: str) -> None:
    (alone,) = fork_team(1, partial(with_other_settings, nobody, new_folder(), ""))
    assert alone.error is None, alone.error
    results = fork_team(3, partial(with_other_settings, partial(dies_in_step, 1, 2), new_folder(), what), restarts=3)
    assert [(result.rank, result.status) for result in results] == [(0, 0), (1, -signal.SIGKILL), (2, 0)]
    assert {result.value for result in results if result.status == 0} == {alone.value}


# --- all kinds of data -----------------------------------------------------------------------------------------------


def train_on(data: Callable[[], Any], arm: Callable[[int], None]) -> list[tuple[int, float, str]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arm(int(os.environ["LIGHTWORK_RANK"]))
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=2, run_dir=new_folder())
    seen = []
    for step in run.steps(data(), epochs=9):
        for x in step:
            time.sleep(0.01)
            step.backward(model(x).square().mean())
        seen.append((step.index, step.loss, run.digest()))
    return seen


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_newcomer_goes_on_in_any_kind_of_data(data: Callable[[], Any]) -> None:
    (alone,) = fork_team(1, partial(train_on, data, nobody))
    assert alone.error is None, alone.error
    results = fork_team(2, partial(train_on, data, partial(dies_in_step, 1, 3)), restarts=3)
    (newcomer,) = [result for result in results if result.rank == 1 and result.status == 0]
    assert newcomer.value == alone.value[-len(newcomer.value) :]
    assert results[0].value == alone.value


def with_a_sample_that_kills(folder: Path) -> None:
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=folder)
    for step in run.steps(torch.randn(64, 6), epochs=2):
        for xs in step:
            if 17 in step.sample_ids:
                os.kill(os.getpid(), signal.SIGKILL)
            step.backward(model(xs).square().mean())


def test_a_micro_batch_over_which_three_were_killed_is_named() -> None:
    results = fork_team(4, partial(with_a_sample_that_kills, new_folder()))
    killed = [result for result in results if result.status == -signal.SIGKILL]
    (end,) = [result.error for result in results if result.status == 1]
    assert len(killed) == 3
    assert "3 workers were killed while they computed micro-batch" in end
    assert re.search(r"samples (\d+, 17|17, \d+): one more would be", end), end


class Unsavable:
    """Something with a state that is neither number nor tensor."""

    def state_dict(self) -> dict[str, Any]:
        return {"opaque": object()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


def keeps_what_can_not_be_saved(arm: Callable[[int], None], folder: Path) -> str:
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arm(int(os.environ["LIGHTWORK_RANK"]))
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)
    run.keep(opaque=Unsavable())
    for step in run.steps(torch.randn(240, 6, generator=torch.Generator().manual_seed(1)), epochs=2):
        for xs in step:
            time.sleep(0.01)
            step.backward(model(xs).square().mean())
    return run.digest()


def test_where_nothing_can_be_handed_over_nobody_comes_and_training_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    arm = partial(dies_in_step, 1, 2)
    results = fork_team(2, partial(keeps_what_can_not_be_saved, arm, new_folder()), restarts=3)
    assert [(result.rank, result.status) for result in results] == [(0, 0), (1, -signal.SIGKILL)]
    error = capfd.readouterr().err
    assert "nobody can be let in: opaque.opaque is a object, which can not be saved without pickle" in error
    assert "CanNotJoin: rank 1 can not come" in error


# --- every way to write epochs, at every step of one -----------------------------------------------------------------


def epochs_of(run: Run, num: int, style: str) -> Iterator[object]:
    """Go through epochs as scripts do."""
    if style == "run.epochs":
        yield from run.epochs(num)
    elif style == "range(run.epoch)":
        yield from range(run.epoch, num)
    elif style == "while run.step_index":
        while run.step_index < 4 * num:
            yield None
    elif style == "range":
        yield from range(num)


def in_epochs(style: str, lets_in_at: int, arm: Callable[[int], None], folder: Path) -> list[tuple[int, int, str]]:
    """Train 12 epochs of 4 steps; newcomers are let in before one of these alone."""
    let_in = Welcome.let_in

    def at_times(self: Welcome, step: int, hand_over: Callable[[int], int]) -> None:
        if step % 4 == lets_in_at:
            let_in(self, step, hand_over)

    Welcome.let_in = at_times  # type: ignore[method-assign]
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arm(int(os.environ["LIGHTWORK_RANK"]))
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)
    x = torch.randn(48, 6)
    seen = []
    for _ in epochs_of(run, 12, style):
        for step in run.steps(TensorDataset(x)):
            for (xs,) in step:
                time.sleep(0.01)
                step.backward(model(xs).square().mean())
            seen.append((step.index, step.epoch, run.digest()))
    return seen


@pytest.mark.parametrize("lets_in_at", range(4))
@pytest.mark.parametrize("style", ["run.epochs", "range(run.epoch)", "while run.step_index"])
def test_a_newcomer_finds_its_place_however_epochs_are_written(style: str, lets_in_at: int) -> None:
    (alone,) = fork_team(1, partial(in_epochs, style, 0, nobody, new_folder()))
    assert alone.error is None, alone.error
    assert len(alone.value) == 48
    job = partial(in_epochs, style, lets_in_at, partial(dies_in_step, 1, 2), new_folder())
    results = fork_team(2, job, restarts=3)
    (newcomer,) = [result for result in results if result.rank == 1 and result.status == 0]
    assert newcomer.value == alone.value[-len(newcomer.value) :]
    assert newcomer.value[0][0] % 4 == lets_in_at
    assert results[0].value == alone.value


def test_where_a_script_does_not_say_where_it_is_nobody_comes_and_training_goes_on() -> None:
    (alone,) = fork_team(1, partial(in_epochs, "range", 0, nobody, new_folder()))
    job = partial(in_epochs, "range", 2, partial(dies_in_step, 1, 10), new_folder())
    results = fork_team(2, job, restarts=3)
    assert [(result.rank, result.status) for result in results] == [(0, 0), (1, -signal.SIGKILL)]
    assert results[0].value == alone.value


def founders_die(folder: Path, num_founders: int) -> list[tuple[int, str]]:
    """Train; every process of the first moment is killed once another one has come to each place but the last's."""
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)
    seen = []
    for step in run.steps(torch.randn(120, 6, generator=torch.Generator().manual_seed(1)), epochs=8):
        if not is_newcomer() and run.rank < num_founders - 1 and step.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        come = len(list(folder.glob("come *")))
        for xs in step:
            if is_newcomer() and not (folder / f"come {run.rank}").exists():
                (folder / f"come {run.rank}").touch()
                if come < num_founders - 1:
                    time.sleep(0.3)  # nobody has proven anything to it yet
            if not is_newcomer() and come == num_founders - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
            step.backward(model(xs).square().mean())
        seen.append((step.index, run.digest()))
    return seen


@pytest.mark.parametrize("num_workers", [2, 3])
def test_newcomers_go_on_when_all_who_could_prove_anything_to_them_are_killed(num_workers: int) -> None:
    (alone,) = fork_team(1, partial(founders_die, new_folder(), -1))
    assert alone.error is None, alone.error
    results = fork_team(num_workers, partial(founders_die, new_folder(), num_workers), restarts=3)
    living = [result for result in results if result.status != -signal.SIGKILL]
    assert len(living) == num_workers
    for result in living:
        assert result.error is None, result.error
        assert result.value == alone.value[-len(result.value) :]


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_newcomer_that_is_stopped_in_the_lock_is_ended(turn: int, capfd: pytest.CaptureFixture[str]) -> None:
    folder = new_folder()
    point = replace(POINTS["choosing work, in the lock"], turn=turn, end=stop, only=folder / "stopped")
    job = partial(train, partial(dies_twice, point), folder, plan=Plan(lease=0.5))
    check(fork_team(2, job, restarts=3), undisturbed(), 2)
    assert "is ended: it was stopped for" in capfd.readouterr().err
