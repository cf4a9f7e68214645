"""What the engine does for a GPU, rehearsed on a CPU: the memory in units, staging and relays change no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.device.cpu import Rehearsal
from lightwork.engine.parts import settle
from lightwork.errors import MemoryFull
from lightwork.store.elements import UnitElements
from tests.cases import CASES, Case
from tests.fake_ranks import run_ranks
from tests.training import alone, distributed, in_small_pieces, new_folder, train

OFFLOADS: dict[str, dict[str, str]] = {
    "nothing offloaded": {},
    "optimizer on the host": {"optimizer": "host"},
    "weights on the host": {"weights": "host"},
    "everything on the host": {"optimizer": "host", "weights": "host", "gradients": "host"},
    "everything on disk": {"optimizer": "disk", "weights": "disk", "gradients": "disk"},
}


SOME = {name: OFFLOADS[name] for name in ("nothing offloaded", "everything on the host", "everything on disk")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_one_worker_has_the_digests_of_one_without_a_device(case: Case, offload: dict[str, Any]) -> None:
    (rehearsed,) = run_ranks(1, lambda: train(case, device="rehearsal", offload=offload, max_steps=4))
    assert rehearsed == alone(case.name)[:4]


@pytest.mark.parametrize("name", ["gpt, bf16", "experts, frozen, unused"])
@pytest.mark.parametrize("placement", ["replicate", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("offload", SOME.values(), ids=SOME)
def test_a_team_has_the_digests_of_one_worker_wherever_everything_lies(
    name: str, placement: str, offload: dict[str, Any], small_pieces: None
) -> None:
    case = CASES[name]
    (on_cpu,) = run_ranks(1, lambda: train(case, max_steps=2))
    settings = {"placement": placement, "offload": offload, "device": "rehearsal"}
    for num_workers in (2, 3):
        for rehearsed in run_ranks(num_workers, lambda: train(case, max_steps=2), settings=settings):
            assert rehearsed == on_cpu


def test_a_bucket_that_is_updated_in_part_goes_home_as_a_whole(small_pieces: None) -> None:
    case = CASES["experts, frozen, unused"]
    settings = {"precision": "bf16", "global_batch": 2, "micro_batch": 1, "max_steps": 12}
    in_small_pieces(block=None, bucket=200, kept=1)  # two experts or more in a bucket
    (on_cpu,) = run_ranks(1, lambda: train(case, **settings))
    (rehearsed,) = run_ranks(1, lambda: train(case, device="rehearsal", offload={"weights": "host"}, **settings))
    assert rehearsed == on_cpu


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": "offload"},
        {"activations": "int8", "wire": "bf16", "optimizer_state": "int8"},
        {"precision": "fp16", "activations": "recompute"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "convolution, batch norm"])
def test_the_other_dials_change_the_bits_that_they_change_without_a_device(name: str, settings: dict[str, Any]) -> None:
    case = CASES[name]
    same = {key: value for key, value in settings.items() if value != "offload"}  # which a CPU does not need
    on_cpu = alone(name, **same)
    for offload in ({}, {"optimizer": "host", "weights": "host"}):
        for rehearsed in run_ranks(2, lambda: train(case, device="rehearsal", offload=offload, **settings)):  # noqa: B023
            assert rehearsed == on_cpu


def test_a_run_is_saved_and_resumed(tmp_path: Path) -> None:
    case = CASES["gpt, bf16"]
    settings = {"device": "rehearsal", "offload": {"optimizer": "host", "weights": "host"}}

    def part(max_steps: int, **more: Any) -> str:
        run, _ = distributed(case, run_dir=str(tmp_path), **more)
        for step in run.steps(case.dataset(), max_steps=max_steps):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        run.save()
        return str(run.digest())

    (whole,) = run_ranks(1, lambda: train(case, max_steps=4))
    run_ranks(2, lambda: part(2, **settings))
    (resumed,) = run_ranks(1, lambda: part(4, **settings))
    assert resumed == whole[-1][2]


def test_a_model_without_values_is_trained_where_it_never_was() -> None:
    def built(place: str, **more: Any) -> str:
        torch.manual_seed(0)
        with torch.device(place):
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(0)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=str(new_folder()), **more)
        for step in run.steps(TensorDataset(torch.ones(16, 8)), epochs=1):
            for (x,) in step:
                step.backward(model(x).square().mean())
        return run.digest()

    (in_memory,) = run_ranks(1, lambda: built("cpu"))
    for offload in ({}, {"optimizer": "host", "weights": "host"}, {"weights": "disk"}):
        (rehearsed,) = run_ranks(1, lambda: built("meta", device="rehearsal", offload=offload))  # noqa: B023
        assert rehearsed == in_memory


def test_a_limit_on_memory_chooses_what_goes_to_the_host() -> None:
    def job(memory: str) -> tuple[dict[str, str], int]:
        in_small_pieces(block=None, bucket=512 * 1024)  # a layer or two, of 16
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = lightwork.distribute(
            model, optimizer, global_batch=4, device="rehearsal", memory=memory, run_dir=str(new_folder())
        )
        for step in run.steps(TensorDataset(torch.ones(8, 512)), epochs=1):
            for (x,) in step:
                step.backward(model(x).square().mean())
        settle(run._engine._parts)
        homes, here = (
            run._engine.state.buffers._memory._homes.values(),
            run._engine.state.buffers._memory._here.values(),
        )
        units = [e for e in (*homes, *here) if isinstance(e, UnitElements)]
        return dict(run.plan.offload), sum(e.num_bytes for e in units if Rehearsal.place == e.place)

    ((nothing, in_all),) = run_ranks(1, lambda: job("1GiB"))
    ((some, less),) = run_ranks(1, lambda: job("80MiB"))
    ((everything, least),) = run_ranks(1, lambda: job("26MiB"))
    assert nothing == {}
    assert some == {"optimizer": "host"}
    assert everything == {"optimizer": "host", "gradients": "host", "weights": "host"}
    assert in_all > less > least == 0
    with pytest.raises(MemoryFull, match=r"memory='1MiB' .* is .* too little.*nearest plan that fits"):
        run_ranks(1, lambda: job("1MiB"))
