"""Data, evaluation, metrics, early stopping and edits: the same everywhere, for any team."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightwork
from tests.cases import CASES, vectors
from tests.fake_ranks import run_ranks
from tests.training import Numbered, distributed, new_folder, seen_by_team, tiny_run


def test_every_sample_comes_once_an_epoch_in_a_new_order_and_alike_for_any_team() -> None:
    alone = seen_by_team(run_ranks, 1, Numbered(21))
    for epoch in (0, 1):
        ids = [i for (e, _), samples in alone.items() if e == epoch for i in samples]
        assert sorted(ids) == list(range(21))
    first, second = (sorted(alone[0, 0]), sorted(alone[1, 3]))
    assert first != second
    for num_workers in (2, 3, 5):
        assert seen_by_team(run_ranks, num_workers, Numbered(21)) == alone


def test_the_order_can_be_given() -> None:
    seen = seen_by_team(run_ranks, 2, Numbered(21), order=lambda epoch: [3, 7, 4, 1 + epoch])
    assert {place: sorted(samples) for place, samples in seen.items()} == {(0, 0): [1, 3, 4, 7], (1, 1): [2, 3, 4, 7]}


def test_evaluation_sees_each_sample_once_and_leaves_no_trace() -> None:
    case = CASES["convolution, batch norm"]

    def job(evaluate: bool) -> tuple[list[str], list[float]]:
        run, _ = distributed(case)
        digests, means = [], []
        for step in run.steps(case.dataset(), epochs=1):
            for batch in step:
                step.backward(case.loss(run.model, batch)[0])
            if evaluate:
                modes = [module.training for module in run.model.modules()]
                with run.evaluate(case.dataset()) as ev:
                    for x, y in ev:
                        assert not run.model.training
                        assert not torch.is_grad_enabled()
                        ev.add("loss", F.cross_entropy(run.model(x), y))
                        ev.add("samples", len(x), weight=1)
                assert modes == [module.training for module in run.model.modules()]
                assert ev["samples"] == 2.0  # the mean over 22 batches of 2
                means.append(ev["loss"])
            digests.append(run.digest())
        return digests, means

    (without,) = run_ranks(1, lambda: job(False))
    (alone,) = run_ranks(1, lambda: job(True))
    assert alone[0] == without[0]
    for num_workers in (2, 3):
        assert run_ranks(num_workers, lambda: job(True)) == [alone] * num_workers


def test_metrics_are_combined_alike_for_any_team() -> None:
    def job() -> list[tuple[float, float]]:
        run = tiny_run()
        means = []
        for step in run.steps(Numbered(21), epochs=1):
            for ids, x in step:
                step.backward(run.model(x).mean())
                step.add("id", ids.double().mean())
                if 7 in ids.tolist():
                    step.add("only here", 5.0, weight=3)
            means.append((step["id"], step.metrics.get("only here", -1.0)))
        return means

    (alone,) = run_ranks(1, job)
    assert sorted(value for _, value in alone) == [-1.0, -1.0, 5.0]
    assert np.average([mean for mean, _ in alone], weights=[8, 8, 5]) == pytest.approx(10.0)
    assert run_ranks(3, job) == [alone] * 3


def test_a_global_batch_without_weight_changes_nothing() -> None:
    def job() -> bool:
        run = tiny_run()
        before = run.digest()
        for step in run.steps(Numbered(8), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean() * float("nan"), weight=0)
        return step.loss == 0.0 and run.digest() == before

    assert run_ranks(2, job) == [True, True]


def test_early_stopping_is_agreed_by_all() -> None:
    def job() -> tuple[int, str]:
        run = tiny_run()
        last = -1
        for step in run.steps(Numbered(64), epochs=20):
            for _, x in step:
                step.backward(run.model(x).mean())
            last = step.index
            if run.rank == 1 and step.index == 5:  # one worker alone decides
                break
        run.save(run.run_dir / "end")
        return last, run.digest()

    results = run_ranks(3, job)
    assert len({digest for _, digest in results}) == 1
    assert {last for last, _ in results} <= {5, 6}


def test_a_loop_may_follow_an_early_stop() -> None:
    def job() -> list[int]:
        run = tiny_run()
        indices = []
        for _ in range(2):
            for step in run.steps(Numbered(64), epochs=20):
                for _, x in step:
                    step.backward(run.model(x).mean())
                indices.append(step.index)
                if step.index % 3 == 2:
                    break
        return indices

    assert run_ranks(2, job) == [[0, 1, 2, 3, 4, 5]] * 2


def test_an_edit_is_applied_once() -> None:
    def job(precision: str) -> tuple[list[float], str]:
        run = tiny_run(precision=precision)
        with run.edit(), torch.no_grad():
            run.model.weight.add_(1.0)
        first = run.model.weight.float().tolist()[0]
        for step in run.steps(Numbered(16), epochs=1):
            for _, x in step:
                step.backward(run.model(x).float().mean())
            with run.edit(), torch.no_grad():
                run.model.bias.zero_()
        assert run.state_dict()["bias"].item() == 0.0
        return first, run.digest()

    torch.manual_seed(0)
    expected = (nn.Linear(3, 1).weight + 1).tolist()[0]
    for precision in ("fp32", "bf16"):
        (alone,) = run_ranks(1, lambda p=precision: job(p))
        assert alone[0] == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 0)
        assert run_ranks(3, lambda p=precision: job(p)) == [alone] * 3


def test_an_edit_that_replaces_a_parameter_is_refused() -> None:
    def job() -> str:
        run = tiny_run()
        with pytest.raises(lightwork.UsageError) as caught, run.edit():
            run.model.weight = nn.Parameter(torch.zeros(1, 3))
        return str(caught.value)

    assert "was replaced by another object in run.edit()" in run_ranks(1, job)[0]


def test_random_numbers_between_steps_are_the_same_on_every_worker() -> None:
    def job() -> list[float]:
        run = tiny_run()
        drawn = []
        for step in run.steps(Numbered(24), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
            drawn.append(float(torch.rand(())) + float(np.random.rand()))
        return drawn

    (alone,) = run_ranks(1, job)
    assert len(set(alone)) == 3
    assert run_ranks(3, job) == [alone] * 3


class Island(nn.Module):
    """Switches autocast off, around a module and around a bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.types: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        self.types = [h.dtype]
        with torch.autocast("cpu", enabled=False):
            h = self.router(h.float())
            self.types.append(h.dtype)
            h = h + F.linear(h, self.router.weight)
            self.types.append(h.dtype)
        out = self.last(h)
        self.types.append(out.dtype)
        return out


