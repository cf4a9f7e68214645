"""One worker, one micro-batch a step: buckets are updated within backward, to the bits of updating them after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightwork
from lightwork.engine.backward import early
from lightwork.spec.footprint import expected_bytes
from tests.cases import CASES, Case
from tests.fake_ranks import run_ranks
from tests.training import in_small_pieces, new_folder, train

Seen = list[tuple[float, float, str]]


AWAY = {"device": "rehearsal", "offload": {"optimizer": "host", "weights": "host"}}


def counted(case: Case, worth_it: int, **settings: Any) -> tuple[Seen, int]:
    """Train with global batches of one micro-batch; return what was seen, and the buckets updated in backward."""
    updated: list[int] = []
    update = early.UpdateInBackward._update

    def note(self: early.UpdateInBackward, bucket: int) -> None:
        updated.append(bucket)
        update(self, bucket)

    with pytest.MonkeyPatch.context() as patch:
        in_small_pieces(early=worth_it)
        patch.setattr(early.UpdateInBackward, "_update", note)
        (seen,) = run_ranks(1, lambda: train(case, micro_batch=16, **settings))
    return seen, len(updated)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("settings", [{}, {"activations": "recompute"}, AWAY], ids=str)
def test_every_step_has_the_digest_of_an_update_after_backward(case: Case, settings: dict[str, Any]) -> None:
    after, none = counted(case, 2**60, **settings)
    within, some = counted(case, 0, **settings)
    assert within == after
    needs_norm = case.settings.get("clip_grad_norm") is not None or case.settings.get("precision") == "fp16"
    assert none == 0
    assert (some > 0) != needs_norm


class Detached(nn.Module):
    """Its first layer's output goes through the last layer's detached weight, deeper in backward than its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.linear(self.first(x), self.last.weight.detach()))


def detached(worth_it: int) -> list[tuple[float, str]]:
    in_small_pieces(bucket=64, early=worth_it)
    torch.manual_seed(0)
    model = Detached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = lightwork.distribute(model, optimizer, global_batch=4, micro_batch=4, run_dir=str(new_folder()))
    seen = []
    for step in run.steps(torch.utils.data.TensorDataset(torch.randn(16, 8)), epochs=1):
        for (x,) in step:
            step.backward(model(x).square().mean())
        seen.append((step.loss, run.digest()))
    return seen


def test_a_weight_that_is_read_after_its_gradient_is_updated_after_backward() -> None:
    assert run_ranks(1, lambda: detached(0)) == run_ranks(1, lambda: detached(2**60))


def test_gradients_are_never_there_as_a_whole() -> None:
    def taken() -> int:
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(20)))
        run = lightwork.distribute(
            model, torch.optim.SGD(model.parameters(), lr=1e-3), global_batch=1, run_dir=str(new_folder())
        )
        for step in run.steps(torch.utils.data.TensorDataset(torch.randn(4, 1024)), epochs=1):
            for (x,) in step:
                step.backward(model(x).square().mean())
        memory = run._engine.state.buffers._memory
        assert bool((memory.tensor("partial sums") == 0).all())
        assert expected_bytes(run._engine._parts.holdings)["gradients"] == 0
        return len(run._engine._parts.backward.early._gradients.pool._free)

    assert run_ranks(1, taken) == [1]  # the buffer of one bucket, used in turn
