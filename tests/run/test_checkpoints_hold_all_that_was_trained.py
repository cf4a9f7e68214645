"""What a checkpoint brings back, in teams of processes: frozen weights, kept objects, files equal to the byte."""

from __future__ import annotations

import gc
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightwork
from tests.cases import CASES, Case, vectors
from tests.training import distributed, in_small_pieces, new_folder, poison_what_is_given_back, run_team, train


def interrupted(case: Case, folder: Path, stop_after: int) -> list[tuple[float, float, str]]:
    """Train a case, saving after `stop_after` steps and stopping there; or going on from there, if it was saved."""
    resume = folder / "saved" if (folder / "saved").exists() else None
    run, scheduler = distributed(case, resume=resume)
    seen = []
    for step in run.steps(case.dataset(), epochs=case.epochs):
        for batch in step:
            loss, weight = case.loss(run.model, batch)
            step.backward(loss, weight)
        if scheduler is not None:
            scheduler.step()
        seen.append((step.loss, step.grad_norm, run.digest()))
        if step.index + 1 == stop_after:
            run.save(folder / "saved")
            break
    return seen


def saved(case: Case) -> Path:
    folder = new_folder() / "saved"

    def job() -> None:
        run, _ = distributed(case)
        run.save(folder)

    run_team(1, job)
    return folder


class Half(nn.Module):
    """Has frozen weights that are narrow under bf16, and frozen ones that are whole numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.head = nn.Linear(20, 16), nn.Linear(16, 5)
        self.base.requires_grad_(False)
        self.codes = nn.Parameter(torch.randint(0, 9, (16,)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x) + self.codes)


def with_frozen_weights(seed: int, stop_after: int, folder: Path) -> tuple[list[float], list[int]]:
    model = Half(seed)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    resume = folder / "saved" if (folder / "saved").exists() else None
    run = lightwork.distribute(
        model,
        optimizer,
        global_batch=16,
        micro_batch=2,
        precision="bf16",
        run_dir=new_folder(),
        resume=resume,
    )
    losses = []
    for step in run.steps(vectors()):
        for x, y in step:
            step.backward(nn.functional.cross_entropy(model(x).float(), y))
        losses.append(step.loss)
        if step.index + 1 == stop_after:
            run.save(folder / "saved")
            break
    return losses, model.codes.tolist()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_frozen_weights_are_restored_too_also_narrow_ones_and_those_that_each_worker_has(num_workers: int) -> None:
    ((whole, codes),) = run_team(1, lambda: with_frozen_weights(1, 99, new_folder()))
    folder = new_folder()
    ((first, _),) = run_team(1, lambda: with_frozen_weights(1, 1, folder))
    for second, found in run_team(num_workers, lambda: with_frozen_weights(2, 99, folder)):
        assert first + second == whole
        assert found == codes


def begun_anew() -> tuple[str, str]:
    """Train, save before it and load after; return the digest of each of the two trainings."""
    in_small_pieces()  # each worker updates some
    case = CASES["RMSprop"]
    run, _ = distributed(case)
    path = run.save()
    digests = []
    for _ in range(2):
        for step in run.steps(case.dataset(), max_steps=3):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        digests.append(run.digest())
        run.load(path)
    return digests[0], digests[1]


def test_a_run_that_loads_a_checkpoint_without_optimizer_state_begins_anew_on_every_worker() -> None:
    ((whole, again),) = run_team(1, begun_anew)
    assert whole == again
    assert run_team(3, begun_anew) == [(whole, whole)] * 3


class Box:
    """Keeps what it is given."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return {"content": self.content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state["content"]


AMBIGUOUS = {
    "a.b": torch.tensor([1.0]),
    "a": {"b": torch.tensor([2.0])},
    1: torch.tensor([3.0]),
    "1": torch.tensor([4]),
}


def kept_again(content: Any, names: tuple[str, ...] = ("box",)) -> Any:
    """Save boxes with `content` beside an optimizer with tensors in its groups; return what another run finds."""
    folder = new_folder()

    def job() -> Any:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25))
        resume = folder / "saved" if (folder / "saved").exists() else None
        settings = {"global_batch": 2, "run_dir": new_folder(), "resume": resume}
        run = lightwork.distribute(model, optimizer, **settings)  # type: ignore[arg-type]
        boxes = {name: Box(content if resume is None else None) for name in names}
        run.keep(**boxes)
        if resume is None:
            run.save(folder / "saved")
        return [box.content for box in boxes.values()], float(optimizer.param_groups[0]["lr"])

    run_team(1, job)
    return run_team(1, job)[0]


