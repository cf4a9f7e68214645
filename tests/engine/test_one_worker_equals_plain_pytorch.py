"""The oracle itself: what one worker computes is what plain PyTorch, written by hand, computes.

Not only at the end: between all steps a script finds in its own objects what it would find there in plain PyTorch, the
weights and buffers of the model, the optimizer's state, and what the model makes of a batch in eval mode.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from lightwork.data.order import shuffled
from lightwork.random import derive
from tests.cases import CASES, Case
from tests.fake_ranks import run_ranks
from tests.training import distributed

#: By name, what a script finds between two steps.
Found = dict[str, torch.Tensor]


def found(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> Found:
    """Return what a script finds in its own objects."""
    state = {f"model {name}": value for name, value in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        state |= {f"state {index} {name}": torch.as_tensor(value) for name, value in entries.items()}
    dataset: Any = case.dataset()
    model.eval()
    with torch.no_grad():
        state["evaluated"] = case.loss(model, default_collate([dataset[i] for i in range(4)]))[0]
    model.train()
    return {name: value.detach().clone() for name, value in state.items()}


def by_hand(case: Case, *, global_batch: int, micro_batch: int, seed: int = 0) -> list[Found]:
    """Train a case with gradient accumulation over the same micro-batches, as one writes it without a library."""
    steps: list[Found] = []
    torch.manual_seed(1)
    model = case.build()
    optimizer = case.optimizer(model)
    for group in optimizer.param_groups:
        if "fused" in group and group.get("fused") is None:
            group["fused"] = True
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    dataset: Any = case.dataset()
    step = 0
    for epoch in range(case.epochs):
        ids = shuffled(seed, epoch, len(dataset))
        for start in range(0, len(ids), global_batch):
            batch_ids = ids[start : start + global_batch]
            micro_ids = [batch_ids[at : at + micro_batch] for at in range(0, len(batch_ids), micro_batch)]
            total = 0.0
            before = {name: b.clone() for name, b in model.named_buffers()}
            after = []
            for index, some in enumerate(micro_ids):
                batch = default_collate([dataset[i] for i in some.tolist()])
                torch.manual_seed(derive(seed, "micro-batch", step, index))
                for name, buffer in model.named_buffers():
                    buffer.data.copy_(before[name])
                loss, weight = case.loss(model, batch)
                weight = float(len(some) if weight is None else weight)
                after.append(({name: b.clone() for name, b in model.named_buffers()}, weight))
                total += weight
                if len(micro_ids) == 1:
                    loss.backward()
                elif weight:
                    (loss * weight).backward()
            for p in model.parameters():
                if p.grad is not None and len(micro_ids) > 1:
                    p.grad /= total
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.data.copy_(sum(values[name].double() * w for values, w in after) / total)
                else:
                    buffer.data.copy_(before[name] + sum(values[name] - before[name] for values, _ in after))
            clip = case.settings.get("clip_grad_norm")
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if scheduler is not None:
                scheduler.step()
            step += 1
            steps.append(found(case, model, optimizer))
    return steps


def by_library(case: Case, *, global_batch: int, micro_batch: int) -> list[Found]:
    run, scheduler = distributed(case, global_batch=global_batch, micro_batch=micro_batch)
    (optimizer,) = run._engine.optimizers.members
    steps = []
    for step in run.steps(case.dataset(), epochs=case.epochs):
        for batch in step:
            loss, weight = case.loss(run.model, batch)
            step.backward(loss, weight)
        if scheduler is not None:
            scheduler.step()
        steps.append(found(case, run.model, optimizer))
    saved = {f"model {name}": value for name, value in run.state_dict().items()}
    assert all(torch.equal(value, steps[-1][name]) for name, value in saved.items())
    run.close()
    return steps


FP32 = [name for name, case in CASES.items() if case.settings.get("precision") != "bf16" and name != "buffers"]


@pytest.mark.parametrize("name", FP32)
def test_accumulating_micro_batches_agrees_to_rounding(name: str) -> None:
    case = CASES[name]
    (ours,) = run_ranks(1, lambda: by_library(case, global_batch=16, micro_batch=2))
    theirs = by_hand(case, global_batch=16, micro_batch=2)
    # Muon iterates in bf16, which makes steps of 1e-3 of rounding in the last bit.
    tolerance = {"rtol": 2e-2, "atol": 5e-3} if name == "Muon" else {"rtol": 2e-3, "atol": 2e-5}
    assert len(ours) == len(theirs) > 2
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == other.keys()
        for key, value in other.items():
            np.testing.assert_allclose(one[key].numpy(), value.numpy(), err_msg=f"{key}, step {step}", **tolerance)
    assert any(not torch.equal(theirs[0][key], theirs[-1][key]) for key in theirs[0])


@pytest.mark.parametrize("name", [n for n in FP32 if CASES[n].settings.get("clip_grad_norm") is None])
def test_a_global_batch_of_one_micro_batch_agrees_bit_for_bit(name: str) -> None:
    case = CASES[name]
    # 44 samples: batches of 11 are full, so that nothing is rescaled.
    (ours,) = run_ranks(1, lambda: by_library(case, global_batch=11, micro_batch=11))
    theirs = by_hand(case, global_batch=11, micro_batch=11)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(one[key], value), f"{key}, step {step}"


def test_the_gradient_norm_is_that_of_plain_pytorch() -> None:
    case = CASES["convolution, batch norm"]

    def job() -> list[float]:
        run, _ = distributed(case, global_batch=44, micro_batch=44)
        norms = []
        for step in run.steps(case.dataset(), max_steps=1):
            for batch in step:
                loss, _ = case.loss(run.model, batch)
                step.backward(loss)
            norms.append(step.grad_norm)
        run.close()
        return norms

    ((ours,),) = run_ranks(1, job)
    torch.manual_seed(1)
    model = case.build()
    dataset: Any = case.dataset()
    torch.manual_seed(derive(0, "micro-batch", 0, 0))
    loss, _ = case.loss(model, default_collate([dataset[i] for i in shuffled(0, 0, 44).tolist()]))
    loss.backward()
    theirs = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert ours == pytest.approx(theirs, rel=1e-5)
