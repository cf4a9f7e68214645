"""Scripts of common kinds (`examples/ports`): the same bits for any team, and what plain PyTorch computes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import lightwork
from lightwork.run import plain
from tests.fake_ranks import run_ranks
from tests.training import new_folder

FOLDER = Path(__file__).parents[2] / "examples/ports"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))

#: Digest and weights of each run of a script.
Ended = list[tuple[str, dict[str, torch.Tensor]]]


class Stopped(Exception):
    """The script's process ends here."""


def script(name: str) -> ModuleType:
    """Return a new copy of a script."""
    spec = importlib.util.spec_from_file_location(f"port_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes say that they are from
    spec.loader.exec_module(module)
    return module


def run_script(
    name: str, num_workers: int, out: Path, *, stop_after_saves: int | None = None, **settings: Any
) -> tuple[Ended, list[str]]:
    """Run a script by a team of fake ranks; return how its runs ended, on rank 0, and what rank 0 printed.

    Args:
        stop_after_saves: how many calls of `save` the script lives.
    """
    module = script(name)
    runs_of: dict[int, list[lightwork.Run]] = {}
    saves: dict[int, int] = {}

    def distribute(model: Any, optimizer: Any, **arguments: Any) -> Any:
        run = lightwork.distribute(model, optimizer, **{**arguments, **settings})
        runs_of.setdefault(threading.get_ident(), []).append(run)
        return run

    save = lightwork.Run.save

    def counted_save(self: lightwork.Run, *arguments: Any, **options: Any) -> Path:
        path = save(self, *arguments, **options)
        own = threading.get_ident()
        saves[own] = saves.get(own, 0) + 1
        if saves[own] == stop_after_saves:
            raise Stopped
        return path

    module.lightwork = SimpleNamespace(distribute=distribute, first=lightwork.first)  # type: ignore[attr-defined]

    def job() -> tuple[Ended, list[str]]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                module.main(["--out", str(out)])
        except Stopped:
            pass
        runs = runs_of.pop(threading.get_ident())
        ended = [(run.digest(), {key: value.clone() for key, value in run.state_dict().items()}) for run in runs]
        for run in runs:
            run.close()
        return ended, printed.getvalue().splitlines()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightwork.Run, "save", counted_save)
        return run_ranks(num_workers, job)[0]


_alone: dict[str, tuple[Ended, list[str]]] = {}


def alone(name: str) -> tuple[Ended, list[str]]:
    """Return what one worker makes of a script."""
    if name not in _alone:
        _alone[name] = run_script(name, 1, new_folder())
    return _alone[name]


def digests(ended: Ended) -> list[str]:
    return [digest for digest, _ in ended]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_team_gives_the_bits_of_one_worker(name: str, num_workers: int) -> None:
    ended, printed = run_script(name, num_workers, new_folder())
    expected, expected_print = alone(name)
    assert digests(ended) == digests(expected)
    assert printed == expected_print
    assert printed


#: Of a script that has several; each is saved.
NUM_RUNS = {"gan": 2}

#: Muon makes a matrix orthogonal in bf16, so that gradients that differ by an fp32 rounding give others in bf16. (With
#: one micro-batch a step the bits are equal: `tests/engine/test_optimizers_are_plain_pytorchs_or_refused.py`.)
ROUNDING = {"muon_adamw": 2e-3}


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_worker_computes_what_plain_pytorch_does(name: str) -> None:
    runs: list[plain.PlainRun] = []
    module = script(name)
    module.lightwork = plain.module(runs)  # type: ignore[attr-defined]
    printed = io.StringIO()
    before = torch.default_generator.get_state()
    with contextlib.redirect_stdout(printed):
        module.main(["--out", str(new_folder())])
    torch.default_generator.set_state(before)
    ended, lines = alone(name)
    assert len(runs) == len(ended)
    for run, (_, state) in zip(runs, ended, strict=True):
        theirs = run.model.state_dict()
        assert theirs.keys() == state.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                state[key], value, rtol=1e-3, atol=ROUNDING.get(name, 1e-5), msg=lambda text, key=key: f"{key}: {text}"
            )
    assert len(lines) == len(printed.getvalue().splitlines())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_was_ended_in_mid_epoch_goes_on_with_another_team(name: str) -> None:
    out = new_folder()
    run_script(name, 2, out, stop_after_saves=NUM_RUNS.get(name, 1))
    ended, printed = run_script(name, 3, out)
    expected, expected_print = alone(name)
    assert digests(ended) == digests(expected)
    assert printed[-1:] == expected_print[-1:]


def test_two_runs_of_which_one_was_saved_later_are_not_gone_on_with() -> None:
    out = new_folder()
    run_script("gan", 1, out, stop_after_saves=3)  # the critic once more, the generator not
    with pytest.raises(lightwork.CheckpointError, match="generator and critic do not belong together"):
        run_script("gan", 1, out)


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("zero3", {"transport": "group", "placement": "zero3"}),
    ("recompute", {"activations": "recompute"}),
]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("plan", "settings"), PLANS, ids=[plan for plan, _ in PLANS])
def test_a_plan_changes_no_bit(name: str, plan: str, settings: dict[str, Any]) -> None:
    ended, _ = run_script(name, 2, new_folder(), **settings)
    assert digests(ended) == digests(alone(name)[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_bf16_a_team_gives_the_bits_of_one_worker(name: str) -> None:
    one, _ = run_script(name, 1, new_folder(), precision="bf16")
    two, _ = run_script(name, 2, new_folder(), precision="bf16")
    assert digests(two) == digests(one) != digests(alone(name)[0])


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 8


@pytest.fixture(autouse=True)
def _private_modules() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("port_")]:
        del sys.modules[name]
