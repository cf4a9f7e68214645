"""The same script under `python` and under `torchrun`."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.launcher.command import Result, finish, left_running, script, start


def torchrun(folder: Path, text: str) -> Result:
    (folder / "train.py").write_text(text)
    options = ("--standalone", "--nproc-per-node", "2")
    return finish(start(folder, "-m", "torch.distributed.run", *options, "train.py"), folder / "runs" / "1")


def test_a_script_has_the_digest_of_one_worker_and_one_output(tmp_path: Path) -> None:
    text = script(end='print("size", run.world_size, "digest", run.digest())\n')
    team = torchrun(tmp_path, text)
    assert team.status == 0, team.text
    assert len(set(team.pids())) == 2
    alone = finish(start(tmp_path, "train.py"), tmp_path / "runs" / "2")
    assert alone.status == 0, alone.text
    assert team.out == alone.out.replace("size 1", "size 2"), "only the main worker's output is shown"
    assert alone.out.startswith("size 1 digest ")
    assert "a team of one. For a larger one: lightwork run -n " in alone.err


def test_a_worker_that_leaves_in_mid_run_is_named_by_the_other(tmp_path: Path) -> None:
    result = torchrun(tmp_path, script("if run.rank == 1 and step.index >= 3: os._exit(0)", max_steps=100_000))
    assert result.status != 0, result.text
    assert f"RankLost: rank 1 (pid {result.pids()[1]}) is gone; rank 0 needs it in step " in result.err, result.text
    assert left_running(result.pids()) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_nodes(folder: Path, text: str, *sizes: int) -> list[Result]:
    """Run a script under one torchrun for each node, which so many workers share."""
    (folder / "train.py").write_text(text)
    port = str(free_port())
    started = [
        start(
            folder,
            *("-m", "torch.distributed.run", "--nnodes", str(len(sizes)), "--node-rank", str(node)),
            *("--nproc-per-node", str(size), "--master-addr", "127.0.0.1", "--master-port", port, "train.py"),
        )
        for node, size in enumerate(sizes)
    ]
    return [finish(process, folder / "runs" / "1") for process in started]


def test_nodes_of_different_sizes_give_the_digest_of_one_worker(tmp_path: Path) -> None:
    end = """
with run.evaluate(dataset) as ev:
    for inputs, targets in ev:
        ev.add("loss", F.cross_entropy(model(inputs), targets))
with run.edit():
    model[0].bias += 1
run.save("saved")
print("digest", run.digest(), "loss", ev["loss"], "hosts", run._team.roster.sizes)
"""
    first, second = two_nodes(tmp_path, script(end=end), 2, 1)
    assert first.status == second.status == 0, first.text + second.text
    alone = finish(start(tmp_path, "train.py"), tmp_path / "runs" / "2")
    assert alone.status == 0, alone.text
    assert first.out == alone.out.replace("hosts (1,)", "hosts (2, 1)")
    assert second.out == ""
    resume = script(end='run.load("saved")\nprint("digest", run.digest())\n')
    again, _ = two_nodes(tmp_path, resume, 1, 2)
    assert again.out.split()[1] == first.out.split()[1], again.text


def test_a_node_that_is_lost_is_done_without(tmp_path: Path) -> None:
    text = script("if run.rank == 2 and step.index >= 3: os._exit(0)", max_steps=20, end="print(run.digest())")
    first, second = two_nodes(tmp_path, text, 2, 1)
    assert (first.status, second.status) == (0, 0), first.text + second.text
    assert "rank 0 goes on without what was lost: the host of rank 2." in first.err, first.text
    alone = finish(start(tmp_path, "train.py"), tmp_path / "runs" / "2")
    assert first.out == alone.out


def test_a_worker_of_another_node_that_ends_is_named(tmp_path: Path) -> None:
    text = script("if run.rank == 2 and step.index >= 3: os._exit(0)", max_steps=100_000)
    text = text.replace("micro_batch=2)", "micro_batch=2, plan=lightwork.Plan(elastic=False))")
    first, second = two_nodes(tmp_path, text, 2, 1)
    assert (first.status != 0, second.status) == (True, 0), first.text + second.text
    assert "lightwork: rank 0 lost its connection to rank 2" in first.err, first.text


def test_workers_of_several_hosts_that_leave_their_loop_at_different_steps_are_told(tmp_path: Path) -> None:
    text = script(max_steps=50).replace(
        "    for inputs", "    if run.rank == 2 and step.index == 5: break\n    for inputs"
    )
    first, second = two_nodes(tmp_path, text + "print(run.digest())\n", 2, 1)
    assert 0 not in (first.status, second.status), first.text + second.text
    assert "Every worker must make the same calls" in first.err + second.err