def test_regions_without_autocast_compute_in_fp32_with_fp32_weights() -> None:
    def job() -> tuple[list[str], str, float]:
        torch.manual_seed(0)
        model = Island()
        weight = model.router.weight.detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = lightwork.distribute(
            model, optimizer, global_batch=16, micro_batch=4, precision="bf16", run_dir=new_folder()
        )
        h = torch.randn(2, 16)
        for step in run.steps(vectors(), epochs=1):
            for x, y in step:
                loss = F.cross_entropy(model(x), y)
                assert loss.dtype == torch.float32
                if step.index == 0:
                    with torch.autocast("cpu", enabled=False):
                        assert torch.equal(F.linear(h, model.router.weight), F.linear(h, weight))
                step.backward(loss)
        return [str(t) for t in model.types], run.digest(), step.grad_norm

    (alone,) = run_ranks(1, job)
    assert alone[0] == ["torch.bfloat16", "torch.float32", "torch.float32", "torch.bfloat16"]
    assert run_ranks(2, job) == [alone] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def job(recompute: bool) -> str:
        case = CASES["convolution, batch norm"]
        run, _ = distributed(case)
        for step in run.steps(case.dataset(), epochs=1):
            for x, y in step:
                x.requires_grad_(True)
                out = checkpoint(run.model, x, use_reentrant=reentrant) if recompute else run.model(x)
                step.backward(F.cross_entropy(out, y))
        return run.digest()

    assert run_ranks(1, lambda: job(True)) == run_ranks(1, lambda: job(False))
    assert run_ranks(2, lambda: job(True)) == run_ranks(2, lambda: job(False))
