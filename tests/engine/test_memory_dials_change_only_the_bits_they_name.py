"""Recomputed activations change no bit; 8-bit activations and a narrow wire format change some, the same ones for
every team."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightwork
from lightwork.data.order import shuffled
from lightwork.device.cpu import Cpu
from lightwork.engine.forward.activations import Activations
from lightwork.engine.forward.int8 import INT8_BLOCK, from_int8, to_int8
from lightwork.errors import SpecError, UsageError
from lightwork.state.layers import layers_of, resolve
from tests.cases import CASES, Case
from tests.fake_ranks import run_ranks
from tests.training import alone, new_folder, train


class NoWeights:
    """Takes no tensor for a weight."""

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return False

    def bring_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_recomputed_activations_change_no_bit(case: Case) -> None:
    for num_workers in (1, 2):
        for seen in run_ranks(num_workers, lambda: train(case, activations="recompute")):
            assert seen == alone(case.name)


@pytest.mark.parametrize(
    "more",
    [{"wire": "bf16"}, {"activations": "int8"}, {"optimizer_state": "int8"}],
    ids=["wire", "activations", "state"],
)
@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "convolution, batch norm"])
def test_what_changes_bits_changes_the_same_ones_for_every_team(name: str, more: dict[str, Any]) -> None:
    case = CASES[name]
    plain, of_one = alone(name), alone(name, **more)
    if name.startswith("gpt") or "activations" not in more:
        assert of_one[0][2] != plain[0][2]
    assert of_one[-1][0] == pytest.approx(plain[-1][0], rel=0.02), "and hardly the loss"
    for num_workers, settings in ((2, {}), (3, {}), (3, {"transport": "group"})):
        for seen in run_ranks(num_workers, lambda: train(case, **more), settings=settings):
            assert seen == of_one


@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "convolution, batch norm"])
def test_fp16_gives_every_team_the_same_bits_and_nearly_the_loss_of_fp32(name: str) -> None:
    case = CASES[name]
    of_one = alone(name, precision="fp16", max_steps=3)
    assert of_one[-1][0] == pytest.approx(alone(name)[2][0], rel=0.02)
    for settings in ({}, {"transport": "group"}):
        for seen in run_ranks(2, lambda: train(case, precision="fp16", max_steps=3), settings=settings):
            assert seen == of_one


def overflowing(folder: Path) -> list[tuple[bool, float, str]]:
    """Train in fp16 with one micro-batch of step 2 whose gradient overflows, saving after it; or go on from there."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = folder / "saved"
    run = lightwork.distribute(
        model,
        optimizer,
        global_batch=16,
        micro_batch=2,
        precision="fp16",
        run_dir=str(new_folder()),
        resume=saved if saved.exists() else None,
    )
    seen = []
    marked = shuffled(0, 0, 48)[32]  # the first of step 2
    for step in run.steps(torch.utils.data.TensorDataset(torch.randn(48, 6), torch.arange(48)), epochs=2):
        for x, ids in step:
            overflows = step.index == 2 and marked in ids.tolist()
            step.backward(model(x).float().square().mean() * (1e30 if overflows else 0.01))
        seen.append((step.skipped, run._engine.state.loss_scale.of(step.index + 1), run.digest()))
        if step.index == 2:
            run.save(saved)
    return seen


def test_a_step_whose_gradient_overflows_is_left_out_by_all_and_the_scale_halved(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, lambda: overflowing(tmp_path / "alone"))
    assert [skipped for skipped, _, _ in alone] == [False, False, True, False, False, False]
    assert [scale for _, scale, _ in alone] == [65536.0] * 2 + [32768.0] * 4
    assert alone[2][2] == alone[1][2] != alone[3][2], "weights and state stay as they were"
    for name, settings in (("host", {}), ("group", {"transport": "group"})):
        for seen in run_ranks(2, lambda name=name: overflowing(tmp_path / name), settings=settings):
            assert seen == alone
    (resumed,) = run_ranks(1, lambda: overflowing(tmp_path / "group"))
    assert resumed == alone[3:], "the scale is saved with the rest"


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.calls = 0

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        y = nn.functional.dropout(torch.tanh(self.norm(self.linear(x))), 0.5)
        return y if scale is None else y * scale


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(64) for _ in range(4)))


def test_layers_are_the_items_of_the_largest_list() -> None:
    nested = nn.ModuleDict({"head": nn.Linear(3, 3), "body": nn.Sequential(model(), nn.Linear(64, 3))})
    assert layers_of(nested) == ["body.0", "body.1"]
    assert layers_of(model()) == ["0", "1", "2", "3"]
    assert layers_of(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()})) == ["a"]


