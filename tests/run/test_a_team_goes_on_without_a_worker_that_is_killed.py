"""A worker may be killed at any point, any worker, down to one: the others go on in their processes, to the same bits.

The points are calls of the library, before, after and in the middle of which a worker kills itself; what the middle of
an update leaves is made worse than any kernel does. The oracle is the run of one worker that nobody disturbed: loss and
digest after every step, an evaluation, a sum over micro-batches, what a saved checkpoint holds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightwork
from lightwork.checkpoint import folder as folders
from lightwork.checkpoint import writing
from lightwork.checkpoint.tensors import TensorWriter
from lightwork.engine.backward.gradients import Gradients
from lightwork.engine.engine import Engine
from lightwork.engine.update import Updater
from lightwork.launcher.team import WorkerResult, fork_team
from lightwork.run.automatic import Automatic
from lightwork.run.evaluation import Evaluation
from lightwork.run.step import Step
from lightwork.spec.layout import span_of
from lightwork.spec.plan import Plan
from lightwork.state.buffers import Buffers
from lightwork.state.journal import UndoJournal
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.state import TrainedState, Walk
from lightwork.state.weights import Weights
from lightwork.team import board as boards
from lightwork.team.board import Board
from lightwork.team.ledger import Ledger
from lightwork.team.membership import Membership
from lightwork.team.presence import Presence
from lightwork.team.team import Team
from lightwork.transport.mailboxes import HostTransport
from tests.launcher.command import wait_until
from tests.training import in_small_pieces, new_folder

Seen = dict[str, Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Point:
    """A call at which to die: the `turn`-th of `name` in `place`, before it, after it, or in its middle."""

    place: Any
    name: str
    turn: int
    when: str = "before"
    spoil: Callable[..., None] | None = None  #: what the middle of it leaves, from its arguments
    end: Callable[[], None] = die
    only: Path | None = None  #: a flag that the first worker to come there writes; the others go on

    def _is_it(self) -> bool:
        """Return whether this process is to end here."""
        if self.only is None:
            return True
        try:
            self.only.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def arm(self) -> None:
        """Let this process die there."""
        call = getattr(self.place, self.name)
        calls = 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            here = calls == self.turn and self._is_it()
            if here and self.when == "before":
                self.end()
            if here and self.spoil is not None:
                self.spoil(*arguments, **named)
                self.end()
            result = call(*arguments, **named)
            if here:
                self.end()
            return result

        setattr(self.place, self.name, counted)


def half_an_update(self: BlockOptimizer, bucket: int, blocks: range, gradients: Any) -> None:
    """Leave masters and state as no kernel leaves them."""
    for index in blocks:
        self._block_tensor(self._layout.blocks[index]).fill_(float("nan"))
        for _, view in self.moments.views_of(index):
            view.fill_(77)
    self.moments.set_flags(blocks, bytes(1 for _ in self.moments.flags(blocks)))


def half_the_working_weights(self: Weights, blocks: Any) -> None:
    for block in blocks:
        span, here = span_of(self.layout, block), self._values[block.parameter].here
        if here is not self.masters_here:
            here.view(span.start, span.end).fill_(float("nan"))


def half_a_copy(self: UndoJournal, granule: Any) -> None:
    """Leave a record that is not whole, and is not marked."""
    for record in self._tensors(self._own, granule.number)[0]:
        record.fill_(0xFF)


def half_the_buffers(self: Buffers, *_: Any) -> None:
    for index, buffer in enumerate(self._buffers):
        self._value_beside(index).fill_(99)
        assert buffer.start is not None


POINTS = {
    "entering a step": Point(Engine, "enter_step", 3),
    "having entered a step": Point(Engine, "enter_step", 3, "after"),
    "choosing work, in the lock": Point(boards, "next_action", 9),
    "having chosen work, in the lock": Point(boards, "next_action", 12, "after"),
    "before a micro-batch": Point(Engine, "begin_micro_batch", 4),
    "before backward": Point(Engine, "backward", 3),
    "with a gradient": Point(Gradients, "_receive", 14),
    "with a gradient folded": Point(Gradients, "_put_sum", 11, "after"),
    "with all gradients": Point(Gradients, "run_fold", 4, "after"),
    "writing what a micro-batch came to": Point(Ledger, "write_outcome", 4, "after"),
    "having reported a micro-batch": Point(Board, "finished_micro_batch", 4, "after"),
    "before an update": Point(Updater, "update", 3),
    "copying to the journal": Point(UndoJournal, "begin", 5, "middle", half_a_copy),
    "having marked in the journal": Point(UndoJournal, "begin", 6, "after"),
    "in an update": Point(BlockOptimizer, "update_blocks", 4, "middle", half_an_update),
    "in a later update": Point(BlockOptimizer, "update_blocks", 7, "middle", half_an_update),
    "having updated": Point(BlockOptimizer, "update_blocks", 5, "after"),
    "writing working weights": Point(Weights, "write_working", 5, "middle", half_the_working_weights),
    "ending a granule": Point(UndoJournal, "end", 6, "after"),
    "before a bucket is reported": Point(Board, "finished_bucket", 5),
    "having reported a bucket": Point(Board, "finished_bucket", 6, "after"),
    "before the buffers": Point(Buffers, "combine", 1),
    "combining the buffers": Point(Buffers, "_combine", 1, "middle", half_the_buffers),
    "having combined the buffers": Point(Buffers, "_combine", 1, "after"),
    "having written the buffers": Point(Buffers, "combine", 1, "after"),
    "leaving a step": Point(Engine, "leave_step", 2),
    "having left a step": Point(Engine, "leave_step", 3, "after"),
    "posting": Point(HostTransport, "_post", 12),
    "having posted": Point(HostTransport, "_post", 13, "after"),
    "waiting for posts": Point(HostTransport, "_wait_for_all", 14),
    "having all posts": Point(HostTransport, "_wait_for_all", 15, "after"),
    "in a digest": Point(Walk, "through", 2, "after"),
    "after a digest": Point(TrainedState, "digest", 2, "after"),
    "claiming a batch of an evaluation": Point(Board, "take_evaluation", 2, "after"),
    "in an evaluation": Point(Evaluation, "add", 2),
    "exchanging an evaluation": Point(Evaluation, "_meet", 1),
    "having exchanged an evaluation": Point(Evaluation, "_meet", 1, "after"),
    "before an edit": Point(TrainedState, "edit", 1),
    "in an edit": Point(Buffers, "publish", 1),
    "attaching in an edit": Point(Weights, "attach", 1, "after"),
    "doing the leader's part": Point(Team, "by_leader", 1, "after"),
    "before a save": Point(writing, "save", 1),
    "writing tensors": Point(TensorWriter, "write", 3),
    "writing the manifest": Point(writing, "_with_rest", 1, "after"),
    "putting a checkpoint in its place": Point(folders, "_put", 1, "after"),
    "having saved": Point(writing, "save", 1, "after"),
    "before arriving where all save": Point(Team, "wait_for_arrivals", 1),
    "having arrived where all save": Point(Presence, "arrive", 2, "after"),
    "saving by itself": Point(Automatic, "save", 2),
    "in the last step": Point(Step, "backward", 7),
}


def train(deaths: dict[int, Point], folder: Path, **settings: Any) -> Seen:
    """Train with all kinds of collective calls, and return what was seen."""
    in_small_pieces(block=64, bucket=160)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    x, y = torch.randn(96, 6), torch.randint(3, (96,))
    run = lightwork.distribute(
        model,
        optimizer,
        **{"global_batch": 24, "micro_batch": 3, "clip_grad_norm": 1.0, "run_dir": folder, "save_every": 2, **settings},
    )
    if run.rank in deaths:
        deaths[run.rank].arm()
    run.keep(scheduler=scheduler)
    seen: Seen = {"steps": []}
    for step in run.steps(TensorDataset(x, y)):
        for xs, ys in step:
            out = model(xs)
            step.sum("right", (out.argmax(1) == ys).sum())
            step.backward(nn.functional.cross_entropy(out, ys))
        scheduler.step()
        seen["steps"].append((step.loss, step.grad_norm, step["right"], run.digest()))
        if step.index == 1:
            with run.evaluate(TensorDataset(x, y)) as ev:
                for xs, ys in ev:
                    ev.add("loss", nn.functional.cross_entropy(model(xs), ys))
                    ev.gather("y", ys)
            seen["evaluation"] = ev["loss"], ev["y"].tolist()
            with run.edit():
                model[0].bias.mul_(0.5)
                model[1].running_mean.add_(1.0)
        if step.index == 2:
            run.save()
    seen["saved"] = lightwork.load(folder / "checkpoint")["4.weight"].sum().item()
    return seen


_seen: dict[str, Seen] = {}


def undisturbed(settings: dict[str, Any] | None = None) -> Seen:
    """Return what one worker alone sees."""
    key = repr(settings)
    if key not in _seen:
        (alone,) = fork_team(1, partial(train, {}, new_folder(), **(settings or {})))
        assert alone.error is None, alone.error
        _seen[key] = alone.value
    return _seen[key]


def check(results: list[WorkerResult], expected: Any, num_dead: int) -> None:
    """Check that those who were to live have seen what one worker alone sees."""
    living = [result for result in results if result.status != -signal.SIGKILL]
    for result in living:
        assert result.error is None, result.error
        assert result.value == expected
    assert len(results) - len(living) == num_dead
    assert living


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_any_one_worker_may_be_killed_at_any_point(num_workers: int, name: str) -> None:
    deaths = 0
    for victim in [*range(num_workers)] * 4:  # in one round maybe none of them comes there as the victim
        if deaths and victim == 0:
            break
        results = fork_team(num_workers, partial(train, {victim: POINTS[name]}, new_folder()))
        died = sum(result.status == -signal.SIGKILL for result in results)  # not every one comes there
        check(results, undisturbed(), died)
        deaths += died
    assert deaths, "some worker comes to every point"


@pytest.mark.parametrize("victims", [(0, 1), (1, 3), (0, 2, 3)], ids=str)
def test_several_may_be_killed_in_one_step_down_to_one(victims: tuple[int, ...]) -> None:
    names = ["in an update", "with all gradients", "having marked in the journal"]
    deaths = {victim: POINTS[name] for victim, name in zip(victims, names, strict=False)}
    results = fork_team(4, partial(train, deaths, new_folder()))
    check(results, undisturbed(), sum(result.status == -signal.SIGKILL for result in results))


def test_one_worker_may_be_killed_while_it_buries_another() -> None:
    deaths = {
        0: POINTS["with all gradients"],
        1: Point(Membership, "bury", 1, "before"),
        2: Point(Membership, "bury", 1, "after"),
    }
    results = fork_team(4, partial(train, deaths, new_folder()))
    check(results, undisturbed(), sum(result.status == -signal.SIGKILL for result in results))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"optimizer_state": "int8"},
        {"wire": "bf16", "precision": "bf16"},
        {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}},
        {"clip_grad_norm": None},
        {"clip_grad_norm": None, "clip_grad_adaptive": 0.1},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize(
    "name",
    ["in an update", "in a later update", "writing working weights", "combining the buffers", "with a gradient folded"],
)
def test_every_place_and_type_of_state_is_put_back(settings: dict[str, Any], name: str) -> None:
    for victim in range(2):
        results = fork_team(2, partial(train, {victim: POINTS[name]}, new_folder(), **settings))
        check(results, undisturbed(settings), sum(result.status == -signal.SIGKILL for result in results))


@pytest.mark.parametrize(
    "name", ["choosing work, in the lock", "with a gradient", "in an update", "posting", "attaching in an edit"]
)
def test_a_worker_that_is_stopped_for_longer_than_its_lease_is_ended(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    point = replace(POINTS[name], end=stop, only=new_folder() / "stopped")  # a given one may never come there
    results = fork_team(3, partial(train, dict.fromkeys(range(3), point), new_folder(), plan=Plan(lease=0.5)))
    check(results, undisturbed(), 1)
    assert "is ended: it was stopped for" in capfd.readouterr().err


def test_without_the_record_of_an_update_a_death_in_its_middle_is_seen() -> None:
    """That these tests can fail."""

    def job() -> Seen:
        UndoJournal.begin = lambda self, granule: self._done[granule.number] != self._step + 1  # type: ignore[method-assign]
        return train(dict.fromkeys(range(2), replace(POINTS["in an update"], only=flag)), new_folder())

    flag = new_folder() / "dead"
    (survivor,) = (result for result in fork_team(2, job) if result.status != -signal.SIGKILL)
    assert survivor.error is not None or survivor.value != undisturbed()


# --- all kinds of data, and two runs in one script -------------------------------------------------------------------


class Lanes(IterableDataset[Any]):
    """A stream in shards."""

    num_shards = 8

    def shard(self, *, num_shards: int, index: int) -> Iterator[torch.Tensor]:
        for position in range(7):
            yield torch.full((6,), index + position / 10) + torch.rand(6)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(self.num_shards):
            yield from self.shard(num_shards=self.num_shards, index=index)


class InOrder(IterableDataset[Any]):
    """A stream that has only one order."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(60):
            yield torch.full((6,), index / 10) + torch.rand(6)


