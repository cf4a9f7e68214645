"""A host may be lost at any point, any of them, down to one: the others go on in their processes, to the same bits.

Here each host is one process, so that `kill -9` takes the whole host. The points and the oracle are those of workers
that share a memory (`test_a_team_goes_on_without_a_worker_that_is_killed`); further ones lie between any two messages.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lightwork
from lightwork.engine.engine import Engine
from lightwork.engine.exchange.exchange import BetweenHosts
from lightwork.engine.exchange.turns import Turns
from lightwork.launcher.team import fork_team
from lightwork.run.step import Step
from lightwork.team.hosts import Hosts
from lightwork.transport.base import Carrier
from lightwork.transport.regrouping import Regrouping
from lightwork.transport.sockets import SocketCarrier
from tests.run.test_a_team_goes_on_without_a_worker_that_is_killed import (
    DATA,
    POINTS,
    Point,
    Seen,
    check,
    evaluate_on,
    stop,
    train,
    train_on,
    train_two,
    undisturbed,
)
from tests.training import Numbered, in_small_pieces, new_folder, tiny_run

#: Over which the others may wait for weights that the lost host was to send.
IN_AN_EDIT = ("in an edit", "attaching in an edit", "doing the leader's part")

#: The second micro-batch of a host in the second step of `_counted`.
LAST_BACKWARD = Point(Step, "backward", 6, "after")

#: Messages that a host sends in these runs before it sends its weights, after an edit.
BEFORE_THE_EDIT = 40


def run_hosts(num_hosts: int, deaths: dict[int, Point], before: Callable[[], None] = lambda: None, **more: Any) -> int:
    """Check that the survivors of `deaths` see what one worker alone sees; return how many hosts died.

    `before` is called in each process.
    """

    def job() -> Seen:
        before()
        return train(deaths, folder, transport="group", **more)

    folder = new_folder()
    results = fork_team(num_hosts, job)
    died = sum(result.status == -signal.SIGKILL for result in results)
    check(results, undisturbed(more), died)
    return died


#: A worker that is alone on its host keeps no record of its updates: nobody could finish them.
OF_THE_JOURNAL = ("copying to the journal", "having marked in the journal", "ending a granule")


@pytest.mark.parametrize("name", [name for name in POINTS if name not in (*IN_AN_EDIT, *OF_THE_JOURNAL)])
def test_any_host_may_be_lost_at_any_point(name: str) -> None:
    assert sum(run_hosts(3, {victim: POINTS[name]}) for victim in range(3))


@pytest.mark.parametrize("number", [*range(1, BEFORE_THE_EDIT, 3)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_any_host_may_be_lost_between_any_two_messages(number: int, when: str) -> None:
    victim = number // 3 % 3
    assert run_hosts(3, {victim: Point(SocketCarrier, "send", number, when)}) == 1


@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize(
    ("place", "name", "turn"),
    [
        (Carrier, "exchange", 6),
        (BetweenHosts, "begin_sums", 2),
        (BetweenHosts, "sum_up", 2),
        (Turns, "_begin", 3),
        (Turns, "_add_up", 4),
        (Turns, "_end", 3),
    ],
    ids=str,
)
def test_several_hosts_may_be_lost_down_to_one(num_hosts: int, place: Any, name: str, turn: int) -> None:
    """One after the other is lost, each later than the one before."""
    deaths = {victim: Point(place, name, turn + victim) for victim in range(num_hosts - 1)}
    # Who is given the rest of a step does not come to the point as often as who computes the step again.
    assert run_hosts(num_hosts, deaths) >= min(2, num_hosts - 1)


def test_who_lacks_what_others_have_is_given_it() -> None:
    """The lost host has sent its sums to one of the others, which updates, and not to the other."""
    given = new_folder()
    take = Hosts.take

    def note() -> None:
        def noted(self: Hosts, host: int) -> Any:
            (given / f"to host {self.carrier.host}").touch()
            return take(self, host)

        Hosts.take = noted  # type: ignore[method-assign]

    for number in range(8, 28):
        assert run_hosts(3, {1: Point(SocketCarrier, "send", number, "after")}, note) == 1
    assert (given / "to host 2").exists(), "it is served in order: host 0 first"


@pytest.mark.parametrize("victim", range(4))
def test_there_may_be_more_hosts_than_micro_batches(victim: int) -> None:
    """Of 4 hosts 2 compute; each adds up a part of the sums."""
    for number in range(8, 40, 3):
        deaths = {victim: Point(SocketCarrier, "send", number, "after")}
        assert run_hosts(4, deaths, global_batch=6, save_every=None) <= 1


def test_no_sum_is_written_before_every_host_has_begun_the_step() -> None:
    """Host 0 computes nothing, and is late: host 1 can not be done with its own bucket before that comes."""

    def job() -> float:
        add_up, at = Turns._add_up_own, 0.0

        def noted(*arguments: Any) -> None:
            nonlocal at
            add_up(*arguments)
            at = time.monotonic()

        Turns._add_up_own = noted  # type: ignore[method-assign]
        in_small_pieces(block=2, bucket=2)
        run = tiny_run(global_batch=4, micro_batch=2)
        for step in run.steps(Numbered(8), max_steps=1):
            if run.rank == 0:
                time.sleep(0.5)
                began = time.monotonic()
            for _, x in step:
                step.backward(run.model(x).mean())
        return began if run.rank == 0 else at

    late, first, _ = (result.value for result in fork_team(3, job, settings={"transport": "group"}))
    assert first > late > 0


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("name", ["_try", "_gather", "_tell", "_follow", "_settle"])
def test_a_host_may_be_lost_while_they_come_together(name: str, turn: int) -> None:
    for victim in (0, 2):
        deaths = {1: POINTS["before backward"], victim: Point(Regrouping, name, 1, "after" if turn == 3 else "before")}
        if turn == 2:
            deaths[victim] = Point(Hosts, "_come_together", 1, "after")
        assert run_hosts(4, deaths) >= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"wire": "bf16", "precision": "bf16"},
        {"clip_grad_norm": None},
        {"offload": {"optimizer": "disk", "gradients": "disk"}},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize("point", [("send", 17), ("send", 22), ("send", 30)], ids=str)
def test_every_type_of_gradient_is_given_and_computed_again(settings: dict[str, Any], point: tuple[str, int]) -> None:
    for victim in range(3):
        assert run_hosts(3, {victim: Point(SocketCarrier, *point, "after")}, **settings) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_weights_that_were_to_be_sent_are_sent_or_missed_by_name(victim: int) -> None:
    folder = new_folder()
    for name in IN_AN_EDIT:
        results = fork_team(3, partial(train, {victim: POINTS[name]}, folder, transport="group"))
        for result in results:
            if result.status != -signal.SIGKILL and result.error is not None:
                assert victim == 0
                assert "rank 0 was lost while it sent its weights to the others" in result.error


def test_what_a_micro_batch_gave_before_a_host_was_lost_is_given_once(tmp_path: Path) -> None:
    """Of a step that begins again nothing is left of what was computed before."""
    (alone,) = fork_team(1, partial(_counted, tmp_path / "alone"))
    assert alone.error is None
    check(fork_team(3, partial(_counted, tmp_path / "team")), alone.value, 1)


@pytest.mark.parametrize("name", ["with a gradient", "waiting for posts", "in an evaluation", "after a digest"])
def test_a_host_that_is_stopped_for_longer_than_its_lease_is_ended(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for victim in (0, 1):
        deaths = {victim: replace(POINTS[name], end=stop)}
        assert run_hosts(3, deaths, plan=lightwork.Plan(lease=0.5)) == 1
        assert f"rank {victim} (pid" in capfd.readouterr().err


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("victim", [0, 2])
def test_what_a_lost_host_was_to_read_is_read_by_others(data: Callable[[], Any], victim: int) -> None:
    (alone,) = fork_team(1, partial(train_on, data, {}))
    assert alone.error is None, alone.error
    check(fork_team(3, partial(train_on, data, {victim: 3}), settings={"transport": "group"}), alone.value, 1)


def test_both_runs_of_a_script_go_on_without_a_host() -> None:
    (alone,) = fork_team(1, partial(train_two, None))
    assert alone.error is None, alone.error
    check(fork_team(3, partial(train_two, 2), settings={"transport": "group"}), alone.value, 1)


def test_the_batches_that_a_lost_host_had_are_evaluated_by_others() -> None:
    data = DATA["samples, fetched ahead"]
    (alone,) = fork_team(1, partial(evaluate_on, data, {}, Path()))
    assert alone.error is None, alone.error
    job = partial(evaluate_on, data, {1: 2}, new_folder() / "died")
    check(fork_team(3, job, settings={"transport": "group"}), alone.value, 1)


@pytest.mark.parametrize("point", [("leave_step", "before"), ("leave_step", "after")], ids=str)
def test_what_a_host_gave_to_a_step_that_is_done_is_not_lost_with_it(tmp_path: Path, point: tuple[str, str]) -> None:
    (alone,) = fork_team(1, partial(_counted, tmp_path / "alone"))
    assert alone.error is None
    name, when = point
    for victim in range(3):
        death = Point(Engine, name, 2, when)
        check(fork_team(3, partial(_counted, tmp_path / f"{victim}", victim, death)), alone.value, 1)


def _counted(folder: Path, victim: int = 1, death: Point = LAST_BACKWARD) -> list[Any]:
    import torch

    run = lightwork.distribute(
        model := torch.nn.Linear(2, 1),
        torch.optim.SGD(model.parameters(), lr=0.1),
        global_batch=12,
        micro_batch=1,
        run_dir=folder,
        transport="group",
    )
    if run.rank == victim:
        death.arm()
    torch.manual_seed(0)
    seen = []
    for step in run.steps(torch.utils.data.TensorDataset(torch.randn(24, 2)), max_steps=4):
        for (x,) in step:
            step.sum("samples", len(x))
            if step.batch_index % 3:
                step.gather("ids", step.sample_ids)
            step.backward(model(x).square().mean())
        seen.append((step["samples"], sorted(step["ids"].tolist()), step.loss))
    return seen
