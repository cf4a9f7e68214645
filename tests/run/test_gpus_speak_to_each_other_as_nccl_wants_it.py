"""What travels straight between devices keeps NCCL's rules, tried without NCCL: a stand-in that is stricter waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightwork.team import join
from lightwork.team.environment import Environment
from lightwork.transport.base import Carrier, Pending, PointToPoint
from lightwork.transport.gloo import GlooCarrier
from lightwork.transport.nccl import NcclMessages
from tests.cases import CASES
from tests.training import run_team, train

_ACKNOWLEDGED = 1000


class _Done:
    def wait(self) -> None:
        pass


class StrictGroup:
    """A process group as NCCL's: no tags, the n-th send meets the n-th receive, and a call ends when both sides came.

    Calls end on the host already, where NCCL's end on the GPU: what would wait there for ever waits here, too.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._collected: list[tuple[str, torch.Tensor, int]] | None = None
        self.calls: list[int] = []  #: how many sends and receives each call began

    def send(self, tensors: list[torch.Tensor], host: int, _tag: int) -> _Done:
        return self._add("send", tensors[0], host)

    def recv(self, tensors: list[torch.Tensor], host: int, _tag: int) -> _Done:
        return self._add("recv", tensors[0], host)

    def _start_coalescing(self) -> None:
        self._collected = []

    def _end_coalescing(self) -> _Done:
        collected, self._collected = self._collected or [], None
        self._run(collected)
        return _Done()

    def abort(self) -> None:
        self._carrier.close()

    def _add(self, call: str, tensor: torch.Tensor, host: int) -> _Done:
        if self._collected is None:
            self._run([(call, tensor, host)])
        else:
            self._collected.append((call, tensor, host))
        return _Done()

    def _run(self, calls: list[tuple[str, torch.Tensor, int]]) -> None:
        self.calls.append(len(calls))
        pending: list[Pending] = []
        for call, tensor, host in calls:
            number = torch.zeros(1)
            if call == "send":
                pending.append(self._carrier.send(host, tensor, 2))
                pending.append(self._carrier.receive(host, number, _ACKNOWLEDGED))
            else:
                pending.append(self._carrier.receive(host, tensor, 2))
                pending.append(self._carrier.send(host, number, _ACKNOWLEDGED))
        for work in pending:
            work.wait()


@pytest.mark.parametrize("offload", [{}, {"optimizer": "host"}], ids=["nothing offloaded", "optimizer"])
@pytest.mark.parametrize("placement", ["replicate", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["gpt, bf16", "experts, frozen, unused"])
def test_no_worker_waits_for_one_that_waits_for_it(name: str, placement: str, offload: dict[str, str]) -> None:
    case = CASES[name]

    def job() -> tuple[Any, list[int]]:
        groups: list[StrictGroup] = []

        def direct(
            carrier: Carrier, _device: Any, _environment: Environment, rendezvous: Any, number: int
        ) -> PointToPoint:
            store = rendezvous.store(f"devices {number}")
            groups.append(StrictGroup(GlooCarrier(store, carrier.host, carrier.leaders, rendezvous.address())))
            return NcclMessages(groups[0])

        join._direct = direct
        seen = train(case, max_steps=3, device="rehearsal", placement=placement, offload=offload)
        return seen, groups[0].calls

    (alone,) = run_team(1, lambda: train(case, max_steps=3))
    for num_workers in (2, 3):
        for seen, calls in run_team(num_workers, job):
            assert seen == alone
            assert max(calls) > 1, "what crosses was begun as a group"
