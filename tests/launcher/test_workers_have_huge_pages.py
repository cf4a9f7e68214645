"""`lightwork run` starts itself once more, so that glibc takes huge pages for large tensors; nothing else notices."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lightwork.cli.main import main
from lightwork.launcher import again
from tests.launcher.command import HEAD, finish, lightwork_run, start

TUNABLE = "glibc.malloc.hugetlb=1"
#: Asked without `again`, which must not skip the test that would show it broken.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIBRARY, VERSION = platform.libc_ver()
waits_to_be_asked = pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="the system has no transparent huge pages, or gives them to all",
)
knows_the_tunable = pytest.mark.skipif(
    LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="glibc 2.35 was the first"
)

#: Three tensors of 60 MB a step, each of which is a mapping of its own.
LARGE_TENSORS = """
import resource
model = torch.nn.Sequential(torch.nn.Linear(8, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
run = lightwork.distribute(model, optimizer, global_batch=1, micro_batch=1)
faults = []
for step in run.steps(torch.utils.data.TensorDataset(torch.randn(1, 15_000, 8)), max_steps=8):
    for (x,) in step:
        step.backward(model(x).square().mean())
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print([now - before for before, now in zip(faults, faults[1:])])
"""

#: What the script's own process, and one that it starts, are told.
ENVIRONMENTS = """
import json, subprocess
lightwork.distribute(model, optimizer, global_batch=16)
print(json.dumps(dict(os.environ)))
command = "import json, os; print(json.dumps(dict(os.environ)))"
print(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout, end="")
"""


@waits_to_be_asked
@knows_the_tunable
def test_a_step_with_large_tensors_takes_few_faults(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, HEAD + LARGE_TENSORS, workers="1")
    assert result.status == 0, result.text
    later = json.loads(result.out)[3:]
    assert max(later) < 5000, later  # one tensor is 15,000 small pages


@pytest.mark.parametrize("users_own", [None, "glibc.malloc.tcache_count=3", "glibc.malloc.hugetlb=0"])
def test_a_worker_and_what_it_starts_have_the_users_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_own: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if users_own is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", users_own)
    result = lightwork_run(tmp_path, HEAD + ENVIRONMENTS, workers="1")
    assert result.status == 0, result.text
    for line in result.out.splitlines():
        seen = json.loads(line)
        assert seen.get("GLIBC_TUNABLES") == users_own
        assert {name for name in seen if "TUNABLES" in name} <= {"GLIBC_TUNABLES"}
    assert len(result.out.splitlines()) == 2


class Started(Exception):
    """In place of the program that takes over this process."""


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Make this process look like a command on a system with huge pages to ask for; return what it starts."""
    seen = []

    def execve(path: str, arguments: list[str], variables: Mapping[str, str]) -> NoReturn:
        assert path == sys.executable
        seen.append((arguments, dict(variables)))
        raise Started

    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    script = tmp_path / "lightwork"
    script.touch()
    monkeypatch.setattr(again, "_SYSTEM", setting)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(sys, "argv", [str(script), "run", "-n", "none", "train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", str(script), "run", "-n", "none", "train.py"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return seen


def test_the_command_starts_again_as_it_was_started(starts: list[Any]) -> None:
    with pytest.raises(Started):
        main()
    ((arguments, variables),) = starts
    assert arguments == [sys.executable, *sys.orig_argv[1:]]
    assert variables["GLIBC_TUNABLES"] == TUNABLE
    assert {name: variables[name] for name in os.environ} == dict(os.environ)


@pytest.mark.parametrize("users_own", ["", "glibc.malloc.tcache_count=3"])
def test_the_second_start_is_the_last_and_takes_back_what_the_first_set(
    starts: list[Any], monkeypatch: pytest.MonkeyPatch, users_own: str
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", users_own)
    before = dict(os.environ)
    with pytest.raises(Started):
        again.start_again()
    ((_, variables),) = starts
    assert variables["GLIBC_TUNABLES"] == f"{users_own}:{TUNABLE}".strip(":")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    again.start_again()
    assert len(starts) == 1
    assert {**os.environ, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")} == before


def test_a_command_line_that_a_program_gives_starts_nothing(starts: list[Any]) -> None:
    assert main(["run", "-n", "none", "train.py"]) == 2
    assert starts == []


def other_library(name: str) -> NoReturn:
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize("confstr", [other_library, lambda name: None, lambda name: "glibc 2.34"])
def test_another_c_library_or_an_old_one_starts_nothing(
    starts: list[Any], monkeypatch: pytest.MonkeyPatch, confstr: Callable[[str], str | None]
) -> None:
    monkeypatch.setattr(os, "confstr", confstr)
    assert main() == 2
    assert starts == []


@pytest.mark.parametrize("text", ["always madvise [never]\n", "[always] madvise never\n", None])
def test_a_system_that_has_no_huge_pages_or_gives_them_to_all_starts_nothing(
    starts: list[Any], tmp_path: Path, text: str | None
) -> None:
    if text is None:
        (tmp_path / "enabled").unlink()
    else:
        (tmp_path / "enabled").write_text(text)
    assert main() == 2
    assert starts == []


def test_what_the_user_said_of_huge_pages_stays(starts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0:glibc.malloc.check=1")
    assert main() == 2
    assert starts == []
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0:glibc.malloc.check=1"


@pytest.mark.parametrize("name", ["", "-", "-c"])
def test_code_that_may_have_done_something_is_not_started_again(
    starts: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "run", "-n", "none", "train.py"])
    assert main() == 2
    assert starts == []


def test_a_process_that_has_already_imported_torch_is_not_started_again(
    starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert main() == 2
    assert starts == []


def test_a_program_that_can_not_be_started_again_goes_on(starts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "none.py"])
    assert main() == 2

    def refused(*arguments: object) -> NoReturn:
        raise OSError(7, "Argument list too long")

    monkeypatch.setattr(os, "execve", refused)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    assert main() == 2


def test_the_command_begins_without_torch(tmp_path: Path) -> None:
    text = "import sys; import lightwork.cli.run; print('torch' in sys.modules)"
    result = finish(start(tmp_path, "-c", text), tmp_path)
    assert result.out == "False\n", result.text
