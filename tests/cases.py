"""Training jobs that together use what real scripts use; each is a few seconds of work at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

Loss = Callable[[nn.Module, Any], tuple[torch.Tensor, float | None]]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    dataset: Callable[[], Dataset[Any]]
    loss: Loss
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class TinyGPT(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(37, 16), nn.Embedding(12, 16)
        self.blocks = nn.Sequential(Block(16, 0.1), Block(16, 0.1))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 37, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2), nn.GroupNorm(2, 8)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(5))
        self.head(self.features(torch.zeros(2, 1, 8, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class LSTM(nn.LSTM):
    """Runs in PyTorch's own kernels where oneDNN has none for autocast: on CPUs without bf16."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(before and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        try:
            return super().forward(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(before)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = LSTM(6, 12, num_layers=2, batch_first=True, dropout=0.1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Experts(nn.Module):
    """Routes by the label's parity: some micro-batches touch only some experts, and nobody touches the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 5) for _ in range(4))
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.frozen(self.stem(x)))
        chosen = (x[:, 0] * 100).long().abs() % 3
        out = torch.zeros(len(x), 5, device=x.device)
        for index in chosen.unique().tolist():
            rows = chosen == index
            out = out.index_put((rows.nonzero()[:, 0],), self.experts[index](h[rows]).float())
        return out


class Counting(nn.Module):
    """Keeps statistics of its own in buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(3))
        self.register_buffer("mask", torch.ones(300, 300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
            self.largest = torch.maximum(self.largest, x.detach().max().expand(3))
        return self.net(x)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 5))


def vectors(num: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(num, 20, generator=generator), torch.randint(0, 5, (num,), generator=generator))


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(6)
    return TensorDataset(torch.randn(44, 1, 8, 8, generator=generator), torch.randint(0, 5, (44,), generator=generator))


def sequences() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(44, 7, 6, generator=generator), torch.randint(0, 5, (44,), generator=generator))


def texts() -> TensorDataset:
    """Rows of 12 tokens and their targets, of which a different number is masked, in one row all."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, 37, (44, 13), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(44):
        targets[row, : row % 13] = -100
    return TensorDataset(tokens[:, :-1].contiguous(), targets)


def classify(model: nn.Module, batch: Any) -> tuple[torch.Tensor, float | None]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets), None


def predict(model: nn.Module, batch: Any) -> tuple[torch.Tensor, float | None]:
    inputs, targets = batch
    weight = int((targets != -100).sum())
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()), weight


class Halving(torch.optim.Optimizer):
    """An optimizer that nobody knows, with a Python number in its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                norm = p.grad.norm() + 1e-6  # of the whole parameter: blocks would give another
                p.add_(p.grad / norm, alpha=-group["lr"] / (1 + state["count"] // 2))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # A gradient that is zero but for rounding (a key's bias) must not be blown up to a full step.
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}], lr=3e-3, eps=1e-4
    )


def matrices_by_muon(model: nn.Module) -> torch.optim.Optimizer:
    for p in model.parameters():
        if p.dim() != 2:
            p.requires_grad_(False)
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)


CASES = {
    case.name: case
    for case in (
        Case("gpt, tied, dropout, token weights", TinyGPT, texts, predict, grouped, warm_up, {"clip_grad_norm": 0.5}),
        Case("gpt, bf16", TinyGPT, texts, predict, adamw, None, {"precision": "bf16", "clip_grad_norm": 1.0}),
        Case("convolution, batch norm", ConvNet, images, classify, adamw),
        Case("convolution, bf16", ConvNet, images, classify, adamw, None, {"precision": "bf16"}),
        Case(
            "lstm, SGD",
            Recurrent,
            sequences,
            classify,
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
            lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        ),
        Case("lstm, bf16", Recurrent, sequences, classify, adamw, None, {"precision": "bf16"}),
        Case("experts, frozen, unused", Experts, vectors, classify, adamw, None, {"clip_grad_norm": 1.0}),
        Case(
            "experts, SGD",
            Experts,
            vectors,
            classify,
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1),
        ),
        Case("buffers", Counting, vectors, classify, adamw, None, {"buffers": {"largest": "maximum"}}),
        Case("RMSprop", perceptron, vectors, classify, lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9)),
        Case("Adagrad", perceptron, vectors, classify, lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05)),
        Case("Adafactor", perceptron, vectors, classify, lambda m: torch.optim.Adafactor(m.parameters(), lr=0.05)),
        Case("Muon", perceptron, vectors, classify, matrices_by_muon),
        Case("unknown optimizer", perceptron, vectors, classify, lambda m: Halving(m.parameters(), lr=0.1)),
    )
}
