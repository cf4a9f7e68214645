"""`lightwork run` on scripts that do what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightwork.cli.run import count_workers
from tests.launcher.command import HEAD, finish, left_running, lightwork_run, script, start

REPORT = """
print("arguments", sys.argv[1:], "main", __name__, "file", os.path.basename(__file__))
print("size", run.world_size, "seed", run.spec.seed, "steal", run.plan.steal, "digest", run.digest())
print("to standard error", run.rank, file=sys.stderr)
sys.exit(None)
"""


def test_a_run_shows_the_main_workers_output_keeps_the_others_and_leaves_its_directory(tmp_path: Path) -> None:
    # A script's neighbours are importable, as under `python script.py`.
    (tmp_path / "neighbour.py").write_text("value = 1\n")
    text = "import neighbour\n" + script(end=REPORT)
    result = lightwork_run(
        tmp_path, text, "--set", "seed=5", "--set", "steal=false", arguments=["--epochs", "3", "-n", "x"], workers="3"
    )
    assert result.status == 0, result.text
    assert left_running(result.pids()) == []

    lines = result.out.splitlines()
    assert lines[0] == "arguments ['--epochs', '3', '-n', 'x'] main __main__ file train.py"
    assert lines[1].startswith("size 3 seed 5 steal False digest ")
    assert len(lines) == 2, "only the main worker's output is shown"
    assert "to standard error 0" in result.err
    assert "to standard error 1" not in result.err
    assert "6 steps in" in result.err
    for rank in range(3):
        assert lines[1] in result.log(rank), "every worker has the same digest"
        assert f"to standard error {rank}" in result.log(rank)

    run_dir = result.run_dir
    records = {"command.json", "spec.json", "plan.json", "roster.json"}
    assert {p.name for p in run_dir.iterdir()} == {*records, "trace", "log"}
    spec, plan, roster = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("spec", "plan", "roster"))
    assert (spec["global_batch"], spec["micro_batch"], spec["seed"]) == (16, 2, 5)
    assert (plan["world_size"], plan["steal"]) == (3, False)
    assert [member["rank"] for member in roster["members"]] == [0, 1, 2]
    assert len(set(result.pids())) == 3

    for rank in range(3):
        records = [json.loads(line) for line in (run_dir / "trace" / f"rank{rank}.jsonl").read_text().splitlines()]
        spans = [record for record in records if record["kind"] == "span"]
        assert {span["name"] for span in spans} == {"load", "forward", "backward", "wait", "reduce", "update"}
        assert {span["step"] for span in spans} == set(range(6))
        for span in spans:
            assert span["seconds"] >= 0
            assert ("micro" in span) == (span["name"] in ("load", "forward", "backward"))
        assert [record["name"] for record in records if record["kind"] == "event"][:1] == ["start"]


def test_a_module_is_run_by_as_many_workers_as_cores_and_its_exit_status_is_kept(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("value = 41\n")
    end = 'print("size", run.world_size, "arguments", sys.argv[1:], "value", value + 1)\nsys.exit(7)\n'
    (package / "train.py").write_text("from .data import value\n" + script(end=end))
    options = ("--run-dir", "elsewhere", "--quiet", "-n", "auto", "-m", "package.train", "--lr", "1")
    result = finish(start(tmp_path, "-m", "lightwork", "run", *options), tmp_path / "elsewhere")
    cores = len(os.sched_getaffinity(0))
    assert result.out == f"size {cores} arguments ['--lr', '1'] value 42\n", result.text
    assert result.status == 7, result.text
    assert "Traceback" not in result.err
    assert "steps in" not in result.err, "--quiet shows no progress"
    assert len(result.pids()) == cores
    assert not (tmp_path / "runs").exists()


def test_a_script_that_never_reaches_distribute_is_told_so(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, HEAD + 'print("hello")\n')
    assert result.status == 1, result.text
    assert result.out == "hello\n"
    assert "train.py ended without calling lightwork.distribute. 2 copies of it ran" in result.err
    assert "global_batch" in result.err, "it says what to do"


COMPILED_LATER = """
print("before", "torch._dynamo" in sys.modules)
import torch._dynamo
later = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
later.zero_grad()
kept_out = torch.optim.Optimizer.zero_grad.__wrapped__.__dynamo_disable
print("after", len(later.state_dict()["param_groups"]), kept_out.__module__)
"""


def test_training_leaves_torchs_compiler_out_until_the_script_imports_it(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, script(end=COMPILED_LATER))
    assert result.status == 0, result.text
    before, after = result.out.splitlines()
    assert before == "before False"
    assert after == "after 1 torch._dynamo.eval_frame", "torch's own way, as soon as there is a compiler"


def test_the_main_worker_may_call_a_model_with_sharded_weights_after_the_others_have_ended(tmp_path: Path) -> None:
    end = """\
if run.is_main:
    time.sleep(0.5)
    with torch.no_grad():
        print("finite", bool(model(torch.randn(4, 6)).isfinite().all()))
"""
    # Large enough for a bucket that the other worker owns.
    large = "torch.nn.Linear(6, 1500), torch.nn.Tanh(), torch.nn.Linear(1500, 1500), torch.nn.Linear(1500, 3)"
    text = script(end=end).replace("torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)", large)
    assert large in text
    result = lightwork_run(tmp_path, text, "--transport", "group", "--set", "placement=zero3")
    assert result.status == 0, result.text
    assert "finite True" in result.out


PROGRAM = """
import subprocess
if run.is_main:
    keep = [sys.executable, "other.py"]
    done = [subprocess.run(keep, capture_output=True, text=True, close_fds=close) for close in (True, False)]
    print([(one.returncode, one.stdout, one.stderr[-300:] if one.returncode else "") for one in done])
"""


def test_a_script_that_a_worker_starts_is_a_team_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(script(max_steps=1, end='print("workers", run.world_size, run.run_dir.name)'))
    result = lightwork_run(tmp_path, script(max_steps=1, end=PROGRAM))
    assert result.status == 0, result.text
    assert result.out.strip() == str([(0, f"workers 1 {number}\n", "") for number in (2, 3)]), result.text


@pytest.mark.parametrize(
    ("settings", "num_gpus", "expected"),
    [
        ({}, 3, 3),
        ({"device": "cuda"}, 3, 3),
        ({"device": "cpu"}, 3, None),
        ({"device": "rehearsal"}, 3, None),
        ({}, 0, None),
        ({"device": "cuda"}, 0, 1),
    ],
    ids=str,
)
def test_auto_is_a_worker_for_each_gpu_wherever_there_are_some(
    settings: dict[str, object], num_gpus: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    assert count_workers("auto", settings) == (7 if expected is None else expected)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_does_without_the_descriptors_that_its_caller_has_closed(tmp_path: Path, closed: str) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, lightwork\n"
        "model = torch.nn.Linear(4, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "run = lightwork.distribute(model, optimizer, global_batch=4, micro_batch=2)\n"
        "for step in run.steps(torch.ones(4, 4)):\n"
        "    for x in step:\n"
        "        step.backward(model(x).mean())\n"
        'print("trained")\n'
    )
    command = f"exec {sys.executable} -m lightwork run -n 2 --run-dir here train.py {closed}"
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ("trained\n" in ended.stdout) == (">&-" not in closed.split())
    assert (tmp_path / "here" / "log" / "rank1.log").read_text() == "trained\n"
