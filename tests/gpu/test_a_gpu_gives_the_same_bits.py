"""On a GPU: one worker is plain PyTorch, and neither offload nor the number of workers changes a bit."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import lightwork
from lightwork.data.order import shuffled
from lightwork.random import derive
from lightwork.team.environment import make_cublas_deterministic
from tests.cases import CASES, Case
from tests.training import distributed, in_small_pieces, new_folder, run_team, train

ON_GPU = {"device": "cuda"}
OFFLOADS: dict[str, dict[str, str]] = {
    "optimizer on the host": {"optimizer": "host"},
    "weights on the host": {"weights": "host"},
    "everything on the host": {"optimizer": "host", "weights": "host", "gradients": "host"},
    "everything on disk": {"optimizer": "disk", "weights": "disk", "gradients": "disk"},
}
NAMES = ["gpt, tied, dropout, token weights", "gpt, bf16", "convolution, batch norm", "experts, frozen, unused"]


def by_hand(case: Case) -> dict[str, torch.Tensor]:
    """Train a case in plain PyTorch, in the same deterministic mode, with global batches of one micro-batch."""
    make_cublas_deterministic()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(1)
    model = case.build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, fused=True)
    dataset: Any = case.dataset()
    step = 0
    for epoch in range(case.epochs):
        ids = shuffled(0, epoch, len(dataset))
        for start in range(0, len(ids), 16):
            batch = default_collate([dataset[i] for i in ids[start : start + 16].tolist()])
            torch.manual_seed(derive(0, "micro-batch", step, 0))
            loss, _ = case.loss(model, [tensor.cuda() for tensor in batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "convolution, batch norm"])
def test_one_worker_is_plain_pytorch(name: str) -> None:
    whole: Any = CASES[name].dataset()
    case = replace(CASES[name], dataset=lambda: TensorDataset(*(tensor[:32] for tensor in whole.tensors)))

    def job() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = case.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
        run = lightwork.distribute(
            model, optimizer, global_batch=16, micro_batch=16, run_dir=str(new_folder()), **ON_GPU
        )
        for step in run.steps(case.dataset(), epochs=case.epochs):
            for batch in step:
                step.backward(case.loss(model, batch)[0])
        return {key: value.cpu() for key, value in run.state_dict().items()}

    (plain,), (ours,) = run_team(1, lambda: by_hand(case)), run_team(1, job)
    for key, value in plain.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_runs_and_two_workers_that_share_the_gpu_have_the_same_digests(case: Case) -> None:
    (alone,) = run_team(1, lambda: train(case, **ON_GPU))
    (again,) = run_team(1, lambda: train(case, **ON_GPU))
    assert again == alone
    for seen in run_team(2, lambda: train(case, **ON_GPU)):
        assert seen == alone


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("name", NAMES)
def test_offload_changes_no_bit(name: str, offload: dict[str, str]) -> None:
    case = CASES[name]

    def small_buckets(**settings: Any) -> Any:
        in_small_pieces()
        return train(case, **ON_GPU, **settings)

    (on_gpu,) = run_team(1, small_buckets)
    (away,) = run_team(1, lambda: small_buckets(offload=offload))
    assert away == on_gpu


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("name", NAMES)
def test_recomputed_and_offloaded_activations_change_no_bit(name: str, activations: str) -> None:
    case = CASES[name]
    (kept,) = run_team(1, lambda: train(case, **ON_GPU))
    (changed,) = run_team(1, lambda: train(case, activations=activations, **ON_GPU))
    assert changed == kept


@pytest.mark.parametrize("placement", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("offload", [{}, {"optimizer": "host", "weights": "host"}], ids=["here", "away"])
def test_placements_of_workers_that_share_the_gpu_change_no_bit(placement: str, offload: dict[str, str]) -> None:
    case = CASES["gpt, bf16"]

    def small_buckets(**settings: Any) -> Any:
        in_small_pieces()
        return train(case, **ON_GPU, **settings)

    (alone,) = run_team(1, small_buckets)
    for seen in run_team(3, lambda: small_buckets(placement=placement, offload=offload), timeout=110):
        assert seen == alone


@pytest.mark.parametrize("offload", [{}, {"optimizer": "host", "weights": "host"}], ids=["here", "away"])
def test_update_in_backward_changes_no_bit(offload: dict[str, str]) -> None:
    case = CASES["gpt, bf16"]

    def job(worth_it: int, offload: dict[str, str]) -> Any:
        in_small_pieces(early=worth_it)
        return train(case, micro_batch=16, clip_grad_norm=None, offload=offload, **ON_GPU)

    (after,) = run_team(1, lambda: job(2**60, {}))
    (within,) = run_team(1, lambda: job(0, offload))
    assert within == after


def test_a_run_is_saved_and_resumed(tmp_path: Path) -> None:
    case = CASES["gpt, bf16"]

    def part(max_steps: int) -> str:
        run, _ = distributed(case, run_dir=str(tmp_path), offload={"optimizer": "host"}, **ON_GPU)
        for step in run.steps(case.dataset(), max_steps=max_steps):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        run.save()
        return str(run.digest())

    (whole,) = run_team(1, lambda: train(case, max_steps=4, **ON_GPU))
    run_team(2, lambda: part(2))
    (resumed,) = run_team(1, lambda: part(4))
    assert resumed == whole[-1][2]


def tower(**settings: Any) -> tuple[str, int, list[int], dict[str, str]]:
    """Train 64 M parameters; return the digest, the GPU's peak, what was reserved step by step, and what is offloaded.

    Training state: 1 GiB in fp32.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = lightwork.distribute(model, optimizer, global_batch=4, run_dir=str(new_folder()), **ON_GPU, **settings)
    reserved = []
    for step in run.steps(TensorDataset(torch.ones(64, 1024)), max_steps=12):
        for (x,) in step:
            step.backward(model(x).square().mean())
        gc.collect()
        reserved.append(torch.cuda.memory_reserved())
    return run.digest(), torch.cuda.max_memory_allocated(), reserved, dict(run.plan.offload)


def test_a_quarter_of_the_training_state_is_enough_memory() -> None:
    def job(**settings: Any) -> Any:
        in_small_pieces(block=None, bucket=1024 * 1024)  # of 64 layers of 1 M parameters
        return tower(**settings)

    ((whole, _, _, nothing),) = run_team(1, job)
    ((within, peak, _, offloaded),) = run_team(1, lambda: job(memory="256MiB"))
    assert nothing == {}
    assert "optimizer" in offloaded
    assert within == whole
    assert peak <= 256 * 2**20


def test_memory_does_not_grow_from_step_to_step() -> None:
    ((_, _, reserved, _),) = run_team(1, tower)
    assert reserved[3:] == [reserved[2]] * len(reserved[3:])
    # How many units are in flight depends on the moment; but it soon has been as many as there may be.
    ((_, _, reserved, _),) = run_team(1, lambda: tower(offload={"optimizer": "host", "weights": "host"}))
    assert reserved[8:] == [reserved[8]] * len(reserved[8:])
