"""What modules keep besides weights is saved and resumed; and a run is saved in the forms that other programs read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from tests.fake_ranks import run_ranks
from tests.training import new_folder

DATA = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(3)), torch.arange(48).remainder(3))


class Counted(nn.Module):
    """Counts what it has seen in a buffer that no state dict has, and in Python."""

    def __init__(self, in_python: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh())
        self.head = nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.said = {"scale": 1.0, "history": [torch.ones(2)]}
        self.in_python = in_python

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            if self.in_python:
                self.said["scale"] *= 1.5
        return self.head(self.inner(x - self.mean))


class Says(Counted):
    def get_extra_state(self) -> Any:
        return self.said

    def set_extra_state(self, state: Any) -> None:
        self.said = state


Build = Callable[[], nn.Module]


def start(build: Build, optimizer: Any = None, **settings: Any) -> tuple[nn.Module, Any, lightwork.Run]:
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer(model)
    settings = {"global_batch": 8, "micro_batch": 2, "run_dir": new_folder(), **settings}
    return model, optimizer, lightwork.distribute(model, optimizer, **settings)


def train(model: nn.Module, run: lightwork.Run, num_steps: int | None = None) -> None:
    for step in run.steps(DATA, epochs=1):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
        if num_steps is not None and step.index + 1 >= num_steps:
            break


def compiled() -> nn.Module:
    model: nn.Module = torch.compile(Counted(), backend="eager")
    return model


@pytest.mark.parametrize("build", [Counted, compiled], ids=["plain", "compiled"])
def test_a_buffer_that_no_state_dict_has_is_resumed(build: Build) -> None:
    def whole() -> str:
        model, _, run = start(build)
        train(model, run)
        return run.digest()

    def first() -> tuple[str, Path]:
        model, _, run = start(build)
        train(model, run, 3)
        return run.digest(), run.save(new_folder() / "saved")

    def rest(folder: Path) -> tuple[str, str]:
        model, _, run = start(build, resume=folder)
        before = run.digest()
        train(model, run)
        return before, run.digest()

    (expected,) = run_ranks(1, whole)
    at_save, folder = run_ranks(2, first)[0]
    assert run_ranks(3, lambda: rest(folder)) == [(at_save, expected)] * 3
    assert "mean" not in lightwork.load(folder)


def test_a_checkpoint_of_a_model_with_other_buffers_is_refused() -> None:
    def save() -> Path:
        return start(Counted)[2].save(new_folder() / "saved")

    def build() -> nn.Module:
        model = Counted()
        model.register_buffer("more", torch.zeros(2), persistent=False)
        return model

    (folder,) = run_ranks(1, save)
    with pytest.raises(lightwork.CheckpointError, match="only the model has the buffer 'more'"):
        run_ranks(1, lambda: start(build, resume=folder))


def test_a_compiled_model_s_checkpoint_is_the_plain_model_s_and_the_other_way_round() -> None:
    def inside() -> nn.Module:
        model = Counted()
        model.inner = torch.compile(model.inner, backend="eager")
        return model

    builds: list[Build] = [Counted, compiled, inside]

    def save(build: Build) -> tuple[Path, str]:
        model, _, run = start(build)
        train(model, run, 2)
        copied = build()
        copied.load_state_dict(run.state_dict())
        return run.save(new_folder() / "saved"), run.digest()

    def resumed(build: Build, folder: Path) -> str:
        return start(build, resume=folder)[2].digest()

    digests = set()
    for build in builds:
        ((folder, digest),) = run_ranks(1, lambda build=build: save(build))
        digests.add(digest)
        Counted().load_state_dict(lightwork.load(folder))
        for other in builds:
            assert run_ranks(1, lambda other=other, folder=folder: resumed(other, folder)) == [digest]
    assert len(digests) == 1


def test_what_a_module_says_beside_tensors_is_saved_and_resumed() -> None:
    def save() -> Path:
        model, _, run = start(Says)
        model.said = {"scale": 2.5, "history": [torch.tensor([3.0, 4.0])]}
        other = Says()
        other.load_state_dict(run.state_dict())
        assert other.said is model.said
        return run.save(new_folder() / "saved")

    def resume(folder: Path) -> Any:
        return start(Says, resume=folder)[0].said

    folder = run_ranks(2, save)[0]
    plain = Says()
    plain.load_state_dict(lightwork.load(folder))
    for said in (*run_ranks(2, lambda: resume(folder)), plain.said):
        assert said["scale"] == 2.5
        assert said["history"][0].tolist() == [3.0, 4.0]


def test_what_a_module_counts_in_python_and_says_is_refused_when_workers_differ() -> None:
    def save() -> None:
        model, _, run = start(lambda: Says(in_python=True))
        train(model, run, 3)
        model.said["scale"] += run.rank
        run.save(new_folder() / "saved")

    with pytest.raises(lightwork.Disagreement, match="_extra_state"):
        run_ranks(2, save)


# --- forms of others --------------------------------------------------------------------------------------------------


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01, fused=True)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def by_hand(model: nn.Module, optimizer: Any, batches: range) -> list[torch.Tensor]:
    members = optimizer if isinstance(optimizer, list) else [optimizer]
    for at in batches:
        x, y = (column[at * 8 : at * 8 + 8] for column in DATA.tensors)
        for member in members:
            member.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for member in members:
            member.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("settings", [{}, {"transport": "group", "placement": "zero3"}], ids=["host", "zero3"])
@pytest.mark.parametrize("optimizer", [adamw, muon_and_adamw], ids=["one", "two"])
def test_a_plain_loop_goes_on_from_a_file_of_torch_to_the_bit(optimizer: Any, settings: dict[str, Any]) -> None:
    def save() -> Path:
        model, _, run = start(Counted, optimizer, micro_batch=8, **settings)
        run.keep(best=0.5)
        for step in run.steps(DATA, shuffle=False, max_steps=3):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        return run.save(format="torch")

    path = run_ranks(2, save)[0]
    assert path.name == "checkpoint.pt"
    torch.manual_seed(1)
    model = Counted()
    made = optimizer(model)
    expected = by_hand(model, made, range(6))
    found = torch.load(path, weights_only=True)
    assert found.keys() == {"model", "optimizer", "step", "epoch", "kept"}
    assert (found["step"], found["epoch"], found["kept"]) == (3, 0, {"best": 0.5})
    resumed = Counted()
    resumed.load_state_dict(found["model"])
    torch.manual_seed(1)
    fresh = Counted()
    by_hand(fresh, optimizer(fresh), range(3))
    resumed.mean.copy_(fresh.mean)  # which no state dict has
    theirs = optimizer(resumed)
    for member, state in zip(
        *([v] if not isinstance(v, list) else v for v in (theirs, found["optimizer"])), strict=True
    ):
        member.load_state_dict(state)
    for one, other in zip(by_hand(resumed, theirs, range(3, 6)), expected, strict=True):
        assert torch.equal(one, other)


def test_a_file_of_a_plain_script_is_loaded_into_a_run() -> None:
    torch.manual_seed(1)
    plain = Counted()
    optimizer = adamw(plain)
    by_hand(plain, optimizer, range(3))
    path = new_folder() / "plain.pt"
    torch.save({"model_state_dict": plain.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, path)

    def go_on() -> list[torch.Tensor]:
        model = Counted()
        model.load_state_dict(lightwork.load(path))
        model.mean.copy_(plain.mean)
        optimizer = adamw(model)
        optimizer.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=8, run_dir=new_folder())
        for step in run.steps(TensorDataset(*(column[24:] for column in DATA.tensors)), shuffle=False):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
        return list(run.state_dict().values())[:2]

    again = Counted()
    again.load_state_dict(plain.state_dict())
    again.mean.copy_(plain.mean)
    theirs = adamw(again)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = by_hand(again, theirs, range(3, 6))
    for state in run_ranks(2, go_on):
        assert torch.equal(state[0], weights[0])
        assert torch.equal(state[1], weights[1])


@pytest.mark.parametrize("settings", [{}, {"transport": "group", "placement": "zero2"}], ids=["host", "zero2"])
def test_a_folder_of_distributed_checkpoint_is_read_by_torch_and_by_load(settings: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def save() -> tuple[Path, dict[str, torch.Tensor]]:
        model, _, run = start(Counted, muon_and_adamw, **settings)
        train(model, run, 3)
        run.save(format="dcp")
        return run.save(format="dcp"), run.state_dict()  # in place of the one before

    path, state = run_ranks(2, save)[0]
    dcp_to_torch_save(path, new_folder() / "one.pt")
    file = new_folder() / "one.pt"
    dcp_to_torch_save(path, file)
    found = torch.load(file, weights_only=False)
    assert found["step"] == 3
    assert found["optimizer"]["state"]["head.weight"].keys() == {"momentum_buffer"}
    assert found["optimizer"]["state"]["head.bias"]["step"] == 3
    assert found["optimizer"]["param_groups"][0]["params"] == ["inner.0.weight", "head.weight"]
    for loaded in (found["model"], lightwork.load(path)):
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Pretrained(Counted):
    """Saves itself as a model of Hugging Face's does."""

    def save_pretrained(self, save_directory: str, *, state_dict: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        (Path(save_directory) / "config.json").write_text("{}")
        save_file(state_dict, Path(save_directory) / "model.safetensors")


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_model_with_save_pretrained_is_saved_by_it_with_whole_fp32_weights(is_compiled: bool) -> None:
    def build() -> nn.Module:
        model: nn.Module = torch.compile(Pretrained(), backend="eager") if is_compiled else Pretrained()
        return model

    def save() -> tuple[Path, dict[str, torch.Tensor]]:
        placement = "zero2" if is_compiled else "zero3"
        model, _, run = start(build, transport="group", placement=placement, precision="bf16")
        train(model, run, 2)
        path = run.save(format="huggingface")
        return path, {name.replace("_orig_mod.", ""): value for name, value in run.state_dict().items()}

    path, state = run_ranks(2, save)[0]
    assert (path / "config.json").exists()
    loaded = lightwork.load(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_what_can_not_be_saved_or_replaced_is_refused() -> None:
    def attempt() -> list[str]:
        model, _, run = start(Counted)
        folder = new_folder()
        (folder / "thesis.txt").write_text("all of it")
        messages = []
        for path, form in ((None, "pickle"), (None, "huggingface"), (folder, "torch"), (folder, "dcp")):
            with pytest.raises(lightwork.CheckpointError) as error:
                run.save(path, format=form)  # type: ignore[arg-type]
            messages.append(str(error.value))
        assert (folder / "thesis.txt").read_text() == "all of it"
        train(model, run, 1)
        return messages

    for messages in run_ranks(2, attempt):
        assert "format='pickle' is none that run.save knows" in messages[0]
        assert "has not. Take format='torch'" in messages[1]
        assert "is a folder, and format='torch' writes a file" in messages[2]
        assert "was not written by run.save" in messages[3]


def test_a_run_does_not_go_on_from_a_form_without_the_place_in_the_data() -> None:
    def attempt() -> str:
        model, _, run = start(Counted)
        train(model, run, 1)
        path = run.save(format="torch")
        with pytest.raises(lightwork.CheckpointError) as error:
            run.load(path)
        return str(error.value)

    assert "has no place in the data" in run_ranks(1, attempt)[0]
