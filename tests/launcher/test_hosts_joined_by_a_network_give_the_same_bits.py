"""Two hosts: network namespaces joined by a cable, and nothing else in common that a worker would use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
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


#: The ends of the cable.
CABLE = [f"lw{os.getpid() % 100_000}{side}" for side in "ab"]


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Make two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a pair of interfaces."""
    names = [f"lightwork-{os.getpid()}-{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for index, (name, end) in enumerate(zip(names, CABLE, strict=True)):
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


@pytest.mark.skipif(not can_make_namespaces(), reason="this user may not make network namespaces")
def test_when_a_cable_is_pulled_out_one_side_goes_on_and_the_other_ends(tmp_path: Path, namespaces: list[str]) -> None:
    """No connection is closed, and nothing comes any more: five leases later that is noticed, on both sides.

    Neither can know that the other is not dead. Of two equal parts that with the lowest rank goes on.
    """
    text = script("print('here', flush=True); time.sleep(0.02)", max_steps=60, end="print('digest', run.digest())")
    (tmp_path / "train.py").write_text(text)
    started = []
    for rank, name in enumerate(namespaces):
        variables = (f"RANK={rank}", f"GROUP_RANK={rank}", "WORLD_SIZE=2", "MASTER_ADDR=10.77.0.1", "MASTER_PORT=29124")
        settings = 'LIGHTWORK_SETTINGS={"lease": 0.4}'
        started.append(start(tmp_path, "train.py", within=("ip", "netns", "exec", name, "env", *variables, settings)))
    stdout = started[0].stdout  # the main worker's; that of the other is not shown
    assert stdout is not None
    assert stdout.readline().startswith("here")
    pulled = time.monotonic()
    subprocess.run(["ip", "-n", namespaces[0], "link", "set", CABLE[0], "down"], check=True)
    results = [finish(process, tmp_path / "runs" / "1") for process in started]
    assert time.monotonic() - pulled < 40
    first, second = results
    assert second.status == 76, second.text
    assert "rank 1 can not reach rank 0 any more, and they may go on without it" in second.err, second.text
    assert first.status == 0, first.text
    assert "rank 0 goes on without what was lost: the host of rank 1." in first.err, first.text
    alone = finish(start(tmp_path, "train.py"), tmp_path / "runs" / "2")
    assert first.out.splitlines()[-1] == alone.out.splitlines()[-1]
