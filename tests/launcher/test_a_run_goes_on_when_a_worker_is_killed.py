"""`lightwork run` goes on when a worker is killed, says whose end it was, and ends as its script does."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.launcher.command import finish, left_running, lightwork_run, script, start, wait_until

#: The script's last line on each worker that comes to it.
END = 'print("end of", run.rank, run.digest(), flush=True)\n'


def killed_at(*deaths: tuple[int, int]) -> str:
    """Return a script in which workers kill themselves, each in a step."""
    condition = " or ".join(f"(run.rank == {rank} and step.index >= {step})" for rank, step in deaths)
    return script(f"if {condition or 'False'}: os.kill(os.getpid(), signal.SIGKILL)", end=END)


def digests(text: str) -> dict[str, str]:
    return dict(re.findall(r"end of (\d) (\w+)", text))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = lightwork_run(tmp_path_factory.mktemp("alone"), killed_at(), workers="1")
    return digests(result.out)["0"]


@pytest.mark.parametrize("deaths", [((1, 3),), ((2, 0),), ((1, 2), (2, 4))], ids=str)
def test_the_others_go_on_to_the_same_bits(
    tmp_path: Path, undisturbed: str, deaths: tuple[tuple[int, int], ...]
) -> None:
    result = lightwork_run(tmp_path, killed_at(*deaths), "--restarts", "0", workers="3")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": undisturbed}
    for rank, _ in deaths:
        assert result.err.count(f"rank {rank} (pid {result.pids()[rank]}) was killed by SIGKILL in the middle of") == 1
    assert result.err.count("The others go on.") == len(deaths)
    assert left_running(result.pids()) == []


def test_without_the_main_worker_the_output_of_the_next_one_is_shown(tmp_path: Path, undisturbed: str) -> None:
    result = lightwork_run(tmp_path, killed_at((0, 2)), "--restarts", "0", workers="2")
    assert result.status == 0, result.text
    assert digests(result.out) == {"1": undisturbed}


def test_when_all_are_killed_the_run_has_failed(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, killed_at((0, 2), (1, 4)), "--restarts", "0", workers="2")
    assert result.status == 128 + signal.SIGKILL, result.text
    assert "was killed by SIGKILL in the middle of training" in result.err


def test_an_exception_of_a_survivor_ends_the_team(tmp_path: Path) -> None:
    text = script(
        "if run.rank == 1 and step.index >= 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        '        if run.rank == 2 and step.index >= 4: raise ValueError("of a survivor")'
    )
    result = lightwork_run(tmp_path, text, workers="3")
    assert result.status == 1, result.text
    assert "ValueError: of a survivor" in result.err
    assert re.search(r"rank 2 \(pid \d+\) failed with exit status 1", result.err), result.text


def test_a_kill_before_training_ends_the_team(tmp_path: Path) -> None:
    text = (
        'import os, signal\nif os.environ["LIGHTWORK_RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)\n' + script()
    )
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status == 128 + signal.SIGKILL, result.text
    assert "before it called lightwork.distribute" in result.err


def test_a_second_run_is_refused_by_name_after_a_death(tmp_path: Path) -> None:
    text = killed_at((1, 2)) + (
        "run.close()\nrun = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=2, name='second')\n"
    )
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status == 128 + signal.SIGKILL, result.text
    assert "rank 1" in result.err


# --- another process takes its place ---------------------------------------------------------------------------------

#: A worker's end in a step, as the first process of its rank; each step takes a while.
ONCE = (
    "import time; time.sleep(0.02)\n"
    '        if run.rank == {rank} and step.index >= 3 and "LIGHTWORK_JOINS" not in os.environ:\n'
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    '        print("step", step.index, "of", run.rank, run.is_main, flush=True)'
)


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = lightwork_run(tmp_path_factory.mktemp("alone"), script(max_steps=40, end=END), workers="1")
    return digests(result.out)["0"]


def test_another_process_takes_the_place_and_comes_to_the_same_bits(tmp_path: Path, long_undisturbed: str) -> None:
    text = script(ONCE.format(rank=1), max_steps=40, end=END)
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": long_undisturbed}
    assert digests(result.log(1)) == {"1": long_undisturbed}
    (pid,) = re.findall(r"The others go on. Another \(pid (\d+)\) is started in its place", result.err)
    assert f"rank 1 (pid {pid}) is there, from step" in result.err
    assert left_running([*result.pids(), int(pid)]) == []


def test_who_takes_the_place_of_the_main_worker_is_main_and_shown(tmp_path: Path, long_undisturbed: str) -> None:
    text = script(ONCE.format(rank=0), max_steps=40, end=END)
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": long_undisturbed}
    shown = re.findall(r"step (\d+) of (\d) (\w+)", result.out)
    ranks = [rank for _, rank, _ in shown]
    changes = [one for one, other in zip(ranks, [*ranks[1:], ""], strict=True) if one != other]
    assert changes == ["0", "1", "0"], "first the main one, then the next, then who took the place of the first"
    assert {is_main for _, rank, is_main in shown if rank == "0"} == {"True"}


def test_a_place_where_one_after_the_other_is_killed_stays_empty(tmp_path: Path) -> None:
    text = script(
        "import time; time.sleep(0.05)\n"
        "        if run.rank == 1 and step.index >= 2: os.kill(os.getpid(), signal.SIGKILL)",
        max_steps=60,
        end=END,
    )
    result = lightwork_run(tmp_path, text, "--restarts", "2", workers="2")
    assert result.status == 0, result.text
    assert result.err.count("is started in its place") == 2
    assert "Its place stays empty: 2 others were killed there, each within 60 s (--restarts)." in result.err


def test_when_all_are_killed_though_others_come_the_run_has_failed(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, killed_at((0, 2), (1, 4)), workers="2")
    assert result.status in (1, 128 + signal.SIGKILL), result.text
    assert "was killed by SIGKILL in the middle of training" in result.err


def test_a_place_for_which_the_script_fails_stays_empty(tmp_path: Path, long_undisturbed: str) -> None:
    text = 'import os\nif "LIGHTWORK_JOINS" in os.environ: raise SystemExit("no second start")\n'
    text += script(ONCE.format(rank=1), max_steps=40, end=END)
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": long_undisturbed}
    assert re.search(r"rank 1 \(pid \d+\) failed with exit status 1 before it called lightwork.distribute", result.err)
    assert "It was to take the place of another. The others go on. Its place stays empty; see its log." in result.err
    assert "no second start" in result.log(1)


def test_a_number_of_restarts_that_is_none_is_refused(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, script(), "--restarts", "-1")
    assert result.status == 2, result.text
    assert "--restarts -1 is not a number from 0 upwards" in result.err


# --- workers with memories of their own -------------------------------------------------------------------------------

GROUP = ("--transport", "group")


@pytest.mark.parametrize("deaths", [((1, 3),), ((0, 2),), ((1, 2), (0, 4))], ids=str)
def test_those_that_have_copies_of_everything_go_on(
    tmp_path: Path, undisturbed: str, deaths: tuple[tuple[int, int], ...]
) -> None:
    result = lightwork_run(tmp_path, killed_at(*deaths), *GROUP, workers="3")
    assert result.status == 0, result.text
    shown = "2" if (0, 4) in deaths else "1" if (0, 2) in deaths else "0"
    assert digests(result.out) == {shown: undisturbed}
    assert result.err.count("The others go on.") == len(deaths)
    assert "Its place stays empty: where workers have memories of their own, none can come." in result.err
    assert left_running(result.pids()) == []


def test_an_exception_ends_workers_with_memories_of_their_own(tmp_path: Path) -> None:
    text = script('if run.rank == 1 and step.index >= 2: raise ValueError("its own")', max_steps=100_000)
    result = lightwork_run(tmp_path, text, *GROUP, workers="3")
    assert result.status == 1, result.text
    assert "ValueError: its own" in result.err
    assert "goes on" not in result.err, result.text


def saving(at: str) -> str:
    """Return a script that saves after each second step, and does something in each micro-batch."""
    return script(at, end=END).replace("micro_batch=2)", "micro_batch=2, save_every=2)")


DIES_ONCE = (
    "if run.rank == 1 and step.index == 4 and not os.path.exists('dead'): "
    "open('dead', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
)
DIES_ALWAYS = "if run.rank == 1 and step.index == 4: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("placement", ["zero1", "zero2", "zero3"])
def test_a_team_in_which_nobody_else_has_what_was_lost_begins_again(
    tmp_path: Path, undisturbed: str, placement: str
) -> None:
    options = (*GROUP, "--set", f"placement={placement}")
    result = lightwork_run(tmp_path, saving(DIES_ONCE), *options, workers="3")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": undisturbed}
    # The newest checkpoint is written in the background: if it is not whole, it is the one before.
    (steps,) = re.findall(
        r"begins again from its checkpoint after (\d) steps \(1 of at most 3 times from there: --restarts\)", result.err
    )
    assert steps in "24"
    assert f"resumed after {steps} steps" in result.err
    assert left_running(result.pids()) == []


def test_without_a_checkpoint_it_begins_at_the_beginning(tmp_path: Path, undisturbed: str) -> None:
    result = lightwork_run(tmp_path, script(DIES_ONCE, end=END), *GROUP, "--set", "placement=zero2", workers="2")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": undisturbed}
    assert "begins again from its beginning, as there is no checkpoint yet" in result.err


def test_it_does_not_begin_for_ever(tmp_path: Path) -> None:
    options = (*GROUP, "--set", "placement=zero2", "--restarts", "2")
    result = lightwork_run(tmp_path, saving(DIES_ALWAYS), *options, workers="2")
    assert result.status == 128 + signal.SIGKILL, result.text
    assert (
        2 <= result.err.count("The team begins again") <= 4
    )  # twice from each checkpoint: after 2 steps, maybe, and 4
    assert result.err.count("The others were ended.") == 1
    assert "It has begun 2 times from there, and does not again (--restarts)." in result.err


@pytest.mark.parametrize("options", [("--restarts", "0"), ("--set", "elastic=false")], ids=" ".join)
def test_it_ends_where_that_is_asked_for(tmp_path: Path, options: tuple[str, ...]) -> None:
    options = (*GROUP, "--set", "placement=zero2", *options)
    result = lightwork_run(tmp_path, saving(DIES_ALWAYS), *options, workers="2")
    assert result.status == 128 + signal.SIGKILL, result.text
    assert "begins again" not in result.err


def test_a_team_that_loses_what_was_being_sent_to_all_begins_again(tmp_path: Path, undisturbed: str) -> None:
    """The first host is lost over an edit, of which the others have not got all."""
    edit = """
    if run.rank == 0 and step.index == 4 and not os.path.exists("dead"):
        open("dead", "w").close()
        from lightwork.engine.exchange.exchange import BetweenHosts
        BetweenHosts.broadcast = lambda self, tensors: os.kill(os.getpid(), signal.SIGKILL)
    with run.edit():
        model[0].bias.mul_(1.0)
