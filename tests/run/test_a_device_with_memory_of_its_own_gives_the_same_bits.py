"""What the engine does for a GPU, rehearsed on a CPU: what is offloaded is hardly there, and no GPU is said so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.store.elements import UnitElements
from tests.training import in_small_pieces, new_folder, run_team


@pytest.mark.parametrize("placement", ["replicate", "zero1", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_little_of_what_is_offloaded_is_ever_on_the_device(placement: str, precision: str) -> None:
    def job() -> tuple[int, int]:
        in_small_pieces(block=None, bucket=1024)
        highest = 0
        taken = UnitElements._take

        def note(self: UnitElements, unit: int) -> None:
            nonlocal highest
            taken(self, unit)
            away = [here for here in run._engine.state.buffers._memory._here.values()] if run is not None else []
            highest = max(highest, sum(here.num_bytes for here in away))

        run: lightwork.Run | None = None
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(40)), nn.Linear(32, 1024).requires_grad_(False))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run = lightwork.distribute(
            model,
            optimizer,
            global_batch=8,
            micro_batch=2,
            precision=precision,
            placement=placement,
            clip_grad_norm=1.0,
            device="rehearsal",
            offload={"optimizer": "host", "weights": "host"},
            run_dir=str(new_folder()),
        )
        UnitElements._take = note  # type: ignore[method-assign]
        for step in run.steps(TensorDataset(torch.ones(16, 32)), epochs=1):
            for (x,) in step:
                step.backward(model(x).float().square().mean())
        slots = run._engine._parts.moving.slots._slots
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(sums.num_bytes <= 4.1 * trained for _, sums in slots), "frozen parameters have no partial sums"
        return highest, len(run._engine.state.weights.layout.buckets)

    for highest, buckets in run_team(2, job):
        state_and_weights = (32 * 32 + 32) * 4 * 4
        assert buckets >= 40
        assert 0 < highest <= 12 * state_and_weights, "a few buckets, of forty"


def test_a_device_that_is_not_there_is_refused_with_the_reason() -> None:
    def job() -> None:
        torch.cuda.device_count = lambda: 0  # also where there is one
        model = nn.Linear(2, 2)
        lightwork.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), global_batch=2, device="cuda")

    with pytest.raises(AssertionError, match="device='cuda' needs a GPU, and this PyTorch"):
        run_team(1, job)