def test_a_recomputed_layer_keeps_its_inputs_alone_and_its_buffers_as_they_were() -> None:
    kept, again = model(), model()
    wrapped = Activations(again, resolve(again, "recompute"), NoWeights(), Cpu())
    saved: dict[str, int] = {}
    gradients = {}
    for name, layers in (("kept", kept), ("again", again)):
        torch.manual_seed(3)
        x = torch.randn(100, 64)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = layers(x).square().mean()
        saved[name] = sum(sizes)
        buffers = {key: value.clone() for key, value in layers.named_buffers()}
        loss.backward()  # type: ignore[no-untyped-call]
        gradients[name] = [p.grad for p in layers.parameters()]
        assert all(torch.equal(value, buffers[key]) for key, value in layers.named_buffers()), name
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    assert saved["again"] < saved["kept"] / 10
    assert [layer.calls for layer in again] == [2] * 4
    wrapped.close()
    assert all("forward" not in vars(layer) for layer in again)


class Forgetful(nn.Module):
    """Does something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight) if self.calls % 2 else (x * self.weight).sum(0)


def test_a_module_that_can_not_be_replayed_is_named() -> None:
    module = nn.Sequential(Forgetful())
    Activations(module, {"0": "recompute"}, NoWeights(), Cpu())
    with pytest.raises(UsageError, match="module 0 did not do the same when it was run again"):
        module(torch.randn(10, 64)).sum().backward()


class Compares(nn.Module):
    """Does something else for the same object twice, as nn.MultiheadAttention does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(q)) if q is k else self.linear(q).cos() + k


class WritesLargeBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(300, 300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return torch.tanh(x) * self.seen[0, 0]


@pytest.mark.parametrize("inner", [nn.ReLU(inplace=True), nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True))])
def test_a_layer_that_writes_into_what_it_is_given_is_run_again_on_what_it_was(inner: nn.Module) -> None:
    def gradient(*, again: bool) -> torch.Tensor:
        module = nn.ModuleList([inner])
        wrapped = Activations(module, {"0": "recompute"} if again else {}, NoWeights(), Cpu())
        torch.manual_seed(0)
        x = torch.randn(10, 64, requires_grad=True)
        module[0](x * 2).square().sum().backward()
        wrapped.close()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_an_object_that_is_given_twice_is_given_twice_again() -> None:
    module = nn.ModuleList([Compares()])
    x = torch.randn(10, 64, requires_grad=True)
    (kept,) = torch.autograd.grad(module[0](x, x).sum(), x)
    Activations(module, {"0": "recompute"}, NoWeights(), Cpu())
    (again,) = torch.autograd.grad(module[0](x, x).sum(), x)
    assert torch.equal(kept, again)


def test_what_can_not_be_run_again_to_the_same_bits_is_refused() -> None:
    module = nn.ModuleList([nn.Tanh(), WritesLargeBuffer()])
    Activations(module, {"0": "recompute", "1": "recompute"}, NoWeights(), Cpu())
    x = torch.randn(10, 64, requires_grad=True) * 2
    y = module[0](x)
    x.add_(1)
    with pytest.raises(UsageError, match="an input of module 0 was written in place"):
        y.sum().backward()
    with pytest.raises(UsageError, match="module 1 writes a buffer of more than 65536 elements"):
        module[1](torch.randn(10, 64))


def test_a_value_in_8_bits_is_off_by_at_most_half_a_level_of_its_block() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(7, 301) * torch.logspace(-3, 3, 301)
    back = from_int8(to_int8(tensor))
    flat = torch.nn.functional.pad(tensor.view(-1), (0, -tensor.numel() % INT8_BLOCK)).view(-1, INT8_BLOCK)
    level = (flat.abs().amax(1, keepdim=True) / 127).expand_as(flat).reshape(-1)[: tensor.numel()].view(7, 301)
    assert bool(((back - tensor).abs() <= level * 0.5001).all())
    assert torch.equal(from_int8(to_int8(torch.zeros(300))), torch.zeros(300))


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ("sometimes", "activations='sometimes' is not known"),
        ({"9": "recompute"}, "activations names '9', which the model does not have"),
        ({"0": "recompute", "0.linear": "recompute"}, "'0' and '0.linear', which is inside it"),
        ("offload", "it is on a CPU already"),
        ({"": "recompute", "0": "recompute"}, "activations names 'the model' and '0', which is inside it"),
        (7, "activations=7 is neither a value nor a choice by module"),
    ],
)
def test_what_can_not_be_done_is_refused_before_the_first_step(activations: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(model(), activations)