class Augmented(Dataset[Any]):
    """Samples that draw."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((6,), index / 10) + torch.rand(6)


DATA: dict[str, Callable[[], Any]] = {
    "samples, fetched ahead": lambda: DataLoader(Augmented(), num_workers=2),
    "a stream in shards": Lanes,
    "a stream in shards, fetched ahead": lambda: DataLoader(Lanes(), num_workers=1, batch_size=1),
    "a stream": InOrder,
}


def train_on(data: Callable[[], Any], deaths: dict[int, int]) -> list[tuple[float, str]]:
    """Train for two epochs; a worker is killed before a call of its forward."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=2, run_dir=new_folder())
    seen, calls = [], 0
    for step in run.steps(data(), epochs=2):
        for x in step:
            calls += 1
            if deaths.get(run.rank) == calls:
                die()
            step.backward(model(x).square().mean())
        seen.append((step.loss, run.digest()))
    return seen


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_what_a_killed_worker_was_to_read_is_read_by_others(data: Callable[[], Any], victim: int) -> None:
    (alone,) = fork_team(1, partial(train_on, data, {}))
    assert alone.error is None, alone.error
    results = fork_team(3, partial(train_on, data, {victim: 3}))
    living = [result for result in results if result.rank != victim]
    assert [result.error for result in living] == [None, None]
    assert [result.value for result in living] == [alone.value] * 2
    assert results[victim].status == -signal.SIGKILL


