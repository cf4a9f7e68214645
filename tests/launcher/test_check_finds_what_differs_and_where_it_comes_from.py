"""`lightwork check`: faults planted in a small script are named with where they come from; and none where none is."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightwork
from lightwork.cli.check import Start, findings_of
from lightwork.cli.checked import record
from lightwork.cli.run import parse_settings
from lightwork.launcher.team import fork_team
from lightwork.observer.findings import PLAIN, Finding, Notes, of_plain
from tests.launcher.command import finish, start

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))


class Data(Dataset[Any]):
    def __init__(self, change: Callable[[int, torch.Tensor], torch.Tensor] = lambda index, x: x) -> None:
        self.change = change

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return self.change(index, X[index]), index % 3


class Net(nn.Module):
    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.unused: nn.Module | None = None
        self.between = between or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.between(self.first(x))))


class Layer(nn.Module):
    """Does something between the two."""

    def __init__(self, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.change(self, x)


def job(
    *,
    seed: int | None = 1,
    net: Callable[[], nn.Module] = Net,
    data: Callable[[], Any] = Data,
    loss: Callable[..., Any] = lambda run, model, x, y: F.cross_entropy(model(x), y),
    weight: Callable[..., Any] = lambda x, y: None,
    between: Callable[..., None] = lambda run, model, optimizer: None,
    options: Any = None,
    settings: Any = None,
) -> int:
    """A script, of which a fault changes a part."""
    if seed is not None:
        torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    more = {"global_batch": 16, "micro_batch": 4, **(settings or {}), **SETTINGS.value}
    run = lightwork.distribute(model, optimizer, **more)
    for step in run.steps(data(), epochs=2, **(options or {})):
        for x, y in step:
            step.backward(loss(run, model, x, y), weight(x, y))
        between(run, model, optimizer)
    return 0


#: What `--set` says, in this process.
SETTINGS = SimpleNamespace(value={})


def checked(folder: Path, **parts: Any) -> list[Finding]:
    """Check the script by processes that are forked from this one."""

    def start_all(starts: Sequence[Start]) -> list[tuple[Notes, Finding | None]]:
        found = []
        for one in starts:
            place = folder / one.name
            place.mkdir()
            SETTINGS.value = parse_settings([text for text in one.settings if text != "--set"])
            body = partial(record, place, 2, one.slow, partial(job, **parts))
            ended = fork_team(one.num_workers, body, timeout=60)
            notes = Notes.read(place)
            errors = [of_rank.error for of_rank in ended if of_rank.error and "before it returned" not in of_rank.error]
            is_whole = notes.num_workers == one.num_workers
            failure = Finding("failure", f"{one.how} it fails: {errors[0] if errors else ended}")
            found.append((notes, None if is_whole else failure))
        return found

    return findings_of(start_all)


GENERATOR = np.random.default_rng()
OWN = torch.Generator()
COUNT = {"fetched": 0}


def count(index: int, x: torch.Tensor) -> torch.Tensor:
    COUNT["fetched"] += 1
    return x + COUNT["fetched"]


def hooked() -> nn.Module:
    model = Net()
    model.first.weight.register_hook(lambda g: g * (2 if os.environ.get("WHO") == "1" else 1))
    return model


def with_unused() -> nn.Module:
    model = Net()
    model.unused = nn.Linear(2, 2)
    return model


def contrast(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = F.normalize(model(x), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def masked(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    every_other = torch.arange(len(y)) % 2 == 0
    return F.cross_entropy(model(x), torch.where((y == 0) & every_other, -100, y), ignore_index=-100)


def clamp(run: Any, model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        model.first.weight.clamp_(-0.1, 0.1)


def by_rank(run: Any, model: nn.Module, optimizer: Any) -> None:
    if run.rank == 0:
        optimizer.param_groups[0]["lr"] *= 0.5


def by_time(run: Any, model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 + time.time() % 1e-3


def branch(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    return loss if run.rank == 0 else loss + 0.1 * model.last.bias.square().sum()


def noisy(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]) + GENERATOR.normal(), torch.tensor([y for _, y in samples])


def tells_workers_apart(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    os.environ["WHO"] = str(run.rank)
    return F.cross_entropy(model(x), y)


def draws(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if run.rank:
        random.random()
    return F.cross_entropy(model(x), y)


def scaled(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y) * torch.rand((), generator=OWN.manual_seed(os.getpid()))


def summed(run: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def unseeded() -> nn.Module:
    torch.seed()
    return Net()


def of_layer(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {"net": lambda: Net(Layer(change))}


def of_data(change: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {"data": lambda: Data(change)}


#: What a fault changes, the kind of what is found, and words of it.
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a generator of the data set's own": (
        of_data(lambda i, x: x + float(GENERATOR.normal())),
        "data",
        "a generator or a count of its own",
    ),
    "a count in the data set": (of_data(count), "data", "depends on more than the sample's number"),
    "the process in the data": (of_data(lambda i, x: x + os.getpid()), "data", "the process"),
    "a collate function with state": (
        {"data": lambda: DataLoader(Data(), collate_fn=noisy)},
        "data",
        "collate function",
    ),
    "an order of its own": (
        {"options": {"order": lambda epoch: np.random.default_rng().permutation(64)}},
        "order",
        "order=",
    ),
    "a count in a module": (
        of_layer(lambda m, x: x * (1 + m.calls / 10)),
        "module",
        "module between (Layer) is the first",
    ),
    "a generator of a module's own": (
        of_layer(lambda m, x: x + float(GENERATOR.normal())),
        "module",
        "draws from a generator of its own",
    ),
    "a hook that tells workers apart": ({"net": hooked, "loss": tells_workers_apart}, "gradient", "first.weight"),
    "a branch by rank in the loss": ({"loss": branch}, "loss", "a branch by rank"),
    "another number of draws": ({"loss": draws}, "random", "from random"),
    "a generator of the loop's own": ({"loss": scaled}, "loss", "the loss is another one"),
    "a loss that is a sum": ({"loss": summed}, "sum", "it is a sum"),
    "a mean over unmasked targets": ({"loss": masked}, "mean of means", "weight=their number"),
    "a loss within the batch": ({"loss": contrast}, "mean of means", "act on each other"),
    "batch normalisation": (
        {"net": lambda: Net(nn.BatchNorm1d(12))},
        "batch norm",
        "of the 4 samples of a micro-batch",
    ),
    "no fixed seed": ({"seed": None, "net": unseeded}, "start", "torch.manual_seed"),
    "a parameter that is not used": ({"net": with_unused}, "no gradient", "unused.weight"),
    "samples that come again": ({"options": {"order": list(range(8)) * 4}}, "repeated", "comes in step 0"),
    "samples that are the same": (of_data(lambda i, x: X[i % 3]), "repeated", "are the same"),
    "a write between steps": ({"between": clamp}, "failure", "run.edit()"),
    "a schedule on one worker": ({"between": by_rank}, "failure", "settings"),
    "a schedule by the clock": ({"between": by_time}, "failure", "settings"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    parts, kind, words = FAULTS[name]
    found = checked(tmp_path, **parts)
    assert any(finding.kind == kind and words in finding.text for finding in found), found


def test_there_are_twenty_and_more() -> None:
    assert len(FAULTS) >= 20


def test_where_there_is_no_fault_none_is_found(tmp_path: Path) -> None:
    assert checked(tmp_path, net=lambda: Net(nn.Dropout(0.1))) == []


def test_what_is_other_than_in_plain_pytorch_is_found_beyond_rounding(tmp_path: Path) -> None:
    seen = {}
    for name, slow in (("ours", -1), ("plain", PLAIN)):
        (tmp_path / name).mkdir()
        fork_team(1, partial(record, tmp_path / name, 2, slow, job), timeout=60)
        seen[name] = Notes.read(tmp_path / name)
    ours, plain = seen["ours"], seen["plain"]
    assert plain.sizes.keys() == ours.sizes.keys() == {("run-1", 0), ("run-1", 1)}
    assert of_plain(ours, plain) is None
    step: Any = plain.sizes["run-1", 1]
    step["values"]["last.bias"] *= 1.05
    finding = of_plain(ours, plain)
    assert finding is not None
    assert "step 1: parameter last.bias has the norm" in finding.text
    step["loss"] *= 1.05
    finding = of_plain(ours, plain)
    assert finding is not None
    assert "step 1: the loss is" in finding.text


def test_the_command_says_what_it_found_with_the_line_and_by_its_status(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import torch, lightwork
from torch import nn
torch.manual_seed(0)

class Layer(nn.Module):
    calls = 0
    def forward(self, x):
        Layer.calls += 1
        return x * Layer.calls

model = nn.Sequential(nn.Linear(4, 4), Layer(), nn.BatchNorm1d(4))
run = lightwork.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), global_batch=16, micro_batch=4)
for step in run.steps([torch.randn(4) for _ in range(64)]):
    for x in step:
        step.backward(model(x).square().mean())
run.save("precious")
""")
    result = finish(start(tmp_path, "-m", "lightwork", "check", "--steps", "1", "train.py"), tmp_path, timeout=120)
    assert result.status == 1, result.text
    assert "wrong: train.py:8: micro-batch" in result.out
    assert "module 1 (Layer) is the first whose output is another one with two workers" in result.out
    assert "look at: train.py:13: batch normalisation (2)" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


def test_a_script_that_fails_by_itself_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import lightwork\nraise KeyError('kaboom')\n")
    result = finish(start(tmp_path, "-m", "lightwork", "check", "--json", "train.py"), tmp_path, timeout=120)
    assert result.status == 1
    (finding,) = json.loads(result.out)
    assert finding["kind"] == "failure"
    assert "one worker it fails: KeyError: 'kaboom'" in finding["text"]
    assert finding["where"].endswith("train.py:2")
