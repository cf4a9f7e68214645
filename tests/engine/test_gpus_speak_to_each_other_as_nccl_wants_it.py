"""What travels straight between devices keeps NCCL's rules, tried without NCCL: a stand-in that is stricter waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightwork.team import join
from lightwork.team.environment import Environment
from lightwork.transport.base import Carrier, Pending, PointToPoint
from lightwork.transport.nccl import NcclMessages
from tests.cases import CASES
from tests.fake_ranks import FakeCarrier, run_ranks
from tests.training import alone, train

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
def test_no_worker_waits_for_one_that_waits_for_it(
    name: str, placement: str, offload: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    groups: list[StrictGroup] = []

    def direct(carrier: Carrier, _device: Any, _environment: Environment, rendezvous: Any, number: int) -> PointToPoint:
        store = rendezvous.store(f"devices {number}")
        groups.append(StrictGroup(FakeCarrier(store, carrier.host, carrier.leaders)))
        return NcclMessages(groups[-1])

    monkeypatch.setattr(join, "between_devices", direct)
    settings = {"device": "rehearsal", "placement": placement, "offload": offload}
    for num_workers, seed in ((2, 0), (3, 1)):
        groups.clear()
        for seen in run_ranks(num_workers, lambda: train(case, max_steps=2), settings=settings, seed=seed):
            assert seen == alone(name)[:2]
        assert len(groups) == num_workers
        assert all(max(group.calls) > 1 for group in groups), "what crosses was begun as a group"
