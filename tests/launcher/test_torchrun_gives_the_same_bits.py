"""The same script under `python` and under `torchrun`."""

from __future__ import annotations

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
