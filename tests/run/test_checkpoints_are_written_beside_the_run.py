"""A checkpoint that comes by itself is taken into memory, and written to the disk while training goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import lightwork
from lightwork.checkpoint.draft import Draft
from lightwork.launcher.team import fork_team
from lightwork.run import state_calls
from tests.cases import CASES
from tests.training import distributed, new_folder, run_team

CASE = CASES["gpt, tied, dropout, token weights"]


def slowly(written: Path) -> None:
    """Let what is written in this process wait until `written` is there."""
    copy_to = Draft.copy_to

    def wait_and_copy(self: Draft, folder: Path) -> dict[str, str]:
        deadline = time.monotonic() + 20
        while not written.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return copy_to(self, folder)

    Draft.copy_to = wait_and_copy  # type: ignore[method-assign]


def train(folder: Path, *, slow: Path | None = None, end: str = "", **settings: Any) -> list[Any]:
    """Train 9 steps with a checkpoint after the fourth; return the steps, with whether it was there by then."""
    if slow is not None:
        slowly(slow)
    run, scheduler = distributed(CASE, run_dir=str(folder), **{"save_every": 4, **settings})
    seen = []
    for step in run.steps(CASE.dataset(), epochs=9, max_steps=9):
        for batch in step:
            step.backward(*CASE.loss(run.model, batch))
        scheduler.step()
        seen.append((step.index, (folder / "checkpoint").exists()))
        if step.index == 6:
            if end == "save":
                Path(f"{slow}").touch()
                run.save()
                seen.append((lightwork.load(folder).step, "saved"))  # type: ignore[attr-defined]
            if end == "killed" and run.is_main:
                os.kill(os.getpid(), signal.SIGKILL)
            if slow is not None:
                slow.touch()
        if step.index == 6 and end == "fork":  # as a loader does, while a file is in memory
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.1,))
            child.start()
            child.join()
    run.close()
    return seen


def drafts_of(pid: int) -> list[str]:
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this very look
            links.append(os.readlink(fd))
    return [link for link in links if "safetensors" in link and "memfd" in link]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_next_steps_do_not_wait_for_the_disk(num_workers: int) -> None:
    folder, slow = new_folder(), new_folder() / "go on"
    for seen in run_team(num_workers, partial(train, folder, slow=slow)):
        assert seen[:7] == [(step, False) for step in range(7)]
    assert lightwork.load(folder).step == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "optimizer_state": "int8"}], ids=str)
def test_it_has_the_bits_of_one_that_the_team_waited_for(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [new_folder(), new_folder()]
    run_team(2, partial(train, folders[0], **settings))
    monkeypatch.setattr(state_calls, "available_memory", lambda: 0)  # no room: it is written at once
    (seen, _) = run_team(2, partial(train, folders[1], **settings))
    assert seen[4] == (4, True)
    beside, at_once = (lightwork.load(folder) for folder in folders)
    assert beside.hashes == at_once.hashes  # type: ignore[attr-defined]
    assert beside.step == at_once.step == 8  # type: ignore[attr-defined]


def test_no_room_means_that_it_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_calls, "available_memory", lambda: 1000)
    assert run_team(1, partial(train, new_folder()))[0][4] == (4, True)


@pytest.mark.parametrize("settings", [{"memory": "4 GB"}, {"offload": {"optimizer": "disk"}}], ids=str)
def test_a_run_that_has_to_do_with_little_memory_takes_none_for_it(settings: dict[str, Any]) -> None:
    assert run_team(1, partial(train, new_folder(), **settings))[0][4] == (4, True)


def test_who_reads_one_waits_until_it_is_written() -> None:
    """Every worker, and every other program."""
    folder = new_folder()

    def job() -> tuple[int, float]:
        copy_to = Draft.copy_to

        def slow_copy(self: Draft, place: Path) -> dict[str, str]:
            time.sleep(1)
            return copy_to(self, place)

        Draft.copy_to = slow_copy  # type: ignore[method-assign]
        run, scheduler = distributed(CASE, run_dir=str(folder), save_every=3)
        for step in run.steps(CASE.dataset(), epochs=9, max_steps=6):
            for batch in step:
                step.backward(*CASE.loss(run.model, batch))
            scheduler.step()
        start = time.monotonic()
        return lightwork.load(folder / "checkpoint").step, time.monotonic() - start  # type: ignore[attr-defined]

    for step, seconds in run_team(2, job):
        assert step == 6
        assert 0.3 < seconds < 20


def test_one_that_the_script_asks_for_is_there_when_the_call_returns() -> None:
    folder, slow = new_folder(), new_folder() / "go on"
    for seen in run_team(2, partial(train, folder, slow=slow, end="save")):
        assert (7, "saved") in seen


def test_the_one_before_it_stays_when_its_writer_is_killed() -> None:
    folder, whole = new_folder(), new_folder()
    run_team(1, partial(train, whole))
    run_team(1, partial(train_to, folder, 4))
    results = fork_team(1, partial(train, folder, slow=new_folder() / "never", end="killed", save_every=2))
    assert results[0].status == -signal.SIGKILL
    assert lightwork.load(folder).step == 4  # type: ignore[attr-defined]
    assert (folder / ".checkpoint.writing").exists()
    run_team(2, partial(train, folder))
    assert not (folder / ".checkpoint.writing").exists()
    assert lightwork.load(folder).hashes == lightwork.load(whole).hashes  # type: ignore[attr-defined]


def train_to(folder: Path, num_steps: int) -> None:
    run, scheduler = distributed(CASE, run_dir=str(folder))
    for step in run.steps(CASE.dataset(), epochs=9, max_steps=num_steps):
        for batch in step:
            step.backward(*CASE.loss(run.model, batch))
        scheduler.step()
    run.save()


def test_its_memory_is_given_back_also_where_a_child_has_it() -> None:
    draft = Draft()
    folder = new_folder()
    draft.begin(contextlib.nullcontext(folder))
    path = draft.place("model.safetensors")
    path.write_bytes(bytes(1024 * 1024))
    own = os.open(path, os.O_RDONLY)  # as a child has it
    assert draft.copy_to(folder)["model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size == 1024 * 1024
    assert os.fstat(own).st_size == 0
    os.close(own)
    draft.place("more").write_bytes(b"x")
    with draft as place:
        assert place == folder
    assert drafts_of(os.getpid()) == []


def test_nothing_of_it_is_left_after_a_run_that_forks() -> None:
    def job() -> list[str]:
        train(new_folder(), end="fork")
        return drafts_of(os.getpid())

    assert run_team(2, job) == [[], []]


def test_what_goes_wrong_is_told_and_training_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    def job() -> int:
        def fail(_self: Draft, _folder: Path) -> dict[str, str]:
            raise OSError(28, "No space left on device")

        Draft.copy_to = fail  # type: ignore[method-assign]
        return len(train(new_folder()))

    assert run_team(2, job) == [9, 9]
    assert capfd.readouterr().err.count("no checkpoint was saved, and training goes on: ") == 2


def test_a_tensor_that_is_kept_is_saved_as_it_was() -> None:
    """What a script keeps, it may write in place while the file is written."""
    folder, slow = new_folder(), new_folder() / "go on"

    def job() -> None:
        slowly(slow)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=folder, save_every=4)
        run.keep(counts={"steps": torch.zeros(1)})
        for step in run.steps(TensorDataset(torch.randn(56, 3)), epochs=1):
            for (x,) in step:
                step.backward(model(x).square().mean())
            run.kept["counts"]["steps"] += 1
        slow.touch()

    run_team(2, job)
    assert float(lightwork.load(folder).kept["counts"]["steps"]) == 4  # type: ignore[attr-defined]
