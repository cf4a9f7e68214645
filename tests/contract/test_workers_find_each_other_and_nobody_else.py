"""How workers that share nothing yet find each other: messages of any number, ports that others do not reach."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from lightwork.errors import TeamError
from lightwork.team import finding, page, rendezvous
from lightwork.team.environment import Environment, Launcher, read
from lightwork.team.page import FileRendezvous, Page
from lightwork.team.rendezvous import StoreRendezvous


def test_messages_of_any_number_of_runs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_JOURNAL_BYTES", 4096)
    fd = Page.create()
    first, second = FileRendezvous(fd, 0), FileRendezvous(fd, 1)
    for _ in range(200):
        number = first.next_run()
        first.publish(f"memory {number}", "x" * 100)
        first.publish(f"store {number}", str(number))
        assert second.next_run() == number
        assert second.wait_for_message(f"memory {number}") == "x" * 100
        assert second.wait_for_message(f"store {number}") == str(number)
    os.close(fd)


def test_a_message_that_has_no_room_is_refused_before_it_is_written() -> None:
    fd = Page.create()
    with pytest.raises(TeamError, match="the message 'spec' to the other workers has 16777222 bytes, and 16777216"):
        FileRendezvous(fd, 0).publish("spec", "x" * 2**24)
    os.close(fd)


def test_waiting_reads_only_what_is_new() -> None:
    fd = Page.create()
    first, second = FileRendezvous(fd, 0), FileRendezvous(fd, 1)
    for number in range(10_000):
        first.publish(f"memory {number}", "x" * 500)
    second.wait_for_message("memory 0")
    threading.Timer(0.5, lambda: first.publish("late", "here")).start()
    start = time.process_time()
    assert second.wait_for_message("late") == "here"
    assert time.process_time() - start < 0.25, "as long as the wait itself"
    os.close(fd)


def test_a_descriptor_that_is_something_else_is_no_page(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * 1024 * 1024)
    for wrong in (fd, 9999):
        with pytest.raises(TeamError, match="is not the page that lightwork run leaves to its workers"):
            FileRendezvous(wrong, 0)
    os.close(fd)


def test_the_page_is_not_left_to_other_programs() -> None:
    fd = Page.create()
    assert not os.get_inheritable(fd)
    os.close(fd)


def listening(port: int) -> set[str]:
    """Return the addresses, as the kernel writes them, on which something listens to `port`."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system has no /proc")
def test_a_team_on_one_machine_listens_to_that_machine_alone() -> None:
    fd = Page.create()
    store = FileRendezvous(fd, 0).store("leaders 1")
    assert listening(store.port) == {"0100007F"}  # type: ignore[attr-defined]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = StoreRendezvous(
        Environment(rank=0, world_size=2, launcher=Launcher.MPI, address="127.0.0.1", port=port, job="a")
    )
    assert listening(port) == {"0100007F"}
    served.publish("memory", "here")
    other = Environment(rank=1, world_size=2, launcher=Launcher.MPI, address="127.0.0.1", port=port, job="a")
    assert StoreRendezvous(other).wait_for_message("memory") == "here"
    os.close(fd)


def test_two_jobs_in_one_store_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = StoreRendezvous(Environment(rank=0, world_size=2, launcher=Launcher.MPI, port=port, job="a"))
    first.publish("memory", "here")
    other = StoreRendezvous(Environment(rank=1, world_size=2, launcher=Launcher.MPI, port=port, job="b"))
    with pytest.raises(TeamError, match="waited"):
        other.wait_for_message("memory")
    with pytest.raises(TeamError, match=f"port {port}, where the workers are to find each other, can not be had"):
        StoreRendezvous(Environment(rank=0, world_size=2, launcher=Launcher.MPI, port=port, job="b"))


def test_a_job_without_a_name_has_no_port_that_another_one_has_too() -> None:
    hydra = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    environment = read(hydra)
    assert environment.port is None
    with pytest.raises(TeamError, match="the launcher does not name the job"):
        finding.find(environment)
    assert read({**hydra, "MASTER_PORT": "29999"}).port == 29999
    jobs = [read({**hydra, "PMIX_NAMESPACE": name}) for name in ("prterun-1", "prterun-2")]
    assert jobs[0].job != jobs[1].job
    assert jobs[0].port != jobs[1].port


def test_what_a_worker_leaves_to_its_programs_makes_them_no_worker() -> None:
    worker = Environment(rank=1, world_size=2, rendezvous_fd=7, run_dir="here", settings={"seed": 3})
    variables = worker.variables()
    assert read(variables).rank == 1
    of_a_program = read({**variables, "LIGHTWORK_PID": str(os.getpid() + 1)})
    assert of_a_program.launcher is Launcher.PYTHON
    assert (of_a_program.world_size, of_a_program.run_dir, of_a_program.settings) == (1, None, {})
    under_torchrun = {**variables, "LIGHTWORK_PID": "1", "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4"}
    assert read(under_torchrun).launcher is Launcher.TORCHRUN