def test_kept_tensors_whose_paths_look_alike_are_not_taken_for_each_other() -> None:
    (found,), _ = kept_again(AMBIGUOUS)
    assert [found["a.b"], found["a"]["b"], found[1], found["1"]] == [1.0, 2.0, 3.0, 4]
    found, rate = kept_again({"lr": torch.tensor(7.0)}, ("group0", "other"))
    assert [box["lr"] for box in found] == [7.0, 7.0]
    assert rate == 0.25


def test_arrays_keep_their_shape_and_nans_and_numbers_their_kind() -> None:
    (found,), _ = kept_again([np.array(3.0), np.ones((2, 3))[:, ::-1], np.float32(0.5), float("inf"), 2**70])
    assert found[0].shape == ()
    assert found[1].shape == (2, 3)
    assert found[2:] == [0.5, float("inf"), 2**70]


@pytest.mark.parametrize(
    "content",
    [
        np.array([object()]),
        np.datetime64("2026-01-01"),
        torch.eye(2).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
        3j,
    ],
    ids=["objects", "dates", "sparse", "complex128", "complex"],
)
def test_kept_values_that_no_file_can_hold_are_named(content: Any) -> None:
    def job() -> str:
        run, _ = distributed(CASES["RMSprop"])
        run.keep(box=Box(content))
        with pytest.raises(lightwork.CheckpointError, match=r"box\.content") as caught:
            run.save()
        return str(caught.value)

    run_team(2, job)


def test_a_run_that_was_resumed_holds_no_file_of_its_checkpoint() -> None:
    folder = saved(CASES["RMSprop"])

    def job() -> list[str]:
        run, _ = distributed(CASES["RMSprop"], resume=folder)
        gc.collect()
        opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        run.digest()
        return [name for name in opened if str(folder) in name] + re.findall(
            rf"{folder}\S*", Path("/proc/self/maps").read_text()
        )

    assert run_team(2, job) == [[], []]


TEAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "a host of two": (2, {}),
    "on disk": (2, {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}}),
    "two hosts": (2, {"transport": "group"}),
    **{f"zero{n}": (3, {"transport": "group", "placement": f"zero{n}"}) for n in (1, 2, 3)},
}


@pytest.mark.parametrize(
    "name", ["gpt, bf16", "convolution, batch norm", "experts, frozen, unused", "unknown optimizer"]
)
def test_files_are_the_same_to_the_byte_whoever_wrote_them_and_in_whatever_pieces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = CASES[name], new_folder()

    def job(path: Path) -> str:
        in_small_pieces()
        poison_what_is_given_back()
        run, _ = distributed(case)
        for step in run.steps(case.dataset(), max_steps=2):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        run.save(path)
        return run.digest()

    (digest,) = run_team(1, lambda: job(folder / "alone"))
    monkeypatch.setattr("lightwork.state.items.PIECE", 64)
    monkeypatch.setattr("lightwork.state.items.WINDOW", 4096)
    for team, (num_workers, settings) in TEAMS.items():
        path = folder / team
        assert set(run_team(num_workers, lambda path=path: job(path), settings=settings)) == {digest}
        for file in ("model", "optimizer"):
            assert (path / f"{file}.safetensors").read_bytes() == (
                folder / "alone" / f"{file}.safetensors"
            ).read_bytes()


@pytest.mark.parametrize("team", TEAMS)
def test_a_checkpoint_is_resumed_in_pieces_by_any_team(team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["gpt, bf16"]
    (whole,) = run_team(1, lambda: train(case))
    folder = new_folder()
    first = run_team(1, partial(interrupted, case, folder, 2))[0]
    monkeypatch.setattr("lightwork.state.items.PIECE", 64)
    monkeypatch.setattr("lightwork.state.items.WINDOW", 4096)
    num_workers, settings = TEAMS[team]
    for second in run_team(num_workers, partial(interrupted, case, folder, 99), settings=settings):
        assert first + second == whole


def test_weights_in_another_order_in_memory_and_state_in_8_bits_are_resumed() -> None:
    def build() -> nn.Module:
        return CASES["convolution, batch norm"].build().to(memory_format=torch.channels_last)

    case = replace(CASES["convolution, batch norm"], build=build, settings={"optimizer_state": "int8"})
    (whole,) = run_team(1, lambda: train(case))
    folder = new_folder()
    first = run_team(2, partial(interrupted, case, folder, 2))[0]
    assert first + run_team(1, partial(interrupted, case, folder, 99))[0] == whole
    model = CASES["convolution, batch norm"].build()
    model.load_state_dict(lightwork.load(folder / "saved"))
