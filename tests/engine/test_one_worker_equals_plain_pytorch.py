"""The oracle itself: what one worker computes is what plain PyTorch, written by hand, computes.

Not only at the end: between all steps a script finds in its own objects what it would find there in plain PyTorch, the
weights and buffers of the model, the optimizer's state, and what the model makes of a batch in eval mode.
"""

from __future__ import annotations

import copy
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


def found(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, forward: Any) -> Found:
    """Return what a script finds in its own objects, and what `forward` makes of a batch."""
    state = {f"model {name}": value for name, value in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        state |= {f"state {index} {name}": torch.as_tensor(value) for name, value in entries.items()}
    dataset: Any = case.dataset()
    model.eval()
    with torch.no_grad():
        state["evaluated"] = case.loss(forward, default_collate([dataset[i] for i in range(4)]))[0]
    model.train()
    return {name: value.detach().float().clone() for name, value in state.items()}


class ByHand:
    """A model, and the fp32 weights that its optimizer writes: its own, or under bf16 masters of narrow ones.

    Modules whose parameters are all vectors (norms) stay fp32.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.holder = case.build()
        self.optimizer = case.optimizer(self.holder)
        for group in self.optimizer.param_groups:
            if "fused" in group and group.get("fused") is None:
                group["fused"] = True
        self.is_narrow = case.settings.get("precision") == "bf16"
        self.model = copy.deepcopy(self.holder) if self.is_narrow else self.holder
        if self.is_narrow:
            for module in self.model.modules():
                if any(p.dim() > 1 for p in module.parameters(recurse=False)):
                    module._apply(lambda t: t.bfloat16() if t.is_floating_point() else t, recurse=False)

    def computing(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_narrow)

    def forward(self, *args: Any) -> Any:
        with self.computing():
            return self.model(*args)

    def take_gradients(self) -> None:
        """Add the gradients of a micro-batch to those of the masters, in fp32."""
        if self.is_narrow:
            for master, p in zip(self.holder.parameters(), self.model.parameters(), strict=True):
                if p.grad is not None:
                    grad, p.grad = p.grad.float(), None
                    master.grad = grad if master.grad is None else master.grad + grad

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_narrow:
            with torch.no_grad():
                for master, p in zip(self.holder.parameters(), self.model.parameters(), strict=True):
                    p.copy_(master)


def merged(before: torch.Tensor, after: list[torch.Tensor], weights: list[float], rule: str) -> Any:
    """Return what micro-batches that all began from `before` make of a buffer."""
    if rule == "maximum":
        return torch.stack(after).amax(0)
    if before.is_floating_point():
        return sum(value.double() * weight for value, weight in zip(after, weights, strict=True)) / sum(weights)
    return before + sum(value - before for value in after)


def by_hand(case: Case, *, global_batch: int, micro_batch: int, seed: int = 0) -> list[Found]:
    """Train a case with gradient accumulation over the same micro-batches, as one writes it without a library."""
    steps: list[Found] = []
    own = ByHand(case)
    model = own.model
    scheduler = case.scheduler(own.optimizer) if case.scheduler else None
    dataset: Any = case.dataset()
    step = 0
    for epoch in range(case.epochs):
        ids = shuffled(seed, epoch, len(dataset))
        for start in range(0, len(ids), global_batch):
            batch_ids = ids[start : start + global_batch]
            micro_ids = [batch_ids[at : at + micro_batch] for at in range(0, len(batch_ids), micro_batch)]
            before = {name: b.clone() for name, b in model.named_buffers()}
            after: list[dict[str, torch.Tensor]] = []
            weights: list[float] = []
            for index, some in enumerate(micro_ids):
                batch = default_collate([dataset[i] for i in some.tolist()])
                torch.manual_seed(derive(seed, "micro-batch", step, index))
                for name, buffer in model.named_buffers():
                    buffer.data.copy_(before[name])
                with own.computing():
                    loss, weight = case.loss(model, batch)
                weights.append(float(len(some) if weight is None else weight))
                after.append({name: b.clone() for name, b in model.named_buffers()})
                if len(micro_ids) == 1:
                    loss.backward()
                elif weights[-1]:
                    (loss * weights[-1]).backward()
                own.take_gradients()
            for p in own.holder.parameters():
                if p.grad is not None and len(micro_ids) > 1:
                    p.grad /= sum(weights)
            for name, buffer in model.named_buffers():
                rule = case.settings.get("buffers", {}).get(name, "")
                buffer.data.copy_(merged(before[name], [values[name] for values in after], weights, rule))
            clip = case.settings.get("clip_grad_norm")
            if clip is not None:
                nn.utils.clip_grad_norm_(own.holder.parameters(), clip)
            own.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
            steps.append(found(case, model, own.optimizer, own.forward))
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
        steps.append(found(case, run.model, optimizer, run.model))
    for name, value in run.state_dict().items():
        working = run.model.state_dict()[name].dtype
        assert torch.equal(value.to(working).float(), steps[-1][f"model {name}"])
    run.close()
    return steps


#: Where bf16 rounds, a difference in the last bit of fp32 is one of 1e-3 of a step. (Muon iterates in bf16.)
ROUGH = {"Muon", *(name for name, case in CASES.items() if case.settings.get("precision") == "bf16")}


@pytest.mark.parametrize("name", CASES)
def test_accumulating_micro_batches_agrees_to_rounding(name: str) -> None:
    case = CASES[name]
    micro_batch = 4 if name == "buffers" else 2  # BatchNorm of 2 samples makes 1e-4 of a difference in the last bit
    (ours,) = run_ranks(1, lambda: by_library(case, global_batch=16, micro_batch=micro_batch))
    theirs = by_hand(case, global_batch=16, micro_batch=micro_batch)
    tolerance = {"rtol": 2e-2, "atol": 5e-3} if name in ROUGH else {"rtol": 2e-3, "atol": 2e-5}
    assert len(ours) == len(theirs) > 2
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == other.keys()
        for key, value in other.items():
            np.testing.assert_allclose(one[key].numpy(), value.numpy(), err_msg=f"{key}, step {step}", **tolerance)
    assert any(not torch.equal(theirs[0][key], theirs[-1][key]) for key in theirs[0])


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].settings.get("clip_grad_norm") is None])
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
