"""Two hosts: network namespaces joined by a cable, and nothing else in common that a worker would use."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.command import finish, script, start


def can_make_namespaces() -> bool:
    """Return whether this system and user may make network namespaces."""
    with contextlib.suppress(OSError):
        name = f"lightwork-probe-{os.getpid()}"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0:
            return subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False).returncode == 0
    return False


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Make two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a pair of interfaces."""
    names = [f"lightwork-{os.getpid()}-{side}" for side in "ab"]
    cable = [f"lw{os.getpid() % 100_000}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for index, (name, end) in enumerate(zip(names, cable, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(not can_make_namespaces(), reason="this user may not make network namespaces")
def test_workers_of_two_hosts_have_the_digest_of_one_worker(tmp_path: Path, namespaces: list[str]) -> None:
    (tmp_path / "train.py").write_text(script(end='print("digest", run.digest(), run._team.roster.sizes)\n'))
    started = []
    for node, name in enumerate(namespaces):
        options = (
            *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2"),
            *("--master-addr", "10.77.0.1", "--master-port", "29123", "train.py"),
        )
        started.append(start(tmp_path, *options, within=("ip", "netns", "exec", name)))
    first, second = (finish(process, tmp_path / "runs" / "1") for process in started)
    assert first.status == second.status == 0, first.text + second.text
    alone = finish(start(tmp_path, "train.py"), tmp_path / "runs" / "2")
    assert first.out == alone.out.replace("(1,)", "(2, 2)"), first.text
