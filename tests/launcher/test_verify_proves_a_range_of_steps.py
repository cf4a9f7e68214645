"""`lightwork verify` trains from one checkpoint of a run to the next again: the same bits, or the name of others."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lightwork
from lightwork.checkpoint.tensors import sha256_of
from tests.launcher.command import Result, finish, lightwork_run, script, start

#: Saves after steps 4, 8 and 12.
TEXT = script("if run.rank == 1 and step.index >= 5: os.kill(os.getpid(), signal.SIGKILL)", max_steps=12).replace(
    "micro_batch=2", "micro_batch=2, save_every=4, keep_checkpoints=3 WHERE"
)


def verify(folder: Path, *options: str) -> Result:
    return finish(start(folder, "-m", "lightwork", "verify", *options), folder)


@pytest.mark.parametrize("where", ["", ", run_dir='here'"])
def test_what_a_team_of_three_did_of_whom_one_was_killed_is_what_one_worker_does(tmp_path: Path, where: str) -> None:
    options = ("--run-dir", "here") if where else ()
    result = lightwork_run(tmp_path, TEXT.replace("WHERE", where), *options, workers="3")
    assert result.status == 0, result.text
    run_dir = "here" if where else "runs/1"
    before = lightwork.load(tmp_path / run_dir)
    verified = verify(tmp_path, run_dir)
    assert verified.status == 0, verified.text
    assert "steps 8 to 12 give the same bits: all weights, buffers and optimizer state" in verified.err
    verified = verify(tmp_path, run_dir, "--from", "4", "--to", "8")
    assert "steps 4 to 8 give the same bits" in verified.err, verified.text
    assert lightwork.load(tmp_path / run_dir).step == before.step == 12  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([run_dir.split("/")[0], "train.py"])


def test_other_bits_are_named(tmp_path: Path) -> None:
    lightwork_run(tmp_path, TEXT.replace("WHERE", ""), workers="2")
    manifest, file = (tmp_path / "runs/1/checkpoint" / name for name in ("manifest.json", "model.safetensors"))
    tensors = load_file(file)
    tensors["2.weight"].view(-1)[3] += 1e-6
    before = sha256_of(file)
    save_file(tensors, file)
    # As a run that computed something else would have written it: with hashes that fit.
    said = json.loads(manifest.read_text().replace(before, sha256_of(file)))
    del said["sha256"]
    said["sha256"] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    manifest.write_text(json.dumps(said))
    verified = verify(tmp_path, "runs/1")
    assert verified.status == 1, verified.text
    assert "steps 8 to 12 give other bits here: 2.weight" in verified.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("runs/2",), "command.json can not be read"),
        (("runs/1", "--from", "5"), "has checkpoints of these steps: 4, 8, 12"),
        (("runs/1", "--to", "4"), "Two are needed, to begin and to end with"),
    ],
)
def test_what_can_not_be_replayed_is_refused(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    lightwork_run(tmp_path, TEXT.replace("WHERE", ""), workers="1")
    verified = verify(tmp_path, *options)
    assert verified.status == 2, verified.text
    assert words in verified.err


def test_a_script_that_does_not_come_there_any_more_says_so(tmp_path: Path) -> None:
    lightwork_run(tmp_path, TEXT.replace("WHERE", ""), workers="1")
    shutil.copy(tmp_path / "train.py", tmp_path / "before.py")
    (tmp_path / "train.py").write_text('raise SystemExit("moved to before.py")')
    verified = verify(tmp_path, "runs/1")
    assert verified.status == 2, verified.text
    assert "the script did not come to step 12 from step 8 (it ended)" in verified.err
    assert "moved to before.py" in verified.err