"""
    text = saving("pass")
    head, _, tail = text.partition(END)
    result = lightwork_run(tmp_path, head.rstrip() + edit + END + tail, *GROUP, workers="3")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": undisturbed}
    assert "The others can not go on without it. The team begins again from its checkpoint" in result.err, result.text


@pytest.mark.parametrize("options", [GROUP, ("--restarts", "0")], ids=" ".join)
def test_who_leaves_is_blamed_and_not_one_that_was_killed_before(tmp_path: Path, options: tuple[str, ...]) -> None:
    text = script(
        "if run.rank == 1 and step.index == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if run.rank == 2 and step.index == 4: sys.exit(0)",
        max_steps=60,
    )
    result = lightwork_run(tmp_path, text, *options, workers="3")
    assert result.status == 1, result.text
    assert f"rank 2 (pid {result.pids()[2]}) exited with status 0" in result.err, result.text


@pytest.mark.parametrize("options", [GROUP, ("--restarts", "0")], ids=" ".join)
def test_a_traceback_is_shown_once_also_when_another_worker_is_shown(tmp_path: Path, options: tuple[str, ...]) -> None:
    text = script(
        "if run.rank == 0 and step.index == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if run.rank == 1 and step.index == 4: raise ValueError('its own')",
        max_steps=60,
    )
    result = lightwork_run(tmp_path, text, *options, workers="3")
    assert result.status == 1, result.text
    assert (result.out + result.err).count("ValueError: its own") == 1, result.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_teams_ends_the_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """While the launcher waits for what the first team leaves behind: here a child that is slow to end."""
    slow = DIES_ONCE.replace("open('dead'", "subprocess.Popen(['sleep', '30']); open('dead'")
    text = "import subprocess\n" + saving(slow)
    (tmp_path / "train.py").write_text(text)
    process = start(tmp_path, "-m", "lightwork", "run", "-n", "2", *GROUP, "--set", "placement=zero2", "train.py")
    wait_until(lambda: (tmp_path / "dead").exists())
    time.sleep(0.25)
    process.send_signal(number)
    result = finish(process, tmp_path / "runs" / "1")
    assert result.status == 128 + number, result.text
    assert f"interrupted by {number.name}" in result.err
    assert "Traceback" not in result.err