def train_two(dies_at: int | None) -> list[str]:
    """Train two models, of which the loss of one goes through the other."""
    torch.manual_seed(3)
    models = nn.Linear(6, 6), nn.Linear(6, 1)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    folder = new_folder()
    first, second = (
        lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=folder, name=name)
        for model, optimizer, name in zip(models, optimizers, ("generator", "critic"), strict=True)
    )
    data = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    seen, calls = [], 0
    both = zip(first.steps(list(data), epochs=1), second.steps(list(data), epochs=1), strict=True)
    for one, other in both:
        for x in one:
            one.backward(models[1](models[0](x)).mean())
        for x in other:
            calls += 1
            if calls == dies_at and first.rank == 1:
                die()
            other.backward(models[1](x).square().mean())
        seen.append(first.digest() + second.digest())
    return seen


def test_both_runs_of_a_script_go_on() -> None:
    (alone,) = fork_team(1, partial(train_two, None))
    assert alone.error is None, alone.error
    results = fork_team(2, partial(train_two, 4))
    assert results[1].status == -signal.SIGKILL
    assert results[0].error is None, results[0].error
    assert results[0].value == alone.value


def evaluate_on(data: Callable[[], Any], deaths: dict[int, int], died: Path) -> tuple[float, list[float]]:
    """Evaluate; a worker is killed with a batch in hand, while the others hold their first one."""
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=12, micro_batch=2, run_dir=new_folder())
    calls = 0
    with run.evaluate(data()) as ev:
        for x in ev:
            calls += 1
            if deaths.get(run.rank) == calls:
                died.touch()
                die()
            if deaths and run.rank not in deaths:  # or they may leave it nothing: who is done takes the next batch
                wait_until(died.exists)
            ev.add("loss", model(x).square().mean())
            ev.gather("out", model(x)[:, 0])
    return ev["loss"], ev["out"].tolist()


@pytest.mark.parametrize("data", ["samples, fetched ahead", "a stream"])
def test_the_batches_that_a_killed_worker_had_are_evaluated_by_others_or_named(data: str) -> None:
    (alone,) = fork_team(1, partial(evaluate_on, DATA[data], {}, Path()))
    assert alone.error is None, alone.error
    results = fork_team(3, partial(evaluate_on, DATA[data], {1: 2}, new_folder() / "died"))
    assert results[1].status == -signal.SIGKILL
    for result in (results[0], results[2]):
        if data == "a stream":
            assert "a stream is not read twice" in str(result.error)
        else:
            assert result.error is None, result.error
            assert result.value == alone.value
