"""The engine for a device, rehearsed under a watch: memories are not mixed, and queues wait for each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightwork.device.cpu import Rehearsal
from lightwork.device.cuda import Cuda
from lightwork.errors import MemoryFull
from tests.cases import CASES, Case
from tests.training import distributed, in_small_pieces, run_team, train
from tests.two_memories import MixedMemories, Race, TwoMemories

ALL_AWAY = {"optimizer": "host", "weights": "host", "gradients": "host"}


def watched(case: Case, **settings: Any) -> tuple[str, int]:
    """Train two steps in small pieces under the watch; return the digest, and how many accesses had to wait."""
    in_small_pieces(kept=1, ahead=2)
    memories = TwoMemories()
    memories.install()
    with memories:
        run, _ = distributed(case, device="rehearsal", **settings)
        for step in run.steps(case.dataset(), max_steps=2):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        return run.digest(), memories.num_checked


@pytest.mark.parametrize("name", ["gpt, bf16", "convolution, batch norm", "Muon"])
@pytest.mark.parametrize(
    "settings",
    [
        {"offload": ALL_AWAY},
        {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}},
        {"offload": {"optimizer": "host"}, "activations": "recompute"},
        {"offload": {"weights": "host"}, "activations": "offload", "micro_batch": 16},
    ],
    ids=str,
)
def test_one_worker_waits_for_what_it_offloads(name: str, settings: dict[str, Any]) -> None:
    case = CASES[name]
    micro_batch = settings.get("micro_batch", 2)
    (plain,) = run_team(1, lambda: train(case, max_steps=2, micro_batch=micro_batch))
    ((digest, checked),) = run_team(1, lambda: watched(case, **settings))
    assert digest == plain[-1][2]
    assert checked > 0


@pytest.mark.parametrize("offload", [{}, ALL_AWAY], ids=["nothing offloaded", "everything offloaded"])
@pytest.mark.parametrize("placement", ["replicate", "zero1", "zero2", "zero3"])
def test_a_team_waits_for_each_other(placement: str, offload: dict[str, str]) -> None:
    case = CASES["gpt, bf16"]
    (plain,) = run_team(1, lambda: train(case, max_steps=2))
    for digest, checked in run_team(2, lambda: watched(case, placement=placement, offload=offload)):
        assert digest == plain[-1][2]
        assert checked > 0


def test_the_watch_sees_memories_mixed() -> None:
    def mix() -> None:
        memories = TwoMemories()
        memories.install()
        with memories:
            there = torch.zeros(3, device=Rehearsal.place)
            there.copy_(torch.ones(3))
            there + 1
            with pytest.raises(MixedMemories):
                there + torch.ones(3)

    run_team(1, mix)


def test_the_watch_sees_a_queue_that_does_not_wait() -> None:
    def race() -> None:
        memories = TwoMemories()
        memories.install()
        device = Rehearsal()
        with memories:
            there = torch.zeros(3, device=device.place)
            mark = device.mark()
            with device.queue("out"), pytest.raises(Race):
                there + 1
            with device.queue("out"):
                device.wait_for_mark(mark)
                there.mul_(2)
                left = device.mark()
            with pytest.raises(Race):
                there + 1
            device.synchronize(left)
            there + 1

    run_team(1, race)


def test_memory_that_the_host_will_not_lock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
            return 2  # cudaErrorMemoryAllocation

    monkeypatch.setattr("torch.cuda.cudart", Runtime)
    gpu = object.__new__(Cuda)  # as far as it can be without one
    with pytest.raises(MemoryFull, match=r"4 KiB of host memory for state exp_avg .*ulimit -l"):
        gpu.lock(torch.empty(1024), "state exp_avg")
