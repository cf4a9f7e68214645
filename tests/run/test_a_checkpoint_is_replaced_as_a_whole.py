"""Whatever happens while a checkpoint is saved, the old one or the new one is found; and nothing else is touched."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightwork
from lightwork.checkpoint import folder as folders
from lightwork.checkpoint import writing
from lightwork.checkpoint.checkpoint import Description
from lightwork.checkpoint.settings import Bookmark, Settings
from lightwork.state.items import Item, Plain
from lightwork.state.state import OfModel, Walk
from tests.cases import CASES
from tests.training import distributed, new_folder, run_team

#: Calls of the system that change something, or after which something has.
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "close")


class OneTensor:
    """A trained state of one tensor, of which every element is the number of the step."""

    def __init__(self, step: int) -> None:
        self.items: list[Item] = [Plain("weight", torch.full((1000,), float(step)))]

    @contextlib.contextmanager
    def reading(self, what: str, meet: Any, *, is_leader: bool) -> Iterator[Walk]:
        nothing_is_elsewhere: Any = SimpleNamespace(are_there=False, bring_window=None, release_window=None)
        yield Walk(what, meet, lambda: None, nothing_is_elsewhere, is_leader=is_leader)

    def of_model(self) -> OfModel:
        return OfModel(self.items, {}, [])

    def of_optimizer(self) -> list[Item]:
        return []

    def loss_scale(self, step: int) -> tuple[float, ...]:
        return ()


def save(path: Path, step: int) -> str:
    spec = lightwork.Spec(global_batch=2, micro_batch=1, optimizer="none")
    settings = Settings(Bookmark(step=step), [{"lr": torch.tensor(0.1)}], {})
    description = Description(spec, settings, [], name=f"of step {step}", unfinished=None, beside={}, extra={})
    state: Any = OneTensor(step)
    return writing.save(path, state, description, lambda what, payload=b"": [payload], is_leader=True)


def step_in(path: Path) -> int:
    """Return the step of a checkpoint, all of whose files are of that step."""
    found = lightwork.load(path)
    assert found["weight"].tolist() == [float(found.step)] * 1000
    return found.step


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that is killed before its call `number` of the system; return whether it came there."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    folders.swap = counted(folders.swap)
    work()
    os._exit(0)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged in one call", "one after the other"])
def test_a_kill_between_any_two_calls_leaves_the_old_checkpoint_or_the_new(
    exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(folders, "swap", lambda one, other: False)
    path, seen, number = new_folder() / "saved", [], 0
    assert save(path, 1) == ""
    while killed_at(number, lambda: save(path, step_in(path) + 1)):
        seen.append(step_in(path))
        number += 1
        assert save(path, 1) == ""
        assert [p.name for p in path.parent.iterdir()] == ["saved"], "what was left over is cleared away"
    assert number > 20
    assert seen == sorted(seen)  # the old one until a certain call, the new one from there on
    assert set(seen) == {1, 2}


def test_a_kill_before_the_first_checkpoint_is_there_leaves_none() -> None:
    path = new_folder() / "saved"
    assert killed_at(5, lambda: save(path, 1))
    with pytest.raises(lightwork.CheckpointError, match="is not a checkpoint"):
        lightwork.load(path)
    assert save(path, 2) == ""
    assert step_in(path) == 2
    assert [p.name for p in path.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir"])
def test_a_disk_that_becomes_full_at_any_call_is_a_checkpoint_error(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_folder() / "saved"
    assert save(path, 1) == ""
    real, failed, number = getattr(os, call), True, 0
    while failed:
        left, failed = number, False

        def full(*arguments: Any, **more: Any) -> Any:
            nonlocal left, failed
            left -= 1
            if left < 0:
                failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **more)

        monkeypatch.setattr(os, call, full)
        problem = save(path, 2)
        monkeypatch.undo()
        assert step_in(path) in ((1, 2) if failed else (2,))
        assert ("No space left" in problem) == failed
        assert [p.name for p in path.parent.iterdir()] == ["saved"]
        number += 1
        assert save(path, 1) == ""
    assert number > (1 if call == "mkdir" else 4)


def save_with_little_room(folder: Path) -> str:
    """Save where a file may have 100 kB, as on a disk that is full, over a checkpoint; then without a limit."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    run = lightwork.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), global_batch=2, micro_batch=1)
    run.save(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(lightwork.CheckpointError) as caught:
        run.save(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.save(folder)
    return str(caught.value)


def test_every_worker_is_told_of_a_full_disk_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for message in run_team(2, lambda: save_with_little_room(tmp_path / "saved")):
        assert "could not be written" in message
        assert "The checkpoint that was there is kept." in message


def webapp(folder: Path) -> Path:
    """Return a folder that has a manifest, a browser's."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"name": "shop", "icons": []}))
    return folder


def with_notes(folder: Path) -> Path:
    """Return a checkpoint into which somebody has put a file."""
    save(folder, 1)
    (folder / "notes.txt").write_text("all of them")
    return folder


def a_file(path: Path) -> Path:
    path.write_text("a file")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (webapp, r"is not a checkpoint: its manifest\.json is another program's"),
        (with_notes, r"holds what is no part of a checkpoint: notes\.txt"),
        (a_file, "is not a checkpoint: it is a file"),
        (lambda path: a_file(path) / "below", "could not be written"),
        (lambda path: Path(), "is the current folder"),
        (lambda path: Path("/"), "is the current folder or a root"),
    ],
)
def test_what_is_not_a_checkpoint_is_never_replaced(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = make(tmp_path / "precious")
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())

    def job() -> str:
        run, _ = distributed(CASES["RMSprop"], run_dir=str(new_folder()))
        with pytest.raises(lightwork.CheckpointError) as caught:
            run.save(path)
        return str(caught.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", None)  # not among what is looked at
        for text in run_team(2, job):
            assert re.search(message, text), text
    assert sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_link_to_a_checkpoint_stays_one(tmp_path: Path) -> None:
    save(tmp_path / "first", 1)
    (tmp_path / "latest").symlink_to("first")
    assert save(tmp_path / "latest", 2) == ""
    assert (tmp_path / "latest").is_symlink()
    assert step_in(tmp_path / "first") == step_in(tmp_path / "latest") == 2


def test_a_checkpoint_that_was_loaded_stays_what_it_was_when_its_folder_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "saved", 1)
    loaded = lightwork.load(tmp_path / "saved")
    save(tmp_path / "saved", 2)
    assert loaded["weight"].tolist() == [1.0] * 1000


def test_two_processes_that_save_to_one_path_are_told(tmp_path: Path) -> None:
    with folders.replaced(tmp_path / "saved"):
        assert "another process is saving" in save(tmp_path / "saved", 1)
    assert (tmp_path / "saved").is_dir()
