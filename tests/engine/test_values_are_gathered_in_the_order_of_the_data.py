"""What a loop body gathers or sums is the same on every worker, in the order of the data, each sample once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import lightwork
from lightwork.errors import UsageError
from tests.fake_ranks import pause, run_ranks
from tests.training import tiny_run

INPUTS = torch.randn(21, 3, generator=torch.Generator().manual_seed(2))
DATA = TensorDataset(INPUTS, torch.arange(21))

GROUP = {"settings": {"transport": "group"}}

TEAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2 without a common memory": (2, GROUP),
    "3 without a common memory": (3, GROUP),
    "3 on two hosts": (3, {"hosts": [2, 1]}),
}


@pytest.mark.parametrize(("num_workers", "team"), TEAMS.values(), ids=TEAMS)
def test_an_evaluation_gathers_each_sample_once_and_sums_exactly(num_workers: int, team: dict[str, Any]) -> None:
    def job() -> dict[str, Any]:
        run = tiny_run()
        with run.evaluate(DATA) as ev:
            for x, ids in ev:
                assert ev.sample_ids.tolist() == ids.tolist()
                assert ev.batch_index == int(ids[0]) // 2
                pause()
                ev.gather("scores", run.model(x)[:, 0])
                ev.gather("array", x.numpy().astype(np.float64))
                ev.gather("names", [f"sample {i}" for i in ids.tolist()])
                ev.gather("ragged", [x[0, : int(i) % 3] for i in ids])
                ev.sum("hits", (x > 0).sum())
                ev.sum("number", 2**40 + int(ids[0]))
                ev.sum("of each class", torch.bincount(ids % 4, minlength=4))
                ev.add("mean", x.mean())
        found = dict(ev.metrics)
        run.close()
        return found

    team_results = run_ranks(num_workers, job, **team)
    model = torch.nn.Linear(3, 1)
    torch.manual_seed(0)
    model.reset_parameters()
    for found in team_results:
        torch.testing.assert_close(found["scores"], model(INPUTS)[:, 0].detach())
        assert torch.equal(found["array"], INPUTS.double())
        assert found["names"] == [f"sample {i}" for i in range(21)]
        assert [len(one) for one in found["ragged"]] == [i % 3 for i in range(21)]
        assert found["hits"] == int((INPUTS > 0).sum())
        assert found["number"] == 11 * 2**40 + sum(range(0, 21, 2))
        assert found["of each class"].tolist() == [6, 5, 5, 5]
        assert torch.equal(found["scores"], team_results[0]["scores"])


@pytest.mark.parametrize(("num_workers", "team"), TEAMS.values(), ids=TEAMS)
def test_a_step_gathers_the_global_batch_in_its_order(num_workers: int, team: dict[str, Any]) -> None:
    def job() -> list[Any]:
        run = tiny_run()
        seen = []
        for step in run.steps(DATA, epochs=2):
            for x, ids in step:
                pause()
                step.backward(run.model(x).mean())
                assert step.sample_ids.tolist() == ids.tolist()
                step.gather("ids", ids)
                step.gather("big", x.repeat(1, 400))  # more than the board has room for
                if step.batch_index == 1:
                    step.gather("of one", [step.batch_index])
                step.sum("count", len(ids))
                step.sum("table", torch.ones(2, 2))
            numbers = step["count"], step["table"].tolist()
            seen.append((step["ids"].tolist(), *numbers, step["of one"], step["big"].shape))
        run.close()
        return seen

    results = run_ranks(num_workers, job, seed=num_workers, **team)
    alone = run_ranks(1, job)[0]
    assert results == [alone] * num_workers
    assert sorted(i for ids, *_ in alone[:3] for i in ids) == list(range(21))
    assert [count for _, count, *_ in alone] == [8, 8, 5] * 2
    assert alone[0][2:] == ([[4.0, 4.0], [4.0, 4.0]], [1], (8, 1200))


def test_the_order_is_that_in_which_samples_are_evaluated() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from range(7)

    def job() -> list[Any]:
        run = tiny_run()
        found = []
        for data in (DataLoader(DATA, sampler=SubsetRandomSampler([5, 3, 11])), Stream()):
            with run.evaluate(data) as ev:
                for batch in ev:
                    ev.gather("ids", batch[1] if isinstance(batch, list) else batch)
            found.append(ev["ids"].tolist())
        run.close()
        return found

    first, second = run_ranks(2, job)
    assert first == second
    assert sorted(first[0]) == [3, 5, 11]
    assert first[1] == list(range(7))


BAD: dict[str, tuple[Any, str]] = {
    "gather a number": (lambda ev, x, i: ev.gather("a", 1.0), "takes the values of a batch's samples"),
    "gather a 0-dimensional tensor": (lambda ev, x, i: ev.gather("a", x.mean()), "ev.add"),
    "gather shapes that differ": (lambda ev, x, i: ev.gather("a", x[:, : 1 + i % 2]), "list"),
    "gather types that differ": (lambda ev, x, i: ev.gather("a", x.double() if i else x), "types differ"),
    "gather and add": (lambda ev, x, i: ev.add("a", 1) if i else ev.gather("a", x), "another call"),
    "sum and gather": (lambda ev, x, i: ev.sum("a", x[0]) if i else ev.gather("a", x), "another call"),
    "sum a list": (lambda ev, x, i: ev.sum("a", [1]), "takes a number or a tensor"),
    "twice": (lambda ev, x, i: (ev.add("a", 1), ev.gather("a", x)), "twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_become_one_is_refused_by_name(name: str) -> None:
    call, message = BAD[name]

    def evaluate(run: lightwork.Run) -> None:
        with run.evaluate(DATA) as ev:
            for x, _ in ev:
                call(ev, x, ev.batch_index)

    def job() -> str:
        run = tiny_run()
        with pytest.raises(UsageError, match=message) as caught:
            evaluate(run)
        run.close()
        return str(caught.value)

    (text,) = run_ranks(1, job)
    assert "'a'" in text


def test_a_metric_may_still_have_a_graph() -> None:
    def job() -> list[float]:
        run = tiny_run()
        for step in run.steps(DATA, max_steps=1):
            for x, _ in step:
                loss = run.model(x).mean()
                step.backward(loss)
                step.add("loss", loss)
                step.sum("sum", loss)
        run.close()
        return [step["loss"] - step.loss, step["sum"] - 4 * step.loss]

    assert run_ranks(2, job) == [[0.0, pytest.approx(0.0)]] * 2
