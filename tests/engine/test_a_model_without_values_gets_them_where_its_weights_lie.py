"""A model built on the meta device trains as the one built in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightwork
from lightwork.errors import SpecError
from tests.fake_ranks import run_ranks
from tests.training import new_folder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(ids))))


def train(build: Callable[[], nn.Module], **settings: Any) -> list[str]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=str(new_folder()), **settings)
    digests = [run.digest()]
    ids = torch.arange(44) % 11
    for step in run.steps(torch.utils.data.TensorDataset(ids, (ids * 7) % 11), epochs=1):
        for inputs, targets in step:
            step.backward(nn.functional.cross_entropy(model(inputs), targets))
        digests.append(run.digest())
    return digests


def in_memory() -> nn.Module:
    torch.manual_seed(5)
    return Net()


def without_values() -> nn.Module:
    torch.manual_seed(5)
    with torch.device("meta"):
        return Net()


def tied(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    model.head.weight = model.embedding.weight  # type: ignore[assignment,union-attr]
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modules_make_the_values_that_they_would_have_made_in_memory(precision: str) -> None:
    (expected,) = run_ranks(1, lambda: train(in_memory, precision=precision))
    disk = {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}}
    for num_workers, settings in ((1, {}), (2, {}), (2, {"transport": "group"}), (2, disk)):
        for seen in run_ranks(num_workers, lambda: train(without_values, precision=precision), settings=settings):
            assert seen == expected


def test_a_file_gives_the_values(tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = tied(Net)
    state = {name: value for name, value in other.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "net.safetensors")
    (expected,) = run_ranks(1, lambda: train(lambda: other))
    for build in (in_memory, without_values):
        for seen in run_ranks(2, lambda build=build: train(lambda: tied(build), weights=tmp_path / "net.safetensors")):
            assert seen == expected


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_what_can_not_get_values_is_named_before_the_first_step(tmp_path: Path) -> None:
    def attempt(build: Callable[[], nn.Module], **settings: Any) -> str:
        with torch.device("meta"):
            model = build()
        with pytest.raises(SpecError) as error:
            lightwork.distribute(
                model, torch.optim.SGD(model.parameters()), global_batch=2, run_dir=str(new_folder()), **settings
            )
        return str(error.value)

    assert "module 0 (Own) has scale on the meta device and no reset_parameters()" in attempt(
        lambda: nn.Sequential(Own())
    )
    save_file({"0.scale": torch.zeros(4)}, tmp_path / "a.safetensors")
    assert "0.scale is (3,) in the model and (4,)" in attempt(
        lambda: nn.Sequential(Own()), weights=tmp_path / "a.safetensors"
    )
    assert "has no 1.scale" in attempt(lambda: nn.Sequential(nn.ReLU(), Own()), weights=tmp_path / "a.safetensors")
    assert "can not be read" in attempt(lambda: nn.Sequential(Own()), weights=tmp_path / "nothing.safetensors")
